"""The simple rivals: majority class, logistic regression, linear support vectors, nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from screformer.benchmarks.cell_type_systems import NamedCells, check_genes
from screformer.benchmarks.simple_baselines import (
    INVERSE_STRENGTHS,
    FittedRegression,
    fit_logistic_regression,
    inner_folds,
)
from screformer.benchmarks.system_scpred import MAX_SCALED, most_variable_genes
from screformer.benchmarks.systems_features import (
    BoolArray,
    Int64Array,
    check_groups,
    held_out_scores,
    query_features,
    training_cells,
)

if TYPE_CHECKING:
    from anndata import AnnData

NUM_COMPONENTS = 50
NUM_NEIGHBORS = 15
NUMS_OF_GENES = (None, 2_000)  # None is all
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
        check_groups(groups, adata.n_obs)

        def predict_held_out(train: BoolArray, test: BoolArray) -> list[Int64Array]:
            fitted = [
                _new_svc(strength, seed).fit(cells.features[train], cells.class_ids[train])
                for strength in INVERSE_STRENGTHS
            ]
            return [model.predict(cells.features[test]) for model in fitted]

        folds = inner_folds(cells.class_ids, groups, seed)
        scores = held_out_scores(cells.class_ids, folds, predict_held_out, num_settings=len(INVERSE_STRENGTHS))
        # On equal scores argmax() takes the first, the strongest penalty.
        self.inverse_strength = INVERSE_STRENGTHS[int(scores.argmax())]
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
    """The vote of the 15 nearest training cells on 50 principal components of log1p CP10k, fitted on train alone.

    All genes or the 2,000 most variable, standardised or not: what has the best inner macro-F1, as for the regression.

    Attributes
    ----------
    num_genes
        The most variable genes that were chosen; None is all. None before `fit`, too.
    is_standardised
        Whether genes have the same variance; None before `fit`.
    """

    title = "kNN (15) on 50 PCs"
    is_inductive = True

    def __init__(self) -> None:
        self.genes: list[str] | None = None
        self.num_genes: int | None = None
        self.is_standardised: bool | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Search genes and scale, then find the components and keep the cells; see `CellTypeSystem.fit`."""
        cells = training_cells(adata, labels)
        check_groups(groups, adata.n_obs)
        counts = sparse.csr_array(adata.X)
        folds = inner_folds(cells.class_ids, groups, seed)
        settings = list(product(NUMS_OF_GENES, (False, True)))

        def predict_held_out(train: BoolArray, test: BoolArray) -> list[Int64Array]:
            fitted = [
                fit_neighbors(counts[train], cells.features[train], cells.class_ids[train], *setting, seed=seed)
                for setting in settings
            ]
            return [model.predict(cells.features[test]) for model in fitted]

        scores = held_out_scores(cells.class_ids, folds, predict_held_out, num_settings=len(settings))
        # On equal scores argmax() takes the first, the plainest.
        self.num_genes, self.is_standardised = settings[int(scores.argmax())]
        self._model = fit_neighbors(
            counts, cells.features, cells.class_ids, self.num_genes, self.is_standardised, seed=seed
        )
        self.genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are shares of the neighbours. See `CellTypeSystem.predict`."""
        features = query_features(adata, self.genes)
        return named_by_scores(self._model.shares(features), self._classes)


class Neighbors(NamedTuple):
    """Labelled cells on their principal components.

    Attributes
    ----------
    genes
        Columns of the matrix that are used.
    factors
        (genes,), by which log1p CP10k is multiplied.
    components
        Of these genes.
    neighbors
        The cells there.
    """

    genes: Int64Array
    factors: npt.NDArray[np.float64]
    components: PCA
    neighbors: KNeighborsClassifier

    def shares(self, features: sparse.csr_array) -> npt.NDArray[np.float64]:
        """Return (cells, classes) for log1p CP10k (cells, all genes)."""
        return np.asarray(self.neighbors.predict_proba(self._places(features)))

    def predict(self, features: sparse.csr_array) -> Int64Array:
        """Return the class of each cell of log1p CP10k (cells, all genes)."""
        return np.asarray(self.neighbors.predict(self._places(features)))

    def _places(self, features: sparse.csr_array) -> npt.NDArray[np.float64]:
        return np.asarray(self.components.transform(_scaled(features, self.genes, self.factors)))


def fit_neighbors(
    counts: sparse.csr_array,
    features: sparse.csr_array,
    class_ids: Int64Array,
    num_genes: int | None,
    is_standardised: bool,
    *,
    seed: int,
) -> Neighbors:
    """Return labelled cells on their principal components.

    Parameters
    ----------
    counts, features
        (cells, genes), raw and as log1p CP10k.
    class_ids
        (cells,).
    num_genes
        The most variable ones; None is all.
    is_standardised
        Divide genes by their standard deviation.
    seed
        Of the components' search.
    """
    genes = np.arange(features.shape[1]) if num_genes is None else most_variable_genes(counts, num_genes)
    factors = _inverse_deviations(features[:, genes]) if is_standardised else np.ones(len(genes))
    scaled = _scaled(features, genes, factors)
    components = PCA(min(NUM_COMPONENTS, min(scaled.shape) - 1), svd_solver="arpack", random_state=seed)
    places = components.fit_transform(scaled)
    neighbors = KNeighborsClassifier(min(NUM_NEIGHBORS, len(class_ids))).fit(places, class_ids)
    return Neighbors(genes, factors, components, neighbors)


def _inverse_deviations(features: sparse.csr_array) -> npt.NDArray[np.float64]:
    """Return (genes,): 1 / standard deviation, and 0 for a gene that does not vary."""
    means = np.asarray(features.mean(axis=0)).ravel()
    variances = np.asarray(features.multiply(features).mean(axis=0)).ravel() - means**2
    factors = np.zeros_like(variances)
    varies = variances > 1e-12 * np.maximum(means**2, 1e-12)  # below that it is rounding
    factors[varies] = variances[varies] ** -0.5
    return factors


def _scaled(features: sparse.csr_array, genes: Int64Array, factors: npt.NDArray[np.float64]) -> sparse.csr_array:
    """Return the genes times their factors, at most 10, so that no rare gene decides alone.

    Without standardising nothing is cut: log1p CP10k is below 10.
    """
    scaled = sparse.csr_array(features[:, genes] @ sparse.diags_array(factors))
    np.minimum(scaled.data, MAX_SCALED, out=scaled.data)
    return scaled


def named_by_scores(scores: npt.NDArray[np.floating], classes: Sequence[str]) -> NamedCells:
    """Return each cell's label of the highest score, the first of equal ones; `scores` is (cells, classes)."""
    kept = np.asarray(scores, dtype=np.float32)
    return NamedCells([classes[index] for index in kept.argmax(axis=1)], kept, tuple(classes))


def _new_svc(inverse_strength: float, seed: int) -> LinearSVC:
    return LinearSVC(C=inverse_strength, dual="auto", max_iter=MAX_SVC_ITERATIONS, random_state=seed)
