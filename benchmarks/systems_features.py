"""What the systems share: labelled cells that were checked, as log1p CP10k, and scores that choose settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.metrics import f1_score

from screformer.benchmarks.cell_type_systems import check_genes
from screformer.benchmarks.simple_baselines import log1p_cp10k

if TYPE_CHECKING:
    from anndata import AnnData

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


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


def check_groups(groups: Sequence[str] | None, num_cells: int) -> None:
    """Raise ValueError unless there is one group a cell, or None."""
    if groups is not None and len(groups) != num_cells:
        raise ValueError(f"groups must have one entry a cell: {num_cells} cells, got {len(groups)}")


def held_out_scores(
    class_ids: Int64Array,
    folds: Int64Array,
    predict: Callable[[BoolArray, BoolArray], Sequence[Int64Array]],
    *,
    num_settings: int,
) -> npt.NDArray[np.float64]:
    """Return the macro-F1 of each setting, of the predictions of all folds together; for a search on training cells.

    Parameters
    ----------
    class_ids, folds
        Class and fold of each cell; see `simple_baselines.inner_folds`.
    predict
        Called with which cells to learn from, of two classes at least, and which to name; returns their classes for
        each setting, -1 for none.
    num_settings
        How many there are.
    """
    predicted = np.empty((num_settings, len(class_ids)), dtype=np.int64)
    for fold in np.unique(folds):
        is_held_out = folds == fold
        known = np.unique(class_ids[~is_held_out])
        predicted[:, is_held_out] = predict(~is_held_out, is_held_out) if len(known) > 1 else known[:1]
    names = np.unique(class_ids)
    return np.array([f1_score(class_ids, row, labels=names, average="macro", zero_division=0) for row in predicted])


def _log1p(adata: AnnData) -> sparse.csr_array:
    return log1p_cp10k(sparse.csr_array(adata.X))
