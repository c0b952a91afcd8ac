"""Cells of 10x Genomics' Cell Ranger and what writes like it: one HDF5 file, or a folder with matrix.mtx."""

from __future__ import annotations

import glob
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from screformer.tokenization.cell_file import CellFile, Place, reading
from screformer.tokenization.gzip_chunks import read_by_libdeflate
from screformer.tokenization.stored_rows import ENTRIES_AT_ONCE, CompressedRows, Entries, StoredRows
from screformer.tokenization.stored_table import as_texts
from screformer.tokenization.temporary_rows import INDEX_TYPE, NumbersFile, RowsWriter, TemporaryRows, open_shared_rows

TABLE_COLUMNS = ("gene_ids", "gene_names", "feature_types")
MTX_REMEDY = 'Write it with scipy.io.mmwrite(path, counts.T, field="integer")'


class TenxH5File(CellFile):
    """Cell Ranger's .h5: a group `matrix` (version 3 and later) or a group a genome (version 2).

    Its columns are cells, so that genes x cells by columns are cells x genes by rows.
    """

    format = "10x-h5"

    def __init__(self, file: h5py.File, name: str) -> None:
        self.name, self._file = name, file
        genomes = [key for key in file if isinstance(file[key], h5py.Group) and "barcodes" in file[key]]
        self.places = [Place(genome, len(genomes) == 1) for genome in genomes]
        self.obs_columns: list[str] = []
        self.choose(max(genomes, key=lambda genome: file[genome]["barcodes"].shape[0]))

    def open_matrix(self, source: str) -> StoredRows:
        """Open the matrix of a group."""
        group = self._file[source]
        missing = [key for key in ("data", "indices", "indptr", "shape") if key not in group]
        if missing:
            msg = f"{source} has no {missing}: it is no matrix as Cell Ranger writes it"
            raise ValueError(msg)
        num_genes, num_cells = (int(size) for size in group["shape"][:])
        tables = len(self.var(source)), int(group["barcodes"].shape[0])
        if tables != (num_genes, num_cells):
            msg = f"{source} is {num_genes} genes x {num_cells} cells, but has names for {tables[0]} x {tables[1]}"
            raise ValueError(msg)
        data, indices = read_by_libdeflate(group["data"]), read_by_libdeflate(group["indices"])
        return CompressedRows(data, indices, group["indptr"], (num_cells, num_genes))

    def choose(self, source: str) -> None:
        """Take the cells of a group: version 2 may name others for each genome."""
        self._barcodes = self._file[source]["barcodes"]
        self.num_cells = int(self._barcodes.shape[0])

    def var(self, source: str) -> pd.DataFrame:
        """Gene names, `gene_ids`, and since version 3 `feature_types` and `genome`."""
        group = self._file[source]
        if "features" in group:
            table = group["features"]
            fields = {"gene_ids": "id", "feature_types": "feature_type", "genome": "genome"}
            names = table["name"]
        else:
            table, fields, names = group, {"gene_ids": "genes"}, group["gene_names"]
        columns = {column: as_texts(table[field][:]) for column, field in fields.items() if field in table}
        return pd.DataFrame(columns, index=pd.Index(as_texts(names[:]), dtype=object), dtype=object)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Barcodes."""
        return [text or "" for text in as_texts(self._barcodes[start:stop])]

    def obs_column(self, name: str, start: int, stop: int) -> list[str | None]:
        """There is none."""
        raise AssertionError(name)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TenxFiles(NamedTuple):
    """The three files of a 10x folder."""

    matrix: Path
    features: Path
    barcodes: Path


class TenxFolder(CellFile):
    """matrix.mtx, features.tsv or genes.tsv, and barcodes.tsv, each with or without .gz.

    The text is read once, from front to back, into temporary rows on disk; nothing of it stays in memory.

    Parameters
    ----------
    files
        The three.
    shared_rows
        Folder of the rows that another process made of this matrix; made anew when it is gone.

    Raises
    ------
    ValueError
        A table is empty or in an unknown form.
    """

    format = "10x-mtx"

    def __init__(self, files: TenxFiles, name: str, *, shared_rows: str | None = None) -> None:
        self.name, self._files, self._shared_rows = name, files, shared_rows
        self.places = [Place("matrix", True)]
        self.obs_columns: list[str] = []
        self._barcodes = _read_table(files.barcodes)[0].tolist()
        self._features = _read_table(files.features)
        self.num_cells = len(self._barcodes)

    def open_matrix(self, source: str) -> TemporaryRows:
        """Rewrite the text as rows, or open the rows that another process keeps."""
        shared = open_shared_rows(self._shared_rows)
        if shared is not None:
            return shared
        with reading(self.name, self._files.matrix.name), _open_bytes(self._files.matrix) as file:
            return _Mtx(file, self._files.matrix).to_rows(len(self._features), len(self._barcodes))

    def var(self, source: str) -> pd.DataFrame:
        """Gene names, `gene_ids`, and since version 3 `feature_types`."""
        columns = dict(zip(TABLE_COLUMNS, (self._features[at].tolist() for at in self._features), strict=False))
        names = columns.pop("gene_names", columns["gene_ids"])  # a single column may be ids or names
        return pd.DataFrame(columns, index=pd.Index(names, dtype=object), dtype=object)

    def cell_ids(self, start: int, stop: int) -> list[str]:
        """Barcodes."""
        return self._barcodes[start:stop]

    def obs_column(self, name: str, start: int, stop: int) -> list[str | None]:
        """There is none."""
        raise AssertionError(name)

    def close(self) -> None:
        """Nothing stays open but the rows."""


def find_tenx_files(path: Path) -> TenxFiles | None:
    """Return the three files of a folder or beside a matrix.mtx; None if there is no such matrix.

    What stands before "matrix.mtx", as in "GSM123_matrix.mtx.gz", must stand before the other names too.

    Raises
    ------
    FileNotFoundError
        A table is missing.
    ValueError
        There are several matrices.
    """
    folder, pattern = (path, "*matrix.mtx*") if path.is_dir() else (path.parent, glob.escape(path.name))
    found = sorted(one for one in folder.glob(pattern) if one.name.removesuffix(".gz").endswith("matrix.mtx"))
    if not found:
        return None
    if len(found) > 1:
        msg = f"path: {folder.name} has several matrices, {[one.name for one in found]}; name one of these files"
        raise ValueError(msg)
    prefix = found[0].name.removesuffix(".gz").removesuffix("matrix.mtx")
    tables = []
    for names in (("features.tsv", "genes.tsv"), ("barcodes.tsv",)):
        wanted = [f"{prefix}{name}{ending}" for name in names for ending in (".gz", "")]
        present = [folder / name for name in wanted if (folder / name).is_file()]
        if not present:
            msg = f"path: {found[0].name} in {folder} needs one of {wanted} beside it, and none is there"
            raise FileNotFoundError(msg)
        tables.append(present[0])
    return TenxFiles(found[0], *tables)


class _Mtx:
    """Matrix Market text, genes x cells."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        banner = file.readline().decode("utf-8", "replace").strip()
        words = banner.lower().split()
        if words[:1] != ["%%matrixmarket"] or len(words) != 5:
            msg = f"{path.name} does not begin with %%MatrixMarket but with {banner[:60]!r}: it is no such matrix"
            raise ValueError(msg)
        if words[2] != "coordinate" or words[3] not in ("integer", "real") or words[4] != "general":
            msg = (
                f"{path.name} is a Matrix Market file of the kind {' '.join(words[1:])!r}; needed is 'matrix "
                f"coordinate integer general'. {MTX_REMEDY}"
            )
            raise ValueError(msg)
        self.dtype = np.dtype(np.int32 if words[3] == "integer" else np.float64)
        line = b"%"
        while line.startswith(b"%") or not line.strip():
            line = file.readline()
            if not line:
                msg = f"{path.name} ends before the line with its sizes: it was cut off; copy or download it again"
                raise ValueError(msg)
        sizes = line.split()
        if len(sizes) != 3 or not all(size.isdigit() for size in sizes):
            msg = f"{path.name} has {line[:60]!r} where its sizes should be: genes, cells, entries. {MTX_REMEDY}"
            raise ValueError(msg)
        self.num_genes, self.num_cells, self.num_entries = map(int, sizes)

    def to_rows(self, num_features: int, num_barcodes: int) -> TemporaryRows:
        """Write the entries to disk by rows."""
        self._check_shape(num_features, num_barcodes)
        lengths, last, is_sorted = np.zeros(self.num_cells, np.int64), 0, True
        # Twice: where cells are not in order, the entries as they come lie beside those in order.
        with RowsWriter(2 * self.num_entries, self.dtype, self._path.name) as writer:
            with writer.open("spool") as rows, writer.open("indices") as indices, writer.open("data") as data:
                for entries in self._entries():
                    np.add.at(lengths, entries.rows, 1)
                    is_sorted = is_sorted and entries.rows[0] >= last and not (np.diff(entries.rows) < 0).any()
                    last = int(entries.rows[-1])
                    for file, values in zip((rows, indices, data), entries, strict=True):
                        file.write(values.data)
            if is_sorted:
                (writer.folder / "spool").unlink()
                writer.finish(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), self.num_genes)
                return writer.result()
            spools = [writer.folder / "spool", writer.folder / "spool_indices", writer.folder / "spool_data"]
            (writer.folder / "indices").rename(spools[1])
            (writer.folder / "data").rename(spools[2])
            writer.sort(lambda: _read_spool(spools, self.dtype), lengths, self.num_genes)
            for spool in spools:
                spool.unlink()
            return writer.result()

    def _check_shape(self, num_features: int, num_barcodes: int) -> None:
        if (self.num_genes, self.num_cells) == (num_features, num_barcodes):
            return
        swapped = (self.num_cells, self.num_genes) == (num_features, num_barcodes)
        remedy = (
            f"It is cells x genes; 10x stores genes x cells. {MTX_REMEDY}"
            if swapped
            else "The three files are not of one matrix, or a table has lost lines or gained a header"
        )
        msg = (
            f"{self._path.name} is {self.num_genes} x {self.num_cells}, but beside it are {num_features} features and "
            f"{num_barcodes} barcodes. {remedy}"
        )
        raise ValueError(msg)

    def _entries(self) -> Iterator[Entries]:
        if self.num_entries == 0:
            return
        num_seen = 0
        with tqdm(total=self.num_entries, desc=self._path.name, unit="entry", unit_scale=True, disable=None) as bar:
            for chunk in self._tables():
                genes, cells = chunk["gene"].to_numpy() - 1, chunk["cell"].to_numpy() - 1
                self._check_range(genes, cells)
                num_seen += len(chunk)
                values = self._numbers(chunk["value"].to_numpy())
                yield Entries(cells.astype(INDEX_TYPE), genes.astype(INDEX_TYPE), values)
                bar.update(len(chunk))
        if num_seen != self.num_entries:
            msg = (
                f"{self._path.name} says it has {self.num_entries} entries and has {num_seen}: it was cut off, or "
                "lines were added; copy or download it again"
            )
            raise ValueError(msg)

    def _tables(self) -> Iterator[pd.DataFrame]:
        columns: dict[Any, Any] = {"gene": np.int64, "cell": np.int64, "value": np.float64}
        form = {"sep": r"\s+", "header": None, "names": list(columns), "dtype": columns, "chunksize": ENTRIES_AT_ONCE}
        try:
            with pd.read_csv(self._file, **form) as chunks:
                yield from chunks
        except ValueError as error:  # pandas' errors of parsing among them
            msg = (
                f"{self._path.name} cannot be read as lines of gene, cell and count ({error}). Was it cut off? "
                f"{MTX_REMEDY}"
            )
            raise ValueError(msg) from error

    def _check_range(self, genes: np.ndarray, cells: np.ndarray) -> None:
        is_wrong = (genes < 0) | (genes >= self.num_genes) | (cells < 0) | (cells >= self.num_cells)
        if is_wrong.any():
            at = int(np.flatnonzero(is_wrong)[0])
            msg = (
                f"{self._path.name} has an entry for gene {genes[at] + 1}, cell {cells[at] + 1}, but is "
                f"{self.num_genes} x {self.num_cells} (counted from 1). {MTX_REMEDY}"
            )
            raise ValueError(msg)

    def _numbers(self, values: np.ndarray) -> np.ndarray:
        if np.isnan(values).any():
            msg = f"{self._path.name} has a line without a number: it was cut off; copy or download it again"
            raise ValueError(msg)
        if self.dtype.kind == "f":
            return values
        if not (np.isfinite(values) & (np.abs(values) < 1 << 31) & (values == np.floor(values))).all():
            msg = f"{self._path.name} says it holds integers and holds others, or some over 2**31. {MTX_REMEDY}"
            raise ValueError(msg)
        return values.astype(self.dtype)


def _read_spool(spools: list[Path], dtype: np.dtype) -> Iterator[Entries]:
    files = [NumbersFile(path, kind) for path, kind in zip(spools, (INDEX_TYPE, INDEX_TYPE, dtype), strict=True)]
    for first in range(0, files[0].shape[0], ENTRIES_AT_ONCE):
        yield Entries(*(file[first : first + ENTRIES_AT_ONCE] for file in files))
    for file in files:
        file.close()


def _read_table(path: Path) -> pd.DataFrame:
    with reading(path.parent.name, path.name), _open_bytes(path) as file:
        try:
            return pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
        except pd.errors.EmptyDataError:
            return pd.DataFrame({0: pd.Series(dtype=str)})
        except pd.errors.ParserError as error:
            msg = f"{path.name} is not a table with tabs between its columns ({error}); write one line a name"
            raise ValueError(msg) from error


def _open_bytes(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_compressed else path.open("rb")  # type: ignore[return-value]
