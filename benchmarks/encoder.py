"""Speed and memory of encoders, layers of attention and feed-forward: ours beside the other libraries'.

From hidden states to hidden states, without embeddings, see `rivals`. The forward step is inference; the training step
is forward and backward to inputs and parameters, without an optimizer. What is reversible does not store each layer's
activations: ours, transformers' and reformer-pytorch's.
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
    find_row,
    judge,
    run_from_command_line,
    run_growth,
    run_series,
)
from screformer.benchmarks.measuring import STEPS, Row, Shape
from screformer.benchmarks.rivals import ENCODERS, OURS, OURS_BFLOAT16, choose_contestants
from screformer.benchmarks.speed_figures import write_speed_results

NAME = "encoder"
DEPTHS = (1, 2, 6, 12)
SHALLOW, DEEP = 1, 6  # the depths that the targets speak of


def benchmark_encoder(
    output: str | Path,
    *,
    shape: Shape = PAPER_SHAPE,
    depths: Sequence[int] = DEPTHS,
    lengths: Sequence[int] = LENGTHS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    short_length: int = SHORT_LENGTH,
    contestants: Sequence[str] = tuple(ENCODERS),
    limits: Limits = DEFAULT_LIMITS,
    command: str = "benchmark_encoder",
) -> dict[str, Any]:
    """Measure, write ``encoder_cpu.json``, ``.md`` and ``.png`` (or ``_cuda``), and return the JSON.

    The files are written after every shape, so that an interrupted run leaves what it has.

    Parameters
    ----------
    output
        Folder for the results.
    shape
        The model's shape; the targets are judged at its length.
    depths
        Numbers of layers at the length of `shape`, batch 1.
    lengths
        Lengths with one layer at batch 1.
    batch_sizes, short_length
        Batch sizes with one layer, and the length that they are measured at.
    contestants
        Names of `rivals.ENCODERS`; ours must be among them.
    limits
        How often, how long, where.
    command
        What the result file says that it was made by.

    Raises
    ------
    ValueError
        A contestant is unknown or ours is missing, or a length is not a multiple of the bucket size.
    """
    chosen = choose_contestants(ENCODERS, contestants)
    check_lengths([*lengths, shape.length, short_length], shape.bucket_size)
    results = Results()

    def save() -> dict[str, Any]:
        content = describe_results(
            "How fast is an encoder, and how much memory does it need?",
            results,
            judge_encoder(results, shape.length),
            contestants=chosen,
            shape=shape,
            limits=limits,
            command=command,
        )
        stem = Path(output) / f"{NAME}_{torch.device(limits.device).type}"
        write_speed_results(content, stem, title="Encoder of one layer, batch 1")
        return content

    shapes = {
        "depth": [replace(shape, num_layers=depth) for depth in sorted({*depths})],
        "length": [replace(shape, length=length) for length in sorted({*lengths})],
        "batch": [replace(shape, length=short_length, batch_size=size) for size in sorted({*batch_sizes})],
    }
    for series, of_series in shapes.items():
        run_series(series, chosen, of_series, results, limits=limits, after_shape=save)
    run_growth(OURS, chosen[OURS], shapes["length"], results, limits=limits)
    return save()


def judge_encoder(results: Results, length: int) -> list[Row]:
    """Return the targets of a 6-layer encoder at batch 1 and this length, and whether they are met."""
    measurements = results.measurements
    ratio = partial(find_ratio, measurements, series="depth", batch_size=1, length=length, num_layers=DEEP)
    exponents = compute_exponents(measurements, results.growth)
    targets = []
    for step in STEPS:
        faster = ratio("median_seconds", "transformers", OURS, step=step)
        targets.append(judge(f"{step}, {DEEP} layers: times faster than transformers", faster, at_least=3))
    memory = ratio("peak_bytes", OURS, "transformers", step="training")
    targets.append(judge(f"training, {DEEP} layers: peak memory divided by transformers'", memory, at_most=0.25))
    deep, shallow = (find_activation_bytes(measurements, length, depth) for depth in (DEEP, SHALLOW))
    growth = None if deep is None or shallow is None else deep / shallow
    targets.append(judge(f"training: activation memory of {DEEP} layers divided by {SHALLOW}", growth, at_most=1.15))
    for step in STEPS:
        gain = ratio("median_seconds", OURS, OURS_BFLOAT16, step=step)
        targets.append(judge(f"{step}, {DEEP} layers: bf16 autocast, times faster than fp32", gain, at_least=1))
    for step in STEPS:
        exponent = exponents[step].get(OURS)
        targets.append(judge(f"{step}: exponent of time over length", exponent, at_most=1.1))
    return targets


def find_activation_bytes(measurements: Sequence[Row], length: int, num_layers: int) -> int | None:
    """Return the peak memory of our training step without the gradients of parameters; None if it was not measured."""
    row = find_row(measurements, series="depth", step="training", contestant=OURS, length=length, num_layers=num_layers)
    return None if row is None else row["peak_bytes"] - row["parameter_gradient_bytes"]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.encoder",
        description="Measure time and peak memory of encoders, ours beside other libraries'.",
        epilog="example: python -m screformer.benchmarks.encoder --target-length 4096 --depths 1 6 --output runs",
    )
    add_limit_options(parser, tuple(ENCODERS))
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS), help="Numbers of layers.")
    run_from_command_line(parser, argv, benchmark_encoder, "depths")


if __name__ == "__main__":
    main()
