"""Cells of a TileDB-SOMA experiment, here or far away, and of CELLxGENE Census, which is made of such experiments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import coo_matrix, csr_matrix

from screformer.tokenization.cell_file import CellFile, Place
from screformer.tokenization.stored_rows import VALUES_AT_ONCE, StoredRows, as_scipy_numbers, csr_from_parts
from screformer.tokenization.stored_table import as_texts

CENSUS_SCHEME = "census"
BUFFER_BYTES = 32 << 20  # of each column that TileDB reads at a time; its own default is 1 GB
# 0: tiles are not merged ahead by several threads. TileDB 2.30 destroys what is merged while a thread still uses it
# (tiledb::algorithm::ParallelMerge), which ends the process, rarely.
TILEDB_CONFIG = {
    "soma.init_buffer_bytes": BUFFER_BYTES,
    "sm.query.sparse_global_order.preprocess_tile_merge": 0,
}
TRIED_LAYERS = ("raw", "counts", "data")
GENE_NAMES = ("var_id", "feature_name", "feature_id", "gene_symbol", "gene_symbols", "symbol", "gene_name")
CELL_NAMES = ("obs_id", "barcode", "barcodes", "cell_id", "observation_joinid")
INDEX_NAME = "soma_dataframe_original_index_name"  # where tiledbsoma.io keeps the name of anndata's index, as JSON
ROWS_AT_ONCE = 1024  # of a dense array of many genes

# tiledbsoma has no types that a type checker sees, as it is not installed everywhere.
Soma = Any


class CensusAddress(NamedTuple):
    """What an address such as "census://2025-01-30/homo_sapiens?tissue == 'heart'" means.

    Attributes
    ----------
    folder
        A local copy ("census:///data/census/homo_sapiens"), or None.
    version
        Release of the Census, such as "stable", where there is no `folder`.
    organism
        Name of the experiment.
    cells
        Which cells, a condition on `obs` as tiledbsoma writes it; None for all.
    """

    folder: str | None
    version: str | None
    organism: str
    cells: str | None


class SomaExperiment(CellFile):
    """An open experiment: its measurements' layers are genes of the same cells.

    `part_of` is the collection that holds the experiment: it is closed with it.

    The layer is chosen by "MEASUREMENT/X/LAYER", or "LAYER" where that is one alone. Without a choice the layers "raw",
    "counts" and "data" of the measurement "RNA", of a measurement that is alone, and of "raw" are tried.

    Raises
    ------
    ValueError
        It has no measurement.
    """

    def __init__(
        self, experiment: Soma, name: str, *, file_format: str, cells: str | None = None, part_of: Soma | None = None
    ) -> None:
        self.name, self.format = name, file_format
        self._experiment, self._open = experiment, ExitStack()
        self._open.enter_context(experiment if part_of is None else part_of)  # the whole closes its parts
        measurements = sorted(experiment.ms, key=lambda key: (key != "RNA", key != "raw", key))
        if not measurements:
            msg = f"path: {name} is an experiment without measurements"
            raise ValueError(msg)
        tried = {"RNA", "raw"} if "RNA" in measurements else {measurements[0]} if len(measurements) == 1 else set()
        self.places = [place for key in measurements for place in self._places_of(key, key in tried)]
        self.obs_columns = [key for key in experiment.obs.schema.names if key != "soma_joinid"]
        self._cell_names = _index_column(experiment.obs, CELL_NAMES) or "soma_joinid"
        if self._cell_names in self.obs_columns:
            self.obs_columns.remove(self._cell_names)
        self._cells = _read_joinids(experiment.obs, cells)
        self.num_cells = len(self._cells)

    def open_matrix(self, source: str) -> StoredRows:
        """Open a layer of a measurement.

        Raises
        ------
        ValueError
            It is smaller than the tables of cells and genes.
        """
        measurement, _, layer = source.split("/")
        array = self._experiment.ms[measurement].X[layer]
        genes = _read_joinids(self._experiment.ms[measurement].var, None)
        last = max(self._cells, default=-1), int(genes.max(initial=-1))
        if array.shape[0] <= last[0] or array.shape[1] <= last[1]:
            msg = f"{source} has the shape {array.shape}, but obs and var name cell {last[0]} and gene {last[1]}"
            raise ValueError(msg)
        return _SparseRows(array, self._cells, genes) if array.is_sparse else _DenseRows(array, self._cells, genes)

    def var(self, source: str) -> pd.DataFrame:
        """`var` of the measurement, in the order of soma_joinid."""
        table = self._experiment.ms[source.split("/")[0]].var
        frame = pd.concat([part.to_pandas() for part in table.read()]).sort_values("soma_joinid")
        texts = {str(key): as_texts(frame[key].to_numpy(dtype=object)) for key in frame.columns if key != "soma_joinid"}
        names = _index_column(table, GENE_NAMES)
        if names is None:
            msg = f"the genes of {source} are named in none of {list(GENE_NAMES)}, only in {list(texts)}"
            raise ValueError(msg)
        index = pd.Index(texts.pop(names), dtype=object)
        return pd.DataFrame(texts, index=index, dtype=object)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """obs_id where there is one, else the cells' soma_joinid."""
        return [text or "" for text in self.obs_column(self._cell_names, start, stop)]

    def obs_column(self, name: str, start: int, stop: int) -> list[str | None]:
        """Return a column of `obs`."""
        chosen = self._cells[start:stop]
        if name == "soma_joinid" or not len(chosen):
            return [str(cell) for cell in chosen]
        parts = self._experiment.obs.read((_as_slice(chosen),), column_names=["soma_joinid", name])
        frame = pd.concat([part.to_pandas() for part in parts]).sort_values("soma_joinid")
        return as_texts(frame[name].to_numpy(dtype=object))

    def close(self) -> None:
        """Close the experiment."""
        self._open.close()

    def _places_of(self, measurement: str, is_tried: bool) -> Iterator[Place]:
        layers = list(self._experiment.ms[measurement].X) if "X" in self._experiment.ms[measurement] else []
        first = [key for key in TRIED_LAYERS if key in layers]
        for layer in [*first, *(key for key in layers if key not in first)]:
            yield Place(f"{measurement}/X/{layer}", is_tried and (layer in TRIED_LAYERS or len(layers) == 1))


