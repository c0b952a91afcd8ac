import json
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from screformer.train import cell_type_metrics
from screformer.train.metrics import (
    MAX_CURVE_POINTS,
    cell_type_scores,
    classification_metrics,
    compute_cell_type_metrics,
    expected_calibration_error,
    keep_logits,
)

NAMES = ["alpha", "beta", "delta", "gamma"]


def make_predictions(num_cells=400, num_classes=4, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_cells)
    logits = generator.normal(size=(num_cells, num_classes)) + 1.5 * np.eye(num_classes)[labels]
    probabilities = np.exp(logits)
    return labels, probabilities / probabilities.sum(1, keepdims=True)


def test_scores_equal_those_of_scikit_learn():
    labels, probabilities = make_predictions()
    predicted = probabilities.argmax(1)
    metrics = classification_metrics(labels, probabilities, NAMES)
    assert metrics["accuracy"] == pytest.approx((predicted == labels).mean())
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    for index, name in enumerate(NAMES):
        area = roc_auc_score(labels == index, probabilities[:, index])
        assert metrics["per_class"][name]["auc"] == pytest.approx(area)
    assert metrics["macro_auc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"))


def test_report_is_json_without_nan():
    labels, probabilities = make_predictions()
    text = json.dumps(classification_metrics(labels, probabilities, NAMES), allow_nan=False)
    assert json.loads(text)["num_cells"] == 400


def test_rows_of_the_confusion_matrix_are_the_truth():
    probabilities = np.eye(4)[[1, 1, 2]]
    metrics = classification_metrics([0, 1, 2], probabilities, NAMES)
    assert metrics["confusion_matrix"] == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert [metrics["per_class"][name]["support"] for name in NAMES] == [1, 1, 1, 0]
    assert metrics["per_class"]["beta"] == {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1,
                                            "auc": 0.75}  # fmt: skip


def test_macro_f1_is_over_classes_that_are_true_or_predicted():
    # delta and gamma never occur and do not count; beta is predicted only, and counts with 0.
    probabilities = np.eye(4)[[0, 1]]
    assert classification_metrics([0, 0], probabilities, NAMES)["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_an_absent_class_has_no_curve_and_stays_out_of_the_mean():
    labels, probabilities = make_predictions()
    labels = np.where(labels == 3, 0, labels)
    metrics = classification_metrics(labels, probabilities, NAMES)
    assert metrics["roc_curves"]["gamma"] is None
    assert metrics["per_class"]["gamma"]["auc"] is None
    areas = [metrics["per_class"][name]["auc"] for name in NAMES[:3]]
    assert metrics["macro_auc"] == pytest.approx(np.mean(areas))


def test_one_class_alone_has_no_auc_at_all():
    metrics = classification_metrics([1, 1], np.full((2, 4), 0.25), NAMES)
    assert metrics["macro_auc"] is None


def test_classes_that_the_model_does_not_know_count_as_errors():
    labels, probabilities = make_predictions()
    labels = np.concatenate([labels, [4] * 100])
    probabilities = np.concatenate([probabilities, probabilities[:100]])
    metrics = classification_metrics(labels, probabilities, [*NAMES, "epsilon"])
    known = classification_metrics(labels[:400], probabilities[:400], NAMES)
    assert metrics["unknown_labels"] == ["epsilon"]
    assert metrics["accuracy"] == pytest.approx(known["accuracy"] * 0.8)
    assert metrics["per_class"]["epsilon"]["recall"] == 0


def test_long_roc_curves_are_thinned_but_keep_their_ends_and_area():
    labels, probabilities = make_predictions(num_cells=5000, num_classes=2)
    metrics = classification_metrics(labels, probabilities, ["a", "b"])
    curve = metrics["roc_curves"]["a"]
    assert len(curve["true_positive_rate"]) <= MAX_CURVE_POINTS
    assert (curve["false_positive_rate"][0], curve["true_positive_rate"][-1]) == (0.0, 1.0)
    assert curve["auc"] == pytest.approx(roc_auc_score(labels == 0, probabilities[:, 0]))


def test_calibration_error_is_zero_for_honest_confidence_and_the_gap_otherwise():
    is_correct = np.array([True] * 8 + [False] * 2)
    assert expected_calibration_error(is_correct, np.full(10, 0.8)) == pytest.approx(0.0)
    assert expected_calibration_error(is_correct, np.full(10, 1.0)) == pytest.approx(0.2)
    halves = np.array([0.55] * 5 + [0.95] * 5), np.array([True, True, True, False, False] + [True] * 5)
    assert expected_calibration_error(halves[1], halves[0]) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([], np.empty((0, 4)), "one row for each of 0 labels"),
        ([0, 1], np.eye(4)[[0]], r"one row for each of 2 labels \(at least one\), got shape \(1, 4\)"),
        ([0], np.ones((1, 5)) / 5, "label_names has 4 names for 5 columns"),
        ([4], np.eye(4)[[0]], "labels must lie between 0 and 3, got 4 to 4"),
        ([0], np.array([[3.0, -2.0, 0.0, 0.0]]), "apply a softmax to logits"),
        ([0], np.full((1, 4), np.nan), "apply a softmax to logits"),
    ],
)
def test_refuses_what_is_no_evaluation(labels, probabilities, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(labels, probabilities, NAMES)


def test_evaluate_loads_the_metric_file_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    metric = evaluate.load(
        str(Path(cell_type_metrics.__file__)), keep_in_memory=True, cache_dir=str(tmp_path / "cache")
    )
    scores = metric.compute(predictions=[0, 1, 1, 2], references=[0, 1, 1, 1])
    assert scores == cell_type_scores(np.array([0, 1, 1, 2]), np.array([0, 1, 1, 1]))
    assert scores["accuracy"] == 0.75


def test_global_generator_stays_untouched():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator is the point
    classification_metrics(*make_predictions(), NAMES)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_epoch_metrics_take_the_trainers_predictions():
    labels, probabilities = make_predictions()
    scores = compute_cell_type_metrics(SimpleNamespace(predictions=probabilities, label_ids=labels))
    assert scores == cell_type_scores(probabilities.argmax(1), labels)


def test_only_logits_are_kept_of_a_models_outputs():
    logits, labels = torch.randn(2, 3), torch.tensor([0, 1])
    assert keep_logits((logits, torch.randn(2, 8)), labels) is logits
    assert keep_logits(logits, labels) is logits
