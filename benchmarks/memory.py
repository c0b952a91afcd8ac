"""The memory contract: the bytes that `predict_memory` promises, beside those that a process takes.

*Measured* is the peak of the resident set during a step (inference, or forward and backward while gradients are
accumulated) above what was resident before, plus the weights, gradients and moments that were. It is that of the second
step, because in the first of a shape libraries compile kernels and set memory aside (some megabytes, once). Each case
has a process of its own, in which the C library hands every freed block back at once (``MALLOC_MMAP_THRESHOLD_``), so
that it is what the step uses. Left to itself glibc keeps freed blocks of up to 32 MB, and holes between them: the most
that a process takes then, in either step, is measured beside it and is not part of the contract.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.benchmarks.measuring import GIGABYTE, MEGABYTE, Row, describe_device, peak_memory
from screformer.benchmarks.speed_figures import format_table, write_text
from screformer.configuration_screformer import ScReformerConfig
from screformer.train.collator import IGNORED_LABEL
from screformer.train.figures import COLORS, save_figure
from screformer.train.memory import MODELS, Head, MemoryEstimate, Precision, predict_memory
from screformer.train.result_files import software_versions, write_json

NAME = "memory"
TOLERANCE = 0.15
PRESETS, BATCH_SIZES = ("tiny", "base"), (1, 4, 16)
NUM_GENES, EXPRESSED_TOKENS = 17_330, 2_000
NUM_LABELS, WARM_UP_TOKENS = 9, 128
MASKED_FRACTION = 0.15
# Every block gets, and gives back, memory of its own: a threshold in bytes.
NO_HOARDING = {"MALLOC_MMAP_THRESHOLD_": "65536"}
START_SECONDS = 60.0

Step = Literal["inference", "training"]
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Case:
    """What is run, and measured."""

    preset: str
    num_tokens: int
    batch_size: int
    step: Step
    head: Head
    dtype: Precision

    @property
    def is_training(self) -> bool:
        """Whether there is a backward pass."""
        return self.step == "training"

    def config(self) -> ScReformerConfig:
        """Return the model's shape."""
        return ScReformerConfig.preset(self.preset, num_genes=NUM_GENES, num_labels=NUM_LABELS)

    def predict(self) -> MemoryEstimate:
        """Return what is promised."""
        return predict_memory(
            self.config(),
            num_tokens=self.num_tokens,
            batch_size=self.batch_size,
            training=self.is_training,
            dtype=self.dtype,
            head=self.head,
        )


class Measured(NamedTuple):
    """Bytes at the highest of the second step and of either, and the seconds of the second."""

    peak_bytes: int
    highest_bytes: int
    seconds: float


