"""What the files of a checkpoint folder say about it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from screformer.train.result_files import read_json

Json = dict[str, Any]  # Any: whatever a JSON file holds


class Checkpoint(NamedTuple):
    """The records in a checkpoint folder; those that are not there are empty."""

    folder: Path
    config: Json
    tokenizer: Json
    training: Json
    metrics: Json
    splits: Json
    downstream: Json
    resources: Json
    seen_cells: Json

    @classmethod
    def of_records(cls, *, training: Json, metrics: Json) -> Checkpoint:
        """Return one of which only the training is known."""
        return cls(Path(), {}, {}, training, metrics, {}, {}, {}, {})

    @property
    def cell_types(self) -> list[str]:
        """Labels of a classifier, in id order; empty for other models."""
        if "Classification" not in (self.config.get("architectures") or [""])[0]:
            return []
        return [name for _, name in sorted(self.config["id2label"].items(), key=lambda item: int(item[0]))]


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Return the records in a checkpoint folder.

    Raises
    ------
    FileNotFoundError
        It has no ``config.json``.
    ValueError
        A record is cut off, no JSON or no object.
    """
    place = checkpoint_folder(folder)
    names = ("config", "tokenizer_config", "training", "metrics", "splits", "downstream", "resources", "seen_cells")
    return Checkpoint(place, *(_read_record(place / f"{name}.json") for name in names))


def _read_record(path: Path) -> Json:
    record = read_json(path) if path.exists() else {}
    if not isinstance(record, dict):
        raise ValueError(
            f"{path.name} holds {type(record).__name__}, not an object: it was changed; write or download it again"
        )
    return record


def checkpoint_folder(folder: str | Path) -> Path:
    """Return the path of a checkpoint folder.

    Raises
    ------
    FileNotFoundError
        It has no ``config.json``.
    """
    place = Path(folder)
    if not (place / "config.json").exists():
        raise FileNotFoundError(f"folder {str(place)!r} has no config.json; give the folder of a saved model")
    return place


def num_values(folder: Path) -> int | None:
    """Return how many numbers (weights and fixed buffers) a model's files hold; None without safetensors.

    Raises
    ------
    ValueError
        A file is cut off or no safetensors.
    """
    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                names = file.keys()
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except SafetensorError as error:
            raise ValueError(
                f"{path.name} cannot be read ({error}): it was cut off or changed; write or download it again"
            ) from error
    return total or None
