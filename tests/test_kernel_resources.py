"""The GPU kernels are compiled for real GPUs, of which none is needed: what the interpreter lets pass is found here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from screformer import lsh_attention_triton
from screformer.benchmarks.kernel_resources import (
    GPUS,
    Gpu,
    Use,
    _programs_at_once,
    format_kernel_resources,
    measure_kernels,
)
from screformer.lsh_attention_triton import attention_warps, product_precision

needs_triton = pytest.mark.skipif(lsh_attention_triton.triton is None, reason="needs Triton")


def compile_kernels(folder, *options):
    """Compile in a process whose Triton is no interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "screformer.benchmarks.kernel_resources", "--output", str(folder), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_triton
def test_every_kernel_compiles_for_nvidia_and_amd(tmp_path):
    done = compile_kernels(tmp_path, "--rounds", "2", "--gpus", "sm_90 (H100)", "gfx942 (MI300)")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "kernel_resources.json").read_text())
    rows = {(row["gpu"], row["kernel"]): row for row in results["kernels"]}
    assert {kernel for _, kernel in rows} == {"forward", "backward", "hashing"}
    assert len(rows) == 6
    for row in rows.values():
        assert row["registers"] > 16
        assert row["programs_at_once"] >= 1
    # What does not fit into registers goes to memory; in the forward pass nothing does.
    assert rows["sm_90 (H100)", "forward"]["spilled_bytes"] == 0
    assert rows["gfx942 (MI300)", "forward"]["spilled_bytes"] == 0
    assert "| sm_90 (H100)" in (tmp_path / "kernel_resources.md").read_text()


@needs_triton
def test_an_unknown_gpu_is_named(tmp_path):
    done = compile_kernels(tmp_path, "--gpus", "sm_1")
    assert done.returncode != 0
    assert "error: gpus got ['sm_1']; known are ['sm_80 (A100)'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_interpreter_cannot_compile(monkeypatch):
    monkeypatch.setattr(lsh_attention_triton, "is_interpreted", lambda: True)
    with pytest.raises(RuntimeError, match="leave TRITON_INTERPRET unset"):
        measure_kernels()


@pytest.mark.parametrize(
    ("use", "fits"),
    [
        (Use(64, 0, 0), 8),  # 64 x 32 x 4 warps: 8,192 of 65,536 registers
        (Use(65, 0, 0), 7),  # handed out in steps of 256 a warp
        (Use(255, 0, 100 * 1024), 2),
        (Use(32, 0, 100 * 1024), 2),  # shared memory decides
        (Use(16, 0, 0), 16),  # warps decide
    ],
)
def test_what_fits_on_a_multiprocessor(use, fits):
    assert _programs_at_once(use, GPUS["sm_90 (H100)"], 4) == fits
    assert _programs_at_once(Use(128, 0, 0), Gpu("hip", "gfx942", 64, 512, 65_536, 32), 4) == 4


def test_wider_tiles_get_more_warps_and_half_precision_loses_nothing():
    assert attention_warps(20, 64, torch.bfloat16) == 4
    assert {attention_warps(64, 64, torch.float16), attention_warps(20, 128, torch.float16)} == {8}
    assert attention_warps(20, 64, torch.float32) == 8
    assert product_precision(torch.bfloat16, is_nvidia=True) == "tf32"
    assert product_precision(torch.float32, is_nvidia=True) == "tf32x3"
    assert product_precision(torch.float32, is_nvidia=False) == "ieee"


def test_the_table():
    row = {
        "kernel": "forward", "gpu": "g", "warps": 4, "registers": 166, "spilled_bytes": 0, "shared_bytes": 8192,
        "programs_at_once": 3, "occupancy": 0.1875,
    }  # fmt: skip
    shape = {"head_dim": 20, "bucket_size": 64, "rounds": 4, "dtype": "bfloat16"}
    text = format_kernel_resources(
        {"question": "Q?", "date": "2026-11-25", "triton": "3.9", "command": "c", "shape": shape, "kernels": [row]}
    )
    assert text.startswith("# Q?")
    assert "19% |" in text


def test_the_source_tells_what_was_measured():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "kernel_resources.json"
    if not path.exists():
        pytest.skip("needs the repository's result files")
    results = json.loads(path.read_text())
    of = {row["kernel"]: row for row in results["kernels"] if row["gpu"] == "sm_90 (H100)"}
    told = " ".join(lsh_attention_triton.__doc__.split())
    backward = of["backward"]
    assert (
        f"(Triton {results['triton']}, bfloat16, heads 20 wide, chunks of 64), registers a thread: forward "
        f"{of['forward']['registers']}, backward {backward['registers']} and {backward['spilled_bytes']} bytes beside "
        f"them, hashing {of['hashing']['registers']}; see"
    ) in told
