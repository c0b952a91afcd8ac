"""The comparison's rules: which cells train and which test, for every system the same, and what is measured of each.

A split file names the cells of each fold, so that others can run their systems on the same ones. Each system is fitted
to training cells alone, each run leaves one JSON, and runs that are there are not repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.metrics import confusion_matrix, f1_score, roc_auc_score

from screformer.benchmarks.cell_type_systems import CellTypeSystem, NamedCells
from screformer.benchmarks.labelled_data import LabelledData
from screformer.benchmarks.measuring import can_measure_memory, describe_device, peak_memory
from screformer.train.metrics import cell_type_scores, expected_calibration_error
from screformer.train.result_files import read_json, software_versions, write_json, written_aside
from screformer.train.splits import Split, cross_validation_folds, split_cells

logger = logging.getLogger("screformer.benchmarks.protocol")
Kind = Literal["random", "five_fold", "leave_one_group_out"]
KINDS: tuple[Kind, ...] = ("random", "five_fold", "leave_one_group_out")
NO_LABEL = "(none)"


class Fold(NamedTuple):
    """Cells that train, that systems may choose their settings by, and that test: row numbers."""

    name: str
    cells: Split


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


def few_labelled_cells(data: LabelledData, fold: Fold, num_cells: int, *, seed: int = 2022) -> Fold:
    """Return a fold with at most `num_cells` training cells of each label, and the same test cells.

    Cells are drawn from the training and validation parts together; the more are asked for, the more are added to the
    same ones. There is no validation part: systems that need one split what they have.

    Raises
    ------
    ValueError
        `num_cells` is below 1.
    """
    if num_cells < 1:
        raise ValueError(f"num_cells got {num_cells}; it must be at least 1")
    rows = np.concatenate([fold.cells.train, fold.cells.validation])
    shuffled = np.random.default_rng(seed).permutation(np.sort(rows))
    labels = data.labels[shuffled]
    kept = np.concatenate([shuffled[labels == label][:num_cells] for label in np.unique(labels)])
    cells = Split(np.sort(kept), np.empty(0, dtype=np.int64), fold.cells.test)
    return Fold(f"{fold.name}-{num_cells}_per_label", cells)


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
    system: CellTypeSystem,
    name: str,
    data: LabelledData,
    fold: Fold,
    *,
    seed: int,
    work: str | Path,
    runs_at_once: int = 1,
) -> dict[str, Any]:  # Any: JSON
    """Fit a system to the training cells of a fold, test it, and return the record, which `work` keeps.

    The record has ``system``, ``title``, ``is_inductive``, ``settings`` (what the system was made with or has chosen:
    its public attributes that are plain values), ``data``, ``fold``, ``seed``, ``num_cells`` of each part, the scores
    of `score_named_cells`, ``fit_seconds``, ``predict_seconds``, ``peak_bytes`` (resident memory beyond what there was
    before, both together; None where the operating system does not tell), ``cells_sha256`` (see `hash_cells`),
    ``date``, ``versions``, ``device`` and ``runs_at_once``. Beside it lies what was said of each test cell, see
    `read_predictions`. Training cells are those of the parts train and validation, which systems split by themselves if
    they need to; so all have the same.

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
        Folder with a JSON a run. One that is there is not made again, if it is of the same cells and settings.
    runs_at_once
        For the record: how many processes share the machine.
    """
    stored = find_run(system, name, data, fold, seed=seed, work=work)
    if stored is not None:
        return stored
    path = Path(work) / f"{_run_name(data.name, fold.name, name, seed)}.json"
    train, test = _train_and_test(fold)
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

    peak = None
    if can_measure_memory():
        peak = peak_memory(fit_and_predict)
    else:
        fit_and_predict()
    truth = data.labels[test].tolist()
    record = {
        "system": name,
        "title": system.title,
        "is_inductive": system.is_inductive,
        "settings": _plain_attributes(system),
        "data": data.name,
        "fold": fold.name,
        "seed": seed,
        "num_cells": {"train": len(train), "test": len(test)},
        "cells_sha256": hash_cells(data, train, test),
        **score_named_cells(named[0], truth),
        **{key: round(value, 3) for key, value in seconds.items()},
        "peak_bytes": peak,
        "date": date.today().isoformat(),
        "versions": software_versions(),
        "device": describe_device("cpu"),
        "runs_at_once": runs_at_once,
    }
    _write_predictions(path.with_suffix(".npz"), named[0], truth, [str(cell) for cell in data.adata.obs_names[test]])
    write_json(path, record)  # last: where it is, the run is complete
    return record


def find_run(
    system: CellTypeSystem, name: str, data: LabelledData, fold: Fold, *, seed: int, work: str | Path
) -> dict[str, Any] | None:  # Any: JSON
    """Return the record of `run_system` that `work` has; None if there is none of these cells and settings."""
    path = Path(work) / f"{_run_name(data.name, fold.name, name, seed)}.json"
    if not path.exists():
        return None
    stored: dict[str, Any] = read_json(path)
    if stored.get("cells_sha256") == hash_cells(data, *_train_and_test(fold)) and _has_settings(stored, system):
        return stored
    logger.warning("%s is of other cells or settings and is made anew", path.name)
    return None


def _train_and_test(fold: Fold) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the cells that a system learns from, in the file's order, and those that it names."""
    return np.sort(np.concatenate([fold.cells.train, fold.cells.validation])), fold.cells.test


