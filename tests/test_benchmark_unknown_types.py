"""The comparison on types left out of training: its arithmetic, its measures, and a small run of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_corpus import TINY_RECIPE, make_cells, make_corpus

from screformer.benchmarks import fine_tuning_runs, unknown_types, unknown_types_runs
from screformer.benchmarks.fine_tuning_runs import System
from screformer.benchmarks.fine_tuning_tasks import Task
from screformer.benchmarks.unknown_types import compare_unknown_types, main
from screformer.benchmarks.unknown_types_candidates import COMBINATIONS, Cells, logit_measures, measure_candidates
from screformer.benchmarks.unknown_types_report import MODEL_SOFTMAX, format_unknown_types, summarize_unknown_types
from screformer.benchmarks.unknown_types_runs import SHIPPED, read_cells

DONORS = ("human1", "human2", "human3", "human4")


@pytest.fixture
def small(tmp_path: Path, monkeypatch) -> Task:
    """A task of 192 cells of four types, of which the model needs a second."""
    make_corpus(tmp_path, cells=make_cells(192, types=["alpha", "beta", "delta", "gamma"]))
    task = Task("small", f"{tmp_path}/cells.h5ad", f"{tmp_path}/corpus", "cell_type", "donor", DONORS, ())
    monkeypatch.setattr(unknown_types, "make_tasks", lambda work, cells: [task])
    monkeypatch.setattr(unknown_types_runs, "CLASSIFIER", System("quick", TINY_RECIPE))
    monkeypatch.setattr(fine_tuning_runs, "START", [])
    return task


def test_every_type_and_donor_is_left_out_once_and_summed_up(small, tmp_path):
    work = tmp_path / "work"
    arguments = ["--output", str(tmp_path / "out"), "--work", str(work), "--workers", "1"]
    others = make_cells(30, seed=5, types=["alpha", "beta", "delta", "gamma", "other"])
    others[others.obs["cell_type"] == "other"].copy().write_h5ad(tmp_path / "others.h5ad")
    arguments += ["--classifier-donors", "human4", "--cells", str(tmp_path / "others.h5ad")]
    main(arguments)
    results = json.loads((tmp_path / "out" / "unknown_types.json").read_text())
    made = {kind: sorted(path.name for path in (work / kind).iterdir()) for kind in ("measures", "classifiers")}
    assert {kind: len(names) for kind, names in made.items()} == {"measures": 17, "classifiers": 4}
    assert made["classifiers"] == [f"small-human4-{name}.json" for name in ("alpha", "beta", "delta", "gamma")]
    assert not list((work / "runs").iterdir())
    # A type's six genes are in no other type: every cell of it has a gene of its own.
    ours = results["systems"][SHIPPED]
    assert ours["all"]["auroc"] == ours["confirmed_by"]["auroc"] == 1
    assert results["systems"][MODEL_SOFTMAX]["all"] is None  # of human4 alone
    assert results["called_unknown"][f"{SHIPPED} below 0.05"]["unknown"] > 0.5
    assert results["other_cells"]["auroc"][SHIPPED] == 1
    assert (results["other_cells"]["num_known"], results["other_cells"]["num_unknown"]) == (48, 6)
    text = (tmp_path / "out" / "unknown_types.md").read_text()
    assert "| **the detector** (one-vs-rest + gene excess) | 1.000 | 1.000 | 1.000 |" in text
    assert "## Cells of another tissue, others" in text
    assert (tmp_path / "out" / "unknown_types.png").stat().st_size > 5000
    assert str(tmp_path) not in json.dumps(results)
    # What is there is not run again.
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    main(arguments)
    assert before == {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}


def test_no_measure_depends_on_the_other_cells_asked_about(small):
    cells = read_cells(small)
    is_test, is_unknown = cells.donors == "human4", cells.labels == "gamma"
    train = Cells(*(values[~is_test & ~is_unknown] for values in cells))
    together, alone = (measure_candidates(train, cells.levels[is_test][:number]) for number in (48, 7))
    assert set(together) >= {*COMBINATIONS, "softmax", "energy", "mahalanobis_128", "gene_excess_1", "residual_64"}
    for name, values in together.items():
        assert values.shape == (48,), name
        assert np.isfinite(values).all(), name
        np.testing.assert_allclose(values[:7], alone[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_measures_of_logits():
    logits = np.log([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])
    found = logit_measures(logits)
    np.testing.assert_allclose(1 / (1 + np.exp(-found["softmax"])), [0.3, 0.6])
    np.testing.assert_allclose(found["margin"], np.log([0.2 / 0.7, 0.35 / 0.4]))
    np.testing.assert_allclose(found["energy"], 0, atol=1e-12)
    np.testing.assert_allclose(found["max_logit"], -np.log([0.7, 0.4]))
    assert found["entropy"][0] == pytest.approx(-(logits[0] * np.exp(logits[0])).sum())


def run(donor: str, cell_type: str, num_unknown: int, **auroc: float) -> dict:
    return {
        "donor": donor,
        "cell_type": cell_type,
        "num_unknown": num_unknown,
        "num_known": 10,
        "auroc": auroc,
        "found_at_5_percent": {name: value / 2 for name, value in auroc.items()},
        "share_below": {kind: {"0.01": 0.1, "0.05": 0.2} for kind in ("known", "unknown")},
        "share_below_half": {"known": 0.25, "unknown": 0.75},
    }


def test_the_arithmetic():
    measures = [
        run("human1", "a", 10, detector=0.9, softmax=0.7),
        run("human3", "a", 30, detector=0.8, softmax=0.8),
        run("human4", "a", 10, detector=0.6, softmax=0.4),
        run("human3", "b", 10, detector=1.0, softmax=0.7),
        run("human3", "few", 2, detector=0.5, softmax=0.6),
    ]
    classifiers = [
        run(each["donor"], each["cell_type"], each["num_unknown"], **{MODEL_SOFTMAX: 0.5}) for each in measures[1:]
    ]
    results = summarize_unknown_types(measures, classifiers, common=["a", "b"], confirmed_by=["human3", "human4"])
    ours = results["systems"]["detector"]
    assert ours["chosen_by"]["auroc"] == 0.9
    assert ours["confirmed_by"]["types"] == {"a": 0.75, "b": 1.0}  # 0.8 thrice and 0.6 once
    assert ours["all"]["types"]["a"] == pytest.approx((0.9 + 3 * 0.8 + 0.6) / 5)
    assert ours["confirmed_by"]["found_at_5_percent"] == pytest.approx(0.875 / 2, abs=1e-4)
    assert ours["rare"]["auroc"] == 0.5
    assert results["systems"][MODEL_SOFTMAX]["all"] is None
    difference = results["differences"][f"detector - {MODEL_SOFTMAX}"]
    assert difference["all"] is None
    assert difference["confirmed_by"] == {"mean": 0.375, "interval_95": [0.25, 0.5], "types_lost": []}
    assert results["differences"]["detector - softmax"]["rare"]["types_lost"] == ["few"]
    assert results["called_unknown"] == {
        "detector below 0.01": {"known": 0.1, "unknown": 0.1},
        "detector below 0.05": {"known": 0.2, "unknown": 0.2},
        f"{MODEL_SOFTMAX} below 0.5": {"known": 0.25, "unknown": 0.75},
    }
    text = format_unknown_types({**results, "min_cells": 5, "command": "c", "selection": "By chance."})
    assert "| the detector (one-vs-rest + gene excess) less the classifier's softmax | human3, human4 | +0.375" in text
    assert "| 1 of 1: few |" in text
    assert "By chance." in text
    assert "| a | 0.750 | 0.500 | 0.700 |" in text


@pytest.mark.parametrize("options", [{"min_cells": 0}, {"classifier_donors": ["human9"]}])
def test_wrong_options_are_refused(small, tmp_path, options):
    with pytest.raises(ValueError, match="min_cells: at least 1, classifier_donors: some of"):
        compare_unknown_types(tmp_path, tmp_path, **options)
