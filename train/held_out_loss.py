"""The loss of held-out cells: every target counts once, whatever the batches and the number of processes."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from screformer.train.collator import IGNORED_LABEL


class HeldOutLoss:
    """Mean loss over targets.

    The Trainer's own figure is a mean of the batches' means, which are of different numbers of targets, and with
    several processes counts cells twice that fill the last batches up.
    """

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, loss: torch.Tensor, labels: torch.Tensor) -> None:
        """Count the mean loss of a batch for the targets that it has."""
        count = int((labels != IGNORED_LABEL).sum())
        if count:
            self._total += float(loss) * count
            self._count += count

    def mean(self) -> float:
        """Return the mean over all targets of all processes, which must all ask; NaN if there were none."""
        totals, counts = zip(*gather_object([(self._total, self._count)]), strict=True)
        return math.fsum(totals) / sum(counts) if sum(counts) else math.nan


def ignore_repeated_cells(labels: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Return a batch's labels (B, ...) without those of cells that only fill up the last batches of all processes.

    Of the last batches, one after the other, the first `remainder` cells are real (see `gather_for_metrics`).
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return labels
    num_real = max(0, state.remainder - accelerator.process_index * len(labels))
    labels = labels.clone()
    labels[num_real:] = IGNORED_LABEL
    return labels
