"""What each gene of a cell adds to a class's score, beside the cells of a background.

All methods give one value a gene, summed over the dimensions of its embedding, and all are estimates of what adds up:
the values of a cell sum to its score less the mean score of the background at the cell's genes.

- ``"expected_gradients"`` (Erion et al. 2021, Nat Mach Intell 3:620) is what `shap`'s GradientExplainer estimates:
  gradients between the cell and random cells of the background, times their difference. Ours takes points that are
  spread evenly, no background cell twice, and replaces what the drawn cells differ by from the whole background (a
  control variate, see `NearbyModel`; with it a model of linear logits is explained exactly by any number of points).
  Where the points leave it uncertain what the values sum to, forward passes on the background tell (`effect_of`).
- ``"shap"``: GradientExplainer itself, the reference.
- ``"integrated_gradients"`` (Sundararajan et al. 2017): from the mean embedding of the background, by Gauss and
  Legendre's rule. Its baseline is no cell, and the values sum to the difference from the score of that.
- ``"deep"``: `shap`'s DeepExplainer, the paper's, on a copy without reversible layers. It does not know layer
  normalisation, GELU and attention, takes their plain gradients, and its values do not add up; it is there to be
  compared with.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from screformer.annotation.background_effect import effect_of, made_to_sum, standard_error
from screformer.annotation.explained_score import Bins, ExplainedCell
from screformer.annotation.nearby_model import NearbyModel, at_levels
from screformer.modeling_screformer import ScReformerForCellClassification

FloatArray = npt.NDArray[np.float64]
Method = Literal["expected_gradients", "shap", "integrated_gradients", "deep"]
METHODS: tuple[Method, ...] = ("expected_gradients", "shap", "integrated_gradients", "deep")
SHAP_METHODS: tuple[Method, ...] = ("shap", "deep")
SHAP_BACKGROUND_BYTES = 1e9  # GradientExplainer wants the embeddings of its whole background at once
SHAP_REMEDY = 'pip install "screformer[explain]"'


class Sampling(NamedTuple):
    """How a cell's values are estimated.

    Attributes
    ----------
    method
        One of `METHODS`.
    num_points
        Points at which gradients are taken; cells of the background for ``"deep"``.
    seed
        Of points and cells that are drawn.
    max_sum_error
        Standard error that the sum of a cell's expected gradients may have, as a share of the sum. Where points do not
        give it, forward passes on cells of the background do, of all of them at most; None: as the points give it.
    """

    method: Method = "expected_gradients"
    num_points: int = 16
    seed: int = 0
    max_sum_error: float | None = 0.01


def attribute(cell: ExplainedCell, background: Bins, sampling: Sampling, *, number: int = 0) -> FloatArray:
    """Return the value of each of the cell's tokens, (L,).

    Parameters
    ----------
    cell
        What to explain.
    background
        (cells, num_genes): bins of other cells.
    sampling
        How.
    number
        Of the cell, so that each has its own draws.

    Raises
    ------
    ImportError
        `shap` is missing.
    """
    there = background[:, cell.positions]
    generator = np.random.default_rng([sampling.seed, number])
    return _METHODS[sampling.method](cell, there, sampling, generator)


def check_sampling(sampling: Sampling, num_background: int) -> None:
    """Raise ValueError for what cannot be."""
    if sampling.method not in METHODS:
        raise ValueError(f"method got {sampling.method!r}; allowed are {', '.join(METHODS)}")
    if sampling.num_points < 1:
        raise ValueError(f"points got {sampling.num_points}; at least 1 is needed, 16 are usual")
    if sampling.max_sum_error is not None and not 0 <= sampling.max_sum_error < 1:
        raise ValueError(
            f"sum error got {sampling.max_sum_error}; it is a share of the sum from 0, which takes a forward pass a "
            "background cell, to below 1; 0.01 is usual"
        )
    if num_background < 1:
        raise ValueError("the background has no cells; give some, 500 are usual")


def _expected_gradients(
    cell: ExplainedCell, there: Bins, sampling: Sampling, generator: np.random.Generator
) -> FloatArray:
    num_points = sampling.num_points
    rounds = -(-num_points // len(there))
    drawn = np.concatenate([generator.permutation(len(there)) for _ in range(rounds)])[:num_points]
    starts = there[drawn]
    shares = (generator.permutation(num_points) + generator.random(num_points)) / num_points
    end = cell.table[torch.from_numpy(cell.levels.astype(np.int64)).to(cell.table.device)]

    def points(chosen: slice | npt.NDArray[np.int64]) -> Tensor:
        start = cell.table[torch.from_numpy(starts[chosen].astype(np.int64)).to(cell.table.device)]
        share = torch.from_numpy(shares[chosen]).to(cell.table)[:, None, None]
        return start + share * (end - start)

    mean, at_points = np.zeros((len(cell.levels), cell.num_bins)), np.zeros((num_points, len(cell.levels)))
    for rows, gradients in cell.gradients(points, num_points):
        mean += gradients.sum(axis=0) / num_points
        for row, gradient in zip(range(rows.start, rows.stop), gradients, strict=True):
            at_points[row] = at_levels(gradient, cell.levels) - at_levels(gradient, starts[row])
    nearby = NearbyModel.of(cell, there, mean, points, shares)
    # Exact for the model nearby, and what the points say of the difference of the two.
    differences = at_points - nearby.values_at(drawn, shares)
    values = nearby.values() + differences.mean(axis=0)
    most = sampling.max_sum_error
    if most is None or standard_error(differences.sum(axis=1)) <= most * abs(values.sum()):
        return values
    effect = effect_of(cell, there, nearby.scores(), most, generator)
    return made_to_sum(values, effect, differences.var(axis=0))


def _integrated_gradients(
    cell: ExplainedCell, there: Bins, sampling: Sampling, generator: np.random.Generator
) -> FloatArray:
    del generator  # nothing is drawn
    shares, weights = np.polynomial.legendre.leggauss(sampling.num_points)
    shares, weights = (shares + 1) / 2, weights / 2
    end = cell.table[torch.from_numpy(cell.levels.astype(np.int64)).to(cell.table.device)]
    start = mean_embedding(cell, there)

    def points(rows: slice) -> Tensor:
        share = torch.from_numpy(shares[rows]).to(cell.table)[:, None, None]
        return start + share * (end - start)

    mean = np.zeros((len(cell.levels), cell.num_bins))
    for rows, gradients in cell.gradients(points, sampling.num_points):
        mean += np.tensordot(weights[rows], gradients, axes=1)
    return at_levels(mean, cell.levels) - (mean * bin_shares(there, cell.num_bins)).sum(axis=1)


def mean_embedding(cell: ExplainedCell, there: Bins) -> Tensor:
    """Return the background's mean embedding at the cell's tokens, (L, hidden)."""
    return torch.from_numpy(bin_shares(there, cell.num_bins)).to(cell.table) @ cell.table


def bin_shares(bins: Bins, num_bins: int) -> FloatArray:
    """Return the share of cells (cells, L) that have each bin, (L, num_bins)."""
    return np.stack([(bins == level).mean(axis=0) for level in range(num_bins)], axis=1)


def _shap_gradients(cell: ExplainedCell, there: Bins, sampling: Sampling, generator: np.random.Generator) -> FloatArray:
    explainer = _import_shap().GradientExplainer(_Scores(cell), _some_embeddings(cell, there, generator))
    before = np.random.get_state()  # noqa: NPY002
    try:
        given = explainer.shap_values(
            _own_embedding(cell), nsamples=sampling.num_points, rseed=int(generator.integers(2**31))
        )
    finally:
        np.random.set_state(before)  # noqa: NPY002 - which it has set for everybody
    return _per_gene(given)


def _deep(cell: ExplainedCell, there: Bins, sampling: Sampling, generator: np.random.Generator) -> FloatArray:
    scores = _Scores(_plain_copy(cell))
    drawn = there[generator.choice(len(there), min(sampling.num_points, len(there)), replace=False)]
    start = _some_embeddings(cell, drawn, generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unrecognized nn.Module")
        given = _import_shap().DeepExplainer(scores, start).shap_values(_own_embedding(cell), check_additivity=False)
    return _per_gene(given)


class _Gelu(nn.GELU):
    """One that DeepExplainer does not know, for its plain gradient: it would be called for several blocks of tokens."""


def _plain_copy(cell: ExplainedCell) -> ExplainedCell:
    """Return the same function on a copy of the model that stores activations; hooks of DeepExplainer stay on it."""
    other = copy.copy(cell)
    other.model = copy.deepcopy(cell.model)
    other.model.config.reversible = False
    for module in other.model.modules():
        if type(module) is nn.GELU:
            module.__class__ = _Gelu
    return other


class _Scores(nn.Module):
    """A cell's score as `shap` wants it: a module from embeddings (K, L, hidden) to (K, 1)."""

    def __init__(self, cell: ExplainedCell) -> None:
        super().__init__()
        self.model: ScReformerForCellClassification = cell.model
        self.cell = cell

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.cell.at_embeddings(embeddings)[:, None]


