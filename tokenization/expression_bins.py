"""Counts to expression bins: reading matrices as compressed rows, refusing what is no count, and the binning rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

# Cells are laid out densely a few at a time: 4 million cells x genes, 32 MB of float64.
DENSE_BLOCK_SIZE = 1 << 22

Binning = Literal["log2", "quantile"]


class CountsCSR(NamedTuple):
    """Counts of cells, compressed by rows.

    Attributes
    ----------
    indptr
        int64 (num_cells + 1,): where each cell begins in `indices` and `data`.
    indices
        Column, that is input gene, of each entry; any order, repeats allowed.
    data
        float64: raw counts.
    num_genes
        Columns of the matrix.
    """

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    num_genes: int

    @property
    def num_cells(self) -> int:
        """Rows of the matrix."""
        return len(self.indptr) - 1


def as_counts_csr(counts: Any) -> CountsCSR:
    """Read a sparse or dense matrix, cells x genes, without changing it.

    Raises
    ------
    TypeError
        It does not hold numbers.
    ValueError
        It does not have two dimensions.
    """
    if hasattr(counts, "to_memory"):  # anndata's matrices on disk
        counts = counts.to_memory()
    is_sparse = hasattr(counts, "tocsr")
    matrix: Any = counts.tocsr() if is_sparse else np.asarray(counts)  # a sparse matrix, known by its attributes
    if matrix.dtype.kind not in "biuf":
        msg = f"cells: raw counts are needed (AnnData, sparse or dense matrix), got {type(counts).__name__}"
        raise TypeError(msg)
    if len(matrix.shape) != 2:
        msg = (
            f"cells: a matrix of cells x genes is needed, got shape {tuple(matrix.shape)}; one cell is counts[None, :]"
        )
        raise ValueError(msg)
    if is_sparse:
        return CountsCSR(
            matrix.indptr.astype(np.int64), matrix.indices, matrix.data.astype(np.float64), matrix.shape[1]
        )
    rows, columns = np.nonzero(matrix)
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    return CountsCSR(indptr, columns, matrix[rows, columns].astype(np.float64), matrix.shape[1])


def check_raw_counts(data: np.ndarray, *, remedy: str = "") -> None:
    """Refuse values that are not counts.

    Raises
    ------
    ValueError
        NaN, infinite, negative or fractional values; the message ends with `remedy`.
    """
    if data.dtype.kind in "bu" or data.size == 0:
        return
    if not np.isfinite(data).all():
        msg = f"counts: {int((~np.isfinite(data)).sum())} values are NaN or infinite; raw counts are needed. {remedy}"
        raise ValueError(msg.strip())
    if data.min() < 0:
        msg = f"counts: negative values, the least is {data.min():g}; this looks scaled. Pass raw counts. {remedy}"
        raise ValueError(msg.strip())
    fractional = data[data != np.floor(data)] if data.dtype.kind == "f" else data[:0]
    if fractional.size:
        msg = (
            f"counts: {fractional.size / data.size:.1%} of the values are not integers, such as {fractional[0]:g}; "
            f"this looks normalised or log-transformed. Pass raw counts. {remedy}"
        )
        raise ValueError(msg.strip())


def log2_bins(values: np.ndarray, totals: np.ndarray, *, num_bins: int, target_sum: float) -> np.ndarray:
    """Return floor(log2(1 + normalised count)) held between 1 and num_bins - 1, as uint8.

    `frexp` takes the exponent from the number itself: unlike a computed logarithm it is exact at the edges 2^k - 1, on
    every machine.
    """
    normalised = values * target_sum / totals
    return np.clip(np.frexp(1.0 + normalised)[1] - 1, 1, num_bins - 1).astype(np.uint8)


def quantile_bins(values: np.ndarray, rows: np.ndarray, *, num_bins: int) -> np.ndarray:
    """Bin of each count among the counts of its own row: 1 + how many of the inner quantiles it reaches, as uint8.

    The edges are the quantiles k / (num_bins - 2), k = 0 .. num_bins - 2, interpolated linearly; a value's bin is the
    number of edges not above it. Everything is multiplied by num_bins - 2, which keeps it in whole numbers: equal
    counts always share a bin.
    """
    if values.size == 0:
        return np.zeros(0, np.uint8)
    num_steps = num_bins - 2
    _, row, lengths = np.unique(rows, return_inverse=True, return_counts=True)
    starts = np.cumsum(lengths) - lengths
    ordered = values[np.lexsort((values, row))]
    bins = np.zeros(len(values), np.uint8)
    for step in range(num_steps + 1):
        below, remainder = np.divmod((lengths - 1) * step, num_steps)
        low = ordered[starts + below]
        high = ordered[starts + np.minimum(below + 1, lengths - 1)]
        edges = low * num_steps + (high - low) * remainder
        bins += values * num_steps >= edges[row]
    return bins


def dense_blocks(counts: CountsCSR, positions: np.ndarray, num_genes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield counts by cell * num_genes + position, duplicates summed, and each cell's total over all its counts."""
    num_rows = max(1, DENSE_BLOCK_SIZE // num_genes)
    for first in range(0, counts.num_cells, num_rows):
        indptr = counts.indptr[first : first + num_rows + 1]
        entries = slice(indptr[0], indptr[-1])
        data, at = counts.data[entries], positions[counts.indices[entries]]
        rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        totals = np.bincount(rows, weights=data, minlength=len(indptr) - 1)
        is_known = at >= 0
        keys = rows[is_known] * num_genes + at[is_known]
        yield np.bincount(keys, weights=data[is_known], minlength=len(totals) * num_genes), totals
