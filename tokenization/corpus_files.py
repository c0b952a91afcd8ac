"""Files of a corpus folder: their names, checksums, writing aside and renaming, and the lock that lets one run in."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from screformer.tokenization.system_errors import name_in_system_errors

MANIFEST = "manifest.json"
BUILD_LOG = "build_log.json"
TOKENIZER_FOLDER = "tokenizer"
CELL_HASHES = "cell_hashes.npy"
# Of a corpus that is being built: what it will be, and what is known of each source and shard so far.
PLAN = "plan.json"
WORK_FOLDER = "work"

# JSON, with the keys that `Corpus` lists.
Manifest = dict[str, Any]


def partial_folder(folder: Path) -> Path:
    """Return where a corpus is built before it is renamed to `folder`."""
    return folder.with_name(folder.name + ".partial")


def aside(path: Path) -> Path:
    """Return a name beside `path` that no other process writes to; `remove_leftovers` knows it."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")


def is_aside(path: Path) -> bool:
    """Whether a name is one of `aside`."""
    return re.fullmatch(r".+\.[0-9a-f]{12}\.part", path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete what stopped writers left aside."""
    for path in folder.rglob("*.part"):
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Manifest:
    """Read a JSON object."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Manifest) -> None:
    """Write a JSON object, whole or not at all."""
    beside = aside(path)
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(beside, path)


def checksum(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Sha256, in hexadecimal, of a file's content, or of the names and contents of the files in a folder.

    `advance` is called with the number of bytes read.
    """
    if path.is_dir():
        return checksum_of_files(files_under(path), path, advance)
    digest = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()


def checksum_of_files(files: Sequence[Path], folder: Path, advance: Callable[[int], object] | None = None) -> str:
    """Sha256, in hexadecimal, of the names and contents of files in a folder; `advance` as for `checksum`."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\0{checksum(file, advance)}\n".encode())
    return digest.hexdigest()


def files_under(path: Path) -> list[Path]:
    """Return the files of a folder in the order of their names, or the file itself."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the lock on building `folder`; a process that dies lets go of it.

    Raises
    ------
    BlockingIOError
        Another process holds it.
    """
    path = folder.with_name(folder.name + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        msg = f"output: another run is building {folder} now (it holds {path.name}); wait for it, or stop it first"
        raise BlockingIOError(msg) from error
    try:
        with name_in_system_errors(folder):
            yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
