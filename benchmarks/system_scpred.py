"""scPred (Alquicira-Hernandez et al. 2019, Genome Biology 20:264): a radial SVM a label on principal components.

Written from the paper and from what its package says it does. It differs from the R package so:

- The query is not moved to the reference by harmony. That is a joint step over all query cells; without it the system
  is inductive, and one cell's name does not depend on its neighbours.
- Variable genes lie above a parabola through log variance by log mean, where Seurat's "vst" has a loess curve.
- Two labels get two SVMs, as more do, where the package trains one.
- Platt's sigmoid is fitted to the held-out values of the search's folds, where kernlab makes three folds anew.
- How informative a component must be is searched on held-out training cells: an adjusted p-value of at most 0.05, as
  in the first publication, or any, the default of today's package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.stats import false_discovery_control, mannwhitneyu
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import SVC

from screformer.benchmarks.cell_type_systems import NamedCells
from screformer.benchmarks.simple_baselines import inner_folds
from screformer.benchmarks.systems_features import (
    TrainingCells,
    check_groups,
    held_out_scores,
    query_features,
    training_cells,
)

if TYPE_CHECKING:
    from anndata import AnnData

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NUM_GENES = 2_000
NUM_COMPONENTS = 50
COSTS = (0.25, 0.5, 1.0)
NUM_FOLDS = 5
MAX_SCALED = 10.0  # Seurat's ScaleData cuts there
MAX_P_VALUES = (1.0, 0.05)  # today's package, the first publication
REJECT_AT = 0.55
MIN_CELLS = 2  # of a label: one to fit on, one to hold out
PLATT_STRENGTH = 1e6  # in effect no penalty: Platt's targets keep the sigmoid finite


class Components(NamedTuple):
    """Principal components of variable genes, all of it fitted on training cells.

    Attributes
    ----------
    genes
        Columns of the matrix that are used.
    means, deviations
        (genes,), of log1p CP10k.
    loadings
        (components, genes).
    """

    genes: Int64Array
    means: FloatArray
    deviations: FloatArray
    loadings: FloatArray

    def project(self, features: sparse.csr_array) -> FloatArray:
        """Return (cells, components) of log1p CP10k (cells, all genes)."""
        return np.asarray(_scale(features, self.genes, self.means, self.deviations) @ self.loadings.T)


class LabelModel(NamedTuple):
    """The SVM of one label against the rest.

    Attributes
    ----------
    components
        Which principal components it sees.
    means, deviations
        (components seen,).
    svm
        Fitted on the centred and scaled components.
    slope, intercept
        Platt's sigmoid: the probability is 1 / (1 + exp(-(slope * value + intercept))).
    cost, sigma
        The chosen C, and the kernel exp(-sigma * squared distance).
    """

    components: Int64Array
    means: FloatArray
    deviations: FloatArray
    svm: SVC
    slope: float
    intercept: float
    cost: float
    sigma: float

    def probabilities(self, components: FloatArray) -> FloatArray:
        """Return (cells,) for (cells, all components)."""
        scaled = (components[:, self.components] - self.means) / self.deviations
        values = self.slope * self.svm.decision_function(scaled) + self.intercept
        return np.asarray(np.exp(-np.logaddexp(0, -values)))


class ScPred:
    """scPred as a `CellTypeSystem`; inductive, and without rejection unless it is asked for.

    Attributes
    ----------
    title
        What tables call it.
    max_p_value
        What was given or, after `fit`, chosen.
    rejection_rate
        Share of the cells of the last `predict` whose best probability is at most 0.55, which scPred would leave
        unassigned; None before.

    Parameters
    ----------
    is_rejecting
        Give those cells no label.
    max_p_value
        Keep a component for a label if its adjusted p-value is at most this; None, the default, chooses 1, which keeps
        all, or 0.05 by the inner macro-F1.

    Raises
    ------
    ValueError
        `max_p_value` is not above 0 and at most 1.
    """

    title = "scPred (own port, no harmony)"
    is_inductive = True

    def __init__(self, *, is_rejecting: bool = False, max_p_value: float | None = None) -> None:
        if max_p_value is not None and not 0 < max_p_value <= 1:
            raise ValueError(
                f"max_p_value got {max_p_value}; it must be above 0 and at most 1, or None: it is searched"
            )
        self.is_rejecting = is_rejecting
        self._given_p_value = max_p_value
        self.max_p_value = max_p_value
        self.rejection_rate: float | None = None
        self._genes: list[str] | None = None
        self._classes: tuple[str, ...] = ()
        self._components: Components | None = None
        self._models: list[LabelModel] = []

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Learn from labelled cells.

        Parameters
        ----------
        adata
            Raw counts.
        labels
            Of each cell.
        groups
            Held out whole when `max_p_value` is searched; C is searched in folds of cells, as scPred does.
        seed
            Fixes the folds and the pairs that sigma is estimated from.

        Raises
        ------
        ValueError
            There is not one label or group a cell, there are fewer than two labels or a label has one cell only, or
            counts are not raw.
        """
        cells = training_cells(adata, labels)
        check_label_sizes(cells)
        check_groups(groups, adata.n_obs)
        counts = sparse.csr_array(adata.X)
        self.max_p_value = self._given_p_value or choose_max_p_value(counts, cells, groups, seed=seed)
        self._components = fit_components(counts, cells.features)
        self._models = fit_labels(
            self._components.project(cells.features), cells.class_ids, max_p_value=self.max_p_value, seed=seed
        )
        self._classes = cells.classes
        self._genes, self.rejection_rate = cells.genes, None

    def predict(self, adata: AnnData) -> NamedCells:
        """Name each cell by its most probable label; rows of `scores` do not sum to 1 (an SVM a label).

        Raises
        ------
        ValueError
            The genes are others, nothing has been fitted, or counts are not raw.
        """
        features = query_features(adata, self._genes)
        assert self._components is not None
        projected = self._components.project(features)
        scores = label_probabilities(self._models, projected)
        is_rejected = scores.max(axis=1) <= REJECT_AT
        self.rejection_rate = float(is_rejected.mean())
        names = np.array(self._classes)[scores.argmax(axis=1)]
        labels = np.where(is_rejected & self.is_rejecting, "", names).tolist()
        return NamedCells(labels, scores.astype(np.float32), self._classes)


