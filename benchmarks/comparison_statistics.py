"""The arithmetic of a comparison: spreads over folds, paired differences and tests, all test cells together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, false_discovery_control, permutation_test
from scipy.stats import t as student_t
from sklearn.metrics import confusion_matrix

from screformer.benchmarks.protocol import NO_LABEL, Predictions, has_probabilities, label_probabilities
from screformer.train.metrics import reliability_bins, roc_points

Json = dict[str, Any]
FloatArray = npt.NDArray[np.float64]

SCORES = ("accuracy", "macro_f1", "balanced_accuracy", "macro_auc", "expected_calibration_error")
OURS, BASELINE = "screformer", "logistic_regression"
NUM_RESAMPLES = 10_000
MEGABYTE = 1e6
CURVE_DIGITS = 4


def summarize_systems(runs: Sequence[Mapping[str, Any]], *, baseline: str = BASELINE) -> Json:
    """Return system -> means over folds and seeds, best macro-F1 first.

    Beside each of accuracy, macro_f1, balanced_accuracy, macro_auc and expected_calibration_error its ``_sd`` (over
    folds, seeds averaged) and ``_interval`` (95%, folds drawn anew 10,000 times; None for one fold);
    ``less_baseline``, the mean difference of macro_f1 to `baseline` on the same folds, see `difference_spread`;
    ``f1``, label -> mean over the runs that tested it; ``fit_seconds``, ``predict_seconds`` and ``rejected``, means;
    ``peak_megabytes``, the most of any run, None where it was not measured; ``title`` and ``is_inductive``.
    """
    by_system: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_system.setdefault(run["system"], []).append(run)
    folds = sorted({run["fold"] for run in runs})
    found: Json = {}
    for name, own in by_system.items():
        row: Json = {"title": own[0]["title"], "is_inductive": own[0]["is_inductive"], "num_runs": len(own)}
        for score in SCORES:
            row |= spread(score, by_fold(own, folds, score))
        if name != baseline and baseline in by_system:
            ours, theirs = (by_fold(each, folds, "macro_f1") for each in (own, by_system[baseline]))
            row["less_baseline"] = difference_spread("macro_f1", ours - theirs)
        labels = sorted({label for run in own for label in run["f1"]})
        row["f1"] = {label: float(np.mean([run["f1"][label] for run in own if label in run["f1"]])) for label in labels}
        for key in ("fit_seconds", "predict_seconds", "rejected"):
            row[key] = float(np.mean([run[key] for run in own]))
        peaks = [run["peak_bytes"] for run in own]
        row["peak_megabytes"] = None if None in peaks else max(peaks) / MEGABYTE
        found[name] = row
    return dict(sorted(found.items(), key=lambda pair: -pair[1]["macro_f1"]))


def by_fold(runs: Sequence[Mapping[str, Any]], folds: Sequence[str], score: str) -> FloatArray:
    """Return the mean over seeds of each fold; NaN where a score is not known."""
    values = [[run[score] for run in runs if run["fold"] == fold] for fold in folds]
    return np.array([np.nan if not own or None in own else np.mean(own) for own in values], dtype=np.float64)


def spread(name: str, values: FloatArray) -> Json:
    """Return the mean of the known values as `name`, and its ``_sd`` and ``_interval`` where there are several."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {name: None, f"{name}_sd": None, f"{name}_interval": None}
    draws = np.random.default_rng(0).choice(known, (NUM_RESAMPLES, len(known))).mean(axis=1)
    several = len(known) > 1
    return {
        name: float(known.mean()),
        f"{name}_sd": float(known.std(ddof=1)) if several else None,
        f"{name}_interval": [float(end) for end in np.quantile(draws, [0.025, 0.975])] if several else None,
    }


def difference_spread(name: str, values: FloatArray) -> Json:
    """Return `spread` of paired differences, with Student's interval over folds.

    Of four or five folds drawn anew a percentile interval leaves out 0 too often: in about one of six cases where there
    is no difference.
    """
    found = spread(name, values)
    deviation = found[f"{name}_sd"]
    if deviation is not None:
        number = int((~np.isnan(values)).sum())
        half = float(student_t.ppf(0.975, number - 1)) * deviation / number**0.5
        found[f"{name}_interval"] = [found[name] - half, found[name] + half]
    return found


def pooled_macro_f1(row: Mapping[str, Any]) -> float:
    """Return the macro-F1 of the test cells of all folds together, of a system's row with its confusion matrix.

    A type that has one cell in a fold is worth as much in that fold's macro-F1 as any other; here it is not.
    """
    matrix = np.array(row["confusion_matrix"], dtype=np.int64)
    known = np.array([name != NO_LABEL for name in row["label_names"]])
    sums = matrix.sum(axis=0) + matrix.sum(axis=1)
    f1 = 2 * np.diag(matrix) / np.maximum(sums, 1)
    return float(f1[known & (sums > 0)].mean())


