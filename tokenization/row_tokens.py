"""Compressed rows of counts become compressed rows of tokens, without laying cells out densely.

About a hundred cells at a time, small enough for the processor's cache. Bins come from comparing whole numbers with
thresholds a cell; if these are many, by a table of the counts below 256. Where the positions of a cell do not ascend,
they are sorted by their 16 bits and the bins looked up by position. What does not fit that (sums above 2^31, entries of
a matrix that repeat, an odd `target_sum`) takes a plain way in float64, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from .expression_bins import (
    LARGEST_WHOLE,
    Binning,
    CountsCSR,
    as_whole_numbers,
    log2_bins,
    log2_thresholds,
    quantile_bins,
    quantile_thresholds,
    sort_rows,
)

ENTRIES_AT_ONCE = 1 << 17
CELLS_AT_ONCE = 1 << 8
# By measurement: with so few thresholds a cell, comparing all counts with each is faster than looking bins up.
FEW_THRESHOLDS = 8
TABLE_SIZE = 256  # counts below it are binned by a table a cell
# Above all positions: of columns that share their position with another, and of what is dropped.
SHARED = np.uint32(1 << 16)
DROPPED = np.uint32(2**32 - 1)


class BinRule(NamedTuple):
    """How counts become bins; see `ScReformerTokenizer`."""

    binning: Binning
    num_bins: int
    target_sum: float


class RowTokens(NamedTuple):
    """Tokens of some cells.

    Attributes
    ----------
    lengths
        int64 (num_cells,): expressed genes.
    gene_ids, input_ids
        uint16 and uint8, cell after cell; `gene_ids` ascend within a cell.
    total_counts, known_counts
        float64 (num_cells,): sum of all counts, and of those on genes of the vocabulary.
    """

    lengths: np.ndarray
    gene_ids: np.ndarray
    input_ids: np.ndarray
    total_counts: np.ndarray
    known_counts: np.ndarray


def tokenize_rows(
    counts: CountsCSR, positions: np.ndarray, rule: BinRule, *, check: Callable[[], object] = bool
) -> RowTokens:
    """Return the tokens of cells.

    Parameters
    ----------
    counts
        Raw counts.
    positions
        Of the columns in the vocabulary, negative where unknown.
    rule
        How counts become bins.
    check
        Called, perhaps several times, where values were met that are no whole numbers, or large ones; it may raise.
    """
    column_keys = _key_columns(positions)
    # One place more than there are positions: for the bins of what is dropped.
    width = int(positions.max(initial=-1)) + 2
    bins_of_genes = np.zeros((min(CELLS_AT_ONCE, counts.num_cells), width), np.uint8)
    parts = []
    for chunk in _chunks(counts):
        part = _tokenize_whole(chunk, column_keys, rule, bins_of_genes)
        if part is None:
            check()
            part = _tokenize_any(chunk, positions, rule)
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    nothing = RowTokens(*(np.zeros(0, kind) for kind in (np.int64, np.uint16, np.uint8, np.float64, np.float64)))
    return RowTokens(*map(np.concatenate, zip(nothing, *parts, strict=True)))


def _chunks(counts: CountsCSR) -> Iterator[CountsCSR]:
    first = 0
    while first < counts.num_cells:
        most = counts.indptr[first] + ENTRIES_AT_ONCE
        stop = int(np.searchsorted(counts.indptr, most, side="right")) - 1
        stop = min(max(stop, first + 1), first + CELLS_AT_ONCE, counts.num_cells)
        indptr = counts.indptr[first : stop + 1]
        entries = slice(indptr[0], indptr[-1])
        yield CountsCSR(indptr - indptr[0], counts.indices[entries], counts.data[entries], counts.num_genes)
        first = stop


def _key_columns(positions: np.ndarray) -> np.ndarray:
    is_known = positions >= 0
    keys = np.where(is_known, positions, 0).astype(np.uint32)
    keys[np.bincount(positions[is_known], minlength=1)[keys] > 1] |= SHARED
    keys[~is_known] = DROPPED
    return keys


def _tokenize_whole(
    counts: CountsCSR, column_keys: np.ndarray, rule: BinRule, bins_of_genes: np.ndarray
) -> RowTokens | None:
    """Return the tokens, or None where counts are too large, or entries of the matrix repeat.

    `bins_of_genes` is written over: a place for bins by cell and position.
    """
    values = as_whole_numbers(counts.data)
    if values is None or not 2.0**-100 <= rule.target_sum <= 2.0**100:
        return None
    values = values.astype(np.int32, copy=False)
    totals = _sum_rows(values, counts.indptr)
    if totals.max(initial=0) > LARGEST_WHOLE:
        return None
    keys = column_keys.take(counts.indices)
    if values.min(initial=1) == 0:
        keys[values == 0] = DROPPED
    indptr, known, num_dropped = counts.indptr, totals, np.zeros(len(totals), np.int64)
    special = np.flatnonzero(keys >= SHARED)
    if special.size:
        rows = np.searchsorted(indptr, special, side="right") - 1
        is_dropped = keys[special] == DROPPED
        known = totals - _sum_by(rows[is_dropped], values[special[is_dropped]], len(totals))
        values = _sum_shared(keys, values, special[~is_dropped], rows[~is_dropped])
        is_dropped = keys[special] == DROPPED
        num_dropped = np.bincount(rows[is_dropped], minlength=len(totals))
        if rule.binning == "quantile" and is_dropped.any():
            # Here a cell's thresholds depend on which counts are kept.
            is_kept = keys != DROPPED
            keys, values = keys[is_kept], values[is_kept]
            indptr, num_dropped = _ends(np.diff(indptr) - num_dropped), np.zeros_like(num_dropped)
        else:
            keys[special[is_dropped]] = bins_of_genes.shape[1] - 1  # sorts last
    bins = _bin_counts(values, indptr, totals, rule)
    gene_ids = keys.astype(np.uint16)
    if num_dropped.any() or not _ascend(gene_ids, indptr):
        gene_ids, bins, indptr = _sort_genes(gene_ids, bins, indptr, num_dropped, bins_of_genes)
        if not _ascend(gene_ids, indptr):
            return None
    sums = (sum_.astype(np.float64) for sum_ in (totals, known))
    return RowTokens(np.diff(indptr), gene_ids, bins, *sums)


def _ends(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _sum_rows(values: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Return the sum of each row; `reduceat` would give a row without entries the value that follows it."""
    sums = np.zeros(len(indptr) - 1, np.int64)
    lengths = np.diff(indptr)
    if values.size:
        is_small = int(values.max()) * int(lengths.max()) <= LARGEST_WHOLE
        kind = np.int32 if is_small else np.int64  # without a change of type it is five times as fast
        sums[lengths > 0] = np.add.reduceat(values, indptr[:-1][lengths > 0], dtype=kind)
    return sums