def choose_max_p_value(
    counts: sparse.csr_array, cells: TrainingCells, groups: Sequence[str] | None, *, seed: int
) -> float:
    """Return the threshold of `MAX_P_VALUES` with the best macro-F1 on held-out training cells; 1 if both are equal.

    Parameters
    ----------
    counts
        (cells, genes), raw.
    cells
        The same cells, with their labels.
    groups
        Donor or data set of each cell, or None.
    seed
        Of folds and fits.
    """

    def predict_held_out(train: BoolArray, test: BoolArray) -> list[Int64Array]:
        sizes = np.bincount(cells.class_ids[train], minlength=len(cells.classes))
        usable = np.flatnonzero(sizes >= MIN_CELLS)
        if len(usable) < 2:
            return [np.full(test.sum(), sizes.argmax())] * len(MAX_P_VALUES)
        kept = train & np.isin(cells.class_ids, usable)
        components = fit_components(counts[kept], cells.features[kept])
        ours, theirs = components.project(cells.features[kept]), components.project(cells.features[test])
        ids = np.searchsorted(usable, cells.class_ids[kept])
        fitted = [fit_labels(ours, ids, max_p_value=max_p_value, seed=seed) for max_p_value in MAX_P_VALUES]
        return [usable[label_probabilities(models, theirs).argmax(axis=1)] for models in fitted]

    folds = inner_folds(cells.class_ids, groups, seed)
    scores = held_out_scores(cells.class_ids, folds, predict_held_out, num_settings=len(MAX_P_VALUES))
    return MAX_P_VALUES[int(scores.argmax())]


def check_label_sizes(cells: TrainingCells) -> None:
    """Raise ValueError unless each label has two cells: one to fit on, one to hold out."""
    sizes = np.bincount(cells.class_ids)
    if sizes.min() < MIN_CELLS:
        rare = [name for name, size in zip(cells.classes, sizes.tolist(), strict=True) if size < MIN_CELLS]
        raise ValueError(f"each of labels needs at least {MIN_CELLS} cells, {rare} have fewer; leave them out")


