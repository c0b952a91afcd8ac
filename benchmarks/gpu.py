"""Everything that is measured on a GPU, by one command: is it right, how fast, how lean, and where does the time go?

Parts, each saved when it is done, so that an interrupted run leaves what it has and another run adds to it:

* ``correctness``: the kernels beside the plain form in float64;
* ``attention``: alone, at growing lengths, beside PyTorch's flash attention, transformers and reformer-pytorch;
* ``steps``: cells a second and memory of whole models on every gene, with batches that grow;
* ``feeding``: batches laid out over every gene by the CPU, and by the device;
* ``roofline``: what share of the device's peaks, measured in the same run, the kernels reach;
* ``profile``: the kernels that a pretraining step spends its time in.

At toy size (``--toy``) it runs on a CPU in seconds, by Triton's interpreter if ``TRITON_INTERPRET=1``: for tests.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from screformer.benchmarks.contest import find_row, judge
from screformer.benchmarks.gpu_attention import (
    FLASH,
    check_correctness,
    measure_ladder,
    measure_peaks,
    measure_roofline,
    ours,
)
from screformer.benchmarks.gpu_report import format_gpu, plot_gpu
from screformer.benchmarks.gpu_steps import KINDS, StepCase, measure_feeding, measure_steps, profile_step
from screformer.benchmarks.measuring import GIGABYTE, Row, Shape, describe_device
from screformer.benchmarks.rivals import quieten_transformers, rival_versions
from screformer.benchmarks.speed_figures import write_text
from screformer.configuration_screformer import ScReformerConfig
from screformer.lsh_attention_triton import why_not_triton
from screformer.train.result_files import read_json, software_versions, write_json

PARTS = ("correctness", "attention", "steps", "feeding", "roofline", "profile")
PAPER_BATCH, FOUR_ROUNDS = 64, 4
WANTED = {"inference": 1500, "pretraining": 600, "fine-tuning": 500}  # cells a second

logger = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """What a run is measured at."""

    preset: str
    num_genes: int
    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    checked: Mapping[str, Any]
    product_width: int


FULL = Sizes("base", 17_330, (1024, 4096, 17_344, 65_536), (64, 16, 128, 256), {}, 8192)
TOY = Sizes(
    "tiny", 128, (128,), (2,), {"head_dims": (16,), "rounds": (2,), "length": 50, "bucket_size": 16}, 64
)  # fmt: skip


def benchmark_gpu(
    output: str | Path,
    *,
    parts: Sequence[str] = PARTS,
    is_toy: bool = False,
    device: str | None = None,
    repeats: int = 10,
    command: str = "benchmark_gpu",
) -> dict[str, Any]:  # Any: JSON
    """Measure the parts, write ``gpu.json``, ``.md`` and ``.png`` (toy: ``gpu_toy``), and return the JSON.

    Parameters
    ----------
    output
        Folder for the results; parts that are there of the same device and sizes, and not asked for, are kept.
    parts
        Some of `PARTS`.
    is_toy
        Small enough for a CPU, to test the command.
    device
        Default ``"cuda"``, at toy size without a GPU ``"cpu"``.
    repeats
        Timed calls each.
    command
        What the result file says that it was made by.

    Raises
    ------
    ValueError
        There is no such part, or no GPU.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts or repeats < 1:
        raise ValueError(f"parts: some of {', '.join(PARTS)}, repeats: at least 1; got {list(parts)}, {repeats}")
    if device is None:
        device = "cpu" if is_toy and not torch.cuda.is_available() else "cuda"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU here. Run it where there is one, or with --toy to see that it works")
    quieten_transformers()
    sizes = TOY if is_toy else FULL
    stem = Path(output) / ("gpu_toy" if is_toy else "gpu")
    config = ScReformerConfig.preset(sizes.preset)
    about = {
        "question": "What does the model do on a GPU?",
        "device": describe_device(device),
        "preset": sizes.preset,
        "num_genes": sizes.num_genes,
        "default_rounds": config.num_hashes,
        "why_not_triton": why_not_triton(torch.device(device), config.bucket_size, config.head_dim),
    }
    results: dict[str, Any] = {**about, "parts": _earlier_parts(stem.with_suffix(".json"), about)}
    for part in PARTS:
        if part not in parts:
            continue
        logger.info("part %s", part)
        told = {"date": date.today().isoformat(), "command": command, "repeats": repeats}
        told |= {"versions": {**software_versions(), **rival_versions(), "triton": _triton_version()}}
        results["parts"][part] = {**told, **_measure(part, sizes, device, repeats)}
        results["targets"] = judge_gpu(results)
        _save(results, stem)
    return results


