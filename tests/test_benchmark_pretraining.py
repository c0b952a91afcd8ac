"""The comparison of models with and without pretraining: a small run of it, and its arithmetic."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from small_corpus import TINY_MODEL, make_corpus

from screformer.benchmarks import fine_tuning_runs, fine_tuning_tasks, pretraining
from screformer.benchmarks.fine_tuning_runs import System
from screformer.benchmarks.fine_tuning_tasks import Task, regression_scores
from screformer.benchmarks.pretraining import COMPARED, PRETRAININGS, SYSTEMS, compare_pretraining, main
from screformer.benchmarks.pretraining_report import format_pretraining, summarize_pretraining
from screformer.train.recipes import find_recipe

DONORS = ("human1", "human2", "human3", "human4")


@pytest.fixture
def small(tmp_path: Path, monkeypatch) -> Task:
    """A task of 48 cells of two types, of which the model needs a second."""
    make_corpus(tmp_path)
    task = Task("small", f"{tmp_path}/cells.h5ad", f"{tmp_path}/corpus", "cell_type", "donor", DONORS, ())
    monkeypatch.setattr(pretraining, "make_tasks", lambda work, cells: [task])
    shape = [value.replace(" ", "") for value in [*TINY_MODEL, "gene_space=expressed"]]
    monkeypatch.setattr(fine_tuning_runs, "START", ["--config_overrides", *shape])
    monkeypatch.setattr(pretraining, "START", ["--config_overrides", *shape])
    quick = ["--corpus", "x", "--gene_start", "principal_components", "--max_steps", "2"][2:]
    monkeypatch.setattr(pretraining, "PRETRAININGS", {"vectors": " ".join(quick), "both": " ".join(quick)})
    return task


@pytest.mark.slow  # thirty-six runs
def test_every_donor_number_and_seed_is_run_once_and_summed_up(small, tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--workers", "1"]
    arguments += ["--systems", "small", "small_both", "--shots", "2", "--seeds", "2", "--all-cells-seeds", "1"]
    main(arguments)
    results = json.loads((tmp_path / "out" / "pretraining.json").read_text())
    runs = sorted((tmp_path / "work" / "runs").glob("*.json"))
    assert len(runs) == 4 * (2 + 1) + 2 * 4 * (2 + 1)
    assert sorted(results["scores"]) == ["2", "all"]
    assert results["scores"]["all"]["small_both"] == {
        "num_seeds": 1,
        "macro_f1": {"mean": 1.0, "sd_over_seeds": None, "donors": [1.0] * 4},
        "accuracy": {"mean": 1.0, "sd_over_seeds": None, "donors": [1.0] * 4},
    }
    assert {(row["system"], row["less"]) for row in results["differences"]} == {
        ("small_both", "small"),
        ("small_both", "logistic_regression"),
        ("small", "logistic_regression"),
    }
    text = (tmp_path / "out" / "pretraining.md").read_text()
    assert "| finetune-small on gene vectors, pretrained |" in text
    assert "| both | `--gene_start principal_components --max_steps 2` |" in text
    assert [len(scores) for scores in results["held_out"]["both"]] == [5] * 4
    assert "| both | " in text
    assert (tmp_path / "out" / "pretraining.png").stat().st_size > 5000
    assert str(tmp_path) not in json.dumps(results)
    for donor in DONORS:  # no checkpoint has seen the donor that it is tested on
        told = json.loads((tmp_path / "work" / "checkpoints" / f"small-{donor}-both" / "training.json").read_text())
        assert told["cells"]["exclude_groups"] == [donor]
    # What is there is not run again.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    main(arguments)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}


def test_the_papers_classifier_may_have_fewer_seeds(small, tmp_path, monkeypatch):
    asked = []

    def do_nothing(runs, num_workers, log):
        asked.extend(runs)
        raise ValueError("enough")

    monkeypatch.setattr(pretraining, "do_runs", do_nothing)
    with pytest.raises(ValueError, match="enough"):
        compare_pretraining(
            tmp_path, tmp_path, systems=["small", "paper"], shots=[5], seeds=3, all_cells_seeds=1, paper_seeds=2
        )
    counts = Counter((each.name, each.cells_per_label) for each in asked)
    assert counts == {
        ("logistic_regression", 5): 12, ("logistic_regression", None): 4,
        ("small", 5): 12, ("small", None): 4, ("paper", 5): 8, ("paper", None): 4,
    }  # fmt: skip


def test_the_regression_trains_on_the_drawn_cells(small, monkeypatch):
    fitted = []
    fit = fine_tuning_tasks.logistic_regression

    def fitting(features, train_labels, *rest, **options):
        fitted.append(train_labels.tolist())
        return fit(features, train_labels, *rest, **options)

    monkeypatch.setattr(fine_tuning_tasks, "logistic_regression", fitting)
    assert regression_scores(small, ["human4"])["groups"]["human4"]["accuracy"] == 1
    assert set(regression_scores(small, ["human4"], cells_per_label=3, seed=3)["groups"]) == {"human4"}
    assert [Counter(labels) for labels in fitted] == [{"alpha": 18, "beta": 18}, {"alpha": 3, "beta": 3}]


def run(system: str, seed: int, number: int | None, **groups: float) -> dict:
    scores = {group: {"accuracy": score, "macro_f1": score / 2} for group, score in groups.items()}
    return {"system": system, "seed": seed, "groups": scores, **({} if number is None else {"cells_per_label": number})}


def test_the_arithmetic():
    runs = [run("base", 0, None, a=0.8, b=0.6), run("base", 0, 5, a=0.4, b=0.2), run("base", 1, 5, a=0.2, b=0.4)]
    runs += [run("ours", seed, None, a=1.0 - seed / 10, b=0.6) for seed in range(2)]
    runs += [run("ours", seed, 5, a=0.6, b=0.4) for seed in range(2)]
    results = summarize_pretraining(runs, {"base": "Base", "ours": "Ours"}, [("ours", "base")])
    assert results["scores"]["5"]["base"]["accuracy"] == {"mean": 0.3, "sd_over_seeds": 0.0, "donors": [0.3, 0.3]}
    assert results["scores"]["all"]["ours"]["accuracy"]["mean"] == pytest.approx(0.775)
    spread = round(float(np.std([0.8, 0.75], ddof=1)), 4)
    assert results["scores"]["all"]["ours"]["accuracy"]["sd_over_seeds"] == spread
    found = {(row["cells"], row["score"]): row for row in results["differences"]}
    few = found["5", "accuracy"]
    assert (few["mean"], few["num_donors_better"], few["num_seeds"]) == (pytest.approx(0.2), 2, 2)
    student = ttest_1samp([0.3, 0.1], 0).confidence_interval()
    assert few["interval_95"] == pytest.approx([student.low, student.high], abs=1e-4)  # seeds averaged
    # The one regression on all cells stands for every seed; donor b is no better.
    every = found["all", "accuracy"]
    assert (every["mean"], every["num_donors_better"], every["num_donors"]) == (pytest.approx(0.075), 1, 2)
    student = ttest_1samp([0.15, 0.0], 0).confidence_interval()
    assert every["interval_95"] == pytest.approx([student.low, student.high], abs=1e-4)
    text = format_pretraining({**results, "command": "c", "pretrainings": {}, "arguments": {}, "held_out": {}})
    assert "| Ours | 0.250 ± 0.000 | 0.388 ± 0.018 |" in text
    assert "| Ours | Base | +0.100 (" in text


def test_every_setting_that_is_compared_exists():
    for text in [*PRETRAININGS.values(), *(system.arguments for system in SYSTEMS.values())]:
        name = text.split()[0]
        assert name.startswith("--") or find_recipe(name, "pretrain" if "pretrain" in name else "finetune").exists()
    assert all(system.pretraining in (None, *PRETRAININGS) for system in SYSTEMS.values())
    assert {name for pair in COMPARED for name in pair} <= {"logistic_regression", *SYSTEMS}
    assert all(isinstance(system, System) for system in SYSTEMS.values())


@pytest.mark.parametrize("options", [{"systems": ["big"]}, {"systems": []}, {"seeds": 0}, {"shots": [0]}])
def test_wrong_options_are_refused(small, tmp_path, options):
    with pytest.raises(ValueError, match=r"systems: some of .* at least 1; got"):
        compare_pretraining(tmp_path, tmp_path, **options)
