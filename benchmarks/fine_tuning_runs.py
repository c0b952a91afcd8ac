"""One run of a comparison: a model fine-tuned, or a regression fitted, and tested on cells that it has not seen."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from screformer.annotation.label_tree import label_names_of
from screformer.benchmarks.fine_tuning_tasks import Task, regression_scores, score_labels
from screformer.tokenization.corpus import open_corpus
from screformer.tokenization.corpus_files import MANIFEST, checksum
from screformer.tokenization.corpus_workers import Workers, available_cores
from screformer.train.argument_parser import parse_arguments
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.classifier_start import ClassifierArguments
from screformer.train.corpus_columns import read_column
from screformer.train.finetune import finetune
from screformer.train.inference import predict_probabilities
from screformer.train.result_files import hash_weights, read_json, write_json
from screformer.train.training_run import TrainingResult

REGRESSION = "logistic_regression"


class System(NamedTuple):
    """A way to fine-tune.

    Attributes
    ----------
    title
        What tables call it.
    arguments
        Of `screformer finetune`: a recipe, or flags; None for the logistic regression.
    pretraining
        Which of the comparison's pretrained checkpoints it starts from; None for a new model.
    """

    title: str
    arguments: str | None
    pretraining: str | None = None


LOGISTIC_REGRESSION = System("logistic regression on all genes, C searched", None)
# No cell chooses anything: all outside the test groups train, and the last epoch is kept.
COMMON = {
    "validation_fraction": 0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "disable_tqdm": True,
    "overwrite": True,
    "unknown_types": False,
}
# A new model of these comparisons. Activations fit into memory, and need not be computed twice.
START = ["--preset", "tiny", "--gene_space", "expressed", "--config_overrides", "reversible=false"]


def chosen_device(*, use_cpu: bool) -> str:
    """Return where models are trained, ``"cuda"`` or ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() and not use_cpu else "cpu"


class Width(NamedTuple):
    """Which models are compared, where it is not the tiny preset on expressed genes.

    Attributes
    ----------
    preset
        Of new models.
    gene_space
        Of all.
    use_cpu
        Even if there is a GPU.
    """

    preset: str
    gene_space: str
    use_cpu: bool


class Run(NamedTuple):
    """One model to train and test."""

    task: Task
    test_groups: tuple[str, ...]
    name: str
    system: System
    seed: int
    folder: str
    checkpoint: str | None = None
    cells_per_label: int | None = None
    width: Width | None = None

    @property
    def use_cpu(self) -> bool:
        """Whether a GPU is left alone."""
        return self.width is None or self.width.use_cpu

    def start(self) -> list[str]:
        """Return what the model starts from, as arguments of `screformer finetune`."""
        space = "expressed" if self.width is None else self.width.gene_space
        if self.checkpoint is not None:
            return ["--checkpoint", self.checkpoint, "--gene_space", space]
        return START if self.width is None else ["--preset", self.width.preset, "--gene_space", space]

    def asked(self) -> dict[str, Any]:  # Any: JSON
        """Return what its result depends on, beside what its name says."""
        trained: dict[str, Any] = {}
        if self.system.arguments is not None:
            start = [str(hash_weights(part)) if part == self.checkpoint else part for part in self.start()]
            trained = {"start": start, "epochs": self.task.epochs, "device": chosen_device(use_cpu=self.use_cpu)}
        manifest = Path(self.task.corpus, MANIFEST)
        return {
            "arguments": self.system.arguments,
            **trained,
            "corpus_sha256": checksum(manifest) if manifest.exists() else None,
            "label_column": self.task.label_column,
            "rare_labels": sorted(self.task.rare_labels),
        }

    def is_done(self) -> bool:
        """Return whether there is a result of the same."""
        return self.result.exists() and read_json(self.result).get("asked") == self.asked()

    @property
    def result(self) -> Path:
        """Its JSON."""
        cells = "" if self.cells_per_label is None else f"-{self.cells_per_label}"
        name = f"{self.task.name}-{'+'.join(self.test_groups)}-{self.name}-{self.seed}{cells}"
        return Path(self.folder) / "runs" / f"{name}.json"


