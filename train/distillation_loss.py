"""What a student learns from: the teacher's softened probabilities beside the labels (Hinton et al. 2015).

Source: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional

from screformer.train.collator import IGNORED_LABEL
from screformer.train.metrics import cell_type_scores
from screformer.train.taught_cells import NO_CLASS

Int64Array = npt.NDArray[np.int64]


class DistillationLoss:
    """The loss of a batch; ``Trainer(compute_loss_func=...)``.

    Of one cell it is ``teacher_weight * temperature**2 * KL(teacher || student)``, both softened by the temperature,
    plus ``(1 - teacher_weight) *`` cross-entropy on its label; a cell without a label has the first term only. The
    square keeps the share of both terms in the gradient when the temperature changes (Hinton et al. 2015, section 2).

    Targets are (B, 1 + K) numbers: the class id, or -1 for none, and the teacher's logits of the whole cell. So
    everything that a cell is to learn is its label in the Trainer's eyes, in every mode of training.

    Parameters
    ----------
    temperature
        Above 0; 1 leaves the probabilities as they are.
    teacher_weight
        From 0 (labels alone: plain fine-tuning) to 1 (teacher alone).
    label_smoothing
        Share of the label's probability that all classes get.
    """

    def __init__(self, temperature: float, teacher_weight: float, *, label_smoothing: float = 0.0) -> None:
        self.temperature = temperature
        self.teacher_weight = teacher_weight
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Any, targets: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the mean over the cells, those of all batches of an optimizer step if the Trainer has counted them."""
        # What only keeps a process busy counts for nothing, but stays in the graph, in which all processes meet.
        is_counted = targets[:, 0] != IGNORED_LABEL
        losses = self.of_cells(outputs["logits"], targets.masked_fill(~is_counted[:, None], NO_CLASS)) * is_counted
        if num_items_in_batch is None:
            return losses.sum() / is_counted.sum().clamp(min=1)
        # The Trainer counts the numbers in the targets.
        num_cells = num_items_in_batch / targets.shape[1]
        return losses.sum() / (num_cells.to(losses.device) if isinstance(num_cells, Tensor) else num_cells)

    def of_cells(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each cell (B,) for the student's logits (B, K)."""
        # In float32 whatever the mode: small probabilities are what distillation is about.
        logits, targets = logits.float(), targets.float()
        class_ids, teacher_logits = targets[:, 0].long(), targets[:, 1:]
        divergence = functional.kl_div(
            functional.log_softmax(logits / self.temperature, dim=-1),
            functional.log_softmax(teacher_logits / self.temperature, dim=-1),
            reduction="none",
            log_target=True,
        ).sum(dim=-1)
        cross_entropy = functional.cross_entropy(
            logits, class_ids, reduction="none", ignore_index=NO_CLASS, label_smoothing=self.label_smoothing
        )
        return self.teacher_weight * self.temperature**2 * divergence + (1 - self.teacher_weight) * cross_entropy


def compute_distillation_metrics(prediction: Any) -> dict[str, float]:  # Any: transformers' EvalPrediction
    """Return the validation scores of one epoch: those of fine-tuning where there are labels, and agreement."""
    targets, predicted = np.asarray(prediction.label_ids), np.argmax(prediction.predictions, axis=-1)
    class_ids, taught = targets[:, 0].astype(np.int64), targets[:, 1:].argmax(axis=-1)
    return student_scores(predicted, class_ids, taught)


def student_scores(predicted: Int64Array, class_ids: Int64Array, taught: Int64Array) -> dict[str, float]:
    """Return agreement, the share of cells that get the teacher's answer, and `cell_type_scores` of those with a label.

    Parameters
    ----------
    predicted
        Class ids that a model answers with.
    class_ids
        True ones, -1 where there is no label.
    taught
        Class ids that the teacher answers with.
    """
    has_label = class_ids != NO_CLASS
    scores = cell_type_scores(predicted[has_label], class_ids[has_label]) if has_label.any() else {}
    return {**scores, "agreement": float(np.mean(predicted == taught))}
