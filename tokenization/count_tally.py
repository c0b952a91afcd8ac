"""What one reading of a matrix of counts tells: sums, distributions and wrong values, in memory of constant size."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# No count is larger: a value above is a mistake of units, or of memory.
LARGEST_COUNT = 2**31 - 1


class Distribution(NamedTuple):
    """Quantiles over cells; all 0 where there is no cell."""

    least: float
    q05: float
    q25: float
    median: float
    q75: float
    q95: float
    most: float


class FoundValue(NamedTuple):
    """A value that is no count, and the row (cell, from 0) where it was met first."""

    value: float
    row: int


class CountTally:
    """Sums over the cells that were added.

    Parameters
    ----------
    is_known
        bool (num_genes,): whether the gene is in the vocabulary.
    min_genes
        Genes with counts that a cell should have.

    Attributes
    ----------
    num_cells, num_values
        Cells, and entries other than 0, looked at.
    gene_counts
        float64 (num_genes,): sum of the counts of each gene.
    num_without_counts, num_empty_cells, num_below_minimum
        Cells without any counts; without counts on known genes; with fewer than `min_genes` genes with counts.
    largest
        Largest count.
    num_not_finite, num_negative, num_too_large, num_fractional
        Values that are no counts. All but the fractional ones count as 0 in the sums.
    """

    def __init__(self, is_known: npt.NDArray[np.bool_], *, min_genes: int) -> None:
        num_genes = len(is_known)
        self.min_genes = min_genes
        self.num_cells = self.num_values = 0
        self.gene_counts = np.zeros(num_genes)
        self.num_without_counts = self.num_empty_cells = self.num_below_minimum = 0
        self.largest = 0.0
        self.num_not_finite = self.num_negative = self.num_too_large = self.num_fractional = 0
        self.first_found: dict[str, FoundValue] = {}
        self._is_known = is_known.astype(np.float64)
        self._genes_of_cells = np.zeros(num_genes + 1, dtype=np.int64)
        self._sums_of_cells = _SumHistogram()

    @property
    def genes_per_cell(self) -> Distribution:
        """Genes with counts, exact."""
        return _quantiles(np.arange(len(self._genes_of_cells)), self._genes_of_cells)

    @property
    def counts_per_cell(self) -> Distribution:
        """Sums of counts: exact below 256, above at most 0.8% too small; the least and the most are exact."""
        return self._sums_of_cells.distribution()

    @property
    def total_counts(self) -> float:
        """Sum of all counts."""
        return float(self.gene_counts.sum())

    def add(self, block: csr_matrix) -> None:
        """Add cells that follow those added before.

        Raises
        ------
        ValueError
            The block has other columns than there are genes, or says so wrongly; or it does not hold real numbers.
        """
        _check_form(block, len(self.gene_counts))
        values = self._check_values(block)
        counts = csr_matrix((values, block.indices, block.indptr), shape=block.shape)
        # Products with vectors are several times as fast as np.bincount or a product with a matrix.
        sums, known = counts @ np.ones(block.shape[1]), counts @ self._is_known
        self.gene_counts += counts.T @ np.ones(block.shape[0])
        num_genes = _count_genes(block.indptr, values)
        self._genes_of_cells += np.bincount(num_genes, minlength=len(self._genes_of_cells))
        self._sums_of_cells.add(sums)
        self.num_without_counts += int((sums == 0).sum())
        self.num_empty_cells += int((known == 0).sum())
        self.num_below_minimum += int((num_genes < self.min_genes).sum())
        self.num_values += len(values)
        self.num_cells += len(num_genes)

    def _check_values(self, block: csr_matrix) -> npt.NDArray[Any]:
        """Count the values that are no counts; return the values with 0 for those that cannot be summed."""
        values = block.data
        if values.dtype.kind == "b" or values.dtype == np.float16:  # scipy does not multiply them
            values = values.astype(np.float32)
        if values.size == 0:
            return values
        is_real = values.dtype.kind == "f"
        least, most = values.min(), values.max()  # NaN if any value is
        if not (least >= 0 and most <= LARGEST_COUNT):
            values = values.copy()
            for name, is_wrong in _wrong_values(values):
                self._note(name, is_wrong, block)
                values[is_wrong] = 0
            most = values.max()
        if is_real:
            self._note("fractional", values != np.floor(values), block)
        self.largest = max(self.largest, float(most))
        return values

    def _note(self, name: str, is_wrong: npt.NDArray[np.bool_], block: csr_matrix) -> None:
        num_wrong = int(np.count_nonzero(is_wrong))
        if not num_wrong:
            return
        setattr(self, f"num_{name}", getattr(self, f"num_{name}") + num_wrong)
        if name not in self.first_found:
            entry = int(np.argmax(is_wrong))
            row = int(np.searchsorted(block.indptr, entry, side="right")) - 1
            self.first_found[name] = FoundValue(float(block.data[entry]), self.num_cells + row)


class _SumHistogram:
    """How often sums occur, by the first 8 binary digits of each: numbers to 256 exactly."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << 15, dtype=np.int64)
        self._least, self._most = np.inf, 0.0

    def add(self, sums: npt.NDArray[np.float64]) -> None:
        if len(sums):
            keys = sums.astype(np.float32).view(np.uint32) >> 16
            self._counts += np.bincount(keys, minlength=len(self._counts))
            self._least, self._most = min(self._least, float(sums.min())), max(self._most, float(sums.max()))

    def distribution(self) -> Distribution:
        edges = (np.arange(len(self._counts), dtype=np.uint32) << 16).view(np.float32)
        found = _quantiles(edges, self._counts)
        return found._replace(least=self._least, most=self._most) if self._counts.any() else found


def _quantiles(values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> Distribution:
    """Quantiles of `values`, ascending, each occurring `counts` times: the value of the cell at or below the place."""
    cumulated = np.cumsum(counts)
    if cumulated[-1] == 0:
        return Distribution(*[0.0] * len(QUANTILES))
    places = np.floor(np.array(QUANTILES) * (cumulated[-1] - 1)).astype(np.int64)
    return Distribution(*[float(value) for value in values[np.searchsorted(cumulated, places, side="right")]])


def _count_genes(indptr: npt.NDArray[np.integer], values: npt.NDArray[Any]) -> npt.NDArray[np.integer]:
    """Return how many entries of each cell are not 0."""
    if values.size == 0 or values.min() > 0:
        return np.diff(indptr)
    return np.diff(np.concatenate([[0], np.cumsum(values > 0)])[indptr])


def _check_form(block: csr_matrix, num_genes: int) -> None:
    # scipy does not look: an index that is out of range would be read from memory that is not the matrix's.
    if block.shape[1] != num_genes or (block.nnz and not 0 <= block.indices.min() <= block.indices.max() < num_genes):
        msg = f"counts: columns from 0 to {num_genes - 1} are needed, one a gene; the matrix has others. It is damaged"
        raise ValueError(msg)
    if block.data.dtype.kind not in "biuf":
        msg = f"counts: real numbers are needed, got {block.data.dtype}"
        raise ValueError(msg)


def _wrong_values(values: npt.NDArray[Any]) -> list[tuple[str, npt.NDArray[np.bool_]]]:
    is_not_finite = ~np.isfinite(values)
    return [
        ("not_finite", is_not_finite),
        ("negative", ~is_not_finite & (values < 0)),
        ("too_large", ~is_not_finite & (values > LARGEST_COUNT)),
    ]
