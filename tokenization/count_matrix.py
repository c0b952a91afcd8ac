"""Cells of any format, read as blocks of raw counts without ever holding the whole."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from screformer.tokenization.anndata_in_memory import AnnDataInMemory
from screformer.tokenization.cell_file import CellFile, reading
from screformer.tokenization.cell_formats import open_cell_file
from screformer.tokenization.count_evidence import CountEvidence, examine_counts, not_counts
from screformer.tokenization.freed_memory import give_back_freed_memory
from screformer.tokenization.gene_vocabulary import GeneMapping, GeneVocabulary
from screformer.tokenization.stored_rows import ChosenGenes, StoredColumns, StoredRows
from screformer.tokenization.temporary_rows import TemporaryRows, open_shared_rows, rewrite_by_rows
from screformer.tokenization.tokenization_screformer import GeneNames, choose_gene_names, find_other_features

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
BLOCKS_BETWEEN_GIVING_BACK = 64
# Transposed: many names of cells are genes, and few names of genes are.
MIN_GENES_AMONG_CELLS = 0.5
MAX_GENES_AMONG_GENES = 0.05
NUM_SAMPLED_NAMES = 1000


class CountMatrix:
    """Raw counts of a file, cells x genes, opened for reading; close it or use it in a `with` statement.

    Made by `open_count_matrix`.

    Attributes
    ----------
    path
        The file or folder, or the address of what is not a file.
    format
        "h5ad", "zarr", "10x-h5", "10x-mtx", "loom", "soma", "cellxgene-census" or "AnnData" (an object).
    num_cells, num_genes
        Rows and columns.
    count_source
        Where the counts are: "X", "layers/NAME", "raw", "matrix", "RNA/X/raw".
    gene_names
        One name a column.
    gene_source
        Where the names are: "var_names" or "var['NAME']".
    notes
        What a reader of reports should know, such as a conversion.
    evidence
        What was seen of every place that might hold counts, the chosen one first.
    """

    def __init__(
        self,
        path: Path | str,
        file: CellFile,
        stored: StoredRows | StoredColumns,
        *,
        genes: GeneNames,
        evidence: list[CountEvidence],
        allow: Collection[str] = (),
        rows_folder: str | None = None,
    ) -> None:
        is_text = isinstance(stored, TemporaryRows)
        self.path = path
        self.format = file.format
        self.count_source = evidence[0].source
        self.evidence = evidence
        self.gene_names = genes.names
        self.gene_source = genes.source
        self.notes: list[str] = [f"{self.count_source} is text: read into temporary files by rows."] if is_text else []
        self.num_cells, self.num_genes = stored.shape[0], len(genes.names)
        self._file, self._stored = file, stored
        self._allow, self._rows_folder = sorted(allow), rows_folder
        self._chosen_genes: np.ndarray | None = None

    @property
    def name(self) -> str:
        """What messages call the file."""
        return self._file.name

    @property
    def source(self) -> dict[str, Any]:  # Any: JSON
        """Arguments, as JSON values, with which `open_count_matrix` opens the same matrix in another process.

        What is known by now goes with them and is not looked at again. If the matrix had to be rewritten by rows, that
        is after `prepare` or the first block, other processes of this machine read the same rows as long as this matrix
        is open.
        """
        is_column = self.gene_source.startswith("var[")
        rows = self._stored.folder if isinstance(self._stored, TemporaryRows) else self._rows_folder
        return {
            "path": str(self.path.absolute()) if isinstance(self.path, Path) else self.path,
            "layer": self.count_source,
            "gene_column": self.gene_source[5:-2] if is_column else self.gene_source,
            "allow": list(self._allow),
            "opened": {
                "evidence": [{**one._asdict(), "cell_sums": list(one.cell_sums)} for one in self.evidence],
                "rows": None if rows is None else str(rows),
            },
        }

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of `obs`."""
        return list(self._file.obs_columns)

    @property
    def cell_ids(self) -> list[str]:
        """Name of each cell, in the file's order."""
        return self.read_cell_ids()

    def read_cell_ids(self, *, start: int = 0, stop: int | None = None) -> list[str]:
        """Names of the cells `start` to `stop`; unlike `cell_ids`, only these are read."""
        with reading(self.name, "names of cells"):
            return self._file.cell_ids(start, self._stop(stop))

    def obs_column(self, name: str, *, start: int = 0, stop: int | None = None) -> list[str | None]:
        """Values of a column of `obs` of the cells `start` to `stop` as text, None where one is missing.

        Raises
        ------
        ValueError
            There is no such column, or it cannot be read.
        """
        if name not in self.obs_columns:
            msg = f"obs column {name!r} is not in {self.name}, which has {self.obs_columns}"
            raise ValueError(msg)
        with reading(self.name, f"obs column {name!r}"):
            return self._file.obs_column(name, start, self._stop(stop))

    @property
    def var(self) -> pd.DataFrame:
        """Names of all genes of the file, as index, and what else is known of them, as text."""
        with reading(self.name, "names of genes"):
            return self._file.var(self.count_source)

    def map_genes(self, vocabulary: GeneVocabulary) -> GeneMapping:
        """Position in `vocabulary` of each column."""
        return vocabulary.map_names(self.gene_names)

    def blocks(
        self, num_rows: int, *, start: int = 0, stop: int | None = None, every_feature: bool = False
    ) -> Iterator[csr_matrix]:
        """Yield the counts of cells `start` to `stop`, at most `num_rows` at a time, in the file's order.

        With `every_feature` there is a column for each row of `var`, else one for each of `gene_names`: features that
        are no gene expression were left out of these.

        Values have the file's type. Within a cell, entries are in the file's order, and a gene may occur twice where
        it does in the file. A matrix that is not stored by rows is first rewritten into a temporary folder (place it
        with the environment variable TMPDIR), which `close` removes.

        Raises
        ------
        ValueError
            `num_rows` is not positive, or the file is damaged.
        OSError
            A matrix must be rewritten and the disk has no room.
        """
        if num_rows < 1:
            msg = f"num_rows: at least 1, got {num_rows}"
            raise ValueError(msg)
        rows = self._rows(every_feature)
        stop = self._stop(stop)
        for number, first in enumerate(range(start, stop, num_rows), start=1):
            last = min(first + num_rows, stop)
            with reading(self.name, f"cells {first} to {last - 1} of {self.count_source}"):
                block = rows.read(first, last)
            yield block
            del block  # two blocks are not held while the next is read, if the caller lets go too
            if number % BLOCKS_BETWEEN_GIVING_BACK == 0:
                give_back_freed_memory()

    def prepare(self) -> bool:
        """Rewrite a matrix that is not stored by rows now, instead of when its first block is read.

        Returns
        -------
        bool
            Whether rows were rewritten: then processes that open `source` share them while this matrix is open.
        """
        self._rows()
        return isinstance(self._stored, TemporaryRows)

    def close_all_but_rows(self) -> None:
        """Close every file; rows that were rewritten stay, for other processes that open `source`, until `close`."""
        if isinstance(self._stored, TemporaryRows):
            self._stored.close_files()
        self._file.close()

    def close(self) -> None:
        """Close the file, and remove what was written temporarily."""
        if isinstance(self._stored, StoredRows):
            self._stored.close()
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
            f"CountMatrix({self.name}: {self.num_cells} cells x {self.num_genes} genes, counts in "
            f"{self.count_source}, genes by {self.gene_source})"
        )

    def _stop(self, stop: int | None) -> int:
        return self.num_cells if stop is None else min(stop, self.num_cells)

    def _rows(self, every_feature: bool = False) -> StoredRows:
        if isinstance(self._stored, StoredColumns):
            self._stored = self._rewrite(self._stored)
        if self._chosen_genes is None or every_feature:
            return self._stored
        return ChosenGenes(self._stored, self._chosen_genes)

    def _rewrite(self, stored: StoredColumns) -> TemporaryRows:
        note = (
            f"{self.count_source} is {stored.description}: rewritten by rows into temporary files. To save that time "
            "in each run, store it once by rows: adata.X = adata.X.tocsr()."
        )
        shared = open_shared_rows(self._rows_folder)
        if shared is None:
            logger.warning("%s: %s", self.name, note)
        with reading(self.name, self.count_source):
            rows = rewrite_by_rows(stored, self.name) if shared is None else shared
        self.notes.append(note)
        return rows

    def _leave_out(self, kept: np.ndarray, note: str) -> None:
        """Keep only some columns."""
        self._chosen_genes = kept
        self.gene_names = [self.gene_names[at] for at in kept]
        self.num_genes = len(kept)
        self.notes.append(note)