class _SomaRows(StoredRows):
    """Rows of an array: cells and genes are the array's coordinates of each row and column."""

    def __init__(self, array: Soma, cells: npt.NDArray[np.int64], genes: npt.NDArray[np.int64]) -> None:
        self._array, self._cells, self._genes = array, cells, genes
        self.shape = (len(cells), len(genes))
        self.dtype = np.dtype(array.schema.field("soma_data").type.to_pandas_dtype())
        self.entries_per_row = float(self.shape[1])


class _SparseRows(_SomaRows):
    def __init__(self, array: Soma, cells: npt.NDArray[np.int64], genes: npt.NDArray[np.int64]) -> None:
        super().__init__(array, cells, genes)
        self.entries_per_row = array.nnz / max(1, int(array.shape[0]))

    def read(self, start: int, stop: int) -> csr_matrix:
        """Return the rows of these cells; entries of genes that `var` does not name are left out."""
        chosen = self._cells[start:stop]
        rows, columns, values = [], [], []
        for table in self._array.read((_as_slice(chosen),)).tables():
            genes = table["soma_dim_1"].to_numpy()
            at = np.minimum(np.searchsorted(self._genes, genes), len(self._genes) - 1)
            is_known = self._genes[at] == genes
            rows.append(np.searchsorted(chosen, table["soma_dim_0"].to_numpy()[is_known]))
            columns.append(at[is_known])
            values.append(as_scipy_numbers(table["soma_data"].to_numpy())[is_known])
        shape = (stop - start, self.shape[1])
        if not rows:
            return csr_matrix(shape, dtype=self.dtype)
        return _in_order(np.concatenate(rows), np.concatenate(columns), np.concatenate(values), shape)


