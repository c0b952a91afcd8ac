"""Entries in any order become rows on disk, with bounded memory: an external sort into a temporary folder."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from screformer.tokenization.stored_rows import CompressedRows, Entries, StoredColumns

try:
    import fcntl
except ImportError:  # not on Windows, where folders of killed processes stay
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
PREFIX = "screformer-rows-"
# Entries that are put in order in memory at a time: about 100 MB with the copies that sorting makes.
ENTRIES_PER_BAND = 1 << 21
MAX_BANDS = 1 << 16
INDEX_TYPE = np.dtype(np.int32)


class NumbersFile:
    """Numbers of one type in a file, read by slices like an array; no memory map, whose pages would count as memory."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self.shape = (path.stat().st_size // self.dtype.itemsize,)
        self._file = path.open("rb", buffering=0)
        self.close = weakref.finalize(self, self._file.close)

    def __getitem__(self, run: slice) -> npt.NDArray[Any]:
        """Return the numbers of a run without steps."""
        start, stop, _ = run.indices(self.shape[0])
        numbers = np.empty(max(0, stop - start), self.dtype)
        left, position = numbers.view(np.uint8).data, start * self.dtype.itemsize
        while left:
            size = self._read_into(left, position)
            if size == 0:
                msg = f"{self._file.name} became shorter while it was read"
                raise EOFError(msg)
            left, position = left[size:], position + size
        return numbers

    def _read_into(self, buffer: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):  # forked processes share the file's position, which this leaves alone
            return os.preadv(self._file.fileno(), [buffer], position)
        self._file.seek(position)
        return self._file.readinto(buffer) or 0


class TemporaryRows(CompressedRows):
    """Compressed sparse rows in a temporary folder, which `close` removes unless it belongs to another process.

    Attributes
    ----------
    folder
        Where they are; another process may open them there while the owner keeps them.
    """

    def __init__(self, folder: Path, *, owner: IO[bytes] | None = None) -> None:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.folder = folder
        self._files = [
            NumbersFile(folder / "data", np.dtype(about["dtype"])),
            NumbersFile(folder / "indices", INDEX_TYPE),
            NumbersFile(folder / "indptr", np.dtype(np.int64)),
        ]
        data, indices, indptr = self._files
        num_cells, num_genes = about["shape"]
        super().__init__(data, indices, indptr, (num_cells, num_genes), is_checked=True)
        self._remove = None if owner is None else weakref.finalize(self, _remove_folder, folder, owner, os.getpid())

    def close_files(self) -> None:
        """Close the files alone: the folder stays, for others to read, until `close`."""
        for file in self._files:
            file.close()

    def close(self) -> None:
        """Close the files and remove the folder."""
        self.close_files()
        if self._remove is not None:
            self._remove()


