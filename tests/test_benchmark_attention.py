import json
from dataclasses import replace
from statistics import median

import pytest

from screformer.benchmarks import contest
from screformer.benchmarks.attention import benchmark_attention, judge_attention, main
from screformer.benchmarks.contest import (
    Limits,
    Results,
    compute_exponents,
    compute_ratios,
    find_row,
    judge,
    run_growth,
    run_series,
)
from screformer.benchmarks.measuring import CannotRunError, MemoryUse, Shape
from screformer.benchmarks.rivals import ATTENTION, Contestant

SHAPE = Shape(128, hidden_size=16, num_heads=2, intermediate_size=64, bucket_size=16, num_hashes=2)
NAMES = ["ours", "ours_bfloat16", "transformers", "exact"]


@pytest.fixture(scope="module", name="without_processes")
def without_processes_fixture():
    """Replace the measurement of memory, which starts a process a call, by one in proportion to the length."""

    def measure(build, shape, step, **_):
        return MemoryUse(1000 * shape.length, 10, 0.001)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest, "memory_in_new_process", measure)
        yield


def row(contestant, seconds, length=4096, *, step="forward", peak=100, **place):
    sizes = {"series": "length", "batch_size": 1, "num_layers": 1, **place}
    measured = {"median_seconds": seconds, "peak_bytes": peak, "parameter_gradient_bytes": 10}
    return {"contestant": contestant, "length": length, "step": step, **sizes, **measured}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def results(folder, without_processes):
    options = {"lengths": [64], "batch_sizes": [2, 1], "short_length": 64, "contestants": NAMES}
    return benchmark_attention(folder, shape=SHAPE, limits=Limits(repeats=3), command="this test", **options)


def test_the_result_file_says_what_was_measured_and_how(results, folder):
    assert json.loads((folder / "attention_cpu.json").read_text()) == results
    assert {"question", "date", "versions", "targets", "exponents"} <= set(results)
    assert results["command"] == "this test"
    assert results["device"]["name"]
    assert results["device"]["threads"] > 0
    assert results["shape"]["hidden_size"] == 16
    places = [(row["series"], row["length"], row["batch_size"], row["step"]) for row in results["measurements"]]
    expected = [("length", 64, 1), ("length", 128, 1), ("batch", 64, 1), ("batch", 64, 2)]
    assert places == [(*sizes, step) for sizes in expected for step in ("forward", "training") for _ in NAMES]
    assert all(len(row["seconds"]) == 3 for row in results["measurements"])
    assert all(row["median_seconds"] == median(row["seconds"]) for row in results["measurements"])
    assert results["skipped"] == []


def test_ratios_follow_from_the_times_in_the_file(results):
    assert len(results["ratios"]) == 8 * (len(NAMES) - 1)
    for ratio in results["ratios"]:
        place = {key: ratio[key] for key in ("series", "step", "batch_size", "length", "num_layers")}
        theirs = find_row(results["measurements"], **place, contestant=ratio["contestant"])
        ours = find_row(results["measurements"], **place, contestant="ours")
        assert ratio["time_ratio"] == theirs["median_seconds"] / ours["median_seconds"]
        assert ratio["memory_ratio"] == 1


