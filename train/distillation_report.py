"""Student beside teacher: how good, how fast and how large, measured on the same validation cells in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from screformer.model_cards.markdown import plain, table
from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerPreTrainedModel
from screformer.tokenization.corpus import Corpus
from screformer.train.arguments import ScReformerTrainingArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import GeneSpace
from screformer.train.distillation_loss import student_scores
from screformer.train.figures import plot_bars
from screformer.train.inference import BatchInference
from screformer.train.result_files import hash_weights, read_json, software_versions, write_json, written_aside
from screformer.train.taught_cells import NO_CLASS
from screformer.train.teacher_logits import TeacherLogits

Int64Array = npt.NDArray[np.int64]
Facts = dict[str, Any]  # Any: JSON

REPORT_FILE, TABLE_FILE, FIGURE_FILE = "distillation.json", "distillation.md", "distillation.png"
REPORT_FILES = (REPORT_FILE, TABLE_FILE, FIGURE_FILE)
TEACHER, STUDENT = "teacher", "student"
TIMED_CELLS, TIMED_ROUNDS = 256, 3


@dataclass(frozen=True)
class Contest:
    """Who is compared: name -> checkpoint, ``"teacher"`` and ``"student"`` among them; how the teacher reads a cell."""

    models: dict[str, str]
    teacher_gene_space: GeneSpace

    def gene_space_of(self, name: str) -> GeneSpace | None:
        """Return the gene space that a model is run in, None for its own."""
        return self.teacher_gene_space if name == TEACHER else None


def is_reported(folder: str | Path, contest: Contest) -> bool:
    """Return whether the report in `folder` has all of these models."""
    path = Path(folder) / REPORT_FILE
    return path.exists() and set(contest.models) <= set(read_json(path)["models"])


def remove_report(folder: str | Path) -> None:
    """Remove the report of an earlier run from `folder`, if there is one."""
    for name in REPORT_FILES:
        (Path(folder) / name).unlink(missing_ok=True)


def report_distillation(
    folder: str | Path,
    contest: Contest,
    corpus: Corpus,
    rows: Int64Array,
    class_ids: Int64Array,
    teacher_logits: TeacherLogits,
    training: ScReformerTrainingArguments,
) -> Facts:
    """Measure the models and write ``distillation.json``, ``.md`` and ``.png`` into `folder`; return what JSON holds.

    Scores are of all cells of `rows`. Speed is that of inference on the first 256 of them, with one batch size: the
    models run in turn, round after round, after one that warms up, so that a slow minute of the machine meets all;
    only the ratios within one report mean something.

    Parameters
    ----------
    folder
        Of the student.
    contest
        The models.
    corpus, rows, class_ids
        The validation cells and their labels, -1 where there is none.
    teacher_logits
        Of these cells.
    training
        For the device and the batch size.
    """
    described = _measure(contest, corpus, rows, class_ids, teacher_logits, training)
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "part": "validation",
        "num_cells": len(rows),
        "num_labelled_cells": int((class_ids != NO_CLASS).sum()),
        "timing": {
            "num_cells": min(len(rows), TIMED_CELLS),
            "batch_size": training.per_device_eval_batch_size,
            "rounds": TIMED_ROUNDS,
            "device": str(training.device),
            "threads": torch.get_num_threads(),
        },
        "models": described,
        "student_to_teacher": _ratios(described),
        "versions": software_versions(),
    }
    _write(Path(folder), report)
    return report


def _measure(
    contest: Contest,
    corpus: Corpus,
    rows: Int64Array,
    class_ids: Int64Array,
    teacher_logits: TeacherLogits,
    training: ScReformerTrainingArguments,
) -> dict[str, Facts]:
    """Return size, scores and speed of each model."""
    inferences = {}
    for name, checkpoint in contest.models.items():
        model = ScReformerForCellClassification.from_pretrained(checkpoint).to(training.device)
        inferences[name] = BatchInference(
            model, "logits", batch_size=training.per_device_eval_batch_size, gene_space=contest.gene_space_of(name)
        )
    logits = {name: run(CellDataset(corpus, rows)) for name, run in inferences.items() if name != TEACHER}
    logits[TEACHER] = teacher_logits.of(rows)
    taught = logits[TEACHER].argmax(axis=-1)
    timed = CellDataset(corpus, rows[:TIMED_CELLS])
    seconds = _time_in_turn(inferences, timed)
    return {
        name: {
            "checkpoint": checkpoint,
            "weights_sha256": hash_weights(checkpoint),
            **_describe_size(inferences[name].model),
            "gene_space": inferences[name].gene_space,
            **student_scores(logits[name].argmax(axis=-1), class_ids, taught),
            "cells_per_second": len(timed) / float(np.median(seconds[name])),
            "seconds": seconds[name],
        }
        for name, checkpoint in contest.models.items()
    }


def _time_in_turn(inferences: Mapping[str, BatchInference], cells: CellDataset) -> dict[str, list[float]]:
    """Return the seconds of each model; its outputs come back to the CPU, so that nothing is still running."""
    seconds: dict[str, list[float]] = {name: [] for name in inferences}
    for number in range(1 + TIMED_ROUNDS):
        for name, run in inferences.items():
            start = time.perf_counter()
            run(cells)
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _describe_size(model: ScReformerPreTrainedModel) -> Facts:
    config = model.config
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
    }


def _ratios(models: Mapping[str, Facts]) -> Facts:
    teacher, student = models[TEACHER], models[STUDENT]
    by_round = np.array(teacher["seconds"]) / np.array(student["seconds"])
    return {
        "speed": float(np.median(by_round)),
        "speed_by_round": by_round.tolist(),
        "parameters": student["parameters"] / teacher["parameters"],
        "bytes": student["bytes"] / teacher["bytes"],
    }


def _write(folder: Path, report: Facts) -> None:
    models = report["models"]
    with written_aside(folder / TABLE_FILE) as aside:
        aside.write_text(_describe(report), encoding="utf-8")
    panels = {
        "Accuracy": {name: facts.get("accuracy") for name, facts in models.items()},
        "Macro-F1": {name: facts.get("macro_f1") for name, facts in models.items()},
        "Agreement with the teacher": {name: facts["agreement"] for name, facts in models.items()},
        "Cells a second": {name: facts["cells_per_second"] for name, facts in models.items()},
        "Parameters": {name: facts["parameters"] for name, facts in models.items()},
    }
    known = {title: values for title, values in panels.items() if None not in values.values()}
    plot_bars(known, folder / FIGURE_FILE, title=f"Distillation: {report['num_cells']:,} validation cells")
    # Last: where it is, the others are.
    write_json(folder / REPORT_FILE, report)


def _describe(report: Facts) -> str:
    """Return the report as Markdown."""
    rows = [
        (
            plain(name),
            *(_share(facts.get(score)) for score in ("accuracy", "macro_f1", "agreement")),
            f"{facts['cells_per_second']:,.1f}",
            f"{facts['parameters']:,}",
            f"{facts['bytes'] / 1e6:,.2f}",
        )
        for name, facts in report["models"].items()
    ]
    columns = ("Model", "Accuracy", "Macro-F1", "Agreement with the teacher", "Cells/s", "Parameters", "MB")
    timing, ratios = report["timing"], report["student_to_teacher"]
    return f"""# Distillation

On {report["num_cells"]:,} validation cells, {report["num_labelled_cells"]:,} of them with a label. They chose the best
epoch of each model: for a score to quote, test the checkpoint with `screformer evaluate`.

{table(columns, rows)}

The student has {ratios["parameters"]:.3f} times the parameters of the teacher and reads {ratios["speed"]:.2f} times as
many cells a second: {timing["num_cells"]:,} cells in batches of {timing["batch_size"]} on {timing["device"]}
({timing["threads"]} threads), the models in turn, median of {timing["rounds"]} rounds. Speeds are those of this machine
at that hour; only their ratio says something.
"""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
