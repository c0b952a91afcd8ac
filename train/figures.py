"""The figures of a training run and an evaluation, each drawn from the numbers in its JSON file.

Everything goes through matplotlib's object interface, so that no global state and no display is involved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from screformer.train.figure_names import name_points
from screformer.train.result_files import written_aside

# Okabe and Ito's palette (2008), told apart with every common colour vision; black closes it.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
RESOLUTION = 150
FONT_SIZE = 10
MAX_NAME_LENGTH = 32
MAX_PRINTED_CLASSES = 30
MAX_WIDE_BARS = 6
MAX_NAMED_CURVES, NUM_WORST_CURVES = 18, 12
MASKED_GENE_ANSWERS = ("gene_majority_accuracy", "gene_mean_accuracy", "cell_majority_accuracy")
SCORE_PANEL = "Score on held-out cells"
SCORE_NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro-F1",
    "masked_accuracy": "masked genes",
    "majority_bin_accuracy": "always the commonest bin",
    "gene_majority_accuracy": "each gene's commonest bin",
    "gene_mean_accuracy": "each gene's mean bin",
    "cell_majority_accuracy": "the cell's commonest bin",
}


def plot_confusion_matrix(
    counts: Sequence[Sequence[int]], label_names: Sequence[str], path: str | Path, *, title: str = "Confusion matrix"
) -> None:
    """Draw counts (rows = true) as a PNG: colour is the share of the true class, the number is cells.

    With more than 30 classes the numbers are left out. A class without true cells has a grey row.
    """
    matrix = np.asarray(counts, dtype=np.int64)
    support = matrix.sum(axis=1, keepdims=True)
    shares = np.where(support > 0, matrix / np.maximum(support, 1), np.nan)
    names = [shorten(name) for name in label_names]
    is_printed = len(names) <= MAX_PRINTED_CLASSES
    side = max(3.0, (0.42 if is_printed else 0.18) * len(names))
    margin = 0.6 + 0.075 * max(map(len, names))
    figure, axes = new_figure(side + margin + 1.9, side + margin + 0.4)
    axes.set_facecolor("0.88")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if is_printed:
        _print_counts(axes, matrix, shares)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(
        range(len(names)), [f"{name} ({total:,})" for name, total in zip(names, support[:, 0], strict=True)]
    )
    axes.tick_params(labelsize=FONT_SIZE if is_printed else FONT_SIZE - 2)
    axes.set_xlabel("Predicted cell type")
    axes.set_ylabel("True cell type (cells)")
    axes.set_title(title)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, format=PercentFormatter(1.0))
    bar.set_label("Share of the true class")
    save_figure(figure, path)


def plot_roc_curves(
    roc_curves: Mapping[str, Mapping[str, Any] | None],
    path: str | Path,
    *,
    title: str = "ROC, one class against the rest",
) -> None:
    """Draw one ROC curve a class, and its upper left corner enlarged.

    The legend begins with the worst class. With more than 18 classes only the 12 worst have colours; the others are
    grey. Classes without a curve are named in the legend.
    """
    drawn = {name: curve for name, curve in roc_curves.items() if curve is not None}
    names = sorted(drawn, key=lambda name: drawn[name]["auc"])
    num_named = len(names) if len(names) <= MAX_NAMED_CURVES else NUM_WORST_CURVES
    figure, axes = new_figure(9.0, 5.2)
    corner = axes.inset_axes((0.36, 0.1, 0.6, 0.6), xlim=(-0.004, 0.2), ylim=(0.8, 1.004))
    corner.tick_params(labelsize=FONT_SIZE - 2)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (2, 2)))
    # Best first, so that the curves that need attention lie on top.
    for index, name in reversed(list(enumerate(names))):
        style = _line(index) if index < num_named else {"color": "0.8", "linewidth": 1.0}
        for panel in (axes, corner):
            panel.plot(drawn[name]["false_positive_rate"], drawn[name]["true_positive_rate"], **style)
    for index, name in enumerate(names[:num_named]):
        axes.plot([], [], label=f"{shorten(name)}  {_shown_area(drawn[name]['auc'])}", **_line(index))
    if num_named < len(names):
        least = _shown_area(drawn[names[num_named]]["auc"])
        axes.plot([], [], color="0.8", label=f"{len(names) - num_named} other classes  at least {least}")
    for name in [name for name, curve in roc_curves.items() if curve is None][:NUM_WORST_CURVES]:
        axes.plot([], [], alpha=0, label=f"{shorten(name)}  not defined")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_xlabel("False positive rate")
    axes.set_ylabel("True positive rate")
    axes.set_title(title)
    axes.legend(
        title="Class  AUC", loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=FONT_SIZE - 1
    )
    save_figure(figure, path)


def plot_training_curves(
    log_history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Training", scores: Sequence[str] = ()
) -> None:
    """Draw the losses, `scores` of the held-out cells, learning rate and speed, a panel each, against epochs.

    Panels without numbers in the history are left out.

    Parameters
    ----------
    log_history
        Of the Trainer: entries with ``epoch`` and ``loss``, ``learning_rate``, ``cells_per_second``, or ``eval_loss``
        and other ``eval_*`` numbers.
    path
        PNG file to write.
    title
        Headline.
    scores
        Names without ``eval_``, for example ``("accuracy", "macro_f1")``; those that the history lacks are left out.
    """
    panels = _history_panels(log_history, scores)
    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure, _ = new_figure(1.6 + 4.0 * num_columns, 0.4 + 3.6 * num_rows, num_panels=len(panels), num_rows=num_rows)
    for axes, (ylabel, curves) in zip(figure.axes, panels, strict=True):
        for index, (key, name) in enumerate(curves.items()):
            _plot_history(axes, log_history, key, name, index, has_markers=key.startswith("eval_"))
        _finish_history(axes, ylabel)
        if "cells_per_second" in curves:
            axes.set_ylim(bottom=0)
        if ylabel == SCORE_PANEL and axes.get_ylim()[1] > 0.9:
            axes.set_ylim(top=1.0)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_masked_genes(
    by_bin: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "Masked genes of held-out cells"
) -> None:
    """Draw accuracy and loss at each true bin: the model's, and those of answers that need no model.

    Parameters
    ----------
    by_bin
        As `masked_gene_metrics.scores_by_bin` returns it; scores of None are gaps in the lines.
    path
        PNG file to write.
    title
        Headline.
    """
    panels = (
        ("Accuracy", {"accuracy": "the model"} | {name: SCORE_NAMES[name] for name in MASKED_GENE_ANSWERS}),
        ("Cross-entropy loss", {"loss": "the model", "gene_frequency_loss": "each gene's frequencies"}),
    )  # fmt: skip
    bins = [row["bin"] for row in by_bin]
    figure, _ = new_figure(max(9.6, 2.0 + 1.0 * len(bins)), 4.2, num_panels=len(panels))
    for axes, (ylabel, curves) in zip(figure.axes, panels, strict=True):
        for index, (key, name) in enumerate(curves.items()):
            values = [np.nan if row[key] is None else row[key] for row in by_bin]
            axes.plot(bins, values, label=name, **_line(index) | _mark(index))
        axes.set_xticks(bins, [f"{row['bin']}\n{_short_count(row['num_masked_genes'])}" for row in by_bin])
        axes.set_xlabel("True expression bin, and masked genes in it")
        axes.set_ylabel(ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_proportions(
    counts: Mapping[str, Mapping[str, int]], path: str | Path, *, title: str = "Cell types", group_name: str = "donor"
) -> None:
    """Draw the share of each cell type in each group (donor, dataset) as stacked bars (paper, figure 2B).

    Parameters
    ----------
    counts
        Group -> cell type -> number of cells.
    path
        PNG file to write.
    title
        Headline.
    group_name
        What the groups are.
    """
    totals: dict[str, int] = {}
    for group in counts.values():
        for name, number in group.items():
            totals[name] = totals.get(name, 0) + number
    figure, axes = new_figure(9.0, max(1.6 + 0.5 * len(counts), 1.2 + 0.26 * len(totals)))
    groups = list(counts)
    sizes = np.array([max(sum(counts[group].values()), 1) for group in groups])
    left = np.zeros(len(groups))
    for index, name in enumerate(sorted(totals, key=lambda name: -totals[name])):
        shares = np.array([counts[group].get(name, 0) for group in groups]) / sizes
        axes.barh(groups, shares, left=left, label=shorten(name), edgecolor="white", linewidth=0.6, **_fill(index))
        left += shares
    axes.set_yticks(
        range(len(groups)), [f"{shorten(group)}\n{sum(counts[group].values()):,} cells" for group in groups]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(f"Share of the cells of each {group_name}")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=FONT_SIZE - 1)
    save_figure(figure, path)


def plot_comparison(
    scores: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    title: str = "Comparison",
    score_names: Sequence[str] = ("accuracy", "macro_f1"),
    intervals: Mapping[str, Mapping[str, Sequence[float] | None]] | None = None,
) -> None:
    """Draw models beside each other, a bar for each score with its value (paper, figure 4).

    Parameters
    ----------
    scores
        Model -> score name -> number in [0, 1].
    path
        PNG file to write.
    title
        Headline.
    score_names
        The scores to show, in order; a model may lack one.
    intervals
        Model -> score name -> lower and upper end, drawn as a line over the bar; None where there is none.
    """
    models = list(scores)
    bar = 0.3 if len(models) <= MAX_WIDE_BARS else 0.2
    figure, axes = new_figure(8.0, 1.5 + bar * len(models) * (len(score_names) + 0.7))
    height = 0.8 / len(score_names)
    for index, score in enumerate(score_names):
        places = np.arange(len(models)) + (index - (len(score_names) - 1) / 2) * height
        values = [scores[model].get(score, np.nan) for model in models]
        axes.barh(places, values, height=height * 0.92, label=SCORE_NAMES.get(score, score), **_fill(index))
        for model, place, value in zip(models, places, values, strict=True):
            text = "not measured" if np.isnan(value) else f"{value:.3f}"
            ends = (intervals or {}).get(model, {}).get(score)
            if ends is not None:
                axes.plot(ends, [place, place], color="black", linewidth=1.2, solid_capstyle="butt")
            axes.text(
                np.nan_to_num(max(value, *(ends or [value]))) + 0.01, place, text, va="center", fontsize=FONT_SIZE - 1
            )
    axes.set_yticks(range(len(models)), [shorten(model) for model in models])
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlim(0, 1.1)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("Score on the test cells")
    axes.set_title(title)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    save_figure(figure, path)


def plot_score_curves(
    curves: Mapping[str, Mapping[float, float]],
    path: str | Path,
    *,
    title: str,
    xlabel: str,
    ylabel: str = "Macro-F1 of the test cells",
) -> None:
    """Draw a line a model with a mark at each measured point, over a logarithmic axis.

    Parameters
    ----------
    curves
        Model -> place on the x-axis, above 0 -> score.
    path
        PNG file to write.
    title, xlabel, ylabel
        Headline, and what the axes are.
    """
    figure, axes = new_figure(9.0, 5.2)
    for index, (name, points) in enumerate(curves.items()):
        places = sorted(points)
        style = _line(index) | {"marker": MARKERS[index // 6 % len(MARKERS)]}
        axes.plot(places, [points[place] for place in places], label=shorten(name), **style)
    ticks = sorted({place for points in curves.values() for place in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=FONT_SIZE - 1)
    save_figure(figure, path)


def plot_cost(
    points: Mapping[str, tuple[float, float]],
    path: str | Path,
    *,
    title: str,
    ylabel: str = "Macro-F1 of the test cells",
    emphasized: str | None = None,
) -> None:
    """Draw models by what they cost and how well they do, each with its name beside it.

    Parameters
    ----------
    points
        Model -> seconds, above 0; and a score.
    path
        PNG file to write.
    title, ylabel
        Headline, and what the score is.
    emphasized
        The model that has another colour and mark.
    """
    figure, axes = new_figure(9.0, 5.2)
    for name, place in points.items():
        color, marker = (COLORS[5], "D") if name == emphasized else (COLORS[0], "o")
        axes.plot(*place, marker, color=color, markersize=8)
    axes.set_xscale("log")
    axes.margins(x=0.14, y=0.1)
    axes.set_xlabel("Seconds to learn and to name the test cells")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(color="0.9")
    name_points(axes, {shorten(name): place for name, place in points.items()}, size=FONT_SIZE - 1)
    save_figure(figure, path)


def plot_bars(panels: Mapping[str, Mapping[str, float]], path: str | Path, *, title: str = "Comparison") -> None:
    """Draw one panel a quantity, each with its own scale from 0, and in it a bar a model with its value.

    Parameters
    ----------
    panels
        Quantity -> model -> number, at least 0.
    path
        PNG file to write.
    title
        Headline.
    """
    num_models = max(map(len, panels.values()))
    figure, first = new_figure(2.9 * len(panels) + 1.0, 1.6 + 0.4 * num_models, num_panels=len(panels))
    for axes, (quantity, values) in zip(figure.axes, panels.items(), strict=True):
        names, numbers = list(values), list(values.values())
        axes.barh(range(len(names)), numbers, color=[COLORS[index % len(COLORS)] for index in range(len(names))])
        for place, number in enumerate(numbers):
            text = f"{number:.3f}" if number <= 1 else f"{number:,.4g}" if number < 1000 else f"{number:,.0f}"
            axes.text(number, place, f" {text}", va="center", fontsize=FONT_SIZE - 1)
        axes.set_xlim(0, 1.5 * max(*numbers, 1e-9))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.set_yticks(range(len(names)), [shorten(name) for name in names] if axes is first else [""] * len(names))
        axes.invert_yaxis()
        axes.set_title(quantity, fontsize=FONT_SIZE)
    figure.suptitle(title)
    save_figure(figure, path)


def new_figure(width: float, height: float, *, num_panels: int = 1, num_rows: int = 1) -> tuple[Figure, Axes]:
    """Return a figure of the given inches with panels in the package's looks, and its first panel."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    num_columns = -(-num_panels // num_rows)
    panels = [figure.add_subplot(num_rows, num_columns, number + 1) for number in range(num_panels)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=FONT_SIZE)
    return figure, panels[0]


