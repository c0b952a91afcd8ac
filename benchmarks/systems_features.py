"""What the systems share: labelled cells that were checked, as log1p CP10k."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from screformer.benchmarks.cell_type_systems import check_genes
from screformer.benchmarks.simple_baselines import log1p_cp10k

if TYPE_CHECKING:
    from anndata import AnnData

Int64Array = npt.NDArray[np.int64]


class TrainingCells(NamedTuple):
    """Labelled cells as the systems learn from them.

    Attributes
    ----------
    genes
        Names, in the order of the columns.
    features
        (cells, genes), log1p CP10k.
    class_ids
        (cells,), position in `classes`.
    classes
        Labels, ascending.
    """

    genes: list[str]
    features: sparse.csr_array
    class_ids: Int64Array
    classes: tuple[str, ...]


def training_cells(adata: AnnData, labels: Sequence[str], *, min_labels: int = 2) -> TrainingCells:
    """Return raw counts as log1p CP10k and labels as numbers.

    Raises
    ------
    ValueError
        There is not one label a cell, there are fewer than `min_labels` labels, or the counts are not raw.
    """
    if len(labels) != adata.n_obs:
        raise ValueError(f"labels must have one entry a cell: {adata.n_obs} cells, got {len(labels)}")
    classes, class_ids = np.unique(np.asarray(labels, dtype=np.str_), return_inverse=True)
    if len(classes) < min_labels:
        raise ValueError(f"labels must hold at least {min_labels} labels, got {classes.tolist()}; add cells of others")
    genes = [str(name) for name in adata.var_names]
    return TrainingCells(genes, _log1p(adata), class_ids.astype(np.int64), tuple(classes.tolist()))


def query_features(adata: AnnData, genes: Sequence[str] | None) -> sparse.csr_array:
    """Return raw counts of unseen cells as log1p CP10k (cells, genes).

    Raises
    ------
    ValueError
        `genes`, those of fit(), is None or differs from the genes of the cells, or the counts are not raw.
    """
    check_genes(genes, adata)
    return _log1p(adata)


def _log1p(adata: AnnData) -> sparse.csr_array:
    return log1p_cp10k(sparse.csr_array(adata.X))
