"""How good a fine-tuned checkpoint is on cells it has not seen, as one JSON file with figures beside it."""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from screformer.annotation.calibration import LabelReader
from screformer.annotation.calibration_fit import describe_calibration, realised_errors
from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import Corpus, open_corpus
from screformer.train.batch_size import BatchSize, read_batch_size
from screformer.train.calibration_record import plot_reliability
from screformer.train.cell_dataset import CellDataset
from screformer.train.corpus_columns import describe_corpus, name_cells, read_column
from screformer.train.inference import predict_logits
from screformer.train.result_files import hash_weights, read_json, software_versions, write_json, written_aside
from screformer.train.seen_cells import count_seen_cells
from screformer.train.starting_model import check_tokenizer
from screformer.train.tree_metrics import score_levels

# By name, because run with `python -m` this module is called __main__.
logger = logging.getLogger("screformer.train.evaluate")

EVALUATION_FILE, PREDICTIONS_FILE = "evaluation.json", "predictions.tsv"
CONFUSION_FILE, ROC_FILE, RELIABILITY_FILE = "confusion_matrix.png", "roc_curves.png", "reliability.png"

EXAMPLE = """\
examples:
  python -m screformer.train.evaluate finetuned corpus --output evaluation
  python -m screformer.train.evaluate finetuned other_corpus --part all --label_column cell_type"""


