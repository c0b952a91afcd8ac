"""Unseen donors: each packaged pancreas donor held out once, beside logistic regression and the majority class.

Each fold is a whole `screformer quickstart` with another test donor, so that what is measured is what users run. One
seed a fold: differences of a few points between methods mean little (see ``spread`` in the results).
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from screformer.model_cards.comparison import LOGISTIC_REGRESSION, MAJORITY_CLASS, METRIC_TITLES, MODEL, row_title
from screformer.train.figures import plot_comparison
from screformer.train.quickstart import quickstart
from screformer.train.result_files import software_versions, write_json

DONORS = ("human1", "human2", "human3", "human4")
METHODS = (MODEL, LOGISTIC_REGRESSION, MAJORITY_CLASS)
NAME = "unseen_donors"


def compare_on_unseen_donors(work: str | Path, output: str | Path) -> dict[str, Any]:
    """Run a quickstart a donor in `work`, write ``unseen_donors.json`` and ``.png`` into `output`, return the JSON.

    Parameters
    ----------
    work
        Folder for the four runs; finished ones are kept and not repeated.
    output
        Folder for the results.
    """
    folds = {donor: quickstart(Path(work) / donor, test_donor=donor) for donor in DONORS}
    scores = {
        donor: {name: {key: fold.metrics[name][key] for key in METRIC_TITLES} for name in METHODS}
        for donor, fold in folds.items()
    }
    means = {name: _over_donors(mean, scores, name) for name in METHODS}
    results = {
        "question": "How well are cells of a donor labelled that was not in training?",
        "command": "make bench",
        "date": date.today().isoformat(),
        "device": {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpu": None},
        "versions": software_versions(),
        "test_cells": {donor: fold.metrics[MODEL]["num_cells"] for donor, fold in folds.items()},
        "scores": scores,
        "mean": means,
        "spread": {name: _over_donors(stdev, scores, name) for name in METHODS},
        "pretraining": {donor: fold.metrics["pretraining"] for donor, fold in folds.items()},
    }
    write_json(Path(output) / f"{NAME}.json", results)
    plot_comparison(
        {row_title(name): means[name] for name in METHODS},
        Path(output) / f"{NAME}.png",
        title="Human pancreas, mean of four unseen donors",
    )
    return results


def _over_donors(
    summary: Callable[[list[float]], float], scores: dict[str, dict[str, dict[str, float]]], name: str
) -> dict[str, float]:
    return {key: round(summary([scores[donor][name][key] for donor in DONORS]), 4) for key in METRIC_TITLES}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.donors",
        description="Hold each packaged donor out once. Takes four quickstarts.",
        epilog="example: python -m screformer.benchmarks.donors --work runs/donors --output benchmarks/results",
    )
    parser.add_argument("--work", default="runs/donors", help="Folder for the four runs (default: %(default)s).")
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    arguments = parser.parse_args(argv)
    try:
        compare_on_unseen_donors(arguments.work, arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
