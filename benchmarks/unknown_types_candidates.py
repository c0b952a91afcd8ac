"""What may tell a cell of an unknown type: every measure that was tried, of cells whose training cells are at hand.

All of them are fitted to training cells' levels (bins as shares of the highest) and computed for a cell from its own
levels alone; higher is stranger. Softmax and energy are those of a logistic regression on 32 principal components, such
as a classifier of the recipe finetune-small starts as.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import logsumexp, softmax
from sklearn.linear_model import LogisticRegression

from screformer.annotation.unknown_types import CELLS_TO_LEARN_FROM, INVERSE_STRENGTH
from screformer.train.component_regression import MAX_ITERATIONS, Projection, component_projections

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Strings = npt.NDArray[np.str_]

# Sums of minus the logarithms of the shares of held-out training cells that are at least as strange.
COMBINATIONS = {
    "softmax + gene excess": ("softmax", "gene_excess_1"),
    "relative Mahalanobis + gene excess": ("relative_mahalanobis_128", "gene_excess_1"),
    "one-vs-rest + gene excess": ("one_vs_rest_128", "gene_excess_1"),
    "one-vs-rest + excess of 3 genes": ("one_vs_rest_128", "gene_excess_3"),
    "one-vs-rest + standardised excess of 3 genes": ("one_vs_rest_128", "standardised_excess_3"),
}


NUM_COMPONENTS = (32, 64, 128)


class Cells(NamedTuple):
    """Levels, float32 (cells, genes), type and donor of cells."""

    levels: sparse.csr_array
    labels: Strings
    donors: Strings


def measure_candidates(train: Cells, test: sparse.csr_array) -> dict[str, FloatArray]:
    """Return name -> strangeness of the test cells, single measures and combinations, given cells of known types."""
    found = dict(_measures(train, test))
    held_out: dict[str, list[FloatArray]] = {name: [] for name in found}
    for donor in np.unique(train.donors):
        kept = train.donors != donor
        is_learned = np.array([(train.labels[kept] == label).sum() >= CELLS_TO_LEARN_FROM for label in train.labels])
        rest = Cells(train.levels[kept], train.labels[kept], train.donors[kept])
        for name, values in _measures(rest, train.levels[~kept & is_learned]):
            held_out[name].append(values)
    known = {name: np.sort(np.concatenate(values)) for name, values in held_out.items()}
    for title, names in COMBINATIONS.items():
        found[title] = np.sum([_surprise(known[name], found[name]) for name in names], axis=0)
    names = COMBINATIONS["one-vs-rest + gene excess"]
    found["one-vs-rest or gene excess, the larger"] = np.max([_surprise(known[name], found[name]) for name in names], 0)
    return found


def logit_measures(logits: FloatArray) -> dict[str, FloatArray]:
    """Return what is made of a classifier's logits (cells, classes)."""
    probabilities, ordered = softmax(logits, axis=1), np.sort(logits, axis=1)
    return {
        # The logarithm of the odds: 1 - p itself is equal for the cells that are surest.
        "softmax": logsumexp(ordered[:, :-1], axis=1) - ordered[:, -1],
        "entropy": -(probabilities * np.log(probabilities + 1e-30)).sum(axis=1),
        "margin": ordered[:, -2] - ordered[:, -1],
        "max_logit": -ordered[:, -1],
        "energy": -logsumexp(logits, axis=1),
    }


def _surprise(known: FloatArray, values: FloatArray) -> FloatArray:
    return -np.log((1 + len(known) - np.searchsorted(known, values)) / (1 + len(known)))


def _measures(train: Cells, test: sparse.csr_array) -> Iterator[tuple[str, FloatArray]]:
    class_ids = np.unique(train.labels, return_inverse=True)[1]
    most = min(train.levels.shape) - 1
    numbers = [min(number, most) for number in NUM_COMPONENTS]
    projections = dict(zip(NUM_COMPONENTS, component_projections(train.levels, numbers, 0), strict=True))
    new = {number: test @ each.gene_weights - each.center for number, each in projections.items()}
    logits = _regression_logits(projections[32].cells, class_ids, new[32])
    yield from logit_measures(logits).items()
    for number in (32, 128):
        yield f"one_vs_rest_{number}", _refusal(projections[number].cells, class_ids, new[number])
    for number in (32, 128):
        yield from _mahalanobis(number, projections[number], class_ids, train.donors, new[number])
    yield from _nearest(projections[64].cells, class_ids, new[64])
    yield from _gene_measures(train, class_ids, test, logits.argmax(axis=1))
    squares = np.asarray(test.multiply(test).sum(axis=1)).ravel()
    basis, _ = np.linalg.qr(projections[64].gene_weights)
    residual = squares - ((test @ basis) ** 2).sum(axis=1)
    yield "residual_64", residual
    yield "residual_share_64", residual / np.maximum(squares, 1e-9)
    yield "num_genes", np.diff(test.indptr).astype(np.float64)


def _regression(cells: FloatArray, targets: npt.NDArray[np.generic]) -> LogisticRegression:
    model = LogisticRegression(C=INVERSE_STRENGTH, class_weight="balanced", max_iter=MAX_ITERATIONS)
    return model.fit(cells, targets)


