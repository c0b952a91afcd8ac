"""What the web page does with a file: its passport, the annotation, and what is shown of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import read_elem

from screformer.annotation.annotate import AnnotationSummary, annotate_file
from screformer.annotation.trained_model import TrainedModel
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.passport import InputPassport, inspect_file

Classifier = TrainedModel[ScReformerForCellClassification]


class VisitorOptions(NamedTuple):
    """What a visitor may choose.

    Attributes
    ----------
    max_error
        Share of wrong labels to accept, 0 to 1; None answers every cell.
    layer, gene_column, allow
        As for `annotate_file`.
    """

    max_error: float | None = None
    layer: str | None = None
    gene_column: str | None = None
    allow: tuple[str, ...] = ()


class AnnotatedCells(NamedTuple):
    """An annotated file and what is shown of it.

    Attributes
    ----------
    summary
        What `annotate_file` says.
    embedding_name
        Where in `obsm` the model's vectors are.
    table
        A row a cell, by its name: the new columns of `obs`.
    """

    summary: AnnotationSummary
    embedding_name: str
    table: pd.DataFrame

    @property
    def labels(self) -> pd.Series:
        """The cell type of each cell; NaN where there is none."""
        return self.table[self.summary.names.cell_type]

    @property
    def probabilities(self) -> npt.NDArray[np.float32]:
        """The probability of each cell's type; NaN where there is none."""
        return self.table[self.summary.names.probability].to_numpy(dtype=np.float32)


def inspect_upload(model: Classifier, cells: Path, options: VisitorOptions) -> InputPassport:
    """Return the passport of a file, measured by the model's own vocabulary; raises as `inspect_file`."""
    return inspect_file(
        cells,
        model.tokenizer,
        layer=options.layer,
        gene_column=options.gene_column,
        allow=options.allow,
    )


def annotate_cells(model: Classifier, cells: Path, output: Path, options: VisitorOptions) -> AnnotatedCells:
    """Write an annotated copy with embeddings to `output`; raises as `annotate_file`."""
    summary = annotate_file(
        cells,
        model,
        output,
        layer=options.layer,
        gene_column=options.gene_column,
        allow=options.allow,
        max_error=options.max_error,
        embeddings=True,
        overwrite=True,
    )
    assert summary.names.embedding is not None
    return AnnotatedCells(summary, summary.names.embedding, read_new_columns(output, summary.names.obs))


def read_new_columns(path: Path, names: list[str]) -> pd.DataFrame:
    """Return these columns of `obs`, by the cells' names, without reading the others."""
    with h5py.File(path, "r") as file:
        group = file["obs"]
        index = pd.Index(np.asarray(read_elem(group[str(group.attrs["_index"])])).astype(str), name="cell")
        return pd.DataFrame({name: read_elem(group[name]) for name in names}, index=index)


def write_table(cells: AnnotatedCells, path: Path) -> None:
    """Write the table as CSV, a line a cell, in the file's order."""
    cells.table.to_csv(path, float_format="%.6g")
