"""How well masked genes are predicted, beside what their frequencies in the training cells alone would answer.

Only expressed genes are ever masked, so bin 0 (not expressed) is never a target and no number here counts a zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from screformer.train.cell_dataset import CELLS_READ_AT_ONCE, CellDataset
from screformer.train.collator import IGNORED_LABEL
from screformer.train.metrics import Int64Array, keep_logits

Float64Array = npt.NDArray[np.float64]
Tensors = torch.Tensor | tuple[torch.Tensor, ...]

# What `targets_of` says of each gene, in this order.
TARGET, GENE, CELL_MAJORITY = 0, 1, 2
UNKNOWN_BIN = 0  # of a cell of which nothing is visible


def count_gene_bins(
    cells: CellDataset,
    *,
    num_genes: int,
    num_bins: int,
    process: int = 0,
    num_processes: int = 1,
    show_progress: bool = False,
) -> Int64Array:
    """Return how often each gene is in each bin (num_genes, num_bins), column 0 being 0: zeros are not counted.

    One pass over the cells, a block at a time; memory is that of the table and of one block.

    Parameters
    ----------
    cells
        Those that training sees.
    num_genes, num_bins
        Of the model.
    process, num_processes
        Count the share of one of several processes; the sum over all is the table.
    show_progress
        Show a bar where there is more than one block.
    """
    counts = np.zeros(num_genes * num_bins, dtype=np.int64)
    first, last = (len(cells) * number // num_processes for number in (process, process + 1))
    starts = range(first, last, CELLS_READ_AT_ONCE)
    for start in tqdm(starts, desc="gene frequencies", leave=False, disable=not show_progress or len(starts) < 2):
        block = cells.__getitems__(range(start, min(start + CELLS_READ_AT_ONCE, last)))
        codes = block.gene_ids.astype(np.int64) * num_bins + block.input_ids
        counts += np.bincount(codes, minlength=len(counts))
    return counts.reshape(num_genes, num_bins)


class GeneBaselines:
    """What can be answered from the training cells' frequencies, without a look at the cell.

    Parameters
    ----------
    counts
        From `count_gene_bins`. A gene that training never saw is answered like the sum of all genes.

    Attributes
    ----------
    majority_bin
        Commonest bin of each gene where it is expressed, the lower of two (num_genes,).
    mean_bin
        Its mean bin where it is expressed, rounded (num_genes,).
    log_frequencies
        Logarithm of the frequency of each bin from 1 on where the gene is expressed, one cell more in each bin than
        were counted (Laplace), so that none is impossible; column 0 is minus infinity (num_genes, num_bins).

    Raises
    ------
    ValueError
        `counts` count zeros, or nothing.
    """

    def __init__(self, counts: Int64Array) -> None:
        if counts[:, 0].any() or not counts.any():
            raise ValueError(
                "counts must be of expressed genes (bins from 1 on), at least one, and none of bin 0; got "
                f"{int(counts[:, 0].sum())} in bin 0 of {int(counts.sum())}. Build the corpus again"
            )
        answered = np.where(counts.any(axis=1, keepdims=True), counts, counts.sum(axis=0))
        self.majority_bin: Int64Array = answered.argmax(axis=1)
        mean = answered @ np.arange(counts.shape[1]) / answered.sum(axis=1)
        self.mean_bin: Int64Array = np.floor(mean + 0.5).astype(np.int64)
        self.overall_majority_bin = int(counts.sum(axis=0).argmax())
        smoothed = counts[:, 1:] + 1
        self.log_frequencies: Float64Array = np.full(counts.shape, -np.inf)
        self.log_frequencies[:, 1:] = np.log(smoothed / smoothed.sum(axis=1, keepdims=True))


def targets_of(labels: torch.Tensor, inputs: Mapping[str, torch.Tensor], num_bins: int) -> torch.Tensor:
    """Return what the scores need of every gene (B, L, 3): its masked bin or -100, its position, its cell's majority.

    The last is the commonest bin among the cell's visible expressed genes, those that are not masked; 0 if there are
    none. All three go through the Trainer as its labels do, so that several processes gather them alike.

    Parameters
    ----------
    labels
        (B, L) original bins of the masked genes and -100 elsewhere.
    inputs
        The batch of the collator: ``input_ids``, and ``gene_ids`` unless it holds every gene.
    num_bins
        Expression bins; larger token ids are special.
    """
    tokens = inputs["input_ids"].to(labels.device)
    genes = inputs.get("gene_ids")
    positions = torch.arange(labels.shape[1], device=labels.device) if genes is None else genes.to(labels.device)
    is_visible = (labels == IGNORED_LABEL) & (tokens > 0) & (tokens < num_bins)
    counts = torch.zeros(len(labels), num_bins, dtype=torch.long, device=labels.device)
    counts.scatter_add_(1, tokens.where(is_visible, 0), is_visible.long())
    majority = counts.argmax(dim=1).where(counts.any(dim=1), UNKNOWN_BIN)
    return torch.stack([labels, positions.expand_as(labels), majority[:, None].expand_as(labels)], dim=-1)


def masked_gene_outcomes(logits: Tensors, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable bin of each masked gene and the loss of its true one, both (B, L); -100 and 0 elsewhere.

    For `preprocess_logits_for_metrics`: two numbers a gene are kept instead of a logit for each of its bins.
    """
    scores, labels = keep_logits(logits, targets), targets[..., TARGET]
    is_masked = labels != IGNORED_LABEL
    chosen = scores[is_masked].float()
    predicted = torch.full_like(labels, IGNORED_LABEL)
    predicted[is_masked] = chosen.argmax(dim=-1)
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    losses[is_masked] = torch.nn.functional.cross_entropy(chosen, labels[is_masked], reduction="none")
    return predicted, losses


