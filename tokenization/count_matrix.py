"""A file of cells, read as blocks of raw counts without ever holding the whole."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, sparse_dataset
from scipy.sparse import csr_matrix

from screformer.tokenization.count_evidence import CountEvidence
from screformer.tokenization.expression_bins import check_raw_counts
from screformer.tokenization.gene_vocabulary import GeneMapping, GeneVocabulary
from screformer.tokenization.tokenization_screformer import choose_gene_names

logger = logging.getLogger(__name__)
NUM_SAMPLED_BLOCKS = 5
SAMPLED_VALUES = 50_000


class _Place(NamedTuple):
    """Where a matrix is in the file, and where its genes are described."""

    source: str
    key: str
    var_key: str


class CountMatrix:
    """Raw counts of an h5ad file, cells x genes, opened for reading; close it or use it in a `with` statement.

    Attributes
    ----------
    path
        The file.
    num_cells, num_genes
        Rows and columns.
    count_source
        Where the counts are: "X", "layers/NAME" or "raw".
    gene_names
        One name a column.
    gene_source
        Where the names are: "var_names" or "var['NAME']".
    notes
        What a reader of reports should know, such as a conversion.
    format
        "h5ad", "zarr", "10x-h5", "10x-mtx", "loom", "soma" or "cellxgene-census".
    evidence
        What was seen of every place that might hold counts, the chosen one first.
    """

    def __init__(self, path: Path, file: h5py.File, place: _Place, gene_names: list[str], gene_source: str) -> None:
        self.path = path
        self.format = "h5ad"
        self.evidence: list[CountEvidence] = [
            CountEvidence(place.source, True, None, 0, 1.0, 0.0, 0.0, 0, (0.0, 0.0, 0.0))
        ]
        self.count_source = place.source
        self.gene_names = gene_names
        self.gene_source = gene_source
        self.notes: list[str] = []
        self._file = file
        self._matrix = _open_matrix(file[place.key])
        self.num_cells, self.num_genes = map(int, self._matrix.shape)
        self._obs: pd.DataFrame | None = None

    @property
    def name(self) -> str:
        """What messages call the file."""
        return self.path.name

    @property
    def source(self) -> dict[str, Any]:  # Any: JSON
        """Arguments, as JSON values, with which `open_count_matrix` opens the same matrix in another process."""
        layer = self.count_source.partition("/")[2] or self.count_source
        gene_column = self.gene_source[5:-2] if self.gene_source.startswith("var[") else self.gene_source
        return {"path": str(self.path.absolute()), "layer": layer, "gene_column": gene_column}

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of `obs`."""
        return [str(name) for name in self._read_obs().columns]

    @property
    def cell_ids(self) -> list[str]:
        """Name of each cell, in the file's order."""
        return self.read_cell_ids()

    def read_cell_ids(self, *, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the cells `start` to `stop`; unlike `cell_ids`, only these are read."""
        return [str(name) for name in self._read_obs().index[start:stop]]

    def obs_column(self, name: str, *, start: int = 0, stop: int | None = None) -> list[str | None]:
        """Values of a column of `obs` of the cells `start` to `stop` as text, None where one is missing.

        Raises
        ------
        ValueError
            There is no such column.
        """
        if name not in self.obs_columns:
            msg = f"obs column {name!r} is not in {self.path.name}, which has {self.obs_columns}"
            raise ValueError(msg)
        return [None if pd.isna(value) else str(value) for value in self._read_obs()[name][start:stop]]

    def map_genes(self, vocabulary: GeneVocabulary) -> GeneMapping:
        """Position in `vocabulary` of each column."""
        return vocabulary.map_names(self.gene_names)

    def blocks(self, num_rows: int, *, start: int = 0, stop: int | None = None) -> Iterator[csr_matrix]:
        """Yield the counts of cells `start` to `stop`, at most `num_rows` at a time, in the file's order.

        A column-compressed (CSC) matrix cannot be read by rows: it is converted as a whole, in memory, once.

        Raises
        ------
        ValueError
            `num_rows` is not positive.
        """
        if num_rows < 1:
            msg = f"num_rows: at least 1, got {num_rows}"
            raise ValueError(msg)
        stop = self.num_cells if stop is None else min(stop, self.num_cells)
        self._convert_columns_to_rows()
        for first in range(start, stop, num_rows):
            yield csr_matrix(self._matrix[first : min(first + num_rows, stop)])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> CountMatrix:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def __repr__(self) -> str:
        return (
            f"CountMatrix({self.path.name}: {self.num_cells} cells x {self.num_genes} genes, counts in "
            f"{self.count_source}, genes by {self.gene_source})"
        )

    def _read_obs(self) -> pd.DataFrame:
        if self._obs is None:
            self._obs = read_elem(self._file["obs"])
        return self._obs

    def _convert_columns_to_rows(self) -> None:
        if getattr(self._matrix, "format", "csr") != "csc":
            return
        note = (
            f"{self.count_source} is stored by columns (CSC): converted to rows in memory as a whole. For a file that "
            "does not fit, rewrite it once with X = X.tocsr()."
        )
        logger.warning("%s: %s", self.path.name, note)
        self.notes.append(note)
        self._matrix = self._matrix.to_memory().tocsr()


def open_count_matrix(
    path: str | Path,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    vocabulary: GeneVocabulary | None = None,
    allow: Collection[str] = (),
) -> CountMatrix:
    """Open an h5ad file where its raw counts are.

    Parameters
    ----------
    path
        The file.
    layer
        The layer with the counts. When left out, the first of `X`, `layers["counts"]` and `raw` whose values, in
        several samples across the matrix, are whole numbers from 0 up.
    gene_column
        The column of `var` with the gene names. When left out: a column of Ensembl ids if `vocabulary` knows more of
        them than of the `var_names`, else the `var_names`.
    vocabulary
        What the gene names are compared to; `GeneVocabulary.human_v1()` when left out.
    allow
        With "not-counts" in it, `layer` is opened though it holds no raw counts.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is not h5ad, has no such layer or column, or holds no raw counts.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"path: there is no file {path}"
        raise FileNotFoundError(msg)
    if not h5py.is_hdf5(path):
        msg = f"path: {path.name} is not an h5ad file; convert it with anndata.AnnData.write_h5ad"
        raise ValueError(msg)
    file = h5py.File(path, "r")
    try:
        if not {"obs", "var"} <= set(file):
            msg = f"path: {path.name} is HDF5 but not h5ad (it has {sorted(file)}, obs and var are needed)"
            raise ValueError(msg)
        place = _choose_counts(path, file, layer, allow)
        var = read_elem(file[place.var_key])
        chosen = choose_gene_names(
            var.index,
            {str(key): var[key] for key in var.columns},
            vocabulary=vocabulary or GeneVocabulary.human_v1(),
            gene_column=None if gene_column == "var_names" else gene_column,
        )
        matrix = CountMatrix(path, file, place, chosen.names, chosen.source)
    except BaseException:
        file.close()
        raise
    logger.info("%r", matrix)
    return matrix


def _choose_counts(path: Path, file: h5py.File, layer: str | None, allow: Collection[str]) -> _Place:
    layers = list(file["layers"]) if "layers" in file else []
    if layer in ("X", "raw") and layer not in layers:
        places = [_Place("X", "X", "var") if layer == "X" else _Place("raw", "raw/X", "raw/var")]
    elif layer is not None:
        if layer not in layers:
            msg = f"layer={layer!r} is not in {path.name}, which has the layers {layers}"
            raise ValueError(msg)
        places = [_Place(f"layers/{layer}", f"layers/{layer}", "var")]
    else:
        places = [
            _Place("X", "X", "var"),
            _Place("layers/counts", "layers/counts", "var"),
            _Place("raw", "raw/X", "raw/var"),
        ]
    problems = []
    for place in places:
        if place.key not in file:
            continue
        problem = _why_not_counts(file[place.key])
        if problem is None or "not-counts" in allow:
            return place
        problems.append(f"{place.source}: {problem}")
    others = [one for one in layers if layer is None and one != "counts" and not _why_not_counts(file[f"layers/{one}"])]
    remedy = f"Pass layer= one of {others}." if others else "Raw counts are needed: ask the file's authors for them."
    msg = f"{path.name} has no raw counts. {' '.join(problems) or 'It has no matrix at all.'} {remedy}"
    raise ValueError(msg)


def _why_not_counts(element: h5py.Group | h5py.Dataset) -> str | None:
    """Return what is wrong with the values of a matrix, looking at samples spread over it."""
    if isinstance(element, h5py.Group) and "data" not in element:
        return "not a matrix."
    values = element["data"] if isinstance(element, h5py.Group) else element
    length = values.shape[0]
    step = max(1, SAMPLED_VALUES // max(1, values.shape[1] if values.ndim == 2 else 1))
    starts = np.unique(np.linspace(0, max(0, length - step), NUM_SAMPLED_BLOCKS).astype(int))
    has_counts = False
    for start in starts:
        sample = np.asarray(values[start : start + step])
        try:
            check_raw_counts(sample.astype(np.float64))
        except ValueError as error:
            return str(error)
        has_counts |= bool(sample.any())
    return None if has_counts else "the values looked at are all 0."


def _open_matrix(element: h5py.Group | h5py.Dataset) -> Any:  # anndata's class of matrices on disk, or h5py's
    return sparse_dataset(element) if isinstance(element, h5py.Group) else element
