"""Tables and figure of what was measured on a GPU, drawn from the result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.benchmarks.gpu_attention import FLASH, ours
from screformer.benchmarks.gpu_steps import KINDS, PAPER_CELLS_PER_SECOND
from screformer.benchmarks.measuring import GIGABYTE, MEGABYTE, STEPS, Row
from screformer.benchmarks.speed_figures import MARKERS, STEP_TITLES, format_table, format_targets, style_axes
from screformer.train.figures import COLORS, FONT_SIZE, save_figure

PAPER = "the paper, A100"


def format_gpu(results: Mapping[str, Any]) -> str:
    """Return the text: targets, then a table for each part that was measured."""
    why = results["why_not_triton"]
    parts = [
        f"# {results['question']}",
        f"{results['device']['name']}; preset {results['preset']}, {results['num_genes']:,} genes, by default "
        f"{results['default_rounds']} rounds of hashing; bfloat16."
        + ("" if why is None else f" Without the Triton kernels: {why}."),
        format_targets(results["targets"]),
    ]
    formats = {
        "correctness": _format_correctness,
        "attention": _format_attention,
        "steps": _format_steps,
        "feeding": _format_feeding,
        "roofline": _format_roofline,
        "profile": _format_profile,
    }
    for name, form in formats.items():
        if name not in results["parts"]:
            continue
        part = results["parts"][name]
        versions = ", ".join(f"{key} {part['versions'][key]}" for key in ("torch", "triton", "transformers"))
        parts += [f"## {name.capitalize()}", f"{part['date']}, {versions}; `{part['command']}`.", *form(part)]
    return "\n\n".join(parts) + "\n"


def _format_correctness(part: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            row["dtype"],
            str(row["head_dim"]),
            str(row["rounds"]),
            f"{row['error']:.1e}",
            f"{row['plain_error']:.1e}",
            "yes" if row["is_right"] else "NO",
        ]
        for row in part["rows"]
    ]
    header = ["Type", "Head width", "Rounds", "Error", "Plain form's", "Within twice that, or rounding"]
    return [
        f"Implementation {part['implementation']}. Errors relative to float64, the worst of output and gradients.",
        format_table(header, rows),
    ]


def _format_attention(part: Mapping[str, Any]) -> list[str]:
    texts = []
    for step in STEPS:
        own = [row for row in part["rows"] if row["step"] == step]
        flash = {row["length"]: row["median_seconds"] for row in own if row["contestant"] == FLASH and "seconds" in row}
        rows = []
        for row in own:
            place = [row["contestant"], f"{row['length']:,}", str(row["batch_size"])]
            if "reason" in row:
                rows.append([*place, "", "", "", row["reason"][:60]])
                continue
            faster = flash.get(row["length"])
            ratio = "" if faster is None else f"{faster / row['median_seconds']:.2f}"
            milliseconds, memory = f"{1000 * row['median_seconds']:.2f}", f"{row['peak_bytes'] / GIGABYTE:.2f}"
            rows.append([*place, milliseconds, memory, ratio, ""])
        header = ["Contestant", "Length", "Cells", "ms", "Peak GB", "Times faster than flash", "Not measured"]
        texts += [f"**{STEP_TITLES[step]}**", format_table(header, rows)]
    return texts


def _format_steps(part: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in part["rows"]:
        rounds = f"{row['rounds']} rounds" if row["attention"] == "lsh" else "exact"
        kind = row["kind"] + (", CUDA graph" if row["is_graphed"] else "")
        kind += ", compiled" if row["is_compiled"] else ""
        place = [kind, rounds, str(row["batch_size"])]
        if "reason" in row:
            rows.append([*place, "", "", row["reason"][:60]])
        else:
            rows.append([*place, f"{row['cells_per_second']:,.0f}", f"{row['peak_bytes'] / GIGABYTE:.1f}", ""])
    paper = ", ".join(f"{kind} {number}" for kind, number in PAPER_CELLS_PER_SECOND.items())
    header = ["Step", "Attention", "Cells", "Cells/s", "Peak GB", "Not measured"]
    return [f"The paper's cells a second on an A100: {paper}.", format_table(header, rows)]


def _format_feeding(part: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            row["laid_out_on"],
            str(row["batch_size"]),
            f"{row['bytes_sent'] / MEGABYTE:.2f}",
            f"{1000 * row['make_seconds']:.2f}",
            f"{1000 * row['deliver_seconds']:.3f}",
        ]
        for row in part["rows"]
    ]
    return [format_table(["Laid out on", "Cells", "MB sent", "ms to make", "ms to deliver"], rows)]


def _format_roofline(part: Mapping[str, Any]) -> list[str]:
    peaks = part["peaks"]
    rows = [
        [
            row["part"],
            str(row["rounds"]),
            f"{1000 * row['seconds']:.2f}",
            f"{row['flops'] / row['seconds'] / 1e12:.2f}",
            f"{row['share_of_flops']:.0%}",
            f"{row['bytes'] / row['seconds'] / 1e9:,.0f}",
            f"{row['share_of_bytes']:.0%}",
        ]
        for row in part["rows"]
    ]
    told = (
        f"Measured peaks: {peaks['flops_per_second'] / 1e12:.1f} TFLOP/s in a bfloat16 product, "
        f"{peaks['bytes_per_second'] / 1e9:,.0f} GB/s in a copy. Counts as the kernels' source states them; gathered "
        "bytes that come from cache can pass 100%."
    )
    header = ["Part", "Rounds", "ms", "TFLOP/s", "Share", "GB/s", "Share "]
    return [told, format_table(header, rows)]


def _format_profile(part: Mapping[str, Any]) -> list[str]:
    rows = [
        [f"`{row['name']}`", str(row["calls"]), f"{row['milliseconds']:.2f}", f"{row['share']:.1%}"]
        for row in part["rows"]
    ]
    return [
        "One pretraining step, where its time goes.",
        format_table(["Kernel or operator", "Calls", "ms", "Share"], rows),
    ]


def plot_gpu(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw attention's time by length for both steps, and cells a second of each step, as a PNG."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    rows = results["parts"].get("attention", {}).get("rows", [])
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    for axes, step in zip(panels[:2], STEPS, strict=True):
        for index, name in enumerate(names):
            own = [row for row in rows if row["contestant"] == name and row["step"] == step and "seconds" in row]
            axes.plot(
                [row["length"] for row in own],
                [1e9 * row["median_seconds"] / row["length"] / row["batch_size"] for row in own],
                color=COLORS[index % len(COLORS)],
                marker=MARKERS[index % len(MARKERS)],
                label=name,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("Length (genes)")
        axes.set_ylabel("Nanoseconds a token")
        axes.set_title(f"Attention: {STEP_TITLES[step].lower()}")
        style_axes(axes)
    if names:
        panels[1].legend(frameon=False, fontsize=FONT_SIZE - 1)
    _plot_steps(panels[2], results["parts"].get("steps", {}).get("rows", []))
    save_figure(figure, path)


def _plot_steps(axes: Any, rows: Sequence[Row]) -> None:  # Any: Axes of an array
    measured = [row for row in rows if "cells_per_second" in row and not row["is_compiled"]]
    rates: dict[str, dict[str, float]] = {}
    for row in measured:
        name = ours(row["rounds"]) if row["attention"] == "lsh" else "ours, exact attention"
        of = rates.setdefault(name, {})
        of[row["kind"]] = max(of.get(row["kind"], 0.0), row["cells_per_second"])
    rates[PAPER] = {kind: float(rate) for kind, rate in PAPER_CELLS_PER_SECOND.items()}
    height = 0.8 / len(rates)
    for index, (name, of) in enumerate(rates.items()):
        places = np.arange(len(KINDS)) + (index - (len(rates) - 1) / 2) * height
        values = [of.get(kind, 0.0) for kind in KINDS]
        axes.barh(places, values, height=0.9 * height, color=COLORS[index % len(COLORS)], label=name)
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {value:,.0f}" if value else " not measured", va="center", fontsize=FONT_SIZE - 2)
    axes.set_yticks(range(len(KINDS)), KINDS)
    axes.set_ylim(len(KINDS) - 0.5, -0.5)
    axes.margins(x=0.2)
    axes.set_axisbelow(True)
    axes.set_xlabel("Cells a second, the best batch")
    axes.set_title("Whole models, every gene")
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1)
    style_axes(axes)
