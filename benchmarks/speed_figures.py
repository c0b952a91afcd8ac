"""Tables and figures of the speed benchmarks, each drawn from the rows in the result file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.benchmarks.measuring import MEGABYTE, PLACE, STEPS, Row
from screformer.train.figures import COLORS, FONT_SIZE, save_figure
from screformer.train.result_files import write_json, written_aside

KEY = (*PLACE, "contestant")
MARKERS = ("o", "s", "^", "D", "v", "P")
STEP_TITLES = {"forward": "Inference", "training": "Forward and backward"}
SERIES_TITLES = {"length": "Length (genes)", "batch": "Batch size (cells)", "depth": "Layers"}
SERIES_SIZES = {"length": "length", "batch": "batch_size", "depth": "num_layers"}


def write_speed_results(results: Mapping[str, Any], stem: Path, *, title: str) -> None:
    """Write ``stem.json``, ``stem.md`` (see `format_results`) and ``stem.png`` (see `plot_growth`)."""
    write_json(stem.with_suffix(".json"), results)
    write_text(stem.with_suffix(".md"), format_results(results))
    plot_growth(results, stem.with_suffix(".png"), title=title)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns also line up as plain text; all but the first are flush right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def format_results(results: Mapping[str, Any]) -> str:
    """Return the text of a speed benchmark: targets, then a table for each series and step, then what was skipped.

    `results` is the content of the result file; the first of its contestants is what the others are divided by.
    """
    device, titles = results["device"], results["contestants"]
    parts = [
        f"# {results['question']}",
        f"{results['date']}, {device['name']}, {device['threads']} threads, torch {results['versions']['torch']}. "
        f"Made by `{results['command']}`.",
        "## Targets",
        format_targets(results["targets"]),
    ]
    for series in dict.fromkeys(row["series"] for row in results["measurements"]):
        for step in STEPS:
            parts += [
                f"## {STEP_TITLES[step]}, by {SERIES_TITLES[series].lower()}",
                _format_series(results, series, step, titles),
            ]
    if results.get("growth"):
        parts += ["## Growth with length (lengths timed in turn)", _format_growth(results, titles)]
    if results["skipped"]:
        parts += ["## Skipped", _format_skipped(results["skipped"], titles)]
    return "\n\n".join(parts) + "\n"


def format_targets(targets: Sequence[Row]) -> str:
    """Return the targets as a table: what was wanted, what was measured, whether it is met."""
    answers = {True: "yes", False: "NO", None: "not measured"}
    rows = []
    for target in targets:
        side, wanted = ("at least", target["at_least"]) if "at_least" in target else ("at most", target["at_most"])
        measured = "" if target["measured"] is None else f"{target['measured']:.3g}"
        rows.append([target["target"], f"{side} {wanted:g}", measured, answers[target["is_met"]]])
    return format_table(["Target", "Wanted", "Measured", "Met"], rows)


def plot_growth(results: Mapping[str, Any], path: str | Path, *, title: str) -> None:
    """Draw time and peak memory of both steps against length as a PNG, logarithmic, with exponents in the legend."""
    figure = Figure(figsize=(15.0, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    titles, exponents = results["contestants"], results["exponents"]
    for column, step in enumerate(STEPS):
        time_axes, memory_axes = panels[:, column]
        rows = [row for row in results["measurements"] if row["series"] == "length" and row["step"] == step]
        _plot_lines(time_axes, rows, titles, lambda row: row["median_seconds"], exponents[step])
        _plot_lines(memory_axes, rows, titles, lambda row: row["peak_bytes"] / MEGABYTE)
        time_axes.set_title(STEP_TITLES[step])
        time_axes.set_ylabel("Seconds a call")
        memory_axes.set_ylabel("Peak memory (MB)")
        memory_axes.set_xlabel("Length (genes)")
    figure.suptitle(title)
    save_figure(figure, path)


def format_hashing(results: Mapping[str, Any]) -> str:
    """Return the text of the hashing benchmark: every setting beside random order, and the constant baseline."""
    random_rows = {(row["num_hashes"], row["bucket_size"]): row for row in results["baselines"]["random_order"]}
    lines = []
    for row in results["settings"]:
        random_row = random_rows[row["num_hashes"], row["bucket_size"]]
        name = f"{row['hashing']}, {'a rotation a head' if row['is_per_head'] else 'shared'}"
        numbers = [row["error"], random_row["error"], row["covered_mass"], random_row["covered_mass"]]
        times = [row[f"{step}_median_seconds"] for step in STEPS]
        peaks = [row.get(f"{step}_peak_bytes") for step in STEPS]
        lines.append(
            [
                name + (" (default)" if row["is_default"] else ""),
                *(str(row[key]) for key in ("num_hashes", "bucket_size")),
                *(f"{number:.3f}" for number in (*numbers, *times)),
                *("" if peak is None else f"{peak / MEGABYTE:,.0f}" for peak in peaks),
            ]
        )
    header = [
        *("Hashing", "Rounds", "Bucket", "Error", "Random order", "Covered mass", "Random order"),
        *("Forward s", "Training s", "Forward MB", "Training MB"),
    ]
    device, constant = results["device"], results["baselines"]["mean_of_values"]["error"]
    parts = [
        f"# {results['question']}",
        f"{results['date']}, {device['name']}, {device['threads']} threads, torch {results['versions']['torch']}. "
        f"Made by `{results['command']}`. Model: {results['model']}; layers {results['layers']}, "
        f"{results['num_cells']} cells, {results['num_genes']:,} genes.",
        format_table(header, lines),
        f"Error of the mean of all values as the output: {constant:.3f}.",
    ]
    return "\n\n".join(parts) + "\n"


def plot_hashing(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw the error against the time of the forward pass as a PNG, a panel for each family of hash functions."""
    rows = results["settings"]
    hashings = list(dict.fromkeys(row["hashing"] for row in rows))
    colors = dict(zip(sorted({row["num_hashes"] for row in rows}), COLORS, strict=False))
    markers = dict(zip(sorted({row["bucket_size"] for row in rows}), MARKERS, strict=False))
    figure = Figure(figsize=(3.0 + 4.6 * len(hashings), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, hashing in zip(figure.subplots(1, len(hashings), sharey=True, squeeze=False)[0], hashings, strict=True):
        of_hashing = [row for row in rows if row["hashing"] == hashing]
        _plot_settings(axes, of_hashing, results["baselines"], colors, markers)
        axes.set_title(hashing.replace("_", "-"))
        axes.set_xlabel("Seconds of a forward pass")
    figure.axes[0].set_ylabel("Relative error against exact attention")
    _add_hashing_legend(figure.axes[-1], colors, markers)
    figure.suptitle("LSH attention against exact attention on real cells")
    save_figure(figure, path)


def _plot_settings(
    axes: Axes,
    rows: Sequence[Row],
    baselines: Mapping[str, Any],
    colors: Mapping[int, str],
    markers: Mapping[int, str],
) -> None:
    random_errors = {(row["num_hashes"], row["bucket_size"]): row["error"] for row in baselines["random_order"]}
    for row in rows:
        seconds, color = row["forward_median_seconds"], colors[row["num_hashes"]]
        marker, face = markers[row["bucket_size"]], "none" if row["is_per_head"] else color
        axes.plot(seconds, row["error"], marker=marker, color=color, markerfacecolor=face, linestyle="")
        if not row["is_per_head"]:
            error = random_errors[row["num_hashes"], row["bucket_size"]]
            axes.plot(seconds, error, marker="x", color="0.6", linestyle="")
        if row["is_default"]:
            axes.plot(seconds, row["error"], marker="o", color="black", markerfacecolor="none", markersize=16)
    axes.axhline(baselines["mean_of_values"]["error"], color="0.6", linestyle="--")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    style_axes(axes)


def _add_hashing_legend(axes: Axes, colors: Mapping[int, str], markers: Mapping[int, str]) -> None:
    for num_hashes, color in colors.items():
        axes.plot([], [], color=color, marker="o", linestyle="", label=f"rounds: {num_hashes}")
    for bucket_size, marker in markers.items():
        axes.plot([], [], color="0.3", marker=marker, linestyle="", label=f"bucket size {bucket_size}")
    axes.plot([], [], color="0.3", marker="o", markerfacecolor="none", linestyle="", label="a rotation a head")
    axes.plot([], [], color="black", marker="o", markerfacecolor="none", markersize=12, linestyle="", label="default")
    axes.plot([], [], color="0.6", marker="x", linestyle="", label="random order")
    axes.plot([], [], color="0.6", linestyle="--", label="mean of all values")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=FONT_SIZE - 1)


def style_axes(axes: Axes) -> None:
    """Give axes the package's looks: open to the top and right, a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.grid(color="0.9")


def _plot_lines(
    axes: Axes,
    rows: Sequence[Row],
    titles: Mapping[str, str],
    value_of: Callable[[Row], float],
    exponents: Mapping[str, float | None] | None = None,
) -> None:
    for index, (name, title) in enumerate(titles.items()):
        points = [(row["length"], value_of(row)) for row in rows if row["contestant"] == name and value_of(row) > 0]
        if not points:
            continue
        exponent = None if exponents is None else exponents.get(name)
        label = title if exponent is None else f"{title}, exponent {exponent:.2f}"
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        lengths, values = zip(*points, strict=True)
        axes.plot(lengths, values, label=label, color=color, marker=marker, markersize=4, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda length, _: f"{length:,.0f}")
    style_axes(axes)
    if exponents is not None and axes.lines:
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=FONT_SIZE - 1)


def _format_series(results: Mapping[str, Any], series: str, step: str, titles: Mapping[str, str]) -> str:
    """Return one row a contestant and size: time, memory, and both divided by the first contestant's."""
    ours = next(iter(titles))
    ratios = {tuple(row[key] for key in KEY): row for row in results["ratios"]}
    lines = []
    for row in results["measurements"]:
        if (row["series"], row["step"]) != (series, step):
            continue
        ratio = ratios.get(tuple(row[key] for key in KEY))
        is_own = row["contestant"] == ours
        times = "1.00" if is_own else _shown(ratio, "time_ratio")
        memories = "1.00" if is_own else _shown(ratio, "memory_ratio")
        size = f"{row[SERIES_SIZES[series]]:,}"
        megabytes = f"{row['peak_bytes'] / MEGABYTE:,.0f}"
        lines.append([titles[row["contestant"]], size, f"{row['median_seconds']:.4f}", times, megabytes, memories])
    header = ["Contestant", SERIES_TITLES[series], "Seconds", "Time to ours", "Peak MB", "Memory to ours"]
    return format_table(header, lines)


def _format_growth(results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Return one row a length and step, with the time a thousand genes; the fitted exponents are in the targets."""
    lines = [
        [
            titles[row["contestant"]],
            STEP_TITLES[row["step"]],
            f"{row['length']:,}",
            f"{row['median_seconds']:.4f}",
            f"{row['median_seconds'] / row['length'] * 1e6:.1f}",
        ]
        for row in results["growth"]
    ]
    return format_table(["Contestant", "Step", "Length", "Seconds", "ms a thousand genes"], lines)


def _format_skipped(skipped: Sequence[Row], titles: Mapping[str, str]) -> str:
    rows = [
        [
            titles[row["contestant"]],
            STEP_TITLES[row["step"]],
            *(f"{row[size]:,}" for size in ("batch_size", "length", "num_layers")),
            row["reason"],
        ]
        for row in skipped
    ]
    return format_table(["Contestant", "Step", "Batch", "Length", "Layers", "Reason"], rows)


def _shown(ratio: Row | None, key: str) -> str:
    return "" if ratio is None or ratio[key] is None else f"{ratio[key]:.2f}"
