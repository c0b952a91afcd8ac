"""What the card and the report both say of a model beside its baselines, so that they cannot disagree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Metrics = Mapping[str, Any]  # of `train.metrics.classification_metrics`; Any because JSON
Results = Mapping[str, Metrics]

MODEL, LOGISTIC_REGRESSION, MAJORITY_CLASS = "model", "logistic_regression", "majority_class"
ROW_TITLES = {
    MODEL: "scReformer-BERT",
    LOGISTIC_REGRESSION: "Logistic regression",
    MAJORITY_CLASS: "Majority class",
}
METRIC_TITLES = {"accuracy": "Accuracy", "macro_f1": "Macro-F1", "balanced_accuracy": "Balanced accuracy"}
FEW_CELLS = 10
PAIRED = "paired"  # of a baseline's row, see `score_baselines`
ALPHA = 0.05

Verdict = Literal["wins", "loses", "draws", "is mixed"]
OPENINGS: dict[Verdict, str] = {
    "wins": "The model beats logistic regression",
    "loses": "The model loses to logistic regression",
    "draws": "The model is level with logistic regression",
    "is mixed": "The model and logistic regression each win once",
}


class Comparison(NamedTuple):
    """A model beside logistic regression.

    Attributes
    ----------
    verdict
        Where it was counted on which cells only one of them is right: by McNemar's test of these, "draws" if chance
        explains them. Else by accuracy and macro-F1 together: "draws" if both are level. "is mixed" if each has another
        winner.
    gaps
        Metric -> model minus logistic regression, for every metric of `METRIC_TITLES`.
    headline
        One line: the verdict and both gaps.
    sentence
        The same with the values.
    """

    verdict: Verdict
    gaps: dict[str, float]
    headline: str
    sentence: str


def check_results(results: Results) -> None:
    """Raise ValueError unless there is a model row and every row has its metrics, in [0, 1], of as many cells."""
    if MODEL not in results:
        raise ValueError(f"results must have a row {MODEL!r}, got {sorted(results)}")
    for name, row in results.items():
        for metric in METRIC_TITLES:
            value = row.get(metric)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"results[{name!r}][{metric!r}] must be a number from 0 to 1, got {value!r}")
    sizes = {name: row["num_cells"] for name, row in results.items() if "num_cells" in row}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"results must all be of the same test cells, but num_cells differs: {sizes}")


def compare(results: Results) -> Comparison | None:
    """Return how the model does beside logistic regression, whatever the sign; None without such a row."""
    check_results(results)
    if LOGISTIC_REGRESSION not in results:
        return None
    model, regression = results[MODEL], results[LOGISTIC_REGRESSION]
    gaps = {metric: float(model[metric] - regression[metric]) for metric in METRIC_TITLES}
    paired = regression.get(PAIRED)
    is_chance = paired is not None and paired["p_value"] >= ALPHA
    verdict = "draws" if is_chance else _verdict(gaps["accuracy"], gaps["macro_f1"])
    opening = OPENINGS[verdict]
    counted = f" ({_cells_of_one(paired)})" if paired is not None else ""
    headline = f"{opening}: {points(gaps['accuracy'])} of accuracy{counted}, {points(gaps['macro_f1'])} of macro-F1"
    pairs = {metric: f"{model[metric]:.3f} against {regression[metric]:.3f}" for metric in METRIC_TITLES}
    sentence = (
        f"{opening} on this test set: accuracy {pairs['accuracy']} ({_in_words(gaps['accuracy'], model)}), "
        f"macro-F1 {pairs['macro_f1']} ({_in_words(gaps['macro_f1'])}).{_common_types(model, regression)}"
    )
    return Comparison(verdict, gaps, headline, sentence)


def _cells_of_one(paired: Metrics) -> str:
    return (
        f"{paired['only_model_right']} cells that only it names right, {paired['only_baseline_right']} that only the "
        f"regression does, p = {paired['p_value']:.2g}"
    )


def _common_types(model: Metrics, regression: Metrics) -> str:
    """Return macro-F1 of the types that have enough test cells: of the others single cells decide."""
    of = {name: row["support"] for name, row in model.get("per_class", {}).items()}
    common = [name for name, support in of.items() if support >= FEW_CELLS and name in regression.get("per_class", {})]
    if not common or len(common) == sum(support > 0 for support in of.values()):
        return ""
    means = [sum(row["per_class"][name]["f1"] for name in common) / len(common) for row in (model, regression)]
    types = f"the {len(common)} types with {FEW_CELLS} test cells or more"
    return f" Over {types} it is {means[0]:.3f} against {means[1]:.3f}."


def majority_sentence(results: Results) -> str | None:
    """Return how the model's accuracy stands to always naming the commonest class; None without such a row."""
    if MAJORITY_CLASS not in results:
        return None
    shares = results[MODEL]["accuracy"], results[MAJORITY_CLASS]["accuracy"]
    return (
        f"Always naming the commonest training class would be right in {shares[1]:.3f} of the cells; "
        f"the model's accuracy is {_in_words(shares[0] - shares[1])}."
    )


def ordered_rows(results: Results) -> list[tuple[str, Metrics]]:
    """Return (name, row): the model, its two baselines, then the others as they came."""
    known = [name for name in ROW_TITLES if name in results]
    return [(name, results[name]) for name in (*known, *(name for name in results if name not in ROW_TITLES))]


def row_title(name: str) -> str:
    """Return the title of a row of results; a name that is not known is its own."""
    return ROW_TITLES.get(name, name)


def points(gap: float) -> str:
    """Return a difference of shares as signed percentage points, for example "-3.1 points"."""
    rounded = round(100 * gap, 1)
    sign = "+" if rounded > 0 else "-" if rounded < 0 else "±"
    return f"{sign}{abs(rounded):.1f} points"


def by_support(row: Metrics) -> list[tuple[str, Metrics]]:
    """Return (class, its scores) of a row of results, the classes with most test cells first."""
    return sorted(row.get("per_class", {}).items(), key=lambda item: (-item[1]["support"], item[0]))


def rare_classes(row: Metrics) -> list[str]:
    """Return the classes with test cells, but fewer than `FEW_CELLS`."""
    return [name for name, scores in row.get("per_class", {}).items() if 0 < scores["support"] < FEW_CELLS]


def untested_classes(row: Metrics) -> list[str]:
    """Return the classes without a test cell."""
    return [name for name, scores in row.get("per_class", {}).items() if scores["support"] == 0]


def _verdict(accuracy_gap: float, macro_f1_gap: float) -> Verdict:
    # What the text rounds to 0.0 points is level.
    signs = {(round(100 * gap, 1) > 0) - (round(100 * gap, 1) < 0) for gap in (accuracy_gap, macro_f1_gap)}
    if {1, -1} <= signs:
        return "is mixed"
    return "wins" if 1 in signs else "loses" if -1 in signs else "draws"


def _in_words(gap: float, row: Metrics | None = None) -> str:
    rounded = round(100 * gap, 1)
    if rounded == 0:
        return "level"
    words = f"{abs(rounded):.1f} points {'higher' if rounded > 0 else 'lower'}"
    if row is not None and "num_cells" in row:
        words += f", {round(abs(gap) * row['num_cells'])} of {row['num_cells']} cells"
    return words
