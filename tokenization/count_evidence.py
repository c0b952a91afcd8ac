"""What is seen of a matrix's values, and whether they can be raw counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from screformer.tokenization.stored_rows import Entries, StoredColumns, StoredRows

NUM_SAMPLED_BLOCKS = 5
SAMPLED_VALUES = 50_000
# Of each block, so that sums of cells can be compared though the cells have many genes.
MIN_SAMPLED_CELLS = 20
MAX_SAMPLED_CELLS = 2_000
# A matrix by columns with fewer entries is read as a whole, to see whole cells.
SMALL_MATRIX = 2_000_000
# Real cells with 300 genes or more reach counts over 40, UMIs and reads alike, at any depth (eight data sets, thinned
# to 2,000, 1,000, 500 and 250 counts a cell); their logarithms, rounded, stay below 20 (ln 1e6 = 14, log2 1e6 = 20).
MANY_GENES = 300
LARGEST_LOG = 20
# And fewer cells are not enough to tell, unless they have thousands of genes.
ENOUGH_CELLS = 30
VERY_MANY_GENES = 2000
LARGEST_NATURAL_LOG = 12
# With this many genes, a cell has genes that were counted once.
ENOUGH_GENES_FOR_ONES = 100


class CountEvidence(NamedTuple):
    """What samples of one matrix of a file look like.

    Attributes
    ----------
    source
        Where the matrix is: "X", "layers/NAME", "raw", "matrix".
    is_counts
        Whether the values can be raw counts.
    problem
        Why not, in words; None where they can.
    num_values
        Stored values looked at.
    share_integers
        Share of these that are whole numbers.
    smallest, largest
        Range of the finite ones.
    num_cells_sampled
        Whole cells looked at.
    cell_sums
        Least, median and greatest sum of these cells; zeros where no whole cell was looked at.
    """

    source: str
    is_counts: bool
    problem: str | None
    num_values: int
    share_integers: float
    smallest: float
    largest: float
    num_cells_sampled: int
    cell_sums: tuple[float, float, float]


class _Sample(NamedTuple):
    """Values, and those of whole cells (none where the matrix lies by columns and is large)."""

    values: npt.NDArray[Any]
    cells: list[npt.NDArray[Any]]
    genes_per_cell: float


def examine_counts(source: str, stored: StoredRows | StoredColumns) -> CountEvidence:
    """Look at blocks of values spread over a matrix and at whole cells among them.

    Values are told apart by themselves, never by their type: counts are often stored as floating-point numbers.
    """
    if stored.dtype.kind not in "biuf":
        return not_counts(
            source,
            f"the values are of type {stored.dtype}, such as text, not numbers; convert them: "
            "adata.X = adata.X.astype('float32')",
        )
    sample = _sample_rows(stored) if isinstance(stored, StoredRows) else _sample_columns(stored)
    values = sample.values.astype(np.float64)
    finite = values[np.isfinite(values)]
    sums = np.array([cell.sum(dtype=np.float64) for cell in sample.cells if np.isfinite(cell).all()])
    problem = _find_problem(values, sample, sums, stored.dtype)
    return CountEvidence(
        source=source,
        is_counts=problem is None,
        problem=problem,
        num_values=len(values),
        share_integers=float((finite == np.floor(finite)).sum() / max(1, len(values))),
        smallest=float(finite.min(initial=np.inf)) if len(finite) else 0.0,
        largest=float(finite.max(initial=-np.inf)) if len(finite) else 0.0,
        num_cells_sampled=len(sums),
        cell_sums=(float(sums.min()), float(np.median(sums)), float(sums.max())) if len(sums) else (0.0, 0.0, 0.0),
    )


def not_counts(source: str, problem: str) -> CountEvidence:
    """Evidence of a place where there is nothing to look at."""
    return CountEvidence(source, False, problem, 0, 0.0, 0.0, 0.0, 0, (0.0, 0.0, 0.0))


def _sample_rows(stored: StoredRows) -> _Sample:
    num_cells = stored.shape[0]
    per_block = int(np.ceil(SAMPLED_VALUES / max(1.0, stored.entries_per_row)))
    per_block = min(max(per_block, MIN_SAMPLED_CELLS), MAX_SAMPLED_CELLS, num_cells)
    starts = np.unique(np.linspace(0, num_cells - per_block, NUM_SAMPLED_BLOCKS).astype(int))
    next_free, blocks = 0, []
    for start in starts.tolist():  # where there are few cells, blocks would overlap
        first = max(start, next_free)
        next_free = start + per_block
        if first < next_free:
            blocks.append(stored.read(first, next_free))
    return _sample_of(blocks)


def _sample_columns(stored: StoredColumns) -> _Sample:
    if stored.num_entries <= SMALL_MATRIX:
        return _sample_of([_in_memory(stored.entries(), stored.shape)])
    last = stored.num_entries - SAMPLED_VALUES
    starts = np.unique(np.linspace(0, last, 4 * NUM_SAMPLED_BLOCKS).astype(int)).tolist()
    values = np.concatenate([stored.values(start, start + SAMPLED_VALUES) for start in starts])
    return _Sample(values[values != 0], [], stored.num_entries / max(1, stored.shape[0]))


def _sample_of(blocks: list[csr_matrix]) -> _Sample:
    cells = [cell for block in blocks for cell in np.split(block.data, block.indptr[1:-1])]
    expressed = [np.count_nonzero(cell) for cell in cells]
    return _Sample(
        np.concatenate([block.data for block in blocks]), cells, float(np.median(expressed)) if expressed else 0.0
    )


def _in_memory(chunks: Iterator[Entries], shape: tuple[int, int]) -> csr_matrix:
    parts = list(chunks)
    if not parts:
        return csr_matrix(shape)
    rows, columns, values = (np.concatenate(one) for one in zip(*parts, strict=True))
    return csr_matrix((values, (rows, columns)), shape=shape)


def _find_problem(
    values: npt.NDArray[np.float64], sample: _Sample, sums: npt.NDArray[np.float64], dtype: np.dtype
) -> str | None:
    """Return why the values cannot be raw counts; the surest reasons come first."""
    if not values.any():
        return "the values looked at are all 0."
    broken = ~np.isfinite(values)
    if broken.any():
        return f"counts: {int(broken.sum())} values are NaN or infinite; raw counts are needed."
    if values.min() < 0:
        return f"counts: negative values, the least is {values.min():g}; this looks scaled. Pass raw counts."
    fractional = values[values != np.floor(values)]
    if len(fractional):
        return _what_fractions_are(fractional, values, sums, sample.cells)
    limit = 2.0 ** (np.finfo(dtype).nmant + 1) if dtype.kind == "f" else np.inf
    if values.max() > limit:
        return (
            f"counts: the largest value is {values.max():g}, but whole numbers above {limit:.0f} are not exact in "
            f"{dtype}; these are sums or intensities, or the counts were spoiled. Store them as integers."
        )
    if dtype.kind == "b" or (values.max() == 1 and sample.genes_per_cell >= ENOUGH_GENES_FOR_ONES):
        return "counts: every value is 1: this says whether a gene was seen, not how often. Pass raw counts."
    return _what_small_integers_are(values, sample)


def _what_fractions_are(
    fractional: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64],
    cells: list[npt.NDArray[Any]],
) -> str:
    seen = f"counts: {len(fractional) / len(values):.1%} of the values are not integers, such as {fractional[0]:g}; "
    if _is_constant(sums):
        return f"{seen}this looks normalised: every cell sums to {np.median(sums):g}. Pass raw counts."
    if values.max() < 700:  # exp() of more is no longer a number
        for undo, name in ((np.expm1, "log1p"), (lambda x: np.exp2(x) - 1, "log2(x + 1)")):
            totals = np.array([undo(cell.astype(np.float64)).sum() for cell in cells])
            if _is_constant(totals):
                return (
                    f"{seen}this looks normalised or log-transformed: {name} of values that summed to "
                    f"{np.median(totals):.4g} in every cell. Pass raw counts."
                )
    if len(fractional) / len(values) < 0.5 and values.max() > 100:
        return (
            f"{seen}this looks normalised or estimated (RSEM, Salmon, SoupX give such numbers). Pass raw counts, or "
            "round estimates to whole numbers yourself."
        )
    return f"{seen}this looks normalised or log-transformed. Pass raw counts."


def _what_small_integers_are(values: npt.NDArray[np.float64], sample: _Sample) -> str | None:
    num_genes, num_cells = sample.genes_per_cell, len(sample.cells)
    is_tiny = (num_genes >= MANY_GENES and num_cells >= ENOUGH_CELLS and values.max() <= LARGEST_LOG) or (
        num_genes >= VERY_MANY_GENES and values.max() <= LARGEST_NATURAL_LOG
    )
    if is_tiny:
        return (
            f"counts: whole numbers, but none over {values.max():g} though a cell has {num_genes:.0f} genes: this "
            "looks log-transformed and then rounded. Pass raw counts."
        )
    full = [cell[cell > 0] for cell in sample.cells if np.count_nonzero(cell) >= ENOUGH_GENES_FOR_ONES]
    without_ones = sum(bool(cell.min() > 1) for cell in full)
    if len(full) >= 5 and without_ones > len(full) / 4:
        return (
            f"counts: whole numbers, but {without_ones} of {len(full)} cells have no gene with a count of 1: this "
            "looks normalised or multiplied and then rounded. Pass raw counts."
        )
    return None


def _is_constant(sums: npt.NDArray[np.float64]) -> bool:
    """Whether cells that have counts have one sum, but for rounding; one cell says nothing."""
    sums = sums[sums > 0]
    return len(sums) >= 3 and bool(np.isfinite(sums).all()) and float(np.ptp(sums)) <= 1e-3 * float(np.median(sums))
