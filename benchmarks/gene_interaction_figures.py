"""Table and figure of the benchmark of gene interactions, drawn from its result file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from screformer.benchmarks.measuring import Row
from screformer.benchmarks.speed_figures import format_table, style_axes
from screformer.train.figures import COLORS, FONT_SIZE, save_figure


def format_gene_interactions(results: Mapping[str, Any]) -> str:
    """Return the text: what was measured, the areas, how settings were chosen, the pairs and the cells."""
    published, chosen = results["published"], results["chosen"]
    lines = [[row["contestant"], _shown(row, "valid"), _shown(row, "test")] for row in _by_score(results)]
    settings = [
        [f"{row['num_neighbors']} neighbours, {row['num_dimensions']} dimensions", f"{row['valid']:.3f}"]
        for row in results["selection"]
    ]
    pairs = [
        [split, *(f"{row[key]:,}" for key in ("num_read", "num_used")), f"{row['share_positive_used']:.1%}"]
        for split, row in results["pairs"].items()
    ]
    columns = ("num_cells", "num_genes", "num_pairs")
    cells = [[row["group"], *(f"{row[key]:,}" for key in columns)] for row in results["cells"]]
    parts = [
        f"# {results['question']}",
        f"{results['date']}, {len(results['seeds'])} seeds, each with vectors and a classifier of its own; "
        f"{results['num_bins']} bins; {chosen['num_neighbors']} neighbours, {chosen['num_dimensions']} dimensions, "
        f"{chosen['num_epochs']} epochs. Area under the ROC curve, mean and standard deviation over the seeds.",
        format_table(["What is known of a gene", "validation", "test"], lines),
        f"The cosine of our vectors alone, nothing learned from labelled pairs: {results['cosine_alone']:.3f} (test). "
        f"Published: {published['auc']:.3f} ({published['source']}); not the same pairs, and other vectors. "
        f"{results['note']}",
        "## Settings, chosen by the validation pairs",
        format_table(["Setting", "validation"], settings),
        "## Pairs",
        "Used are those of genes that have a vector of ours. No gene is in two splits.",
        format_table(["Split", "in the file", "used", "interact"], pairs),
        "## Cells",
        format_table(["Group", "cells", "genes", "pairs found"], cells),
        f"`{results['command']}`",
    ]
    return "\n\n".join(parts) + "\n"


def plot_gene_interactions(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw the test areas as bars from 0.5, the best on top, with their spread over the seeds, as a PNG."""
    rows = _by_score(results)
    figure = Figure(figsize=(8.5, 1.6 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        color = COLORS[0] if row["contestant"].startswith("own Gene2vec") else COLORS[1]
        spread = row["test_spread"] or 0.0
        axes.barh(place, row["test"] - 0.5, left=0.5, height=0.7, color=color, xerr=spread, ecolor="0.3")
        end = max(row["test"], 0.5) + spread + 0.004
        axes.text(end, place, f"{row['test']:.3f}", va="center", fontsize=FONT_SIZE - 1)
    axes.axvline(0.5, color="0.3", linewidth=1)
    published = results["published"]["auc"]
    axes.axvline(published, color="0.3", linestyle="--", linewidth=1)
    axes.text(published - 0.003, -0.75, f"published {published:.3f}", ha="right", fontsize=FONT_SIZE - 1)
    axes.set_yticks(range(len(rows)), [row["contestant"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -1.1)
    axes.set_xlim(min(0.47, *(row["test"] - 0.02 for row in rows)), max(0.76, *(row["test"] + 0.04 for row in rows)))
    axes.set_xlabel("Area under the ROC curve, test pairs")
    style_axes(axes)
    save_figure(figure, path)


def _by_score(results: Mapping[str, Any]) -> list[Row]:
    return sorted(results["contestants"], key=lambda row: -row["test"])


def _shown(row: Row, key: str) -> str:
    spread = row[f"{key}_spread"]
    return f"{row[key]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
