import json

import pytest

from screformer.benchmarks import contest
from screformer.benchmarks.contest import Limits, Results
from screformer.benchmarks.encoder import benchmark_encoder, judge_encoder, main
from screformer.benchmarks.measuring import MemoryUse, Shape

SHAPE = Shape(64, hidden_size=16, num_heads=2, intermediate_size=64, bucket_size=16, num_hashes=2)
NAMES = ["ours", "ours_bfloat16", "ours_exact", "transformers"]


@pytest.fixture(autouse=True)
def without_processes(monkeypatch):
    monkeypatch.setattr(
        contest, "memory_in_new_process", lambda build, shape, step, **_: MemoryUse(1000 * shape.num_layers, 100, 0.0)
    )


def row(contestant, seconds, num_layers, peak, step="training"):
    place = {"series": "depth", "step": step, "batch_size": 1, "length": 4096, "num_layers": num_layers}
    measured = {"median_seconds": seconds, "peak_bytes": peak, "parameter_gradient_bytes": 100 * num_layers}
    return {**place, "contestant": contestant, **measured}


def test_the_result_file_has_every_series_and_contestant(tmp_path):
    results = benchmark_encoder(
        tmp_path,
        shape=SHAPE,
        depths=[6, 1],
        lengths=[32],
        batch_sizes=[2],
        short_length=32,
        contestants=NAMES,
        limits=Limits(repeats=1),
    )
    assert json.loads((tmp_path / "encoder_cpu.json").read_text()) == results
    keys = ("series", "length", "batch_size", "num_layers", "contestant")
    forward = [tuple(row[key] for key in keys) for row in results["measurements"] if row["step"] == "forward"]
    expected = [("depth", 64, 1, 1), ("depth", 64, 1, 6), ("length", 32, 1, 1), ("batch", 32, 2, 1)]
    assert forward == [(*place, name) for place in expected for name in NAMES]
    assert len(results["measurements"]) == 2 * len(forward)
    met = {target["target"]: target["measured"] for target in results["targets"]}
    assert met["training, 6 layers: peak memory divided by transformers'"] == 1
    assert met["training: activation memory of 6 layers divided by 1"] == 5900 / 900
    for suffix in (".md", ".png"):
        assert (tmp_path / f"encoder_cpu{suffix}").stat().st_size > 0


def test_targets_are_judged_from_the_measurements():
    rows = [
        row("ours", 1.0, 6, 2600),
        row("ours", 0.2, 1, 1900),
        row("transformers", 3.5, 6, 13_000),
        row("ours_bfloat16", 1.25, 6, 2000),
    ]
    targets = {
        target["target"]: (target["measured"], target["is_met"]) for target in judge_encoder(Results(rows), 4096)
    }
    assert targets["training, 6 layers: times faster than transformers"] == (3.5, True)
    assert targets["forward, 6 layers: times faster than transformers"] == (None, None)
    assert targets["training, 6 layers: peak memory divided by transformers'"] == (0.2, True)
    # Gradients of parameters (600 and 100) are no activations.
    assert targets["training: activation memory of 6 layers divided by 1"] == (2000 / 1800, True)
    assert targets["training, 6 layers: bf16 autocast, times faster than fp32"] == (0.8, False)


def test_the_command_line_takes_depths(tmp_path, capsys):
    options = "--target-length 64 --depths 1 --lengths 64 --batch-sizes 1 --short-length 64 --repeats 1"
    main([*options.split(), "--contestants", "ours", "--output", str(tmp_path)])
    assert "by layers" in capsys.readouterr().out
