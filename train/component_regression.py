"""Logistic regression on principal components of cells, or sums of gene vectors, as weights of genes.

A few dimensions leave fewer ways to fit what only one donor has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from screformer.benchmarks.simple_baselines import inner_folds

NUM_COMPONENTS = (16, 32, 64)
INVERSE_STRENGTHS = (0.01, 0.1, 1.0)
MAX_ITERATIONS = 2_000
ABSENT = -1e3  # logit of a class that a fold's cells lack

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


class ComponentRegression(NamedTuple):
    """A fitted regression: logits are ``features @ weights.T + biases``.

    Attributes
    ----------
    labels
        Class names, ascending.
    weights, biases
        (labels, genes) and (labels,).
    chosen
        Number of components and C, as text.
    search
        The same of every setting tried -> macro-F1 of the inner cross-validation.
    held_out
        (cells, labels), logits of the chosen setting for each cell by a regression of the other folds; NaN for a cell
        whose label they lack. None where it is not known.
    """

    labels: tuple[str, ...]
    weights: FloatArray
    biases: FloatArray
    chosen: str
    search: Mapping[str, float]
    held_out: npt.NDArray[np.float32] | None = None


class _Fit(NamedTuple):
    """Weights and biases of some classes, and the setting they were fitted with."""

    setting: str
    class_ids: Int64Array
    weights: FloatArray
    biases: FloatArray

    def logits(self, features: sparse.csr_array, num_classes: int) -> npt.NDArray[np.float32]:
        found = np.full((features.shape[0], num_classes), ABSENT, dtype=np.float32)
        found[:, self.class_ids] = features @ self.weights.T + self.biases
        return found


def fit_component_regression(
    features: sparse.csr_array,
    cell_labels: Sequence[str] | npt.NDArray[np.str_],
    *,
    groups: Sequence[str] | npt.NDArray[np.str_] | None = None,
    num_components: Sequence[int] = NUM_COMPONENTS,
    inverse_strengths: Sequence[float] = INVERSE_STRENGTHS,
    gene_vectors: FloatArray | None = None,
    seed: int = 0,
) -> ComponentRegression:
    """Return a regression on the first components of a singular value decomposition of `features`, not centred.

    With `gene_vectors` it is a regression on each cell's sum of its genes' vectors, weighed by the features, instead.

    Components are scaled to equal spread and classes weigh the same. How many components and how strong a penalty is
    chosen by macro-F1 over the held-out predictions of an inner cross-validation, over groups if there are two.

    Parameters
    ----------
    features
        (cells, genes).
    cell_labels, groups
        Of each cell; groups are donors or data sets.
    num_components, inverse_strengths
        What is tried; numbers that the cells of an inner fold are too few for are replaced by the most there can be.
    gene_vectors
        (genes, dimensions), learned from other cells, in place of components of these; all dimensions are used.
    seed
        Fixes the decomposition and the folds of cells.

    Raises
    ------
    ValueError
        There are fewer than two labels, or three cells or genes; or the vectors are of another number of genes.
    """
    seen, class_ids = np.unique(np.asarray(cell_labels, dtype=np.str_), return_inverse=True)
    if len(seen) < 2 or min(features.shape) < 3:
        raise ValueError(
            f"cell_labels has {len(seen)} labels, features have shape {features.shape}; at least two labels, and three "
            "cells and genes, are needed"
        )
    if gene_vectors is not None and len(gene_vectors) != features.shape[1]:
        raise ValueError(f"gene_vectors has shape {gene_vectors.shape}, but features are of {features.shape[1]} genes")
    folds = inner_folds(class_ids, groups, seed)
    fewest = min(int((folds != fold).sum()) for fold in np.unique(folds))
    most = max(1, min(fewest, features.shape[1]) - 1)
    num_components = sorted({min(number, most) for number in num_components})

    def projections(cells: sparse.csr_array) -> Iterator[Projection]:
        if gene_vectors is None:
            return component_projections(cells, num_components, seed)
        return iter([_project("gene vectors", cells, gene_vectors)])

    held_out: dict[str, npt.NDArray[np.float32]] = {}
    is_seen = np.ones(len(class_ids), dtype=bool)
    for fold in np.unique(folds):
        kept = folds != fold
        is_seen[~kept] = np.isin(class_ids[~kept], class_ids[kept])
        for fit in _fits(projections(features[kept]), class_ids[kept], inverse_strengths):
            logits = held_out.setdefault(fit.setting, np.full((len(class_ids), len(seen)), ABSENT, dtype=np.float32))
            logits[~kept] = fit.logits(features[~kept], len(seen))
    search = {
        setting: float(f1_score(class_ids, logits.argmax(axis=1), average="macro", zero_division=0))
        for setting, logits in held_out.items()
    }
    # On equal scores max() takes the first: few components and a strong penalty.
    final = {fit.setting: fit for fit in _fits(projections(features), class_ids, inverse_strengths)}
    chosen = final[max(search, key=search.__getitem__)]
    logits = np.where(is_seen[:, None], held_out[chosen.setting], np.float32(np.nan))
    return ComponentRegression(tuple(seen.tolist()), chosen.weights, chosen.biases, chosen.setting, search, logits)


class Projection(NamedTuple):
    """Cells in few dimensions, and the genes' weights (genes, dimensions) and center that lead there."""

    name: str
    cells: FloatArray
    gene_weights: FloatArray
    center: FloatArray


def component_projections(features: sparse.csr_array, num_components: Sequence[int], seed: int) -> Iterator[Projection]:
    """Yield cells on so many first components each, not centred before the decomposition; scaled to equal spread after.

    Parameters
    ----------
    features
        (cells, genes).
    num_components
        Ascending, below the number of cells and of genes.
    seed
        Fixes the decomposition.
    """
    with np.errstate(invalid="ignore"):  # a single cell varies by nothing, and scikit-learn divides by it
        decomposition = TruncatedSVD(num_components[-1], random_state=seed).fit(features)
    widest = _project("", features, decomposition.components_.T)
    for number in num_components:
        parts = widest.cells[:, :number], widest.gene_weights[:, :number], widest.center[:number]
        yield Projection(f"{number} components", *parts)


def _project(name: str, features: sparse.csr_array, gene_vectors: FloatArray) -> Projection:
    """Return the sums of gene vectors, centred and scaled to equal spread; what does not vary is 0."""
    sums = features @ gene_vectors
    center, spread = sums.mean(axis=0), sums.std(axis=0)
    scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0.0)
    return Projection(name, (sums - center) * scale, gene_vectors * scale, center * scale)


def _fits(
    projections: Iterable[Projection], class_ids: Int64Array, inverse_strengths: Sequence[float]
) -> Iterator[_Fit]:
    """Yield a fit for each setting, from few components and a strong penalty to many and a weak one."""
    present = np.unique(class_ids)
    for projection in projections:
        for strength in sorted(inverse_strengths):
            setting = f"{projection.name}, C={strength:g}"
            if len(present) == 1:  # a group may have cells of one label only
                yield _Fit(setting, present, np.zeros((1, len(projection.gene_weights))), np.zeros(1))
                continue
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=MAX_ITERATIONS)
            model.fit(projection.cells, class_ids)
            weights, biases = model.coef_, model.intercept_
            if len(present) == 2:  # scikit-learn keeps the second class's logit alone
                weights, biases = np.vstack([0 * weights, weights]), np.array([0.0, biases[0]])
            biases = biases - weights @ projection.center
            yield _Fit(setting, present, weights @ projection.gene_weights.T, biases)
