"""Table and figure of the benchmark of attention between genes, drawn from its result file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.benchmarks.measuring import Row
from screformer.benchmarks.speed_figures import format_table, save_figure, style_axes
from screformer.train.figures import COLORS, FONT_SIZE

NOTE = (
    "Attention is the sum of both directions over all cells, mean over heads and layers. Intervals (95%) are of pairs "
    "drawn anew 1,000 times; pairs share genes, so that they are too narrow rather than too wide. No score has learned "
    "from labelled pairs."
)


def format_attention_interactions(results: Mapping[str, Any]) -> str:
    """Return the text: the verdict, the areas, attention beside each rival, pairs and cells."""
    pairs, cells, model = results["pairs"], results["cells"], results["model"]
    areas = [[row["score"], f"{row['area']:.3f}", _span(row["interval"], "")] for row in _by_area(results)]
    rivals = [
        [row["score"], row["rival"], f"{row['difference']:+.3f}", _span(row["interval"], "+"), row["outcome"]]
        for row in results["differences"]
    ]
    parts = [
        f"# {results['question']}",
        f"**{results['verdict']}**",
        f"{results['date']}, model {model['name']} ({model['attention']} attention, {results['gene_space']} gene "
        f"space, layers {', '.join(map(str, results['attention_layers']))}), {cells['num_cells']:,} cells of "
        f"{cells['file']}, {pairs['num_used']:,} of {pairs['num_read']:,} test pairs between {pairs['num_genes']:,} "
        f"genes, {pairs['share_positive']:.1%} of which interact. screformer {results['versions']['screformer']}, "
        f"torch {results['versions']['torch']}, {results['device']['threads']} threads.",
        NOTE,
        "## Area under the ROC curve",
        format_table(["Score of a pair", "area", "interval"], areas),
        "## Attention beside its rivals",
        format_table(["Score", "rival", "difference", "interval", "outcome"], rivals),
        f"`{results['command']}`",
    ]
    return "\n\n".join(parts) + "\n"


def plot_attention_interactions(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw the areas as bars from 0.5, the best on top, with their intervals, as a PNG."""
    rows = _by_area(results)
    figure = Figure(figsize=(9.0, 1.6 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    named: set[str] = set()
    for place, row in enumerate(rows):
        kind, color, hatch = _kind(row["score"])
        label = None if kind in named else kind
        named.add(kind)
        low, high = row["interval"]
        axes.barh(place, row["area"] - 0.5, left=0.5, height=0.7, color=color, hatch=hatch, ec="white", label=label)
        axes.plot([low, high], [place, place], color="black", linewidth=1.2, solid_capstyle="butt")
        axes.text(max(high, 0.5) + 0.004, place, f"{row['area']:.3f}", va="center", fontsize=FONT_SIZE - 1)
    axes.axvline(0.5, color="0.3", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["score"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    ends = [end for row in rows for end in row["interval"]]
    axes.set_xlim(min(0.47, min(ends) - 0.02), max(0.65, max(ends) + 0.06))
    axes.set_xlabel("Area under the ROC curve, test pairs (line: 95% interval)")
    axes.legend(frameon=False, loc="lower right", fontsize=FONT_SIZE - 1)
    style_axes(axes)
    axes.set_axisbelow(True)
    save_figure(figure, path)


def _kind(score: str) -> tuple[str, str, str | None]:
    """Return what a score is, its colour and its pattern."""
    if score.startswith("untrained"):
        return "untrained model", COLORS[4], "///"
    return ("trained model", COLORS[0], None) if score.startswith("attention") else ("no model", COLORS[1], "...")


def _by_area(results: Mapping[str, Any]) -> list[Row]:
    return sorted(results["scores"], key=lambda row: -row["area"])


def _span(interval: list[float], sign: str) -> str:
    return f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}"
