"""A corpus's labelled cells and their parts: which train, which select and which test (paper, section 2.5)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from screformer.tokenization.corpus import Corpus
from screformer.train.arguments import FineTuningDataArguments, ScReformerTrainingArguments
from screformer.train.corpus_columns import name_cells, read_column
from screformer.train.figures import plot_proportions
from screformer.train.result_files import write_json
from screformer.train.splits import Split, split_by_group, split_cells

logger = logging.getLogger(__name__)

SPLITS_FILE, PROPORTIONS_FILE = "splits.json", "cell_types.png"


class LabelledCells(NamedTuple):
    """A corpus's labelled cells: row numbers in it, label and group of each, and their parts."""

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_] | None
    split: Split


def split_labelled_cells(corpus: Corpus, data: FineTuningDataArguments, seed: int) -> LabelledCells:
    """Return the labelled cells, split as `data` says; validation cells whose label training lacks are in no part.

    Cells without a group are in no part where groups are held out. With a `validation_fraction` of 0 there are no
    validation cells. With `cells_per_label` most training cells are in no part either.

    Raises
    ------
    ValueError
        A column or a group is not in the corpus, or a part that is needed would be empty.
    """
    labels = read_column(corpus, data.label_column, argument="label_column")
    is_used = (labels != "") & ~np.isin(labels, np.array(data.exclude_labels, dtype=np.str_))
    rows = np.flatnonzero(is_used)
    if len(rows) < len(labels):
        logger.info(
            "%d of %d cells have no label or an excluded one and are left out", len(labels) - len(rows), len(labels)
        )
    labels = labels[rows]
    groups = None
    if data.group_column is None:
        fractions = (1 - data.validation_fraction - data.test_fraction, data.validation_fraction, data.test_fraction)
        split = split_cells(labels, fractions=fractions, seed=seed)
    else:
        groups = read_column(corpus, data.group_column, argument="group_column")[rows]
        split = split_by_group(
            labels,
            groups,
            test_groups=data.test_groups,
            validation_groups=data.validation_groups or None,
            validation_fraction=data.validation_fraction,
            seed=seed,
        )
    if data.cells_per_label is not None:
        split = split._replace(train=draw_of_each_label(split.train, labels, data.cells_per_label, seed))
    is_chosen_by = data.validation_fraction > 0 or bool(data.validation_groups)
    return LabelledCells(rows, labels, groups, _drop_unseen(split, labels) if is_chosen_by else split)


def draw_at_most(
    train: npt.NDArray[np.int64], labels: npt.NDArray[np.str_], number: int, *, of_each: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return `train`, or of more than `number` cells as many at random, joined by up to `of_each` of each label."""
    if len(train) <= number:
        return train
    drawn = np.random.default_rng(seed).permutation(train)[:number]
    return np.union1d(drawn, draw_of_each_label(train, labels, of_each, seed))


def draw_of_each_label(
    train: npt.NDArray[np.int64], labels: npt.NDArray[np.str_], number: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return at most `number` training cells of each label: more of them with the same seed hold these too."""
    shuffled = np.random.default_rng(seed).permutation(train)
    drawn = [shuffled[labels[shuffled] == label][:number] for label in np.unique(labels[train])]
    return np.sort(np.concatenate(drawn))


def _drop_unseen(split: Split, labels: npt.NDArray[np.str_]) -> Split:
    """Return the split without validation cells whose label training does not have."""
    is_seen = np.isin(labels[split.validation], labels[split.train])
    unseen = sorted(set(labels[split.validation[~is_seen]].tolist()))
    if unseen:
        logger.warning(
            "%d validation cells are left out: training has no cell with their labels %s", (~is_seen).sum(), unseen
        )
    if not is_seen.any():
        raise ValueError(
            "the validation part is empty, and nothing could select the best epoch; choose a larger "
            "validation_fraction or other validation_groups"
        )
    return split._replace(validation=split.validation[is_seen])


def write_split(
    corpus: Corpus,
    cells: LabelledCells,
    data: FineTuningDataArguments,
    training: ScReformerTrainingArguments,
    *,
    more: Mapping[str, Any] | None = None,  # Any: JSON
) -> None:
    """Write ``splits.json``, with `more` in it, and the figure of cell types in each group or part."""
    cell_names = name_cells(corpus)[cells.rows]
    parts = cells.split._asdict()
    write_json(
        f"{training.output_dir}/{SPLITS_FILE}",
        {
            "label_column": data.label_column,
            "group_column": data.group_column,
            "test_groups": data.test_groups,
            "seed": training.seed,
            "num_cells": {name: len(rows) for name, rows in parts.items()},
            **{name: cell_names[rows].tolist() for name, rows in parts.items()},
            **(more or {}),
        },
    )
    if not len(cells.labels):  # nothing to draw
        return
    counts: dict[str, dict[str, int]] = {}
    if cells.groups is None:
        members = {name: cells.labels[rows] for name, rows in parts.items()}
    else:
        members = {name: cells.labels[cells.groups == name] for name in sorted(set(cells.groups.tolist()) - {""})}
    for name, labels in members.items():
        present, numbers = np.unique(labels, return_counts=True)
        counts[name] = dict(zip(present.tolist(), numbers.tolist(), strict=True))
    plot_proportions(
        counts,
        f"{training.output_dir}/{PROPORTIONS_FILE}",
        title=data.label_column,
        group_name=data.group_column or "part",
    )
