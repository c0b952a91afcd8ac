import logging

import numpy as np
import pytest

from screformer.train.splits import cross_validation_folds, hold_out, split_by_group, split_cells

COUNTS = {"beta": 300, "alpha": 151, "ductal": 47, "mast": 5, "epsilon": 3}
GROUPS = ["human1", "human2", "human3", "human4"]


def make_labels(counts=COUNTS, seed=0):
    labels = np.repeat(list(counts), list(counts.values()))
    return np.random.default_rng(seed).permutation(labels).tolist()


def make_groups(num_cells, seed=1):
    return np.random.default_rng(seed).choice(GROUPS, num_cells).tolist()


def assert_disjoint_and_complete(split, num_cells):
    together = np.concatenate(split)
    assert len(together) == num_cells
    assert (np.sort(together) == np.arange(num_cells)).all()
    for part in split:
        assert (np.diff(part) > 0).all()


def counts_of(labels, rows):
    return {label: int((np.asarray(labels)[rows] == label).sum()) for label in set(labels)}


def test_split_is_disjoint_complete_and_stratified_60_20_20():
    labels = make_labels()
    split = split_cells(labels)
    assert_disjoint_and_complete(split, len(labels))
    for part, fraction in zip(split, (0.6, 0.2, 0.2), strict=True):
        for label, count in counts_of(labels, part).items():
            assert abs(count - fraction * COUNTS[label]) <= 1


def test_three_cells_are_enough_for_a_label_to_be_in_every_part():
    labels = make_labels()
    for part in split_cells(labels):
        assert all(counts_of(labels, part).values())


def test_labels_too_rare_for_every_part_go_to_training_with_a_warning(caplog):
    labels = make_labels({**COUNTS, "schwann": 2, "t_cell": 1})
    with caplog.at_level(logging.WARNING):
        split = split_cells(labels)
    assert "['schwann', 't_cell']" in caplog.text
    assert counts_of(labels, split.train)["schwann"] == 2
    assert counts_of(labels, split.train)["t_cell"] == 1
    assert_disjoint_and_complete(split, len(labels))


def test_split_depends_on_the_seed_alone():
    labels = make_labels()
    first, again, other = split_cells(labels), split_cells(labels), split_cells(labels, seed=7)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.test, other.test)


def test_a_fraction_of_zero_leaves_the_part_empty():
    labels = make_labels()
    split = split_cells(labels, fractions=(0.8, 0.2, 0.0))
    assert_disjoint_and_complete(split, len(labels))
    assert not len(split.test)
    assert len(split.validation)


