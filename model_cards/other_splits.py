"""Runs of the same settings on other splits, beside a card's own: how much scores depend on who is tested."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from screformer.model_cards.checkpoint_records import Checkpoint, Json, read_checkpoint
from screformer.model_cards.comparison import LOGISTIC_REGRESSION, METRIC_TITLES, MODEL, Results, check_results, points
from screformer.model_cards.data_section import split_rule
from screformer.model_cards.markdown import format_share, format_value, plain, table
from screformer.train.training_run import DEFINING_SETTINGS

# Of a run, what must be as in the checkpoint's own for the two to be compared: all that decides what is learned but
# the seeds, the split, and where files lie.
SHAPE = (
    "num_genes", "num_bins", "hidden_size", "num_hidden_layers", "num_attention_heads", "attention", "bucket_size",
    "num_hashes", "gene_space", "classifier_paths", "tokenizer_fingerprint",
)  # fmt: skip
OF_TRAINING = tuple(name for name in DEFINING_SETTINGS if name not in ("seed", "data_seed", "full_determinism"))
OF_MODEL = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
OF_CELLS = ("label_tree", "exclude_labels", "gene_dropout", "cells_per_label", "validation_fraction")
OF_CLASSIFIER = ("linear_start",)
SHOWN = {"accuracy": "Accuracy", "macro_f1": "Macro-F1"}
RANDOM = "random"
ANEW = "the same settings, trained anew"


def record_of_split(folder: str | Path, own: str | Path, results: Results) -> Json:
    """Return what a card keeps of a run on another split.

    Parameters
    ----------
    folder
        Its checkpoint, with ``splits.json``.
    own
        The checkpoint whose card it is.
    results
        ``"model"`` and, beside it, baselines on the run's own test cells.

    Raises
    ------
    FileNotFoundError
        A folder has no ``config.json``.
    ValueError
        It has no split, or was trained with other settings; the message names them.
    """
    check_results(results)
    run, ours = read_checkpoint(folder), read_checkpoint(own)
    if not run.splits:
        raise ValueError(f"other_split: {folder} has no splits.json; give the folder that fine-tuning wrote")
    theirs, expected = _settings(run), _settings(ours)
    different = [
        f"{name} {theirs[name]!r}, not {expected[name]!r}" for name in expected if theirs[name] != expected[name]
    ]
    if different:
        raise ValueError(
            f"other_split: {folder} was trained with {'; '.join(different)}; a card compares splits, so all else must "
            f"be as in {own}"
        )
    kept = (*METRIC_TITLES, "num_cells", "seen_cells")
    return {
        "split": {name: run.splits.get(name) for name in ("group_column", "test_groups", "num_cells")},
        "seed": run.training.get("training", {}).get("seed"),
        "results": {name: {key: row[key] for key in kept if key in row} for name, row in results.items()},
    }


def _settings(run: Checkpoint) -> dict[str, Any]:  # Any: JSON
    record = run.training
    parts = {"model": OF_MODEL, "cells": OF_CELLS, "classifier": OF_CLASSIFIER, "training": OF_TRAINING}
    return {
        "task": record.get("task"),
        "started from a checkpoint": record.get("model", {}).get("checkpoint") is not None,
        "label_column": run.splits.get("label_column"),
        **{name: run.config.get(name) for name in SHAPE},
        **{name: record.get(part, {}).get(name) for part, names in parts.items() for name in names},
    }


def check_splits(others: Sequence[Json], own: Checkpoint) -> None:
    """Raise ValueError if a split and seed is given twice, or is the checkpoint's own."""
    known = [(split_title(own.splits), own.training.get("training", {}).get("seed"))]
    for other in others:
        one = (split_title(other["split"]), other["seed"])
        if one in known:
            raise ValueError(f"other_split: {one[0]}, seed {one[1]}, is given twice, or is the checkpoint's own split")
        known.append(one)


def split_title(splits: Json) -> str:
    """Return a short name of a split, such as "donor: human4"."""
    if not splits.get("group_column"):
        return RANDOM
    return f"{splits['group_column']}: {', '.join(splits['test_groups'])}"


def split_config(splits: Json) -> str | None:
    """Return what a card's metadata calls a split; None if there is none."""
    if not splits:
        return None
    return f"held-out {split_title(splits)}" if splits.get("group_column") else "random split"


