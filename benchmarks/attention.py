"""Speed and memory of attention alone: ours beside transformers, reformer-pytorch, performer-pytorch and exact.

No projections: every contestant gets the same query-key and value (B, L, hidden) and returns (B, L, hidden), see
`rivals`. The forward step is inference; the training step adds the gradients of both inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from screformer.benchmarks.contest import (
    BATCH_SIZES,
    DEFAULT_LIMITS,
    LENGTHS,
    PAPER_SHAPE,
    SHORT_LENGTH,
    Limits,
    Results,
    add_limit_options,
    check_lengths,
    compute_exponents,
    describe_results,
    find_ratio,
    judge,
    run_from_command_line,
    run_growth,
    run_series,
)
from screformer.benchmarks.measuring import STEPS, Row, Shape
from screformer.benchmarks.rivals import ATTENTION, OURS, choose_contestants
from screformer.benchmarks.speed_figures import write_speed_results

NAME = "attention"


def benchmark_attention(
    output: str | Path,
    *,
    shape: Shape = PAPER_SHAPE,
    lengths: Sequence[int] = LENGTHS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    short_length: int = SHORT_LENGTH,
    contestants: Sequence[str] = tuple(ATTENTION),
    limits: Limits = DEFAULT_LIMITS,
    command: str = "benchmark_attention",
) -> dict[str, Any]:
    """Measure, write ``attention_cpu.json``, ``.md`` and ``.png`` (or ``_cuda``), and return the JSON.

    The files are written after every shape, so that an interrupted run leaves what it has.

    Parameters
    ----------
    output
        Folder for the results.
    shape
        The model's shape; the targets are judged at its length, which is measured too.
    lengths
        Lengths at batch 1.
    batch_sizes, short_length
        Batch sizes, and the length that they are measured at.
    contestants
        Names of `ATTENTION`; ours must be among them.
    limits
        How often, how long, where.
    command
        What the result file says that it was made by.

    Raises
    ------
    ValueError
        A contestant is unknown or ours is missing, or a length is not a multiple of the bucket size.
    """
    chosen = choose_contestants(ATTENTION, contestants)
    all_lengths = sorted({*lengths, shape.length})
    check_lengths([*all_lengths, short_length], shape.bucket_size)
    results = Results()

    def save() -> dict[str, Any]:
        content = describe_results(
            "How fast is attention, and how much memory does it need?",
            results,
            judge_attention(results, shape.length),
            contestants=chosen,
            shape=shape,
            limits=limits,
            command=command,
        )
        stem = Path(output) / f"{NAME}_{torch.device(limits.device).type}"
        write_speed_results(content, stem, title="Attention alone, batch 1")
        return content

    growing = [replace(shape, length=length) for length in all_lengths]
    run_series("length", chosen, growing, results, limits=limits, after_shape=save)
    batches = [replace(shape, length=short_length, batch_size=size) for size in sorted({*batch_sizes})]
    run_growth(OURS, chosen[OURS], growing, results, limits=limits)
    run_series("batch", chosen, batches, results, limits=limits, after_shape=save)
    return save()


def judge_attention(results: Results, length: int) -> list[Row]:
    """Return the targets of attention alone at batch 1 and this length, and whether they are met."""
    ratio = partial(find_ratio, results.measurements, series="length", batch_size=1, length=length)
    exponents = compute_exponents(results.measurements, results.growth)
    return [
        judge(
            f"forward, length {length}: times faster than transformers",
            ratio("median_seconds", "transformers", OURS, step="forward"),
            at_least=4,
        ),
        judge(
            f"forward, length {length}: times faster than exact",
            ratio("median_seconds", "exact", OURS, step="forward"),
            at_least=8,
        ),
        *(judge(f"{step}: exponent of time over length", exponents[step].get(OURS), at_most=1.1) for step in STEPS),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.attention",
        description="Measure time and peak memory of attention alone, ours beside other libraries'.",
        epilog="example: python -m screformer.benchmarks.attention --target-length 4096 --lengths 1024 --output runs",
    )
    add_limit_options(parser, tuple(ATTENTION))
    run_from_command_line(parser, argv, benchmark_attention)


if __name__ == "__main__":
    main()