def fit_components(
    counts: sparse.csr_array | sparse.csr_matrix,
    features: sparse.csr_array,
    *,
    num_genes: int = NUM_GENES,
    num_components: int = NUM_COMPONENTS,
) -> Components:
    """Return the principal components of the most variable genes; fewer where the cells or genes are too few.

    Parameters
    ----------
    counts, features
        (cells, genes), raw and as log1p CP10k.
    num_genes, num_components
        At most so many.

    Raises
    ------
    ValueError
        No gene varies.
    """
    genes = most_variable_genes(counts, num_genes)
    chosen = features[:, genes].toarray()
    means, deviations = chosen.mean(axis=0), chosen.std(axis=0, ddof=1)
    deviations[deviations == 0] = 1
    scaled = _scale(features, genes, means, deviations)
    num_components = min(num_components, len(genes), len(scaled) - 1)
    loadings = PCA(num_components, svd_solver="full").fit(scaled).components_
    return Components(genes, means, deviations, loadings)


def most_variable_genes(counts: sparse.csr_array | sparse.csr_matrix, num_genes: int) -> Int64Array:
    """Return the columns, ascending, whose counts vary most for their mean.

    Counts are standardised with the variance that a parabola in log mean expects and cut at the square root of the
    number of cells (after Stuart et al. 2019); the variance of that ranks the genes.

    Raises
    ------
    ValueError
        No gene varies.
    """
    matrix = sparse.csc_array(counts, dtype=np.float64)
    num_cells = matrix.shape[0]
    means = np.asarray(matrix.mean(axis=0)).ravel()
    variances = np.asarray(matrix.multiply(matrix).mean(axis=0)).ravel() - means**2
    varying = np.flatnonzero(variances > 1e-12 * np.maximum(means**2, 1e-12))
    if not len(varying):
        raise ValueError("adata has no gene that varies among the training cells; give it more cells or genes")
    log_means, log_variances = np.log10(means[varying]), np.log10(variances[varying])
    terms = np.vander(log_means, 3)
    expected = terms @ np.linalg.lstsq(terms, log_variances, rcond=None)[0]
    deviations = 10 ** (expected / 2)
    matrix = sparse.csc_array(matrix[:, varying])
    per_gene = np.diff(matrix.indptr)
    column = np.repeat(np.arange(len(varying)), per_gene)
    cut = np.sqrt(num_cells)
    values = np.minimum((matrix.data - means[varying][column]) / deviations[column], cut)
    zeros = -means[varying] / deviations
    sums = np.bincount(column, values, len(varying)) + (num_cells - per_gene) * zeros
    squares = np.bincount(column, values**2, len(varying)) + (num_cells - per_gene) * zeros**2
    spread = squares - sums**2 / num_cells
    return np.sort(varying[np.argsort(-spread, kind="stable")[:num_genes]])


def informative_components(components: FloatArray, is_label: BoolArray, max_p_value: float) -> Int64Array:
    """Return the columns that differ between a label and the rest: Wilcoxon, Benjamini-Hochberg; never none.

    Parameters
    ----------
    components
        (cells, components).
    is_label
        (cells,).
    max_p_value
        The highest adjusted p-value that is kept; if none is so low, the component with the lowest is.
    """
    p_values = mannwhitneyu(components[is_label], components[~is_label], method="asymptotic", axis=0).pvalue
    adjusted = false_discovery_control(p_values, method="bh")
    kept = np.flatnonzero(adjusted <= max_p_value)
    return kept if len(kept) else np.array([adjusted.argmin()])


