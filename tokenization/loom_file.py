"""Cells of a loom file: HDF5 with genes x cells in chunks (loompy.org/docs/format)."""

from __future__ import annotations

import h5py
import pandas as pd

from screformer.tokenization.cell_file import CellFile, Place
from screformer.tokenization.stored_rows import StoredColumns, StoredRows, dense_matrix
from screformer.tokenization.stored_table import as_texts

GENE_NAMES = ("Gene", "gene_name", "gene_names", "gene_symbol", "gene_symbols", "var_names", "Name", "Accession")
CELL_NAMES = ("CellID", "obs_names", "cell_names", "cell_id", "barcode", "barcodes", "Barcode")


class LoomFile(CellFile):
    """A loom file: `matrix`, `layers`, and a name or number a gene and a cell in `row_attrs` and `col_attrs`.

    Gene names are the first of Gene, gene_name, var_names, ... that is there; cell names likewise (CellID, obs_names,
    ...), else the cells' numbers.

    Raises
    ------
    ValueError
        No attribute has the genes' names.
    """

    format = "loom"

    def __init__(self, file: h5py.File, name: str) -> None:
        self.name, self._file = name, file
        layers = list(file["layers"]) if "layers" in file else []
        self.places = [Place("matrix", True), *(Place(f"layers/{key}", key == "counts") for key in layers)]
        self.places.sort(key=lambda place: not place.is_tried)
        self.num_cells = int(file["matrix"].shape[1])
        self._genes, self._cells = file["row_attrs"], file.get("col_attrs", {})
        self._gene_names = next((key for key in GENE_NAMES if key in self._genes), None)
        if self._gene_names is None:
            msg = (
                f"path: {name} names its genes in none of {list(GENE_NAMES)}; its row attributes are "
                f"{list(self._genes)}. Copy the right one under the name 'Gene'"
            )
            raise ValueError(msg)
        self._cell_names = next((key for key in CELL_NAMES if key in self._cells), None)
        self.obs_columns = [
            key for key in self._cells if key != self._cell_names and self._cells[key].shape == (self.num_cells,)
        ]

    def open_matrix(self, source: str) -> StoredRows | StoredColumns:
        """Open the matrix or a layer."""
        stored = dense_matrix(self._file[source], is_transposed=True)
        num_genes = int(self._genes[self._gene_names].shape[0])
        if stored.shape != (self.num_cells, num_genes):
            msg = (
                f"{source} is {stored.shape[1]} genes x {stored.shape[0]} cells, but there are {num_genes} gene names "
                f"and {self.num_cells} cells; write the file again from its source"
            )
            raise ValueError(msg)
        return stored

    def var(self, source: str) -> pd.DataFrame:
        """Row attributes with one value a gene."""
        names = self._genes[self._gene_names]
        columns = {
            key: as_texts(self._genes[key][:])
            for key in self._genes
            if key != self._gene_names and self._genes[key].shape == names.shape
        }
        return pd.DataFrame(columns, index=pd.Index(as_texts(names[:]), dtype=object), dtype=object)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Names of cells, or their numbers."""
        if self._cell_names is None:
            return [str(at) for at in range(start, min(stop, self.num_cells))]
        return [text or "" for text in as_texts(self._cells[self._cell_names][start:stop])]

    def obs_column(self, name: str, start: int, stop: int) -> list[str | None]:
        """Return a column attribute."""
        return as_texts(self._cells[name][start:stop])

    def close(self) -> None:
        """Close the file."""
        self._file.close()