def _own_embedding(cell: ExplainedCell) -> Tensor:
    return cell.table[torch.from_numpy(cell.levels.astype(np.int64)).to(cell.table.device)][None]


def _some_embeddings(cell: ExplainedCell, there: Bins, generator: np.random.Generator) -> Tensor:
    """Return embeddings (cells, L, hidden) of the background, of as many cells as a gigabyte holds."""
    most = max(1, int(SHAP_BACKGROUND_BYTES // (4 * there.shape[1] * cell.table.shape[1])))
    chosen = there if len(there) <= most else there[generator.choice(len(there), most, replace=False)]
    return cell.table[torch.from_numpy(chosen.astype(np.int64)).to(cell.table.device)]


def _per_gene(values: Any) -> FloatArray:  # Any: an array, or a list of one for each output
    array = np.asarray(values[0] if isinstance(values, list) else values, dtype=np.float64)
    return array.reshape(1, array.shape[1], -1)[0].sum(axis=1)


def _import_shap() -> Any:  # Any: the library has no types
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of matplotlib and numpy, on import
            import shap
    except ImportError as error:
        raise ImportError(f"methods 'shap' and 'deep' need the package shap: {SHAP_REMEDY}") from error
    return shap


_METHODS: dict[str, Callable[[ExplainedCell, Bins, Sampling, np.random.Generator], FloatArray]] = {
    "expected_gradients": _expected_gradients,
    "shap": _shap_gradients,
    "integrated_gradients": _integrated_gradients,
    "deep": _deep,
}
