"""What the values of a cell must sum to, by forward passes on as few cells of the background as are needed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from screformer.annotation.explained_score import Bins, ExplainedCell

FloatArray = npt.NDArray[np.float64]
CELLS_AT_ONCE = 25


def effect_of(
    cell: ExplainedCell, there: Bins, nearby: FloatArray, max_error: float, generator: np.random.Generator
) -> float:
    """Return the cell's score less the mean score of the background at the cell's tokens.

    Cells are taken at random, none twice, and only what a model nearby says falsely of them is averaged (a difference
    estimator), until the standard error is small enough or all were taken, which leaves none.

    Parameters
    ----------
    cell
        What is explained.
    there
        (cells, L): bins of the background.
    nearby
        (cells,): their scores by a model that is much like the cell's.
    max_error
        Standard error that is small enough, as a share of the effect.
    generator
        Of the order.
    """
    order = generator.permutation(len(there))
    differences = np.zeros(0)
    while True:
        rows = order[len(differences) : len(differences) + CELLS_AT_ONCE]
        differences = np.concatenate([differences, cell.at_bins(there[rows]) - nearby[rows]])
        effect = cell.score - float(nearby.mean() + differences.mean())
        if len(differences) == len(there) or standard_error(differences, len(there)) <= max_error * abs(effect):
            return effect


def standard_error(values: FloatArray, population: int | None = None) -> float:
    """Return that of the mean of values drawn at random, without replacement where a population's size is given."""
    if len(values) < 2:
        return float("inf")
    left = 1.0 if population is None else 1 - len(values) / population
    return float(values.std(ddof=1) * np.sqrt(left / len(values)))


def made_to_sum(values: FloatArray, total: float, spread: FloatArray) -> FloatArray:
    """Return values (L,) that sum to a total which is known, what they miss shared out by how uncertain each is.

    Parameters
    ----------
    values
        (L,): estimates.
    total
        What they estimate the parts of.
    spread
        (L,): variances of the estimates, up to a factor.
    """
    whole = spread.sum()
    shares = spread / whole if whole > 0 else np.full(len(values), 1 / max(len(values), 1))
    return values + (total - values.sum()) * shares
