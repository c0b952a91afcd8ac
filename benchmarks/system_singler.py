"""SingleR (Aran et al. 2019, Nature Immunology 20:163), by the package singler: correlation with labelled cells.

Each label gets the genes that mark it against each other label. A cell's score of a label is a high quantile of its
rank correlations with the label's cells on those genes; labels near the best one are compared again on their own
markers, until one is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from scipy import sparse

from screformer.benchmarks.cell_type_systems import NamedCells, need
from screformer.benchmarks.systems_features import query_features, training_cells

if TYPE_CHECKING:
    from anndata import AnnData

MarkerMethod = Literal["auc", "classic"]  # "cohens_d" ends the process where a label has one cell


class SingleR:
    """SingleR as a `CellTypeSystem`, with all its settings as they come but for the markers.

    Its ``"classic"`` markers compare medians. For single cells, where most medians are zero, its manual recommends
    Wilcoxon's test, which ranks genes by the area under the curve: ``"auc"``. The default is classic all the same:
    with three pancreas donors, each held out in turn, it named more cells right.

    Parameters
    ----------
    marker_method
        ``"auc"`` or ``"classic"``.

    Raises
    ------
    ValueError
        `marker_method` is neither.
    """

    title = "SingleR"
    is_inductive = True

    def __init__(self, *, marker_method: MarkerMethod = "classic") -> None:
        if marker_method not in get_args(MarkerMethod):
            raise ValueError(
                f"marker_method got {marker_method!r}; it must be one of {', '.join(get_args(MarkerMethod))}"
            )
        self.marker_method = marker_method
        self._genes: list[str] | None = None
        self._classes: tuple[str, ...] = ()
        self._reference: Any = None  # singler's, which has no types

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Find the markers and index the cells; see `CellTypeSystem.fit`. Nothing is searched and nothing is drawn."""
        need("singler")
        need("compressed_lists")  # singler imports it and does not ask for it
        if self.marker_method != "classic":
            need("scranpy")
        import singler

        cells = training_cells(adata, labels)
        self._reference = singler.train_single(
            _genes_by_cells(cells.features),
            ref_labels=[str(number) for number in cells.class_ids.tolist()],
            ref_features=cells.genes,
            marker_method=self.marker_method,
            num_threads=torch.get_num_threads(),
        )
        self._genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; see `CellTypeSystem.predict`.

        Scores are correlations on all markers, before labels near the best are compared again: the label of a cell need
        not have its highest score.
        """
        features = query_features(adata, self._genes)
        import singler

        found = singler.classify_single(_genes_by_cells(features), self._reference, num_threads=torch.get_num_threads())
        columns = [found["scores"][str(number)] for number in range(len(self._classes))]
        labels = [self._classes[int(number)] for number in found["best"]]
        return NamedCells(labels, np.column_stack(columns).astype(np.float32), self._classes)


def _genes_by_cells(features: sparse.csr_array) -> sparse.csc_array:
    matrix = sparse.csc_array(features.T, dtype=np.float64, copy=True)
    matrix.sum_duplicates()  # its reader wants each column's genes in order
    return matrix
