"""What is seen of a matrix's values, and whether they can be raw counts."""

from __future__ import annotations

from typing import NamedTuple


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
