"""Scores of gene pairs from sums of attention and from the cells' bins, and what wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from screformer.annotation.interaction_sums import Int64Array, InteractionSums
from screformer.benchmarks.ranking_areas import areas_with_intervals

ATTENTION, BOTH = "attention", "attention where both are expressed"
ADJUSTED, RATIO = "attention, frequency regressed out", "attention over what is expected"
COEXPRESSION, FREQUENCY, UNTRAINED = "co-expression", "gene frequency", "untrained: "
OF_ATTENTION = (ATTENTION, BOTH, ADJUSTED, RATIO)
SEED, PAIRS_AT_ONCE = 2022, 1024
SMALLEST = np.finfo(np.float64).tiny

Scores = npt.NDArray[np.float64]


class PairSums(NamedTuple):
    """Sums over cells for each labelled pair: attention both ways, with its marginals, and the same of both expressed.

    Attributes
    ----------
    attention, expected
        (pairs,): attention in both directions, and what the genes' own totals would give if nobody chose.
    given_both
        (pairs,): mean over the cells that express both, 0 if there are none.
    """

    attention: Scores
    expected: Scores
    given_both: Scores


def sums_of_pairs(sums: InteractionSums, places: Int64Array) -> PairSums:
    """Return what `sums` of one type say of pairs, (pairs, 2) places among its genes."""
    first, second = places.T

    def at_pairs(matrix: csr_matrix) -> Scores:
        return np.asarray(matrix[first, second], dtype=np.float64).ravel()

    both_ways, of_both = (one[0] + one[0].T for one in (sums.attention, sums.attention_of_both))
    totals = np.asarray(both_ways.sum(axis=1)).ravel()
    return PairSums(
        attention=at_pairs(both_ways.tocsr()),
        expected=totals[first] * totals[second] / max(totals.sum(), SMALLEST),
        given_both=at_pairs(of_both.tocsr()) / np.maximum(at_pairs(sums.cells_with_both[0]), 1),
    )


def scores_of_attention(of_pairs: PairSums, rates: Scores) -> dict[str, Scores]:
    """Return the four scores of attention, (pairs,) each; `rates` (pairs, 2) are the genes' shares of the cells.

    "Regressed out": what is left of log attention after least squares on the sum of the genes' log frequencies, its
    square, and their distance.
    """
    positive = of_pairs.attention[of_pairs.attention > 0]
    logs = np.log(of_pairs.attention + (positive.min() / 2 if len(positive) else 1.0))
    frequency = np.log(rates)
    total = frequency.sum(axis=1)
    known = np.stack([np.ones_like(total), total, total**2, np.abs(frequency[:, 0] - frequency[:, 1])], axis=1)
    fitted = known @ np.linalg.lstsq(known, logs, rcond=None)[0]
    return {
        ATTENTION: of_pairs.attention,
        BOTH: of_pairs.given_both,
        ADJUSTED: logs - fitted,
        RATIO: of_pairs.attention / np.maximum(of_pairs.expected, SMALLEST),
    }


def correlations_of_pairs(bins: csr_matrix, pairs: Int64Array) -> Scores:
    """Return the Pearson correlation of the bins of each pair (pairs, 2) over the cells; 0 where a gene is constant."""
    genes, places = np.unique(pairs, return_inverse=True)
    values = bins[:, genes].toarray().T
    values -= values.mean(axis=1, keepdims=True)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)
    first, second = places.reshape(-1, 2).T
    found = np.zeros(len(pairs))
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        some = slice(start, start + PAIRS_AT_ONCE)
        found[some] = (values[first[some]] * values[second[some]]).sum(axis=1)
    return found


def judge_scores(scores: Mapping[str, Scores], labels: npt.NDArray[np.float32]) -> dict[str, Any]:  # Any: JSON
    """Return ``scores`` (area and interval of each), ``differences`` of attention to its rivals, and ``verdict``.

    A difference is a win or a loss if its interval of 95% leaves 0 out, else a tie. Attention as a whole wins if its
    first score, the plain mass, is ahead of every rival, and loses if any is ahead of it.

    Parameters
    ----------
    scores
        Name -> (pairs,): higher for pairs that should interact.
    labels
        (pairs,): 1 or 0.
    """
    areas = areas_with_intervals(np.stack(list(scores.values())), labels == 1, seed=SEED)
    place = {name: index for index, name in enumerate(scores)}
    differences = []
    for score in OF_ATTENTION:
        for rival in (FREQUENCY, COEXPRESSION, f"{UNTRAINED}{score}"):
            drawn = areas.drawn[place[score]] - areas.drawn[place[rival]]
            low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
            outcome = "win" if low > 0 else "loss" if high < 0 else "tie"
            difference = float(areas.areas[place[score]] - areas.areas[place[rival]])
            differences.append(
                {"score": score, "rival": rival, "difference": difference, "interval": [low, high], "outcome": outcome}
            )
    rows = [
        {"score": name, "area": float(areas.areas[index]), "interval": areas.interval(index)}
        for name, index in place.items()
    ]
    return {"scores": rows, "differences": differences, "verdict": _verdict(rows, differences)}


def _verdict(rows: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> str:
    own = [row for row in differences if row["score"] == ATTENTION]
    outcomes = [row["outcome"] for row in own]
    whole = "loses" if "loss" in outcomes else "wins" if set(outcomes) == {"win"} else "ties"
    area = next(row["area"] for row in rows if row["score"] == ATTENTION)
    parts = [
        f"a {row['outcome']} against {row['rival']} ({row['difference']:+.3f}, {row['interval'][0]:+.3f} to "
        f"{row['interval'][1]:+.3f})"
        for row in own
    ]
    return f"Attention {whole}: area {area:.3f}; {', '.join(parts)}."
