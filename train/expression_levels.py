"""Cells of a corpus as a sparse matrix of their bins: for regressions and decompositions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from screformer.tokenization.corpus import Corpus
from screformer.train.cell_dataset import CellDataset

CELLS_AT_ONCE = 4096


def read_levels(corpus: Corpus, rows: npt.NDArray[np.int64], num_genes: int, num_bins: int) -> sparse.csr_array:
    """Return the bins of cells as shares of the highest, float64 (cells, genes): what a linear path reads."""
    dataset = CellDataset(corpus, rows)
    batches = [
        dataset.__getitems__(list(range(first, min(first + CELLS_AT_ONCE, len(rows)))))
        for first in range(0, len(rows), CELLS_AT_ONCE)
    ]
    counts = np.concatenate([batch.counts for batch in batches])
    indptr = np.concatenate([[0], np.cumsum(counts)])
    input_ids = np.concatenate([batch.input_ids for batch in batches])
    gene_ids = np.concatenate([batch.gene_ids for batch in batches])
    return as_levels(indptr, gene_ids, input_ids, num_genes, num_bins)


def as_levels(
    indptr: npt.NDArray[np.int64],
    gene_ids: npt.NDArray[np.integer[Any]],
    input_ids: npt.NDArray[np.integer[Any]],
    num_genes: int,
    num_bins: int,
) -> sparse.csr_array:
    """Return cells that lie end to end, as in `TokenizedCells`, as `read_levels` does."""
    levels = input_ids / (num_bins - 1)
    return sparse.csr_array((levels, gene_ids.astype(np.int32), indptr), shape=(len(indptr) - 1, num_genes))
