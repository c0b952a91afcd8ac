"""The table of a comparison: its arithmetic, and what is left out."""

import json
import re
from importlib.metadata import version

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from sklearn.metrics import f1_score
from small_corpus import make_cells
from test_protocol import Nearest

from screformer.benchmarks.cell_type_systems import NamedCells
from screformer.benchmarks.comparison import compare_systems
from screformer.benchmarks.comparison_statistics import (
    difference_spread,
    paired_tests,
    pool_cells,
    pooled_macro_f1,
    spread,
    summarize_systems,
)
from screformer.benchmarks.few_labels import compare_with_few_labels
from screformer.benchmarks.labelled_data import read_labelled_data
from screformer.benchmarks.protocol import Predictions
from screformer.benchmarks.system_sccatch import ScCatchOfTable
from screformer.benchmarks.systems_simple import MajorityClass, NearestNeighbors


class Missing(Nearest):
    title = "missing"

    def fit(self, adata, labels, *, groups=None, seed=0):
        raise ImportError("nowhere is not installed: pip install nowhere")


class Particular(Nearest):
    title = "particular"

    def fit(self, adata, labels, *, groups=None, seed=0):
        if groups is not None and "d1" not in groups:
            raise ValueError("each of labels needs at least 2 cells")
        super().fit(adata, labels, groups=groups, seed=seed)


def run_of(system, fold, macro_f1, *, seed=0, auc=None):
    scores = {"accuracy": macro_f1, "macro_f1": macro_f1, "balanced_accuracy": macro_f1, "macro_auc": auc}
    cost = {"fit_seconds": 1.0, "predict_seconds": 0.5, "rejected": 0.0, "peak_bytes": 2_000_000}
    scores |= {"expected_calibration_error": None, "f1": {"alpha": macro_f1}}
    return {"system": system, "title": system, "is_inductive": True, "fold": fold, "seed": seed, **scores, **cost}


