"""`screformer benchmark --suite`."""

import json
from pathlib import Path

import pytest
from small_corpus import make_cells
from test_protocol import Nearest
from typer.testing import CliRunner

from screformer.benchmarks import suites
from screformer.benchmarks.marker_tables import MarkerTable
from screformer.benchmarks.suites import OF_TABLE, OURS, CellsToCompareOn, known_systems, run_suite
from screformer.benchmarks.system_sccatch import ScCatchOfTable
from screformer.cli import app


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    make_cells(120, types=["alpha", "beta", "duct"]).write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.setattr(suites, "example_cells_path", lambda: tmp_path / "cells.h5ad")
    monkeypatch.setattr(suites, "ScReformerSystem", Nearest)
    monkeypatch.setattr(suites, "SYSTEMS", {"logistic_regression": Nearest})


def test_files_are_named_with_their_columns():
    assert CellsToCompareOn.parse("a.h5ad") == ("a.h5ad", "cell_type", None)
    assert CellsToCompareOn.parse("a.h5ad:kind") == ("a.h5ad", "kind", None)
    assert CellsToCompareOn.parse("a.h5ad::donor") == ("a.h5ad", "cell_type", "donor")


def test_ours_and_all_others_are_known_and_unknown_ones_are_refused():
    assert list(known_systems()) == [OURS, "logistic_regression"]
    with pytest.raises(ValueError, match=r"systems got \['scbert2'\]; there are screformer, logistic_regression"):
        known_systems(["scbert2"])


def test_the_small_suite_holds_out_each_donor(tmp_path):
    options = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, ["benchmark", "--workers", "1", "--suite", "small", *options])
    assert result.exit_code == 0, result.output
    assert "How well do systems name the cell types of cells?" in result.output
    assert "nearest mean" in result.output
    found = json.loads((tmp_path / "out" / "comparison-cells-leave_one_group_out.json").read_text())
    assert (found["kind"], found["num_folds"]) == ("leave_one_group_out", 4)
    assert set(found["systems"]) == {OURS, "logistic_regression"}
    took = json.loads((tmp_path / "out" / "suite-small.json").read_text())
    assert (took["comparisons"], took["num_runs"]) == (["cells, leave_one_group_out"], 8)
    assert took["seconds"] > 0
    CliRunner().invoke(app, ["benchmark", "--workers", "1", "--suite", "small", *options])
    assert json.loads((tmp_path / "out" / "suite-small.json").read_text())["num_runs"] == 0


def test_the_full_suite_takes_files_too(tmp_path):
    make_cells(60, seed=1).write_h5ad(tmp_path / "other.h5ad")
    where = {"output": tmp_path / "out", "work": tmp_path / "work"}
    results = run_suite("full", cells=[str(tmp_path / "other.h5ad")], systems=[OURS], **where)
    assert [(result["data"], result["kind"]) for result in results] == [
        ("cells", "leave_one_group_out"), ("cells", "five_fold"), ("other", "five_fold")
    ]  # fmt: skip
    own = run_suite("full", kinds=["leave_one_group_out"], systems=[OURS], **where)
    assert [(result["data"], result["kind"]) for result in own] == [("cells", "leave_one_group_out")]
    for suite, cells in (("small", ["a.h5ad"]), ("across", ["a.h5ad"])):
        with pytest.raises(ValueError, match=rf"suite='{suite}' got the files"):
            run_suite(suite, cells=cells, **where)


def test_other_folds_and_split_files_are_taken(tmp_path):
    where = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    done = CliRunner().invoke(app, ["benchmark", "--workers", "1", "--suite", "small", "--kind", "random", *where])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "comparison-cells-random.json").read_text())
    assert (found["kind"], found["num_folds"]) == ("random", 1)
    assert found["command"] == "screformer benchmark --suite small --kind random --workers 1 --seeds 1"
    assert found["runs"][0]["num_cells"] == {"train": 96, "test": 24}
    split = json.loads((tmp_path / "out" / "comparison-cells-random-split.json").read_text())
    fold = split["folds"][0]
    fold["train"], fold["test"] = fold["train"] + fold["test"][10:], fold["test"][:10]
    (tmp_path / "mine.json").write_text(json.dumps(split | {"seed": 7}))
    (result,) = run_suite("small", splits=[tmp_path / "mine.json"], output=tmp_path / "mine", work=tmp_path / "work")
    assert (result["kind"], result["runs"][0]["num_cells"]["test"]) == ("random", 10)
    kept = json.loads((tmp_path / "mine" / "comparison-cells-random-split.json").read_text())
    assert (kept["folds"], kept["seed"]) == (split["folds"], 7)
    (tmp_path / "mine.json").write_text(json.dumps(split | {"data": "others"}))
    with pytest.raises(ValueError, match=r"splits are of \['others'\]; the cells are cells"):
        run_suite("small", splits=[tmp_path / "mine.json"], output=tmp_path, work=tmp_path)


