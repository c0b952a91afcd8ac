"""Matrices of cells x genes on disk, read as runs of rows; those stored by columns, as runs of entries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, hstack, vstack

VALUES_AT_ONCE = 1 << 22  # values of a dense matrix that are in memory at a time: 32 MB of float64
ENTRIES_AT_ONCE = 1 << 20
# The most cells x genes that are read together because the file's chunks span them: 16 MB as counts, 5% of them not 0.
MAX_BAND_VALUES = 1 << 28

# Anything that has a dtype and a length and gives numpy arrays for slices: h5py, zarr, a file of numbers.
Array = Any


class Entries(NamedTuple):
    """Entries of a matrix in any order: row, column and value of each."""

    rows: npt.NDArray[np.integer]
    columns: npt.NDArray[np.integer]
    values: npt.NDArray[Any]


class StoredRows(ABC):
    """A matrix, cells x genes, whose rows can be read in runs.

    Attributes
    ----------
    shape
        Cells, genes.
    dtype
        Of the values.
    entries_per_row
        Mean number of stored values of a row.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    entries_per_row: float

    @abstractmethod
    def read(self, start: int, stop: int) -> csr_matrix:
        """Return the rows `start` to `stop`, 0 <= start < stop <= number of rows."""

    def close(self) -> None:  # noqa: B027 - most have nothing of their own to close
        """Free what it holds besides the file."""


class StoredColumns(ABC):
    """A matrix, cells x genes, that lies on disk gene after gene: its rows cannot be read without reading everything.

    Attributes
    ----------
    shape
        Cells, genes.
    dtype
        Of the values.
    num_entries
        Stored values, or an upper bound.
    description
        How it is stored, for messages.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    num_entries: int
    description: str

    @abstractmethod
    def entries(self) -> Iterator[Entries]:
        """Yield all entries, a bounded number at a time; can be called again."""

    @abstractmethod
    def values(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return the stored values `start` to `stop`, in the order of the disk."""


