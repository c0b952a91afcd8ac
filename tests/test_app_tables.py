"""What the page shows as HTML: whole, in order, and escaped."""

import re

import numpy as np
import pandas as pd
import pytest
from small_corpus import make_cells, make_tokenizer

from screformer.annotation.annotate import AnnotationSummary, NewNames
from screformer.annotation.app_annotation import AnnotatedCells
from screformer.annotation.app_plots import Layout, choose_styles
from screformer.annotation.app_tables import (
    ROWS_SHOWN,
    cells_html,
    counts_html,
    error_html,
    figure_html,
    message_html,
    passport_html,
    results_html,
)
from screformer.tokenization.passport import inspect_file

HOSTILE = '<img src="x" onerror="alert(1)">'


def annotated(labels, probabilities):
    table = pd.DataFrame(
        {
            "screformer_cell_type": pd.Categorical(labels),
            "screformer_probability": np.array(probabilities, dtype=np.float32),
        },
        index=pd.Index([f"cell{number}" for number in range(len(labels))], name="cell"),
    )
    known = table["screformer_cell_type"].dropna()
    key = "screformer"
    names = NewNames(f"{key}_cell_type", f"{key}_probability", f"{key}_abstained", f"{key}_probabilities")
    counts = known[known != "unknown"].value_counts()
    summary = AnnotationSummary(
        output="out.h5ad",
        num_cells=len(labels),
        num_empty_cells=len(labels) - len(known),
        num_abstained=int((known == "unknown").sum()),
        label_counts=counts[counts > 0].to_dict(),
        mean_probability=0.5,
        gene_coverage=1.0,
        count_source="X",
        gene_source="var_names",
        names=names,
        seconds=1.0,
    )
    return AnnotatedCells(summary, "X_screformer", table)


def texts(html):
    """Return the texts of the cells of a table, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in rows]


def test_counts_are_those_of_the_cells_the_most_frequent_first():
    cells = annotated(["b", "a", "b", None, "unknown"], [0.5, 0.25, 1.0, np.nan, 0.1])
    assert texts(counts_html(cells, choose_styles(["b", "a"]))) == [
        ["Cell type", "Cells", "Share", "Mean probability"],
        ["b", "2", "40.0%", "0.75"],
        ["a", "1", "20.0%", "0.25"],
        ["unknown (not sure enough)", "1", "20.0%", ""],
        ["no label (no counts on known genes)", "1", "20.0%", ""],
    ]


def test_the_first_cells_are_shown_and_how_many_there_are():
    few = cells_html(annotated(["a", None], [0.25, np.nan]).table)
    assert texts(few)[1:] == [["cell0", "a", "0.250"], ["cell1", "no label", "no label"]]
    assert "All 2 cells." in few
    many = cells_html(annotated(["a"] * 1500, [0.5] * 1500).table)
    assert len(texts(many)) == 1 + ROWS_SHOWN
    assert f"The first {ROWS_SHOWN} of 1,500 cells" in many


def test_marks_of_the_legend_are_those_of_the_table():
    labels = [f"type{number}" for number in range(9)]
    cells, styles = annotated(labels, [0.5] * 9), choose_styles(labels)
    layout = Layout(np.random.default_rng(0).normal(size=(9, 2)), np.arange(9), 9, "a method", "PC")
    html = results_html(cells, layout, styles)
    marks = re.findall(r'<svg class="mark".*?</svg>', html)
    assert marks[:9] == marks[9:]
    assert len(set(marks)) == 9
    [types, confidence] = re.findall(r'<img .*? alt="(.*?)">', html)
    assert types.startswith("Scatter plot of cells coloured by cell type: type0 1, ")
    assert types.endswith("type7 1, others 1")
    assert confidence.endswith("median probability 0.50, of nine in ten cells between 0.50 and 0.50")


def test_without_places_or_labels_there_are_tables_still():
    html = results_html(annotated([None, None], [np.nan, np.nan]), None, {})
    assert "Too few cells for a plot." in html
    assert "<img" not in html
    layout = Layout(np.eye(2), np.arange(2), 2, "a method", "PC")
    assert "no cell has a type" in results_html(annotated([None, None], [np.nan, np.nan]), layout, {})


def test_what_comes_from_a_file_is_escaped():
    cells = annotated([HOSTILE, HOSTILE], [0.5, 0.5])
    cells.table.index = [HOSTILE, "cell1"]
    layout = Layout(np.eye(2), np.arange(2), 2, "a method", "PC")
    for html in (
        results_html(cells, layout, choose_styles([HOSTILE])),
        message_html(HOSTILE),
        error_html(HOSTILE),
        figure_html(b"", HOSTILE),
    ):
        assert '<img src="x"' not in html
        assert "&lt;img src=&quot;x&quot;" in html


@pytest.mark.parametrize("is_open", [True, False])
def test_the_passport_is_whole(tmp_path, is_open):
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    passport = inspect_file(tmp_path / "cells.h5ad", make_tokenizer(), progress=False)
    html = passport_html(passport, is_open=is_open)
    assert ('<details class="passport" open>' in html) is is_open
    assert "<summary>What the file holds: 48 cells x 40 genes, accepted</summary>" in html
    of_page = " ".join(re.sub("<.*?>", " ", html.partition("<dl>")[2]).split())
    assert of_page == " ".join(str(passport).split())
