"""The text matrices of Wang et al. 2020 (GEO GSE109816 and GSE121893) as one h5ad with labels and donors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from screformer.train.result_files import written_aside

logger = logging.getLogger(__name__)
ROWS = 1000
ID, IDENT, DONOR, LABEL = "ID", "ident", "sample", "cell_type"
ANNOTATION = "GSE121893_all_heart_cell_cluster_info.txt.gz"


class TextMatrix(NamedTuple):
    """Counts of a text file: names of genes and cells, and (genes, cells)."""

    genes: pd.Index
    cells: pd.Index
    counts: sparse.csr_matrix


def convert_wang2020(umi: str | Path | Sequence[str | Path], annotation: str | Path, output: str | Path) -> AnnData:
    """Write text matrices and their annotation as h5ad, and return it.

    Cells without annotation are left out; genes are those of all matrices, in the order of the first. Beside the
    columns of the annotation, ``cell_type`` has ``ident`` without its number ("LV3" is "LV"), and ``var_names`` are
    the symbols as the files have them.

    Parameters
    ----------
    umi
        Comma- or tab-separated counts, genes x cells with both names; one file or several. May end in .gz.
    annotation
        ``GSE121893_all_heart_cell_cluster_info.txt.gz``, which has the cells of both series: tab-separated, with the
        columns ID, ident and sample.
    output
        The h5ad.

    Raises
    ------
    FileNotFoundError
        A file is missing.
    ValueError
        A column is missing, counts are not whole, names are there twice, or no cell is annotated.
    """
    known = _read_annotation(annotation)
    paths = [umi] if isinstance(umi, str | Path) else list(umi)
    if not paths:
        raise ValueError("umi names no file; give the matrix of counts, or several")
    matrices = [read_text_matrix(path) for path in paths]
    genes = reduce(lambda kept, one: kept[kept.isin(one.genes)], matrices[1:], matrices[0].genes)
    cells = matrices[0].cells.append([one.cells for one in matrices[1:]])
    _refuse_repeated(cells, "cells", " and ".join(Path(path).name for path in paths))
    rows = np.flatnonzero(cells.isin(known.index))
    if not len(genes) or not len(rows):
        raise ValueError(
            f"{[Path(path).name for path in paths]} share {len(genes)} genes, and {len(rows)} of {len(cells)} cells "
            f"(such as {cells[0]!r}) are in {Path(annotation).name} (such as {known.index[0]!r}); give the files of "
            "one study"
        )
    counts = sparse.hstack([one.counts[one.genes.get_indexer(genes)] for one in matrices], format="csc")
    adata = AnnData(
        sparse.csr_matrix(counts[:, rows].T), obs=known.loc[cells[rows]], var=pd.DataFrame(index=genes.astype(str))
    )
    adata.obs_names.name = adata.var_names.name = None
    with written_aside(Path(output)) as aside:
        adata.write_h5ad(aside, compression="gzip")
    logger.info(
        "%s: %d of %d cells have an annotation, %d annotated ones are in no matrix", Path(output).name, len(rows),
        len(cells), len(known) - len(rows),
    )  # fmt: skip
    return adata


def read_text_matrix(path: str | Path) -> TextMatrix:
    """Read whole counts, genes x cells, a thousand genes at a time.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        Values are no whole counts, or names are there twice.
    """
    name = Path(path).name
    separator = "," if ".csv" in name else "\t"
    genes, parts, cells = [], [], pd.Index([])
    with pd.read_csv(path, sep=separator, index_col=0, chunksize=ROWS) as chunks:
        for chunk in chunks:
            values = chunk.to_numpy()
            if values.dtype.kind not in "iuf" or not (values >= 0).all() or (values != np.floor(values)).any():
                raise ValueError(f"{name} has values near the gene {chunk.index[0]!r} that are no whole counts")
            parts.append(sparse.csr_matrix(values.astype(np.int32)))
            genes.append(chunk.index.astype(str))
            cells = chunk.columns
    matrix = TextMatrix(genes[0].append(genes[1:]), cells, sparse.vstack(parts, format="csr"))
    _refuse_repeated(matrix.genes, "genes", name)
    return matrix


def _read_annotation(path: str | Path) -> pd.DataFrame:
    found = pd.read_csv(path, sep="\t", comment="#", dtype=str)
    missing = [column for column in (ID, IDENT, DONOR) if column not in found.columns]
    if missing:
        raise ValueError(
            f"annotation: {Path(path).name} lacks the columns {missing}; it has {list(found.columns)}. {ANNOTATION} of "
            "GSE121893 has the cells of both series"
        )
    _refuse_repeated(pd.Index(found[ID]), "cells", Path(path).name)
    known = found.set_index(ID)
    known[LABEL] = known[IDENT].str.replace(r"\d+$", "", regex=True)
    return known


def _refuse_repeated(names: pd.Index, what: str, where: str) -> None:
    repeated = names[names.duplicated()].unique().tolist()
    if repeated:
        raise ValueError(f"{where} has {what} twice: {repeated[:5]}; remove the repeated ones")
