"""Logistic regression on principal components of cells, as weights of genes: fewer ways to fit what one donor has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    """

    labels: tuple[str, ...]
    weights: FloatArray
    biases: FloatArray
    chosen: str
    search: Mapping[str, float]


class _Fit(NamedTuple):
    """Weights and biases of some classes, and the setting they were fitted with."""

    setting: str
    class_ids: Int64Array
    weights: FloatArray
    biases: FloatArray

    def predict(self, features: sparse.csr_array) -> Int64Array:
        return self.class_ids[(features @ self.weights.T + self.biases).argmax(axis=1)]


def fit_component_regression(
    features: sparse.csr_array,
    cell_labels: Sequence[str] | npt.NDArray[np.str_],
    *,
    groups: Sequence[str] | npt.NDArray[np.str_] | None = None,
    num_components: Sequence[int] = NUM_COMPONENTS,
    inverse_strengths: Sequence[float] = INVERSE_STRENGTHS,
    seed: int = 0,
) -> ComponentRegression:
    """Return a regression on the first components of a singular value decomposition of `features`, not centred.

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
    seed
        Fixes the decomposition and the folds of cells.

    Raises
    ------
    ValueError
        There are fewer than two labels, or three cells or genes.
    """
    seen, class_ids = np.unique(np.asarray(cell_labels, dtype=np.str_), return_inverse=True)
    if len(seen) < 2 or min(features.shape) < 3:
        raise ValueError(
            f"cell_labels has {len(seen)} labels, features have shape {features.shape}; at least two labels, and three "
            "cells and genes, are needed"
        )
    folds = inner_folds(class_ids, groups, seed)
    fewest = min(int((folds != fold).sum()) for fold in np.unique(folds))
    most = max(1, min(fewest, features.shape[1]) - 1)
    num_components = sorted({min(number, most) for number in num_components})
    predicted: dict[str, Int64Array] = {}
    for fold in np.unique(folds):
        kept = folds != fold
        for fit in _fits(features[kept], class_ids[kept], num_components, inverse_strengths, seed):
            guesses = predicted.setdefault(fit.setting, np.full(len(class_ids), -1))
            guesses[~kept] = fit.predict(features[~kept])
    search = {
        setting: float(f1_score(class_ids, guesses, average="macro", zero_division=0))
        for setting, guesses in predicted.items()
    }
    # On equal scores max() takes the first: few components and a strong penalty.
    final = {fit.setting: fit for fit in _fits(features, class_ids, num_components, inverse_strengths, seed)}
    chosen = final[max(search, key=search.__getitem__)]
    return ComponentRegression(tuple(seen.tolist()), chosen.weights, chosen.biases, chosen.setting, search)


def _fits(
    features: sparse.csr_array,
    class_ids: Int64Array,
    num_components: Sequence[int],
    inverse_strengths: Sequence[float],
    seed: int,
) -> Iterator[_Fit]:
    """Yield a fit for each setting, from few components and a strong penalty to many and a weak one."""
    decomposition = TruncatedSVD(num_components[-1], random_state=seed).fit(features)
    components = features @ decomposition.components_.T
    center, spread = components.mean(axis=0), components.std(axis=0)
    scale = np.where(spread > 1e-9, 1 / np.maximum(spread, 1e-9), 0.0)
    present = np.unique(class_ids)
    for number in num_components:
        scaled = (components[:, :number] - center[:number]) * scale[:number]
        for strength in sorted(inverse_strengths):
            setting = f"{number} components, C={strength:g}"
            if len(present) == 1:  # a group may have cells of one label only
                yield _Fit(setting, present, np.zeros((1, features.shape[1])), np.zeros(1))
                continue
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=MAX_ITERATIONS)
            model.fit(scaled, class_ids)
            weights, biases = model.coef_ * scale[:number], model.intercept_
            if len(present) == 2:  # scikit-learn keeps the second class's logit alone
                weights, biases = np.vstack([0 * weights, weights]), np.array([0.0, biases[0]])
            biases = biases - weights @ center[:number]
            yield _Fit(setting, present, weights @ decomposition.components_[:number], biases)
