"""Areas under the ROC curve of many scores of the same things, with intervals from drawing the things anew."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NUM_DRAWS, DRAWS_AT_ONCE = 1000, 50
Floats = npt.NDArray[np.float64]


class RankingAreas(NamedTuple):
    """Areas of each score, and in each draw.

    Attributes
    ----------
    areas
        (scores,).
    drawn
        (scores, draws): of the same draw in the same column, so that differences can be taken.
    """

    areas: Floats
    drawn: Floats

    def interval(self, score: int) -> list[float]:
        """Return the ends of a score's interval of 95%."""
        return [float(end) for end in np.quantile(self.drawn[score], [0.025, 0.975])]


def areas_with_intervals(scores: Floats, is_positive: npt.NDArray[np.bool_], *, seed: int) -> RankingAreas:
    """Return the areas of `scores` (scores, things); positive and negative things are drawn each by themselves.

    Equal scores count half, as usual.
    """
    rankings = [_Ranking(one, is_positive) for one in scores]
    ones = np.ones((1, len(is_positive)), dtype=np.int64)
    generator, parts = np.random.default_rng(seed), []
    for start in range(0, NUM_DRAWS, DRAWS_AT_ONCE):
        counts = np.zeros((min(DRAWS_AT_ONCE, NUM_DRAWS - start), len(is_positive)), dtype=np.int64)
        for kind in (is_positive, ~is_positive):
            num = int(kind.sum())
            counts[:, kind] = generator.multinomial(num, np.full(num, 1 / num), size=len(counts))
        parts.append(np.stack([ranking.areas(counts) for ranking in rankings]))
    return RankingAreas(np.array([ranking.areas(ones)[0] for ranking in rankings]), np.concatenate(parts, axis=1))


class _Ranking:
    """One score's order, from which the area follows for any numbers of copies."""

    def __init__(self, scores: Floats, is_positive: npt.NDArray[np.bool_]) -> None:
        self._order = np.argsort(scores, kind="stable")
        ordered = scores[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._is_positive = is_positive[self._order]

    def areas(self, counts: npt.NDArray[np.int64]) -> Floats:
        """Return (draws,) areas for the copies of each thing, (draws, things)."""
        ordered = counts[:, self._order]
        positive = np.add.reduceat(ordered * self._is_positive, self._starts, axis=1)
        negative = np.add.reduceat(ordered * ~self._is_positive, self._starts, axis=1)
        below = negative.cumsum(axis=1) - negative / 2
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))
