"""Results as files that are whole or absent (written aside, then renamed), and the versions that made them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from screformer.tokenization.corpus_files import checksum
from screformer.tokenization.system_errors import name_in_system_errors

PACKAGES = (
    "screformer", "torch", "transformers", "datasets", "accelerate", "anndata", "numpy", "scikit-learn"
)  # fmt: skip
WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; rename it to `path` on success, remove it on an error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        with name_in_system_errors(target):
            yield aside
            aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:  # Any: whatever JSON holds
    """Write `value` as indented UTF-8 JSON.

    Raises
    ------
    ValueError
        `value` holds NaN or infinity, which JSON does not know.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with written_aside(path) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    ValueError
        It is cut off or no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON ({error}): it was cut off or changed; write or download it again"
        ) from error


def finite(value: Any) -> Any:  # Any: JSON, and numbers of torch
    """Return `value` with None for NaN and infinity, which JSON does not know (a diverged run has them)."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if hasattr(value, "item"):  # a tensor of one number; this module does not wait for torch
        return finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def software_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def hash_weights(checkpoint: str | Path) -> str | None:
    """Return the sha256 of a local checkpoint's weights; None for one on the Hub or without safetensors.

    Of one file it is the file's own; of several, that of their names and sums.

    Raises
    ------
    ValueError
        See `weight_files`.
    """
    files = weight_files(checkpoint)
    if len(files) == 1 and files[0].name == WEIGHTS_FILE:
        return checksum(files[0])
    lines = "".join(f"{path.name} {checksum(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest() if files else None


def weight_files(checkpoint: str | Path) -> list[Path]:
    """Return the safetensors files of a local checkpoint's weights, by name; none for one on the Hub or without them.

    Raises
    ------
    ValueError
        The index of several files names what is no safetensors file beside it.
    """
    folder = Path(checkpoint)
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    if not (folder / WEIGHTS_INDEX).exists():
        return []
    index = read_json(folder / WEIGHTS_INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / WEIGHTS_INDEX} has no weight_map; write or download the checkpoint again")
    files = [folder / name for name in sorted({str(name) for name in names.values()})]
    wrong = next((path for path in files if path.suffix != ".safetensors" or path.parent != folder), None)
    wrong = wrong or next((path for path in files if not path.is_file()), None)
    if wrong is not None:
        raise ValueError(
            f"{folder / WEIGHTS_INDEX} names {str(wrong)!r}, which is no safetensors file beside it; write or download "
            "the checkpoint again"
        )
    return files
