"""Results as files that are whole or absent (written aside, then renamed), and the versions that made them."""

from __future__ import annotations

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
    """Return the content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


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
    """Return the sha256 of a local checkpoint's weights; None for one on the Hub or in several files."""
    path = Path(checkpoint) / "model.safetensors"
    if not path.exists():
        return None
    return checksum(path)
