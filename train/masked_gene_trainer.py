"""The trainer of pretraining: evaluation that knows which gene stands where, and so how hard each is to predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from screformer.train.figures import plot_masked_genes
from screformer.train.masked_gene_metrics import MaskedGeneMetrics, masked_gene_outcomes, targets_of
from screformer.train.metrics import Int64Array
from screformer.train.training_run import BY_BIN_FIGURE, CellTrainer


class MaskedGeneTrainer(CellTrainer):
    """A `CellTrainer` whose held-out scores stand beside those of the training cells' gene frequencies.

    Parameters
    ----------
    gene_bin_counts
        From `count_gene_bins`, of the training cells.
    *args, **kwargs
        As for `CellTrainer`.
    """

    def __init__(self, *args: Any, gene_bin_counts: Int64Array, **kwargs: Any) -> None:  # Any: Trainer's own
        self.masked_gene_metrics = MaskedGeneMetrics(gene_bin_counts)
        super().__init__(
            *args,
            compute_metrics=self.masked_gene_metrics,
            preprocess_logits_for_metrics=masked_gene_outcomes,
            **kwargs,
        )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor | None]:
        """Return loss and logits, and as labels what `targets_of` makes of them."""
        inputs = self._prepare_inputs(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if labels is not None:
            labels = targets_of(labels, inputs, self.masked_gene_metrics.num_bins)
        return loss, logits, labels

    def describe_evaluation(self, folder: Path) -> dict[str, Any]:
        """Draw the last evaluation by expression level, and return it as ``by_bin``."""
        by_bin = self.masked_gene_metrics.by_bin
        if self.is_world_process_zero():
            plot_masked_genes(by_bin, folder / BY_BIN_FIGURE)
        return {"by_bin": by_bin}