def test_systems_run_on_all_folds_and_missing_ones_are_named(tmp_path):
    make_cells(120, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    data = read_labelled_data(tmp_path / "cells.h5ad", group_column="donor")
    results = compare_systems(
        data,
        {"logistic_regression": Nearest, "particular": Particular, "nearest": Nearest, "missing": Missing},
        kind="leave_one_group_out",
        output=tmp_path / "out",
        work=tmp_path / "work",
        seeds=2,
        note="Another program ran beside it.",
    )
    assert len(results["runs"]) == 2 * 4 * 2
    assert list(results["left_out"]) == ["particular", "missing"]
    assert results["left_out"]["particular"] == "each of labels needs at least 2 cells"
    (made,) = results["made_with"]
    assert (made["num_runs"], made["dates"]) == (16, [results["date"]])
    assert made["versions"]["screformer"] == version("screformer")
    assert results["versions"]["networkx"] == version("networkx")
    assert results["systems"]["nearest"]["less_baseline"]["macro_f1"] == 0
    assert json.loads((tmp_path / "out" / "comparison-cells-leave_one_group_out.json").read_text()) == results
    text = (tmp_path / "out" / "comparison-cells-leave_one_group_out.md").read_text()
    assert re.search(r"Runs: 16 of .* threads\. Another program ran beside it\.", text)
    assert "**Weak set**" in text
    assert "Left out: missing (nowhere is not installed: pip install nowhere" in text
    assert "4 folds, 2 seeds" in text
    assert (tmp_path / "out" / "comparison-cells-leave_one_group_out.png").exists()
    assert (
        json.loads((tmp_path / "out" / "comparison-cells-leave_one_group_out-split.json").read_text())["kind"]
        == "leave_one_group_out"
    )
    with pytest.raises(ValueError, match="seeds got 0"):
        compare_systems(data, {}, kind="random", output=tmp_path, work=tmp_path, seeds=0)


def test_runs_at_once_find_what_runs_one_by_one_do(tmp_path):
    make_cells(120, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    data = read_labelled_data(tmp_path / "cells.h5ad", group_column="donor")
    systems = {"sccatch_cellmatch": ScCatchOfTable, "knn": NearestNeighbors, "majority_class": MajorityClass}
    found = {}
    for num_workers in (1, 2):
        where = {"output": tmp_path / f"out{num_workers}", "work": tmp_path / f"work{num_workers}"}
        found[num_workers] = compare_systems(
            data, systems, kind="leave_one_group_out", num_workers=num_workers, **where
        )
    keys = ("system", "fold", "seed", "macro_f1", "accuracy")
    alone, at_once = ([[run[key] for key in keys] for run in found[number]["runs"]] for number in (1, 2))
    assert alone == at_once
    assert len(alone) == 8
    assert found[2]["left_out"] == found[1]["left_out"]
    assert list(found[2]["left_out"]) == ["sccatch_cellmatch"]
    assert found[2]["made_with"][0]["device"].endswith("1 threads, 2 runs at once")
    assert "at once" not in found[1]["made_with"][0]["device"]


def test_seeds_are_averaged_within_folds_and_differences_are_paired():
    runs = [run_of("logistic_regression", fold, value) for fold, value in (("a", 0.5), ("b", 0.9))]
    runs += [run_of("ours", "a", 0.5, seed=0), run_of("ours", "a", 0.7, seed=1), run_of("ours", "b", 1.0, auc=0.9)]
    found = summarize_systems(runs)
    assert list(found) == ["ours", "logistic_regression"]
    ours = found["ours"]
    assert ours["macro_f1"] == pytest.approx(0.8)
    assert ours["macro_f1_sd"] == pytest.approx(0.2 * 2**0.5)
    assert ours["macro_f1_interval"] == pytest.approx([0.6, 1.0])
    # Both folds gain 0.1: the interval of the difference is narrow where those of the scores are wide.
    assert ours["less_baseline"]["macro_f1_interval"] == pytest.approx([0.1, 0.1])
    assert "less_baseline" not in found["logistic_regression"]
    assert ours["macro_auc"] == 0.9  # of the fold where it is known
    assert ours["peak_megabytes"] == 2


def test_the_interval_of_differences_is_students():
    values = np.array([0.041, 0.003, 0.021, -0.010, 0.021, np.nan])
    known = values[:5]
    found = difference_spread("macro_f1", values)
    expected = ttest_1samp(known, 0).confidence_interval()
    assert found["macro_f1_interval"] == pytest.approx([expected.low, expected.high])
    assert found["macro_f1_interval"][0] < 0 < spread("macro_f1", values)["macro_f1_interval"][0]
    assert difference_spread("macro_f1", values[:1])["macro_f1_interval"] is None


def test_differences_of_nothing_are_claimed_in_one_of_twenty_cases():
    draws = np.random.default_rng(0).normal(size=(2000, 5))
    by = {"student": difference_spread, "percentile": spread}
    outside = {
        name: np.mean([not low <= 0 <= high for low, high in (of("d", row)["d_interval"] for row in draws[:300])])
        for name, of in by.items()
    }
    assert outside["student"] == pytest.approx(0.05, abs=0.03)
    assert outside["percentile"] > 0.1


def test_a_type_with_one_cell_in_a_fold_weighs_as_one_cell_in_all_of_them():
    folds = [
        said([f"{fold}{cell}" for cell in range(5)], ["a", "a", "a", "a", "b"], ["a", "a", "a", "a", label])
        for fold, label in enumerate(("a", "b", "b", ""))
    ]
    truth = [label for fold in folds for label in fold.truth]
    given = [label for fold in folds for label in fold.named.labels]
    expected = f1_score(truth, given, labels=["a", "b"], average="macro")
    assert pooled_macro_f1(pool_cells(folds)) == pytest.approx(expected)


def test_one_fold_has_no_interval():
    (row,) = summarize_systems([run_of("ours", "a", 0.5)]).values()
    assert row["macro_f1_sd"] is None
    assert row["macro_f1_interval"] is None
    assert row["f1"] == {"alpha": 0.5}


def said(cells, truth, labels, scores=None, classes=("a", "b")):
    named = NamedCells(labels, None if scores is None else np.array(scores, dtype=np.float32), classes)
    return Predictions(cells, truth, named)


def test_pairs_are_tested_over_folds_and_over_cells():
    runs = [run_of("x", fold, value) for fold, value in zip("abcd", [0.9, 0.8, 0.9, 0.7], strict=True)]
    runs += [run_of("y", fold, value) for fold, value in zip("abcd", [0.7, 0.7, 0.8, 0.6], strict=True)]
    runs += [run_of("z", fold, value) for fold, value in zip("abcd", [0.7, 0.7, 0.8, 0.6], strict=True)]
    cells, truth = [f"c{number}" for number in range(12)], ["a"] * 12
    predictions = {
        "x": [said(cells, truth, ["a"] * 11 + ["b"])],
        "y": [said(cells, truth, ["b"] * 10 + ["a", "a"])],
        "z": [said(cells, truth, ["b"] * 10 + ["a", "a"])],
    }
    rows = {(row["first"], row["second"]): row for row in paired_tests(runs, predictions)}
    found = rows["x", "y"]
    assert found["macro_f1"] == pytest.approx(0.125)
    assert found["p_folds"] == pytest.approx(2 / 16)  # all four signs alike, either way
    assert (found["only_first_right"], found["only_second_right"]) == (10, 1)
    assert found["p_cells"] == pytest.approx(2 * (1 + 11) / 2**11)
    assert found["p_cells_adjusted"] == pytest.approx(found["p_cells"] * 3 / 2)  # two of three pairs have it
    same = rows["y", "z"]
    assert (same["macro_f1"], same["p_folds"], same["p_cells"], same["p_cells_adjusted"]) == (0, 1, 1, 1)


def test_all_test_cells_together():
    folds = [
        said(["1", "2"], ["a", "b"], ["a", ""], [[0.9, 0.1], [0.3, 0.7]]),
        said(["3", "4"], ["b", "b"], ["b", "a"], [[0.2, 0.8], [0.6, 0.4]]),
    ]
    found = pool_cells(folds)
    assert found["label_names"] == ["(none)", "a", "b"]
    assert found["confusion_matrix"] == [[0, 0, 0], [0, 1, 0], [1, 1, 1]]
    assert found["roc_curves"]["a"]["auc"] == 1
    assert [(bin["num_cells"], bin["accuracy"]) for bin in found["reliability"]] == [(1, 0), (1, 0), (1, 1), (1, 1)]
    without = pool_cells([said(["1", "2"], ["a", "b"], ["a", "b"])])
    assert without["roc_curves"] == {"a": None, "b": None}
    assert without["reliability"] is None


def test_few_labels_make_a_curve(tmp_path):
    make_cells(120, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    data = read_labelled_data(tmp_path / "cells.h5ad", group_column="donor")
    where = {"kind": "leave_one_group_out", "output": tmp_path / "out", "work": tmp_path / "work"}
    systems = {"nearest": Nearest, "logistic_regression": Nearest, "missing": Missing}
    results = compare_with_few_labels(data, systems, [5, 1], **where)
    assert list(results["points"]) == ["1", "5"]
    assert results["points"]["5"]["nearest"]["macro_f1"] > 0.9
    assert list(results["left_out"]) == ["missing"]
    text = (tmp_path / "out" / "few-labels-cells-leave_one_group_out.md").read_text()
    assert "| system | 1 a type | 5 a type |" in text
    assert "(+0.000)" in text
    assert (tmp_path / "out" / "few-labels-cells-leave_one_group_out.png").exists()
    with pytest.raises(ValueError, match="numbers is empty"):
        compare_with_few_labels(data, systems, [], **where)
