"""XGBoost, the strongest simple rival on donors that were not seen in scTab's comparison (Fischer et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from screformer.benchmarks.cell_type_systems import NamedCells, check_genes, need
from screformer.benchmarks.system_scpred import most_variable_genes
from screformer.benchmarks.systems_features import query_features, training_cells
from screformer.benchmarks.systems_simple import named_by_scores

if TYPE_CHECKING:
    from anndata import AnnData

NUM_GENES = 2_000
NUM_TREES = 200
MAX_DEPTH = 4
LEARNING_RATE = 0.1
SHARE_OF_GENES = 0.1  # of each tree


class XGBoost:
    """Boosted trees on log1p CP10k of the 2,000 most variable genes of the training cells.

    200 rounds of depth 4 at a learning rate of 0.1, a tenth of the genes each tree: usual values, not searched.
    """

    title = "XGBoost, 2,000 variable genes"
    is_inductive = True

    def __init__(self) -> None:
        self._genes: list[str] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Choose genes and boost; see `CellTypeSystem.fit`. `groups` have no effect."""
        need("xgboost-cpu", "xgboost")
        from xgboost import XGBClassifier

        cells = training_cells(adata, labels)
        self._columns = most_variable_genes(sparse.csr_array(adata.X), NUM_GENES)
        self._model = XGBClassifier(
            n_estimators=NUM_TREES,
            max_depth=MAX_DEPTH,
            learning_rate=LEARNING_RATE,
            colsample_bytree=SHARE_OF_GENES,
            tree_method="hist",
            random_state=seed,
        )
        self._model.fit(cells.features[:, self._columns].toarray(), cells.class_ids)
        self._genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are probabilities. See `CellTypeSystem.predict`."""
        check_genes(self._genes, adata)
        features = query_features(adata, self._genes)[:, self._columns].toarray()
        return named_by_scores(np.asarray(self._model.predict_proba(features)), self._classes)