def _print_counts(axes: Axes, matrix: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> None:
    for row, column in zip(*np.nonzero(matrix), strict=True):
        is_dark = shares[row, column] > 0.55
        text = f"{matrix[row, column]:,}"
        size = FONT_SIZE - 1 - max(len(text) - 3, 0)
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if is_dark else "black")


def _history_panels(
    log_history: Sequence[Mapping[str, Any]], scores: Sequence[str]
) -> list[tuple[str, dict[str, str]]]:
    """Return what there is to draw: (label of the axis, key in the history -> name in the legend)."""
    known = {key for entry in log_history for key in entry}
    panels = [
        ("Cross-entropy loss", {"loss": "training", "eval_loss": "held-out cells"}),
        (SCORE_PANEL, {f"eval_{score}": SCORE_NAMES.get(score, score) for score in scores if f"eval_{score}" in known}),
        ("Learning rate", {"learning_rate": "_nolegend_"}),
        ("Training cells a second", {"cells_per_second": "_nolegend_"}),
    ]
    return [panels[0], *(panel for panel in panels[1:] if known & panel[1].keys())]


def _plot_history(
    axes: Axes, log_history: Sequence[Mapping[str, Any]], key: str, name: str, index: int, *, has_markers: bool
) -> None:
    points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry and "epoch" in entry]
    if points:
        epochs, values = zip(*points, strict=True)
        axes.plot(epochs, values, label=name, marker="o" if has_markers or len(points) == 1 else None, **_line(index))


