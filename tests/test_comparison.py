"""The table of a comparison: its arithmetic, and what is left out."""

import json

import pytest
from small_corpus import make_cells
from test_protocol import Nearest

from screformer.benchmarks.comparison import compare_systems, format_comparison, summarize_systems
from screformer.benchmarks.protocol import read_labelled_data


class Missing(Nearest):
    title = "missing"

    def fit(self, adata, labels, *, groups=None, seed=0):
        raise ImportError("nowhere is not installed: pip install nowhere")


def run_of(system, fold, macro_f1, *, seed=0, auc=None):
    scores = {"accuracy": macro_f1, "macro_f1": macro_f1, "balanced_accuracy": macro_f1, "macro_auc": auc}
    cost = {"fit_seconds": 1.0, "predict_seconds": 0.5, "rejected": 0.0, "peak_bytes": 2_000_000}
    return {"system": system, "title": system, "fold": fold, "seed": seed, **scores, **cost}


def test_systems_run_on_all_folds_and_missing_ones_are_named(tmp_path):
    make_cells(120, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    data = read_labelled_data(tmp_path / "cells.h5ad", group_column="donor")
    results = compare_systems(
        data,
        {"logistic_regression": Nearest, "nearest": Nearest, "missing": Missing},
        kind="leave_one_group_out",
        output=tmp_path / "out",
        work=tmp_path / "work",
        seeds=2,
    )
    assert len(results["runs"]) == 2 * 4 * 2
    assert list(results["left_out"]) == ["missing"]
    assert results["systems"]["nearest"]["less_baseline"]["macro_f1"] == 0
    assert json.loads((tmp_path / "out" / "comparison-cells.json").read_text()) == results
    text = (tmp_path / "out" / "comparison-cells.md").read_text()
    assert "**Weak set**" in text
    assert "Left out: missing (nowhere is not installed: pip install nowhere" in text
    assert "4 folds, 2 seeds" in text
    assert (tmp_path / "out" / "comparison-cells.png").exists()
    assert json.loads((tmp_path / "out" / "comparison-cells-split.json").read_text())["kind"] == "leave_one_group_out"
    with pytest.raises(ValueError, match="seeds got 0"):
        compare_systems(data, {}, kind="random", output=tmp_path, work=tmp_path, seeds=0)


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


def test_one_fold_has_no_interval():
    (row,) = summarize_systems([run_of("ours", "a", 0.5)]).values()
    assert row["macro_f1_sd"] is None
    results = {
        "question": "?",
        "date": "d",
        "command": "c",
        "kind": "random",
        "num_folds": 1,
        "seeds": 1,
        "left_out": {},
    }
    results |= {"versions": {"screformer": "1"}, "systems": {"ours": row}}
    assert "| ours | 0.500 | 0.500 | - |  | - | 1.0 | 2 |" in format_comparison(results)