def _earlier_parts(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    earlier = read_json(path) if path.exists() else {}
    told = ("device", "default_rounds", "preset")
    return dict(earlier["parts"]) if earlier and all(earlier[key] == about[key] for key in told) else {}


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _measure(part: str, sizes: Sizes, device: str, repeats: int) -> dict[str, Any]:
    config = ScReformerConfig.preset(sizes.preset, num_genes=sizes.num_genes)
    shape = Shape(
        max(length for length in sizes.lengths if length <= 17_344),
        sizes.batch_sizes[0],
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        bucket_size=config.bucket_size,
    )
    if part == "correctness":
        is_triton = why_not_triton(torch.device(device), config.bucket_size, config.head_dim) is None
        implementation = "triton" if is_triton else "blocked"
        return {
            "implementation": implementation,
            "rows": check_correctness(device, implementation, **sizes.checked),
        }
    if part == "attention":
        shapes = [_same_tokens(shape, length) for length in sorted(sizes.lengths)]
        return {"rows": [row for rows in measure_ladder(shapes, device, repeats=repeats) for row in rows]}
    if part == "steps":
        rounds = sorted({None, FOUR_ROUNDS} - {config.num_hashes}, key=lambda number: number or 0)
        cases = [
            StepCase(kind, sizes.preset, batch_size, number)
            for kind in KINDS
            for number in rounds
            for batch_size in sizes.batch_sizes
        ]
        cases += [StepCase(kind, sizes.preset, sizes.batch_sizes[0], 1) for kind in KINDS]
        cases += [StepCase(kind, sizes.preset, sizes.batch_sizes[0], attention="exact") for kind in KINDS]
        few = (1, *sizes.batch_sizes[:2])
        cases += [StepCase("inference", sizes.preset, 1)]
        cases += [StepCase("inference", sizes.preset, number, is_graphed=True) for number in few]
        if torch.device(device).type == "cuda":  # where Triton compiles; on a CPU it takes a C++ compiler and minutes
            cases += [StepCase(kind, sizes.preset, sizes.batch_sizes[0], is_compiled=True) for kind in KINDS]
        return {"rows": list(measure_steps(cases, sizes.num_genes, device, repeats=repeats))}
    if part == "feeding":
        return {"rows": measure_feeding(sizes.num_genes, sizes.batch_sizes[0], device, repeats=repeats)}
    if part == "roofline":
        peaks = measure_peaks(device, width=sizes.product_width, repeats=repeats)
        return {"peaks": peaks, "rows": measure_roofline(shape, device, peaks, repeats=repeats)}
    case = StepCase("pretraining", sizes.preset, sizes.batch_sizes[0])
    return {"rows": profile_step(case, sizes.num_genes, device)}


def _same_tokens(shape: Shape, length: int) -> Shape:
    """Return another length with as many tokens in all, so that every length fills the device."""
    return replace(shape, length=length, batch_size=max(1, shape.batch_size * shape.length // length))


def judge_gpu(results: Mapping[str, Any]) -> list[Row]:
    """Return the targets, and whether they are met; None where nothing was measured."""
    rows = {part: results["parts"].get(part, {}).get("rows", []) for part in PARTS}
    right = [row["is_right"] for row in rows["correctness"]]
    share = sum(right) / len(right) if right else None
    targets = [judge("share of numbers within twice the plain form's error", share, at_least=1)]
    longest = max((row["length"] for row in rows["attention"] if row["length"] <= 17_344), default=0)
    for number in dict.fromkeys((results["default_rounds"], FOUR_ROUNDS)):
        for step in ("forward", "training"):
            place = {"step": step, "length": longest}
            flash, own = (_seconds(rows["attention"], name, place) for name in (FLASH, ours(number)))
            ratio = None if flash is None or own is None else flash / own
            targets.append(judge(f"attention, {number} rounds, {step}: times faster than flash", ratio, at_least=5))
    plain = [row for row in rows["steps"] if row["attention"] == "lsh" and not row["is_compiled"]]
    default = [row for row in plain if row["is_default_rounds"]]
    for kind, wanted in WANTED.items():
        rates = [row["cells_per_second"] for row in default if row["kind"] == kind and "cells_per_second" in row]
        targets.append(judge(f"{kind}: cells a second, the best batch", max(rates, default=None), at_least=wanted))
    papers = find_row([row for row in default if "peak_bytes" in row], kind="pretraining", batch_size=PAPER_BATCH)
    memory = None if papers is None else papers["peak_bytes"] / GIGABYTE
    targets.append(judge(f"pretraining, {PAPER_BATCH} cells: GB", memory, at_most=12))
    return targets


def _seconds(rows: Sequence[Row], contestant: str, place: Mapping[str, Any]) -> float | None:
    row = find_row(rows, contestant=contestant, **place)
    return None if row is None else row.get("median_seconds")


def _save(results: Mapping[str, Any], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(stem.with_suffix(".json"), results)
    write_text(stem.with_suffix(".md"), format_gpu(results))
    plot_gpu(results, stem.with_suffix(".png"))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="screformer benchmark gpu",
        description="Correctness, speed and memory on a GPU, beside flash attention and other libraries.",
        epilog="example: screformer benchmark gpu --output runs; about ten minutes on an H100",
    )
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=f"Some of {', '.join(PARTS)}.")
    parser.add_argument("--toy", action="store_true", help="At toy size, on a CPU too, to see that it works.")
    parser.add_argument("--device", help="Default: cuda.")
    parser.add_argument("--repeats", type=int, default=10, help="Timed calls each (default: %(default)s).")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("screformer.benchmarks").setLevel(logging.INFO)
    try:
        results = benchmark_gpu(
            given.output,
            parts=given.parts,
            is_toy=given.toy,
            device=given.device,
            repeats=given.repeats,
            command="screformer benchmark gpu" + (" --toy" if given.toy else ""),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(format_gpu(results))


if __name__ == "__main__":
    main()
