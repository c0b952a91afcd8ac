"""One cell, one gene at a time, in exact fractions: what the vectorised tokenizer must give."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction


def tokenize_cell(counts, positions, *, num_bins: int, binning: str, target_sum: int = 10_000) -> dict[int, int]:
    """Vocabulary position -> bin, expressed genes only."""
    total = sum(int(count) for count in counts)
    summed: dict[int, int] = defaultdict(int)
    for count, position in zip(counts, positions, strict=True):
        if position >= 0 and count > 0:
            summed[int(position)] += int(count)
    if binning == "log2":
        return {at: _log2_bin(Fraction(count * target_sum, total), num_bins) for at, count in sorted(summed.items())}
    edges = _quantile_edges(sorted(summed.values()), num_bins - 1) if summed else []
    return {at: sum(edge <= count for edge in edges) for at, count in sorted(summed.items())}


def _log2_bin(normalised: Fraction, num_bins: int) -> int:
    power = 0
    while 2 ** (power + 1) <= 1 + normalised:
        power += 1
    return min(max(power, 1), num_bins - 1)


def _quantile_edges(values: list[int], num_edges: int) -> list[Fraction]:
    edges = []
    for step in range(num_edges):
        place = Fraction(step * (len(values) - 1), num_edges - 1)
        below = int(place)
        above = min(below + 1, len(values) - 1)
        edges.append(values[below] + (values[above] - values[below]) * (place - below))
    return edges
