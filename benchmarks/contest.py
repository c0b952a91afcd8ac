"""How every speed benchmark runs: series of shapes, contestants skipped by stated limits, ratios, targets."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from statistics import median
from typing import Any

import torch

from screformer.benchmarks.measuring import (
    FIT_FROM,
    FIT_TO,
    PLACE,
    STEPS,
    CannotRunError,
    MemoryUse,
    Row,
    Shape,
    Step,
    describe_device,
    fit_exponent,
    make_call,
    memory_in_new_process,
    time_in_turn,
)
from screformer.benchmarks.rivals import (
    OURS,
    Contestant,
    quieten_transformers,
    rival_versions,
)
from screformer.benchmarks.speed_figures import format_results
from screformer.train.result_files import software_versions

Last = dict[tuple[Step, str], tuple[Shape, float]]  # the shape before and its median

logger = logging.getLogger(__name__)

START_SECONDS, SLOW_FIRST_CALL = 60.0, 2.0  # to import the libraries; a first call touches new memory
PAPER_LENGTH = 17_344  # the paper's 17,330 genes, padded to chunks of 64
LENGTHS = (1024, 2048, 4096, 8192, 16_384, PAPER_LENGTH, 32_768, 65_536)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
SHORT_LENGTH = 2048
PAPER_SHAPE = Shape(PAPER_LENGTH)


@dataclass(frozen=True)
class Limits:
    """How often, how long and with how much memory calls are measured, and where.

    Attributes
    ----------
    repeats
        Timed calls of each contestant, after one to warm up.
    time_limit
        Seconds a call; what is predicted to take longer, from the shape before, is skipped.
    memory_limit
        GB a call; what needs more is skipped.
    device
        ``"cpu"``, ``"cuda"`` or ``"cuda:0"``.
    """

    repeats: int = 5
    time_limit: float = 60.0
    memory_limit: float = 14.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raise ValueError for a number that is not positive."""
        for name in ("repeats", "time_limit", "memory_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass
class Results:
    """What was measured and what was not, as rows of the result file.

    Attributes
    ----------
    measurements
        ``series``, ``step``, ``contestant``, the shape's three numbers, ``seconds`` (each call), ``median_seconds``,
        ``peak_bytes`` and ``parameter_gradient_bytes``.
    skipped
        ``series``, ``step``, ``contestant``, the shape's three numbers and the ``reason``.
    growth
        ``step``, ``contestant``, ``length``, ``seconds`` and ``median_seconds`` of lengths timed in turn.
    """

    measurements: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)
    growth: list[Row] = field(default_factory=list)


DEFAULT_LIMITS = Limits()


def run_series(
    series: str,
    contestants: Mapping[str, Contestant],
    shapes: Sequence[Shape],
    results: Results,
    *,
    limits: Limits,
    after_shape: Callable[[], object],
) -> None:
    """Measure every contestant in both steps at shapes that grow, adding to `results`.

    At a shape, first each call's memory is measured in a process of its own, which also finds those that cannot run;
    then the others are timed in turn. Who is skipped at one shape is skipped at the larger ones too.

    Parameters
    ----------
    series
        What the rows are marked with.
    contestants
        Name -> contestant.
    shapes
        From small to large.
    results
        Where rows go.
    limits
        How often, how long, where.
    after_shape
        Called when a shape is done, to save what there is.
    """
    last: Last = {}
    stopped: dict[tuple[Step, str], str] = {}
    for shape in shapes:
        for step in STEPS:
            place = {"series": series, "step": step, **_sizes(shape)}
            uses: dict[str, MemoryUse] = {}
            for name, contestant in contestants.items():
                try:
                    if (step, name) in stopped:
                        raise CannotRunError(stopped[step, name])
                    _check_prediction(last.get((step, name)), shape, contestant, limits)
                    uses[name] = _memory_within(contestant, shape, step, limits)
                except CannotRunError as error:
                    stopped.setdefault((step, name), f"stopped at {_describe(shape)}: {error}")
                    results.skipped.append({**place, "contestant": name, "reason": str(error)})
                    logger.info("%s, %s: %s skipped: %s", _describe(shape), step, name, error)
            for name, seconds in _time_contestants({name: contestants[name] for name in uses}, shape, step, limits):
                last[step, name] = (shape, median(seconds))
                results.measurements.append({**place, "contestant": name, **_measured(seconds, uses[name])})
        after_shape()


