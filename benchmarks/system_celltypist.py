"""CellTypist (Dominguez Conde et al. 2022, Science 376:eabl5197) as its paper defines it, on scikit-learn.

One logistic regression a cell type against the rest, on log1p CP10k, centred and scaled by the training cells and cut
at 10. The probability of a type is the sigmoid of its decision value, and the best type wins: CellTypist's "best match"
mode, without majority voting, which looks at a cell's neighbours. Its feature selection, off by default as in the
package, keeps the genes with the largest absolute weights of each type in a first fit, for a second fit on those.

The package itself is not used: its 1.7.1 passes scikit-learn an argument that 1.8 and later no longer have. With
scikit-learn 1.7, its labels of all genes are these (see the tests); with feature selection, whose first fit is by
stochastic gradient descent there and by lbfgs here, nearly all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from screformer.benchmarks.cell_type_systems import NamedCells, check_genes
from screformer.benchmarks.systems_features import query_features, training_cells
from screformer.benchmarks.systems_simple import named_by_scores

if TYPE_CHECKING:
    from anndata import AnnData

FloatArray = npt.NDArray[np.float64]
MAX_SCALED = 10.0
INVERSE_STRENGTH = 1.0
MAX_ITERATIONS = 1_000


class CellTypist:
    """One-vs-rest logistic regressions as CellTypist's paper has them; see the module's text.

    Parameters
    ----------
    num_top_genes
        Genes of each type that a second fit sees, 300 in the paper's feature selection; None, the package's default: a
        single fit on all genes.
    """

    title = "CellTypist (as its paper defines it)"
    is_inductive = True

    def __init__(self, *, num_top_genes: int | None = None) -> None:
        if num_top_genes is not None and num_top_genes < 1:
            raise ValueError(f"num_top_genes got {num_top_genes}; it must be at least 1, or None for all genes")
        self.num_top_genes = num_top_genes
        self._genes: list[str] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Choose genes, then fit; see `CellTypeSystem.fit`. There is nothing to search and nothing drawn."""
        cells = training_cells(adata, labels)
        varying = np.flatnonzero(np.diff(sparse.csc_array(cells.features).indptr) > 0)
        self._columns = varying
        model = self._fit_scaled(cells.features, cells.class_ids)
        if self.num_top_genes is not None and self.num_top_genes < len(varying):
            weights = np.abs(np.concatenate([each.coef_ for each in model.estimators_]))
            top = np.argsort(-weights, axis=1, kind="stable")[:, : self.num_top_genes]
            self._columns = varying[np.unique(top)]
            model = self._fit_scaled(cells.features, cells.class_ids)
        self._model, self._genes, self._classes = model, cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are the sigmoid of each type's value and do not sum to 1. See `CellTypeSystem.predict`."""
        check_genes(self._genes, adata)
        values = self._model.decision_function(self._scaled(query_features(adata, self._genes)))
        if values.ndim == 1:  # scikit-learn gives two classes one column
            values = np.stack([-values, values], axis=1)
        return named_by_scores(expit(values), self._classes)

    def _fit_scaled(self, features: sparse.csr_array, class_ids: npt.NDArray[np.int64]) -> OneVsRestClassifier:
        self._scaler = StandardScaler().fit(features[:, self._columns].toarray())
        regression = LogisticRegression(C=INVERSE_STRENGTH, max_iter=MAX_ITERATIONS)
        return OneVsRestClassifier(regression).fit(self._scaled(features), class_ids)

    def _scaled(self, features: sparse.csr_array) -> FloatArray:
        scaled: FloatArray = self._scaler.transform(features[:, self._columns].toarray())
        return np.minimum(scaled, MAX_SCALED)