class RowsWriter:
    """A temporary folder, made in TMPDIR, that is filled and becomes `TemporaryRows`.

    Use it in a `with` statement: on an error the folder is removed. Folders that killed processes left are removed
    when the next one is made.

    Parameters
    ----------
    num_entries
        Upper bound of the entries to come.
    dtype
        Of the values.
    name
        The file they are of, for messages.

    Raises
    ------
    OSError
        The disk has no room for them.
    """

    def __init__(self, num_entries: int, dtype: np.dtype, name: str) -> None:
        self.dtype, self.name = np.dtype(dtype), name
        place = Path(tempfile.gettempdir())
        _remove_abandoned(place)
        self.num_bytes = num_entries * (2 * INDEX_TYPE.itemsize + self.dtype.itemsize)  # row, column, value
        _check_room(place, self.num_bytes, name)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        self._owner = _own(self.folder)

    def __enter__(self) -> RowsWriter:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Remove the folder after an error; say what to do about a full disk."""
        if kind is None:
            return
        _remove_folder(self.folder, self._owner, os.getpid())
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(self.folder.parent, self.num_bytes, self.name) from error

    def sort(self, chunks: Callable[[], Iterable[Entries]], lengths: npt.NDArray[np.int64], num_genes: int) -> None:
        """Bring all entries into the order of rows, keeping their order within a row.

        The rows are cut into bands that fit into memory; every entry is written to the place of its band, then each
        band is put in order where it lies.

        Parameters
        ----------
        chunks
            Gives all entries, a bounded number at a time.
        lengths
            Entries of each row.
        num_genes
            Columns of the matrix.
        """
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        edges = _band_edges(indptr)
        band_of_row = np.repeat(np.arange(len(edges) - 1, dtype=np.uint16), np.diff(edges))
        next_free = indptr[edges[:-1]].copy()
        with self.open("rows") as rows, self.open("indices") as indices, self.open("data") as data:
            for entries in chunks():
                self._scatter(entries, band_of_row, next_free, (rows, indices, data))
            for first_row, last_row in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
                run = slice(int(indptr[first_row]), int(indptr[last_row]))
                self._order_band(run, first_row, last_row - first_row, (rows, indices, data))
        (self.folder / "rows").unlink()
        self.finish(indptr, num_genes)

    def open(self, name: str) -> IO[bytes]:
        """Open a new file of the folder for writing and reading."""
        return (self.folder / name).open("w+b")

    def finish(self, indptr: npt.NDArray[np.int64], num_genes: int) -> None:
        """Complete a folder whose files "indices" and "data" are in order."""
        indptr.tofile(self.folder / "indptr")
        about = {"dtype": self.dtype.str, "shape": [len(indptr) - 1, num_genes]}
        (self.folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    def result(self) -> TemporaryRows:
        """Return the finished rows."""
        return TemporaryRows(self.folder, owner=self._owner)

    def _scatter(
        self,
        entries: Entries,
        band_of_row: npt.NDArray[np.uint16],
        next_free: npt.NDArray[np.int64],
        files: tuple[IO[bytes], IO[bytes], IO[bytes]],
    ) -> None:
        band = band_of_row[entries.rows]
        order = np.argsort(band, kind="stable")  # radix sort, as these are 16 bits
        used, starts = np.unique(band[order], return_index=True)
        stops = np.append(starts[1:], len(order))
        columns = (entries.rows, entries.columns, entries.values)
        for file, column, dtype in zip(files, columns, (INDEX_TYPE, INDEX_TYPE, self.dtype), strict=True):
            ordered = column[order].astype(dtype, copy=False)
            for one, start, stop in zip(used, starts, stops, strict=True):
                _write_at(file, ordered[start:stop], int(next_free[one]))
        next_free[used] += stops - starts

    def _order_band(
        self, run: slice, first_row: int, num_rows: int, files: tuple[IO[bytes], IO[bytes], IO[bytes]]
    ) -> None:
        rows = _read_at(files[0], INDEX_TYPE, run) - first_row
        # A stable sort of 16 bits is a radix sort, ten times as fast as one of 32.
        order = np.argsort(rows.astype(np.uint16) if num_rows <= 1 << 16 else rows, kind="stable")
        for file, dtype in ((files[1], INDEX_TYPE), (files[2], self.dtype)):
            _write_at(file, _read_at(file, dtype, run)[order], run.start)


def rewrite_by_rows(stored: StoredColumns, name: str) -> TemporaryRows:
    """Write a matrix that is stored by columns into a temporary folder by rows, and show progress.

    Raises
    ------
    OSError
        The disk has no room for it.
    """
    logger.info("%s is %s: rewriting it by rows in %s", name, stored.description, tempfile.gettempdir())
    lengths = np.zeros(stored.shape[0], np.int64)
    for entries in _with_progress(stored.entries(), f"{name}: count", stored.num_entries):
        np.add.at(lengths, entries.rows, 1)
    num_entries = int(lengths.sum())
    dtype = np.dtype(np.float32) if stored.dtype == np.float16 else stored.dtype.newbyteorder("=")
    with RowsWriter(num_entries, dtype, name) as writer:
        writer.sort(lambda: _with_progress(stored.entries(), f"{name}: by rows", num_entries), lengths, stored.shape[1])
        return writer.result()


def open_shared_rows(folder: str | None) -> TemporaryRows | None:
    """Rows that another process has written and still keeps; None where there are none."""
    if folder is None or not (Path(folder) / "about.json").is_file():
        return None
    try:
        return TemporaryRows(Path(folder))
    except FileNotFoundError:  # removed in between
        return None


def _band_edges(indptr: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """First row of each band, and the number of rows: bands of at most ENTRIES_PER_BAND entries, or of one row."""
    size = max(ENTRIES_PER_BAND, -(-int(indptr[-1]) // (MAX_BANDS // 4)))
    edges, num_rows = [0], len(indptr) - 1
    while edges[-1] < num_rows:
        stop = int(np.searchsorted(indptr, indptr[edges[-1]] + size, side="right")) - 1
        edges.append(min(max(stop, edges[-1] + 1), num_rows))
    return np.array(edges, np.int64)


def _with_progress(chunks: Iterable[Entries], description: str, total: int) -> Iterator[Entries]:
    with tqdm(total=total, desc=description, unit="entry", unit_scale=True, disable=None) as bar:
        for entries in chunks:
            yield entries
            bar.update(len(entries.rows))


def _write_at(file: IO[bytes], values: npt.NDArray[Any], position: int) -> None:
    file.seek(position * values.itemsize)
    file.write(values.data)  # unlike ndarray.tofile, says why it fails


def _read_at(file: IO[bytes], dtype: np.dtype, run: slice) -> npt.NDArray[Any]:
    file.seek(run.start * dtype.itemsize)
    return np.frombuffer(file.read((run.stop - run.start) * dtype.itemsize), dtype)


def _check_room(place: Path, num_bytes: int, name: str) -> None:
    if shutil.disk_usage(place).free < num_bytes + (64 << 20):
        raise _no_room(place, num_bytes, name)


def _no_room(place: Path, num_bytes: int, name: str) -> OSError:
    return OSError(
        errno.ENOSPC,
        f"{name} must be rewritten by rows, which takes {num_bytes / 1e9:.2f} GB of temporary files, and {place} has "
        f"{shutil.disk_usage(place).free / 1e9:.2f} GB free. Name another folder with the environment variable TMPDIR, "
        "or rewrite the file by rows yourself (adata.X = adata.X.tocsr())",
    )


def _own(folder: Path) -> IO[bytes]:
    """Lock a file of the folder for as long as this process, or one that it forked, lives."""
    file = (folder / "owner.part").open("wb")
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (folder / "owner.part").rename(folder / "owner")
    return file


def _remove_folder(folder: Path, owner: IO[bytes], process: int) -> None:
    if os.getpid() == process:  # a forked child leaves it to its parent
        shutil.rmtree(folder, ignore_errors=True)
    owner.close()


def _remove_abandoned(place: Path) -> None:
    """Remove the folders of processes that were killed: their locks are free."""
    if fcntl is None:
        return
    for owner in place.glob(f"{PREFIX}*/owner"):
        with suppress(OSError), owner.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.info("removing %s, left by a process that was stopped", owner.parent)
            shutil.rmtree(owner.parent, ignore_errors=True)
