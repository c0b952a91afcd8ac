"""Which files of a checkpoint folder are published, and the record by which they are known again."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from screformer.tokenization.corpus_files import checksum

CHECKSUMS = "checksums.json"
# Nothing else leaves the machine: no predictions of single cells, no caches, no states of an optimizer.
PATTERNS = (
    "README.md", "LICENSE", "config.json", "*.py", "genes.json", "tokenizer_config.json", "special_tokens_map.json",
    "model*.safetensors", "model.safetensors.index.json", "unknown_types.safetensors", "calibration.json",
    "evaluation.json", "metrics.json", "training.json", "splits.json", "resources.json", "resources.md",
    "log_history.json", "downstream.json", "card.json", "seen_cells.json", "seen_cells.npy",
    "golden_cells.json", "golden_cells.safetensors", "*.png",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npz")
# What a pickle of protocol 2 and later, and PyTorch's archive, begin with.
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


def published_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that are published, by name."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, each) for each in PATTERNS)
    )


def checksums_of(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of the files that are published."""
    return {path.name: checksum(path) for path in published_files(folder)}


def pickles_in(folder: Path) -> Iterator[str]:
    """Give the names of files that are pickles, by name or by content."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(4)
            if path.suffix in PICKLES or start.startswith(PICKLE_STARTS):
                yield path.relative_to(folder).as_posix()


def wrong_files(folder: Path, record: dict[str, Any]) -> Iterator[str]:
    """Give a sentence each of the files that are not what the record says: missing, changed, or new."""
    found = checksums_of(folder)
    for name, sha256 in record.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != sha256:
            yield f"{name} is not the file that was published: its sha256 is {found[name][:12]}, not {sha256[:12]}"
    others = {path.name for path in folder.iterdir() if path.is_file()} - set(record) - {CHECKSUMS}
    for name in sorted(others - {".gitattributes"}):
        yield f"{name} was not published with it"
