"""Whether the scores beside a checkpoint are of its own weights, and of the test cells of its own split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from screformer.train.distillation_report import REPORT_FILE, STUDENT
from screformer.train.evaluate import EVALUATION_FILE
from screformer.train.labelled_cells import SPLITS_FILE
from screformer.train.result_files import hash_weights, read_json


def scores_of_other_weights(folder: Path) -> Iterator[str]:
    """Give a sentence each of the files whose scores are of other weights; nothing of those that do not say of which.

    Raises
    ------
    ValueError
        A file is damaged.
    """
    recorded = {
        EVALUATION_FILE: _value(folder / EVALUATION_FILE, "checkpoint", "weights_sha256"),
        REPORT_FILE: _value(folder / REPORT_FILE, "models", STUDENT, "weights_sha256"),
    }
    told = {name: str(sha256) for name, sha256 in recorded.items() if sha256 is not None}
    found = hash_weights(folder) if told else None
    for name, sha256 in told.items():
        if sha256 != found:
            here = "no safetensors are here" if found is None else f"those that are here have {found[:12]}"
            yield f"{name} is of other weights: their sha256 is {sha256[:12]}, {here}"


def scores_of_other_cells(folder: Path) -> Iterator[str]:
    """Give a sentence each of what shows that ``evaluation.json`` is not of the test part of ``splits.json``.

    Raises
    ------
    ValueError
        A file is damaged.
    """
    if not (folder / SPLITS_FILE).exists():
        return
    part = _value(folder / EVALUATION_FILE, "part")
    if part not in (None, "test"):
        yield f"{EVALUATION_FILE} is of the part {part!r}, not 'test'"
        return
    expected = _value(folder / SPLITS_FILE, "num_cells", "test")
    found = _value(folder / EVALUATION_FILE, "num_cells")
    above = _value(folder / EVALUATION_FILE, "num_cells_above_classes") or 0  # of a label tree: they have no class
    if None not in (expected, found) and found + above != expected:
        yield f"{EVALUATION_FILE} is of {found + above:,} cells, the test part of {SPLITS_FILE} has {expected:,}"


def _value(path: Path, *keys: str) -> Any:  # Any: JSON
    """Return what a file holds under a key within a key; None where the file or a key is not there."""
    value = read_json(path) if path.exists() else None
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