class _DenseRows(_SomaRows):
    def read(self, start: int, stop: int) -> csr_matrix:
        """Return the rows of these cells without their zeros."""
        pieces = []
        step = max(1, min(ROWS_AT_ONCE, VALUES_AT_ONCE // max(1, int(self._array.shape[1]))))
        for first in range(start, stop, step):
            chosen = self._cells[first : min(first + step, stop)]
            values = self._array.read((slice(int(chosen[0]), int(chosen[-1])), slice(None))).to_numpy()
            kept = values[np.ix_(chosen - chosen[0], self._genes)]
            pieces.append(coo_matrix(as_scipy_numbers(kept)))
        rows = np.concatenate([piece.row + at * step for at, piece in enumerate(pieces)])
        columns, values = (np.concatenate([getattr(piece, key) for piece in pieces]) for key in ("col", "data"))
        return _in_order(rows, columns, values, (stop - start, self.shape[1]))


def open_soma(path: str, name: str) -> SomaExperiment:
    """Open a TileDB-SOMA experiment: a folder, or an address such as "s3://...".

    Raises
    ------
    ImportError
        tiledbsoma is not installed.
    ValueError
        There is no experiment.
    """
    tiledbsoma = _import_tiledbsoma(name)
    try:
        found = tiledbsoma.open(path, context=_context(tiledbsoma))
    except tiledbsoma.SOMAError as error:
        msg = f"path: {name} cannot be opened as a TileDB-SOMA experiment ({error})"
        raise ValueError(msg) from error
    if found.soma_type == "SOMAExperiment":
        return SomaExperiment(found, name, file_format="soma")
    with found:
        members = list(found) if hasattr(found, "keys") else []
        remedy = (
            f"Name an organism of the Census: {CENSUS_SCHEME}://{Path(path).absolute()}/homo_sapiens"
            if "census_data" in members
            else f"Name the experiment in it, if it has one (it has {members})"
        )
        msg = f"path: {name} is a {found.soma_type}, not an experiment. {remedy}"
        raise ValueError(msg)


def open_census(address: str) -> SomaExperiment:
    """Open an organism of CELLxGENE Census: "census://VERSION/ORGANISM?CONDITION" (see `CensusAddress`).

    Raises
    ------
    ImportError
        cellxgene-census or, for a local copy, tiledbsoma is not installed.
    ValueError
        The address is not of this form, there is no such organism, or the condition is not understood.
    """
    parts = parse_census_address(address)
    tiledbsoma = _import_tiledbsoma(address)
    try:
        if parts.folder is not None:
            census = tiledbsoma.open(parts.folder, context=_context(tiledbsoma))
        else:
            census = _import_census(address).open_soma(census_version=parts.version, tiledb_config=TILEDB_CONFIG)
        organisms = list(census["census_data"])
        if parts.organism not in organisms:
            msg = f"path: {address} names no organism of the Census; it has {organisms}"
            raise ValueError(msg)
        experiment = census["census_data"][parts.organism]
        return SomaExperiment(experiment, address, file_format="cellxgene-census", cells=parts.cells, part_of=census)
    except (tiledbsoma.SOMAError, KeyError) as error:
        msg = f"path: {address} cannot be opened as a part of CELLxGENE Census ({error})"
        raise ValueError(msg) from error


def parse_census_address(address: str) -> CensusAddress:
    """Take an address of the Census apart.

    Raises
    ------
    ValueError
        It is not of the form "census://VERSION/ORGANISM?CONDITION".

    Examples
    --------
    >>> parse_census_address("census://stable/homo_sapiens?tissue == 'heart'")
    CensusAddress(folder=None, version='stable', organism='homo_sapiens', cells="tissue == 'heart'")
    >>> parse_census_address("census:///data/census/homo_sapiens").folder
    '/data/census'
    """
    parts = urlsplit(address)
    folder, _, organism = parts.path.rpartition("/")
    if parts.scheme != CENSUS_SCHEME or not organism or bool(parts.netloc) == bool(folder):
        msg = (
            f"path: {address!r} is no address of CELLxGENE Census; write census://VERSION/ORGANISM, such as "
            "\"census://stable/homo_sapiens?tissue == 'heart' and is_primary_data == True\", or "
            "census:///FOLDER/ORGANISM for a local copy"
        )
        raise ValueError(msg)
    return CensusAddress(folder or None, parts.netloc or None, organism, unquote(parts.query) or None)


def _import_tiledbsoma(name: str) -> Soma:
    try:
        import tiledbsoma
    except ImportError as error:
        msg = f'{name} needs the package tiledbsoma: pip install "screformer[soma]"'
        raise ImportError(msg) from error
    return tiledbsoma


def _import_census(name: str) -> Any:  # Any: a module without types
    try:
        import cellxgene_census
    except ImportError as error:
        msg = f'{name} needs the package cellxgene-census: pip install "screformer[soma]"'
        raise ImportError(msg) from error
    return cellxgene_census


def _context(tiledbsoma: Soma) -> Soma:
    return tiledbsoma.SOMATileDBContext(tiledb_config=TILEDB_CONFIG)


def _index_column(table: Soma, names: tuple[str, ...]) -> str | None:
    """Column that names the rows: what was anndata's index, or the first of `names` that is there."""
    original = json.loads(table.metadata.get(INDEX_NAME, "null"))
    return next((key for key in (original, *names) if key in table.schema.names), None)


def _read_joinids(table: Soma, condition: str | None) -> npt.NDArray[np.int64]:
    """Coordinates of the rows of a table, in order."""
    parts = table.read(column_names=["soma_joinid"], value_filter=condition)
    found = [part["soma_joinid"].to_numpy() for part in parts]
    return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _as_slice(chosen: npt.NDArray[np.int64]) -> slice | npt.NDArray[np.int64]:
    """Coordinates as a slice, both ends included, where they are without gaps: TileDB reads that much faster."""
    first, last = int(chosen[0]), int(chosen[-1])
    return slice(first, last) if last - first + 1 == len(chosen) else chosen


def _in_order(
    rows: npt.NDArray[Any], columns: npt.NDArray[Any], values: npt.NDArray[Any], shape: tuple[int, int]
) -> csr_matrix:
    order = np.lexsort((columns, rows))
    lengths = np.bincount(rows, minlength=shape[0])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype(np.int64)
    return csr_from_parts(values[order], columns[order], indptr, shape)
