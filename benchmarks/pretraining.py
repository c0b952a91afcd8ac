"""Does pretraining help? Models with and without it, trained on few and on many labelled cells of other donors.

Each of the four packaged pancreas donors is held out once. A checkpoint is pretrained on the others' cells without
their labels; then all labelled cells of these donors, or 5, 10, 25 or 50 of each type, train a classifier from that
checkpoint and from nothing. What the two parts of pretraining do is told apart: gene vectors that start as principal
components of the cells, and the prediction of masked genes. A logistic regression on the same labelled cells stands
beside them.

Every run leaves one JSON, every pretraining a folder; what is there is not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from screformer.benchmarks.fine_tuning_runs import (
    LOGISTIC_REGRESSION,
    REGRESSION,
    START,
    Run,
    System,
    do_runs,
    without_folders,
)
from screformer.benchmarks.fine_tuning_tasks import Task, make_tasks
from screformer.benchmarks.pretraining_report import HELD_OUT_SCORES, summarize_pretraining, write_pretraining
from screformer.tokenization.corpus_workers import Workers, available_cores
from screformer.train.argument_parser import parse_arguments
from screformer.train.arguments import ModelArguments, PretrainingArguments, PretrainingDataArguments
from screformer.train.pretrain import pretrain
from screformer.train.result_files import read_json
from screformer.train.training_run import METRICS_FILE, TrainingResult

logger = logging.getLogger(__name__)

SHOTS = (5, 10, 25, 50)
# What `screformer pretrain` is told; one step at a rate of 0 leaves the start as it was.
PRETRAININGS = {
    "vectors": "pretrain-tiny --gene_start principal_components --max_steps 1 --learning_rate 0",
    "masked": "pretrain-tiny --gene_start random",
    "both": "pretrain-tiny --gene_start principal_components",
}
# A hundred steps whatever the number of cells: few cells need them, and of all cells it is an epoch and a half.
PAPER = "--class_weights balanced --gene_dropout 0.75 --learning_rate 1e-3 --max_steps 100"
FROM_VECTORS = "finetune-small --linear_start gene_vectors"
SYSTEMS = {
    "small": System("finetune-small, not pretrained", "finetune-small"),
    "small_vectors": System("finetune-small on gene vectors, no masked genes", FROM_VECTORS, "vectors"),
    "small_both": System("finetune-small on gene vectors, pretrained", FROM_VECTORS, "both"),
    "paper": System("paper's classifier, not pretrained", PAPER),
    "paper_both": System("paper's classifier, pretrained", PAPER, "both"),
    "paper_masked": System("paper's classifier, masked genes only", PAPER, "masked"),
    "paper_vectors": System("paper's classifier, gene vectors only", PAPER, "vectors"),
}
# With and without: the whole of pretraining, then its parts.
COMPARED = (
    ("small_both", "small"),
    ("small_vectors", "small"),
    ("small_both", "small_vectors"),
    ("paper_both", "paper"),
    ("paper_masked", "paper"),
    ("paper_vectors", "paper"),
    ("paper_both", "paper_vectors"),
    ("small_both", REGRESSION),
    ("small", REGRESSION),
    ("paper_both", REGRESSION),
)


class Pretraining(NamedTuple):
    """One checkpoint to make: which cells it may not see, and how."""

    task: Task
    test_groups: tuple[str, ...]
    name: str
    folder: str

    @property
    def output(self) -> Path:
        """Its folder."""
        return Path(self.folder) / "checkpoints" / f"{self.task.name}-{'+'.join(self.test_groups)}-{self.name}"


class Seeds(NamedTuple):
    """How many seeds: of few cells, of all cells, and of few cells with the paper's classifier."""

    few: int
    all_cells: int
    paper: int


