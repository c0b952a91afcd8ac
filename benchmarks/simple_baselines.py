"""The two rows that stand beside every model: the majority class and a logistic regression that was really tried."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
StringArray = npt.NDArray[np.str_]

TARGET_SUM = 10_000
INVERSE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)  # scikit-learn's C, from much to little regularisation
MAX_FOLDS = 5
NUM_CELL_FOLDS = 3
MAX_ITERATIONS = 2_000
SEARCH_TOLERANCE, TOLERANCE = 1e-3, 1e-4  # the search only ranks values of C


class TrainTestSplit(Protocol):
    """Row numbers of the cells to fit on and of the cells to predict; `train.splits.Split` is one."""

    @property
    def train(self) -> Int64Array:
        """Row numbers to fit on."""

    @property
    def test(self) -> Int64Array:
        """Row numbers to predict."""


@dataclass(frozen=True)
class BaselineResult:
    """Predictions of one baseline.

    Attributes
    ----------
    name
        ``"majority_class"`` or ``"logistic_regression"``.
    labels
        Class names, in the order of the columns of `probabilities`.
    probabilities
        (test cells, labels); rows sum to 1, and a label without a training cell has a zero column.
    seconds
        Wall time of search, fit and prediction.
    inverse_strength
        The chosen C of logistic regression (small = strong regularisation); None for the majority class.
    search
        C -> macro-F1 of the inner cross-validation on the training cells; empty for the majority class.
    """

    name: str
    labels: tuple[str, ...]
    probabilities: FloatArray
    seconds: float
    inverse_strength: float | None = None
    search: Mapping[float, float] = field(default_factory=dict)

    @property
    def predictions(self) -> list[str]:
        """Most probable label of each test cell; the first of `labels` where two are equal."""
        return [self.labels[index] for index in self.probabilities.argmax(axis=1)]


class FittedRegression(NamedTuple):
    """A logistic regression: logits are ``features @ weights.T + biases``.

    Attributes
    ----------
    labels
        Class names, ascending.
    weights, biases
        (labels, genes) and (labels,), for features as they were given.
    inverse_strength
        The chosen C.
    search
        C -> macro-F1 of the inner cross-validation; empty if there was no choice.
    """

    labels: tuple[str, ...]
    weights: FloatArray
    biases: FloatArray
    inverse_strength: float
    search: Mapping[float, float]


def simple_baselines(
    counts: sparse.csr_array | sparse.csr_matrix,
    cell_labels: Sequence[str],
    split: TrainTestSplit,
    *,
    labels: Sequence[str],
    gene_positions: npt.ArrayLike | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, BaselineResult]:
    """Return both baselines, keyed by name, on the cells, genes and split of the model.

    Everything is fitted on ``split.train``. The validation cells, which a network needs for early stopping, are not
    touched: C is searched by cross-validation within the training cells.

    Parameters
    ----------
    counts
        Raw counts (cells, genes), every gene that was measured.
    cell_labels
        Label of each row of `counts`.
    split
        Row numbers in ``train`` and ``test``.
    labels
        The model's class names, in its order.
    gene_positions
        Position of each column of `counts` in the model's vocabulary, -1 where it has none (``GeneMapping.positions``);
        None keeps every gene.
    groups
        Donor (or dataset) of each row; the search then holds out whole groups, as the test does.
    seed
        Fixes the inner folds; without effect when there are groups.

    Raises
    ------
    ValueError
        Lengths do not fit, counts are not raw, or see `logistic_regression`.
    """
    for name, values in (("cell_labels", cell_labels), ("groups", groups)):
        if values is not None and len(values) != counts.shape[0]:
            raise ValueError(f"{name} must have one entry a cell: {counts.shape[0]} cells, got {len(values)}")
    names = np.asarray(cell_labels, dtype=np.str_)
    features = log1p_cp10k(counts, gene_positions=gene_positions)
    majority = majority_class(names[split.train], len(split.test), labels=labels)
    regression = logistic_regression(
        features[split.train],
        names[split.train],
        features[split.test],
        labels=labels,
        train_groups=None if groups is None else np.asarray(groups, dtype=np.str_)[split.train],
        seed=seed,
    )
    return {result.name: result for result in (majority, regression)}


def majority_class(
    train_labels: Sequence[str] | StringArray, num_test_cells: int, *, labels: Sequence[str]
) -> BaselineResult:
    """Return the share of each label among the training cells as the probabilities of every test cell.

    Raises
    ------
    ValueError
        `labels` has duplicates or lacks a training label, or there is no training cell.
    """
    start = time.perf_counter()
    names = _check_labels(train_labels, labels)
    shares = [float(np.mean(names == str(label))) for label in labels]
    probabilities = np.tile(np.array(shares), (num_test_cells, 1))
    return BaselineResult("majority_class", tuple(labels), probabilities, time.perf_counter() - start)


def logistic_regression(
    train_features: sparse.csr_array,
    train_labels: Sequence[str] | StringArray,
    test_features: sparse.csr_array,
    *,
    labels: Sequence[str],
    train_groups: Sequence[str] | StringArray | None = None,
    inverse_strengths: Sequence[float] = INVERSE_STRENGTHS,
    seed: int = 0,
) -> BaselineResult:
    """Return the predictions of a multinomial logistic regression with an L2 penalty, its C searched on the train part.

    Each gene is divided by the square root of its standard deviation among the training cells (Pareto scaling, van den
    Berg et al. 2006), and classes weigh the same however rare they are. On leave-one-donor-out pancreas cells this beat
    log1p CP10k as it is and full standardisation, each with and without class weights: it is the strongest simple
    rival we found, not the most common one. Genes are not centred: the intercept has no penalty, so it would change
    nothing but the memory.

    C is the one with the best macro-F1 over all held-out predictions of an inner cross-validation: whole groups are
    held out if `train_groups` has at least two (at most five folds), else three stratified folds. The final fit uses
    every training cell.

    Parameters
    ----------
    train_features, test_features
        (cells, genes), `log1p_cp10k` of the same genes.
    train_labels
        Label of each training cell.
    labels
        Class names in the order wanted for the columns.
    train_groups
        Donor (or dataset) of each training cell.
    inverse_strengths
        The values of C to try; with one value there is no search.
    seed
        Fixes the stratified folds.

    Raises
    ------
    ValueError
        `labels` has duplicates or lacks a training label, the training cells have fewer than two labels, lengths do not
        fit, or `inverse_strengths` is empty or not positive.
    """
    start = time.perf_counter()
    names = _check_labels(train_labels, labels)
    if test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"train_features and test_features must have the same genes, got {train_features.shape[1]} and "
            f"{test_features.shape[1]} columns"
        )
    fitted = fit_logistic_regression(
        train_features, names, groups=train_groups, inverse_strengths=inverse_strengths, seed=seed
    )
    probabilities = np.zeros((test_features.shape[0], len(labels)))
    columns = [list(map(str, labels)).index(name) for name in fitted.labels]
    probabilities[:, columns] = softmax(test_features @ fitted.weights.T + fitted.biases, axis=1)
    seconds = time.perf_counter() - start
    return BaselineResult(
        "logistic_regression", tuple(labels), probabilities, seconds, fitted.inverse_strength, fitted.search
    )


def fit_logistic_regression(
    features: sparse.csr_array,
    cell_labels: Sequence[str] | StringArray,
    *,
    groups: Sequence[str] | StringArray | None = None,
    inverse_strengths: Sequence[float] = INVERSE_STRENGTHS,
    is_scaled: bool = True,
    seed: int = 0,
) -> FittedRegression:
    """Return the logistic regression that `logistic_regression` predicts with; see there for scaling, weights and C.

    Parameters
    ----------
    features
        (cells, genes), at least 0.
    cell_labels
        Label of each cell.
    groups
        Donor (or dataset) of each cell.
    inverse_strengths, seed
        As for `logistic_regression`.
    is_scaled
        Whether genes are scaled within the fit, as there.

    Raises
    ------
    ValueError
        The cells have fewer than two labels, lengths do not fit, or `inverse_strengths` is empty or not positive.
    """
    start = time.perf_counter()
    # Ids of our own, so that the order in which a caller names labels has no part in the result.
    seen, class_ids = np.unique(np.asarray(cell_labels, dtype=np.str_), return_inverse=True)
    strengths = sorted(set(map(float, inverse_strengths)))
    _check_fit(features, class_ids, groups, strengths)
    search: dict[float, float] = {}
    if len(strengths) > 1:
        folds = inner_folds(class_ids, groups, seed)
        search = _search(features, class_ids, folds, strengths, is_scaled=is_scaled)
    # On equal scores max() takes the first, the strongest penalty.
    chosen = max(strengths, key=lambda strength: search.get(strength, 0.0))
    scaling = _pareto_scaling(features) if is_scaled else sparse.eye_array(features.shape[1])
    model = _new_regression(TOLERANCE).set_params(C=chosen).fit(sparse.csr_array(features @ scaling), class_ids)
    weights, biases = model.coef_ @ scaling, model.intercept_
    if len(seen) == 2:  # scikit-learn keeps the second class's logit alone
        weights, biases = np.vstack([np.zeros_like(weights), weights]), np.array([0.0, biases[0]])
    seconds = time.perf_counter() - start
    logger.info("logistic regression: C=%g of %s in %.1f s", chosen, search or strengths, seconds)
    return FittedRegression(tuple(seen.tolist()), np.asarray(weights), biases, chosen, search)


def log1p_cp10k(
    counts: sparse.csr_array | sparse.csr_matrix, *, gene_positions: npt.ArrayLike | None = None
) -> sparse.csr_array:
    """Return log(1 + counts per 10,000) of the vocabulary's genes (cells, genes found), float64.

    A cell is normalised by all its counts, those of genes outside the vocabulary included. Columns with the same
    position are summed first; positions that no column has are left out.

    Raises
    ------
    ValueError
        Counts are negative or not whole numbers, a cell has none, or `gene_positions` does not fit.
    """
    matrix = sparse.csr_array(counts, dtype=np.float64)
    if (matrix.data < 0).any() or (matrix.data != np.rint(matrix.data)).any():
        raise ValueError(
            "counts must be raw counts (whole numbers from 0), got other values; pass the unnormalised matrix"
        )
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    if not totals.all():
        raise ValueError(f"counts has {np.count_nonzero(totals == 0)} cells without a count; remove them first")
    if gene_positions is not None:
        matrix = sparse.csr_array(matrix @ _columns_to_genes(gene_positions, matrix.shape[1]))
    normalised = sparse.csr_array(sparse.diags_array(TARGET_SUM / totals) @ matrix)
    np.log1p(normalised.data, out=normalised.data)
    return normalised


def _columns_to_genes(gene_positions: npt.ArrayLike, num_columns: int) -> sparse.csr_array:
    """Return the 0/1 matrix (columns, genes found) that sums the columns of one gene."""
    positions = np.asarray(gene_positions, dtype=np.int64)
    if positions.shape != (num_columns,):
        raise ValueError(f"gene_positions must have one entry a column: {num_columns} columns, got {positions.shape}")
    mapped = np.flatnonzero(positions >= 0)
    if not len(mapped):
        raise ValueError("gene_positions maps no column to the vocabulary; check the gene names of the counts")
    found, gene = np.unique(positions[mapped], return_inverse=True)
    return sparse.csr_array((np.ones(len(mapped)), (mapped, gene)), shape=(num_columns, len(found)))


def _check_labels(train_labels: Sequence[str] | StringArray, labels: Sequence[str]) -> StringArray:
    known = [str(label) for label in labels]
    if len(set(known)) != len(known):
        raise ValueError(f"labels must be distinct, got {known}")
    names = np.asarray(train_labels, dtype=np.str_)
    unknown = sorted(set(names.tolist()) - set(known))
    if unknown:
        raise ValueError(f"labels lacks {unknown}, which training cells have; it holds {known}")
    if not len(names):
        raise ValueError("train_labels must name at least one cell, got none")
    return names


def _check_fit(
    train_features: sparse.csr_array,
    class_ids: Int64Array,
    train_groups: Sequence[str] | StringArray | None,
    strengths: list[float],
) -> None:
    num_cells = train_features.shape[0]
    if len(class_ids) != num_cells:
        raise ValueError(f"train_labels must have one entry a training cell: {num_cells}, got {len(class_ids)}")
    if train_groups is not None and len(train_groups) != num_cells:
        raise ValueError(
            f"train_groups must have one entry a training cell: {num_cells} cells, got {len(train_groups)}"
        )
    if len(np.unique(class_ids)) < 2:
        raise ValueError("train_labels must hold at least two labels, got one; there is nothing to tell apart")
    if not strengths or strengths[0] <= 0:
        raise ValueError(f"inverse_strengths must be at least one positive value of C, got {strengths}")


def inner_folds(class_ids: Int64Array, groups: Sequence[str] | StringArray | None, seed: int) -> Int64Array:
    """Return each training cell's fold: whole groups (at most five folds) if there are two, else three of cells."""
    folds = _group_folds(groups) if groups is not None else None
    return _cell_folds(class_ids, seed) if folds is None else folds