class CompressedRows(StoredRows):
    """Compressed sparse rows: two slices for a run of rows.

    Parameters
    ----------
    data, indices, indptr
        As scipy has them.
    shape
        Cells, genes.
    is_checked
        Whether `indptr` is known to be in order.

    Raises
    ------
    ValueError
        The three do not fit together.
    """

    def __init__(
        self, data: Array, indices: Array, indptr: Array, shape: tuple[int, int], *, is_checked: bool = False
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(data.dtype)
        self._data, self._indices, self._indptr = data, indices, indptr
        if not is_checked:
            check_indptr(indptr, len_of(data), len_of(indices), shape[0])
        self.entries_per_row = len_of(data) / max(1, shape[0])

    def read(self, start: int, stop: int) -> csr_matrix:
        """Return a run of rows, their entries in the order of the disk."""
        indptr = np.asarray(self._indptr[start : stop + 1]).astype(np.int64)
        entries = slice(int(indptr[0]), int(indptr[-1]))
        indices = np.asarray(self._indices[entries])
        check_indices(indices, self.shape[1], f"of cells {start} to {stop - 1}")
        return csr_from_parts(
            as_scipy_numbers(self._data[entries]), indices, indptr - indptr[0], (stop - start, self.shape[1])
        )


class CompressedColumns(StoredColumns):
    """Compressed sparse columns, with the same parameters and errors as `CompressedRows`."""

    description = "stored by columns (CSC)"

    def __init__(self, data: Array, indices: Array, indptr: Array, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.dtype = np.dtype(data.dtype)
        self.num_entries = len_of(data)
        check_indptr(indptr, self.num_entries, len_of(indices), shape[1])
        self._data, self._indices = data, indices
        self._indptr = np.asarray(indptr[:]).astype(np.int64)
        self.num_entries = int(self._indptr[-1])

    def entries(self) -> Iterator[Entries]:
        """Yield the entries column after column."""
        for first in range(0, self.num_entries, ENTRIES_AT_ONCE):
            stop = min(first + ENTRIES_AT_ONCE, self.num_entries)
            rows = np.asarray(self._indices[first:stop])
            check_indices(rows, self.shape[0], f"{first} to {stop - 1} (rows of a matrix stored by columns)")
            # Column of an entry: the last one that begins at or before it.
            columns = np.searchsorted(self._indptr, np.arange(first, stop), side="right") - 1
            yield Entries(rows, columns, as_scipy_numbers(self._data[first:stop]))

    def values(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return stored values."""
        return np.asarray(self._data[start:stop])


class DenseRows(StoredRows):
    """A dense array on disk, cells x genes, or genes x cells with `is_transposed`."""

    def __init__(self, array: Array, *, is_transposed: bool = False) -> None:
        self._array, self._is_transposed = array, is_transposed
        self.shape = _two_sizes(array.shape, is_transposed)
        self.dtype = np.dtype(array.dtype)
        self.entries_per_row = float(self.shape[1])
        chunks = getattr(array, "chunks", None)
        self._chunk_genes = None if chunks is None else _two_sizes(chunks, is_transposed)[1]

    def read(self, start: int, stop: int) -> csr_matrix:
        """Return a run of rows without their zeros, read in pieces that follow the file's chunks."""
        num_rows, num_genes = stop - start, self.shape[1]
        if self._chunk_genes is None and not self._is_transposed:  # whole rows lie together
            step = max(1, VALUES_AT_ONCE // max(1, num_genes))
            pieces = [self._piece(at, min(at + step, stop), 0, num_genes) for at in range(start, stop, step)]
            return pieces[0] if len(pieces) == 1 else vstack(pieces, format="csr")
        unit = self._chunk_genes or 1
        step = max(1, VALUES_AT_ONCE // num_rows // unit) * unit
        pieces = [self._piece(start, stop, at, min(at + step, num_genes)) for at in range(0, num_genes, step)]
        return pieces[0] if len(pieces) == 1 else hstack(pieces, format="csr")

    def _piece(self, start: int, stop: int, first_gene: int, last_gene: int) -> csr_matrix:
        cells, genes = slice(start, stop), slice(first_gene, last_gene)
        values = self._array[genes, cells].T if self._is_transposed else self._array[cells, genes]
        return csr_matrix(as_scipy_numbers(values))


class DenseColumns(StoredColumns):
    """A dense array whose chunks hold so many cells that rows cannot be read by themselves."""

    description = "stored in chunks that span too many cells"

    def __init__(self, array: Array, *, is_transposed: bool = False) -> None:
        self._rows = DenseRows(array, is_transposed=is_transposed)
        self._array, self._is_transposed = array, is_transposed
        self.shape, self.dtype = self._rows.shape, self._rows.dtype
        self.num_entries = self.shape[0] * self.shape[1]
        self._chunk_cells, self._chunk_genes = _two_sizes(array.chunks, is_transposed)

    def entries(self) -> Iterator[Entries]:
        """Yield the values that are not 0, chunk after chunk."""
        for first_gene in range(0, self.shape[1], self._chunk_genes):
            for start in range(0, self.shape[0], self._chunk_cells):
                yield from self._chunk(start, first_gene)

    def values(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return values of the gene in whose column the value number `start` lies."""
        gene, cell = divmod(start, self.shape[0])
        cells = slice(cell, min(cell + stop - start, self.shape[0]))
        values = self._array[gene, cells] if self._is_transposed else self._array[cells, gene]
        return np.asarray(values)

    def _chunk(self, start: int, first_gene: int) -> Iterator[Entries]:
        genes, cells = slice(first_gene, first_gene + self._chunk_genes), slice(start, start + self._chunk_cells)
        values = self._array[genes, cells].T if self._is_transposed else self._array[cells, genes]
        rows, columns = np.nonzero(values)
        for first in range(0, len(rows), ENTRIES_AT_ONCE):
            some = slice(first, first + ENTRIES_AT_ONCE)
            kept = as_scipy_numbers(values[rows[some], columns[some]])
            yield Entries(rows[some] + start, columns[some] + first_gene, kept)


class BandedRows(StoredRows):
    """Rows that are read in bands of `num_rows`, as the file's chunks are; the last band is kept."""

    def __init__(self, rows: StoredRows, num_rows: int) -> None:
        self._rows, self._num_rows = rows, num_rows
        self.shape, self.dtype, self.entries_per_row = rows.shape, rows.dtype, rows.entries_per_row
        self._kept: tuple[int, csr_matrix] | None = None

    def read(self, start: int, stop: int) -> csr_matrix:
        """Return a run of rows out of one or more bands."""
        pieces = []
        for band in range(start // self._num_rows, (stop - 1) // self._num_rows + 1):
            first = band * self._num_rows
            pieces.append(self._band(band)[max(start - first, 0) : stop - first])
        return pieces[0] if len(pieces) == 1 else vstack(pieces, format="csr")

    def close(self) -> None:
        """Forget the band."""
        self._kept = None
        self._rows.close()

    def _band(self, band: int) -> csr_matrix:
        if self._kept is None or self._kept[0] != band:
            self._kept = None  # two bands are never held at a time
            first = band * self._num_rows
            self._kept = band, self._rows.read(first, min(first + self._num_rows, self.shape[0]))
        return self._kept[1]


class ChosenGenes(StoredRows):
    """Some of the columns of other rows, in their order."""

    def __init__(self, rows: StoredRows, columns: npt.NDArray[np.integer]) -> None:
        self._rows, self._columns = rows, columns
        self.shape = (rows.shape[0], len(columns))
        self.dtype, self.entries_per_row = rows.dtype, rows.entries_per_row

    def read(self, start: int, stop: int) -> csr_matrix:
        """Return a run of rows without the other columns."""
        return self._rows.read(start, stop)[:, self._columns]

    def close(self) -> None:
        """Close what they are part of."""
        self._rows.close()


def dense_matrix(array: Array, *, is_transposed: bool = False) -> StoredRows | StoredColumns:
    """Return a dense array on disk as rows, or as columns where its chunks leave no other way.

    Raises
    ------
    ValueError
        It does not have two dimensions.
    """
    if len(array.shape) != 2:
        msg = f"a matrix of cells x genes is needed, this array has the shape {tuple(array.shape)}"
        raise ValueError(msg)
    chunks = getattr(array, "chunks", None)
    rows = DenseRows(array, is_transposed=is_transposed)
    if chunks is None:
        # Contiguous genes x cells: a run of cells is one short read a gene; make these reads longer.
        return BandedRows(rows, 4096) if is_transposed else rows
    num_rows = min(_two_sizes(chunks, is_transposed)[0], max(1, rows.shape[0]))
    if num_rows * rows.shape[1] > MAX_BAND_VALUES:
        return DenseColumns(array, is_transposed=is_transposed)
    return BandedRows(rows, num_rows) if num_rows > 1 else rows


def check_indptr(indptr: Array, num_values: int, num_indices: int, num_runs: int) -> None:
    """Refuse a compressed matrix whose parts do not fit together, reading `indptr` in pieces.

    Raises
    ------
    ValueError
        The lengths disagree, or `indptr` runs backwards or beyond the values.
    """
    length = len_of(indptr)
    if num_values != num_indices or length != num_runs + 1:
        msg = (
            f"the sparse matrix is damaged: {num_values} values, {num_indices} indices and {length} entries of indptr "
            f"for {num_runs} rows or columns. Write the file again from its source"
        )
        raise ValueError(msg)
    previous = 0
    for first in range(0, length, ENTRIES_AT_ONCE):
        piece = np.asarray(indptr[first : first + ENTRIES_AT_ONCE]).astype(np.int64)
        steps = np.diff(piece, prepend=previous)
        if (steps < 0).any() or piece[-1] > num_values:
            at = first + int(np.flatnonzero((steps < 0) | (piece > num_values))[0])
            msg = (
                f"the sparse matrix is damaged: indptr[{at}] is {piece[at - first]}, which runs backwards or beyond "
                f"the {num_values} values. Write the file again from its source"
            )
            raise ValueError(msg)
        previous = int(piece[-1])


def check_indices(indices: npt.NDArray[np.integer], limit: int, where: str) -> None:
    """Refuse indices outside 0 .. limit - 1.

    Raises
    ------
    ValueError
        There is one.
    """
    # As unsigned numbers negative ones are large: one pass finds both.
    if indices.size and indices.view(f"u{indices.itemsize}").max() >= limit:
        wrong = indices[(indices >= limit) | (indices < 0)][0]
        msg = (
            f"the sparse matrix is damaged: among the indices {where} is {wrong}, allowed are 0 to {limit - 1}. "
            "Write the file again from its source"
        )
        raise ValueError(msg)


def csr_from_parts(
    data: npt.NDArray[Any], indices: npt.NDArray[Any], indptr: npt.NDArray[np.int64], shape: tuple[int, int]
) -> csr_matrix:
    """Put checked parts together without looking through them again, as the constructor would."""
    fits = max(int(indptr[-1]), *shape) <= np.iinfo(np.int32).max
    index_type = np.int32 if fits else np.int64
    matrix = csr_matrix(shape, dtype=data.dtype)
    matrix.data, matrix.indices = data, indices.astype(index_type, copy=False)
    matrix.indptr = indptr.astype(index_type, copy=False)
    return matrix


def as_scipy_numbers(values: Any) -> npt.NDArray[Any]:  # Any: h5py's and zarr's slices
    """Return numbers in a form that scipy computes with: this machine's byte order, no float16."""
    array = np.asarray(values)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def len_of(array: Array) -> int:
    """Length of the first axis; zarr's arrays have no `len`."""
    return int(array.shape[0])


def _two_sizes(sizes: tuple[int, ...], is_transposed: bool) -> tuple[int, int]:
    """Of cells and of genes."""
    first, second = map(int, sizes)
    return (second, first) if is_transposed else (first, second)
