"""Which cells train, which select and which test: at random, by donor or dataset, or in folds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]
Names = Sequence[str] | npt.NDArray[np.str_]

DEFAULT_SEED = 2022
DEFAULT_FRACTIONS = (0.6, 0.2, 0.2)


class Split(NamedTuple):
    """Row numbers of the three parts, each ascending; together they are every cell once, but for those of no group."""

    train: Int64Array
    validation: Int64Array
    test: Int64Array


def split_cells(
    labels: Names,
    *,
    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS,
    seed: int = DEFAULT_SEED,
) -> Split:
    """Return a random split into train, validation and test, stratified by label (paper, section 2.5).

    Each label's share of a part is within one cell of `fractions`. A label with at least three cells is in every part
    whose fraction is not 0; a rarer one goes to training as a whole, with a logged warning. Cells of one donor land in
    all three parts, so scores on such a test set flatter every method: see `split_by_group`.

    Raises
    ------
    ValueError
        There are no cells, or `fractions` are not three shares that sum to 1 with some for training.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not np.isclose(sum(fractions), 1) or fractions[0] == 0:
        raise ValueError(
            f"fractions must be three shares (train, validation, test) that sum to 1, train above 0, got {fractions}"
        )
    names = _as_labels(labels)
    train, (validation, test) = _deal(np.arange(len(names)), names, fractions[1:], seed=seed)
    return Split(train, validation, test)


def split_by_group(
    labels: Names,
    groups: Names,
    *,
    test_groups: Sequence[str],
    validation_groups: Sequence[str] | None = None,
    validation_fraction: float = 0.2,
    seed: int = DEFAULT_SEED,
) -> Split:
    """Return a split whose test set is whole groups: donors or datasets that training never sees.

    Validation is whole groups too if `validation_groups` names them; else a stratified slice (`validation_fraction`) of
    the cells outside the test groups. Cells without a group ("") may be of a test group's donor: they are in no part,
    with a logged warning.

    Raises
    ------
    ValueError
        A named group does not exist, is in two parts, or nothing is left to train on; lengths differ; or
        `validation_fraction` is not in [0, 1).
    """
    names, group_names = _as_labels(labels), _as_labels(groups)
    if len(names) != len(group_names):
        raise ValueError(f"labels and groups must have one entry a cell, got {len(names)} and {len(group_names)}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}")
    inner = list(validation_groups or ())
    _check_groups(group_names, list(test_groups), inner)
    is_test, is_validation = np.isin(group_names, list(test_groups)), np.isin(group_names, inner)
    has_group = group_names != ""
    if not has_group.all():
        logger.warning("%d cells have no group, so that any may be theirs: they are left out", (~has_group).sum())
    rest = np.flatnonzero(has_group & ~is_test & ~is_validation)
    if not len(rest):
        raise ValueError("test_groups and validation_groups hold every cell; leave at least one group for training")
    if inner:
        return Split(rest, np.flatnonzero(is_validation), np.flatnonzero(is_test))
    train, (validation,) = _deal(rest, names, [validation_fraction], seed=seed)
    return Split(train, validation, np.flatnonzero(is_test))


def cross_validation_folds(
    labels: Names,
    *,
    num_folds: int = 5,
    groups: Names | None = None,
    validation_fraction: float = 0.2,
    seed: int = DEFAULT_SEED,
) -> list[Split]:
    """Return one split a fold; each cell is tested exactly once.

    Without `groups`: `num_folds` folds, stratified by label (the paper's five-fold validation). With `groups`: one fold
    a group, in sorted order, that leaves it out (`num_folds` is not used). Validation is a stratified slice of what is
    left.

    Raises
    ------
    ValueError
        `num_folds` is below 2, there are fewer than two groups, or a label has one cell only (it could not be in
        training when it is tested).
    """
    if groups is not None:
        names = sorted(set(map(str, groups)) - {""})
        if len(names) < 2:
            raise ValueError(f"groups must name at least two groups to leave one out, got {names}")
        return [
            split_by_group(labels, groups, test_groups=[name], validation_fraction=validation_fraction, seed=seed)
            for name in names
        ]
    if num_folds < 2:
        raise ValueError(f"num_folds must be at least 2, got {num_folds}")
    label_names = _as_labels(labels)
    fold_of_cell = _assign_folds(label_names, num_folds, seed)
    folds = []
    for fold in range(num_folds):
        rest = np.flatnonzero(fold_of_cell != fold)
        train, (validation,) = _deal(rest, label_names, [validation_fraction], seed=seed + 1 + fold)
        folds.append(Split(train, validation, np.flatnonzero(fold_of_cell == fold)))
    return folds


