"""Are the answers wrong as often as the user asked for? Donors and folds that the model has not seen.

The recipe finetune-small is trained with each donor, or fold of cells, held out. A user asks for an error rate; how
often answers are wrong is then counted by what the threshold comes from:

- held-out groups: the regression's cross-validation over the training donors (the default);
- validation cells: a fifth of the training donors' cells, which the model was not trained on;
- softmax: an answer where the model's own probability is at least one minus the error rate, as rivals have it;
- the same of a logistic regression on all genes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from screformer.annotation.calibration import Calibration, LabelReader
from screformer.annotation.calibration_fit import calibrate, describe_calibration, realised_errors
from screformer.benchmarks.calibration_report import write_calibration_results
from screformer.benchmarks.fine_tuning_runs import Run, System, fine_tune, without_folders
from screformer.benchmarks.fine_tuning_tasks import Task, fit_regressions, make_tasks
from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import open_corpus
from screformer.tokenization.corpus_workers import Workers, available_cores
from screformer.train.cell_dataset import CellDataset
from screformer.train.corpus_columns import name_cells, read_column
from screformer.train.inference import predict_logits
from screformer.train.result_files import read_json, software_versions, write_json

logger = logging.getLogger(__name__)
ASKED = (0.01, 0.02, 0.03, 0.05, 0.1)
SMALL = System("finetune-small", "finetune-small")
VALIDATION = ("--validation_fraction", "0.2", "--eval_strategy", "epoch")
SOURCES = {
    "held_out_groups": "held-out groups of the regression's cross-validation (default)",
    "validation_cells": "validation cells of the training groups",
    "softmax": "none: the model's own probability, at least 1 - asked",
    "logistic_regression": "none: logistic regression's own probability, at least 1 - asked",
}
# Printed with the results: what a reader must know to judge them.
SELECTION = (
    "That the worst held-out group decides (see `fit_calibration`) was chosen after a look at these donors, with the "
    "cells of all groups together (`calibration_pooled.md`), where human4 was more than two points off. PBMC 3k had no "
    "part in it."
)
FloatArray = npt.NDArray[np.floating[Any]]


def compare_calibrations(
    output: str | Path,
    work: str | Path,
    *,
    cells: str | Path | None = None,
    seeds: int = 2,
    num_workers: int | None = None,
    epochs: float | None = None,
    command: str = "compare_calibrations",
) -> dict[str, Any]:  # Any: JSON
    """Train with every group held out, ask for error rates there; write JSON, table and figure, and return the JSON.

    Parameters
    ----------
    output
        Folder for ``calibration.*``.
    work
        Folder for corpora and for the result of every run, which is not repeated.
    cells
        h5ad of labelled cells for five folds, such as PBMC 3k; without it there are only donors.
    seeds
        Of each fold: 0, 1, and so on.
    num_workers
        Processes, each with one thread; default the cores there are.
    epochs
        Of training, for a quick look.
    command
        What the result file says that it was made by.

    Raises
    ------
    ValueError
        `seeds` is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds got {seeds}; it must be at least 1")
    tasks = [task._replace(epochs=epochs) for task in make_tasks(Path(work), cells)]
    runs = [
        Run(task, groups, "calibration", SMALL, seed, str(work))
        for seed, task in itertools.product(range(seeds), tasks)
        for groups in task.folds()
    ]
    todo = [run for run in runs if not run.result.exists()]
    with Workers(num_workers or available_cores()) as workers:
        for number, _ in enumerate(workers.run(train_and_ask, todo), start=1):
            logger.info("%d of %d runs", number, len(todo))
    results = {
        "question": "Are answers wrong as often as the user asked for, on cells of groups that were not seen?",
        "date": date.today().isoformat(),
        "device": {"machine": platform.machine(), "gpu": None},
        "versions": software_versions(),
        "command": command,
        "selection": SELECTION,
        "sources": SOURCES,
        "asked": list(ASKED),
        "runs": [read_json(run.result) for run in runs],
    }
    write_calibration_results(results, Path(output) / "calibration")
    return results


