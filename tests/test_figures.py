import json
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from screformer.train.figures import (
    _history_panels,
    _short_count,
    _shown_area,
    plot_comparison,
    plot_confusion_matrix,
    plot_masked_genes,
    plot_proportions,
    plot_roc_curves,
    plot_training_curves,
)
from screformer.train.metrics import classification_metrics
from screformer.train.result_files import read_json, write_json, written_aside

NAMES = ["alpha", "beta", "a cell type whose name is far too long for any axis of any figure", "epsilon"]


@pytest.fixture(scope="module")
def metrics():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 60)
    probabilities = generator.dirichlet(np.ones(4), 60) * 0.5 + 0.5 * np.eye(4)[labels]
    # As read back from the JSON file.
    return json.loads(json.dumps(classification_metrics(labels, probabilities, NAMES)))


HISTORY = [
    {"loss": 1.5, "epoch": 0.5, "learning_rate": 1e-4},
    {"loss": 1.2, "epoch": 1.0},
    {"eval_loss": 1.3, "eval_accuracy": 0.8, "epoch": 1.0},
    {"eval_loss": None, "eval_accuracy": 0.85, "epoch": 2.0},
]

BY_BIN = [
    {"bin": number, "num_masked_genes": 30**number, **dict.fromkeys(
        ("accuracy", "gene_majority_accuracy", "gene_mean_accuracy", "cell_majority_accuracy", "loss",
         "gene_frequency_loss"), None if number == 2 else number / 7)}
    for number in range(1, 6)
]  # fmt: skip

FIGURES = {
    "confusion": lambda metrics, path: plot_confusion_matrix(metrics["confusion_matrix"], NAMES, path),
    "confusion of many": lambda metrics, path: plot_confusion_matrix(
        np.eye(40).tolist(), list(map(str, range(40))), path
    ),
    "roc": lambda metrics, path: plot_roc_curves(metrics["roc_curves"], path),
    "roc of many": lambda metrics, path: plot_roc_curves(
        {str(number): metrics["roc_curves"]["alpha"] for number in range(40)}, path
    ),
    "masked genes": lambda metrics, path: plot_masked_genes(BY_BIN, path),
    "curves of all": lambda metrics, path: plot_training_curves(
        [*HISTORY, {"loss": 1.1, "epoch": 1.5, "cells_per_second": 300.0}], path, scores=("accuracy", "absent")
    ),
    "curves": lambda metrics, path: plot_training_curves(HISTORY, path, scores=("accuracy",)),
    "curves without scores": lambda metrics, path: plot_training_curves(HISTORY[:1], path),
    "proportions": lambda metrics, path: plot_proportions(
        {"human1": {"alpha": 30, "beta": 12}, "human2": {"alpha": 3}, "human3": {}}, path
    ),
    "comparison": lambda metrics, path: plot_comparison(
        {"ours": {"accuracy": 0.9, "macro_f1": 0.8}, "majority class": {"accuracy": 0.4}}, path
    ),
}


@pytest.mark.parametrize("name", list(FIGURES))
def test_figure_is_a_readable_png_and_nothing_else_is_left(name, metrics, tmp_path):
    FIGURES[name](metrics, tmp_path / "figures" / "figure.png")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["figure.png"]
    with Image.open(tmp_path / "figures" / "figure.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize(
    ("history", "scores", "names"),
    [
        (HISTORY[:1], ("accuracy",), ["Cross-entropy loss", "Learning rate"]),
        (HISTORY, ("accuracy", "absent"), ["Cross-entropy loss", "Score on held-out cells", "Learning rate"]),
        ([{"cells_per_second": 5.0, "epoch": 1}], (), ["Cross-entropy loss", "Training cells a second"]),
    ],
)
def test_curves_have_a_panel_for_what_the_history_holds(history, scores, names):
    panels = _history_panels(history, scores)
    assert [name for name, _ in panels] == names
    assert not any("eval_absent" in curves for _, curves in panels)


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0"), (9_999, "9,999"), (28_000, "28k"), (1.5e7, "15M"), (3e10, "30G")]
)
def test_large_numbers_of_genes_are_shortened(number, shown):
    assert _short_count(number) == shown


@pytest.mark.parametrize(("area", "shown"), [(1.0, "1.000"), (1 - 1e-12, "1.000"), (0.9996, "0.999"), (0.5, "0.500")])
def test_only_a_perfect_class_shows_an_area_of_1(area, shown):
    assert _shown_area(area) == shown


def test_drawing_needs_no_pyplot_and_leaves_the_backend_alone(metrics, tmp_path):
    backend = matplotlib.rcParams._get_backend_or_none()
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_roc_curves(metrics["roc_curves"], tmp_path / "roc.png")
    assert matplotlib.rcParams._get_backend_or_none() == backend
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "metrics.json"
    write_json(target, {"accuracy": 0.5})

    def write_and_fail():
        with written_aside(target) as aside:
            aside.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_and_fail()
    assert read_json(target) == {"accuracy": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
