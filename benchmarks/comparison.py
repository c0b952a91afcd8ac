"""Every system on every fold, and the files of a comparison: split, JSON, table and figure."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from screformer.benchmarks.cell_type_systems import CellTypeSystem
from screformer.benchmarks.comparison_figures import plot_system_scores
from screformer.benchmarks.comparison_statistics import BASELINE, paired_tests, pool_cells, summarize_systems
from screformer.benchmarks.comparison_tables import format_comparison
from screformer.benchmarks.labelled_data import LabelledData
from screformer.benchmarks.measuring import describe_device
from screformer.benchmarks.protocol import (
    Fold,
    Kind,
    find_run,
    make_folds,
    read_predictions,
    read_split_file,
    run_system,
    write_split_file,
)
from screformer.tokenization.corpus_workers import Workers
from screformer.train.result_files import read_json, software_versions, write_json

logger = logging.getLogger("screformer.benchmarks.comparison")
Systems = Mapping[str, Callable[[], CellTypeSystem]]
_Key = tuple[str, str, int]  # system, fold, seed
SPLIT_SEED = 2022
# Those that runs use; Seurat's version is among its settings.
RIVAL_PACKAGES = ("xgboost-cpu", "xgboost", "singler", "scvi-tools", "performer-pytorch", "networkx")
# Where the baseline errs so little, no difference says anything.
WEAK_ABOVE = 0.995
# Kept of a run in the result file; the rest is in the work folder.
RUN_KEYS = (
    "system", "fold", "seed", "num_cells", "accuracy", "macro_f1", "balanced_accuracy", "macro_auc",
    "expected_calibration_error", "rejected", "fit_seconds", "predict_seconds", "peak_bytes", "settings", "date",
)  # fmt: skip


def compare_systems(
    data: LabelledData,
    systems: Systems,
    *,
    kind: Kind,
    output: str | Path,
    work: str | Path,
    seeds: int = 1,
    command: str = "compare_systems",
    note: str | None = None,
    split: str | Path | None = None,
    num_workers: int = 1,
) -> dict[str, Any]:  # Any: JSON
    """Run all systems on all folds with all seeds; write the split file, JSON, table and figure; return the JSON.

    A system whose package is missing, or that refuses the cells, is left out, with the reason in ``left_out`` and in
    the log.

    Parameters
    ----------
    data
        Labelled cells.
    systems
        Name -> what makes one.
    kind
        Of the folds.
    output
        Folder for ``comparison-DATA-KIND.*`` and the split file.
    work
        Folder for the result of every run, which is not repeated.
    seeds
        Of each system and fold: 0, 1, and so on.
    command
        What the result file says that it was made by.
    note
        What else its readers should know, such as what ran beside.
    split
        Split file of this `kind` instead of folds of our own, see `read_split_file`.
    num_workers
        As for `run_systems`.

    Raises
    ------
    ValueError
        `seeds` is below 1, the split file is of other cells, or as `make_folds`.
    """
    seed = SPLIT_SEED if split is None else read_json(split)["seed"]
    folds = make_folds(data, kind, seed=seed) if split is None else read_split_file(split, data)
    stem = Path(output, f"comparison-{data.name}-{kind}")
    write_split_file(f"{stem}-split.json", data, folds, kind=kind, seed=seed)
    runs, left_out = run_systems(data, systems, folds, seeds=seeds, work=work, num_workers=num_workers)
    names = list(dict.fromkeys(run["system"] for run in runs))
    predictions = {
        name: [read_predictions(run, work) for run in runs if run["system"] == name and run["seed"] == 0]
        for name in names
    }
    rows = summarize_systems(runs)
    for name, own in predictions.items():
        rows[name] |= pool_cells(own)
    results: dict[str, Any] = {
        "question": f"How well do systems name the cell types of {data.name}?",
        "data": data.name,
        "num_cells": data.adata.n_obs,
        "num_genes": data.adata.n_vars,
        "kind": kind,
        "num_folds": len(folds),
        "seeds": seeds,
        "is_weak": BASELINE in rows and rows[BASELINE]["accuracy"] > WEAK_ABOVE,
        **provenance(command),
        "made_with": made_with(runs),
        "note": note,
        "systems": rows,
        "paired_tests": paired_tests(runs, predictions),
        "left_out": left_out,
        "runs": [{key: run[key] for key in RUN_KEYS} for run in runs],
    }
    write_json(f"{stem}.json", results)
    Path(f"{stem}.md").write_text(format_comparison(results), encoding="utf-8")
    plot_system_scores(rows, f"{stem}.png", title=f"{data.name}, {kind.replace('_', ' ')}")
    return results


def provenance(command: str, *, use_cpu: bool = False) -> dict[str, Any]:  # Any: JSON
    """Return ``date``, ``command``, ``device`` and ``versions``, of rivals' packages too, for a result file.

    The device is the GPU where there is one, on which everything trains that can, unless `use_cpu`.
    """
    found = {}
    for package in RIVAL_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return {
        "date": date.today().isoformat(),
        "command": command,
        "device": describe_device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu"),
        "versions": software_versions() | found,
    }


def made_with(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:  # Any: JSON
    """Return each set of versions and device that runs were made with: they may be older than the page.

    A row has ``versions``, ``device`` (None where a run did not record it), ``dates``, ascending, and ``num_runs``.
    """
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        device = run.get("device")
        at_once = run.get("runs_at_once", 1)
        told = None if device is None else f"{device['name']}, {device['threads']} threads"
        told = f"{told}, {at_once} runs at once" if told and at_once > 1 else told
        key = json.dumps([run["versions"], told], sort_keys=True)
        row = found.setdefault(key, {"versions": run["versions"], "device": told, "dates": set(), "num_runs": 0})
        row["dates"].add(run["date"])
        row["num_runs"] += 1
    return [row | {"dates": sorted(row["dates"])} for row in found.values()]


def run_systems(
    data: LabelledData,
    systems: Systems,
    folds: Sequence[Fold],
    *,
    seeds: int,
    work: str | Path,
    num_workers: int = 1,
) -> tuple[list[dict[str, Any]], dict[str, str]]:  # Any: JSON
    """Return the records of all runs, and name -> reason of systems whose package is missing or that refuse the cells.

    Parameters
    ----------
    data, systems, folds, seeds, work
        As for `compare_systems`.
    num_workers
        Processes that run at once, with a thread each; what makes a system then is of a module.

    Raises
    ------
    ValueError
        `seeds` is below 1.
    ChildProcessError
        A worker died, as when the system ran out of memory.
    """
    if seeds < 1:
        raise ValueError(f"seeds got {seeds}; it must be at least 1")
    found: dict[_Key, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    planned = [
        _Run(name, make, data, fold, seed, work)
        for name, make in systems.items()
        for fold in folds
        for seed in range(seeds)
    ]
    todo = []
    for run in planned:
        if run.name in left_out:
            continue
        try:
            stored = find_run(run.make(), run.name, data, run.fold, seed=run.seed, work=work)
        except (ImportError, ValueError) as error:
            _leave_out(left_out, run.name, str(error))
            continue
        if stored is None:
            todo.append(run)
        else:
            found[run.key] = stored
    todo = [run for run in todo if run.name not in left_out]
    # One run alone is done by this process, with all its threads.
    todo = [run._replace(runs_at_once=min(num_workers, len(todo))) for run in todo]
    logger.info("%d of %d runs are there, %d are made now", len(found), len(planned), len(todo))
    with Workers(num_workers) as workers:
        # One after the other, a system that has refused is not tried again.
        done = workers.run(_do, todo) if num_workers > 1 else map(_do, _told(todo, left_out))
        for number, (key, record, refusal) in enumerate(done, start=1):
            if record is None:
                _leave_out(left_out, key[0], refusal)
                continue
            found[key] = record
            scores = record["accuracy"], record["macro_f1"]
            logger.info("run %d of %d: %s on %s: accuracy %.3f, macro-F1 %.3f", number, len(todo), *key[:2], *scores)
    return [found[run.key] for run in planned if run.key in found and run.name not in left_out], left_out


class _Run(NamedTuple):
    """A run, and all that another process needs for it."""

    name: str
    make: Callable[[], CellTypeSystem]
    data: LabelledData
    fold: Fold
    seed: int
    work: str | Path
    runs_at_once: int = 1

    @property
    def key(self) -> _Key:
        return self.name, self.fold.name, self.seed


def _do(run: _Run) -> tuple[_Key, dict[str, Any] | None, str]:  # Any: JSON
    """Return the record, or None and why the system refuses."""
    try:
        record = run_system(
            run.make(), run.name, run.data, run.fold, seed=run.seed, work=run.work, runs_at_once=run.runs_at_once
        )
    except (ImportError, ValueError) as error:
        return run.key, None, str(error)
    return run.key, record, ""


def _told(runs: Sequence[_Run], left_out: Mapping[str, str]) -> Iterator[_Run]:
    for run in runs:
        if run.name not in left_out:
            logger.info("%s on %s, seed %d", run.name, run.fold.name, run.seed)
            yield run


def _leave_out(left_out: dict[str, str], name: str, reason: str) -> None:
    if name not in left_out:
        logger.warning("%s is left out: %s", name, reason)
        left_out[name] = reason
