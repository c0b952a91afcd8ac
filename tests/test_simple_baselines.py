from typing import NamedTuple

import numpy as np
import pytest
from scipy import sparse

from screformer.benchmarks.simple_baselines import (
    INVERSE_STRENGTHS,
    _cell_folds,
    _group_folds,
    _pareto_scaling,
    log1p_cp10k,
    logistic_regression,
    majority_class,
    simple_baselines,
)

LABELS = ["alpha", "beta", "delta"]
NUM_GENES = 40


class Parts(NamedTuple):
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Cells(NamedTuple):
    counts: sparse.csr_array
    labels: list[str]
    donors: list[str]
    split: Parts


@pytest.fixture(scope="module")
def cells() -> Cells:
    """120 cells of four donors; each label has five genes of its own, on a donor-dependent background."""
    generator = np.random.default_rng(7)
    labels = generator.choice(LABELS, size=120, p=[0.6, 0.3, 0.1])
    donors = np.array(["d1", "d2", "d3", "d4"])[np.arange(120) % 4]
    rates = np.ones((120, NUM_GENES))
    for index, label in enumerate(LABELS):
        rates[np.ix_(labels == label, np.arange(index * 5, index * 5 + 5))] = 6
    for index in range(4):
        rates[donors == f"d{index + 1}", 20 + index] = 8
    split = Parts(
        np.flatnonzero(np.isin(donors, ["d1", "d2"])), np.flatnonzero(donors == "d3"), np.flatnonzero(donors == "d4")
    )
    return Cells(sparse.csr_array(generator.poisson(rates)), labels.tolist(), donors.tolist(), split)


def accuracy(predicted: list[str], truth: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(predicted, truth, strict=True)]))


def test_features_equal_a_gene_by_gene_computation() -> None:
    counts = np.array([[3, 0, 5, 2], [0, 7, 1, 0]])
    positions = [4, -1, 2, 4]  # two columns of gene 4, one of gene 2, one outside the vocabulary
    expected = np.array(
        [
            [np.log1p(5 * 10_000 / 10), np.log1p(5 * 10_000 / 10)],
            [np.log1p(1 * 10_000 / 8), 0],
        ]
    )
    features = log1p_cp10k(sparse.csr_array(counts), gene_positions=positions)
    np.testing.assert_allclose(features.toarray(), expected, rtol=1e-12)


def test_features_do_not_depend_on_sequencing_depth_and_leave_the_counts_alone() -> None:
    counts = sparse.csr_array(np.array([[3, 0, 5, 2], [0, 7, 1, 0]]))
    before = counts.copy()
    np.testing.assert_allclose(log1p_cp10k(counts * 3).toarray(), log1p_cp10k(counts).toarray(), rtol=1e-12)
    assert (counts != before).nnz == 0


def test_pareto_scaling_leaves_genes_with_the_square_root_of_their_deviation(cells: Cells) -> None:
    features = log1p_cp10k(cells.counts)
    scaled = (features @ _pareto_scaling(features)).toarray()
    np.testing.assert_allclose(scaled.std(axis=0), np.sqrt(features.toarray().std(axis=0)), rtol=1e-9)


def test_a_constant_gene_is_switched_off() -> None:
    assert _pareto_scaling(sparse.csr_array(np.full((5, 1), 0.1))).toarray() == [[0]]


def test_majority_class_predicts_the_commonest_training_label() -> None:
    result = majority_class(["beta", "alpha", "beta", "beta"], 2, labels=LABELS)
    assert result.predictions == ["beta", "beta"]
    np.testing.assert_array_equal(result.probabilities, [[0.25, 0.75, 0]] * 2)


def test_both_baselines_come_from_the_given_split_and_regression_wins(cells: Cells) -> None:
    results = simple_baselines(cells.counts, cells.labels, cells.split, labels=LABELS, groups=cells.donors)
    truth = [cells.labels[row] for row in cells.split.test]
    assert list(results) == ["majority_class", "logistic_regression"]
    for result in results.values():
        assert result.probabilities.shape == (len(truth), 3)
        np.testing.assert_allclose(result.probabilities.sum(axis=1), 1, rtol=1e-9)
    assert accuracy(results["majority_class"].predictions, truth) == truth.count("alpha") / len(truth)
    assert accuracy(results["logistic_regression"].predictions, truth) > 0.9
    assert results["logistic_regression"].inverse_strength in INVERSE_STRENGTHS
    assert list(results["logistic_regression"].search) == list(INVERSE_STRENGTHS)
    assert results["logistic_regression"].seconds > 0


def test_validation_cells_and_test_labels_change_nothing(cells: Cells) -> None:
    first = simple_baselines(cells.counts, cells.labels, cells.split, labels=LABELS)["logistic_regression"]
    scrambled = list(cells.labels)
    for row in np.concatenate([cells.split.validation, cells.split.test]):
        scrambled[row] = "delta"
    counts = cells.counts.toarray()
    counts[cells.split.validation] = 1
    second = simple_baselines(sparse.csr_array(counts), scrambled, cells.split, labels=LABELS)["logistic_regression"]
    np.testing.assert_array_equal(second.probabilities, first.probabilities)
    assert second.search == first.search


