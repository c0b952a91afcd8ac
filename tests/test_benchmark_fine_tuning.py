"""The comparison of fine-tuned models with logistic regression: its tasks, its arithmetic, and a small run of it."""

import json
from pathlib import Path

import anndata
import numpy as np
import pytest
from small_corpus import TINY_RECIPE, make_cells, make_corpus

from screformer.benchmarks import fine_tuning, fine_tuning_runs
from screformer.benchmarks.fine_tuning import SYSTEMS, System, compare_fine_tuning, main
from screformer.benchmarks.fine_tuning_report import format_fine_tuning, summarize
from screformer.benchmarks.fine_tuning_tasks import Task, deal_into_folds, score_labels
from screformer.train.recipes import find_recipe

DONORS = ("human1", "human2", "human3", "human4")


@pytest.fixture
def small(tmp_path: Path, monkeypatch) -> Task:
    """A task of 48 cells of two types, of which the model needs a second."""
    make_corpus(tmp_path)
    task = Task("small", f"{tmp_path}/cells.h5ad", f"{tmp_path}/corpus", "cell_type", "donor", DONORS, ())
    monkeypatch.setattr(fine_tuning, "make_tasks", lambda work, cells: [task])
    monkeypatch.setitem(SYSTEMS, "small", System("quick", TINY_RECIPE))
    monkeypatch.setattr(fine_tuning_runs, "START", [])
    return task


def test_every_fold_and_seed_is_run_once_and_summed_up(small, tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--systems", "small"]
    main([*arguments, "--seeds", "2", "--workers", "1"])
    results = json.loads((tmp_path / "out" / "fine_tuning.json").read_text())
    runs = sorted(path.name for path in (tmp_path / "work" / "runs").iterdir())
    assert len(runs) == 4 + 2 * 4
    assert all(name.endswith(".json") for name in runs)
    ours = results["tasks"]["small"]["small"]
    assert (ours["num_seeds"], sorted(ours["groups"])) == (2, list(DONORS))
    assert ours["macro_f1"] == 1  # two types that differ in six genes each: it starts as the regression
    assert results["tasks"]["small"]["logistic_regression"]["macro_f1"] == 1
    assert "| quick | 2 | 1.000 | 1.000 |" in (tmp_path / "out" / "fine_tuning.md").read_text()
    assert (tmp_path / "out" / "fine_tuning.png").stat().st_size > 5000
    assert str(tmp_path) not in (tmp_path / "out" / "fine_tuning.json").read_text()
    # What is there is not run again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "runs").iterdir()}
    main([*arguments, "--seeds", "2", "--workers", "1"])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "runs").iterdir()}


def test_trials_test_two_donors_of_every_pair_trained_on(small, tmp_path):
    results = compare_fine_tuning(
        tmp_path / "out", tmp_path / "work", systems=["small"], seeds=1, is_trial=True, num_workers=1
    )
    assert len(results["runs"]) == 2 * 6
    tested = [tuple(run["groups"]) for run in results["runs"] if run["system"] == "small"]
    assert sorted(tested) == sorted((first, second) for at, first in enumerate(DONORS) for second in DONORS[at + 1 :])
    assert (tmp_path / "out" / "fine_tuning_trials.md").exists()


def run(system: str, seed: int, **groups: float) -> dict:
    scores = {group: {"accuracy": score, "macro_f1": score / 2} for group, score in groups.items()}
    return {"task": "t", "system": system, "seed": seed, "groups": scores, "training_seconds": 2.0 + seed}


def test_the_arithmetic():
    runs = [run("base", 0, a=0.8, b=0.6), run("ours", 0, a=1.0, b=0.6), run("ours", 1, a=0.8, b=0.8)]
    runs += [run("ours", 2, a=0.6, b=0.6)]
    results = summarize(runs, {"base": "Base", "ours": "Ours"}, baseline="base")
    ours = results["tasks"]["t"]["ours"]
    assert ours["accuracy"] == pytest.approx(np.mean([0.8, 0.8, 0.6]), abs=1e-4)
    assert ours["macro_f1"] == pytest.approx(np.mean([0.4, 0.4, 0.3]), abs=1e-4)
    assert ours["sd_over_seeds"]["accuracy"] == pytest.approx(np.std([0.8, 0.8, 0.6], ddof=1), abs=1e-4)
    assert ours["groups"]["a"]["accuracy"] == pytest.approx(0.8)
    assert ours["training_seconds"] == 3.0
    difference = ours["difference"]["accuracy"]
    assert difference["mean"] == pytest.approx(2.2 / 3 - 0.7, abs=1e-4)
    low, high = difference["interval_95"]
    assert low == pytest.approx(-0.1, abs=1e-3)
    assert high == pytest.approx(0.1, abs=1e-3)
    text = format_fine_tuning({**results, "is_trial": False, "command": "c", "selection": "By chance."})
    assert "By chance." in text
    assert "| Ours | 3 | 0.733 | 0.367 | 0.058 | +0.017 (-0.050 to +0.050) | 0.800 / 0.400 | 0.667 / 0.333 |" in text


def test_folds_are_stratified_and_hold_every_cell_once(tmp_path):
    cells = make_cells(50)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    deal_into_folds(tmp_path / "cells.h5ad", tmp_path / "folds.h5ad")
    dealt = anndata.read_h5ad(tmp_path / "folds.h5ad")
    assert dealt.obs.groupby(["fold", "cell_type"], observed=True).size().to_list() == [5] * 10


def test_labels_that_are_not_met_in_training_are_errors():
    assert score_labels(["a", "a", "b"], ["a", "c", "b"])["accuracy"] == pytest.approx(2 / 3)


def test_every_recipe_of_a_system_exists():
    for system in SYSTEMS.values():
        name = system.arguments.split()[0]
        assert name.startswith("--") or find_recipe(name, "finetune").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"systems": ["big"]}, "systems: some of"),
        ({"seeds": 0}, "seeds: at least 1; got"),
    ],
)
def test_wrong_options_are_refused(small, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare_fine_tuning(tmp_path, tmp_path, **options)