def _sum_by(groups: np.ndarray, values: np.ndarray, num_groups: int) -> np.ndarray:
    """Return the sum of the values of each group; the float64 that NumPy sums in is exact here."""
    return np.bincount(groups, weights=values, minlength=num_groups).astype(np.int64)


def _sum_shared(keys: np.ndarray, values: np.ndarray, shared: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Give the first of a cell's entries at one position the sum of all, drop the others, and return the values.

    `shared` are the entries whose column shares its position with another, `rows` their cells. `keys` is changed.
    """
    keys[shared] &= ~SHARED
    places = (rows.astype(np.int64) << 32) | keys[shared]
    different, first, group = np.unique(places, return_index=True, return_inverse=True)
    if len(different) == len(places):
        return values
    summed = values.copy()
    summed[shared[first]] = _sum_by(group, values[shared], len(different))
    is_later = np.ones(len(shared), bool)
    is_later[first] = False
    keys[shared[is_later]] = DROPPED
    return summed


def _bin_counts(values: np.ndarray, indptr: np.ndarray, totals: np.ndarray, rule: BinRule) -> np.ndarray:
    """Return the bin of each count, uint8: how many of its cell's thresholds it reaches."""
    if rule.binning == "log2":
        thresholds = log2_thresholds(totals, num_bins=rule.num_bins, target_sum=rule.target_sum)
    else:
        thresholds = quantile_thresholds(values, indptr, num_bins=rule.num_bins)
    if thresholds.shape[1] <= FEW_THRESHOLDS:
        return _compare(values, np.diff(indptr), thresholds)
    return _look_up(values, np.diff(indptr), thresholds)


def _compare(values: np.ndarray, lengths: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    bins = np.ones(len(values), np.uint8)  # every count reaches the first
    for edges in np.minimum(thresholds[:, 1:], LARGEST_WHOLE + 1).astype(np.int32).T:
        bins += values >= np.repeat(edges, lengths)
    return bins


def _look_up(values: np.ndarray, lengths: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    num_cells, num_edges = thresholds.shape
    cells = np.arange(num_cells, dtype=np.int32)[:, None]
    # One threshold at TABLE_SIZE counts for nothing below it.
    width = TABLE_SIZE + 1
    steps = np.bincount((cells * width + np.minimum(thresholds, TABLE_SIZE)).ravel(), minlength=num_cells * width)
    table = steps.reshape(num_cells, width)[:, :TABLE_SIZE].cumsum(axis=1, dtype=np.uint8)
    places = np.repeat(cells.ravel() * np.int32(TABLE_SIZE), lengths)
    places += np.minimum(values, TABLE_SIZE - 1)
    bins = table.ravel().take(places)
    if thresholds.max(initial=0) < TABLE_SIZE:  # counts above are in the bin of the last in the table
        return bins
    large = np.flatnonzero(values >= TABLE_SIZE)
    rows = places[large].astype(np.int64) // TABLE_SIZE
    edges = ((cells.astype(np.int64) << 32) + thresholds).ravel()
    bins[large] = np.searchsorted(edges, (rows << 32) + values[large], side="right") - rows * num_edges
    return bins


def _sort_genes(
    gene_ids: np.ndarray, bins: np.ndarray, indptr: np.ndarray, num_dropped: np.ndarray, bins_of_genes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort the positions of each cell, cut off the last `num_dropped`, and return them, their bins and indptr.

    `gene_ids` and `bins_of_genes` are written over.
    """
    width, flat = bins_of_genes.shape[1], bins_of_genes.ravel()
    row_starts, lengths = np.arange(len(indptr) - 1) * width, np.diff(indptr)
    places = gene_ids.astype(np.int64)
    places += np.repeat(row_starts, lengths)
    flat[places] = bins
    sort_rows(gene_ids, indptr)
    if num_dropped.any():
        lengths = lengths - num_dropped
        kept = zip(indptr.tolist(), (indptr[:-1] + lengths).tolist(), strict=False)
        gene_ids = np.concatenate([gene_ids[start:stop] for start, stop in kept])
    places = gene_ids.astype(np.int64)
    places += np.repeat(row_starts, lengths)
    return gene_ids, flat.take(places), _ends(lengths)


def _ascend(gene_ids: np.ndarray, indptr: np.ndarray) -> bool:
    ascends = gene_ids[1:] > gene_ids[:-1]
    between = indptr[1:-1]
    ascends[between[(between > 0) & (between < len(gene_ids))] - 1] = True
    return bool(ascends.all())


def _tokenize_any(counts: CountsCSR, positions: np.ndarray, rule: BinRule) -> RowTokens:
    """Return the tokens of any counts, by sorting and summing in float64."""
    data, at = counts.data.astype(np.float64), positions[counts.indices]
    num_cells = counts.num_cells
    row_of = np.repeat(np.arange(num_cells), np.diff(counts.indptr))
    totals = np.bincount(row_of, weights=data, minlength=num_cells)
    is_known = at >= 0
    known = np.bincount(row_of[is_known], weights=data[is_known], minlength=num_cells)
    places, group = np.unique((row_of[is_known] << 32) + at[is_known], return_inverse=True)
    values = np.bincount(group, weights=data[is_known], minlength=len(places))
    places, values = places[values > 0], values[values > 0]
    rows = places >> 32
    if rule.binning == "log2":
        bins = log2_bins(values, totals[rows], num_bins=rule.num_bins, target_sum=rule.target_sum)
    else:
        bins = quantile_bins(values, rows, num_bins=rule.num_bins)
    gene_ids = (places & (2**32 - 1)).astype(np.uint16)
    sums = (sum_.astype(np.float64) for sum_ in (totals, known))  # NumPy counts nothing in int64
    return RowTokens(np.bincount(rows, minlength=num_cells), gene_ids, bins, *sums)
