"""Which files of a checkpoint folder are published, and the record by which they are known again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path

from screformer.tokenization.corpus_files import checksum

CHECKSUMS = "checksums.json"
# Nothing else leaves the machine: no predictions of single cells, no caches, no states of an optimizer.
PATTERNS = (
    "README.md", "LICENSE", "config.json", "*.py", "genes.json", "tokenizer_config.json", "special_tokens_map.json",
    "model*.safetensors", "model.safetensors.index.json", "unknown_types.safetensors", "calibration.json",
    "evaluation.json", "metrics.json", "training.json", "splits.json", "resources.json", "resources.md",
    "log_history.json", "downstream.json", "card.json", "seen_cells.json", "seen_cells.npy",
    "calibration_cells.npy", "distillation.json", "distillation.md", "golden_cells.json", "golden_cells.safetensors",
    "*.png",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npz")
# What a pickle of protocol 2 and later, and PyTorch's archive, begin with.
PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
# What git and the Hub's own download leave in a folder.
OF_THE_HUB = (".gitattributes", ".git/*", ".cache/huggingface/*")


def published_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that are published, by name."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, each) for each in PATTERNS)
    )


def checksums_of(folder: Path) -> dict[str, str]:
    """Return name -> sha256 of the files that are published."""
    return {path.name: checksum(path) for path in published_files(folder)}


def pickles_in(folder: Path) -> Iterator[str]:
    """Give the names of files that are pickles, by name or by content, in whatever folder."""
    yield from pickles_of(folder, folder.rglob("*"))


def pickles_of(folder: Path, paths: Iterable[Path]) -> Iterator[str]:
    """Give the names within `folder` of those of `paths` that are pickles, by name or by content."""
    for path in sorted(paths):
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(4)
            if path.suffix in PICKLES or start.startswith(PICKLE_STARTS):
                yield path.relative_to(folder).as_posix()


def wrong_files(folder: Path, record: Mapping[str, str]) -> Iterator[str]:
    """Give a sentence each of the files that are not what the record says: missing, changed, or new."""
    found = checksums_of(folder)
    for name, sha256 in record.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != sha256:
            yield f"{name} is not the file that was published: its sha256 is {found[name][:12]}, not {sha256[:12]}"
    yield from unlisted_files(folder, record)


def unlisted_files(folder: Path, record: Collection[str]) -> Iterator[str]:
    """Give a sentence each of the files, in whatever folder, that no release publishes or that the record lacks."""
    listed = ({path.name for path in published_files(folder)} & set(record)) | {CHECKSUMS}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_file = path.is_symlink() or not path.is_dir()  # what a link to a folder holds is not looked through
        if is_file and name not in listed and not any(fnmatch(name, each) for each in OF_THE_HUB):
            yield f"{name} was not published with it"
