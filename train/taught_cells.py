"""The cells of a distillation: the teacher's own parts or new ones, and cells without a label beside them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from screformer.tokenization.corpus import Corpus
from screformer.train.corpus_columns import NOT_TEXT, name_cells, read_column
from screformer.train.distillation_arguments import DistillationDataArguments
from screformer.train.labelled_cells import SPLITS_FILE, LabelledCells, split_labelled_cells
from screformer.train.result_files import read_json
from screformer.train.splits import Split, hold_out

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]
TeacherSplit = dict[str, Any]  # Any: what splits.json holds
NO_ROWS: Int64Array = np.empty(0, dtype=np.int64)
NO_CLASS = -1


class TaughtCells(NamedTuple):
    """Labelled cells with their parts, and row numbers of the cells that only the teacher says something about."""

    labelled: LabelledCells
    unlabelled_train: Int64Array
    unlabelled_validation: Int64Array

    def training_cells(self, label_names: Sequence[str]) -> tuple[Int64Array, Int64Array]:
        """Return (row numbers in the corpus, class ids) of the cells to learn from, -1 where there is no label."""
        return self._cells(self.labelled.split.train, self.unlabelled_train, label_names)

    def validation_cells(self, label_names: Sequence[str]) -> tuple[Int64Array, Int64Array]:
        """Return (row numbers in the corpus, class ids) of the cells that select the best epoch."""
        return self._cells(self.labelled.split.validation, self.unlabelled_validation, label_names)

    def _cells(
        self, part: Int64Array, unlabelled: Int64Array, label_names: Sequence[str]
    ) -> tuple[Int64Array, Int64Array]:
        id_of = {name: index for index, name in enumerate(label_names)}
        classes = [id_of[label] for label in self.labelled.labels[part].tolist()]
        rows = np.concatenate([self.labelled.rows[part], unlabelled])
        return rows, np.array(classes + [NO_CLASS] * len(unlabelled), dtype=np.int64)


def read_teacher_split(teacher: str) -> TeacherSplit | None:
    """Return the teacher's ``splits.json``, None if it has none (or is on the Hub)."""
    path = Path(teacher) / SPLITS_FILE
    return read_json(path) if path.exists() else None


def choose_taught_cells(
    corpus: Corpus,
    data: DistillationDataArguments,
    teacher_split: TeacherSplit | None,
    label_names: Sequence[str],
    *,
    teacher: str,
    seed: int,
) -> TaughtCells:
    """Return the cells to learn from and to select by; none of them was the teacher's test cell.

    Parameters
    ----------
    corpus, data
        The cells and how they are split; for ``split="teacher"`` with the columns of the teacher's split.
    teacher_split
        The teacher's ``splits.json``.
    label_names
        What the teacher knows.
    teacher
        Its name, for messages.
    seed
        Draws the parts of a new split.

    Raises
    ------
    ValueError
        The corpus lacks cells of the teacher's split, a column or a group; a cell has a label that the teacher does
        not know; or nothing is left to learn from.
    """
    labels = _read_labels(corpus, data)
    has_labels = bool((labels != "").any())
    if data.split == "teacher":
        assert teacher_split is not None
        labelled = _split_as_teacher(corpus, data, labels, teacher_split, teacher)
    elif has_labels or not data.use_unlabelled:
        labelled = split_labelled_cells(corpus, data, seed)
    else:
        nobody = Split(NO_ROWS, NO_ROWS, NO_ROWS)
        labelled = LabelledCells(NO_ROWS, np.empty(0, dtype=np.str_), None, nobody)
    tested = _rows_of_test_cells(corpus, teacher_split, teacher)
    labelled = _without(labelled, tested)
    _refuse_unknown_labels(labelled, label_names, teacher)
    unlabelled = np.flatnonzero(labels == "") if data.use_unlabelled else NO_ROWS
    unlabelled = _outside_held_out_groups(corpus, data, labelled, np.setdiff1d(unlabelled, tested))
    if len(labelled.split.validation):
        return TaughtCells(labelled, unlabelled, NO_ROWS)
    if len(labelled.split.train) and not len(unlabelled):
        return TaughtCells(_with_validation(labelled, data.validation_fraction, seed), NO_ROWS, NO_ROWS)
    kept, selecting = hold_out(len(unlabelled), fraction=data.validation_fraction, seed=seed)
    return TaughtCells(labelled, unlabelled[kept], unlabelled[selecting])


def _read_labels(corpus: Corpus, data: DistillationDataArguments) -> npt.NDArray[np.str_]:
    """Return the label of every cell; "" for all if the corpus has no labels and needs none."""
    known = [name for name in corpus.dataset.column_names if name not in NOT_TEXT]
    if data.use_unlabelled and data.split == "new" and data.label_column not in known:
        logger.info("the corpus has no column %r: no cell has a label", data.label_column)
        return np.full(len(corpus), "", dtype=np.str_)
    return read_column(corpus, data.label_column, argument="label_column")