def run_growth(name: str, contestant: Contestant, shapes: Sequence[Shape], results: Results, *, limits: Limits) -> None:
    """Time one contestant at all lengths in turn, round after round, adding to `results.growth`.

    In a series the longer lengths come minutes after the shorter ones, and a machine that has become slower in between
    looks like an exponent. Here a slow minute meets every length.

    Parameters
    ----------
    name, contestant
        Whom to time.
    shapes
        One a length; those between 4k and 64k are taken.
    results
        Where rows go.
    limits
        How often and where.
    """
    lengths = {shape.length: shape for shape in shapes if FIT_FROM <= shape.length <= FIT_TO}
    for step in STEPS:
        calls = {
            str(length): make_call(contestant.build(shape, limits.device), step) for length, shape in lengths.items()
        }
        for length, seconds in time_in_turn(calls, repeats=limits.repeats, device=limits.device).items():
            row = {"step": step, "contestant": name, "length": int(length)}
            results.growth.append({**row, "seconds": seconds, "median_seconds": median(seconds)})


def _time_contestants(
    contestants: Mapping[str, Contestant], shape: Shape, step: Step, limits: Limits
) -> Iterator[tuple[str, list[float]]]:
    """Give each contestant's seconds."""
    calls = {name: make_call(contestant.build(shape, limits.device), step) for name, contestant in contestants.items()}
    for name, seconds in time_in_turn(calls, repeats=limits.repeats, device=limits.device).items():
        logger.info("%s, %s: %s takes %.3f s", _describe(shape), step, name, median(seconds))
        yield name, seconds


def find_row(rows: Sequence[Row], **wanted: object) -> Row | None:
    """Return the first row with these values, None if there is none."""
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def compute_ratios(measurements: Sequence[Row], *, ours: str) -> list[Row]:
    """Return each contestant's median time and peak memory divided by those of `ours` at the same shape and step."""
    ratios = []
    for row in measurements:
        place = {key: row[key] for key in PLACE}
        own = find_row(measurements, **place, contestant=ours)
        if own is not None and row["contestant"] != ours:
            ratios.append(
                {
                    **place,
                    "contestant": row["contestant"],
                    "time_ratio": row["median_seconds"] / own["median_seconds"],
                    "memory_ratio": row["peak_bytes"] / own["peak_bytes"] if own["peak_bytes"] else None,
                }
            )
    return ratios


def compute_exponents(measurements: Sequence[Row], growth: Sequence[Row] = ()) -> dict[str, dict[str, float | None]]:
    """Return step -> contestant -> exponent of time over length between 4k and 64k genes.

    From the lengths timed in turn (`growth`) where a contestant has some, otherwise from the series ``length``.
    """
    exponents: dict[str, dict[str, float | None]] = {}
    for step in STEPS:
        rows = [row for row in measurements if row["series"] == "length" and row["step"] == step]
        in_turn = [row for row in growth if row["step"] == step]
        exponents[step] = {}
        for name in dict.fromkeys(row["contestant"] for row in (*rows, *in_turn)):
            own = [row for row in in_turn if row["contestant"] == name]
            own = own or [row for row in rows if row["contestant"] == name]
            fitted = [row for row in own if FIT_FROM <= row["length"] <= FIT_TO]
            exponents[step][name] = fit_exponent(
                [row["length"] for row in fitted], [row["median_seconds"] for row in fitted]
            )
    return exponents


def judge(target: str, measured: float | None, *, at_least: float | None = None, at_most: float | None = None) -> Row:
    """Return a target as a row of the result file; ``is_met`` is None where nothing was measured."""
    assert (at_least is None) != (at_most is None), "a target has one side"
    if at_least is not None:
        is_met = None if measured is None else measured >= at_least
        return {"target": target, "at_least": at_least, "measured": measured, "is_met": is_met}
    is_met = None if measured is None or at_most is None else measured <= at_most
    return {"target": target, "at_most": at_most, "measured": measured, "is_met": is_met}


def find_ratio(
    measurements: Sequence[Row], quantity: str, numerator: str, denominator: str, **place: object
) -> float | None:
    """Return one contestant's quantity divided by another's at a place; None if one was not measured."""
    above, below = (find_row(measurements, contestant=name, **place) for name in (numerator, denominator))
    return None if above is None or below is None else above[quantity] / below[quantity]


def check_lengths(lengths: Sequence[int], bucket_size: int) -> None:
    """Raise ValueError for a length that transformers cannot cut into chunks."""
    wrong = [length for length in lengths if length < 1 or length % bucket_size]
    if wrong:
        raise ValueError(f"lengths must be multiples of the bucket size {bucket_size}, got {wrong}")


