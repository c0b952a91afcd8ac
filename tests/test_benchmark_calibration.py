"""The comparison of calibrations: a small run of it, and its arithmetic."""

import json

import pytest
from small_corpus import TINY_MODEL, make_corpus

from screformer.benchmarks import calibration, fine_tuning_runs
from screformer.benchmarks.calibration import ASKED, SOURCES, main
from screformer.benchmarks.calibration_report import format_calibrations, summarize_calibrations
from screformer.benchmarks.fine_tuning_runs import System
from screformer.benchmarks.fine_tuning_tasks import Task

DONORS = ("human1", "human2", "human3", "human4")


@pytest.fixture
def small(tmp_path, monkeypatch):
    make_corpus(tmp_path)
    task = Task("small", f"{tmp_path}/cells.h5ad", f"{tmp_path}/corpus", "cell_type", "donor", DONORS, ())
    monkeypatch.setattr(calibration, "make_tasks", lambda work, cells: [task])
    shape = " ".join(value.replace(" ", "") for value in [*TINY_MODEL, "gene_space=expressed"])
    monkeypatch.setattr(calibration, "SMALL", System("quick", f"finetune-small --config_overrides {shape}"))
    monkeypatch.setattr(fine_tuning_runs, "START", [])
    return task


def test_every_donor_is_asked_with_every_source_and_nothing_is_run_twice(small, tmp_path):
    given = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--seeds", "1", "--workers", "1"]
    main(given)
    results = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert sorted(run["group"] for run in results["runs"]) == list(DONORS)
    for run in results["runs"]:
        assert run["calibrated_on"] == "training cells, each by a regression of the other groups"
        assert list(run["sources"]) == list(SOURCES)
        for found in run["sources"].values():
            assert [row["asked"] for row in found["answers"]] == list(ASKED)
            assert found["error_of_all"] == 0  # the types differ plainly
    # 28 training cells without an error vouch for one error in 29, eight validation cells for one in nine.
    of_default, of_cells = (
        results["tasks"]["small"][name]["answers"] for name in ("held_out_groups", "validation_cells")
    )
    assert [row["num_without"] for row in of_default] == [4, 4, 4, 0, 0]
    assert [row["num_without"] for row in of_cells] == [4, 4, 4, 4, 4]
    assert of_default[-1]["answered"] == 1
    table = (tmp_path / "out" / "calibration.md").read_text()
    assert "cannot vouch" in table
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 5000
    assert str(tmp_path) not in json.dumps(results)
    written = [path.stat().st_mtime_ns for path in sorted((tmp_path / "work" / "runs").iterdir())]
    assert len(written) == 4
    main(given)
    assert written == [path.stat().st_mtime_ns for path in sorted((tmp_path / "work" / "runs").iterdir())]


def made_up(group, seed, error, answered=1.0):
    rows = [{"asked": 0.05, "threshold": 0.5, "answered": answered, "answered_in_full": answered, "error": error}]
    found = {"expected_calibration_error": 0.1, "error_of_all": 0.2, "answers": rows}
    return {"task": "t", "group": group, "seed": seed, "sources": {"held_out_groups": found}}


def test_seeds_are_averaged_before_the_worst_group_is_named():
    runs = [
        made_up("a", 0, 0.0),
        made_up("a", 1, 0.1),
        made_up("b", 0, 0.06),
        made_up("b", 1, 0.09),
        made_up("c", 0, None),
    ]
    results = {"runs": runs, "asked": [0.05], "sources": {"held_out_groups": "groups"}}
    (row,) = summarize_calibrations(results)["t"]["held_out_groups"]["answers"]
    assert row["error"] == pytest.approx((0.05 + 0.075) / 2)
    assert (row["worst_group"], row["worst_error"]) == ("b", pytest.approx(0.075))
    assert (row["groups_within"], row["num_groups"], row["num_without"]) == (1, 3, 1)
    results |= {"question": "?", "date": "today", "command": "c", "device": {"machine": "m"}, "asked": [0.05]}
    results |= {"versions": {"screformer": "1", "torch": "2"}, "tasks": summarize_calibrations(results)}
    assert "| groups | 5% | 6.2% | 7.5% (b) | 100.0% | 1 of 3 |" in format_calibrations(results)


def test_no_seeds_are_refused(capsys):
    with pytest.raises(SystemExit, match="seeds got 0; it must be at least 1"):
        main(["--seeds", "0"])