def estimate_sigma(scaled: FloatArray, *, seed: int) -> float:
    """Return the width of a radial kernel for centred and scaled features (cells, features).

    The heuristic of Caputo et al. 2002 that kernlab's sigest and caret follow: of half as many random pairs as there
    are cells, the mean of the inverses of the 0.1 and 0.9 quantiles of the squared distance (of two values also the
    median). Pairs without distance do not count.
    """
    pairs = np.random.default_rng(seed).integers(len(scaled), size=(2, max(1, len(scaled) // 2)))
    distances = ((scaled[pairs[0]] - scaled[pairs[1]]) ** 2).sum(axis=1)
    return sigma_of_distances(distances, num_features=scaled.shape[1])


def sigma_of_distances(distances: FloatArray, *, num_features: int) -> float:
    """Return the mean of the inverse 0.1 and 0.9 quantiles of squared distances above 0; 1 / features without any."""
    apart = distances[distances > 0]
    if not len(apart):
        return 1 / num_features
    return float(np.mean(1 / np.quantile(apart, [0.1, 0.9])))


def fit_labels(components: FloatArray, class_ids: Int64Array, *, max_p_value: float, seed: int) -> list[LabelModel]:
    """Return the model of each label, 0 and up; see `fit_label`."""
    labels = range(int(class_ids.max()) + 1)
    return [fit_label(components, class_ids == label, max_p_value=max_p_value, seed=seed) for label in labels]


def label_probabilities(models: Sequence[LabelModel], components: FloatArray) -> FloatArray:
    """Return (cells, labels) for (cells, all components); each label's model by itself, so rows do not sum to 1."""
    return np.column_stack([model.probabilities(components) for model in models])


def fit_label(components: FloatArray, is_label: BoolArray, *, max_p_value: float, seed: int) -> LabelModel:
    """Return the SVM of one label, with the C of the best mean ROC area over the folds (the lowest of equals).

    Parameters
    ----------
    components
        (cells, components).
    is_label
        (cells,), at least two of each.
    max_p_value, seed
        As for `ScPred`.
    """
    columns = informative_components(components, is_label, max_p_value)
    features = components[:, columns]
    means, deviations = _moments(features)
    scaled = (features - means) / deviations
    sigma = estimate_sigma(scaled, seed=seed)
    folds = _deal_folds(is_label, seed)
    held_out = {cost: _held_out_values(features, is_label, folds, cost, sigma) for cost in COSTS}
    areas = {cost: _mean_area(values, is_label, folds) for cost, values in held_out.items()}
    cost = max(COSTS, key=areas.__getitem__)
    slope, intercept = fit_platt(held_out[cost], is_label)
    svm = new_svm(cost, sigma).fit(scaled, is_label)
    return LabelModel(columns, means, deviations, svm, slope, intercept, cost, sigma)


def new_svm(cost: float, sigma: float) -> SVC:
    """Return a radial SVM that is not fitted; it draws nothing, but would seed itself from numpy's global generator."""
    return SVC(C=cost, gamma=sigma, random_state=0)


def fit_platt(values: FloatArray, is_label: BoolArray) -> tuple[float, float]:
    """Return slope and intercept of Platt's sigmoid (Platt 1999), its targets drawn in from 0 and 1.

    Parameters
    ----------
    values
        (cells,), decision values of cells that were held out.
    is_label
        (cells,).
    """
    num_label, num_rest = int(is_label.sum()), int((~is_label).sum())
    targets = np.where(is_label, (num_label + 1) / (num_label + 2), 1 / (num_rest + 2))
    # A soft target is a cell of each outcome, with the target and what is missing to 1 as weights.
    outcomes = np.repeat([True, False], len(values))
    model = LogisticRegression(C=PLATT_STRENGTH, max_iter=1_000, tol=1e-8)
    model.fit(np.tile(values, 2)[:, None], outcomes, sample_weight=np.concatenate([targets, 1 - targets]))
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def _scale(features: sparse.csr_array, genes: Int64Array, means: FloatArray, deviations: FloatArray) -> FloatArray:
    return np.asarray(np.minimum((features[:, genes].toarray() - means) / deviations, MAX_SCALED))


def _moments(features: FloatArray) -> tuple[FloatArray, FloatArray]:
    deviations = features.std(axis=0, ddof=1)
    return features.mean(axis=0), np.where(deviations > 0, deviations, 1)


def _deal_folds(is_label: BoolArray, seed: int) -> Int64Array:
    """Return each cell's fold, label and rest dealt evenly; fewer folds where the label has fewer cells."""
    num_folds = min(NUM_FOLDS, int(is_label.sum()), int((~is_label).sum()))
    shuffled = np.random.default_rng(seed).permutation(len(is_label))
    folds = np.empty(len(is_label), dtype=np.int64)
    for side in (shuffled[is_label[shuffled]], shuffled[~is_label[shuffled]]):
        folds[side] = np.arange(len(side)) % num_folds
    return folds


def _held_out_values(
    features: FloatArray, is_label: BoolArray, folds: Int64Array, cost: float, sigma: float
) -> FloatArray:
    """Return the decision value of each cell by an SVM that was fitted without the cell's fold."""
    values = np.empty(len(features))
    for fold in np.unique(folds):
        is_held_out = folds == fold
        means, deviations = _moments(features[~is_held_out])
        scaled = (features - means) / deviations
        svm = new_svm(cost, sigma).fit(scaled[~is_held_out], is_label[~is_held_out])
        values[is_held_out] = svm.decision_function(scaled[is_held_out])
    return values


def _mean_area(values: FloatArray, is_label: BoolArray, folds: Int64Array) -> float:
    return float(np.mean([roc_auc_score(is_label[folds == fold], values[folds == fold]) for fold in np.unique(folds)]))
