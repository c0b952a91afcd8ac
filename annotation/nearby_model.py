"""A model near the one that is explained, whose values are known without drawing: what steadies expected gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from screformer.annotation.explained_score import Bins, ExplainedCell

FloatArray = npt.NDArray[np.float64]
NUM_LOGIT_POINTS = 2  # at which the gradient of each logit is taken
NUM_SHARES = 16  # of a path, for its integral over a score that is known


class NearbyModel:
    """A model whose logits are linear in the bins of a cell's genes, and whose values are known for a whole background.

    It takes away what the drawn points differ by from the background: the nearer it is to the model, the fewer points
    are needed. The score need not be linear: it is a class's logit, or several taken together.

    Parameters
    ----------
    cell
        At which both models are the same.
    there
        (cells, L): bins of the background.
    gradients
        (logits, L, num_bins): of the logits that the score depends on, along the embedding of each bin.
    """

    def __init__(self, cell: ExplainedCell, there: Bins, gradients: FloatArray) -> None:
        self._cell, self._there, self._gradients = cell, there, gradients
        self._rows, self._columns = np.nonzero(there)
        self._bins = there[self._rows, self._columns].astype(np.int64)
        used = cell.class_score.used(len(cell.logits))
        self._own_logits = cell.logits[used]
        self._own = np.stack([at_levels(one, cell.levels) for one in gradients])
        # What all logits of each background cell differ by from the cell's: (cells, logits).
        self._less = np.stack(
            [self._sum_at_bins(one) - own.sum() for one, own in zip(gradients, self._own, strict=True)]
        )
        self._less = self._less.T

    @classmethod
    def of(
        cls,
        cell: ExplainedCell,
        there: Bins,
        mean: FloatArray,
        points: Callable[[npt.NDArray[np.int64]], Tensor],
        shares: FloatArray,
    ) -> NearbyModel:
        """Return it by the mean gradient of the score, or, where that is of several logits, by theirs at two points."""
        used = np.array(cell.class_score.used(len(cell.logits)))
        if len(used) == 1:
            return cls(cell, there, mean[None])
        middle = np.argsort(np.abs(shares - 0.5), kind="stable")[:NUM_LOGIT_POINTS]
        at, logits = np.tile(middle, len(used)), np.repeat(used, len(middle))
        gradients = np.zeros((len(used), *mean.shape))
        for rows, found in cell.gradients(lambda rows: points(at[rows]), len(at), logits=logits):
            for number, one in zip(range(rows.start, rows.stop), found, strict=True):
                gradients[number // len(middle)] += one / len(middle)
        return cls(cell, there, gradients)

    def values(self) -> FloatArray:
        """Return the values (L,) beside the whole background."""
        shares, weights = np.polynomial.legendre.leggauss(NUM_SHARES)
        slopes = sum(
            weight / 2 * self._slopes_at(self._less, (share + 1) / 2)
            for share, weight in zip(shares, weights, strict=True)
        )
        return self._weighted(np.asarray(slopes) / len(self._there))

    def values_at(self, drawn: npt.NDArray[np.int64], shares: FloatArray) -> FloatArray:
        """Return what each point, of a background cell at a share of the way, says of the values, (points, L)."""
        slopes = self._slopes_at(self._less[drawn], shares[:, None])
        values = np.zeros((len(drawn), len(self._cell.levels)))
        for one, own, slope in zip(self._gradients, self._own, slopes.T, strict=True):
            for row, number in enumerate(drawn):
                values[row] += slope[row] * (own - at_levels(one, self._there[number]))
        return values

    def scores(self) -> FloatArray:
        """Return the scores (cells,) of the background."""
        return self._cell.class_score.of_used(self._own_logits + self._less, len(self._cell.logits))

    def _slopes_at(self, less: FloatArray, share: float | FloatArray) -> FloatArray:
        return self._cell.class_score.slopes(self._own_logits + (1 - share) * less, len(self._cell.logits))

    def _weighted(self, slopes: FloatArray) -> FloatArray:
        """Return the values of paths from each background cell, of which each logit counts by its slope there."""
        values = np.zeros(len(self._cell.levels))
        for one, own, slope in zip(self._gradients, self._own, slopes.T, strict=True):
            # Bin 0 of every gene, and at the genes that a cell expresses the difference to it.
            rise = (one[self._columns, self._bins] - one[self._columns, 0]) * slope[self._rows]
            values += slope.sum() * (own - one[:, 0])
            values -= np.bincount(self._columns, weights=rise, minlength=len(values))
        return values

    def _sum_at_bins(self, gradients: FloatArray) -> FloatArray:
        rise = gradients[self._columns, self._bins] - gradients[self._columns, 0]
        return gradients[:, 0].sum() + np.bincount(self._rows, weights=rise, minlength=len(self._there))


def at_levels(of_bins: FloatArray, levels: Bins) -> FloatArray:
    """Return what stands at each token's bin, (L,) of (L, num_bins)."""
    return np.take_along_axis(of_bins, levels.astype(np.int64)[:, None], axis=1)[:, 0]
