"""Fitting a calibration to cells that a classifier was not trained on, and saying what it is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from screformer.annotation.calibration import (
    CLASSES,
    Calibration,
    CellAnswers,
    FloatArray,
    Int64Array,
    LabelReader,
    choices,
    class_probabilities,
)
from screformer.annotation.label_tree import LabelTree, predict_levels

if TYPE_CHECKING:
    from screformer.configuration_screformer import ScReformerConfig

Float64Array = npt.NDArray[np.float64]

ASKED_ERRORS = (0.01, 0.02, 0.05, 0.1)  # what evaluations show
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
MAX_STEPS = 100
MIN_GROUP_CELLS = 100  # in fewer, a few wrong answers would be too large a share


def fit_calibration(
    tree: LabelTree,
    class_names: Sequence[str],
    logits: FloatArray,
    labels: Sequence[str],
    *,
    groups: Sequence[str] | npt.NDArray[np.str_] | None = None,
) -> Calibration:
    """Return the calibration that cells ask for which the classifier was not trained on.

    Temperatures minimise the loss of the choices at their level, with a weak pull towards 1 (a standard normal
    distribution of the logarithm), which decides where the cells say nothing. A threshold's error rate is
    (errors + 1) / (answers + 1), so that few cells vouch for little, or that of the group, of those with at least a
    hundred cells, where most answers are wrong: were groups to come and go by chance, a new one would be worse than all
    of k known ones once in k + 1 times (as conformal prediction has it for groups, Dunn et al. 2023).

    Parameters
    ----------
    tree, class_names
        Of the classifier.
    logits
        (cells, classes).
    labels
        The true label of each cell, at any level of the tree.
    groups
        The donor or data set of each cell, none of which the classifier has seen.

    Raises
    ------
    ValueError
        There are no cells, or a label is not in the tree.
    """
    if not len(labels):
        raise ValueError("labels: a calibration needs labelled cells, got none")
    temperatures = tuple(_fit_temperatures(tree, class_names, logits, labels))
    probabilities = class_probabilities(tree, class_names, logits, temperatures)
    levels = predict_levels(tree, class_names, probabilities)
    known, wrong = _probabilities_of_errors(tree, levels.labels, levels.probabilities, labels)
    members = None if groups is None else np.asarray(groups)
    error_rates, thresholds = _error_curve(known, wrong, members)
    return Calibration(temperatures, tuple(error_rates.tolist()), tuple(thresholds.tolist()))


def _fit_temperatures(
    tree: LabelTree, class_names: Sequence[str], logits: FloatArray, labels: Sequence[str]
) -> Iterator[float]:
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    truth = np.asarray(labels)
    terms: dict[int, list[tuple[FloatArray, npt.NDArray[np.bool_]]]] = {}
    for choice in choices(tree, class_names):
        for place, child in enumerate(choice.children):
            cells = np.isin(truth, [label for label in tree.labels if tree.is_within(label, child)])
            scores = logits[np.ix_(cells, choice.columns)].astype(np.float64)
            terms.setdefault(choice.level, []).append((scores, choice.is_of_child[:, place] > 0))

    def loss(log_temperature: float, level: int) -> float:
        total = log_temperature**2 / 2
        for scores, is_right in terms.get(level, []):
            scaled = scores / np.exp(log_temperature)
            total += float((logsumexp(scaled, axis=1) - logsumexp(scaled[:, is_right], axis=1)).sum())
        return total

    bounds = np.log([LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE])
    for level in range(1, tree.num_levels + 1):
        found = minimize_scalar(loss, bounds=bounds, args=(level,), method="bounded", options={"xatol": 1e-4})
        yield float(np.exp(found.x))


def _probabilities_of_errors(
    tree: LabelTree, level_labels: Int64Array, level_probabilities: FloatArray, labels: Sequence[str]
) -> tuple[Float64Array, Float64Array]:
    """Return, of each cell, the highest threshold at which it is answered, and at which the answer is wrong.

    The second is 0 where the whole path is right, see `compatible_labels`.
    """
    truth = np.array([tree.labels.index(label) for label in labels])
    is_right = compatible_labels(tree)[level_labels, truth[:, None]]
    first_wrong = np.where(is_right.all(axis=1), 0, is_right.argmin(axis=1))
    wrong = np.take_along_axis(level_probabilities, first_wrong[:, None], axis=1)[:, 0]
    wrong = np.where(is_right.all(axis=1), 0.0, wrong)
    return level_probabilities[:, 0].astype(np.float64), wrong.astype(np.float64)


def _error_curve(
    known: Float64Array, wrong: Float64Array, groups: npt.NDArray[Any] | None
) -> tuple[Float64Array, Float64Array]:
    """Return error rates that thresholds reach, ascending, and for each the lowest of these thresholds."""
    thresholds = np.concatenate([[0.0], np.unique(np.concatenate([known, wrong[wrong > 0]]))])

    def count(members: slice | npt.NDArray[np.bool_]) -> tuple[Float64Array, Float64Array]:
        answered = _count_reaching(known[members], thresholds)
        return _count_reaching(wrong[members], np.maximum(thresholds, np.finfo(float).tiny)), answered

    errors, answered = count(slice(None))
    rates = (errors + 1) / (answered + 1)
    for group in np.unique(groups) if groups is not None else []:
        if (groups == group).sum() >= MIN_GROUP_CELLS:
            errors, answered = count(groups == group)
            rates = np.maximum(rates, errors / np.maximum(answered, 1))
    # A higher threshold is of use only if it errs less than every lower one.
    best = np.minimum.accumulate(np.concatenate([[np.inf], rates[:-1]]))
    kept = np.flatnonzero(rates < best)[::-1]
    if len(kept) > MAX_STEPS:
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, MAX_STEPS).round().astype(int))]
    return rates[kept], thresholds[kept]


def calibrate(
    config: ScReformerConfig,
    logits: FloatArray,
    labels: Sequence[str],
    *,
    fitted_to: str,
    groups: Sequence[str] | npt.NDArray[np.str_] | None = None,
) -> dict[str, Any]:  # Any: JSON
    """Set the configuration's `calibration` by cells the classifier was not trained on, and return the record of it.

    The record has what the configuration has, `fitted_to`, ``num_cells``, and ``levels``: see `describe_calibration`
    (of the cells that it was fitted to).

    Parameters
    ----------
    config
        Of the classifier.
    logits, labels
        Of the cells; labels at any level, all of them in the classifier's tree.
    fitted_to
        What the cells are, in words.
    groups
        Their donors or data sets, see `fit_calibration`.
    """
    config.calibration = None
    raw = LabelReader(config)
    fitted = fit_calibration(raw.tree, raw.class_names, logits, labels, groups=groups).to_config()
    config.calibration = {**fitted, CLASSES: raw.class_names}
    described = describe_calibration(raw.tree, LabelReader(config)(logits), raw(logits), labels)
    return {"fitted_to": fitted_to, "num_cells": len(labels), **config.calibration, **described}


def _count_reaching(values: Float64Array, thresholds: Float64Array) -> Float64Array:
    """Return how many values are at least each threshold."""
    return (len(values) - np.searchsorted(np.sort(values), thresholds, side="left")).astype(np.float64)


def describe_calibration(
    tree: LabelTree, answers: CellAnswers, raw: CellAnswers, labels: Sequence[str]
) -> dict[str, Any]:  # Any: JSON
    """Return how far probabilities are from shares of right answers, at each level, before and after calibration.

    ``levels`` has a row a level: ``level``, ``num_cells`` (whose label says what they are there),
    ``expected_calibration_error``, ``before`` (the same without temperatures), and ``reliability``: of each of 15 equal
    bins of probability the ``mean_probability``, ``accuracy`` and ``num_cells``.

    Parameters
    ----------
    tree
        Of the classifier.
    answers, raw
        Of the cells, calibrated and not.
    labels
        Their true labels, at any level.
    """
    from screformer.train.metrics import expected_calibration_error, reliability_bins

    place = {label: index for index, label in enumerate(tree.labels)}
    rows = []
    for level in range(1, tree.num_levels + 1):
        cells = cells_known_at(tree, labels, level)
        if not len(cells):
            continue
        truth = np.array([place[tree.at_level(labels[cell], level)] for cell in cells.tolist()])
        after, before = (
            (each.level_labels[cells, level - 1] == truth, each.level_probabilities[cells, level - 1].astype(float))
            for each in (answers, raw)
        )
        rows.append(
            {
                "level": level,
                "num_cells": len(cells),
                "expected_calibration_error": expected_calibration_error(*after),
                "before": expected_calibration_error(*before),
                "reliability": reliability_bins(*after),
            }
        )
    return {"levels": rows}


def cells_known_at(tree: LabelTree, labels: Sequence[str], level: int) -> Int64Array:
    """Return the cells whose label says what they are at a level: it is as deep, or a leaf above, which repeats."""
    leaves = set(tree.leaves)
    is_known = [len(tree.path(label)) >= level or label in leaves for label in labels]
    return np.flatnonzero(is_known)


def realised_errors(
    config: ScReformerConfig, logits: FloatArray, labels: Sequence[str], asked: Sequence[float] = ASKED_ERRORS
) -> list[dict[str, Any]]:  # Any: JSON
    """Return how often answers are wrong when an error rate is asked for: a row a rate.

    ``asked``; ``threshold``; ``answered``, the share of cells with an answer at any level; ``answered_in_full``, with a
    leaf; ``error``, the share of wrong answers among the answered (None without any). Cells whose label the classifier
    does not know count: each answer to them is wrong. A rate that the calibration cannot vouch for has None throughout.

    Parameters
    ----------
    config
        Of a calibrated classifier.
    logits, labels
        Of cells it was neither trained nor calibrated on; labels at any level.
    asked
        Error rates.
    """
    rows: list[dict[str, Any]] = []
    for rate in asked:
        try:
            reader = LabelReader(config, max_error=rate)
        except ValueError:
            rows.append(
                dict.fromkeys(["asked", "threshold", "answered", "answered_in_full", "error"]) | {"asked": rate}
            )
            continue
        given = reader(logits)
        is_answered = given.depth > 0
        answers = given.answers()[is_answered]
        place = {label: index for index, label in enumerate(reader.tree.labels)}
        truth = np.array([place.get(label, -1) for label in np.asarray(labels)[is_answered].tolist()], dtype=np.int64)
        is_right = compatible_labels(reader.tree)[answers, truth] & (truth >= 0)
        is_leaf = np.isin(np.array(reader.tree.labels)[answers], reader.tree.leaves)
        rows.append(
            {
                "asked": rate,
                "threshold": reader.threshold,
                "answered": float(is_answered.mean()),
                "answered_in_full": float(is_leaf.sum() / len(is_answered)),
                "error": float(1 - is_right.mean()) if is_answered.any() else None,
            }
        )
    return rows


def compatible_labels(tree: LabelTree) -> npt.NDArray[np.bool_]:
    """Return (labels, labels): whether an answer is right where another label is true.

    It is if it is the label, above it, or below it: a label that is not a leaf leaves open which of its leaves it is.
    """
    is_above = np.array([[other in tree.path(label) for other in tree.labels] for label in tree.labels], dtype=bool)
    return is_above | is_above.T