def test_two_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    make_cells(60, seed=1).write_h5ad(tmp_path / "other" / "cells.h5ad")
    with pytest.raises(ValueError, match=r"several files are called cells, and results are kept by name; rename one"):
        run_suite("full", cells=[str(tmp_path / "other" / "cells.h5ad")], output=tmp_path / "out", work=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_marker_table_is_for_the_system_that_needs_one(tmp_path, monkeypatch):
    systems = {"logistic_regression": Nearest, OF_TABLE: ScCatchOfTable}
    monkeypatch.setattr(suites, "SYSTEMS", systems)
    made = []

    def compare(data, systems, **where):
        made.append(systems[OF_TABLE]()._table)
        return {"data": data.name, "kind": where["kind"], "systems": systems}

    monkeypatch.setattr(suites, "compare_systems", compare)
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "types.json"):
        Path(name).write_text("{}")
    where = {"output": tmp_path / "out", "work": tmp_path / "work"}
    run_suite("small", **where)
    run_suite("small", marker_table="a.csv:Gut,Skin", marker_types="types.json", **where)
    assert made == [None, MarkerTable("a.csv", ("Gut", "Skin"), "types.json")]
    # Another content is another run.
    before = made[1].describe()
    Path("a.csv").write_text("[]")
    assert made[1].describe() != before
    for options in ({"marker_types": "types.json"}, {"marker_table": "a.csv", "systems": [OURS]}):
        with pytest.raises(ValueError, match="belong together and to 'sccatch_cellmatch'"):
            run_suite("small", **options)


def test_a_marker_table_can_be_named_on_the_command_line(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(suites, "run_suite", lambda *args, **options: given.update(options) or [])
    options = ["--marker-table", str(tmp_path / "a.csv:Gut"), "--marker-types", str(tmp_path / "types.json")]
    result = CliRunner().invoke(app, ["benchmark", "--workers", "1", "--suite", "small", *options])
    assert result.exit_code == 0, result.output
    assert given["marker_table"] == str(tmp_path / "a.csv:Gut")
    assert given["marker_types"] == tmp_path / "types.json"
    assert "--marker-table a.csv:Gut --marker-types types.json" in given["command"]


def test_the_map_of_pbmc_labels_gives_both_files_the_same_names():
    maps = json.loads(Path(suites.__file__).with_name("label_map_pbmc.json").read_text())
    first, second = ({label for label in each.values() if label != suites.UNMAPPED} for each in maps.values())
    assert first == second
    assert len(first) == 6


def test_training_on_one_file_and_testing_on_another(tmp_path, monkeypatch):
    monkeypatch.setattr("screformer.benchmarks.labelled_data.MIN_SHARED_GENES", 10)
    make_cells(60, seed=1, types=["A", "B", "C"]).write_h5ad(tmp_path / "other.h5ad")
    (tmp_path / "map.json").write_text('{"other": {"A": "alpha", "B": "beta", "C": "unmapped"}}')
    options = ["--cells", str(tmp_path / "cells.h5ad"), "--cells", str(tmp_path / "other.h5ad")]
    options += ["--label-map", str(tmp_path / "map.json"), "--few-labels", "3"]
    options += ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    result = CliRunner().invoke(app, ["benchmark", "--workers", "1", "--suite", "across", *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "comparison-cells+other-leave_one_group_out.json").read_text())
    assert found["command"] == (
        "screformer benchmark --suite across --cells cells.h5ad --cells other.h5ad --few-labels 3 --label-map map.json "
        "--workers 1 --seeds 1"
    )
    assert {run["fold"] for run in found["runs"]} == {"cells", "other"}
    assert found["systems"][OURS]["label_names"] == ["alpha", "beta"]
    assert (tmp_path / "out" / "few-labels-cells+other-leave_one_group_out.json").exists()


def test_without_a_suite_or_a_command_the_help_is_shown():
    assert "--suite" in CliRunner().invoke(app, ["benchmark"]).output
    result = CliRunner().invoke(app, ["benchmark", "--seeds", "2"])
    assert result.exit_code == 1
    assert "--suite small, full or across" in result.output


SMALL_SUITE = Path(__file__).parents[1] / "benchmarks" / "results" / "suite-small.json"


@pytest.mark.skipif(not SMALL_SUITE.exists(), reason="no checkout")
def test_the_small_suite_was_measured_in_minutes_on_two_cores_as_the_readme_says():
    took = json.loads(SMALL_SUITE.read_text())
    assert took["command"] == "screformer benchmark --suite small --seeds 1"
    assert took["num_runs"] == 4 * len(took["systems"])  # nothing was there before
    assert took["comparisons"] == ["pancreas_baron2016, leave_one_group_out"]
    assert OURS in took["systems"]
    assert len(took["systems"]) >= 9
    assert (took["device"]["threads"], took["num_workers"]) == (2, 2)
    assert took["seconds"] < 15 * 60
    text = " ".join((SMALL_SUITE.parents[2] / "README.md").read_text(encoding="utf-8").split())
    assert f"({took['seconds'] / 60:.0f} minutes on two cores)" in text
