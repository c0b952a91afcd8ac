"""The scatter plots of the web page: cells in two dimensions, coloured by cell type and by confidence."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from screformer.train.figures import COLORS, MARKERS, RESOLUTION

MAX_POINTS = 20_000
ROWS_AT_ONCE = 65_536
FILE_LAYOUT = "X_umap"
# The figure is scaled down to a telephone's width, and its letters with it.
SIDE_INCHES, FONT_SIZE = 5.0, 12
# Yellow cannot be seen on white, and black not in the legend of a dark page.
LABEL_COLORS = tuple(color for color in COLORS if color not in ("#F0E442", "#000000"))
NO_LABEL_COLOR = "#BDBDBD"

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]


class Layout(NamedTuple):
    """Cells in two dimensions.

    Attributes
    ----------
    points
        (cells shown, 2).
    rows
        Their rows in the file, ascending.
    num_cells
        Of the whole file.
    method
        Where the dimensions are from, in words.
    axis_name
        For both axes, such as "UMAP".
    """

    points: FloatArray
    rows: IntArray
    num_cells: int
    method: str
    axis_name: str

    def describe(self) -> str:
        """Return the method, and how many of the cells are shown if it is not all."""
        if len(self.rows) == self.num_cells:
            return f"{self.method}; {self.num_cells:,} cells"
        return f"{self.method}; {len(self.rows):,} of {self.num_cells:,} cells"


class LabelStyle(NamedTuple):
    """Colour and marker of a cell type, the same in plot and table."""

    color: str
    marker: str


def lay_out(path: str | Path, embedding_name: str, *, max_points: int = MAX_POINTS, seed: int = 0) -> Layout | None:
    """Return two dimensions for the cells of an annotated h5ad file; None where fewer than three cells have any.

    The file's own UMAP (``obsm["X_umap"]``) if it has one; else a UMAP of the model's vectors, if umap-learn is
    installed; else their first two principal components.

    Parameters
    ----------
    path
        The file.
    embedding_name
        Where in `obsm` the model's vectors are.
    max_points
        Of more cells so many are drawn, by chance.
    seed
        Of that draw, and of UMAP.
    """
    with h5py.File(path, "r") as file:
        obsm = file["obsm"]
        own = obsm.get(FILE_LAYOUT)
        is_own = isinstance(own, h5py.Dataset) and own.ndim == 2 and own.shape[1] >= 2
        stored = own if is_own else obsm[embedding_name]
        num_cells = stored.shape[0]
        rows = _draw_rows(num_cells, max_points, seed)
        vectors = _read_rows(stored, rows, width=2 if is_own else stored.shape[1])
    is_placed = np.isfinite(vectors).all(axis=1)
    rows, vectors = rows[is_placed], vectors[is_placed]
    if len(rows) < 3:
        return None
    if is_own:
        return Layout(vectors, rows, num_cells, f'the UMAP of the file, obsm["{FILE_LAYOUT}"]', "UMAP")
    if find_spec("umap") is not None:
        return Layout(_umap(vectors, seed), rows, num_cells, "UMAP of the model's cell vectors", "UMAP")
    points = PCA(n_components=2, random_state=seed).fit_transform(vectors)
    return Layout(points, rows, num_cells, "first two principal components of the model's cell vectors", "PC")


def choose_styles(labels: Sequence[str]) -> dict[str, LabelStyle]:
    """Return colours, then markers, by turns; beyond 24 labels they repeat."""
    return {
        label: LabelStyle(LABEL_COLORS[number % len(LABEL_COLORS)], MARKERS[number // len(LABEL_COLORS) % len(MARKERS)])
        for number, label in enumerate(labels)
    }


def draw_cell_types(layout: Layout, labels: pd.Series, styles: dict[str, LabelStyle], *, seed: int = 0) -> bytes:
    """Return a PNG of the cells marked by type, without a legend; those without a type, or unknown, are grey.

    Parameters
    ----------
    layout
        Where the cells are.
    labels
        Of all cells of the file.
    styles
        Of the labels.
    seed
        Of the order in which cells are drawn, so that no type covers the others.
    """
    figure, axes = _new_figure(layout, "Cell type")
    shown = labels.iloc[layout.rows].astype(object)
    is_missing = ~shown.isin(list(styles)).to_numpy()  # no label, or unknown
    _scatter(axes, layout.points[is_missing], c=NO_LABEL_COLOR, marker=".")
    order = np.random.default_rng(seed).permutation(len(layout.rows))
    for marker in MARKERS:
        chosen = np.array([name in styles and styles[name].marker == marker for name in shown], dtype=bool)
        cells = order[chosen[order]]
        colors = [styles[name].color for name in shown.iloc[cells]]
        _scatter(axes, layout.points[cells], c=colors, marker=marker)
    return _as_png(figure)


def draw_confidence(layout: Layout, probabilities: FloatArray) -> bytes:
    """Return a PNG of the cells coloured by the probability of their type, of all cells of the file."""
    figure, axes = _new_figure(layout, "Confidence")
    shown = probabilities[layout.rows]
    is_known = np.isfinite(shown)
    _scatter(axes, layout.points[~is_known], c=NO_LABEL_COLOR, marker=".")
    image = _scatter(axes, layout.points[is_known], c=shown[is_known], cmap="viridis", vmin=0, vmax=1, marker="o")
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", fraction=0.05, pad=0.02, aspect=30)
    bar.set_label("Probability of the cell's type", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    return _as_png(figure)


def _draw_rows(num_cells: int, max_points: int, seed: int) -> IntArray:
    if num_cells <= max_points:
        return np.arange(num_cells)
    return np.sort(np.random.default_rng(seed).choice(num_cells, max_points, replace=False))


def _read_rows(stored: h5py.Dataset, rows: IntArray, *, width: int) -> FloatArray:
    """Return rows of a stored matrix, read a block at a time."""
    parts = [np.empty((0, width), dtype=np.float32)]
    for first in range(0, stored.shape[0], ROWS_AT_ONCE):
        block = stored[first : first + ROWS_AT_ONCE, :width]
        inside = rows[(rows >= first) & (rows < first + len(block))]
        parts.append(block[inside - first].astype(np.float32))
    return np.concatenate(parts)


def _umap(vectors: FloatArray, seed: int) -> FloatArray:
    # One thread: UMAP with a seed has no more, and warns if it may.
    reducer = import_module("umap").UMAP(
        n_components=2, n_neighbors=min(15, len(vectors) - 1), random_state=seed, n_jobs=1
    )
    return np.asarray(reducer.fit_transform(vectors))


def _new_figure(layout: Layout, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIDE_INCHES, SIDE_INCHES), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=FONT_SIZE + 2)
    axes.set_xlabel(f"{layout.axis_name} 1", fontsize=FONT_SIZE)
    axes.set_ylabel(f"{layout.axis_name} 2", fontsize=FONT_SIZE)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    # Both plots have the same limits, with or without a bar of colours.
    low, high = layout.points.min(axis=0), layout.points.max(axis=0)
    margin = np.maximum(0.04 * (high - low), 1e-6)
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
    return figure, axes


def _scatter(axes: Axes, points: FloatArray, **style: Any) -> PathCollection:  # Any: matplotlib's
    size = float(np.clip(12_000 / max(1, len(points)), 3, 24))
    return axes.scatter(points[:, 0], points[:, 1], s=size, linewidths=0, rasterized=True, **style)


def _as_png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=RESOLUTION)
    return stream.getvalue()
