"""Tables and figure of the feeding benchmark, from its result file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.benchmarks.measuring import MEGABYTE
from screformer.benchmarks.speed_figures import MARKERS, format_table, format_targets, style_axes
from screformer.train.figures import COLORS, FONT_SIZE, save_figure

Results = Mapping[str, Any]  # Any: JSON
TARGET_PLACES = ("expressed", "full")
BUSY = 1.5  # a load above it is not this benchmark's alone


def format_feeding(results: Results) -> str:
    """Return the text: targets, speeds, mixing, padding, and the order of many cells."""
    device, corpus, load = results["device"], results["corpus"], results["load"]
    order, padding = results["order"], results["padding"]
    is_busy = max(load.values()) > BUSY
    remark = "; other programs were running, so that processor time says more than wall time" if is_busy else ""
    parts = [
        f"# {results['question']}",
        f"{results['date']}, {device['name']}, torch {results['versions']['torch']}, datasets "
        f"{results['versions']['datasets']}. Made by `{results['command']}`. One process without workers; load of the "
        f"machine {load['at_start']:.1f} at the start, {load['at_end']:.1f} at the end (1 is this benchmark){remark}.",
        f"Corpus: {corpus['num_cells']:,} cells of {corpus['expressed_genes']:,.0f} expressed genes "
        f"({corpus['num_genes']:,} in full space), {corpus['bytes'] / MEGABYTE:,.0f} MB in {corpus['num_files']} files."
        f" Batches of {results['batch_size']}, masked as in pretraining, from the page cache.",
        "## Targets",
        format_targets(results["targets"]),
        "## Cells a second",
        _format_speed(results),
        "## Mixing",
        "Mean entropy of a batch as a share of a full shuffle's, by block and buffer; "
        f"{results['quality']['num_cells']:,} cells in files of 20,000, each sorted by type. "
        "*Run*: which 1,000 neighbours a cell is from.",
        _format_quality(results),
        "## Padding in the expressed space",
        f"{padding['plain']:.1%} of the tokens; {padding['grouped']:.1%} with batches of similar length.",
        f"## The order of {order['num_cells']:,} cells",
        f"It holds {order['bytes_held'] / MEGABYTE:.1f} MB ({order['bytes_at_peak'] / MEGABYTE:.1f} MB for a moment). "
        f"Leaving cells out, such as held-out ones, takes {order['bytes_of_chosen_rows'] / MEGABYTE:.0f} MB more. "
        f"First batch after {order['seconds_to_first_batch']:.2f} s; resumed half way in "
        f"{order['seconds_to_resume_at_half']:.2f} s, by skipping batches (as the Trainer does, no cell is read) in "
        f"{order['seconds_to_skip_half']:.2f} s.",
    ]
    return "\n\n".join(parts) + "\n"


def _format_speed(results: Results) -> str:
    faster = {(row["place"], row["contestant"]): row["times_faster"] for row in results["ratios"]}
    rows = []
    for row in results["measurements"]:
        ratio = faster.get((row["place"], row["contestant"]), 1.0)
        low, high = min(row["cells_per_second"]), max(row["cells_per_second"])
        title = results["contestants"][row["contestant"]]
        numbers = [f"{row['median']:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{row['median_per_processor_second']:,.0f}"]
        rows.append([title, row["place"], *numbers, f"{ratio:.2f}"])
    header = ["Contestant", "Space", "Cells/s", "Rounds", "By processor time", "Ours faster (processor)"]
    return format_table(header, rows)


def _format_quality(results: Results) -> str:
    quality, defaults = results["quality"], results["defaults"]
    rows = []
    for kind, found in (("", quality["rows"]), (", similar length", quality["grouped"])):
        for row in found:
            is_default = all(row[name] == value for name, value in defaults.items()) and not kind
            title = f"{row['block_size']}{kind}" + (" (default)" if is_default else "")
            shares = (f"{row[f'{name}_share']:.4f}" for name in ("label", "file", "run"))
            rows.append([title, f"{row['buffer_size']:,}", *shares])
    return format_table(["Block", "Buffer", "Labels", "Files", "Runs"], rows)


def plot_feeding(results: Results, path: str | Path) -> None:
    """Draw cells a second of every contestant, and mixing by block and buffer, as a PNG."""
    figure = Figure(figsize=(14.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    speed, quality = figure.subplots(1, 2, width_ratios=[1.25, 1])
    _plot_speed(speed, results)
    _plot_quality(quality, results)
    save_figure(figure, path)


def _plot_speed(axes: Axes, results: Results) -> None:
    titles = list(results["contestants"].items())
    gene_spaces = list(TARGET_PLACES)
    height = 0.8 / len(gene_spaces)
    for number, gene_space in enumerate(gene_spaces):
        medians = {
            row["contestant"]: row["median_per_processor_second"]
            for row in results["measurements"]
            if row["place"] == gene_space
        }
        places = [place + (number - (len(gene_spaces) - 1) / 2) * height for place in range(len(titles))]
        values = [medians[name] for name, _ in titles]
        axes.barh(places, values, height=0.9 * height, color=COLORS[number], label=f"{gene_space} space")
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {value:,.0f}", va="center", fontsize=FONT_SIZE - 1)
    for number, gene_space in enumerate(gene_spaces):
        wanted = next(row["at_least"] for row in results["targets"] if row["target"].startswith(gene_space))
        axes.axvline(wanted, color=COLORS[number], linestyle="--", linewidth=1)
    axes.set_yticks(range(len(titles)), [title for _, title in titles])
    axes.invert_yaxis()
    style_axes(axes)
    axes.set_axisbelow(True)
    axes.margins(x=0.12)
    axes.set_xlabel("Cells a second of processor time, one process (dashed: targets)")
    axes.set_title("Reading with the collator")
    axes.legend(frameon=False, loc="lower right", fontsize=FONT_SIZE - 1)


def _plot_quality(axes: Axes, results: Results) -> None:
    rows = results["quality"]["rows"]
    for number, block_size in enumerate(dict.fromkeys(row["block_size"] for row in rows)):
        points = [(row["buffer_size"], row["label_share"]) for row in rows if row["block_size"] == block_size]
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=f"blocks of {block_size}")
    defaults = results["defaults"]
    chosen = [row for row in rows if all(row[name] == value for name, value in defaults.items())]
    for row in chosen:
        place = row["buffer_size"], row["label_share"]
        axes.plot(*place, label="default", marker="o", color="black", fillstyle="none", markersize=12, linestyle="")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
    style_axes(axes)
    axes.set_xlabel("Buffer (cells)")
    axes.set_ylabel("Entropy of labels a batch, of a full shuffle's")
    axes.set_title("Mixing, cells sorted by type")
    axes.legend(frameon=False, fontsize=FONT_SIZE - 1)
