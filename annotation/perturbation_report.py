"""The files of a perturbation: record, table, page and figure, all of the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from screformer.annotation.perturbation_null import MAX_RANK_DIFFERENCE
from screformer.annotation.perturbation_results import Record
from screformer.model_cards.markdown import bullets, format_value, plain, table
from screformer.train.figures import COLORS, new_figure, save_figure, shorten
from screformer.train.result_files import write_json, written_aside

RECORD_FILE, TABLE_FILE = "perturbation.json", "perturbation.parquet"
PAGE_FILE, FIGURE_FILE = "perturbation.md", "perturbation.png"
EXPRESSION_FORMS = (("share_expressing", ".0%"), ("mean_bin", ".2f"))


def write_report(folder: Path, record: Record, rows: pd.DataFrame) -> None:
    """Write table, page, figure, and last the record into a folder."""
    with written_aside(folder / TABLE_FILE) as aside:
        rows.to_parquet(aside, index=False)
    with written_aside(folder / PAGE_FILE) as aside:
        aside.write_text(format_page(record), encoding="utf-8")
    plot_perturbation(record, folder / FIGURE_FILE)
    write_json(folder / RECORD_FILE, record)


def format_page(record: Record) -> str:
    """Return the record as Markdown."""
    settings, results = record["settings"], record["results"]
    verb = "deleted" if settings["change"] == "zero" else f"raised by {settings['bins']} bins"
    followed = _followed(settings)
    columns = [
        "gene", "expressed in", "null", "mean bin", "null", "cells changed", "not changed",
        "cosine distance", "null", "p", "q", f"probability of {followed}", "null", "p", "q", "labels changed", "p", "q",
    ]  # fmt: skip
    body = [
        [
            plain(result["gene"]),
            *(_shown(of[name], form) for name, form in EXPRESSION_FORMS for of in (result, result["null"])),
            f"{result['num_changed_cells']:,}",
            f"{result['num_unchanged_cells'] + result['num_emptied_cells']:,}",
            *_columns(result["cosine_distance"], ".2g"),
            *_columns(result["own_probability"], "+.2g"),
            *(text for at, text in enumerate(_columns(result["labels_changed"], ".1%")) if at != 1),
        ]
        for result in results
    ]
    labels = [
        f"{plain(result['gene'])}: {plain(before)} to {plain(after)}, {count:,} cells"
        for result in results
        for before, afters in result["label_changes"].items()
        for after, count in afters.items()
    ]
    notes = [f"{plain(result['gene'])}: {note}" for result in results for note in result["notes"]]
    parts = [
        f"# Genes {verb} in silico",
        f"{record['cells']['num_cells']:,} cells of {plain(record['input']['file'])}, "
        f"{format_value(record['model']['name'])}, {record['gene_space']} genes. Means over the cells "
        "that a change changes.",
        table(columns, body),
        f"Null: the same change of {settings['num_null']} other genes, those nearest in the ranks of how many cells "
        "express them and of their mean bin in these, at random among equals, and none further than "
        f"{MAX_RANK_DIFFERENCE:.0%} of all ranks. p: (1 + null genes that change as much or more, in either direction) "
        "/ (1 + null genes). q: Benjamini-Hochberg over the genes of this table, each column by itself.",
        "## Labels that change",
        bullets(labels) or "None.",
        *(["## Notes", bullets(notes)] if notes else []),
        f"![Change of probability beside the null]({FIGURE_FILE})",
    ]
    return "\n\n".join(parts) + "\n"


def plot_perturbation(record: Record, path: str | Path) -> None:
    """Draw, a line a gene, the mean change of the followed probability beside its null, into a PNG file."""
    results = record["results"]
    figure, axes = new_figure(9.0, 1.9 + 0.34 * len(results))
    for place, result in enumerate(results):
        _draw_gene(axes, place, result["own_probability"], is_labelled=place == 0)
    axes.axvline(0, color="0.6", linewidth=1, zorder=0.5)
    axes.set_yticks(
        range(len(results)), [f"{shorten(one['gene'])} ({one['num_changed_cells']:,} cells)" for one in results]
    )
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlabel(f"Mean change of the probability of {_followed(record['settings'])}")
    verb = "deleted" if record["settings"]["change"] == "zero" else "raised"
    axes.set_title(f"Genes {verb} in silico, and others of the same expression")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.9 / figure.get_figheight()), ncols=4, frameon=False)
    save_figure(figure, path)


def _draw_gene(axes: Axes, place: int, statistic: Mapping[str, Any], *, is_labelled: bool) -> None:
    def label(text: str) -> str:
        return text if is_labelled else "_nolegend_"

    # The legend has all kinds of marks, whether or not the first gene has them.
    null = statistic["null"] or dict.fromkeys(("lowest", "highest", "median"), np.nan) | {"interval_95": [np.nan] * 2}
    axes.plot(
        [null["lowest"], null["highest"]],
        [place] * 2,
        color="0.55",
        linewidth=1.2,
        label=label("null, lowest to highest"),
    )
    axes.plot(
        null["interval_95"], [place] * 2, color="0.75", linewidth=9, solid_capstyle="butt", label=label("null, 95%")
    )
    axes.plot([null["median"]], [place], "|", color="black", markersize=11, label=label("null, median"))
    value = np.nan if statistic["mean"] is None else statistic["mean"]
    axes.plot([value], [place], "D", color=COLORS[5], markersize=7, zorder=3, label=label("the gene"))


def _followed(settings: Mapping[str, Any]) -> str:
    return "each cell's own label" if settings["own_class"] is None else str(settings["own_class"])


def _columns(statistic: Mapping[str, Any], form: str) -> list[str]:
    null = statistic["null"]
    shifts = (_shown(value, form) for value in (statistic["mean"], null and null["mean"]))
    return [*shifts, *(_shown(statistic[name], ".3g") for name in ("p", "q"))]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
