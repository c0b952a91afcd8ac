"""Figures of an explanation: beeswarm, bars, heat map, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Patch

from screformer.annotation.explained_score import Bins
from screformer.train.figures import COLORS, FONT_SIZE, LINE_STYLES, new_figure, save_figure

NUM_SHOWN = 20
MAX_POINTS = 1_000
NUM_HEIGHTS = 60  # places along a row at which points are piled up
PILE = 0.38


def plot_beeswarm(
    values: npt.NDArray[np.float32], bins: Bins, genes: Sequence[str], path: str | Path, *, title: str, num_bins: int
) -> None:
    """Draw a row of points for each of the genes that count most: a cell each, by value, coloured by expression.

    Parameters
    ----------
    values, bins
        (cells, num_genes).
    genes
        Names.
    path
        PNG file.
    title
        Above the figure.
    num_bins
        Of expression, "not expressed" included.
    """
    top = top_genes(values)
    shown = np.linspace(0, len(values) - 1, min(MAX_POINTS, len(values))).astype(int)
    figure, axes = new_figure(7.4, 0.30 * len(top) + 1.4)
    colors = _expression_colors(num_bins)
    spread = float(np.abs(values).max()) or 1.0
    for row, gene in enumerate(top):
        own, levels = values[shown, gene], bins[shown, gene]
        heights = _pile_up(own, spread)
        axes.scatter(own, row + heights, c=[colors(level) for level in levels], s=9, linewidths=0)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(top)), [genes[gene] for gene in top])
    axes.set_ylim(len(top) - 0.4, -0.6)
    axes.set_xlabel("Value of the gene for the class's score")
    axes.set_title(title)
    scale = ScalarMappable(Normalize(-0.5, num_bins - 0.5), colors)
    bar = figure.colorbar(scale, ax=axes, ticks=range(num_bins), fraction=0.04, pad=0.02)
    bar.set_label("Expression bin (0: not expressed)")
    save_figure(figure, path)


def _expression_colors(num_bins: int) -> ListedColormap:
    """Return a colour a bin: light grey for none, then from violet to yellow, which every colour vision orders."""
    from matplotlib import colormaps

    return ListedColormap(["#D0D0D0", *colormaps["viridis"](np.linspace(0, 0.95, num_bins - 1))])


def _pile_up(values: npt.NDArray[np.float32], spread: float) -> npt.NDArray[np.float64]:
    """Return heights that keep points of like values apart."""
    places = np.round(values / spread * NUM_HEIGHTS).astype(int)
    heights = np.zeros(len(values))
    for place in np.unique(places):
        at = np.flatnonzero(places == place)
        number = np.arange(len(at))
        heights[at] = np.where(number % 2, 1, -1) * ((number + 1) // 2)
    return heights * (PILE / max(1.0, float(np.abs(heights).max())))


def plot_gene_bars(table: pd.DataFrame, path: str | Path, *, title: str) -> None:
    """Draw the mean absolute values of the 20 genes that count most; colour: what high expression does to the score.

    Parameters
    ----------
    table
        As `gene_table` gives it.
    path
        PNG file.
    title
        Above the figure.
    """
    top = table.head(NUM_SHOWN)
    figure, axes = new_figure(6.4, 0.28 * len(top) + 1.3)
    colors = [COLORS[0] if sign > 0 else COLORS[1] for sign in top["sign"]]
    axes.barh(range(len(top)), top["mean_abs_value"], color=colors)
    axes.set_yticks(range(len(top)), top["gene"].tolist())
    axes.set_ylim(len(top) - 0.4, -0.6)
    axes.set_xlabel("Mean absolute value")
    axes.set_title(title)
    handles = [
        Patch(color=COLORS[0], label="raises the score where it is high"),
        Patch(color=COLORS[1], label="lowers it"),
    ]
    axes.legend(handles=handles, fontsize=FONT_SIZE - 1, loc="lower right")
    save_figure(figure, path)


def plot_class_heat_map(means: pd.DataFrame, path: str | Path) -> None:
    """Draw mean values, genes by classes; blue raises the class's score, orange lowers it.

    Parameters
    ----------
    means
        Index: genes, columns: classes.
    path
        PNG file.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("orange to blue", [COLORS[1], "white", COLORS[0]])
    most = float(means.abs().to_numpy().max()) or 1.0
    names = 0.09 * max(map(len, means.columns))
    figure, axes = new_figure(0.5 * means.shape[1] + 3.2, 0.24 * len(means) + 1.2 + names)
    image = axes.imshow(means, cmap=colors, vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(means.shape[1]), list(means.columns), rotation=90)
    axes.set_yticks(range(len(means)), list(means.index))
    figure.colorbar(image, ax=axes, fraction=0.06, pad=0.04).set_label("Mean value in cells of the class")
    save_figure(figure, path)


def plot_curves(described: Mapping[str, Any], path: str | Path, *, title: str) -> None:
    """Draw the class's mean probability as genes go and as they come, a line an order.

    Parameters
    ----------
    described
        As `Curves.describe` gives it.
    path
        PNG file.
    title
        Above the figure.
    """
    figure, _ = new_figure(8.4, 3.6)
    figure.clear()
    for place, (name, words) in enumerate([("deletion", "taken away"), ("insertion", "put back alone")]):
        axes = figure.add_subplot(1, 2, place + 1)
        curves = described[f"{name}_probability"]["curves"]
        for number, (order, values) in enumerate(curves.items()):
            axes.plot(
                described["steps"],
                np.array(values, dtype=float),
                LINE_STYLES[number % 4],
                color=COLORS[number],
                label=order,
                marker=".",
            )
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
        axes.set_xticks(described["steps"], [str(step) for step in described["steps"]], fontsize=FONT_SIZE - 2)
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(f"Expressed genes {words}")
        if place == 0:
            axes.set_ylabel("Mean probability of the class")
            axes.legend(fontsize=FONT_SIZE - 1, loc="lower left")
    figure.suptitle(title, fontsize=FONT_SIZE + 1)
    save_figure(figure, path)


def top_genes(values: npt.NDArray[np.float32], number: int = NUM_SHOWN) -> npt.NDArray[np.int64]:
    """Return the genes with the highest mean absolute values, the highest first; none whose value is always 0."""
    means = np.abs(values).mean(axis=0)
    order = np.argsort(-means, kind="stable")[:number]
    return order[means[order] > 0]