def other_config(other: Json) -> str:
    """Return what a card's metadata calls another split: those weights are not these."""
    return f"{split_config(other['split'])} ({ANEW}, seed {other['seed']})"


def other_splits_paragraphs(results: Results, own: Checkpoint, others: Sequence[Json]) -> list[str]:
    """Return a table of all splits, this checkpoint's first, and what they say together; nothing if there is one."""
    if not others:
        return []
    rows = [{"split": own.splits, "results": results}, *others]
    has_regression = all(LOGISTIC_REGRESSION in row["results"] for row in rows)
    names = [MODEL, *([LOGISTIC_REGRESSION] if has_regression else [])]
    columns = [title + ("" if name == MODEL else ", logistic regression") for title in SHOWN.values() for name in names]
    body = [
        (
            plain(split_title(row["split"])) + (" (these weights)" if index == 0 else ""),
            format_value(row["results"][MODEL].get("num_cells", "-")),
            *(format_share(row["results"][name][score]) for score in SHOWN for name in names),
            _seen(row["results"][MODEL]),
        )
        for index, row in enumerate(rows)
    ]
    paragraphs = [
        "### Other splits",
        f"For each split {ANEW}, and tested on the split's own test cells: these weights are those of the first row "
        "alone. The last column counts test cells that had been read before, as by the pretraining that it began with.",
        table(("Split", "Test cells", *columns, "Seen in training"), body),
        "\n".join(f"- {plain(line)}" for line in _told(rows, has_regression=has_regression)),
    ]
    rules = dict.fromkeys(split_rule(row["split"]) for row in others if not row["split"].get("group_column"))
    return [*paragraphs, *rules]


def _seen(row: Any) -> str:  # Any: JSON
    seen = row.get("seen_cells")
    return "-" if seen is None else format_value(seen["num_seen"])


def _told(rows: Sequence[Json], *, has_regression: bool) -> Iterable[str]:
    """Give a sentence for each kind of split, and one for what lies between them."""
    kinds: dict[str, list[Json]] = {}
    for row in rows:
        kinds.setdefault(row["split"].get("group_column") or RANDOM, []).append(row)
    for kind, members in kinds.items():
        yield _of_kind(kind, members, has_regression=has_regression)
    if RANDOM in kinds and len(kinds) > 1:
        known = mean(row["results"][MODEL]["macro_f1"] for row in kinds[RANDOM])
        kind = next(name for name in kinds if name != RANDOM)
        new = mean(row["results"][MODEL]["macro_f1"] for row in kinds[kind])
        yield (
            f"Macro-F1 is {known:.3f} where the test cells were drawn at random, {new:.3f} on each {kind} that was not "
            f"trained on: on cells of another {kind} expect the latter."
        )


def _of_kind(kind: str, members: Sequence[Json], *, has_regression: bool) -> str:
    of = "at random" if kind == RANDOM else f"by {kind}"
    told = f"Split {of} ({len(members)}): macro-F1 {_mean_of(members, MODEL)}"
    if not has_regression:
        return told + "; logistic regression was not measured on all of them."
    gaps = [row["results"][MODEL]["macro_f1"] - row["results"][LOGISTIC_REGRESSION]["macro_f1"] for row in members]
    higher, lower = sum(round(100 * gap, 1) > 0 for gap in gaps), sum(round(100 * gap, 1) < 0 for gap in gaps)
    return (
        f"{told}, logistic regression {_mean_of(members, LOGISTIC_REGRESSION)}: the model is higher on {higher}, lower "
        f"on {lower}, {points(mean(gaps))} on average."
    )


def _mean_of(members: Sequence[Json], name: str) -> str:
    values = [row["results"][name]["macro_f1"] for row in members]
    return f"{mean(values):.3f}" + (f" (SD {stdev(values):.3f})" if len(values) > 1 else "")


def headline_of_splits(results: Results, own: Checkpoint, others: Sequence[Json]) -> str | None:
    """Return what all splits say together, for a card's top; None if there is one, or no logistic regression."""
    rows = [{"split": own.splits, "results": results}, *others]
    if not others or any(LOGISTIC_REGRESSION not in row["results"] for row in rows):
        return None
    return " ".join(plain(line) for line in _told(rows, has_regression=True))