def train_and_ask(run: Run) -> str:
    """Do one run and write its JSON; return its path."""
    torch.set_num_threads(1)
    result = fine_tune(run, VALIDATION)
    model = ScReformerForCellClassification.from_pretrained(result.output_dir)
    (group,) = run.test_groups
    config, corpus, task = model.config, open_corpus(run.task.corpus), run.task
    labels = read_column(corpus, task.label_column, argument="label_column")
    groups = read_column(corpus, task.group_column, argument="group_column")
    test = np.flatnonzero((groups == group) & (labels != "") & ~np.isin(labels, task.rare_labels))
    row_of = {name: row for row, name in enumerate(name_cells(corpus).tolist())}
    parts = read_json(result.output_dir / "splits.json")
    validation = np.array([row_of[name] for name in parts["validation"]])
    logits = {
        part: predict_logits(model, CellDataset(corpus, rows), progress=False)
        for part, rows in (("test", test), ("validation", validation))
    }
    by_cells = copy.deepcopy(config)
    calibrate(by_cells, logits["validation"], labels[validation].tolist(), fitted_to="validation cells")
    names, of_regression, truth = _regression(task, group)
    configs = {"held_out_groups": config, "validation_cells": by_cells, "softmax": _as_it_is(config)}
    found = {name: _judge(each, logits["test"], labels[test].tolist()) for name, each in configs.items()} | {
        "logistic_regression": _judge(_as_it_is(_config_of(names)), of_regression, truth)
    }
    facts = {"task": task.name, "group": group, "seed": run.seed, "num_cells": len(test)}
    calibrated_on = read_json(result.output_dir / "calibration.json")["fitted_to"]
    write_json(run.result, {**facts, "calibrated_on": calibrated_on, "sources": found})
    shutil.rmtree(result.output_dir)
    return str(run.result)


def _judge(config: ScReformerConfig, logits: FloatArray, labels: list[str]) -> dict[str, Any]:  # Any: JSON
    reader = LabelReader(config)
    known = np.isin(labels, reader.class_names)
    answers = reader(logits[known])
    (level,) = describe_calibration(reader.tree, answers, answers, np.asarray(labels)[known].tolist())["levels"]
    rows = []
    for asked in ASKED:
        # Without a calibration the threshold depends on what is asked for.
        fitted = Calibration.from_config(config)
        assert fitted is not None
        each = (
            config
            if fitted.thresholds
            else _with(config, fitted._replace(error_rates=(asked,), thresholds=(1 - asked,)))
        )
        rows += realised_errors(each, logits, labels, [asked])
    return {
        "expected_calibration_error": level["expected_calibration_error"],
        "reliability": level["reliability"],
        "error_of_all": realised_errors(_answering_all(config), logits, labels, [0.5])[0]["error"],
        "answers": rows,
    }


def _as_it_is(config: ScReformerConfig) -> ScReformerConfig:
    return _with(config, Calibration((1.0,), (), ()))


def _answering_all(config: ScReformerConfig) -> ScReformerConfig:
    return _with(config, Calibration((1.0,), (0.5,), (0.0,)))


def _with(config: ScReformerConfig, calibration: Calibration) -> ScReformerConfig:
    changed = copy.deepcopy(config)
    changed.calibration = calibration.to_config()
    return changed


def _config_of(names: Sequence[str]) -> ScReformerConfig:
    labels: Mapping[int, str] = dict(enumerate(names))
    return ScReformerConfig(id2label=labels, label2id={name: number for number, name in labels.items()})


def _regression(task: Task, group: str) -> tuple[list[str], FloatArray, list[str]]:
    """Return classes, logits and true labels of the logistic regression in a test group."""
    ((_, fitted, truth),) = fit_regressions(task, [group])
    return list(fitted.labels), np.log(np.maximum(fitted.probabilities, 1e-30)), truth


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="screformer benchmark calibration",
        description="Error rates that are asked for beside those that come true, on donors that were not seen.",
        epilog="example: screformer benchmark calibration --cells pbmc3k.h5ad --work runs/calibration; half an hour",
    )
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--work", default="runs/calibration", help="Folder for the runs (default: %(default)s).")
    parser.add_argument("--cells", help="h5ad of labelled cells for five folds; without it there are only donors.")
    parser.add_argument("--seeds", type=int, default=2, help="Seeds of each fold (default: %(default)s).")
    parser.add_argument("--workers", type=int, help="Processes of one thread each (default: a core each).")
    parser.add_argument("--epochs", type=float, help="Of training, for a quick look.")
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("screformer.benchmarks").setLevel(logging.INFO)
    try:
        compare_calibrations(
            options.output,
            options.work,
            cells=options.cells,
            seeds=options.seeds,
            num_workers=options.workers,
            epochs=options.epochs,
            command=" ".join(["screformer benchmark calibration", *without_folders(given)]),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    logger.info("results: %s", Path(options.output) / "calibration.md")


if __name__ == "__main__":
    main()