def compare_pretraining(
    output: str | Path,
    work: str | Path,
    *,
    systems: Sequence[str] = tuple(SYSTEMS),
    shots: Sequence[int] = SHOTS,
    seeds: int = 5,
    all_cells_seeds: int | None = None,
    paper_seeds: int | None = None,
    num_workers: int | None = None,
    command: str = "compare_pretraining",
) -> dict[str, Any]:  # Any: JSON
    """Pretrain, train and test; write ``pretraining.json``, table and figure, and return the JSON.

    Parameters
    ----------
    output
        Folder for the results.
    work
        Folder for corpus, checkpoints and the result of every run, which are not made twice.
    systems
        Names in `SYSTEMS`.
    shots
        Labelled cells of each type; all labelled cells always follow.
    seeds
        Draws of cells and starts of the classifier: 0, 1, and so on. There is one checkpoint a donor.
    all_cells_seeds
        The same for all labelled cells, whose runs are longer; default `seeds`.
    paper_seeds
        The same for the paper's classifier on few cells, whose runs are longer too; default `seeds`.
    num_workers
        Processes, each with one thread; default the cores there are.
    command
        What the result file says that it was made by.

    Raises
    ------
    ValueError
        A system has no such name, or a number is out of its range.
    """
    if not systems or not set(systems) <= set(SYSTEMS) or seeds < 1 or min(shots, default=1) < 1:
        msg = f"systems: some of {list(SYSTEMS)}, seeds and shots: at least 1; got {list(systems)}, {seeds}, {shots}"
        raise ValueError(msg)
    task = make_tasks(Path(work), None)[0]
    needed = sorted({SYSTEMS[name].pretraining or "" for name in systems} - {""})
    pretrainings = [Pretraining(task, groups, name, str(work)) for name in needed for groups in task.folds()]
    with Workers(num_workers or available_cores()) as workers:
        for number, _ in enumerate(workers.run(make_checkpoint, pretrainings), start=1):
            logger.info("%d of %d checkpoints", number, len(pretrainings))
    checkpoints: dict[tuple[tuple[str, ...], str | None], str] = {
        (made.test_groups, made.name): str(made.output) for made in pretrainings
    }
    seeds_of = Seeds(seeds, all_cells_seeds or seeds, paper_seeds or seeds)
    runs = list(_plan_runs(task, systems, shots, seeds_of, str(work), checkpoints))
    titles = {name: system.title for name, system in {REGRESSION: LOGISTIC_REGRESSION, **SYSTEMS}.items()}
    results = summarize_pretraining(
        do_runs(runs, num_workers, logger),
        {name: title for name, title in titles.items() if name in {REGRESSION, *systems}},
        [pair for pair in COMPARED if set(pair) <= {REGRESSION, *systems}],
    )
    made = {
        name: [Pretraining(task, groups, name, str(work)).output for groups in task.folds()] for name in PRETRAININGS
    }
    made = {name: folders for name, folders in made.items() if all((each / METRICS_FILE).exists() for each in folders)}
    results |= {"command": command, "pretrainings": {name: PRETRAININGS[name] for name in made}}
    results |= {"arguments": {name: SYSTEMS[name].arguments for name in systems}}
    results["held_out"] = {name: [_held_out_scores(folder) for folder in folders] for name, folders in made.items()}
    write_pretraining(results, Path(output) / "pretraining")
    return results


def _plan_runs(
    task: Task,
    systems: Sequence[str],
    shots: Sequence[int],
    seeds: Seeds,
    work: str,
    checkpoints: Mapping[tuple[tuple[str, ...], str | None], str],
) -> Iterator[Run]:
    """Yield the regression's runs and each system's: few cells first, then all, every seed on every donor."""
    shots_and_all: list[int | None] = [*sorted(shots), None]
    for name, shot in itertools.product([REGRESSION, *systems], shots_and_all):
        system = LOGISTIC_REGRESSION if name == REGRESSION else SYSTEMS[name]
        number = seeds.paper if name.startswith("paper") else seeds.few
        if shot is None:  # of all cells a regression is the same with every seed
            number = 1 if name == REGRESSION else seeds.all_cells
        for seed, groups in itertools.product(range(number), task.folds()):
            yield Run(task, groups, name, system, seed, work, checkpoints.get((groups, system.pretraining)), shot)


def _held_out_scores(checkpoint: Path) -> dict[str, float]:
    """Return what a pretraining run has measured on masked genes of its own held-out cells."""
    metrics = read_json(checkpoint / METRICS_FILE)
    return {score: metrics[f"held_out_{score}"] for score in HELD_OUT_SCORES}


def make_checkpoint(pretraining: Pretraining) -> str:
    """Pretrain on all cells outside the test groups, unless that is done; return the folder."""
    torch.set_num_threads(1)
    task = pretraining.task
    given = [*PRETRAININGS[pretraining.name].split(), *START, "--corpus", task.corpus]
    given += ["--group_column", task.group_column, "--exclude_groups", *pretraining.test_groups]
    given += ["--output_dir", str(pretraining.output), "--use_cpu", "True", "--disable_tqdm", "True"]
    return str(pretrain_by(given).output_dir)


def pretrain_by(given: Sequence[str]) -> TrainingResult:
    """Pretrain by arguments of `screformer pretrain`."""
    data, model, training = parse_arguments(
        [PretrainingDataArguments, ModelArguments, PretrainingArguments],
        given,
        program="pretrain",
        description="",
        example="",
        recipes="pretrain",
    )
    return pretrain(model, data, training)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="screformer benchmark pretraining",
        description="Models with and without pretraining, on few and many labelled cells, on unseen donors.",
        epilog="example: screformer benchmark pretraining --seeds 5 --all-cells-seeds 3; two hours on two cores",
    )
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--work", default="runs/pretraining", help="Folder for the runs (default: %(default)s).")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), help=f"Some of {', '.join(SYSTEMS)}.")
    parser.add_argument("--shots", nargs="*", type=int, default=list(SHOTS), help="Labelled cells of each type.")
    parser.add_argument("--seeds", type=int, default=5, help="Seeds of each donor and number (default: %(default)s).")
    parser.add_argument("--all-cells-seeds", type=int, help="Seeds where all cells train (default: as --seeds).")
    parser.add_argument("--paper-seeds", type=int, help="Seeds of the paper's classifier (default: as --seeds).")
    parser.add_argument("--workers", type=int, help="Processes (default: one a core).")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    logger.setLevel(logging.INFO)
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        compare_pretraining(
            given.output,
            given.work,
            systems=given.systems,
            shots=given.shots,
            seeds=given.seeds,
            all_cells_seeds=given.all_cells_seeds,
            paper_seeds=given.paper_seeds,
            num_workers=given.workers,
            command=" ".join(["screformer benchmark pretraining", *without_folders(arguments)]),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
