"""The simple rivals: majority class, logistic regression, linear support vectors, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from screformer.benchmarks.cell_type_systems import NamedCells, check_genes
from screformer.benchmarks.simple_baselines import (
    INVERSE_STRENGTHS,
    FittedRegression,
    fit_logistic_regression,
    inner_folds,
)
from screformer.benchmarks.systems_features import Int64Array, query_features, training_cells

if TYPE_CHECKING:
    from anndata import AnnData

NUM_COMPONENTS = 50
NUM_NEIGHBORS = 15
MAX_SVC_ITERATIONS = 10_000


class MajorityClass:
    """Says the most frequent training label of every cell; scores are the shares of the labels."""

    title = "Majority class"
    is_inductive = True

    def __init__(self) -> None:
        self.genes: list[str] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Count the labels; see `CellTypeSystem.fit`."""
        cells = training_cells(adata, labels, min_labels=1)
        self._shares = np.bincount(cells.class_ids) / len(cells.class_ids)
        self.genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name every cell alike; see `CellTypeSystem.predict`."""
        check_genes(self.genes, adata)
        return named_by_scores(np.tile(self._shares, (adata.n_obs, 1)), self._classes)


class LogisticRegressionSystem:
    """Multinomial logistic regression on Pareto-scaled log1p CP10k, C searched: see `simple_baselines`."""

    title = "Logistic regression"
    is_inductive = True

    def __init__(self) -> None:
        self.genes: list[str] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Search C, then fit on every training cell; see `CellTypeSystem.fit`."""
        cells = training_cells(adata, labels)
        self.regression: FittedRegression = fit_logistic_regression(cells.features, labels, groups=groups, seed=seed)
        self.inverse_strength = self.regression.inverse_strength
        self.genes = cells.genes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are probabilities. See `CellTypeSystem.predict`."""
        features = query_features(adata, self.genes)
        logits = features @ self.regression.weights.T + self.regression.biases
        return named_by_scores(softmax(logits, axis=1), self.regression.labels)


class LinearSVCSystem:
    """One-vs-rest linear support vectors on log1p CP10k; C has the best inner macro-F1, from the regression's values.

    Abdelaal et al. 2019 found it the best of 22 classifiers within data sets.
    """

    title = "Linear SVC"
    is_inductive = True

    def __init__(self) -> None:
        self.genes: list[str] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Search C, then fit on every training cell; see `CellTypeSystem.fit`."""
        cells = training_cells(adata, labels)
        if groups is not None and len(groups) != adata.n_obs:
            raise ValueError(f"groups must have one entry a cell: {adata.n_obs} cells, got {len(groups)}")
        folds = inner_folds(cells.class_ids, groups, seed)
        # On equal scores max() takes the first, the strongest penalty.
        self.inverse_strength = max(
            INVERSE_STRENGTHS, key=lambda strength: _svc_score(cells.features, cells.class_ids, folds, strength, seed)
        )
        self._model = _new_svc(self.inverse_strength, seed).fit(cells.features, cells.class_ids)
        self.genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are signed distances, not probabilities. See `CellTypeSystem.predict`."""
        features = query_features(adata, self.genes)
        distances = self._model.decision_function(features)
        if distances.ndim == 1:  # scikit-learn gives two classes one column
            distances = np.stack([-distances, distances], axis=1)
        return named_by_scores(distances, self._classes)


class NearestNeighbors:
    """The vote of the 15 nearest training cells on 50 principal components of log1p CP10k, fitted on train alone."""

    title = "kNN (15) on 50 PCs"
    is_inductive = True

    def __init__(self) -> None:
        self.genes: list[str] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Find the components and keep the cells; see `CellTypeSystem.fit`. There is nothing to search."""
        cells = training_cells(adata, labels)
        num_components = min(NUM_COMPONENTS, min(cells.features.shape) - 1)
        self.components = PCA(num_components, svd_solver="arpack", random_state=seed)
        places = self.components.fit_transform(cells.features)
        self._neighbors = KNeighborsClassifier(min(NUM_NEIGHBORS, adata.n_obs)).fit(places, cells.class_ids)
        self.genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are shares of the neighbours. See `CellTypeSystem.predict`."""
        features = query_features(adata, self.genes)
        return named_by_scores(self._neighbors.predict_proba(self.components.transform(features)), self._classes)


def named_by_scores(scores: npt.NDArray[np.floating], classes: Sequence[str]) -> NamedCells:
    """Return each cell's label of the highest score, the first of equal ones; `scores` is (cells, classes)."""
    kept = np.asarray(scores, dtype=np.float32)
    return NamedCells([classes[index] for index in kept.argmax(axis=1)], kept, tuple(classes))


def _new_svc(inverse_strength: float, seed: int) -> LinearSVC:
    return LinearSVC(C=inverse_strength, dual="auto", max_iter=MAX_SVC_ITERATIONS, random_state=seed)


def _svc_score(
    features: sparse.csr_array, class_ids: Int64Array, folds: Int64Array, inverse_strength: float, seed: int
) -> float:
    """Return the macro-F1 of all held-out predictions together."""
    predicted = np.empty_like(class_ids)
    for fold in np.unique(folds):
        is_held_out = folds == fold
        known = np.unique(class_ids[~is_held_out])
        if len(known) == 1:
            predicted[is_held_out] = known[0]
            continue
        model = _new_svc(inverse_strength, seed).fit(features[~is_held_out], class_ids[~is_held_out])
        predicted[is_held_out] = model.predict(features[is_held_out])
    return float(f1_score(class_ids, predicted, average="macro", zero_division=0))
