"""The memory benchmark measures what it says, and its files hold every case."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from screformer.benchmarks import memory as benchmark
from screformer.benchmarks.memory import (
    NO_HOARDING,
    NUM_GENES,
    TOLERANCE,
    Case,
    Measured,
    all_cases,
    allocated_memory,
    benchmark_memory,
    main,
    make_batch,
    measure_in_new_process,
    prepare,
)

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
TIME_LIMIT = 60.0


def case_of(num_tokens=2000, batch_size=1, step="inference", head="masked_lm", dtype="float32", preset="tiny"):
    return Case(preset, num_tokens, batch_size, step, head, dtype)


def test_the_count_of_allocated_bytes_sees_what_is_made_and_what_is_used_together():
    def make():
        torch.zeros(10**6)  # only to make it
        return torch.zeros(1000)

    def use(kept):
        first = torch.zeros(2000)
        del first
        return torch.zeros(3000) + kept.sum()  # twice 3000 at once

    allocated = allocated_memory(make, use)
    assert 4 * 7000 <= allocated < 4 * 7200


def test_cells_are_laid_out_as_the_collator_does():
    config = case_of().config()
    full = make_batch(config, case_of(), NUM_GENES, 2)
    assert set(full) == {"input_ids"}
    expressed = make_batch(config, case_of(step="training"), 300, 3)
    assert set(expressed) == {"input_ids", "gene_ids", "attention_mask", "labels"}
    assert (expressed["gene_ids"].diff(dim=1) > 0).all()
    assert expressed["attention_mask"].sum(dim=1).tolist() == [300, 300, 296]
    share = (expressed["labels"] >= 0).float().mean()
    assert 0.1 < share < 0.2
    assert make_batch(config, case_of(step="training", head="cell_classification"), 5, 2)["labels"].shape == (2,)


def test_a_training_run_has_gradients_and_moments_and_inference_none(tiny_config):
    config = tiny_config()
    training = prepare(case_of(step="training"), config)
    weights = training.resident_bytes()
    training.step(20, 2)
    training.optimizer.step()
    parameters = sum(parameter.nbytes for parameter in training.model.parameters())
    assert training.resident_bytes() == weights + 3 * parameters
    inference = prepare(case_of(), config)
    inference.step(20, 2)
    assert inference.resident_bytes() == weights


@pytest.fixture
def measured(monkeypatch):
    """Replace measuring by numbers: 10 % less than predicted, twice as much by default, a second a cell."""
    calls = []

    def measure(case, time_limit, environment):
        calls.append((case, dict(environment)))
        if case.batch_size == 99:
            raise subprocess.TimeoutExpired("python", time_limit)
        factor = 0.9 if environment else 2.0
        total = int(factor * case.predict().total)
        return Measured(total, total, float(case.batch_size))

    monkeypatch.setattr(benchmark, "measure_in_new_process", measure)
    return calls


def test_results_hold_every_case_predicted_and_measured(measured, tmp_path):
    cases = list(all_cases(["tiny"], [500], [4, 1]))
    assert len(cases) == 6 * 2
    results = benchmark_memory(tmp_path, cases, command="the command")
    assert {path.name for path in tmp_path.iterdir()} == {"memory_cpu.json", "memory_cpu.md", "memory_cpu.png"}
    assert json.loads((tmp_path / "memory_cpu.json").read_text()) == results
    assert (results["command"], results["num_within"], len(results["measurements"])) == ("the command", 12, 12)
    assert results["largest_error"] == pytest.approx(1 / 0.9 - 1, abs=1e-3)
    row = results["measurements"][0]
    parts = row["predicted_parts"]
    fixed = sum(parts[name] for name in ("weights", "gradients", "optimizer", "working"))
    assert fixed + row["batch_size"] * parts["activations_per_cell"] == row["predicted_bytes"]
    assert row["taken_by_default_bytes"] > row["measured_bytes"]
    assert {"torch", "transformers"} <= set(results["versions"])
    text = (tmp_path / "memory_cpu.md").read_text()
    assert "12 of 12 cases are within 15%; the largest error is 11.1%" in text
    assert "| tiny, training, masked genes, bfloat16 " in text
    assert measured[0][1] == NO_HOARDING
    assert measured[1][1] == {}


def test_what_is_outside_is_said(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "TOLERANCE", 0.05)
    results = benchmark_memory(tmp_path, [case_of()])
    assert results["num_within"] == 0
    assert "1.111 OUTSIDE" in (tmp_path / "memory_cpu.md").read_text()


def test_what_takes_too_long_is_skipped_with_the_reason(measured, tmp_path):
    cases = [case_of(batch_size=size) for size in (1, 16, 99)]
    results = benchmark_memory(tmp_path, cases, time_limit=10)
    assert [row["batch_size"] for row in results["measurements"]] == [1]
    assert [row["reason"] for row in results["skipped"]] == ["about 16 s, more than 10", "about 99 s, more than 10"]
    assert "about 16 s" in (tmp_path / "memory_cpu.md").read_text()
    results = benchmark_memory(tmp_path, [case_of(), case_of(batch_size=99)], time_limit=1000)
    assert results["skipped"][0]["reason"] == "more than 1000 s"


@needs_linux
def test_a_process_of_its_own_takes_about_what_is_predicted():
    case = case_of(step="training", head="cell_classification", num_tokens=4000)
    measured = measure_in_new_process(case, TIME_LIMIT, NO_HOARDING)
    assert case.predict().total == pytest.approx(measured.peak_bytes, rel=TOLERANCE)


def test_a_case_that_fails_says_why(monkeypatch):
    with pytest.raises(SystemExit, match=r"error: preset got 'huge'; allowed are tiny, base, large"):
        main(["--case", json.dumps(asdict(case_of(preset="huge")))])
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nMemoryError: too much\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=r"Case\(preset='tiny'.* failed: MemoryError: too much"):
        measure_in_new_process(case_of(), TIME_LIMIT, {})


def test_command_line_runs_what_is_asked_for(measured, tmp_path, capsys):
    main(["--output", str(tmp_path), "--presets", "tiny", "--lengths", "100", "--batch-sizes", "2"])
    assert len(measured) == 2 * 6
    text = capsys.readouterr().out
    assert "6 of 6 cases are within 15%" in text
    assert f"Made by `python -m screformer.benchmarks.memory --output {tmp_path} --presets tiny" in text
    with pytest.raises(SystemExit, match=r"error: preset got 'huge'"):
        main(["--output", str(tmp_path), "--presets", "huge"])


SLOW_CASES = [
    case_of(preset=preset, num_tokens=num_tokens, batch_size=batch_size, step=step, head=head, dtype=dtype)
    for preset, num_tokens, batch_size in (("tiny", NUM_GENES, 4), ("base", 2000, 4), ("base", NUM_GENES, 1))
    for step, head, dtype in (
        ("inference", "cell_classification", "float32"),
        ("training", "masked_lm", "float32"),
        ("training", "cell_classification", "bfloat16"),
    )
]


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("case", SLOW_CASES, ids=str)
def test_prediction_is_within_the_contract(case):
    measured = measure_in_new_process(case, 10 * TIME_LIMIT, NO_HOARDING)
    assert case.predict().total == pytest.approx(measured.peak_bytes, rel=TOLERANCE)


LIMITED = """
import resource, sys
import torch
from screformer.benchmarks.memory import Case, prepare
from screformer.train.memory import largest_batch_size

available = int(sys.argv[1])
case = Case("tiny", 17330, 1, "training", "masked_lm", "float32")
run = prepare(case)
run.step(128, 1)
run.optimizer.step()
sizes = {"num_tokens": case.num_tokens, "training": True, "head": case.head}
choice = largest_batch_size(case.config(), available=available, **sizes)
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + available, used + available))
run.step(case.num_tokens, choice.batch_size)
print(choice.batch_size)
"""


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("available", [250, 1000])
def test_a_chosen_batch_runs_in_a_process_that_gets_no_more_than_was_free(available):
    """With the C library as it is: what it hoards is in the choice."""
    command = [sys.executable, "-c", LIMITED, str(available * 10**6)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 1
