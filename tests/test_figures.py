import json
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from screformer.train.figures import (
    _shown_area,
    plot_comparison,
    plot_confusion_matrix,
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

FIGURES = {
    "confusion": lambda metrics, path: plot_confusion_matrix(metrics["confusion_matrix"], NAMES, path),
    "confusion of many": lambda metrics, path: plot_confusion_matrix(
        np.eye(40).tolist(), list(map(str, range(40))), path
    ),
    "roc": lambda metrics, path: plot_roc_curves(metrics["roc_curves"], path),
    "roc of many": lambda metrics, path: plot_roc_curves(
        {str(number): metrics["roc_curves"]["alpha"] for number in range(40)}, path
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