def _split_as_teacher(
    corpus: Corpus,
    data: DistillationDataArguments,
    labels: npt.NDArray[np.str_],
    teacher_split: TeacherSplit,
    teacher: str,
) -> LabelledCells:
    row_of = {name: row for row, name in enumerate(name_cells(corpus).tolist())}
    names = [name for part in Split._fields for name in teacher_split[part]]
    missing = [name for name in names if name not in row_of]
    if missing:
        raise ValueError(
            f"split='teacher': {len(missing)} of the {len(names)} cells in the splits.json of teacher {teacher!r} are "
            f"not in the corpus {corpus.folder}, the first is {missing[0]!r}. Use the corpus that the teacher was "
            "fine-tuned on, or split these cells anew (--split new)"
        )
    rows = np.sort(np.array([row_of[name] for name in names], dtype=np.int64))
    without = np.flatnonzero(labels[rows] == "")
    if len(without):
        raise ValueError(
            f"label_column={data.label_column!r}: {len(without)} cells of the teacher's split have no label in "
            f"{corpus.folder}; use the corpus that the teacher was fine-tuned on"
        )
    groups = None
    if data.group_column is not None:
        groups = read_column(corpus, data.group_column, argument="group_column")[rows]
    parts = (
        np.searchsorted(rows, np.sort(np.array([row_of[name] for name in teacher_split[part]], dtype=np.int64)))
        for part in Split._fields
    )
    return LabelledCells(rows, labels[rows], groups, Split(*parts))


def _rows_of_test_cells(corpus: Corpus, teacher_split: TeacherSplit | None, teacher: str) -> Int64Array:
    if teacher_split is None:
        logger.warning("teacher %s does not say which cells it was tested on; they cannot be kept apart", teacher)
        return NO_ROWS
    return np.flatnonzero(np.isin(name_cells(corpus), np.array(teacher_split["test"], dtype=np.str_)))


def _without(labelled: LabelledCells, tested: Int64Array) -> LabelledCells:
    """Return the cells with those that tested the teacher in the test part, wherever a new split has put them."""
    is_tested = np.isin(labelled.rows, tested)
    train, validation, test = labelled.split
    moved = int(is_tested[train].sum() + is_tested[validation].sum())
    if not moved:
        return labelled
    logger.warning("%d cells that tested the teacher are taken out of training and validation", moved)
    train, validation = train[~is_tested[train]], validation[~is_tested[validation]]
    if not len(train) or not len(validation):
        raise ValueError(
            f"split='new' leaves {len(train)} cells to train on and {len(validation)} to validate with, as {moved} "
            "others tested the teacher; choose a larger validation_fraction, or other groups"
        )
    return labelled._replace(split=Split(train, validation, np.union1d(test, np.flatnonzero(is_tested))))


def _with_validation(labelled: LabelledCells, fraction: float, seed: int) -> LabelledCells:
    """Return the cells with a part of those that train for validation: the teacher was trained without any."""
    train, _, test = labelled.split
    kept, selecting = hold_out(len(train), fraction=fraction, seed=seed)
    logger.warning(
        "the teacher's split has no validation cells: %d of the %d cells that trained it select the student's best "
        "epoch, and on these the teacher looks better than it is",
        len(selecting),
        len(train),
    )
    return labelled._replace(split=Split(train[kept], train[selecting], test))


def _refuse_unknown_labels(labelled: LabelledCells, label_names: Sequence[str], teacher: str) -> None:
    used = labelled.labels[np.concatenate([labelled.split.train, labelled.split.validation])]
    unknown = sorted(set(used.tolist()) - set(label_names))
    if unknown:
        options = f"--exclude_labels {' '.join(map(repr, unknown))}"
        raise ValueError(
            f"label_column: {int(np.isin(used, unknown).sum())} cells have the labels {unknown}, which teacher "
            f"{teacher!r} does not know, or that are above its classes in its label tree; its classes are "
            f"{list(label_names)}. Split anew without them (--split new {options}), or "
            "by the column with the teacher's labels (--split new --label_column)"
        )


def _outside_held_out_groups(
    corpus: Corpus, data: DistillationDataArguments, labelled: LabelledCells, unlabelled: Int64Array
) -> Int64Array:
    """Return the cells without those of a test group, of a group that only validates, or of none that is known."""
    if data.group_column is None or not len(unlabelled):
        return unlabelled
    groups = read_column(corpus, data.group_column, argument="group_column")
    held_out = {*data.test_groups, *data.validation_groups}
    if labelled.groups is not None:
        train, validation, _ = (set(labelled.groups[part].tolist()) for part in labelled.split)
        held_out |= validation - train
    kept = unlabelled[~np.isin(groups[unlabelled], ["", *sorted(held_out)])]
    if len(kept) < len(unlabelled):
        logger.info(
            "%d cells without a label are in held-out groups, or in none, and stay unseen", len(unlabelled) - len(kept)
        )
    return kept
