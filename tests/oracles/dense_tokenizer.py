"""Cells laid out densely in float64, with computed logarithms: the tokenizer's rule before it was made fast."""

from __future__ import annotations

import numpy as np

CELLS_AT_ONCE = 64


def tokenize(indptr, indices, data, positions, *, num_genes, num_bins, binning, target_sum=10_000):
    """Return indptr, gene_ids, input_ids, and of each cell the sum of all counts and of those on known genes."""
    data = np.asarray(data).astype(np.float64)
    lengths, gene_ids, input_ids, totals, known = [np.zeros(1, np.int64)], [], [], [], []
    for first in range(0, len(indptr) - 1, CELLS_AT_ONCE):
        ends = np.asarray(indptr[first : first + CELLS_AT_ONCE + 1], np.int64)
        values, at = data[ends[0] : ends[-1]], positions[indices[ends[0] : ends[-1]]]
        row_of = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        sums = np.bincount(row_of, weights=values, minlength=len(ends) - 1)
        is_known = at >= 0
        keys = row_of[is_known] * num_genes + at[is_known]
        block = np.bincount(keys, weights=values[is_known], minlength=len(sums) * num_genes)
        expressed = np.flatnonzero(block > 0)
        rows, genes = np.divmod(expressed, num_genes)
        lengths.append(np.bincount(rows, minlength=len(sums)))
        gene_ids.append(genes)
        if binning == "log2":
            input_ids.append(_log2_bins(block[expressed], sums[rows], num_bins, target_sum))
        else:
            input_ids.append(_quantile_bins(block[expressed], rows, num_bins))
        totals.append(sums)
        known.append(np.bincount(row_of[is_known], weights=values[is_known], minlength=len(sums)))
    nothing = [np.zeros(0)]
    return (
        np.cumsum(np.concatenate(lengths)),
        *(np.concatenate([*nothing, *parts]) for parts in (gene_ids, input_ids, totals, known)),
    )


def _log2_bins(values, totals, num_bins, target_sum):
    normalised = values * target_sum / totals
    return np.clip(np.frexp(1.0 + normalised)[1] - 1, 1, num_bins - 1)


def _quantile_bins(values, rows, num_bins):
    if values.size == 0:
        return np.zeros(0)
    num_steps = num_bins - 2
    _, row, lengths = np.unique(rows, return_inverse=True, return_counts=True)
    starts = np.cumsum(lengths) - lengths
    ordered = values[np.lexsort((values, row))]
    bins = np.zeros(len(values), np.int64)
    for step in range(num_steps + 1):
        below, remainder = np.divmod((lengths - 1) * step, num_steps)
        low = ordered[starts + below]
        high = ordered[starts + np.minimum(below + 1, lengths - 1)]
        edges = low * num_steps + (high - low) * remainder
        bins += values * num_steps >= edges[row]
    return bins
