"""How others turn counts into model input, one cell at a time: written anew from their descriptions.

*Ranks*, as in Geneformer's tokenizer (Theodoris et al. 2023): each cell's counts on known genes are divided by the
cell's total and by each gene's median over cells; the genes are listed from the highest value down, at most 2,048 of
them; the lists become a `datasets.Dataset`, which is mapped once a cell to add the length, and saved.

*Dense*, as in scBERT's data set (Yang et al. 2022): each cell is a dense vector over all genes of the vocabulary,
scaled to 10,000 counts, log2(1 + x), held at the highest bin, and made a tensor of whole numbers. Nothing is written:
it happens again in every epoch. *Aligned* is the step before it in scBERT's preprocessing, which brings the genes into
the vocabulary's order: one gene after another is copied into a matrix of lists (scipy's `lil_matrix`).

All are kinder than the originals: known genes are found once a file, and blocks of cells are read as ours are.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.sparse import csr_matrix, lil_matrix

MOST_RANKED = 2048
TARGET_SUM = 10_000
Row = dict[str, Any]  # Any: lists and numbers


def rank_cells(block: csr_matrix, positions: np.ndarray, medians: np.ndarray) -> Iterator[list[int]]:
    """Yield the positions of the genes of each cell, highest scaled count first.

    Parameters
    ----------
    block
        Raw counts, cells x genes of the file.
    positions
        Of the file's genes in the vocabulary, -1 where unknown.
    medians
        Of each gene of the vocabulary: its median over cells, never 0.
    """
    for number in range(block.shape[0]):
        row = block[number]
        at = positions[row.indices]
        is_known = at >= 0
        genes = at[is_known]
        scaled = row.data[is_known] / row.data.sum() * TARGET_SUM / medians[genes]
        yield genes[np.argsort(-scaled, kind="stable")][:MOST_RANKED].tolist()


def save_ranks(cells: list[list[int]], folder: Path) -> None:
    """Save ranked cells as a data set with their lengths."""
    ranked = datasets.Dataset.from_dict({"input_ids": cells})
    ranked = ranked.map(_add_length, keep_in_memory=True)
    ranked.save_to_disk(folder)
    shutil.rmtree(folder)


def _add_length(row: Row) -> Row:
    row["length"] = len(row["input_ids"])
    return row


def dense_cells(
    block: csr_matrix, positions: np.ndarray, num_genes: int, *, highest_bin: int
) -> Iterator[torch.Tensor]:
    """Yield each cell as a tensor of bins, one a gene of the vocabulary."""
    for number in range(block.shape[0]):
        row = block[number]
        at = positions[row.indices]
        is_known = at >= 0
        values = np.zeros(num_genes, np.float32)
        np.add.at(values, at[is_known], row.data[is_known])
        values = np.log2(1 + values * TARGET_SUM / row.data.sum())
        values[values > highest_bin] = highest_bin
        yield torch.from_numpy(values).long()


def align_genes(block: csr_matrix, positions: np.ndarray, num_genes: int) -> csr_matrix:
    """Return the counts with the vocabulary's genes as columns, copied gene by gene; of repeats the last stays."""
    aligned = lil_matrix((block.shape[0], num_genes), dtype=block.dtype)
    for column in np.flatnonzero(positions >= 0):
        aligned[:, positions[column]] = block[:, column]
    return aligned.tocsr()