def _group_folds(groups: Sequence[str] | StringArray) -> Int64Array | None:
    """Return the fold of each cell so that no group is in two folds; None for a single group."""
    names, group_of_cell, sizes = np.unique(np.asarray(groups, dtype=np.str_), return_inverse=True, return_counts=True)
    if len(names) < 2:
        return None
    fold_of_group = np.empty(len(names), dtype=np.int64)
    fold_sizes = np.zeros(min(MAX_FOLDS, len(names)), dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        fold_of_group[group] = fold_sizes.argmin()
        fold_sizes[fold_of_group[group]] += sizes[group]
    return fold_of_group[group_of_cell]


def _cell_folds(class_ids: Int64Array, seed: int) -> Int64Array:
    """Return the fold of each cell, each label dealt evenly.

    Unlike scikit-learn's StratifiedKFold this has nothing to warn about when a label has fewer cells than folds.
    """
    shuffled = np.random.default_rng(seed).permutation(len(class_ids))
    by_label = shuffled[np.argsort(class_ids[shuffled], kind="stable")]
    folds = np.empty(len(class_ids), dtype=np.int64)
    folds[by_label] = np.arange(len(class_ids)) % min(NUM_CELL_FOLDS, len(class_ids))
    return folds


def _search(
    features: sparse.csr_array, class_ids: Int64Array, folds: Int64Array, strengths: list[float], *, is_scaled: bool
) -> dict[float, float]:
    """Return C -> macro-F1 of the held-out predictions of all folds together."""
    predicted = np.empty((len(strengths), len(class_ids)), dtype=np.int64)
    for fold in np.unique(folds):
        held_out = folds == fold
        path = _fit_path(features[~held_out], class_ids[~held_out], features[held_out], strengths, is_scaled=is_scaled)
        for row, (fitted, probabilities) in zip(predicted, path, strict=True):
            row[held_out] = fitted[probabilities.argmax(axis=1)]
    return {
        strength: float(f1_score(class_ids, row, average="macro", zero_division=0))
        for strength, row in zip(strengths, predicted, strict=True)
    }


def _fit_path(
    train_features: sparse.csr_array,
    class_ids: Int64Array,
    test_features: sparse.csr_array,
    strengths: Sequence[float],
    *,
    is_scaled: bool,
) -> list[tuple[Int64Array, FloatArray]]:
    """Return (class ids, probabilities of the test cells) for each C, each fit started from the one before."""
    fitted = np.unique(class_ids)
    if len(fitted) == 1:
        return [(fitted, np.ones((test_features.shape[0], 1)))] * len(strengths)
    scaling = _pareto_scaling(train_features) if is_scaled else sparse.eye_array(train_features.shape[1])
    scaled_train, scaled_test = sparse.csr_array(train_features @ scaling), sparse.csr_array(test_features @ scaling)
    model = _new_regression(SEARCH_TOLERANCE)
    path = []
    for strength in strengths:
        model.set_params(C=strength).fit(scaled_train, class_ids)
        path.append((fitted, model.predict_proba(scaled_test)))
    return path


def _new_regression(tolerance: float) -> LogisticRegression:
    return LogisticRegression(class_weight="balanced", max_iter=MAX_ITERATIONS, tol=tolerance, warm_start=True)


def _pareto_scaling(features: sparse.csr_array) -> sparse.dia_array:
    """Return diag(1 / sqrt(standard deviation)) of the genes; 0 for a gene that does not vary in these cells."""
    mean = np.asarray(features.mean(axis=0)).ravel()
    variance = np.asarray(features.multiply(features).mean(axis=0)).ravel() - mean**2
    factors = np.zeros_like(variance)
    varies = variance > 1e-12 * np.maximum(mean**2, 1e-12)  # below that it is rounding
    factors[varies] = variance[varies] ** -0.25
    return sparse.diags_array(factors)