def open_count_matrix(
    path: str | Path | AnnData,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    vocabulary: GeneVocabulary | None = None,
    allow: Collection[str] = (),
    opened: Mapping[str, Any] | None = None,  # Any: JSON
) -> CountMatrix:
    """Open a file of cells where its raw counts are.

    Parameters
    ----------
    path
        An h5ad, loom or 10x .h5 file; a folder that is AnnData in zarr, 10x matrix.mtx with its tables, or a
        TileDB-SOMA experiment; an address of such an experiment ("s3://...") or of CELLxGENE Census
        ("census://stable/homo_sapiens?tissue == 'heart'"). Or an AnnData object.
    layer
        Where the counts are: a layer, "X", "raw", or any place that the error about a wrong one lists. When left out,
        the first of `X`, `layers["counts"]` and `raw` (and their like in other formats) whose values, in several
        samples across the matrix, can be raw counts.
    gene_column
        The column of `var` with the gene names, or "var_names"; where it is empty, the `var_names` fill in. When left
        out: a column of Ensembl ids if `vocabulary` knows more of them than of the `var_names`, else the `var_names`.
    vocabulary
        What the gene names are compared to; `GeneVocabulary.human_v1()` when left out.
    allow
        With "not-counts" in it, `layer`, or the first place there is, is opened though it holds no raw counts.
    opened
        Part of `CountMatrix.source`: what the process found that gave it.

    Raises
    ------
    FileNotFoundError
        There is no such file, or one of a folder is missing.
    PermissionError
        It may not be read.
    ImportError
        Its format needs a package that is not installed.
    ValueError
        It is of no known format, damaged, empty or transposed, has no such layer or column, or holds no raw counts.
    OSError
        It must be rewritten by rows and the disk has no room.
    """
    rows_folder = None if opened is None else opened["rows"]
    place: Path | str
    if isinstance(path, str | Path):
        file = open_cell_file(path, shared_rows=rows_folder)
        place = Path(path) if "://" not in str(path) else str(path)
    else:
        file = AnnDataInMemory(path)
        place = file.name
    stored = None
    try:
        with reading(file.name, file.format):
            if file.num_cells == 0:
                msg = f"path: {file.name} has no cells"
                raise ValueError(msg)
            stored, evidence = _choose_counts(file, layer, allow, opened)
            file.choose(evidence[0].source)
            var = file.var(evidence[0].source)
            genes = _name_genes(var, gene_column, vocabulary or GeneVocabulary.human_v1())
            note = _note_more_genes(file, evidence, len(var))
            if opened is None:
                _refuse_transposed(file, genes, vocabulary or GeneVocabulary.human_v1())
        matrix = CountMatrix(place, file, stored, genes=genes, evidence=evidence, allow=allow, rows_folder=rows_folder)
        _leave_out_other_features(matrix, var)
    except BaseException:
        if isinstance(stored, StoredRows):
            stored.close()
        file.close()
        raise
    logger.info("%r", matrix)
    if note is not None:
        matrix.notes.append(note)
        if opened is None:
            logger.warning("%s: %s", file.name, note)
    return matrix


