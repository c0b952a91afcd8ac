"""Cells of a corpus as a sparse matrix of their bins: for regressions and decompositions."""

from __future__ import annotations

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
    bins = np.concatenate([batch.input_ids for batch in batches]) / (num_bins - 1)
    gene_ids = np.concatenate([batch.gene_ids for batch in batches]).astype(np.int32)
    return sparse.csr_array((bins, gene_ids, indptr), shape=(len(rows), num_genes))