def _regression_logits(cells: FloatArray, class_ids: Int64Array, new: FloatArray) -> FloatArray:
    logits = _regression(cells, class_ids).decision_function(new)
    return np.stack([-logits / 2, logits / 2], axis=1) if logits.ndim == 1 else logits


def _refusal(cells: FloatArray, class_ids: Int64Array, new: FloatArray) -> FloatArray:
    return -np.max([_regression(cells, class_ids == each).decision_function(new) for each in np.unique(class_ids)], 0)


def _mahalanobis(
    number: int, projection: Projection, class_ids: Int64Array, donors: Strings, new: FloatArray
) -> Iterator[tuple[str, FloatArray]]:
    """Yield the distance to the nearest type, that less the distance to all cells, and one that forgives donors."""
    # Components as they are: equal spread would make the last as loud as the first.
    scale = 1 / np.maximum(np.linalg.norm(projection.gene_weights, axis=0), 1e-12)
    cells, new = projection.cells * scale, new * scale
    means = np.stack([cells[class_ids == each].mean(axis=0) for each in range(class_ids.max() + 1)])
    within = _squared_distances(new, means, cells - means[class_ids]).min(axis=1)
    overall = _squared_distances(new, cells.mean(axis=0)[None], cells - cells.mean(axis=0))[:, 0]
    yield f"mahalanobis_{number}", within
    yield f"relative_mahalanobis_{number}", within - overall
    across = []
    for donor in np.unique(donors):
        for each in np.unique(class_ids[donors == donor]):
            own, others = (class_ids == each) & (donors == donor), (class_ids == each) & (donors != donor)
            across += [cells[own] - cells[others].mean(axis=0)] if others.any() else []
    forgiving = _squared_distances(new, means, np.concatenate(across)).min(axis=1) if across else within
    yield f"mahalanobis_across_donors_{number}", forgiving


def _squared_distances(new: FloatArray, centers: FloatArray, residuals: FloatArray) -> FloatArray:
    covariance = residuals.T @ residuals / len(residuals)
    size = len(covariance)
    covariance = 0.9 * covariance + 0.1 * np.trace(covariance) / size * np.eye(size)
    whiten = np.linalg.cholesky(np.linalg.inv(covariance))
    return (((new[:, None] - centers) @ whiten) ** 2).sum(axis=-1)


def _nearest(cells: FloatArray, class_ids: Int64Array, new: FloatArray) -> Iterator[tuple[str, FloatArray]]:
    def fifth(queries: FloatArray, rank: int = 5) -> tuple[FloatArray, Int64Array]:
        squares = (queries**2).sum(axis=1)[:, None] + (cells**2).sum(axis=1) - 2 * queries @ cells.T
        order = np.argpartition(squares, rank - 1, axis=1)[:, rank - 1]
        return np.sqrt(np.maximum(np.take_along_axis(squares, order[:, None], axis=1)[:, 0], 0)), order

    distances, neighbours = fifth(new)
    own, _ = fifth(cells, 6)  # the nearest is the cell itself
    usual = np.array([np.median(own[class_ids == each]) for each in range(class_ids.max() + 1)])
    yield "fifth_neighbour_64", distances
    yield "fifth_neighbour_by_type_64", distances / usual[class_ids[neighbours]]


def _gene_measures(
    train: Cells, class_ids: Int64Array, test: sparse.csr_array, predicted: Int64Array
) -> Iterator[tuple[str, FloatArray]]:
    levels, new = (cells.astype(np.float32).toarray() for cells in (train.levels, test))
    means = np.stack([levels[class_ids == each].mean(axis=0) for each in range(class_ids.max() + 1)])
    spread = np.sqrt(sum(((levels[class_ids == each] - mean) ** 2).sum(axis=0) for each, mean in enumerate(means)))
    spread /= np.sqrt(len(levels))
    excess = new - means.max(axis=0)
    for number in (1, 3, 10):
        yield f"gene_excess_{number}", _mean_of_highest(excess, number)
    for number in (3, 10):
        yield f"standardised_excess_{number}", _mean_of_highest((new - means[predicted]) / (spread + 0.4), number)
    yield "missing_genes_3", _mean_of_highest((means[predicted] - new) / (spread + 0.2), 3)
    second = np.sort(means, axis=0)[-2]
    markers = np.argsort(second - means, axis=1)[:, :10]
    yield "markers_10", -np.take_along_axis(new, markers[predicted], axis=1).mean(axis=1).astype(np.float64)
    telling = np.argsort(-means.var(axis=0) / (spread**2 + 0.01))[:500]
    yield "correlation_500_genes", -_correlations(new[:, telling], means[:, telling]).max(axis=1)


def _mean_of_highest(values: npt.NDArray[np.float32], number: int) -> FloatArray:
    return np.partition(values, -number, axis=1)[:, -number:].mean(axis=1).astype(np.float64)


def _correlations(cells: npt.NDArray[np.float32], centers: npt.NDArray[np.float32]) -> FloatArray:
    parts: list[FloatArray] = []
    for values in (cells, centers):
        centered = values - values.mean(axis=1, keepdims=True)
        parts.append(centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-9))
    return parts[0] @ parts[1].T
