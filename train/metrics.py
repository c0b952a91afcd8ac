"""How good predicted cell types are, as numbers that fit into JSON (paper, section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import auc, confusion_matrix, precision_recall_fscore_support, roc_curve

FloatArray = npt.NDArray[np.floating[Any]]
Int64Array = npt.NDArray[np.int64]

NUM_CALIBRATION_BINS = 15
MAX_CURVE_POINTS = 200


def classification_metrics(
    labels: Sequence[int] | Int64Array,
    probabilities: FloatArray,
    label_names: Sequence[str],
    *,
    predicted: Int64Array | None = None,
) -> dict[str, Any]:
    """Return every number of an evaluation on labelled cells.

    Parameters
    ----------
    labels
        True class ids (N,), positions in `label_names`.
    probabilities
        (N, K), rows sum to 1. K may be smaller than ``len(label_names)``: the last names are then classes that the
        model does not know; their cells count as errors everywhere.
    label_names
        Class names in id order.
    predicted
        Predicted class ids (N,); default the most probable.

    Returns
    -------
    dict
        JSON-able, numbers in [0, 1]: ``accuracy``; ``macro_f1``, the mean F1 over the classes that are true or
        predicted at least once (scikit-learn's rule); ``balanced_accuracy``, the mean recall over the classes that are
        true at least once; ``macro_auc``, the mean over the classes with an AUC; ``expected_calibration_error`` (15
        equal bins of the prediction's probability, Guo et al. 2017); ``per_class`` (precision, recall, f1, support,
        auc); ``confusion_matrix`` (rows = true, counts); ``roc_curves`` (one against the rest, at most 200 points, None
        for a class with only positive or only negative cells); ``label_names``, ``num_cells``, ``unknown_labels``.

    Raises
    ------
    ValueError
        Shapes do not fit, there are no cells, an id has no name, or rows are not probabilities.
    """
    truth = np.asarray(labels, dtype=np.int64)
    scores = _check_probabilities(truth, np.asarray(probabilities, dtype=np.float64), label_names)
    predicted = scores.argmax(axis=1) if predicted is None else predicted
    confidence = scores[np.arange(len(scores)), predicted]
    names = [str(name) for name in label_names]
    curves = {name: roc_points(truth == index, scores[:, index]) for index, name in enumerate(names)}
    areas = [curve["auc"] for curve in curves.values() if curve is not None]
    return {
        **cell_type_scores(predicted, truth),
        "macro_auc": float(np.mean(areas)) if areas else None,
        "expected_calibration_error": expected_calibration_error(predicted == truth, confidence),
        "num_cells": len(truth),
        "label_names": names,
        "unknown_labels": names[np.asarray(probabilities).shape[1] :],
        "per_class": _per_class(truth, predicted, names, curves),
        "confusion_matrix": confusion_matrix(truth, predicted, labels=np.arange(len(names))).tolist(),
        "roc_curves": curves,
    }


def cell_type_scores(predicted: Int64Array, truth: Int64Array) -> dict[str, float]:
    """Return accuracy, macro_f1 and balanced_accuracy of class ids, through our `evaluate` metric."""
    # `evaluate` takes seconds to import; what only needs predictions does not wait for it.
    from screformer.train.cell_type_metrics import CellTypeMetrics

    # A seed is given because without one the constructor reads numpy's global generator.
    metric = CellTypeMetrics(keep_in_memory=True, seed=0)
    return metric.compute(predictions=predicted.tolist(), references=truth.tolist())


def expected_calibration_error(
    is_correct: npt.NDArray[np.bool_], confidence: FloatArray, *, num_bins: int = NUM_CALIBRATION_BINS
) -> float:
    """Return the mean gap between confidence and accuracy over equal bins of confidence, weighted by cells."""
    bins = np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(bins, weights=confidence - is_correct, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def reliability_bins(
    is_correct: npt.NDArray[np.bool_], confidence: FloatArray, *, num_bins: int = NUM_CALIBRATION_BINS
) -> list[dict[str, float]]:
    """Return ``mean_probability``, ``accuracy`` and ``num_cells`` of each equal bin of confidence that has cells."""
    bins = np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)
    return [
        {
            "mean_probability": float(confidence[bins == number].mean()),
            "accuracy": float(is_correct[bins == number].mean()),
            "num_cells": int((bins == number).sum()),
        }
        for number in np.unique(bins).tolist()
    ]


def compute_cell_type_metrics(prediction: Any) -> dict[str, float]:  # Any: transformers' EvalPrediction
    """Return the validation scores of one epoch; `Trainer(compute_metrics=...)` for the classifier."""
    return cell_type_scores(np.argmax(prediction.predictions, axis=-1), np.asarray(prediction.label_ids))


def keep_logits(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Return the logits alone; a model may return embeddings beside them (`preprocess_logits_for_metrics`)."""
    return logits[0] if isinstance(logits, tuple) else logits


def _check_probabilities(truth: Int64Array, probabilities: FloatArray, label_names: Sequence[str]) -> FloatArray:
    """Return probabilities for every name, zero for the classes that the model does not know."""
    if probabilities.ndim != 2 or not len(truth) or len(probabilities) != len(truth):
        raise ValueError(
            f"probabilities must be (cells, classes) with one row for each of {len(truth)} labels (at least one), "
            f"got shape {probabilities.shape}"
        )
    unnamed = len(label_names) - probabilities.shape[1]
    if unnamed < 0:
        raise ValueError(
            f"label_names has {len(label_names)} names for {probabilities.shape[1]} columns of probabilities"
        )
    if truth.min() < 0 or truth.max() >= len(label_names):
        raise ValueError(
            f"labels must lie between 0 and {len(label_names) - 1}, got {truth.min()} to {truth.max()}; "
            "add the names of unknown classes to the end of label_names"
        )
    # NaN fails this comparison too. Half precision is off by up to 1e-3 a class.
    if not (probabilities.min() >= 0 and np.abs(probabilities.sum(axis=1) - 1).max() < 1e-2):
        raise ValueError("probabilities must be at least 0 with rows that sum to 1; apply a softmax to logits")
    return np.pad(probabilities, ((0, 0), (0, unnamed)))


def _per_class(
    truth: Int64Array, predicted: Int64Array, names: list[str], curves: dict[str, dict[str, Any] | None]
) -> dict[str, dict[str, Any]]:
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=np.arange(len(names)), zero_division=0
    )
    return {
        name: {
            "precision": float(precision[index]),
            "recall": float(recall[index]),
            "f1": float(f1[index]),
            "support": int(support[index]),
            "auc": None if (curve := curves[name]) is None else curve["auc"],
        }
        for index, name in enumerate(names)
    }


def roc_points(is_positive: npt.NDArray[np.bool_], scores: FloatArray) -> dict[str, Any] | None:
    """Return ``auc``, and at most 200 points as ``false_positive_rate`` and ``true_positive_rate``.

    None where all cells are positive, or none is.
    """
    if is_positive.all() or not is_positive.any():
        return None
    false_positive, true_positive, _ = roc_curve(is_positive, scores)
    area = float(auc(false_positive, true_positive))
    if len(false_positive) > MAX_CURVE_POINTS:
        # A picture's worth of points; both ends stay. The area is that of the whole curve.
        kept = np.unique(np.linspace(0, len(false_positive) - 1, MAX_CURVE_POINTS).round().astype(np.int64))
        false_positive, true_positive = false_positive[kept], true_positive[kept]
    return {
        "auc": area,
        "false_positive_rate": false_positive.tolist(),
        "true_positive_rate": true_positive.tolist(),
    }