def test_columns_follow_the_label_list_and_unseen_labels_get_zero(cells: Cells) -> None:
    features = log1p_cp10k(cells.counts)
    wanted = ["unseen", "delta", "beta", "alpha"]
    plain = logistic_regression(features, cells.labels, features, labels=LABELS)
    reordered = logistic_regression(features, cells.labels, features, labels=wanted)
    assert not reordered.probabilities[:, 0].any()
    np.testing.assert_array_equal(reordered.probabilities[:, [3, 2, 1]], plain.probabilities)
    assert reordered.predictions == plain.predictions


def test_the_same_seed_gives_the_same_result(cells: Cells) -> None:
    features = log1p_cp10k(cells.counts)
    first, second = (logistic_regression(features, cells.labels, features, labels=LABELS, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.probabilities, second.probabilities)
    assert first.search == second.search


def test_one_value_of_c_needs_no_search(cells: Cells) -> None:
    features = log1p_cp10k(cells.counts)
    result = logistic_regression(features, cells.labels, features, labels=LABELS, inverse_strengths=[0.5])
    assert result.inverse_strength == 0.5
    assert result.search == {}


def test_two_labels_are_enough(cells: Cells) -> None:
    rows = [index for index, label in enumerate(cells.labels) if label != "delta"]
    features = log1p_cp10k(cells.counts[rows])
    names = [cells.labels[row] for row in rows]
    result = logistic_regression(features, names, features, labels=["alpha", "beta"])
    assert accuracy(result.predictions, names) > 0.95


def test_a_label_of_one_cell_and_one_group_do_not_stop_the_search(cells: Cells) -> None:
    features = log1p_cp10k(cells.counts[:12])
    names = ["alpha"] * 6 + ["beta"] * 5 + ["delta"]
    result = logistic_regression(features, names, features, labels=LABELS, train_groups=["d1"] * 12)
    assert accuracy(result.predictions, names) == 1


def test_a_fold_whose_training_part_has_one_label_is_scored(cells: Cells) -> None:
    features = log1p_cp10k(cells.counts[:4])
    groups = ["d1", "d1", "d2", "d2"]
    result = logistic_regression(
        features, ["alpha", "alpha", "beta", "beta"], features, labels=LABELS, train_groups=groups
    )
    assert set(result.search.values()) == {0.0}  # each fold can only predict the label that is wrong in the other
    assert result.inverse_strength == min(INVERSE_STRENGTHS)  # a tie goes to the strongest penalty


def test_group_folds_never_divide_a_group_and_have_similar_sizes() -> None:
    groups = np.repeat([f"d{index}" for index in range(8)], [9, 1, 8, 2, 7, 3, 6, 4])
    folds = _group_folds(groups)
    assert folds is not None
    assert all(len(set(folds[groups == group])) == 1 for group in set(groups))
    assert sorted(np.bincount(folds).tolist()) == [7, 8, 8, 8, 9]
    assert _group_folds(["only", "only"]) is None


def test_cell_folds_deal_each_label_evenly() -> None:
    class_ids = np.repeat([0, 1, 2], [30, 6, 1])
    folds = _cell_folds(class_ids, seed=0)
    assert [np.bincount(folds[class_ids == label], minlength=3).tolist() for label in (0, 1)] == [[10] * 3, [2] * 3]


@pytest.mark.parametrize(
    ("counts", "positions", "message"),
    [
        ([[1.5, 2]], None, "counts must be raw counts"),
        ([[-1, 2]], None, "counts must be raw counts"),
        ([[np.nan, 2]], None, "counts must be raw counts"),
        ([[0, 0]], None, "1 cells without a count"),
        ([[1, 2]], [0], "one entry a column: 2 columns"),
        ([[1, 2]], [-1, -1], "maps no column"),
    ],
)
def test_wrong_counts_or_positions_are_refused(counts: list, positions: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log1p_cp10k(sparse.csr_array(np.array(counts)), gene_positions=positions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["alpha", "alpha"]}, "labels must be distinct"),
        ({"labels": ["alpha"]}, "labels lacks"),
        ({"train_labels": []}, "at least one cell"),
        ({"train_labels": ["alpha", "beta"]}, "train_labels must have one entry"),
        ({"train_labels": ["alpha"] * 6}, "at least two labels"),
        ({"train_groups": ["d1"]}, "train_groups must have one entry"),
        ({"test_features": sparse.csr_array((1, 2))}, "the same genes"),
        ({"inverse_strengths": []}, "inverse_strengths"),
        ({"inverse_strengths": [0, 1]}, "inverse_strengths"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(cells: Cells, changes: dict, message: str) -> None:
    features = log1p_cp10k(cells.counts[:6])
    arguments = {"train_labels": ["alpha", "beta"] * 3, "test_features": features, "labels": LABELS} | changes
    with pytest.raises(ValueError, match=message):
        logistic_regression(features, arguments.pop("train_labels"), arguments.pop("test_features"), **arguments)


@pytest.mark.parametrize("name", ["cell_labels", "groups"])
def test_lists_of_another_length_than_the_cells_are_refused(cells: Cells, name: str) -> None:
    arguments = {"cell_labels": cells.labels, "groups": cells.donors} | {name: ["alpha"]}
    with pytest.raises(ValueError, match=f"{name} must have one entry a cell: 120"):
        simple_baselines(cells.counts, arguments["cell_labels"], cells.split, labels=LABELS, groups=arguments["groups"])
