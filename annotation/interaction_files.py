"""Relations between genes as files: every pair as a table, the strongest as JSON, the strongest genes as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from screformer.annotation.added_elements import write_parquet
from screformer.annotation.annotated_copy import dated
from screformer.annotation.gene_interactions import AnyModel, GeneInteractions, TypeInteractions, find_gene_interactions
from screformer.train.figures import FONT_SIZE, new_figure, save_figure, shorten
from screformer.train.result_files import finite, write_json, written_aside

STEM = "interactions"
SUFFIXES = (".parquet", ".json", ".png")
TOP_PAIRS, TOP_GENES = 50, 30
MOST_PANELS, PANEL_COLUMNS = 9, 3
PAIR_COLUMNS = ("query_symbol", "key_symbol", "mean_attention", "attention_given_both", "cells_with_both")


class InteractionSummary(NamedTuple):
    """What `interactions_file` wrote.

    Attributes
    ----------
    output
        The folder.
    num_genes
        Genes that the pairs are of.
    types
        A record for each cell type, as in ``interactions.json``: cell_type, num_cells, num_pairs, top_pairs.
    """

    output: Path
    num_genes: int
    types: list[dict[str, Any]]

    def __str__(self) -> str:
        """Give a line a type."""
        lines = []
        for one in self.types:
            top = [f"; {pair['query_symbol']} attends most to {pair['key_symbol']}" for pair in one["top_pairs"][:1]]
            counts = f"{one['num_cells']:,} cells, {one['num_pairs']:,} pairs of {self.num_genes:,} genes"
            lines.append(f"{one['cell_type']}: {counts}{''.join(top)}")
        return "\n".join([*lines, f"{self.output}: {', '.join(f'{STEM}{suffix}' for suffix in SUFFIXES)}"])


def interactions_file(
    cells: str | Path, model: AnyModel, output: str | Path, *, overwrite: bool = False, **options: Any
) -> InteractionSummary:
    """Write which genes attend to which in a file's cells, into a folder.

    - ``interactions.parquet``: a row for each cell type and ordered pair of genes, see `GeneInteractions.table`; a
      type's rows follow each other, the highest mean attention first.
    - ``interactions.json``: settings, model, input, date, versions, and the strongest pairs of each type.
    - ``interactions.png``: for each of the types with the most cells, attention between its 30 strongest genes.

    Parameters
    ----------
    cells, model
        As for `find_gene_interactions`.
    output
        Folder, made if it is not there.
    overwrite
        Replace these files if they exist.
    options
        Of `find_gene_interactions`.

    Raises
    ------
    FileExistsError
        One of the files is there.
    OSError, ValueError
        As for `find_gene_interactions`. Nothing is left of the output then.
    """
    folder = Path(output)
    existing = [f"{STEM}{suffix}" for suffix in SUFFIXES if (folder / f"{STEM}{suffix}").exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"output: {folder} has {', '.join(existing)}; choose another folder, or replace them with overwrite=True "
            "(--overwrite)"
        )
    return write_interactions(find_gene_interactions(cells, model, **options), folder)


def write_interactions(found: GeneInteractions, folder: Path) -> InteractionSummary:
    """Write the three files of `interactions_file`."""
    types: list[dict[str, Any]] = []

    def frames() -> Iterator[pd.DataFrame]:
        for one in found.types:
            table = found.table(one)
            top = table.head(TOP_PAIRS)[list(PAIR_COLUMNS)].to_dict("records")
            sizes = {"num_cells": one.num_cells, "num_pairs": len(table)}
            types.append({"cell_type": one.name, **sizes, "top_pairs": [finite(pair) for pair in top]})
            yield table

    with written_aside(folder / f"{STEM}.parquet") as aside:
        write_parquet(frames(), aside)
    write_json(folder / f"{STEM}.json", dated({**found.record, "types": types}))
    plot_interactions(found, folder / f"{STEM}.png")
    return InteractionSummary(folder, len(found.genes), types)


def plot_interactions(found: GeneInteractions, path: str | Path) -> None:
    """Draw a heat map a type, of the types with the most cells: attention from gene (row) to gene (column).

    Shown are the `strongest_genes`, and the mean over cells that express both; the palette, from blue to yellow, is
    read alike with every common colour vision.
    """
    shown = sorted(found.types, key=lambda one: -one.num_cells)[:MOST_PANELS]
    columns = min(PANEL_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure, _ = new_figure(6.6 * columns, 0.5 + 6.0 * rows, num_panels=len(shown), num_rows=rows)
    for axes, one in zip(figure.axes, shown, strict=True):
        genes = strongest_genes(one)
        values = one.attention_given_both[genes][:, genes].toarray()
        names = [shorten(found.symbols[gene]) for gene in genes]
        image = axes.imshow(values, cmap="cividis", vmin=0)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=FONT_SIZE - 3)
        axes.set_title(f"{shorten(one.name)} ({one.num_cells:,} cells)", fontsize=FONT_SIZE)
        axes.set_xlabel("Key gene", fontsize=FONT_SIZE - 1)
        axes.set_ylabel("Query gene", fontsize=FONT_SIZE - 1)
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        bar.set_label("Mean attention, both expressed", fontsize=FONT_SIZE - 2)
        bar.ax.tick_params(labelsize=FONT_SIZE - 3)
    some = f": {len(shown)} of {len(found.types)} types, those of most cells" if len(shown) < len(found.types) else ""
    figure.suptitle(f"Attention between genes{some}")
    save_figure(figure, path)


def strongest_genes(of_type: TypeInteractions) -> npt.NDArray[np.int64]:
    """Return at most 30 genes with the most attention to and from others, summed over their pairs; the first leads.

    Only genes count that at least half of the type's cells express, or the most frequent 30 where those are fewer.
    """
    num_expressing = of_type.cells_with_both.diagonal()
    least = min(of_type.num_cells / 2, np.sort(num_expressing)[::-1][:TOP_GENES][-1])
    mass = of_type.attention.sum(axis=0) + of_type.attention.sum(axis=1).T
    strength = np.where(num_expressing >= least, np.asarray(mass).ravel(), -1.0)
    order = np.argsort(-strength, kind="stable")[:TOP_GENES]
    return order[strength[order] >= 0]