def all_cases(
    presets: Sequence[str] = PRESETS,
    lengths: Sequence[int] = (EXPRESSED_TOKENS, NUM_GENES),
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Iterator[Case]:
    """Yield every case; batches grow last, so that one too slow says that the next is."""
    kinds: list[tuple[Step, Head, Precision]] = [
        ("inference", "cell_classification", "float32"),
        ("inference", "cell_classification", "bfloat16"),
        ("training", "masked_lm", "float32"),
        ("training", "masked_lm", "bfloat16"),
        ("training", "cell_classification", "float32"),
        ("training", "cell_classification", "bfloat16"),
    ]
    for preset in presets:
        for num_tokens in lengths:
            for kind in kinds:
                for batch_size in sorted(batch_sizes):
                    yield Case(preset, num_tokens, batch_size, *kind)


def benchmark_memory(
    output: str | Path, cases: Sequence[Case], *, time_limit: float = 60.0, command: str = "benchmark_memory"
) -> dict[str, Any]:
    """Measure every case, write ``memory_cpu.json``, ``.md`` and ``.png`` into `output`, and return the JSON.

    The files are written after every case, so that an interrupted run leaves what it has.

    Parameters
    ----------
    output
        Folder for the results.
    cases
        What to run; see `all_cases`.
    time_limit
        Seconds a step; what takes longer, or will by the smaller batch before it, is skipped.
    command
        What the result file says that it was made by.
    """
    rows: list[Row] = []
    skipped: list[Row] = []
    seconds_a_cell: dict[tuple[str, ...], float] = {}

    def save() -> dict[str, Any]:
        results = _describe(rows, skipped, command)
        if rows:
            _write(results, Path(output))
        return results

    for case in cases:
        series = (case.preset, str(case.num_tokens), case.step, case.head, case.dtype)
        expected = seconds_a_cell.get(series, 0.0) * case.batch_size
        if expected > time_limit:
            skipped.append({**asdict(case), "reason": f"about {expected:.0f} s, more than {time_limit:g}"})
            continue
        try:
            used, taken = (measure_in_new_process(case, time_limit, environment) for environment in (NO_HOARDING, {}))
        except subprocess.TimeoutExpired:
            skipped.append({**asdict(case), "reason": f"more than {time_limit:g} s"})
            continue
        seconds_a_cell[series] = taken.seconds / case.batch_size
        rows.append(_row(case, used, taken))
        save()
    return save()


def measure_in_new_process(case: Case, time_limit: float, environment: Mapping[str, str]) -> Measured:
    """Return what a case takes in a process of its own, with these variables added to its environment."""
    done = subprocess.run(
        [sys.executable, "-m", "screformer.benchmarks.memory", "--case", json.dumps(asdict(case))],
        capture_output=True,
        text=True,
        timeout=START_SECONDS + 3 * time_limit,
        check=False,
        env={**os.environ, **environment},
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise OSError(f"{case} failed: {reason[0]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure(case: Case) -> Measured:
    """Return what a case takes in this process."""
    run = prepare(case)
    run.step(WARM_UP_TOKENS, 1)
    if run.optimizer is not None:
        run.optimizer.step()
    first = peak_memory(lambda: run.step(case.num_tokens, case.batch_size))
    start = time.perf_counter()
    second = peak_memory(lambda: run.step(case.num_tokens, case.batch_size))
    seconds = time.perf_counter() - start
    resident = run.resident_bytes()
    return Measured(second + resident, max(first, second) + resident, seconds)


class Run(NamedTuple):
    """A model ready to make the steps of a case; `step` is called with tokens and cells."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    step: Callable[[int, int], None]

    def resident_bytes(self) -> int:
        """Return the bytes of weights, buffers, gradients and moments."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        states = [] if self.optimizer is None else list(self.optimizer.state.values())
        tensors += [value for state in states for value in state.values() if value.ndim]
        return sum(tensor.nbytes for tensor in tensors)


def prepare(case: Case, config: ScReformerConfig | None = None) -> Run:
    """Return the model of a case, of another shape if `config` is given."""
    config = case.config() if config is None else config
    model = MODELS[case.head](config).train(case.is_training)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True) if case.is_training else None

    def step(num_tokens: int, batch_size: int) -> None:
        batch = make_batch(config, case, num_tokens, batch_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            if not case.is_training:
                with torch.inference_mode():
                    model(**batch)
                return
            loss = model(**batch).loss
        loss.backward()

    return Run(model, optimizer, step)


def make_batch(config: ScReformerConfig, case: Case, num_tokens: int, batch_size: int) -> dict[str, torch.Tensor]:
    """Return random cells as the collator lays them out: all genes, or some in order, of one cell a few fewer."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, num_tokens)
    batch = {"input_ids": torch.randint(1, config.num_bins, shape, generator=generator)}
    if num_tokens < config.num_genes:
        genes = [torch.randperm(config.num_genes, generator=generator)[:num_tokens] for _ in range(batch_size)]
        batch["gene_ids"] = torch.stack(genes).sort(dim=1).values
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
        if batch_size > 1:
            batch["attention_mask"][-1, -(num_tokens // 100 + 1) :] = 0
    if case.is_training and case.head == "masked_lm":
        is_masked = torch.rand(shape, generator=generator) < MASKED_FRACTION
        batch["labels"] = batch["input_ids"].masked_fill(~is_masked, IGNORED_LABEL)
    elif case.is_training:
        batch["labels"] = torch.randint(0, config.num_labels, (batch_size,), generator=generator)
    return batch


def allocated_memory(make: Callable[[], Kept], use: Callable[[Kept], object]) -> int:
    """Return the most bytes that `use` has at once from PyTorch's CPU allocator, by its own count, `make`'s included.

    `make` returns what `use` is called with; what it needed only to be made does not count.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = make()
        start = time.time_ns()
        use(kept)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        if event.start_ns() >= start:
            highest = max(highest, now)
    return highest


def _row(case: Case, used: Measured, taken: Measured) -> Row:
    estimate = case.predict()
    ratio = estimate.total / used.peak_bytes
    return {
        **asdict(case),
        "predicted_bytes": estimate.total,
        "predicted_parts": {name: value for name, value in estimate._asdict().items() if name != "batch_size"},
        "measured_bytes": used.peak_bytes,
        "ratio": round(ratio, 4),
        "is_within": abs(ratio - 1) <= TOLERANCE,
        "taken_by_default_bytes": taken.highest_bytes,
        "seconds": round(taken.seconds, 3),
        "seconds_without_hoarding": round(used.seconds, 3),
    }


def _describe(rows: list[Row], skipped: list[Row], command: str) -> dict[str, Any]:
    errors = [abs(row["ratio"] - 1) for row in rows]
    return {
        "question": "Does a step take the memory that is predicted?",
        "command": command,
        "date": date.today().isoformat(),
        "device": describe_device("cpu"),
        "versions": software_versions(),
        "tolerance": TOLERANCE,
        "num_within": sum(row["is_within"] for row in rows),
        "largest_error": max(errors, default=None),
        "measurements": rows,
        "skipped": skipped,
    }


def _write(results: Mapping[str, Any], output: Path) -> None:
    stem = output / f"{NAME}_cpu"
    write_json(stem.with_suffix(".json"), results)
    write_text(stem.with_suffix(".md"), format_memory(results))
    plot_memory(results, stem.with_suffix(".png"))


def format_memory(results: Mapping[str, Any]) -> str:
    """Return the results as text: a table of the cases, then what was skipped."""
    device, rows = results["device"], results["measurements"]
    header = ["Case", "Tokens", "Batch", "Predicted MB", "Measured MB", "Ratio", "Taken by default MB", "Seconds"]
    lines = []
    for row in rows:
        sizes = [f"{row[name] / MEGABYTE:,.0f}" for name in ("predicted_bytes", "measured_bytes")]
        lines.append(
            [
                _title(row),
                f"{row['num_tokens']:,}",
                str(row["batch_size"]),
                *sizes,
                f"{row['ratio']:.3f}" + ("" if row["is_within"] else " OUTSIDE"),
                f"{row['taken_by_default_bytes'] / MEGABYTE:,.0f}",
                f"{row['seconds']:.1f}",
            ]
        )
    parts = [
        f"# {results['question']}",
        f"{results['date']}, {device['name']}, {device['threads']} threads, torch {results['versions']['torch']}. "
        f"Made by `{results['command']}`.",
        f"{results['num_within']} of {len(rows)} cases are within {results['tolerance']:.0%}; the largest error is "
        f"{results['largest_error']:.1%}. Measured is what a step uses; by default the C library keeps freed blocks, "
        "and a process takes more.",
        format_table(header, lines),
    ]
    if results["skipped"]:
        skipped = [
            [_title(row), str(row["num_tokens"]), str(row["batch_size"]), row["reason"]] for row in results["skipped"]
        ]
        parts += ["## Skipped", format_table(["Case", "Tokens", "Batch", "Reason"], skipped)]
    return "\n\n".join(parts) + "\n"


def plot_memory(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw predicted against measured bytes as a PNG, logarithmic, with the tolerated band."""
    figure = Figure(figsize=(7.0, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes, rows = figure.subplots(), results["measurements"]
    ends = [0.8 * min(row["measured_bytes"] for row in rows), 1.25 * max(row["measured_bytes"] for row in rows)]
    ends = [end / GIGABYTE for end in ends]
    tolerance = results["tolerance"]
    axes.fill_between(
        ends,
        [end * (1 - tolerance) for end in ends],
        [end * (1 + tolerance) for end in ends],
        color="0.9",
        label=f"within {tolerance:.0%}",
    )
    axes.plot(ends, ends, color="0.6", linewidth=1)
    kinds = list(dict.fromkeys((row["preset"], row["step"]) for row in rows))
    for (preset, step), color in zip(kinds, COLORS, strict=False):
        chosen = [row for row in rows if (row["preset"], row["step"]) == (preset, step)]
        for dtype, marker in (("float32", "o"), ("bfloat16", "x")):
            points = [row for row in chosen if row["dtype"] == dtype]
            axes.plot(
                [row["measured_bytes"] / GIGABYTE for row in points],
                [row["predicted_bytes"] / GIGABYTE for row in points],
                marker=marker,
                color=color,
                linestyle="",
                label=f"{preset}, {step}, {dtype}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Measured (GB)")
    axes.set_ylabel("Predicted (GB)")
    axes.set_title("Peak memory of a step")
    axes.legend(frameon=False)
    save_figure(figure, path)


def _title(row: Row) -> str:
    head = {"masked_lm": "masked genes", "cell_classification": "cell types"}[row["head"]]
    return f"{row['preset']}, {row['step']}, {head}, {row['dtype']}"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.memory",
        description="Compare the predicted memory of inference and training steps with what they take on a CPU.",
        epilog="example: python -m screformer.benchmarks.memory --presets tiny --batch-sizes 1 4 --output runs",
    )
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), help="Sizes of the model.")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[EXPRESSED_TOKENS, NUM_GENES], help=f"Tokens, up to {NUM_GENES}."
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES), help="Cells at once.")
    parser.add_argument("--time-limit", type=float, default=60.0, help="Seconds a step (default: %(default)s).")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what `measure_in_new_process` asks for
    given = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(given)
    try:
        if options.case is not None:
            sys.stdout.write(json.dumps(measure(Case(**json.loads(options.case)))._asdict()) + "\n")
            return
        cases = list(all_cases(options.presets, options.lengths, options.batch_sizes))
        results = benchmark_memory(
            options.output, cases, time_limit=options.time_limit, command=" ".join([parser.prog, *given])
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n" + format_memory(results))


if __name__ == "__main__":
    main()