def _choose_counts(
    file: CellFile, layer: str | None, allow: Collection[str], opened: Mapping[str, Any] | None
) -> tuple[StoredRows | StoredColumns, list[CountEvidence]]:
    """Open the matrix with the counts; return what was seen of it, and of the others."""
    named = None if layer is None else file.find_place(layer)
    if layer is not None and named is None:
        msg = f"layer={layer!r} is not in {file.name}, which has the layers {file.layers}"
        raise ValueError(msg)
    if opened is not None and named is not None:
        seen = [CountEvidence(**{**one, "cell_sums": tuple(one["cell_sums"])}) for one in opened["evidence"]]
        return file.open_matrix(named.source), seen
    matrices = {place.source: _open_or_explain(file, place.source) for place in file.places}
    evidence = [
        not_counts(source, matrix) if isinstance(matrix, str) else examine_counts(source, matrix)
        for source, matrix in matrices.items()
    ]
    wanted = [place for place in file.places if place.is_tried] if named is None else [named]
    chosen = _first_with_counts([one for one in evidence if one.source in {place.source for place in wanted}], allow)
    chosen_matrix = None if chosen is None else matrices[chosen.source]
    for matrix in matrices.values():
        if isinstance(matrix, StoredRows) and matrix is not chosen_matrix:
            matrix.close()
    if chosen is None or chosen_matrix is None or isinstance(chosen_matrix, str):
        unreadable = [source for source, matrix in matrices.items() if isinstance(matrix, str)]
        raise _no_counts(file, evidence, [place.source for place in wanted], unreadable)
    return chosen_matrix, [chosen, *(one for one in evidence if one is not chosen)]


