"""Cells as a torch data set that gives with each what a student is to learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from screformer.tokenization.corpus import Corpus
from screformer.train.cell_dataset import CellBatch, CellDataset, Positions
from screformer.train.collator import IGNORED_LABEL, CellCollator
from screformer.train.teacher_logits import TeacherLogits

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TaughtCellBatch(CellBatch):
    """Some cells with what is to be learned from them: `targets` (num_cells, 1 + K), see `DistillationLoss`."""

    targets: FloatArray = field(default_factory=lambda: np.empty((0, 1), dtype=np.float32))


class TaughtCellDataset(CellDataset):
    """Cells of a corpus with their class ids and the teacher's logits.

    Parameters
    ----------
    corpus, rows
        The cells, in this order.
    class_ids
        One a cell, -1 where there is no label.
    teacher_logits
        Of these cells at least.
    """

    def __init__(
        self, corpus: Corpus, rows: Int64Array, *, class_ids: Int64Array, teacher_logits: TeacherLogits
    ) -> None:
        super().__init__(corpus, rows)
        assert len(class_ids) == len(rows)
        self.corpus_rows = rows
        self.class_ids = class_ids
        self.teacher_logits = teacher_logits

    def __getitems__(self, positions: Positions) -> TaughtCellBatch:
        """Return several cells with their targets; torch's loader asks for a batch this way."""
        cells, numbers = super().__getitems__(positions), np.asarray(positions, dtype=np.int64)
        class_ids = self.class_ids[numbers, None].astype(np.float32)
        targets = np.concatenate([class_ids, self.teacher_logits.of(self.corpus_rows[numbers])], axis=1)
        return TaughtCellBatch(**vars(cells), targets=targets)


class TaughtCellCollator(CellCollator):
    """A `CellCollator` whose labels are the targets; gene dropout leaves these, which are of the whole cell, alone."""

    def __call__(self, rows: Sequence[Any] | CellBatch) -> dict[str, Tensor]:  # Any: as CellCollator has it
        """Return the batch of `rows`, in their order."""
        assert isinstance(rows, TaughtCellBatch)
        labels = torch.from_numpy(rows.targets)
        if rows.num_counted is not None:
            labels[rows.num_counted :] = IGNORED_LABEL
        return {**super().__call__(rows), "labels": labels}