def describe_results(
    question: str,
    results: Results,
    targets: list[Row],
    *,
    contestants: Mapping[str, Contestant],
    shape: Shape,
    limits: Limits,
    command: str,
) -> dict[str, Any]:
    """Return the content of a speed benchmark's result file."""
    return {
        "question": question,
        "command": command,
        "date": date.today().isoformat(),
        "device": describe_device(limits.device),
        "versions": {**software_versions(), **rival_versions()},
        "contestants": {name: contestant.title for name, contestant in contestants.items()},
        "shape": asdict(shape),
        "limits": asdict(limits),
        "targets": targets,
        "exponents": compute_exponents(results.measurements, results.growth),
        "growth": results.growth,
        "ratios": compute_ratios(results.measurements, ours=OURS),
        "skipped": results.skipped,
        "measurements": results.measurements,
    }


def add_limit_options(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add the options that the speed benchmarks share."""
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument(
        "--contestants", nargs="+", default=list(names), metavar="NAME", help=f"Which of {', '.join(names)}."
    )
    parser.add_argument("--repeats", type=int, default=5, help="Timed calls of each (default: %(default)s).")
    parser.add_argument(
        "--time-limit", type=float, default=60.0, help="Seconds a call; slower is skipped (default: %(default)s)."
    )
    parser.add_argument(
        "--memory-limit", type=float, default=14.0, help="GB a call; more is skipped (default: %(default)s)."
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s).")
    parser.add_argument("--threads", type=int, help="Threads of PyTorch (default: its own choice).")
    parser.add_argument(
        "--target-length",
        type=int,
        default=PAPER_LENGTH,
        help="Length that the targets are for (default: %(default)s).",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="Lengths at batch 1.")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES), help="Batch sizes.")
    parser.add_argument(
        "--short-length", type=int, default=SHORT_LENGTH, help="Length of the batches (default: %(default)s)."
    )


def run_from_command_line(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    benchmark: Callable[..., dict[str, Any]],
    *options_of_its_own: str,
) -> None:
    """Read the shared options and a benchmark's own, run it, and write its tables to the screen."""
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    quieten_transformers()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    given = sys.argv[1:] if argv is None else argv
    try:
        results = benchmark(
            options.output,
            shape=Shape(options.target_length),
            lengths=options.lengths,
            batch_sizes=options.batch_sizes,
            short_length=options.short_length,
            contestants=options.contestants,
            limits=Limits(options.repeats, options.time_limit, options.memory_limit, options.device),
            command=" ".join([parser.prog, *given]),
            **{name: getattr(options, name) for name in options_of_its_own},
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n" + format_results(results))


def _check_prediction(last: tuple[Shape, float] | None, shape: Shape, contestant: Contestant, limits: Limits) -> None:
    """Raise CannotRunError if the shape will take too long, judged by the one before."""
    if last is None:
        return
    before, seconds = last
    work = shape.batch_size * shape.num_layers / (before.batch_size * before.num_layers)
    predicted = seconds * work * (shape.length / before.length) ** contestant.growth
    if predicted > limits.time_limit:
        raise CannotRunError(
            f"predicted to take {predicted:.3g} s a call, more than the limit of {limits.time_limit:g} s "
            f"({seconds:.3g} s at {_describe(before)})"
        )


def _memory_within(contestant: Contestant, shape: Shape, step: Step, limits: Limits) -> MemoryUse:
    """Return the memory of a call, or raise CannotRunError; that one call may not take too long either."""
    use = memory_in_new_process(
        contestant.build,
        shape,
        step,
        device=limits.device,
        memory_limit=limits.memory_limit,
        time_limit=START_SECONDS + SLOW_FIRST_CALL * limits.time_limit,
    )
    if use.seconds > SLOW_FIRST_CALL * limits.time_limit:
        raise CannotRunError(f"one call took {use.seconds:.3g} s, more than the limit of {limits.time_limit:g} s")
    return use


def _measured(seconds: list[float], use: MemoryUse) -> Row:
    return {
        "seconds": seconds,
        "median_seconds": median(seconds),
        "peak_bytes": use.peak_bytes,
        "parameter_gradient_bytes": use.parameter_gradient_bytes,
    }


def _sizes(shape: Shape) -> Row:
    return {"batch_size": shape.batch_size, "length": shape.length, "num_layers": shape.num_layers}


def _describe(shape: Shape) -> str:
    return f"batch {shape.batch_size}, length {shape.length}, layers {shape.num_layers}"
