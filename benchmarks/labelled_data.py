"""Labelled cells for a comparison: one file, or several put together under the labels and genes that they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import numpy.typing as npt
from anndata import AnnData
from scipy import sparse

from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix

BLOCK = 1024
MIN_SHARED_GENES = 100

Strings = npt.NDArray[np.str_]
Int64Array = npt.NDArray[np.int64]


class LabelledData(NamedTuple):
    """Raw counts with their labels; cells without a label, or with one too rare, are left out.

    Attributes
    ----------
    name
        For tables and file names.
    adata
        Raw counts in `X`, sparse by rows; names of cells and genes.
    labels, groups
        Of each cell; groups are donors or data sets, None if none were named.
    """

    name: str
    adata: AnnData
    labels: Strings
    groups: Strings | None


def read_labelled_data(
    path: str | Path,
    *,
    label_column: str = "cell_type",
    group_column: str | None = None,
    exclude_labels: Sequence[str] = (),
    min_cells: int = 10,
    label_map: Mapping[str, str] | None = None,
) -> LabelledData:
    """Read raw counts of any format, with their labels.

    Parameters
    ----------
    path
        As for `open_count_matrix`.
    label_column, group_column
        Columns of `obs`.
    exclude_labels
        To leave out.
    min_cells
        Labels with fewer cells are left out: their F1 is a matter of luck.
    label_map
        Label of the file -> label of the comparison; others are left out. Without it labels stay.

    Raises
    ------
    ValueError
        A column is missing, or fewer than two labels are left.
    """
    with open_count_matrix(path) as matrix:
        labels = np.array([label or "" for label in matrix.obs_column(label_column)], dtype=np.str_)
        groups = None if group_column is None else np.array(
            [group or "" for group in matrix.obs_column(group_column)], dtype=np.str_
        )  # fmt: skip
        if label_map is not None:
            labels = np.array([label_map.get(label, "") for label in labels.tolist()], dtype=np.str_)
        kept = _cells_with_labels(path, label_column, labels, exclude_labels, min_cells)
        adata = read_cells(matrix, kept)
    return LabelledData(Path(path).stem, adata, labels[kept], None if groups is None else groups[kept])


def _cells_with_labels(
    path: str | Path, label_column: str, labels: Strings, exclude_labels: Sequence[str], min_cells: int
) -> Int64Array:
    sizes = Counter(labels.tolist())
    wanted = sorted(label for label in sizes if label and label not in exclude_labels and sizes[label] >= min_cells)
    if len(wanted) < 2:
        raise ValueError(
            f"label_column={label_column!r}: {Path(path).name} has the labels {dict(sizes)}; at least two with "
            f"{min_cells} cells are needed"
        )
    return np.flatnonzero(np.isin(labels, wanted))


def read_cells(matrix: CountMatrix, rows: Int64Array) -> AnnData:
    """Return the raw counts of some cells, with names; no more than these and a block are held.

    Parameters
    ----------
    matrix
        Open.
    rows
        Their numbers, ascending.
    """
    parts = []
    for number, block in enumerate(matrix.blocks(BLOCK)):
        first, last = np.searchsorted(rows, [number * BLOCK, number * BLOCK + block.shape[0]])
        parts.append(block[rows[first:last] - number * BLOCK])
    adata = AnnData(sparse.vstack(parts, format="csr"))
    names = matrix.cell_ids
    adata.obs_names, adata.var_names = [names[row] for row in rows.tolist()], matrix.gene_names
    adata.var_names_make_unique()
    return adata


def sample_by_label(labels: Strings, num_cells: int, *, least: int = 10, seed: int = 2022) -> Int64Array:
    """Return row numbers, ascending, of `num_cells` cells: each label's share is kept, but for rare ones.

    Parameters
    ----------
    labels
        Of each cell.
    num_cells
        To draw; all if there are no more.
    least
        Cells of a label that are kept, if it has so many, however rare it is.
    seed
        Fixes which.

    Raises
    ------
    ValueError
        `num_cells` is too small for `least` of each label.
    """
    if len(labels) <= num_cells:
        return np.arange(len(labels))
    names, sizes = np.unique(labels, return_counts=True)
    if num_cells < least * len(names):
        raise ValueError(
            f"num_cells got {num_cells}; {len(names)} labels with {least} cells each need at least {least * len(names)}"
        )
    quotas = np.maximum(-(-sizes * num_cells // len(labels)), np.minimum(sizes, least))
    while quotas.sum() > num_cells:
        quotas[quotas.argmax()] -= 1
    generator = np.random.default_rng(seed)
    drawn = [
        generator.choice(np.flatnonzero(labels == name), quota, replace=False)
        for name, quota in zip(names, quotas, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def join_labelled_data(parts: Sequence[LabelledData], *, name: str | None = None) -> LabelledData:
    """Put data sets together, each one group: to leave one out is to train on the others and test on it.

    Genes are those that all have, by name, in the order of the first. Labels are those that at least two have: the
    others could not be learned, or not be tested. Give `read_labelled_data` a `label_map` where names differ.

    Parameters
    ----------
    parts
        At least two, of different names.
    name
        Of the whole; default the names joined by ``+``.

    Raises
    ------
    ValueError
        There are fewer than two, two of one name, fewer than 100 shared genes, or fewer than two shared labels.
    """
    names = [part.name for part in parts]
    if len(parts) < 2 or len(set(names)) < len(names):
        raise ValueError(f"parts got the data sets {names}; at least two of different names are needed")
    shared = reduce(lambda kept, part: kept & set(part.adata.var_names), parts[1:], set(parts[0].adata.var_names))
    if len(shared) < MIN_SHARED_GENES:
        raise ValueError(
            f"{' and '.join(names)} share {len(shared)} gene names; at least {MIN_SHARED_GENES} are needed: give "
            "all the same kind of names, symbols or Ensembl ids"
        )
    sets_of_label = Counter(label for part in parts for label in set(part.labels.tolist()))
    labels = sorted(label for label, number in sets_of_label.items() if number > 1)
    if len(labels) < 2:
        raise ValueError(
            f"{' and '.join(names)} share the labels {labels}; at least two are needed: a label map gives different "
            "names of one type the same label"
        )
    genes = [gene for gene in parts[0].adata.var_names if gene in shared]
    rows = [np.flatnonzero(np.isin(part.labels, labels)) for part in parts]
    adata = anndata.concat(
        {part.name: part.adata[own, genes] for part, own in zip(parts, rows, strict=True)},
        index_unique="-",
        join="inner",
    )
    return LabelledData(
        name or "+".join(names),
        adata,
        np.concatenate([part.labels[own] for part, own in zip(parts, rows, strict=True)]),
        np.concatenate([np.full(len(own), part.name) for part, own in zip(parts, rows, strict=True)]),
    )
