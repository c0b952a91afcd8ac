"""Cells of an AnnData object: in memory, a view, backed by a file, or of dask arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csc_array, csc_matrix, csr_matrix

from screformer.tokenization.cell_file import CellFile, Place
from screformer.tokenization.stored_rows import StoredRows, as_scipy_numbers
from screformer.tokenization.stored_table import as_texts

if TYPE_CHECKING:
    from anndata import AnnData


class AnnDataInMemory(CellFile):
    """An AnnData object, read as it is now.

    Parameters
    ----------
    adata
        Not changed, and not copied.
    """

    format = "AnnData"

    def __init__(self, adata: AnnData) -> None:
        self.name = "the AnnData object"
        self._adata = adata
        self.num_cells = adata.n_obs
        self.obs_columns = [str(name) for name in adata.obs.columns]
        self._matrices: dict[str, Any] = {}  # Any: arrays, sparse or not, in memory or not
        if adata.X is not None:
            self._matrices["X"] = adata.X
        layers = sorted(map(str, adata.layers))
        order = [name for name in ("counts",) if name in layers]
        if order:
            self._matrices["layers/counts"] = adata.layers["counts"]
        if adata.raw is not None:
            self._matrices["raw"] = adata.raw.X
        self._matrices |= {f"layers/{name}": adata.layers[name] for name in layers if name not in order}
        self.places = [Place(source, source in ("X", "layers/counts", "raw")) for source in self._matrices]

    def open_matrix(self, source: str) -> StoredRows:
        """Open `X`, a layer or `raw`."""
        return SlicedRows(self._matrices[source])

    def var(self, source: str) -> pd.DataFrame:
        """`var`, or `raw.var`, whose genes are often more."""
        table = self._adata.raw.var if source == "raw" else self._adata.var
        columns = {str(name): as_texts(np.asarray(table[name], dtype=object)) for name in table.columns}
        return pd.DataFrame(columns, index=pd.Index(map(str, table.index), dtype=object), dtype=object)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """`obs_names`."""
        return [str(name) for name in self._adata.obs_names[start:stop]]

    def obs_column(self, name: str, start: int, stop: int) -> list[str | None]:
        """Return a column of `obs`."""
        return as_texts(np.asarray(self._adata.obs[name].iloc[start:stop], dtype=object))

    def close(self) -> None:
        """Leave the object as it is."""


class SlicedRows(StoredRows):
    """Anything with a shape that gives runs of rows when sliced: numpy, scipy, anndata's backed matrices, dask."""

    def __init__(self, matrix: Any) -> None:
        # Runs of rows of a matrix by columns would each look through all of it.
        self._matrix = matrix.tocsr() if isinstance(matrix, csc_matrix | csc_array) else matrix
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        self.dtype = np.dtype(matrix.dtype)
        stored = getattr(matrix, "nnz", None)
        self.entries_per_row = float(self.shape[1] if stored is None else stored / max(1, self.shape[0]))

    def read(self, start: int, stop: int) -> csr_matrix:
        """Return the rows `start` to `stop`."""
        rows = self._matrix[start:stop]
        rows = rows.compute() if hasattr(rows, "compute") else rows
        return csr_matrix(as_scipy_numbers(rows) if isinstance(rows, np.ndarray) else rows)