def do_runs(runs: Sequence[Run], num_workers: int | None, log: logging.Logger) -> list[dict[str, Any]]:  # Any: JSON
    """Do the runs that have no result yet, or one of other settings, and return the results of all.

    Parameters
    ----------
    runs
        Each leaves one JSON in its folder.
    num_workers
        Processes, each with one thread, that run at once; default the cores there are.
    log
        Told how far it is.
    """
    todo = [run for run in runs if not run.is_done()]
    stale = [run.result.name for run in todo if run.result.exists()]
    if stale:
        log.warning("%d runs, such as %s, are of other or unknown settings, and are made anew", len(stale), stale[0])
    with Workers(num_workers or available_cores()) as workers:
        for number, _ in enumerate(workers.run(train_and_test, todo), start=1):
            log.info("%d of %d runs", number, len(todo))
    return [{name: value for name, value in read_json(run.result).items() if name != "asked"} for run in runs]


def train_and_test(run: Run) -> str:
    """Do one run and write its JSON; return its path."""
    if run.system.arguments is None:
        scores = regression_scores(run.task, run.test_groups, cells_per_label=run.cells_per_label, seed=run.seed)
    else:
        if run.use_cpu:
            torch.set_num_threads(1)
        scores = _model_scores(run)
    facts = {"task": run.task.name, "system": run.name, "seed": run.seed, "asked": run.asked()}
    facts |= {} if run.cells_per_label is None else {"cells_per_label": run.cells_per_label}
    write_json(run.result, {**facts, **scores})
    return str(run.result)


def _model_scores(run: Run) -> dict[str, Any]:
    result = fine_tune(run)
    scores = _test(result.output_dir, run)
    scores["training_seconds"] = result.metrics["training_seconds"]
    shutil.rmtree(result.output_dir)
    return scores


def fine_tune(run: Run, more: Sequence[str] = ()) -> TrainingResult:
    """Fine-tune the model of a run, with `more` flags that win, into a folder beside its JSON."""
    task = run.task
    assert run.system.arguments is not None
    folder = run.result.with_suffix("")
    given = [*run.system.arguments.split(), *run.start(), "--corpus", task.corpus, "--group_column", task.group_column]
    given += ["--test_groups", *run.test_groups, "--output_dir", str(folder), "--seed", str(run.seed)]
    given += [part for name, value in COMMON.items() for part in (f"--{name}", str(value))]
    given += ["--use_cpu", str(run.use_cpu)]
    given += ["--exclude_labels", *task.rare_labels] if task.rare_labels else []
    given += ["--num_train_epochs", str(task.epochs)] if task.epochs is not None else []
    given += [] if run.cells_per_label is None else ["--cells_per_label", str(run.cells_per_label)]
    data, model, classifier, training = parse_arguments(
        [FineTuningDataArguments, ModelArguments, ClassifierArguments, FineTuningArguments],
        [*given, *more],
        program="finetune",
        description="",
        example="",
        recipes="finetune",
    )
    return finetune(model, data, training, classifier)


def _test(checkpoint: Path, run: Run) -> dict[str, Any]:
    """Return the scores of each test group."""
    from screformer.modeling_screformer import ScReformerForCellClassification

    task, test_groups = run.task, run.test_groups
    corpus = open_corpus(task.corpus)
    model = ScReformerForCellClassification.from_pretrained(checkpoint).eval()
    model = model.to(chosen_device(use_cpu=run.use_cpu))
    labels = read_column(corpus, task.label_column, argument="label_column")
    groups = read_column(corpus, task.group_column, argument="group_column")
    names = label_names_of(model.config)
    scores = {}
    for group in test_groups:
        rows = np.flatnonzero((groups == group) & ~np.isin(labels, task.rare_labels))
        found = predict_probabilities(model, CellDataset(corpus, rows), batch_size=32, progress=False).argmax(axis=1)
        scores[group] = score_labels([names[index] for index in found.tolist()], labels[rows].tolist())
    return {"groups": scores}


def without_folders(arguments: Sequence[str]) -> list[str]:
    """Keep only the names of files: where they lie says nothing to others."""
    return [Path(argument).name if "/" in argument else argument for argument in arguments]
