"""The comparison's rules: which cells train and which test, for every system the same, and what is measured of each.

A split file names the cells of each fold, so that others can run their systems on the same ones. Each system is fitted
to training cells alone, each run leaves one JSON, and runs that are there are not repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from anndata import AnnData
from scipy import sparse
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

from screformer.benchmarks.cell_type_systems import CellTypeSystem, NamedCells
from screformer.benchmarks.measuring import peak_memory
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.train.metrics import cell_type_scores
from screformer.train.result_files import read_json, software_versions, write_json
from screformer.train.splits import Split, cross_validation_folds, split_cells

logger = logging.getLogger("screformer.benchmarks.protocol")
Kind = Literal["random", "five_fold", "leave_one_group_out"]
KINDS: tuple[Kind, ...] = ("random", "five_fold", "leave_one_group_out")
NO_LABEL = "(none)"
BLOCK = 1024

Strings = npt.NDArray[np.str_]


class LabelledData(NamedTuple):
    """Raw counts with their labels; cells without a label, or with one too rare, are left out.

    Attributes
    ----------
    name
        For tables and file names.
    adata
        Raw counts in `X`, sparse by rows; names of cells and genes.
    labels, groups
        Of each cell; groups are donors or data sets, None if none were named.
    """

    name: str
    adata: AnnData
    labels: Strings
    groups: Strings | None


class Fold(NamedTuple):
    """Cells that train, that systems may choose their settings by, and that test: row numbers."""

    name: str
    cells: Split


def read_labelled_data(
    path: str | Path,
    *,
    label_column: str = "cell_type",
    group_column: str | None = None,
    exclude_labels: Sequence[str] = (),
    min_cells: int = 10,
    label_map: Mapping[str, str] | None = None,
) -> LabelledData:
    """Read raw counts of any format whole, with their labels.

    Parameters
    ----------
    path
        As for `open_count_matrix`.
    label_column, group_column
        Columns of `obs`.
    exclude_labels
        To leave out.
    min_cells
        Labels with fewer cells are left out: their F1 is a matter of luck.
    label_map
        Label of the file -> label of the comparison; others are left out. Without it labels stay.

    Raises
    ------
    ValueError
        A column is missing, or fewer than two labels are left.
    """
    with open_count_matrix(path) as matrix:
        counts = sparse.vstack(list(matrix.blocks(BLOCK)), format="csr")
        labels = np.array([label or "" for label in matrix.obs_column(label_column)], dtype=np.str_)
        groups = None if group_column is None else np.array(
            [group or "" for group in matrix.obs_column(group_column)], dtype=np.str_
        )  # fmt: skip
        names, genes = matrix.cell_ids, matrix.gene_names
    if label_map is not None:
        labels = np.array([label_map.get(label, "") for label in labels.tolist()], dtype=np.str_)
    sizes = Counter(labels.tolist())
    wanted = sorted(label for label in sizes if label and label not in exclude_labels and sizes[label] >= min_cells)
    if len(wanted) < 2:
        raise ValueError(
            f"label_column={label_column!r}: {Path(path).name} has the labels {dict(sizes)}; at least two with "
            f"{min_cells} cells are needed"
        )
    kept = np.flatnonzero(np.isin(labels, wanted))
    adata = AnnData(counts[kept])
    adata.obs_names, adata.var_names = [names[row] for row in kept.tolist()], genes
    adata.var_names_make_unique()
    return LabelledData(Path(path).stem, adata, labels[kept], None if groups is None else groups[kept])


def make_folds(data: LabelledData, kind: Kind, *, seed: int = 2022) -> list[Fold]:
    """Return the folds of a comparison.

    ``"random"``: 60/20/20, stratified by label (the paper's); ``"five_fold"``: each cell tested once; and
    ``"leave_one_group_out"``: each donor or data set tested once, which says how new ones fare.

    Raises
    ------
    ValueError
        `kind` is none of these, or groups are needed and were not read.
    """
    if kind == "random":
        return [Fold("random", split_cells(data.labels, seed=seed))]
    if kind == "five_fold":
        folds = cross_validation_folds(data.labels, num_folds=5, seed=seed)
        return [Fold(f"fold{number}", cells) for number, cells in enumerate(folds, start=1)]
    if kind != "leave_one_group_out":
        raise ValueError(f"kind got {kind!r}; it must be one of {', '.join(KINDS)}")
    if data.groups is None:
        raise ValueError("kind='leave_one_group_out' needs group_column, the column that names each cell's donor")
    folds = cross_validation_folds(data.labels, groups=data.groups, seed=seed)
    return [Fold(name, cells) for name, cells in zip(sorted(set(data.groups.tolist())), folds, strict=True)]


def write_split_file(path: str | Path, data: LabelledData, folds: Sequence[Fold], *, kind: Kind, seed: int) -> None:
    """Write which cells are in which part of which fold, by name, as JSON."""
    names = np.asarray(data.adata.obs_names)
    write_json(
        path,
        {
            "data": data.name,
            "cells_sha256": _hash_names(names.tolist()),
            "kind": kind,
            "seed": seed,
            "folds": [
                {"name": fold.name, **{part: names[rows].tolist() for part, rows in fold.cells._asdict().items()}}
                for fold in folds
            ],
        },
    )


def read_split_file(path: str | Path, data: LabelledData) -> list[Fold]:
    """Return the folds of a split file for the same cells.

    Raises
    ------
    ValueError
        The file is of other cells.
    """
    stored = read_json(path)
    names = [str(name) for name in data.adata.obs_names]
    if stored["cells_sha256"] != _hash_names(names):
        raise ValueError(
            f"{path} is of other cells than {data.name}: of {stored['data']!r}, or of other labels. Make a new one"
        )
    row_of = {name: row for row, name in enumerate(names)}
    return [
        Fold(
            fold["name"],
            Split(*(np.array([row_of[name] for name in fold[part]], dtype=np.int64) for part in Split._fields)),
        )
        for fold in stored["folds"]
    ]


def _hash_names(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def run_system(
    system: CellTypeSystem, name: str, data: LabelledData, fold: Fold, *, seed: int, work: str | Path
) -> dict[str, Any]:  # Any: JSON
    """Fit a system to the training cells of a fold, test it, and return the record, which `work` keeps.

    The record has ``system``, ``title``, ``data``, ``fold``, ``seed``, ``num_cells`` of each part, the scores of
    `score_named_cells`, ``fit_seconds``, ``predict_seconds``, ``peak_bytes`` (resident memory beyond what there was
    before, both together), ``date`` and ``versions``. Training cells are those of the parts train and
    validation, which systems split by themselves if they need to; so all have the same.

    Parameters
    ----------
    system
        Not fitted.
    name
        Of the system, for file names.
    data, fold
        What to run on.
    seed
        Of the system.
    work
        Folder with a JSON a run.
    """
    path = Path(work) / f"{data.name}-{fold.name}-{name}-{seed}.json"
    if path.exists():
        stored: dict[str, Any] = read_json(path)
        return stored
    train = np.sort(np.concatenate([fold.cells.train, fold.cells.validation]))
    test = fold.cells.test
    seconds: dict[str, float] = {}
    named: list[NamedCells] = []

    def fit_and_predict() -> None:
        begin = time.perf_counter()
        groups = None if data.groups is None else data.groups[train].tolist()
        system.fit(data.adata[train].copy(), data.labels[train].tolist(), groups=groups, seed=seed)
        seconds["fit_seconds"] = time.perf_counter() - begin
        begin = time.perf_counter()
        named.append(system.predict(data.adata[test].copy()))
        seconds["predict_seconds"] = time.perf_counter() - begin

    peak = peak_memory(fit_and_predict)
    record = {
        "system": name,
        "title": system.title,
        "data": data.name,
        "fold": fold.name,
        "seed": seed,
        "num_cells": {"train": len(train), "test": len(test)},
        **score_named_cells(named[0], data.labels[test].tolist()),
        **{key: round(value, 3) for key, value in seconds.items()},
        "peak_bytes": peak,
        "date": date.today().isoformat(),
        "versions": software_versions(),
    }
    write_json(path, record)
    logger.info("%s, %s: accuracy %.3f, macro-F1 %.3f", fold.name, system.title, record["accuracy"], record["macro_f1"])
    return record


def score_named_cells(named: NamedCells, truth: Sequence[str]) -> dict[str, Any]:  # Any: JSON
    """Return accuracy, macro_f1, balanced_accuracy, macro_auc, f1 of each label, and the confusion matrix.

    Cells without a label are wrong, and ``rejected`` is their share. ``macro_auc`` is the mean over labels, one against
    the rest, of those that the system has scores for and that some test cells have and some have not; None without
    scores.

    Raises
    ------
    ValueError
        There are not as many cells as labels.
    """
    if len(named.labels) != len(truth) or not len(truth):
        raise ValueError(f"truth has {len(truth)} labels for {len(named.labels)} cells; one for each is needed")
    given = [label or NO_LABEL for label in named.labels]
    names = sorted({*given, *truth})
    ids = {label: number for number, label in enumerate(names)}
    ours, true = (np.array([ids[label] for label in labels], dtype=np.int64) for labels in (given, truth))
    f1 = f1_score(true, ours, average=None, labels=np.arange(len(names)), zero_division=0)
    areas = []
    if named.scores is not None:
        for column, label in enumerate(named.classes):
            is_label = np.asarray(truth) == label
            if is_label.any() and not is_label.all():
                areas.append(float(roc_auc_score(is_label, named.scores[:, column])))
    return {
        **cell_type_scores(ours, true),
        "macro_auc": float(np.mean(areas)) if areas else None,
        "f1": {label: float(f1[ids[label]]) for label in sorted(set(truth))},
        "label_names": names,
        "confusion_matrix": confusion_matrix(true, ours, labels=np.arange(len(names))).tolist(),
        "rejected": float(np.mean([not label for label in named.labels])),
    }