@pytest.mark.parametrize("fractions", [(0.5, 0.2, 0.2), (0.0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_refuses_fractions_that_are_no_split(fractions):
    with pytest.raises(ValueError, match="fractions must be three shares"):
        split_cells(make_labels(), fractions=fractions)


def test_refuses_no_cells():
    with pytest.raises(ValueError, match="at least one cell, got none"):
        split_cells([])


def test_a_test_group_never_leaks_into_training_or_validation():
    labels = make_labels()
    groups = np.array(make_groups(len(labels)))
    split = split_by_group(labels, groups, test_groups=["human4"], validation_fraction=0.25)
    assert_disjoint_and_complete(split, len(labels))
    assert set(groups[split.test]) == {"human4"}
    assert "human4" not in set(groups[split.train]) | set(groups[split.validation])
    outside = counts_of(labels, np.flatnonzero(groups != "human4"))
    for label, count in counts_of(labels, split.validation).items():
        assert abs(count - 0.25 * outside[label]) <= 1


def test_validation_can_be_whole_groups():
    labels = make_labels()
    groups = np.array(make_groups(len(labels)))
    split = split_by_group(labels, groups, test_groups=["human4", "human1"], validation_groups=["human2"])
    assert_disjoint_and_complete(split, len(labels))
    assert [set(groups[part]) for part in split] == [{"human3"}, {"human2"}, {"human1", "human4"}]


@pytest.mark.parametrize("options", [{}, {"validation_groups": ["human2"]}])
def test_cells_that_may_be_of_a_test_group_are_in_no_part(options, caplog):
    labels = make_labels()
    groups = np.array(make_groups(len(labels)))
    groups[::5] = ""
    split = split_by_group(labels, groups, test_groups=["human4"], **options)
    together = np.sort(np.concatenate(split))
    np.testing.assert_array_equal(together, np.flatnonzero(groups != ""))
    assert f"{(groups == '').sum()} cells have no group" in caplog.text
    with pytest.raises(ValueError, match=r"no cell is in group \[''\]; groups are \['human1'"):
        split_by_group(labels, groups, test_groups=[""])
    assert len(cross_validation_folds(labels, groups=groups)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_groups": ["human9"]}, r"no cell is in group \['human9'\]; groups are \['human1'"),
        ({"test_groups": []}, "test_groups must name at least one group"),
        ({"test_groups": ["human1"], "validation_groups": ["human1"]}, "is in both test_groups and validation_groups"),
        ({"test_groups": GROUPS}, "leave at least one group for training"),
        ({"test_groups": ["human1"], "validation_fraction": 1.0}, "validation_fraction must be at least 0 and below 1"),
    ],
)
def test_refuses_groups_that_do_not_split(options, message):
    labels = make_labels()
    with pytest.raises(ValueError, match=message):
        split_by_group(labels, make_groups(len(labels)), **options)


def test_refuses_groups_of_another_length():
    with pytest.raises(ValueError, match="one entry a cell, got 506 and 3"):
        split_by_group(make_labels(), ["a", "b", "c"], test_groups=["a"])


def test_folds_test_each_cell_once_with_each_label_spread_evenly():
    labels = make_labels()
    folds = cross_validation_folds(labels, num_folds=5)
    assert len(folds) == 5
    tested = np.concatenate([fold.test for fold in folds])
    assert (np.sort(tested) == np.arange(len(labels))).all()
    for fold in folds:
        assert_disjoint_and_complete(fold, len(labels))
        assert abs(len(fold.test) - len(labels) / 5) <= 1
        for label, count in counts_of(labels, fold.test).items():
            assert abs(count - COUNTS[label] / 5) < 1
        # Every label that is tested can have been learned.
        assert all(counts_of(labels, fold.train).values())


def test_leave_one_group_out_tests_each_group_once():
    labels = make_labels()
    groups = np.array(make_groups(len(labels)))
    folds = cross_validation_folds(labels, groups=groups)
    assert [set(groups[fold.test]) for fold in folds] == [{name} for name in GROUPS]
    for fold, name in zip(folds, GROUPS, strict=True):
        assert_disjoint_and_complete(fold, len(labels))
        assert name not in set(groups[fold.train]) | set(groups[fold.validation])


def test_folds_warn_of_rare_labels_and_refuse_single_cells(caplog):
    with caplog.at_level(logging.WARNING):
        cross_validation_folds(make_labels())
    assert "missing from some folds' test sets: ['epsilon']" in caplog.text
    with pytest.raises(ValueError, match=r"labels \['t_cell'\] have one cell each"):
        cross_validation_folds(make_labels({**COUNTS, "t_cell": 1}))


def test_folds_refuse_too_few_parts():
    with pytest.raises(ValueError, match="num_folds must be at least 2, got 1"):
        cross_validation_folds(make_labels(), num_folds=1)
    with pytest.raises(ValueError, match=r"at least two groups to leave one out, got \['human1'\]"):
        cross_validation_folds(["a", "b"], groups=["human1", "human1"])


def test_hold_out_draws_a_tenth():
    kept, held_out = hold_out(95, fraction=0.1)
    assert len(held_out) == 10
    assert (np.sort(np.concatenate([kept, held_out])) == np.arange(95)).all()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 1.0])
def test_hold_out_refuses_an_empty_side(fraction):
    with pytest.raises(ValueError, match="at least one cell must be held out and one kept"):
        hold_out(95, fraction=fraction)
