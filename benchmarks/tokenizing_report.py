"""What follows from the numbers of the tokenizing benchmark: targets, what many cells take, tables and figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.benchmarks.contest import judge
from screformer.benchmarks.many_cells import Compression
from screformer.benchmarks.measuring import GIGABYTE, MEGABYTE, Row
from screformer.benchmarks.speed_figures import format_table, format_targets, style_axes, write_text
from screformer.train.figures import COLORS, FONT_SIZE, save_figure
from screformer.train.result_files import write_json

COMPRESSIONS: tuple[Compression, ...] = ("gzip", "lzf", "none")
READING, OURS, CORPUS = "reading", "ours", "corpus"
RANKS, DENSE, ALIGNED = "ranks", "dense", "aligned"
TITLES = {
    READING: "h5py, reading CSR blocks only",
    OURS: "screformer: read, tokenize, write Arrow",
    CORPUS: "screformer corpus, one process, everything",
    RANKS: "loop over cells, ranks, as Geneformer's tokenizer",
    DENSE: "loop over cells, dense, as scBERT's data set",
    ALIGNED: "loop over genes, then cells, as scBERT's preprocessing and data set",
}
MANY = 15_000_000
CORES = (1, 2, 8, 16, 32)
USUAL_GENES = 918  # expressed genes of a cell if 5.3% of 17,330 are
LEAST_SHARE, LEAST_TIMES = 0.6, 10.0
MOST_GIGABYTES, MOST_GROWTH, MOST_DISK = 1.5, 1.1, 50.0


def find_rate(results: Mapping[str, Any], contestant: str, compression: str = "gzip") -> float | None:
    """Return the cells a contestant does in a second of processor time, None if it was not measured."""
    return next(
        (
            row["cells_per_processor_second"]
            for row in results["speed"]
            if (row["contestant"], row["compression"]) == (contestant, compression)
        ),
        None,
    )


def judge_tokenizing(results: Mapping[str, Any]) -> list[Row]:
    """Return the targets and whether they are met."""

    def ratio(above: str, below: str, compression: str = "gzip") -> float | None:
        rates = [find_rate(results, name, compression) for name in (above, below)]
        return None if rates[0] is None or rates[1] is None else rates[0] / rates[1]

    targets = [
        judge(
            f"{compression}: speed of ours divided by that of merely reading",
            ratio(OURS, READING, compression),
            at_least=LEAST_SHARE,
        )
        for compression in COMPRESSIONS
    ]
    for name in (RANKS, DENSE, ALIGNED):
        targets.append(judge(f"times the speed of: {TITLES[name]}", ratio(OURS, name), at_least=LEAST_TIMES))
    memory = results["memory"]
    peaks = [row["peak_bytes"] for row in memory]
    targets.append(judge("GB of a process at most", max(peaks) / GIGABYTE if peaks else None, at_most=MOST_GIGABYTES))
    growth = max(peaks) / peaks[0] if len(peaks) > 1 else None
    targets.append(judge("peak memory of the largest corpus divided by the smallest's", growth, at_most=MOST_GROWTH))
    disk = _disk(memory[-1], USUAL_GENES) if memory else None
    title = f"GB of a corpus of {MANY:,} cells with {USUAL_GENES} genes each"
    return [*targets, judge(title, disk, at_most=MOST_DISK)]


def project(results: Mapping[str, Any]) -> Row | None:
    """Return what `MANY` cells take, derived from the rate and the bytes of the largest corpus; None without one."""
    if not results["memory"]:
        return None
    row = results["memory"][-1]
    num_genes = row["num_tokens"] / row["num_cells"]
    return {
        "num_cells": MANY,
        "measured_on_cells": row["num_cells"],
        "cells_per_second_and_core": row["cells_per_processor_second"],
        "hours": {str(cores): MANY / row["cells_per_processor_second"] / cores / 3600 for cores in CORES},
        "input_gigabytes": row["file_bytes"] / row["num_cells"] * MANY / GIGABYTE,
        "corpus_gigabytes": {str(genes): _disk(row, genes) for genes in (round(num_genes), USUAL_GENES)},
    }


def _disk(row: Row, num_genes: float) -> float:
    """Return the GB of `MANY` cells: three bytes a token, and what is over them in the measured corpus."""
    rest = row["corpus_bytes"] / row["num_cells"] - 3 * row["num_tokens"] / row["num_cells"]
    return MANY * (3 * num_genes + rest) / GIGABYTE


def write_tokenizing(results: Mapping[str, Any], stem: Path) -> None:
    """Write ``stem.json`` and ``stem.md`` (see `format_tokenizing`)."""
    write_json(stem.with_suffix(".json"), results)
    write_text(stem.with_suffix(".md"), format_tokenizing(results))


def format_tokenizing(results: Mapping[str, Any]) -> str:
    """Return the results as text: targets, speed, memory, and what many cells take."""
    device = results["device"]
    parts = [
        f"# {results['question']}",
        f"{results['date']}, {device['name']}, one process, one thread; cells/s are of processor time; "
        f"numpy {results['versions']['numpy']}, "
        f"h5py {results['versions']['h5py']}. Made by `{results['command']}`. The cells are made: real "
        "ones, thinned and mixed.",
        "## Targets",
        format_targets(results["targets"]),
        "## Speed",
        _format_speed(results),
    ]
    if results["memory"]:
        parts += ["## Memory of a process that builds a corpus", _format_memory(results)]
    if results["many_cells"] is not None:
        parts += [f"## {results['many_cells']['num_cells']:,} cells, derived", _format_many(results["many_cells"])]
    return "\n\n".join(parts) + "\n"


def plot_tokenizing(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw cells/s of the contestants and peak memory by cells as a PNG."""
    figure = Figure(figsize=(15.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    speed_axes, memory_axes = figure.subplots(1, 2, width_ratios=[1.3, 1])
    _plot_speed(speed_axes, results)
    memory = results["memory"]
    for color, label, rows in (
        (COLORS[0], "building, at its highest", [(row["num_cells"], row["peak_bytes"]) for row in memory]),
        (COLORS[1], "reading, shuffled, its own", _own_bytes_of_reading(memory)),
    ):
        sizes, peaks = [size for size, _ in rows], [used / MEGABYTE for _, used in rows]
        memory_axes.plot(sizes, peaks, marker="o", color=color, label=label)
    memory_axes.set_xscale("log")
    memory_axes.set_ylim(bottom=0, top=1600)
    memory_axes.axhline(1500, color="0.6", linestyle="--")
    memory_axes.set_xlabel("Cells")
    memory_axes.set_ylabel("Peak memory of the process (MB)")
    memory_axes.legend(frameon=False, fontsize=FONT_SIZE)
    style_axes(memory_axes)
    save_figure(figure, path)


def _own_bytes_of_reading(memory: list[Row]) -> list[tuple[int, int]]:
    return [(row["num_cells"], row["reading"]["own_bytes"]) for row in memory if "reading" in row]


def _plot_speed(axes: Axes, results: Mapping[str, Any]) -> None:
    rows = list(reversed(results["speed"]))
    contestants = list(results["contestants"])
    names = [f"{results['contestants'][row['contestant']]} ({row['compression']})" for row in rows]
    colors = [COLORS[contestants.index(row["contestant"])] for row in rows]
    rates = [row["cells_per_processor_second"] for row in rows]
    bars = axes.barh(range(len(rows)), rates, color=colors)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=FONT_SIZE - 1)
    axes.set_yticks(range(len(rows)), names)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("Cells a second of processor time, one process")
    style_axes(axes)


def _format_speed(results: Mapping[str, Any]) -> str:
    reading = {compression: find_rate(results, READING, compression) or float("nan") for compression in COMPRESSIONS}
    lines = [
        [
            results["contestants"][row["contestant"]],
            row["compression"],
            f"{row['file_bytes_per_cell']:,.0f}",
            f"{row['cells_per_processor_second']:,.0f}",
            f"{row['cells_per_processor_second'] / reading[row['compression']]:.3f}",
            f"{row['cells_per_second']:,.0f}",
        ]
        for row in results["speed"]
    ]
    header = ["Contestant", "Compression", "File bytes a cell", "Cells/s", "Of reading", "Cells/s, wall"]
    return format_table(header, lines)


def _format_memory(results: Mapping[str, Any]) -> str:
    lines = []
    for row in results["memory"]:
        lines.append([*_memory_line("building", row), f"{row['corpus_bytes'] / row['num_cells']:,.0f}"])
        if "reading" in row:
            once = "each cell once" if row["reading"]["is_each_seen_once"] else "NOT EACH CELL ONCE"
            lines.append([*_memory_line(f"reading, shuffled, {once}", row["reading"]), ""])
    return format_table(
        ["Step", "Cells", "Peak MB", "Own MB", "Seconds", "Cells/s", "Cells/s, wall", "Bytes a cell"], lines
    )


def _memory_line(step: str, row: Mapping[str, Any]) -> list[str]:
    rates = (row["cells_per_processor_second"], row["cells_per_second"])
    memory = (row["peak_bytes"] / MEGABYTE, row["own_bytes"] / MEGABYTE)
    numbers = (row["num_cells"], *memory, row["seconds"], *rates)
    return [step, *(f"{number:,.0f}" for number in numbers)]


def _format_many(many: Mapping[str, Any]) -> str:
    hours = format_table(
        ["Cores", "Hours", "Memory at most, GB"],
        [[cores, f"{hours:.2f}", f"{int(cores) * MOST_GIGABYTES:g}"] for cores, hours in many["hours"].items()],
    )
    disk = format_table(
        ["Expressed genes a cell", "Corpus, GB"],
        [[genes, f"{size:.1f}"] for genes, size in many["corpus_gigabytes"].items()],
    )
    return (
        f"From {many['measured_on_cells']:,} cells at {many['cells_per_second_and_core']:,.0f} cells/s a core, "
        "everything included (each file is read twice: inspected, then tokenized); cores are taken to work side by "
        f"side, which they do on different files and shards. The files themselves: {many['input_gigabytes']:.0f} GB."
        f"\n\n{hours}\n\n{disk}"
    )
