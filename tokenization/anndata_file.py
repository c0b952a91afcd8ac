"""Cells of an h5ad file or a zarr folder, as anndata 0.6 to 0.12 write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from screformer.tokenization.cell_file import CellFile, Place
from screformer.tokenization.gzip_chunks import read_by_libdeflate
from screformer.tokenization.stored_rows import (
    ENTRIES_AT_ONCE,
    BandedRows,
    CompressedColumns,
    CompressedRows,
    StoredColumns,
    StoredRows,
    dense_matrix,
    len_of,
)
from screformer.tokenization.stored_table import Element, StoredTable, is_array


class AnnDataFile(CellFile):
    """An AnnData on disk.

    Raises
    ------
    ValueError
        It has no `obs` or `var`, or these are damaged.
    """

    def __init__(self, root: Element, name: str, *, file_format: str) -> None:
        self.name, self.format = name, file_format
        self._root = root
        missing = [key for key in ("obs", "var") if key not in root]
        if missing:
            msg = f"path: {name} is no AnnData (it has {sorted(root)}, obs and var are needed)"
            raise ValueError(msg)
        self._obs = StoredTable(root["obs"], root.get("uns"))
        self.num_cells = self._obs.num_rows
        self.obs_columns = self._obs.columns
        layers = sorted(root["layers"]) if "layers" in root else []
        self._keys = {"X": "X"} | {f"layers/{layer}": f"layers/{layer}" for layer in layers}
        self._keys["raw"] = "raw.X" if "raw.X" in root else "raw/X"  # anndata before 0.7 wrote "raw.X"
        order = ["X", "layers/counts", "raw", *(f"layers/{layer}" for layer in layers if layer != "counts")]
        present = [key for key in order if key in self._keys and self._is_there(self._keys[key])]
        self.places = [Place(source, source in ("X", "layers/counts", "raw")) for source in present]

    def open_matrix(self, source: str) -> StoredRows | StoredColumns:
        """Open `X`, a layer or `raw`."""
        stored = open_element(self._root[self._keys[source]])
        num_genes = self._var(source).num_rows
        if stored.shape != (self.num_cells, num_genes):
            msg = (
                f"{source} has the shape {stored.shape}, but there are {self.num_cells} cells in obs and {num_genes} "
                "genes in var; write the file again from its source"
            )
            raise ValueError(msg)
        return stored

    def var(self, source: str) -> pd.DataFrame:
        """`var`, or `raw.var`, whose genes are often more."""
        return self._var(source).to_frame()

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Index of `obs`."""
        return self._obs.index(start, stop)

    def obs_column(self, name: str, start: int, stop: int) -> list[str | None]:
        """Return a column of `obs`."""
        return self._obs.column(name, start, stop)

    def close(self) -> None:
        """Close the file."""
        if isinstance(self._root, h5py.File):
            self._root.close()
        elif hasattr(self._root, "store"):
            self._root.store.close()

    def _var(self, source: str) -> StoredTable:
        if source != "raw":
            return StoredTable(self._root["var"], self._root.get("uns"))
        return StoredTable(self._root["raw.var" if "raw.var" in self._root else "raw/var"])

    def _is_there(self, key: str) -> bool:
        return key in self._root and _attribute(self._root[key], "encoding-type") != "null"


def open_element(element: Element) -> StoredRows | StoredColumns:
    """Open a matrix that anndata wrote: compressed by rows or columns, or dense.

    Raises
    ------
    ValueError
        It is none of these, or damaged.
    """
    if is_array(element):
        return dense_matrix(element)
    encoding = _attribute(element, "encoding-type") or _attribute(element, "h5sparse_format")
    kind = str(encoding)[:3]
    missing = [key for key in ("data", "indices", "indptr") if key not in element]
    if kind not in ("csr", "csc") or missing:
        msg = f"not a matrix: it is encoded as {encoding!r}{f' without {missing}' if missing else ''}"
        raise ValueError(msg)
    first, second = (int(size) for size in _shape(element))
    data, indices, indptr = element["data"], element["indices"], element["indptr"]
    _refuse_missing_chunks(data, indices)
    data, indices = read_by_libdeflate(data), read_by_libdeflate(indices)
    if kind == "csc":
        return CompressedColumns(data, indices, indptr, (first, second))
    rows = CompressedRows(data, indices, indptr, (first, second))
    return rows if isinstance(element, h5py.Group) else _in_bands(rows, data)


def open_zarr(path: Path) -> Any:  # zarr's group
    """Open a zarr folder for reading.

    Raises
    ------
    ImportError
        zarr is not installed.
    """
    try:
        import zarr
    except ImportError as error:
        msg = f"{path.name} is a zarr folder, for which zarr is needed: pip install 'screformer[zarr]'"
        raise ImportError(msg) from error
    return zarr.open_group(str(path), mode="r")


def _in_bands(rows: CompressedRows, data: Element) -> StoredRows:
    """zarr reads and decompresses whole chunks, and keeps none: read about a chunk at a time."""
    per_chunk = min(int(data.chunks[0]), ENTRIES_AT_ONCE)
    num_rows = int(per_chunk / max(rows.entries_per_row, 1.0))
    return BandedRows(rows, num_rows) if num_rows > 1 else rows


def _refuse_missing_chunks(*arrays: Element) -> None:
    """Refuse arrays of zarr some of whose files are gone, which zarr reads as zeros without a word.

    It writes no file for a chunk of zeros alone: here that can only be a last one of a single number.
    """
    for array in arrays:
        # Of an array in shards, all chunks of a shard that is there are counted, those beyond the end too.
        missing = max(0, int(array.nchunks - array.nchunks_initialized)) if hasattr(array, "nchunks_initialized") else 0
        is_last = missing == 1 and len_of(array) % int(array.chunks[0]) == 1 and not np.any(array[-1:])
        if missing and not is_last:
            msg = f"{missing} of the {array.nchunks} files of {array.name} are missing: copy the folder again"
            raise ValueError(msg)


def _shape(element: Element) -> tuple[int, int]:
    shape = _attribute(element, "shape")
    shape = _attribute(element, "h5sparse_shape") if shape is None else shape
    if shape is None or len(shape) != 2:
        msg = f"not a matrix: its shape is {shape}"
        raise ValueError(msg)
    return tuple(shape)


def _attribute(element: Element, name: str) -> Any:  # Any: whatever was stored
    value = element.attrs.get(name)
    return value.decode() if isinstance(value, bytes) else value