def test_the_table_and_the_figure_lie_beside_the_file(results, folder):
    text = (folder / "attention_cpu.md").read_text()
    assert "| transformers LSHSelfAttention" in text
    assert "forward, length 128: times faster than transformers" in text
    assert (folder / "attention_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_who_needs_too_much_memory_is_named_with_the_reason_and_not_run_at_larger_shapes(monkeypatch):
    asked = []

    def refuse(build, shape, step, **_):
        asked.append((build, shape.length, step))
        if build is ATTENTION["exact"].build and step == "training":
            raise CannotRunError("needs more than 14 GB")
        return MemoryUse(1, 0, 0.001)

    monkeypatch.setattr(contest, "memory_in_new_process", refuse)
    results, contestants = Results(), {name: ATTENTION[name] for name in ("ours", "exact")}
    shapes = [replace(SHAPE, length=length) for length in (32, 64)]
    run_series("length", contestants, shapes, results, limits=Limits(repeats=1), after_shape=lambda: None)
    assert [(row["contestant"], row["step"], row["length"]) for row in results.skipped] == [
        ("exact", "training", 32), ("exact", "training", 64),
    ]  # fmt: skip
    assert results.skipped[0]["reason"] == "needs more than 14 GB"
    assert results.skipped[1]["reason"] == "stopped at batch 1, length 32, layers 1: needs more than 14 GB"
    assert (ATTENTION["exact"].build, 64, "training") not in asked
    assert find_row(results.measurements, contestant="exact", step="forward", length=64) is not None


@pytest.mark.parametrize(("name", "length", "is_skipped"), [("exact", 500, True), ("ours", 500, False)])
def test_a_time_above_the_limit_is_predicted_with_the_growth_of_the_contestant(name, length, is_skipped):
    # Ten times the length: a hundred times 1 s for exact attention, ten times for the others.
    before = (replace(SHAPE, length=50), 1.0)
    shape = replace(SHAPE, length=length)
    if is_skipped:
        with pytest.raises(CannotRunError, match="predicted to take 100 s a call, more than the limit of 60 s"):
            contest._check_prediction(before, shape, ATTENTION[name], Limits())
    else:
        contest._check_prediction(before, shape, ATTENTION[name], Limits())


def test_a_first_call_that_takes_too_long_is_the_last(monkeypatch):
    monkeypatch.setattr(contest, "memory_in_new_process", lambda *_, **__: MemoryUse(1, 0, 121.0))
    with pytest.raises(CannotRunError, match="one call took 121 s, more than the limit of 60 s"):
        contest._memory_within(ATTENTION["ours"], SHAPE, "forward", Limits())


def test_ratios_need_our_row_at_the_same_place():
    rows = [row("ours", 2.0), row("exact", 6.0, peak=50), row("exact", 6.0, length=8192)]
    assert compute_ratios(rows, ours="ours") == [
        {
            "series": "length",
            "step": "forward",
            "batch_size": 1,
            "length": 4096,
            "num_layers": 1,
            "contestant": "exact",
            "time_ratio": 3.0,
            "memory_ratio": 0.5,
        }
    ]


def test_exponents_are_fitted_between_4k_and_64k_only():
    rows = [row("ours", length**1.05, length) for length in (4096, 16_384, 65_536)] + [row("ours", 1e9, 1024)]
    exponents = compute_exponents([*rows, row("exact", 1.0, 4096), row("ours", 1.0, series="batch", step="training")])
    assert exponents["forward"]["ours"] == pytest.approx(1.05)
    assert exponents["forward"]["exact"] is None
    assert exponents["training"] == {}


def test_lengths_timed_in_turn_decide_the_exponent():
    rows = [row("ours", 1.0, 4096), row("ours", 1e6, 65_536), row("exact", 1.0, 4096), row("exact", 256.0, 65_536)]
    growth = [{"step": "forward", "contestant": "ours", "length": n, "median_seconds": n**1.05} for n in (4096, 65_536)]
    exponents = compute_exponents(rows, growth)
    assert exponents["forward"] == {"ours": pytest.approx(1.05), "exact": pytest.approx(2.0)}


def test_growth_times_each_length_between_4k_and_64k_in_turn(monkeypatch):
    order = []
    monkeypatch.setattr(contest, "make_call", lambda workload, step: lambda: order.append((step, workload)))
    contestant = Contestant("ours", lambda shape, device: shape.length)
    results = Results()
    shapes = [Shape(length) for length in (1024, 4096, 65_536, 131_072)]
    run_growth("ours", contestant, shapes, results, limits=Limits(repeats=2))
    assert order == [(step, length) for step in ("forward", "training") for _ in range(3) for length in (4096, 65_536)]
    assert [(row["step"], row["length"], len(row["seconds"])) for row in results.growth] == [
        (step, length, 2) for step in ("forward", "training") for length in (4096, 65_536)
    ]


def test_targets_are_judged_from_the_measurements():
    rows = [row("ours", 1.0), row("transformers", 4.5), row("exact", 7.0)]
    assert [target["is_met"] for target in judge_attention(Results(rows), 4096)] == [True, False, None, None]
    assert judge("x", 1.2, at_most=1.1) == {"target": "x", "at_most": 1.1, "measured": 1.2, "is_met": False}


@pytest.mark.parametrize("name", ["repeats", "time_limit", "memory_limit"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        Limits(**{name: 0})


def test_lengths_are_whole_chunks(tmp_path):
    with pytest.raises(ValueError, match=r"multiples of the bucket size 16, got \[100\]"):
        benchmark_attention(tmp_path, shape=SHAPE, lengths=[100])


def test_the_command_line_runs_and_writes_the_table(tmp_path, without_processes, capsys):
    options = "--target-length 128 --lengths 64 --batch-sizes 1 --short-length 64 --repeats 1 --contestants ours exact"
    main([*options.split(), "--output", str(tmp_path)])
    assert "| exact (PyTorch SDPA)" in capsys.readouterr().out
    command = json.loads((tmp_path / "attention_cpu.json").read_text())["command"]
    assert command.startswith(f"python -m screformer.benchmarks.attention {options}")


def test_the_command_line_refuses_without_a_traceback(tmp_path):
    with pytest.raises(SystemExit, match="error: repeats must be positive"):
        main(["--repeats", "0", "--output", str(tmp_path)])
