"""Cells of a file, looked through once and then given to a model block by block, in the file's order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from screformer.tokenization.count_matrix import CountMatrix
from screformer.tokenization.expression_bins import as_counts_csr, check_raw_counts
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer, TokenizedCells
from screformer.train.inference import BatchInference

logger = logging.getLogger(__name__)
CELLS_PER_BLOCK = 1024


class CellSource:
    """Cells that a tokenizer can read.

    All counts are looked at before the first cell is given to a model, so that a bad value in the last cell is found
    in minutes and not at the end of a long run, and what is refused does not depend on the order of cells.

    Parameters
    ----------
    matrix
        Opened; stays so.
    tokenizer
        One that keeps empty cells.
    progress
        Whether to show progress bars.

    Attributes
    ----------
    num_cells
        Cells of the file.
    gene_coverage
        Share of the counts that fall on genes of the vocabulary.
    longest_cell
        The most genes with counts in a cell, whether in the vocabulary or not.

    Raises
    ------
    ValueError
        Values are not raw counts, gene names are not known, or too few counts fall on known genes.
    """

    def __init__(self, matrix: CountMatrix, tokenizer: ScReformerTokenizer, *, progress: bool = True) -> None:
        assert tokenizer.on_empty_cells == "keep"
        self.num_cells = matrix.num_cells
        self._matrix = matrix
        self._tokenizer = tokenizer
        self._progress = progress
        self._mapping = matrix.map_genes(tokenizer.gene_vocabulary)
        tokenizer.check_gene_names(matrix.gene_names, self._mapping)
        self.longest_cell = 1
        known, total = self._sum_counts()
        tokenizer.check_gene_coverage(known, total, self._mapping)
        self.gene_coverage = known / total if total else 0.0

    def outputs(self, inference: BatchInference, *, task: str) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
        """Yield (rows of the file, outputs of these cells); NaN for a cell without counts on known genes.

        Parameters
        ----------
        inference
            What to do with the cells.
        task
            Name on the progress bar.

        Raises
        ------
        ValueError
            The model gives NaN or infinity for a cell; or the batch size is ``"auto"`` and not even one cell fits.
        """
        first, batch_size = 0, inference.choose_batch_size(self.longest_cell)
        with tqdm(total=self.num_cells, desc=task, unit="cell", disable=not self._progress) as bar:
            for block in self._matrix.blocks(max(CELLS_PER_BLOCK, batch_size)):
                tokens = self._tokenizer.tokenize_counts(block, self._mapping, first_row=first)
                has_genes = np.diff(tokens.indptr) > 0
                outputs = np.full((len(has_genes), inference.width), np.nan, dtype=np.float32)
                outputs[has_genes] = inference(_corpus_rows(tokens, has_genes), advance=bar.update)
                _refuse_not_finite(outputs, has_genes, first)
                bar.update(int((~has_genes).sum()))
                yield slice(first, first + len(outputs)), outputs
                first += len(outputs)

    def describe(self) -> dict[str, Any]:  # Any: JSON
        """Return what was read from where, for the record."""
        genes = self._mapping.report.to_dict()
        # As text: gene symbols are not safe as keys of an HDF5 file.
        genes["summed"] = [f"{symbol}: {', '.join(names)}" for symbol, names in genes["summed"].items()]
        return {
            "file": self._matrix.path.name,
            "num_cells": self.num_cells,
            "count_source": self._matrix.count_source,
            "gene_source": self._matrix.gene_source,
            "gene_coverage": self.gene_coverage,
            "gene_mapping": genes,
            "notes": list(self._matrix.notes),
        }

    def _sum_counts(self) -> tuple[float, float]:
        """Check every value, note the longest cell; return the counts on known genes and all counts."""
        known = total = 0.0
        with tqdm(total=self.num_cells, desc="check", unit="cell", disable=not self._progress) as bar:
            for block in self._matrix.blocks(CELLS_PER_BLOCK):
                counts = as_counts_csr(block)
                check_raw_counts(counts.data, remedy=f"Found in {self._matrix.count_source}; name another layer.")
                block_known, block_total = self._tokenizer.count_sums(counts, self._mapping)
                known, total = known + block_known, total + block_total
                self.longest_cell = max(self.longest_cell, int(np.diff(counts.indptr).max(initial=0)))
                bar.update(counts.num_cells)
        return known, total


def warn_of_empty_cells(num_empty: int, num_cells: int, *, consequence: str) -> None:
    """Log, once a file, that cells without counts on known genes get no result."""
    if num_empty:
        logger.warning("%d of %d cells have no counts on known genes: %s", num_empty, num_cells, consequence)


def _corpus_rows(tokens: TokenizedCells, chosen: npt.NDArray[np.bool_]) -> list[dict[str, npt.NDArray[Any]]]:
    """Return the chosen cells as corpus rows, which share memory with `tokens`."""
    rows = []
    for cell in np.flatnonzero(chosen):
        entries = slice(tokens.indptr[cell], tokens.indptr[cell + 1])
        rows.append({"input_ids": tokens.input_ids[entries], "gene_ids": tokens.gene_ids[entries]})
    return rows


def _refuse_not_finite(outputs: npt.NDArray[np.float32], has_genes: npt.NDArray[np.bool_], first: int) -> None:
    is_broken = has_genes & ~np.isfinite(outputs).all(axis=1)
    if is_broken.any():
        raise ValueError(
            f"model: its output for {is_broken.sum()} cells is NaN or infinite, the first is row "
            f"{first + int(np.flatnonzero(is_broken)[0])}. Its weights are damaged or its training diverged; use "
            "another checkpoint"
        )