def _open_or_explain(file: CellFile, source: str) -> StoredRows | StoredColumns | str:
    """Open a matrix, or return why it cannot be."""
    try:
        stored = file.open_matrix(source)
    except ValueError as error:
        return str(error)
    return stored if stored.shape[1] else "it has no genes."


def _first_with_counts(evidence: list[CountEvidence], allow: Collection[str]) -> CountEvidence | None:
    found = next((one for one in evidence if one.is_counts), None)
    if found is None and "not-counts" in allow:
        return next((one for one in evidence if one.num_values), None)
    return found


def _no_counts(
    file: CellFile, evidence: list[CountEvidence], wanted: Collection[str], unreadable: Collection[str]
) -> ValueError:
    problems = [f"{one.source}: {one.problem}" for one in evidence if one.source in wanted]
    if problems and set(wanted) <= set(unreadable):
        return ValueError(f"path: {file.name} cannot be read. {' '.join(problems)}")
    others = [one.source.removeprefix("layers/") for one in evidence if one.is_counts]
    remedy = (
        f"Pass layer= one of {others} (--layer)."
        if others
        else "Raw counts are needed: ask the file's authors for them, or, if you know that these are counts, pass "
        "allow=['not-counts'] (--allow not-counts)."
    )
    if not problems and others:
        problems = ["Several places hold counts, and which one is meant is not clear."]
    return ValueError(f"{file.name} has no raw counts. {' '.join(problems) or 'It has no matrix at all.'} {remedy}")


def _name_genes(var: pd.DataFrame, gene_column: str | None, vocabulary: GeneVocabulary) -> GeneNames:
    if gene_column == "var_names" and gene_column not in var.columns:
        plain = [str(name) for name in var.index]
        return GeneNames(plain, "var_names", vocabulary.map_names(plain))
    columns = {str(key): var[key] for key in var.columns}
    return choose_gene_names(var.index, columns, vocabulary=vocabulary, gene_column=gene_column)


def _note_more_genes(file: CellFile, evidence: list[CountEvidence], num_genes: int) -> str | None:
    """Say that counts of more genes are elsewhere, as where `X` was cut to variable genes and `raw` was not."""
    tried = {place.source for place in file.places if place.is_tried}
    others = [one.source for one in evidence[1:] if one.is_counts and one.source in tried]
    sizes = {source: len(file.var(source)) for source in others if evidence[0].source in tried}
    largest = max(sizes, key=lambda source: sizes[source], default=None)
    if largest is None or sizes[largest] <= num_genes:
        return None
    layer = largest.removeprefix("layers/")
    return (
        f"{largest} has counts of {sizes[largest]} genes, {evidence[0].source} of {num_genes} alone, and the sum of a "
        f"cell's counts is of these: to take all genes, pass layer={layer!r} (--layer {layer})."
    )


def _refuse_transposed(file: CellFile, genes: GeneNames, vocabulary: GeneVocabulary) -> None:
    """Refuse genes x cells: the vocabulary knows the names of the cells, and not those of the genes."""
    if genes.mapping.report.num_mapped > MAX_GENES_AMONG_GENES * len(genes.names):
        return
    size = min(NUM_SAMPLED_NAMES // 4, file.num_cells)
    starts = np.unique(np.linspace(0, file.num_cells - size, 4).astype(int)).tolist()
    names = [name for start in starts for name in file.cell_ids(start, start + size)]
    known = vocabulary.map_names(names).report.num_mapped
    if known >= MIN_GENES_AMONG_CELLS * len(names):
        msg = (
            f"path: {file.name} looks transposed: {known} of {len(names)} names of cells (such as {names[0]!r}) are "
            f"genes, and names of genes (such as {genes.names[0]!r}) are not. Write it with cells as rows: "
            "anndata.read_h5ad(path).T.write_h5ad(new_path)"
        )
        raise ValueError(msg)


def _leave_out_other_features(matrix: CountMatrix, var: pd.DataFrame) -> None:
    """Leave out antibodies, guides and the like."""
    others = find_other_features({str(key): var[key] for key in var.columns})
    if others:
        kinds = ", ".join(f"{count} of type {kind!r}" for kind, count in Counter(others.values()).most_common())
        kept = np.setdiff1d(np.arange(len(var)), list(others))
        matrix._leave_out(kept, f"features that are no gene expression were left out: {kinds}.")