def paired_tests(runs: Sequence[Mapping[str, Any]], predictions: Mapping[str, Sequence[Predictions]]) -> list[Json]:
    """Return a row for each pair of systems: how they differ on the same folds and the same cells.

    ``macro_f1`` is the mean difference, first less second, over folds; ``p_folds`` is two-sided, from flipping the
    signs of the folds' differences (with four folds it can't be below .125); ``only_first_right`` and
    ``only_second_right`` count test cells of all folds; ``p_cells`` is McNemar's exact test of these, and
    ``p_cells_adjusted`` that by Benjamini and Hochberg over all pairs. Cells of one donor are not independent: where
    the two tests differ believe ``p_folds``.

    Parameters
    ----------
    runs
        Of all systems.
    predictions
        System -> its predictions on each fold, for one seed.
    """
    folds = sorted({run["fold"] for run in runs})
    scores = {name: by_fold([run for run in runs if run["system"] == name], folds, "macro_f1") for name in predictions}
    is_right = {name: _right_cells(own) for name, own in predictions.items()}
    rows: list[Json] = []
    for first, second in combinations(predictions, 2):
        differences = scores[first] - scores[second]
        differences = differences[~np.isnan(differences)]
        cells = sorted(is_right[first].keys() & is_right[second].keys())
        mine, theirs = (np.array([is_right[name][cell] for cell in cells], dtype=bool) for name in (first, second))
        only_first, only_second = int((mine & ~theirs).sum()), int((~mine & theirs).sum())
        rows.append(
            {
                "first": first,
                "second": second,
                "macro_f1": float(differences.mean()) if len(differences) else None,
                "p_folds": _sign_flip_test(differences),
                "only_first_right": only_first,
                "only_second_right": only_second,
                "p_cells": mcnemar(only_first, only_second),
            }
        )
    adjusted = false_discovery_control([row["p_cells"] for row in rows]) if rows else []
    return [row | {"p_cells_adjusted": float(value)} for row, value in zip(rows, adjusted, strict=True)]


def _right_cells(predictions: Sequence[Predictions]) -> dict[str, bool]:
    return {
        cell: label == right
        for fold in predictions
        for cell, label, right in zip(fold.cells, fold.named.labels, fold.truth, strict=True)
    }


def _sign_flip_test(differences: FloatArray) -> float | None:
    if len(differences) < 2:
        return None
    if not differences.any():
        return 1.0
    test = permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=NUM_RESAMPLES, random_state=0
    )
    return float(test.pvalue)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of so many cells that only one of two systems names right."""
    return float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0


def pool_cells(predictions: Sequence[Predictions]) -> Json:
    """Return what all test cells of a system say together.

    ``label_names`` and ``confusion_matrix`` (rows = true, "(none)" for cells without a label); ``roc_curves``, label ->
    curve of one against the rest with its ``auc``, None where the system has no scores or no cell tells; and
    ``reliability``, see `reliability_bins`, None without probabilities. Scores of all folds are ranked together.
    """
    truth = [label for fold in predictions for label in fold.truth]
    given = [label or NO_LABEL for fold in predictions for label in fold.named.labels]
    names = sorted({*truth, *given})
    found: Json = {
        "label_names": names,
        "confusion_matrix": confusion_matrix(truth, given, labels=names).tolist(),
        "roc_curves": {label: _pooled_curve(predictions, label) for label in sorted(set(truth))},
        "reliability": None,
    }
    if all(has_probabilities(fold.named) for fold in predictions):
        is_right = np.array([label == right for label, right in zip(given, truth, strict=True)])
        confidence = np.concatenate([label_probabilities(fold.named) for fold in predictions])
        found["reliability"] = reliability_bins(is_right, confidence)
    return found


def _pooled_curve(predictions: Sequence[Predictions], label: str) -> Json | None:
    scores, is_label = [], []
    for fold in predictions:
        if fold.named.scores is None:
            return None
        if label in fold.named.classes:
            scores.append(fold.named.scores[:, fold.named.classes.index(label)].astype(np.float64))
            is_label.append(np.array([right == label for right in fold.truth]))
    if not scores:
        return None
    curve = roc_points(np.concatenate(is_label), np.concatenate(scores))
    if curve is None:
        return None
    rates = ("false_positive_rate", "true_positive_rate")
    return curve | {key: [round(value, CURVE_DIGITS) for value in curve[key]] for key in rates}
