"""Votes within clusters by dictionaries and fractions, one cell after the other."""

from collections import defaultdict
from fractions import Fraction


def slow_votes(labels, clusters, *, weights=None, path_of=None, min_share=0):
    """Return (label or None, share or None) of each cell.

    `labels` and `clusters` have None for none; `path_of` is label -> labels from the top down to it. Labels are whole
    numbers, the smallest of which wins a tie.
    """
    votes = defaultdict(lambda: defaultdict(Fraction))
    totals = defaultdict(Fraction)
    for number, (label, cluster) in enumerate(zip(labels, clusters, strict=True)):
        if label is None or cluster is None:
            continue
        weight = Fraction(1) if weights is None else Fraction(round(weights[number] * 2**24), 2**24)
        totals[cluster] += weight
        for each in [label] if path_of is None else path_of[label]:
            votes[cluster][each] += weight
    result = {}
    for cluster, total in totals.items():
        if total:
            result[cluster] = _winner(votes[cluster], total, path_of, min_share)
    return [result.get(cluster, (None, None)) for cluster in clusters]


def _winner(votes, total, path_of, min_share):
    if path_of is None:
        label = min(votes, key=lambda each: (-votes[each], each))
        share = float(votes[label] / total)
        return (label if share >= min_share else None, share)
    best = (None, None)
    while True:
        above = [] if best[0] is None else path_of[best[0]]
        children = [each for each in votes if list(path_of[each][:-1]) == list(above)]
        if not children:
            return best
        label = min(children, key=lambda each: (-votes[each], each))
        share = float(votes[label] / total)
        if share < min_share:
            return best if best[0] is not None else (None, share)
        best = (label, share)
