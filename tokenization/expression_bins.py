"""Counts to expression bins: reading matrices as compressed rows, refusing what is no count, and the binning rules."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

# Counts and sums of cells below this are held as int32, and bins found by comparing whole numbers.
LARGEST_WHOLE = 2**31 - 2

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
        Raw counts, of the type that they were given in.
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
        return CountsCSR(matrix.indptr.astype(np.int64), matrix.indices, matrix.data, matrix.shape[1])
    rows, columns = np.nonzero(matrix)
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    return CountsCSR(indptr, columns, matrix[rows, columns], matrix.shape[1])


def check_raw_counts(data: np.ndarray, *, remedy: str = "") -> None:
    """Refuse values that are not counts.

    Raises
    ------
    ValueError
        NaN, infinite, negative or fractional values; the message ends with `remedy`.
    """
    if data.dtype.kind in "bu" or data.size == 0:
        return
    is_float = data.dtype.kind == "f"
    if is_float and as_whole_numbers(data) is not None:
        return
    if is_float and not np.isfinite(data).all():
        msg = f"counts: {int((~np.isfinite(data)).sum())} values are NaN or infinite; raw counts are needed. {remedy}"
        raise ValueError(msg.strip())
    if data.min() < 0:
        msg = f"counts: negative values, the least is {data.min():g}; this looks scaled. Pass raw counts. {remedy}"
        raise ValueError(msg.strip())
    fractional = data[data != np.floor(data)] if is_float else data[:0]
    if fractional.size:
        msg = (
            f"counts: {fractional.size / data.size:.1%} of the values are not integers, such as {fractional[0]:g}; "
            f"this looks normalised or log-transformed. Pass raw counts. {remedy}"
        )
        raise ValueError(msg.strip())


def as_whole_numbers(data: np.ndarray) -> np.ndarray | None:
    """Return counts as whole numbers of at most 32 bits, the same array where it holds them already.

    None if a value is negative, fractional, not finite or above `LARGEST_WHOLE`.
    """
    if data.dtype.kind == "b":
        return data.view(np.uint8)
    if data.size == 0:
        return data.astype(np.int32)
    # NaN makes both comparisons false.
    if not (data.min() >= 0 and data.max() <= LARGEST_WHOLE):
        return None
    if data.dtype.kind == "u" and data.itemsize < 4:
        return data
    whole = data.astype(np.int32, copy=False)
    return whole if data.dtype.kind != "f" or np.array_equal(whole.astype(data.dtype), data) else None


def log2_thresholds(totals: np.ndarray, *, num_bins: int, target_sum: float) -> np.ndarray:
    """Return the least count of bin 1, 2, ... num_bins - 1 in cells of these totals, (num_cells, num_bins - 1).

    A count is in bin k or above if `log2_bins` says so: that is asked of the whole numbers around the edge, so that
    comparing counts with thresholds gives the same bins to the bit. Totals and counts are at most `LARGEST_WHOLE`,
    `target_sum` is within 2^-100 and 2^100.
    """
    totals = np.maximum(totals, 1).astype(np.float64)[:, None]
    powers = 2.0 ** np.arange(2, num_bins)
    near = np.minimum(np.floor((powers - 1) * totals / target_sum), LARGEST_WHOLE + 1)
    least = near - 1
    for offset in (-1, 0, 1):
        least += 1.0 + (near + offset) * target_sum / totals < powers
    return np.concatenate([np.ones((len(totals), 1)), least], axis=1).astype(np.int64)


def quantile_thresholds(values: np.ndarray, indptr: np.ndarray, *, num_bins: int) -> np.ndarray:
    """Return the least count of bin 1, 2, ... num_bins - 1 in each cell, (num_cells, num_bins - 1).

    The edges are those of `quantile_bins`; `values` are whole numbers, cell after cell as `indptr` says.
    """
    num_steps = num_bins - 2
    if values.size == 0:
        return np.zeros((len(indptr) - 1, num_steps + 1), np.int64)
    ordered = values.astype(np.uint16 if values.max() < 2**16 else values.dtype)
    sort_rows(ordered, indptr)
    lengths = np.diff(indptr)[:, None]
    last = np.maximum(lengths - 1, 0)
    starts = np.minimum(indptr[:-1, None], len(values) - 1)  # of cells without counts: any
    below, remainder = np.divmod(last * np.arange(num_steps + 1), num_steps)
    low = ordered[starts + below].astype(np.int64)
    high = ordered[starts + np.minimum(below + 1, last)].astype(np.int64)
    return -(-(low * num_steps + (high - low) * remainder) // num_steps)


def sort_rows(values: np.ndarray, indptr: np.ndarray) -> None:
    """Sort each row in place; NumPy sorts 16-bit numbers fastest, by their two bytes, when asked for a stable order."""
    kind: Literal["stable"] | None = "stable" if values.itemsize <= 2 else None
    for start, stop in pairwise(indptr.tolist()):
        values[start:stop].sort(kind=kind)


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
