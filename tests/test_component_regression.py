"""Logistic regression on principal components, as weights of genes."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from screformer.train.component_regression import fit_component_regression


def cells(num_types: int = 3, num_cells: int = 90) -> tuple[sparse.csr_array, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    kinds = np.arange(num_cells) % num_types
    rates = np.full((num_cells, 40), 0.3)
    for kind in range(num_types):
        rates[kinds == kind, 4 * kind : 4 * kind + 4] = 3.0
    features = sparse.csr_array(generator.poisson(rates).astype(float) / 5)
    return features, np.array([f"type{kind}" for kind in kinds]), np.array([f"d{at // 30}" for at in range(num_cells)])


@pytest.mark.parametrize("num_types", [2, 3])
def test_the_weights_are_those_of_the_pipeline(num_types: int) -> None:
    features, labels, _ = cells(num_types)
    ours = fit_component_regression(features, labels, num_components=[5], inverse_strengths=[0.1])
    pipeline = make_pipeline(
        TruncatedSVD(5, random_state=0), StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced")
    ).fit(features, labels)
    logits = features @ ours.weights.T + ours.biases
    expected = pipeline.decision_function(features)
    expected = np.column_stack([0 * expected, expected]) if num_types == 2 else expected
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert ours.labels == tuple(sorted(set(labels.tolist())))


def test_settings_are_chosen_by_held_out_groups() -> None:
    features, labels, groups = cells()
    ours = fit_component_regression(features, labels, groups=groups)
    # 90 cells of 40 genes: a third held out, at most 39 components.
    assert set(ours.search) == {f"{n} components, C={c}" for n in (16, 32, 39) for c in ("0.01", "0.1", "1")}
    assert ours.search[ours.chosen] == max(ours.search.values()) > 0.8
    again = fit_component_regression(features, labels, groups=groups)
    np.testing.assert_array_equal(again.weights, ours.weights)


def test_held_out_logits_are_those_of_a_regression_without_the_cells_group() -> None:
    features, labels, groups = cells()
    labels[0] = "only here"
    setting = {"num_components": [5], "inverse_strengths": [0.1]}
    ours = fit_component_regression(features, labels, groups=groups, **setting)
    assert np.isnan(ours.held_out[0]).all()  # the other groups cannot know its label
    for group in np.unique(groups):
        kept = groups != group
        other = fit_component_regression(features[kept], labels[kept], **setting)
        expected = features[~kept] @ other.weights.T + other.biases
        found = ours.held_out[~kept][1:, [ours.labels.index(label) for label in other.labels]]
        np.testing.assert_allclose(found, expected[1:], atol=1e-4)


def test_a_label_that_one_group_alone_has_does_not_stop_it() -> None:
    features, labels, _ = cells(2)
    ours = fit_component_regression(features, labels, groups=labels)
    assert ours.weights.shape == (2, 40)


def test_few_cells_have_as_many_components_in_every_fold_as_in_the_end() -> None:
    features, labels, _ = cells(2, 14)
    ours = fit_component_regression(features, labels, groups=np.where(np.arange(14) < 5, "d1", "d2"))
    assert set(ours.search) == {f"4 components, C={c}" for c in ("0.01", "0.1", "1")}
    assert ours.chosen in ours.search


def test_too_little_is_refused() -> None:
    features, labels, _ = cells()
    with pytest.raises(ValueError, match="has 1 labels"):
        fit_component_regression(features, np.full(90, "a"))
    with pytest.raises(ValueError, match="three cells and genes"):
        fit_component_regression(features[:2], labels[:2])


@pytest.mark.parametrize("num_types", [2, 3])
def test_given_gene_vectors_take_the_place_of_components(num_types: int) -> None:
    features, labels, _ = cells(num_types)
    vectors = np.random.default_rng(1).normal(size=(40, 8))
    ours = fit_component_regression(features, labels, gene_vectors=vectors, inverse_strengths=[0.1])
    sums = features @ vectors
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced")).fit(sums, labels)
    logits = features @ ours.weights.T + ours.biases
    expected = pipeline.decision_function(sums)
    expected = np.column_stack([0 * expected, expected]) if num_types == 2 else expected
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert ours.chosen == "gene vectors, C=0.1"
    # The weights of genes are combinations of the vectors: no more is learned from the labelled cells.
    assert np.linalg.matrix_rank(np.vstack([vectors.T, ours.weights])) == 8


def test_gene_vectors_of_other_genes_are_refused() -> None:
    features, labels, _ = cells()
    with pytest.raises(ValueError, match=r"gene_vectors has shape \(39, 8\), but features are of 40 genes"):
        fit_component_regression(features, labels, gene_vectors=np.zeros((39, 8)))
