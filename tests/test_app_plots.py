"""Plots of cells: where the two dimensions are from, which cells are drawn, and in which colours."""

import io
import sys
from types import ModuleType

import anndata
import numpy as np
import pandas as pd
import pytest
from matplotlib import image as matplotlib_image

from screformer.annotation import app_plots
from screformer.annotation.app_plots import (
    FONT_SIZE,
    LABEL_COLORS,
    NO_LABEL_COLOR,
    Layout,
    choose_styles,
    draw_cell_types,
    draw_confidence,
    lay_out,
)
from screformer.train.figures import MARKERS, RESOLUTION


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function: vectors, and the file's own UMAP -> an h5ad file; UMAP is not installed."""
    monkeypatch.setattr(app_plots, "find_spec", lambda _: None)

    def make(vectors, own=None):
        adata = anndata.AnnData(np.ones((len(vectors), 2), dtype=np.float32))
        adata.obsm["X_screformer"] = vectors.astype(np.float32)
        if own is not None:
            adata.obsm["X_umap"] = own
        adata.write_h5ad(tmp_path / "cells.h5ad")
        return tmp_path / "cells.h5ad"

    return make


def normal(num_cells, width, seed=0):
    return np.random.default_rng(seed).normal(size=(num_cells, width))


def colors_in(png):
    """Return the share of each colour of an image, by its hexadecimal name."""
    pixels = np.round(matplotlib_image.imread(io.BytesIO(png))[:, :, :3].reshape(-1, 3) * 255).astype(int)
    numbers, counts = np.unique(pixels @ [1 << 16, 1 << 8, 1], return_counts=True)
    return {f"#{number:06X}": count / len(pixels) for number, count in zip(numbers, counts, strict=True)}


def test_the_umap_of_the_file_is_taken_as_it_is(write):
    own = normal(9, 3)
    layout = lay_out(write(normal(9, 5), own), "X_screformer")
    np.testing.assert_allclose(layout.points, own[:, :2], rtol=1e-6)
    assert layout.describe() == 'the UMAP of the file, obsm["X_umap"]; 9 cells'


def test_a_umap_that_is_a_table_or_has_one_column_is_passed_over(write):
    for own in (normal(9, 1), pd.DataFrame(normal(9, 2), index=[str(row) for row in range(9)], columns=["a", "b"])):
        assert lay_out(write(normal(9, 5), own), "X_screformer").axis_name == "PC"


def test_without_umap_points_are_the_first_principal_components(write):
    vectors = normal(40, 6) * [9, 5, 1, 1, 1, 1]
    layout = lay_out(write(vectors), "X_screformer")
    centred = vectors - vectors.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(layout.points), np.abs(left[:, :2] * singular[:2]), rtol=1e-3, atol=1e-3)
    assert layout.method == "first two principal components of the model's cell vectors"


def test_umap_is_used_where_it_is_installed(write, monkeypatch):
    asked = {}

    class UMAP:
        def __init__(self, **settings):
            asked.update(settings)

        def fit_transform(self, vectors):
            return vectors[:, 2:4]

    path = write(normal(9, 5))
    module = ModuleType("umap")
    module.UMAP = UMAP
    monkeypatch.setitem(sys.modules, "umap", module)
    monkeypatch.setattr(app_plots, "find_spec", lambda name: name)
    layout = lay_out(path, "X_screformer", seed=3)
    np.testing.assert_allclose(layout.points, normal(9, 5)[:, 2:4], rtol=1e-6)
    assert layout.method == "UMAP of the model's cell vectors"
    assert asked == {"n_components": 2, "n_neighbors": 8, "random_state": 3, "n_jobs": 1}


def test_of_many_cells_some_are_drawn_by_chance_and_it_is_said(write, monkeypatch):
    monkeypatch.setattr(app_plots, "ROWS_AT_ONCE", 7)
    own = normal(100, 2)
    path = write(normal(100, 5), own)
    layout = lay_out(path, "X_screformer", max_points=30)
    assert len(set(layout.rows)) == 30
    assert (np.diff(layout.rows) > 0).all()
    np.testing.assert_allclose(layout.points, own[layout.rows], rtol=1e-6)
    assert layout.describe().endswith("; 30 of 100 cells")
    np.testing.assert_array_equal(layout.rows, lay_out(path, "X_screformer", max_points=30).rows)
    assert layout.rows.tolist() != lay_out(path, "X_screformer", max_points=30, seed=1).rows.tolist()


def test_cells_without_a_vector_are_left_out_and_too_few_are_no_plot(write):
    vectors = normal(6, 5)
    vectors[[1, 4]] = np.nan
    assert lay_out(write(vectors), "X_screformer").rows.tolist() == [0, 2, 3, 5]
    vectors[[0, 2]] = np.nan
    assert lay_out(write(vectors), "X_screformer") is None


def test_two_labels_of_24_never_look_the_same():
    styles = choose_styles([str(number) for number in range(30)])
    assert len(set(list(styles.values())[:24])) == len(LABEL_COLORS) * len(MARKERS) == 24
    assert styles["24"] == styles["0"]


def test_cells_have_the_colours_of_their_labels():
    layout = Layout(normal(90, 2), np.arange(10, 100), 100, "a method", "UMAP")
    labels = pd.Series(pd.Categorical(["x"] * 10 + ["a"] * 60 + ["b"] * 20 + [None] * 10))
    styles = choose_styles(["a", "b", "x"])
    shares = colors_in(draw_cell_types(layout, labels, styles))
    assert shares[styles["a"].color] > shares[styles["b"].color] > shares[NO_LABEL_COLOR] > 0
    assert styles["x"].color not in shares  # its cells are not among the rows shown


def test_confidence_is_yellow_when_sure_and_violet_when_not():
    layout = Layout(normal(100, 2), np.arange(100), 100, "a method", "PC")
    sure, unsure = (colors_in(draw_confidence(layout, np.full(100, value, np.float32))) for value in (1.0, 0.0))
    assert sure["#FDE725"] > 2 * unsure["#FDE725"]  # of the bar alone
    assert unsure["#440154"] > 2 * sure["#440154"]
    unknown = colors_in(draw_confidence(layout, np.full(100, np.nan, np.float32)))
    assert unknown[NO_LABEL_COLOR] > 0


def test_plots_can_be_read_on_a_telephone():
    layout = Layout(normal(5, 2), np.arange(5), 5, "a method", "PC")
    height, width, _ = matplotlib_image.imread(io.BytesIO(draw_confidence(layout, np.ones(5)))).shape
    assert height == width
    # Letters of FONT_SIZE points, on a page of 360 pixels with a margin of 16 on both sides.
    assert FONT_SIZE / 72 * RESOLUTION * (360 - 2 * 16) / width >= 10


def test_cells_in_one_place_can_be_drawn():
    layout = Layout(np.zeros((4, 2)), np.arange(4), 4, "a method", "PC")
    assert draw_cell_types(layout, pd.Series(["a"] * 4), choose_styles(["a"]))[:4] == b"\x89PNG"
