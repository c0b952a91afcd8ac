"""Class weights: rare cell types count as much as common ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from screformer.train.collator import IGNORED_LABEL

if TYPE_CHECKING:
    from screformer.train.arguments import FineTuningArguments

CLASS_WEIGHTS = ("none", "balanced")


def check_class_weights(class_weights: str) -> None:
    """Raise ValueError unless `class_weights` is one that there is."""
    if class_weights not in CLASS_WEIGHTS:
        raise ValueError(f"class_weights got {class_weights!r}; allowed are {', '.join(CLASS_WEIGHTS)}")


def balanced_weights(labels: npt.NDArray[np.str_], label2id: Mapping[str, int]) -> Tensor:
    """Return a weight a class, (K,): ``N / (K * N_c)`` for ``N_c`` of ``N`` cells, which is 1 in the mean over cells.

    Raises
    ------
    ValueError
        A class has no cell, and no weight could make up for that.
    """
    names = sorted(label2id, key=label2id.__getitem__)
    numbers = np.array([(labels == name).sum() for name in names])
    if not numbers.all():
        absent = [name for name, number in zip(names, numbers, strict=True) if not number]
        raise ValueError(f"class_weights='balanced' needs a training cell of every label; {absent} have none")
    return torch.tensor(len(labels) / (len(names) * numbers), dtype=torch.float32)


class ClassWeightedLoss:
    """Cross-entropy times the weight of the cell's true class, over the cells of an optimizer step.

    The sum is divided by the number of cells, not by the sum of their weights: the gradient of a step is then the same
    however it is split into batches, and the mean over an epoch is that of equally frequent classes.

    Parameters
    ----------
    weights
        (K,), from `balanced_weights`.
    label_smoothing
        Share of the target that all classes get alike.
    """

    def __init__(self, weights: Tensor, label_smoothing: float = 0.0) -> None:
        self.weights, self.label_smoothing = weights, label_smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of a batch, as ``Trainer(compute_loss_func=...)`` asks for it."""
        losses = cross_entropy(
            outputs["logits"].float(), labels, reduction="none", label_smoothing=self.label_smoothing
        )
        # A cell that only keeps a process busy has the label -100, and a loss of 0.
        weighted = losses * self.weights.to(losses.device)[labels.clamp(min=0)]
        num_cells = (labels != IGNORED_LABEL).sum().clamp(min=1)
        return weighted.sum() / (num_cells if num_items_in_batch is None else num_items_in_batch)


def class_weighted_loss(
    labels: npt.NDArray[np.str_], label2id: Mapping[str, int], training: FineTuningArguments
) -> ClassWeightedLoss | None:
    """Return the loss that `training` asks for, None for the model's own (which the Trainer can smooth).

    Parameters
    ----------
    labels
        Names of the training cells' classes.
    label2id
        The model's.
    training
        With `class_weights` and `label_smoothing_factor`.
    """
    if training.class_weights == "none":
        return None
    return ClassWeightedLoss(balanced_weights(labels, label2id), training.label_smoothing_factor)
