"""Who is ahead in a comparison, in numbers and in words; losses are worded as plainly as wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from screformer.benchmarks.comparison_statistics import BASELINE, OURS, by_fold, difference_spread
from screformer.benchmarks.comparison_tables import WEAK_SENTENCE
from screformer.model_cards.page_blocks import Outcome, Style

Results = Mapping[str, Any]  # Any: JSON
Verdict = Literal["beats", "loses to", "ties with", "no claim"]
# Fewer folds than this say nothing for certain: of four folds that agree by chance, p is .125. Seeds are no folds: the
# test cells are the same.
ENOUGH = 5
STYLES: dict[Verdict, Style] = {"beats": "wins", "loses to": "loses", "ties with": "even", "no claim": "even"}


class PairOfSystems(NamedTuple):
    """Two systems on the same folds.

    Attributes
    ----------
    first, second
        Names.
    difference
        Mean of first less second over folds, macro-F1.
    interval
        Of that, 95%, see `difference_spread`; None for one fold.
    verdict
        "no claim" where there are too few folds; otherwise by the interval, "ties with" where it contains 0.
    """

    first: str
    second: str
    difference: float
    interval: tuple[float, float] | None
    verdict: Verdict


def compare_pair(results: Results, first: str, second: str) -> PairOfSystems:
    """Return how two systems of a comparison differ on the same folds, seeds averaged."""
    folds = sorted({run["fold"] for run in results["runs"]})
    scores = [
        by_fold([run for run in results["runs"] if run["system"] == name], folds, "macro_f1")
        for name in (first, second)
    ]
    found = difference_spread("macro_f1", scores[0] - scores[1])
    ends = found["macro_f1_interval"]
    interval = None if ends is None else (float(ends[0]), float(ends[1]))
    verdict = _verdict(interval, is_enough=results["num_folds"] >= ENOUGH)
    return PairOfSystems(first, second, float(found["macro_f1"]), interval, verdict)


def _verdict(interval: tuple[float, float] | None, *, is_enough: bool) -> Verdict:
    if interval is None or not is_enough:
        return "no claim"
    if interval[0] <= 0 <= interval[1]:
        return "ties with"
    return "beats" if interval[0] > 0 else "loses to"


def best_rival(results: Results) -> str | None:
    """Return the system with the best macro-F1 that is not ours."""
    return next((name for name in results["systems"] if name != OURS), None)


def pairs_of_ours(results: Results) -> list[PairOfSystems]:
    """Return ours beside the best rival and beside logistic regression; none on a weak set, or without ours."""
    systems = results["systems"]
    if results["is_weak"] or OURS not in systems:
        return []
    rivals = dict.fromkeys([best_rival(results), BASELINE])
    return [compare_pair(results, OURS, name) for name in rivals if name is not None and name in systems]


def outcome(results: Results) -> Outcome:
    """Return the sentences on a comparison, and the style of the first."""
    if results["is_weak"]:
        return Outcome("even", [WEAK_SENTENCE.replace("*", "")])
    if OURS not in results["systems"]:
        return Outcome("even", ["scReformer-BERT was not among these systems, so nothing is claimed for it."])
    pairs = pairs_of_ours(results)
    if not pairs:
        return Outcome("even", ["There is no rival in this comparison, so nothing is claimed."])
    return Outcome(STYLES[pairs[0].verdict], [pair_sentence(results, pair) for pair in pairs])


def pair_sentence(results: Results, pair: PairOfSystems) -> str:
    """Return who is ahead in macro-F1, by how much, whether that is a claim, and the difference in accuracy."""
    accuracies = [results["systems"][name]["accuracy"] for name in (pair.first, pair.second)]
    return f"{_macro_f1_sentence(results, pair)} Accuracy: {accuracies[0] - accuracies[1]:+.3f}."


def _macro_f1_sentence(results: Results, pair: PairOfSystems) -> str:
    first, second = (results["systems"][name]["title"] for name in (pair.first, pair.second))
    if pair.second == best_rival(results):
        second = f"the best rival, {second}"
    amount = f"macro-F1 {pair.difference:+.3f}"
    if pair.interval is None:
        return f"{first} against {second}: {amount}. One fold has no interval, so nothing is claimed."
    amount += f", 95% interval {pair.interval[0]:+.3f} to {pair.interval[1]:+.3f}"
    if pair.verdict == "ties with":
        return f"{first} ties with {second}: {amount} contains 0, so no difference is claimed."
    if pair.verdict == "no claim":
        way = "level with" if pair.difference == 0 else "ahead of" if pair.difference > 0 else "behind"
        counts = _counted(results["num_folds"], "fold")
        return f"{first} is {way} {second} ({amount}), but {counts} are too few to claim it ({ENOUGH} are needed)."
    return f"{first} {pair.verdict} {second}: {amount}."


def tally_sentence(comparisons: Sequence[Results]) -> str:
    """Return how often ours beats, ties with and loses to the best rival and logistic regression."""
    of_ours = [pairs for pairs in map(pairs_of_ours, comparisons) if pairs]
    if not of_ours:
        return "There is no comparison of scReformer-BERT that is not weak, so nothing is claimed for it."
    told = []
    for title, chosen in (
        ("the best rival", [pairs[0] for pairs in of_ours]),
        ("logistic regression", [pair for pairs in of_ours for pair in pairs if pair.second == BASELINE]),
    ):
        counts = {verdict: sum(pair.verdict == verdict for pair in chosen) for verdict in STYLES}
        told.append(
            f"beside {title} it wins {counts['beats']}, ties {counts['ties with']} and loses {counts['loses to']}"
            + (f", and {counts['no claim']} without a claim, for want of folds" if counts["no claim"] else "")
        )
    return f"scReformer-BERT is in {_counted(len(of_ours), 'comparison')}, weak sets not counted: {'; '.join(told)}."


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