def hash_cells(data: LabelledData, *parts: npt.NDArray[np.int64]) -> str:
    """Return the checksum of the cells of some parts: names, labels, genes and counts."""
    names = np.asarray(data.adata.obs_names, dtype=np.str_)
    texts = [text for rows in parts for text in ("|", *names[rows].tolist(), *data.labels[rows].tolist())]
    found = hashlib.sha256(_hash_names([*texts, "|", *data.adata.var_names]).encode())
    for rows in parts:
        counts = sparse.csr_matrix(data.adata.X[rows])
        counts.sum_duplicates()
        for values, kind in ((counts.indptr, np.int64), (counts.indices, np.int64), (counts.data, np.float64)):
            found.update(np.ascontiguousarray(values, dtype=kind).data)
    return found.hexdigest()


def _has_settings(stored: Mapping[str, Any], system: CellTypeSystem) -> bool:
    """Return whether a stored run is of a system made like this one; what it has chosen by itself may be anything."""
    given = {name: value for name, value in _plain_attributes(system).items() if value is not None}
    return stored["title"] == system.title and given.items() <= stored["settings"].items()


class Predictions(NamedTuple):
    """What a system said of the test cells of a fold.

    Attributes
    ----------
    cells
        Names.
    truth
        Label of each.
    named
        What the system said.
    """

    cells: list[str]
    truth: list[str]
    named: NamedCells


def read_predictions(record: Mapping[str, Any], work: str | Path) -> Predictions:
    """Return what was said of each test cell in a run of `run_system`, from its record and the same folder.

    Raises
    ------
    FileNotFoundError
        The folder does not have it.
    """
    path = Path(work) / f"{_run_name(*(record[key] for key in ('data', 'fold', 'system', 'seed')))}.npz"
    with np.load(path, allow_pickle=False) as stored:
        scores = stored.get("scores")
        named = NamedCells(stored["labels"].tolist(), scores, tuple(stored["classes"].tolist()))
        return Predictions(stored["cells"].tolist(), stored["truth"].tolist(), named)


def _run_name(data: str, fold: str, system: str, seed: int) -> str:
    return f"{data}-{fold}-{system}-{seed}"


def _write_predictions(path: Path, named: NamedCells, truth: Sequence[str], cells: Sequence[str]) -> None:
    strings = {"labels": named.labels, "classes": named.classes, "truth": truth, "cells": cells}
    arrays: dict[str, npt.NDArray[Any]] = {name: np.array(values, dtype=np.str_) for name, values in strings.items()}
    if named.scores is not None:
        arrays["scores"] = named.scores
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def _plain_attributes(system: CellTypeSystem) -> dict[str, Any]:  # Any: JSON
    found = {name: value for name, value in vars(system).items() if not name.startswith("_") and name != "title"}
    return {name: value for name, value in found.items() if value is None or isinstance(value, (bool, int, float, str))}


def score_named_cells(named: NamedCells, truth: Sequence[str]) -> dict[str, Any]:  # Any: JSON
    """Return accuracy, macro_f1, balanced_accuracy, macro_auc, f1 of each label, and the confusion matrix.

    Cells without a label are wrong, and ``rejected`` is their share; to have none is not a class, of which macro_f1
    would have to know the F1. ``macro_auc`` is the mean over labels, one against
    the rest, of those that the system has scores for and that some test cells have and some have not; None without
    scores. ``expected_calibration_error`` is None unless the scores are probabilities (rows sum to 1); the label of a
    cell then has the probability of its class, or 0 if there is none.

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
    classes = [ids[label] for label in names if label != NO_LABEL]
    areas = []
    if named.scores is not None:
        for column, label in enumerate(named.classes):
            is_label = np.asarray(truth) == label
            if is_label.any() and not is_label.all():
                areas.append(float(roc_auc_score(is_label, named.scores[:, column])))
    return {
        **cell_type_scores(ours, true),
        "macro_f1": float(f1[classes].mean()),
        "macro_auc": float(np.mean(areas)) if areas else None,
        "expected_calibration_error": _calibration_error(named, truth),
        "f1": {label: float(f1[ids[label]]) for label in sorted(set(truth))},
        "label_names": names,
        "confusion_matrix": confusion_matrix(true, ours, labels=np.arange(len(names))).tolist(),
        "rejected": float(np.mean([not label for label in named.labels])),
    }


def _calibration_error(named: NamedCells, truth: Sequence[str]) -> float | None:
    if not has_probabilities(named):
        return None
    assert named.scores is not None
    is_right = np.array([label == right for label, right in zip(named.labels, truth, strict=True)])
    return expected_calibration_error(is_right, label_probabilities(named))


def has_probabilities(named: NamedCells) -> bool:
    """Return whether the scores are probabilities: at least 0 in rows that sum to 1."""
    scores = named.scores
    return scores is not None and bool(scores.min() >= 0 and np.abs(scores.sum(axis=1) - 1).max() < 1e-3)


def label_probabilities(named: NamedCells) -> npt.NDArray[np.float64]:
    """Return the probability of each cell's label, (cells,), of scores that are probabilities; 0 without a label."""
    assert named.scores is not None
    columns = {label: column for column, label in enumerate(named.classes)}
    chosen = np.array([columns.get(label, -1) for label in named.labels], dtype=np.int64)
    found = named.scores[np.arange(len(chosen)), chosen].astype(np.float64)
    return np.where(chosen < 0, 0.0, np.clip(found, 0, 1))
