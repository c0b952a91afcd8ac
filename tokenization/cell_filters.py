"""Which cells are left out of a corpus: empty, poor or dying ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from screformer.tokenization.expression_bins import CountsCSR
from screformer.tokenization.tokenization_screformer import TokenizedCells

BoolArray = npt.NDArray[np.bool_]

EMPTY = "empty"
FEW_COUNTS = "below_min_counts"
FEW_GENES = "below_min_genes"
MITOCHONDRIAL = "above_max_mitochondrial_share"
DUPLICATE = "duplicate"
# A dropped cell is counted under the first that applies.
REASONS = (EMPTY, FEW_COUNTS, FEW_GENES, MITOCHONDRIAL, DUPLICATE)


@dataclass(frozen=True)
class CellFilters:
    """What a cell must have to be kept; the defaults keep every cell that has any count on a known gene.

    Attributes
    ----------
    min_genes
        Genes of the vocabulary with counts, as in scBERT's preprocessing (which asks for 200). 0 asks for nothing, so
        that small panels work.
    min_counts
        Sum of all counts of the cell, genes outside the vocabulary included.
    max_mitochondrial_share
        The most, 0 to 1, of the cell's counts that may fall on mitochondrial genes, in the vocabulary or not; 1 allows
        all.
    drop_duplicates
        Whether of cells with the same counts on all genes of the vocabulary, in one file or in several, only the first
        stays.

    Raises
    ------
    ValueError
        A number is out of its range.
    """

    min_genes: int = 0
    min_counts: int = 0
    max_mitochondrial_share: float = 1.0
    drop_duplicates: bool = True

    def __post_init__(self) -> None:
        for name in ("min_genes", "min_counts"):
            if getattr(self, name) < 0:
                msg = f"{name}: 0 (no minimum) or more, got {getattr(self, name)}"
                raise ValueError(msg)
        if not 0 <= self.max_mitochondrial_share <= 1:
            msg = f"max_mitochondrial_share: a share from 0 to 1, such as 0.2, got {self.max_mitochondrial_share}"
            raise ValueError(msg)

    def judge(
        self, counts: CountsCSR, tokens: TokenizedCells, is_mitochondrial: BoolArray, *, keep_empty: bool
    ) -> dict[str, BoolArray]:
        """Return, for every reason to drop a cell, whether it drops each one (num_cells,).

        Parameters
        ----------
        counts, tokens
            Of the same cells.
        is_mitochondrial
            Of each column of the counts.
        keep_empty
            Whether cells without counts on known genes stay.
        """
        totals = tokens.total_counts
        drops = {
            EMPTY: np.zeros(len(totals), dtype=bool) if keep_empty else tokens.known_counts == 0,
            FEW_COUNTS: totals < self.min_counts,
            FEW_GENES: np.diff(tokens.indptr) < self.min_genes,
        }
        if self.max_mitochondrial_share < 1:
            mitochondrial = _sum_cells(counts, is_mitochondrial)
            drops[MITOCHONDRIAL] = mitochondrial > self.max_mitochondrial_share * totals
        is_left = np.ones(len(totals), dtype=bool)
        for reason, is_dropped in drops.items():
            drops[reason] = is_dropped & is_left
            is_left &= ~is_dropped
        return drops


def keep_tokens(tokens: TokenizedCells, is_kept: BoolArray) -> TokenizedCells:
    """Return the cells for which `is_kept` holds."""
    if is_kept.all():
        return tokens
    lengths = np.diff(tokens.indptr)
    is_token_kept = np.repeat(is_kept, lengths)
    return TokenizedCells(
        indptr=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[is_kept])]),
        gene_ids=tokens.gene_ids[is_token_kept],
        input_ids=tokens.input_ids[is_token_kept],
        total_counts=tokens.total_counts[is_kept],
        known_counts=tokens.known_counts[is_kept],
    )


def _sum_cells(counts: CountsCSR, is_chosen: BoolArray) -> npt.NDArray[np.float64]:
    """Sum of each cell's counts over the chosen columns."""
    entries = np.flatnonzero(is_chosen[counts.indices])
    rows = np.searchsorted(counts.indptr, entries, side="right") - 1
    return np.bincount(rows, weights=counts.data[entries], minlength=counts.num_cells).astype(np.float64, copy=False)