def hold_out(num_cells: int, *, fraction: float, seed: int = DEFAULT_SEED) -> tuple[Int64Array, Int64Array]:
    """Return (kept, held out) row numbers drawn at random: the paper's held-out 10% of pretraining (section 2.7).

    Raises
    ------
    ValueError
        `fraction` does not leave at least one cell on each side.
    """
    num_held_out = round(num_cells * fraction)
    if not 0 < num_held_out < num_cells:
        raise ValueError(
            f"fraction={fraction} of {num_cells} cells holds out {num_held_out}; at least one cell must be held out "
            "and one kept. Choose another fraction or a larger corpus"
        )
    order = np.random.default_rng(seed).permutation(num_cells)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def _as_labels(labels: Names) -> npt.NDArray[np.str_]:
    names = np.asarray(labels, dtype=np.str_)
    if not len(names):
        raise ValueError("labels must name at least one cell, got none")
    return names


def _check_groups(groups: npt.NDArray[np.str_], test_groups: list[str], validation_groups: list[str]) -> None:
    known = sorted(set(groups.tolist()) - {""})
    if not test_groups:
        raise ValueError(f"test_groups must name at least one group, got none; groups are {known}")
    unknown = sorted(set(test_groups + validation_groups) - set(known))
    if unknown:
        raise ValueError(f"no cell is in group {unknown}; groups are {known}")
    shared = sorted(set(test_groups) & set(validation_groups))
    if shared:
        raise ValueError(f"group {shared} is in both test_groups and validation_groups; a group has one part")


def _deal(
    rows: Int64Array, labels: npt.NDArray[np.str_], shares: Sequence[float], *, seed: int
) -> tuple[Int64Array, list[Int64Array]]:
    """Return (left, taken): of each label's rows, a random part for each share and what is left for training."""
    generator = np.random.default_rng(seed)
    num_taking = sum(share > 0 for share in shares)
    taken: list[list[Int64Array]] = [[np.empty(0, dtype=np.int64)] for _ in shares]
    too_rare: list[str] = []
    for label in np.unique(labels[rows]):
        own = generator.permutation(rows[labels[rows] == label])
        if len(own) <= num_taking:
            too_rare.append(str(label))
            continue
        start, parts_left = 0, num_taking
        for part, share in zip(taken, shares, strict=True):
            if share > 0:
                # Never so many that a later part, or training, is left without this label.
                size = min(max(round(share * len(own)), 1), len(own) - start - parts_left)
                part.append(own[start : start + size])
                start, parts_left = start + size, parts_left - 1
    if too_rare and num_taking:
        logger.warning("labels with at most %d cells stay in training as a whole: %s", num_taking, too_rare)
    chosen = [np.sort(np.concatenate(part)) for part in taken]
    return np.setdiff1d(rows, np.concatenate(chosen)), chosen


def _assign_folds(labels: npt.NDArray[np.str_], num_folds: int, seed: int) -> Int64Array:
    names, counts = np.unique(labels, return_counts=True)
    alone = names[counts < 2].tolist()
    if alone:
        raise ValueError(
            f"labels {alone} have one cell each: tested, they would be missing from training. Drop these cells, or "
            "merge the labels into a broader one"
        )
    rare = names[counts < num_folds].tolist()
    if rare:
        logger.warning("labels with fewer cells than folds are missing from some folds' test sets: %s", rare)
    generator = np.random.default_rng(seed)
    folds = np.empty(len(labels), dtype=np.int64)
    dealt = 0
    for name, count in zip(names, counts, strict=True):
        # Deal the cells of one label after those of the last, so that folds have equal sizes too.
        folds[generator.permutation(np.flatnonzero(labels == name))] = (dealt + np.arange(count)) % num_folds
        dealt += int(count)
    return folds
