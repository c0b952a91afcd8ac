"""What the web page shows, as HTML: passport, counts of cell types, figures with a text in their place, cells.

Whatever comes from a file is escaped. Wide tables scroll within themselves, by keyboard too.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import numpy as np
import pandas as pd

from screformer.annotation.app_annotation import AnnotatedCells
from screformer.annotation.app_plots import LabelStyle, Layout, draw_cell_types, draw_confidence
from screformer.annotation.calibration import UNKNOWN
from screformer.tokenization.passport import InputPassport
from screformer.tokenization.passport_report import passport_paragraphs

ROWS_SHOWN = 100
LABELS_IN_TEXT = 8
NO_LABEL = "no label"
# In a square of 12: the markers of the plots.
MARKER_SHAPES = {
    "o": '<circle cx="6" cy="6" r="5"/>',
    "s": '<rect x="1.5" y="1.5" width="9" height="9"/>',
    "^": '<path d="M6 1 11.5 11H.5z"/>',
    "D": '<path d="M6 .5 11.5 6 6 11.5.5 6z"/>',
}


def message_html(text: str) -> str:
    """Return progress or success, which a screen reader says when it can."""
    return f'<p class="message" role="status">{escape(text)}</p>'


def error_html(text: str) -> str:
    """Return what went wrong, which a screen reader says at once."""
    return f'<div class="message error" role="alert"><strong>This did not work.</strong> {escape(text)}</div>'


def passport_html(passport: InputPassport, *, is_open: bool) -> str:
    """Return the passport as a list of names and texts, to fold and unfold."""
    entries = []
    for name, text in passport_paragraphs(passport):
        term = f"<dt>{escape(name.strip())}</dt>" if name else ""
        entries.append(f"{term}<dd>{escape(text)}</dd>")
    size = f"{passport.num_cells:,} cells x {passport.num_genes:,} genes"
    summary = f"What the file holds: {size}, {'refused' if passport.refusals else 'accepted'}"
    state = " open" if is_open else ""
    return f'<details class="passport"{state}><summary>{summary}</summary><dl>{"".join(entries)}</dl></details>'


def results_html(cells: AnnotatedCells, layout: Layout | None, styles: dict[str, LabelStyle]) -> str:
    """Return counts, figures and the first cells."""
    parts = [f"<h2>Cell types</h2>{counts_html(cells, styles)}"]
    if layout is None:
        parts.append("<p>Too few cells for a plot.</p>")
    else:
        counts = ", ".join(f"{label} {count:,}" for label, count in _largest(cells.summary.label_counts))
        figures = [
            (draw_cell_types(layout, cells.labels, styles), f"coloured by cell type: {counts}"),
            (draw_confidence(layout, cells.probabilities), f"coloured by confidence: {_describe_confidence(cells)}"),
        ]
        images = [figure_html(image, f"Scatter plot of cells {text}") for image, text in figures]
        legend = "".join(f"<li>{_mark(style)}{escape(label)}</li>" for label, style in styles.items())
        parts.append(
            f"<h2>Cells in two dimensions</h2><p>Positions: {escape(layout.describe())}.</p>"
            f'<div class="figures">{"".join(images)}</div>'
            f'<ul class="legend" aria-label="Marks of the cell types">{legend}</ul>'
        )
    parts.append(f"<h2>Cells</h2>{cells_html(cells.table)}")
    return "".join(parts)


def counts_html(cells: AnnotatedCells, styles: dict[str, LabelStyle]) -> str:
    """Return a table of the cell types, with their marks in the plots, the most frequent first."""
    summary = cells.summary
    means = pd.Series(cells.probabilities).groupby(cells.labels.astype(object).to_numpy()).mean()
    rows = []
    for label, count in summary.label_counts.items():
        share = f"{count / summary.num_cells:.1%}"
        rows.append((f"{_mark(styles[label])}{escape(label)}", f"{count:,}", share, f"{means[label]:.2f}"))
    if summary.num_abstained:
        share = f"{summary.num_abstained / summary.num_cells:.1%}"
        rows.append((f"{UNKNOWN} (not sure enough)", f"{summary.num_abstained:,}", share, ""))
    if summary.num_empty_cells:
        share = f"{summary.num_empty_cells / summary.num_cells:.1%}"
        rows.append((f"{NO_LABEL} (no counts on known genes)", f"{summary.num_empty_cells:,}", share, ""))
    columns = ("Cell type", "Cells", "Share", "Mean probability")
    return table_html("Cells of each type", columns, rows, num_texts=1)


def cells_html(table: pd.DataFrame) -> str:
    """Return the first rows of the table of cells."""
    first = table.iloc[:ROWS_SHOWN]
    rows = [
        (escape(str(name)), *(escape(_format_value(value)) for value in values))
        for name, values in zip(first.index, first.itertuples(index=False), strict=True)
    ]
    note = f"All {len(table):,} cells." if len(table) <= ROWS_SHOWN else (
        f"The first {ROWS_SHOWN:,} of {len(table):,} cells; the downloads have all of them."
    )  # fmt: skip
    return f"<p>{note}</p>" + table_html("Cells and their types", ("cell", *table.columns), rows, num_texts=2)


def table_html(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_texts: int) -> str:
    """Return a table that scrolls within itself where it is wider than the page.

    Parameters
    ----------
    caption
        What it is, for a screen reader.
    columns
        Their names, as text.
    rows
        Cells, as HTML.
    num_texts
        How many of the first columns are texts; the others are numbers, to the right.
    """
    classes = ["" if number < num_texts else ' class="number"' for number in range(len(columns))]
    head = "".join(f'<th scope="col"{of}>{escape(column)}</th>' for column, of in zip(columns, classes, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{of}>{cell}</td>' for cell, of in zip(row, classes, strict=True))}</tr>" for row in rows
    )
    return (
        f'<div class="scrolled" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure_html(image: bytes, text: str) -> str:
    """Return a PNG as part of the page, with a text in its place for those who do not see it."""
    data = base64.b64encode(image).decode("ascii")
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(text)}"></figure>'


def _mark(style: LabelStyle) -> str:
    shape = MARKER_SHAPES[style.marker]
    return f'<svg class="mark" viewBox="0 0 12 12" fill="{style.color}" aria-hidden="true">{shape}</svg>'


def _largest(counts: dict[str, int]) -> list[tuple[str, int]]:
    pairs = list(counts.items())
    rest = sum(count for _, count in pairs[LABELS_IN_TEXT:])
    return pairs[:LABELS_IN_TEXT] + ([("others", rest)] if rest else [])


def _describe_confidence(cells: AnnotatedCells) -> str:
    known = cells.probabilities[np.isfinite(cells.probabilities)]
    if not len(known):
        return "no cell has a type"
    low, median, high = np.quantile(known, [0.05, 0.5, 0.95])
    return f"median probability {median:.2f}, of nine in ten cells between {low:.2f} and {high:.2f}"


def _format_value(value: object) -> str:
    if isinstance(value, float | np.floating):
        return NO_LABEL if np.isnan(value) else f"{value:.3f}"
    return str(value)