def _finish_history(axes: Axes, ylabel: str) -> None:
    axes.set_xlabel("Epoch")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.set_xlim(left=0)
    axes.grid(color="0.9")
    num_named = sum(not str(line.get_label()).startswith("_") for line in axes.lines)
    if num_named > 2:  # they would cover the lines
        axes.legend(frameon=False, fontsize=FONT_SIZE - 1, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    elif num_named:
        axes.legend(frameon=False)


def _line(index: int) -> dict[str, Any]:
    colors = COLORS[:6]
    style = LINE_STYLES[index // len(colors) % len(LINE_STYLES)]
    return {"color": colors[index % len(colors)], "linestyle": style, "linewidth": 1.8}


def _mark(index: int) -> dict[str, Any]:
    """Return a line style and a marker, so that lines are told apart without their colours."""
    return {"linestyle": LINE_STYLES[index % len(LINE_STYLES)], "marker": MARKERS[index % len(MARKERS)]}


def _short_count(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * size:
            return f"{number / size:,.0f}{unit}"
    return f"{number:,}"


def _fill(index: int) -> dict[str, Any]:
    """Return colour and hatching of the `index`-th class: eight colours, then the same with a pattern."""
    hatches = (None, "///", "...", "xxx", "---", "ooo")
    return {"color": COLORS[index % len(COLORS)], "hatch": hatches[index // len(COLORS) % len(hatches)]}


def _shown_area(area: float) -> str:
    # 0.9996 is not 1.000: round down, so that only a perfect class (but for float error) shows 1.
    return f"{np.floor(area * 1000 + 1e-6) / 1000:.3f}"


def shorten(name: str) -> str:
    """Return a name that fits beside an axis: its end is cut off if it is long."""
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: MAX_NAME_LENGTH - 1]}…"


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=RESOLUTION)