def evaluate_checkpoint(
    checkpoint: str | Path,
    corpus_folder: str | Path,
    output: str | Path,
    *,
    part: str = "test",
    splits: str | Path | None = None,
    label_column: str | None = None,
    batch_size: BatchSize = 32,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a classifier on one part of a corpus and return what ``evaluation.json`` holds.

    Writes into `output`: ``evaluation.json`` (all of `classification_metrics`, and what was measured on what),
    ``predictions.tsv`` (a row a cell, with every probability), ``confusion_matrix.png``, ``roc_curves.png``. Cells
    whose label the model does not know count as errors; their labels are in ``unknown_labels``. ``seen_cells`` counts
    those that the model has read before, in its training or before it. Of a model with a label tree, a cell's
    prediction is the end of its path from the top down, as `annotate_file` gives it, and ``hierarchy`` has what
    `tree_metrics.score_levels` finds, of cells with labels at any level. ``calibration`` says how far probabilities are
    from shares of right labels (``reliability.png``), and of a calibrated model ``answers`` how often its answers are
    wrong when an error rate is asked for; see `annotation.calibration`.

    Parameters
    ----------
    checkpoint
        Folder or Hub id.
    corpus_folder
        Corpus made with the checkpoint's tokenizer.
    output
        Folder to write into.
    part
        ``"train"``, ``"validation"`` or ``"test"`` of the splits, or ``"all"``: every labelled cell.
    splits
        ``splits.json`` of the fine-tuning; default the one in the checkpoint's folder.
    label_column
        Column of the true labels; default that of the splits.
    batch_size
        Cells a forward pass; ``"auto"``: as many as fit into free memory.
    device
        For example ``"cuda"``; default a GPU if there is one.
    progress
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        The tokenizers differ, there are no splits, the part is unknown or empty, its cells are not in the corpus, or
        `batch_size` is ``"auto"`` and not even one cell fits.
    """
    config = ScReformerConfig.from_pretrained(checkpoint)
    corpus = open_corpus(corpus_folder)
    check_tokenizer(config, corpus.tokenizer(), checkpoint=str(checkpoint))
    split = _read_splits(checkpoint, splits, is_needed=part != "all")
    column = label_column or split.get("label_column") or "cell_type"
    labels = read_column(corpus, column, argument="label_column")
    numbers = _rows_of_part(corpus, labels, split, part)
    model = ScReformerForCellClassification.from_pretrained(checkpoint)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    logits = predict_logits(model, CellDataset(corpus, numbers), batch_size=batch_size, progress=progress)
    reader = LabelReader(config)
    found = _describe_answers(reader, config, logits, labels[numbers])
    answers = reader(logits)
    probabilities, predicted = answers.probabilities, reader.classes(answers)
    if config.label_parents:
        # Where a label is above the classes, no class is right or wrong: these cells count at their levels alone.
        is_class = ~np.isin(labels[numbers], sorted(set(reader.tree.labels) - set(reader.class_names)))
        found |= {
            "hierarchy": score_levels(reader.tree, reader.class_names, probabilities, labels[numbers].tolist()),
            "num_cells_above_classes": int((~is_class).sum()),
        }
        numbers, probabilities, predicted = numbers[is_class], probabilities[is_class], predicted[is_class]
        if not len(numbers):
            raise ValueError(f"part {part!r} has no cell whose label is one of the classes {reader.class_names}")
    seen = count_seen_cells(checkpoint, corpus, numbers)
    if part == "test" and seen is not None and seen["num_seen"]:
        logger.warning(
            "%d of the %d test cells were read while %s was trained, its pretraining included",
            seen["num_seen"],
            seen["num_cells"],
            checkpoint,
        )
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "part": part,
        "label_column": column,
        "checkpoint": {
            "name": str(checkpoint),
            "weights_sha256": hash_weights(checkpoint),
            "tokenizer_fingerprint": config.tokenizer_fingerprint,
        },
        "corpus": {"name": str(corpus_folder), **describe_corpus(corpus)},
        "device": str(model.device),
        "seen_cells": seen,
        **found,
    }
    if found["calibration"]["levels"]:
        plot_reliability(found["calibration"]["levels"], Path(output) / RELIABILITY_FILE, title=f"Cells of {part}")
    names = name_cells(corpus)[numbers]
    cells = _ScoredCells(names, labels[numbers], probabilities, predicted)
    return _write_evaluation(Path(output), facts, cells, reader.class_names)


def _describe_answers(
    reader: LabelReader,
    config: ScReformerConfig,
    logits: npt.NDArray[np.float32],
    labels: npt.NDArray[np.str_],
) -> dict[str, Any]:
    """Return how well calibrated the probabilities are, and what asking for an error rate gives."""
    is_known = np.isin(labels, reader.tree.labels)
    raw = LabelReader(config, is_calibrated=False)
    known = logits[is_known]
    described = describe_calibration(reader.tree, reader(known), raw(known), labels[is_known].tolist())
    if reader.calibration is None:
        return {"calibration": described}
    described["temperatures"] = list(reader.calibration.temperatures)
    return {"calibration": described, "answers": realised_errors(config, logits, labels.tolist())}


def _read_splits(checkpoint: str | Path, splits: str | Path | None, *, is_needed: bool) -> dict[str, Any]:
    path = Path(splits) if splits is not None else Path(checkpoint) / "splits.json"
    if path.exists():
        return read_json(path)
    if is_needed or splits is not None:
        raise ValueError(
            f"splits: {path} does not exist. Name the splits.json that fine-tuning wrote, or evaluate every labelled "
            'cell with part="all" (--part all)'
        )
    return {}


def _rows_of_part(
    corpus: Corpus, labels: npt.NDArray[np.str_], split: Mapping[str, Any], part: str
) -> npt.NDArray[np.int64]:
    if part == "all":
        numbers = np.flatnonzero(labels != "")
    elif part in ("train", "validation", "test"):
        row_of = {cell_name: row for row, cell_name in enumerate(name_cells(corpus).tolist())}
        missing = [cell_name for cell_name in split[part] if cell_name not in row_of]
        if missing:
            raise ValueError(
                f"splits: {len(missing)} of {len(split[part])} cells of part {part!r} are not in the corpus, the first "
                f"is {missing[0]!r}; use the corpus that the checkpoint was fine-tuned on"
            )
        numbers = np.array([row_of[cell_name] for cell_name in split[part]], dtype=np.int64)
        is_labelled = labels[numbers] != ""
        if not is_labelled.all():
            logger.warning("%d of %d cells have no label and are left out", (~is_labelled).sum(), len(numbers))
        numbers = numbers[is_labelled]
    else:
        raise ValueError(f"part must be 'train', 'validation', 'test' or 'all', got {part!r}")
    if not len(numbers):
        raise ValueError(f"part {part!r} has no labelled cell")
    return numbers


class _ScoredCells(NamedTuple):
    """Name and true label of each cell, its probabilities (cells, classes), and the class that it is called."""

    names: npt.NDArray[np.str_]
    labels: npt.NDArray[np.str_]
    probabilities: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int64]


def _write_evaluation(
    output: Path, facts: dict[str, Any], cells: _ScoredCells, known_labels: list[str]
) -> dict[str, Any]:
    from screformer.train.figures import plot_confusion_matrix, plot_roc_curves
    from screformer.train.metrics import classification_metrics

    names = known_labels + sorted(set(cells.labels.tolist()) - set(known_labels))
    index_of = {name: index for index, name in enumerate(names)}
    truth = np.array([index_of[label] for label in cells.labels.tolist()], dtype=np.int64)
    metrics = classification_metrics(truth, cells.probabilities, names, predicted=cells.predicted)
    if metrics["unknown_labels"]:
        logger.warning(
            "the model does not know these labels, their cells count as errors: %s", metrics["unknown_labels"]
        )
    evaluation = {**facts, "versions": software_versions(), **metrics}
    _write_predictions(output / PREDICTIONS_FILE, cells, known_labels)
    plot_confusion_matrix(metrics["confusion_matrix"], names, output / CONFUSION_FILE)
    plot_roc_curves(metrics["roc_curves"], output / ROC_FILE)
    write_json(output / EVALUATION_FILE, evaluation)
    return evaluation


def _write_predictions(path: Path, cells: _ScoredCells, known_labels: list[str]) -> None:
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(
            ["cell_id", "label", "predicted", "confidence", *(f"probability_{name}" for name in known_labels)]
        )
        for cell_name, label, row, predicted in zip(*cells, strict=True):
            numbers = [f"{value:.6f}" for value in (row[predicted], *row)]
            table.writerow([cell_name, label, known_labels[int(predicted)], *numbers])


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, evaluate, and log the main scores."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.train.evaluate",
        description="Evaluate a fine-tuned checkpoint on cells it has not seen.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="Folder or Hub id of the fine-tuned checkpoint.")
    parser.add_argument("corpus", help="Corpus folder, made with the checkpoint's tokenizer.")
    parser.add_argument("--output", default="evaluation", help="Folder for the results. Default: evaluation.")
    parser.add_argument("--part", default="test", choices=["train", "validation", "test", "all"], help="Default: test.")
    parser.add_argument("--splits", help="splits.json of the fine-tuning. Default: the one in the checkpoint.")
    parser.add_argument("--label_column", help="Column of the true labels. Default: that of the splits.")
    parser.add_argument(
        "--batch_size",
        "--batch-size",
        type=read_batch_size,
        default=32,
        help="Cells a forward pass, or auto: as many as fit into free memory. Default: 32.",
    )
    parser.add_argument("--device", help="For example cuda. Default: a GPU if there is one.")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("screformer").setLevel(logging.INFO)
    try:
        evaluation = evaluate_checkpoint(
            options.checkpoint,
            options.corpus,
            options.output,
            part=options.part,
            splits=options.splits,
            label_column=options.label_column,
            batch_size=options.batch_size,
            device=options.device,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    scores = ", ".join(f"{name} {evaluation[name]:.4f}" for name in ("accuracy", "macro_f1", "balanced_accuracy"))
    if "hierarchy" in evaluation:
        for row in evaluation["hierarchy"]["levels"]:
            logger.info("level %(level)d, %(num_cells)d cells: accuracy %(accuracy).4f, macro_f1 %(macro_f1).4f", row)
    logger.info("%d cells: %s; results: %s", evaluation["num_cells"], scores, options.output)


if __name__ == "__main__":
    main()