class _Tally(NamedTuple):
    """Sums over the masked genes of each true bin; `counts` is a table (true bin, predicted bin)."""

    counts: Int64Array
    losses: Float64Array
    frequency_losses: Float64Array
    gene_majority: Int64Array
    gene_mean: Int64Array
    cell_majority: Int64Array

    @classmethod
    def empty(cls, num_bins: int) -> _Tally:
        numbers = [np.zeros(num_bins, dtype=np.int64) for _ in range(3)]
        return cls(np.zeros((num_bins, num_bins), dtype=np.int64), np.zeros(num_bins), np.zeros(num_bins), *numbers)


class MaskedGeneMetrics:
    """Accuracy and loss on masked genes, beside those of answers that need no model.

    Made for ``TrainingArguments(batch_eval_metrics=True)``: it counts batch by batch, as the predictions of a whole
    held-out set (cells x genes) would not fit into memory. Predictions are those of `masked_gene_outcomes`, labels
    those of `targets_of`.

    Parameters
    ----------
    gene_bin_counts
        From `count_gene_bins`, of the training cells only.

    Attributes
    ----------
    by_bin
        `scores_by_bin` of the last evaluation; empty before one.
    """

    def __init__(self, gene_bin_counts: Int64Array) -> None:
        self.num_bins = gene_bin_counts.shape[1]
        self.baselines = GeneBaselines(gene_bin_counts)
        self.by_bin: list[dict[str, Any]] = []  # Any: JSON
        self._tally = _Tally.empty(self.num_bins)

    def __call__(self, prediction: Any, *, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; return the scores when `compute_result`, and start anew."""
        targets, (predicted, losses) = prediction.label_ids, prediction.predictions
        is_masked = targets[..., TARGET] != IGNORED_LABEL
        self._add(*(_to_numpy(values[is_masked]) for values in (targets, predicted, losses)))
        if not compute_result:
            return {}
        tally, self._tally = self._tally, _Tally.empty(self.num_bins)
        scores = masked_gene_scores(tally)
        self.by_bin = scores_by_bin(tally)
        return scores

    def _add(self, targets: Int64Array, predicted: Int64Array, losses: npt.NDArray[np.float32]) -> None:
        truth, genes, cell_majority = targets.T
        if len(truth) and truth.min() < 1:
            raise ValueError(
                f"labels of masked genes must be bins from 1 to {self.num_bins - 1}, got {truth.min()}: genes that are "
                "not expressed are never masked"
            )
        answers, tally = self.baselines, self._tally
        np.add.at(tally.counts, (truth, predicted), 1)
        in_cell = np.where(cell_majority == UNKNOWN_BIN, answers.overall_majority_bin, cell_majority)
        for sums, values in (
            (tally.losses, losses),
            (tally.frequency_losses, -answers.log_frequencies[genes, truth]),
            (tally.gene_majority, answers.majority_bin[genes] == truth),
            (tally.gene_mean, answers.mean_bin[genes] == truth),
            (tally.cell_majority, in_cell == truth),
        ):
            np.add.at(sums, truth, values)


def masked_gene_scores(tally: _Tally) -> dict[str, float]:
    """Return the scores over all masked genes.

    ``masked_accuracy`` and ``masked_loss`` (mean cross-entropy a masked gene; the Trainer's own loss is a mean over
    batches) of the model. Without them those mean nothing: ``majority_bin_accuracy``, of always answering the
    commonest true bin; ``gene_majority_accuracy`` and ``gene_mean_accuracy``, of answering each gene's commonest or
    mean bin in the training cells; ``cell_majority_accuracy``, of answering the commonest visible bin of the cell;
    ``gene_frequency_loss``, the cross-entropy of each gene's bin frequencies. ``majority_bin_share`` is how often the
    model answers the commonest bin, ``num_masked_genes`` what all this is measured on.

    Raises
    ------
    ValueError
        Nothing was masked.
    """
    counts = tally.counts
    total = int(counts.sum())
    if total == 0:
        raise ValueError("no gene of the held-out cells was masked; give the collator a masked_fraction above 0")
    majority = int(counts.sum(axis=1).argmax())
    return {
        "masked_accuracy": float(np.trace(counts) / total),
        "majority_bin_accuracy": float(counts[majority].sum() / total),
        "gene_majority_accuracy": float(tally.gene_majority.sum() / total),
        "gene_mean_accuracy": float(tally.gene_mean.sum() / total),
        "cell_majority_accuracy": float(tally.cell_majority.sum() / total),
        "masked_loss": float(tally.losses.sum() / total),
        "gene_frequency_loss": float(tally.frequency_losses.sum() / total),
        "majority_bin_share": float(counts[:, majority].sum() / total),
        "num_masked_genes": total,
    }


def scores_by_bin(tally: _Tally) -> list[dict[str, Any]]:
    """Return the scores at each true bin from 1 on: number, accuracy and loss of the model and of the other answers.

    A bin without masked genes has None for every score.
    """
    numbers = tally.counts.sum(axis=1)
    sums = {
        "accuracy": np.diag(tally.counts),
        "gene_majority_accuracy": tally.gene_majority,
        "gene_mean_accuracy": tally.gene_mean,
        "cell_majority_accuracy": tally.cell_majority,
        "loss": tally.losses,
        "gene_frequency_loss": tally.frequency_losses,
    }
    return [
        {
            "bin": number,
            "num_masked_genes": int(numbers[number]),
            **{name: float(values[number] / numbers[number]) if numbers[number] else None
               for name, values in sums.items()},
        }
        for number in range(1, len(numbers))
    ]  # fmt: skip


def _to_numpy(values: Any) -> npt.NDArray[Any]:  # Any: tensors in the evaluation loop, arrays elsewhere
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
