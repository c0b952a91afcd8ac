"""The benchmark of a GPU, at toy size on the CPU, and what it concludes."""

import json

import pytest
import torch

from screformer.benchmarks import gpu, gpu_attention
from screformer.benchmarks.gpu import PARTS, benchmark_gpu, judge_gpu, main
from screformer.benchmarks.gpu_attention import attention_counts, check_correctness, measure_ladder, ours
from screformer.benchmarks.gpu_report import format_gpu
from screformer.benchmarks.gpu_steps import StepCase, make_step, measure_steps
from screformer.benchmarks.measuring import Shape

CHECKED = {"head_dims": (16,), "rounds": (2,), "length": 50, "bucket_size": 16}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The files of a whole run."""
    folder = tmp_path_factory.mktemp("gpu")
    main(["--toy", "--device", "cpu", "--repeats", "1", "--output", str(folder)])
    return folder, json.loads((folder / "gpu_toy.json").read_text())


def test_every_part_is_measured(toy):
    folder, results = toy
    assert set(results["parts"]) == set(PARTS)
    for part in results["parts"].values():
        assert {"date", "versions", "command", "repeats", "rows"} <= set(part)
        assert part["rows"]
    assert all(row["is_right"] for row in results["parts"]["correctness"]["rows"])
    attention = results["parts"]["attention"]["rows"]
    assert {row["contestant"] for row in attention} == set(gpu_attention.BUILDS)
    assert all("reason" not in row for row in attention)
    steps = results["parts"]["steps"]["rows"]
    assert {row["kind"] for row in steps} == {"inference", "pretraining", "fine-tuning"}
    assert {(row["attention"], row["rounds"]) for row in steps} >= {("lsh", 2), ("lsh", 4), ("lsh", 1), ("exact", 2)}
    assert all(row["cells_per_second"] > 0 for row in steps)
    assert sum(row["share"] for row in results["parts"]["profile"]["rows"]) <= 1 + 1e-6
    dense, packed = results["parts"]["feeding"]["rows"]
    assert (dense["laid_out_on"], packed["laid_out_on"]) == ("CPU", "device")
    assert packed["bytes_sent"] < dense["bytes_sent"] / 10
    text = (folder / "gpu_toy.md").read_text()
    for heading in ("Correctness", "Attention", "Steps", "Feeding", "Roofline", "Profile"):
        assert f"## {heading}" in text
    assert (folder / "gpu_toy.png").stat().st_size > 10_000


def test_a_part_that_is_measured_again_keeps_the_others(toy):
    folder, before = toy
    results = benchmark_gpu(folder, parts=["correctness"], is_toy=True, device="cpu", repeats=1, command="again")
    assert results["parts"]["correctness"]["command"] == "again"
    assert results["parts"]["attention"] == before["parts"]["attention"]


def test_a_wrong_kernel_is_found(monkeypatch):
    right = gpu_attention.lsh_attention

    def wrong(query_key, value, *given, implementation, **options):
        output = right(query_key, value, *given, implementation=implementation, **options)
        return output * 1.02 if implementation == "blocked" else output

    monkeypatch.setattr(gpu_attention, "lsh_attention", wrong)
    assert not any(row["is_right"] for row in check_correctness("cpu", "blocked", **CHECKED))


def test_what_cannot_run_is_a_row_with_the_reason():
    def fails(shape, device):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 80 GiB")

    shape = Shape(64, 1, hidden_size=32, num_heads=2, bucket_size=16)
    (rows,) = measure_ladder([shape], "cpu", repeats=1, builds={"huge": fails, ours(1): gpu_attention.BUILDS[ours(1)]})
    assert [row["reason"] for row in rows if row["contestant"] == "huge"] == ["CUDA out of memory."] * 2
    assert sum("seconds" in row for row in rows) == 2


def test_a_step_that_cannot_run_is_a_row_too(monkeypatch):
    def fails(case, num_genes, device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("screformer.benchmarks.gpu_steps.make_step", fails)
    (row,) = measure_steps([StepCase("inference", "tiny", 2)], 64, "cpu", repeats=1)
    assert row["reason"] == "CUDA out of memory."


@pytest.mark.parametrize("kind", ["pretraining", "fine-tuning"])
def test_a_training_step_learns(kind):
    step = make_step(StepCase(kind, "tiny", 2), 64, "cpu")
    names = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))
    before = [parameter.detach().clone() for parameter in names["model"].parameters()]
    step()
    assert any(not torch.equal(old, new) for old, new in zip(before, names["model"].parameters(), strict=True))


def test_counts_are_those_of_the_source():
    shape = Shape(128, 2, hidden_size=40, num_heads=2, bucket_size=64)
    counts = attention_counts(shape, 4)
    tokens = 2 * 2 * 128
    assert counts["forward"] == {
        "flops": 8 * 64 * 32 * 4 * tokens,
        "exponentials": 2 * 64 * 4 * tokens,
        "bytes": (5 * 20 * 2 * 4 + 8 * 20 * 3 + 20 * 2) * tokens,
    }
    assert counts["backward"]["flops"] == 24 * 64 * 32 * 4 * tokens


def test_the_verdicts():
    def attention(contestant, step, seconds):
        return {"contestant": contestant, "step": step, "length": 17_344, "median_seconds": seconds}

    def step(kind, rate, memory, **more):
        place = {"kind": kind, "attention": "lsh", "is_default_rounds": True, "batch_size": 64, "is_compiled": False}
        return {**place, "cells_per_second": rate, "peak_bytes": memory, **more}

    parts = {
        "correctness": {"rows": [{"is_right": True}, {"is_right": False}]},
        "attention": {
            "rows": [
                attention("flash", "forward", 6.0),
                attention(ours(2), "forward", 1.0),
                attention("flash", "training", 4.0),
                attention(ours(2), "training", 1.0),
                {"contestant": ours(4), "step": "forward", "length": 17_344, "reason": "none"},
            ]
        },
        "steps": {
            "rows": [
                step("inference", 1600.0, 1e9),
                step("pretraining", 500.0, 11e9),
                step("pretraining", 700.0, 30e9, batch_size=256),
                step("fine-tuning", 900.0, 1e9, is_default_rounds=False),
            ]
        },
    }
    targets = {row["target"]: row["is_met"] for row in judge_gpu({"parts": parts, "default_rounds": 2})}
    assert targets == {
        "share of numbers within twice the plain form's error": False,
        "attention, 2 rounds, forward: times faster than flash": True,
        "attention, 2 rounds, training: times faster than flash": False,
        "attention, 4 rounds, forward: times faster than flash": None,
        "attention, 4 rounds, training: times faster than flash": None,
        "inference: cells a second, the best batch": True,
        "pretraining: cells a second, the best batch": True,
        "fine-tuning: cells a second, the best batch": None,
        "pretraining, 64 cells: GB": True,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written_and_the_remedy_is_said(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "out")])
    assert "PyTorch sees no GPU here. Run it where there is one, or with --toy" in str(stopped.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"parts": ["speed"]}, {"parts": []}, {"repeats": 0}])
def test_wrong_options_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="parts: some of correctness, attention, steps, feeding, roofline, profile"):
        benchmark_gpu(tmp_path, is_toy=True, **options)


def test_a_report_of_one_part_says_nothing_of_the_others(toy):
    _, results = toy
    text = format_gpu({**results, "parts": {"correctness": results["parts"]["correctness"]}})
    assert "## Correctness" in text
    assert "## Steps" not in text
    assert gpu.FULL.num_genes == 17_330
