import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from screformer import ScReformerConfig
from screformer.annotation.calibration import Calibration, LabelReader, class_probabilities
from screformer.annotation.calibration_fit import (
    calibrate,
    compatible_labels,
    describe_calibration,
    fit_calibration,
    realised_errors,
)
from screformer.annotation.label_tree import LabelTree

TREE = LabelTree({"blood": None, "T": "blood", "B": "blood", "CD4": "T", "CD8": "T", "fat": None})
CLASSES = sorted(TREE.leaves)


def config_of(tree=None, classes=("a", "b", "c"), **fields):
    names = dict(enumerate(sorted(tree.leaves) if tree else classes))
    return ScReformerConfig.preset(
        "tiny",
        num_genes=64,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        label_parents=tree.parents if tree else None,
        **fields,
    )


def drawn_cells(classes, number, *, sharpness, seed=0):
    """Logits whose softmax is true when they are divided by `sharpness`, and labels drawn from it."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(number, len(classes))) * 2
    truth = [generator.choice(classes, p=row) for row in softmax(scores, axis=1)]
    return (scores * sharpness).astype(np.float32), truth


@st.composite
def trees_and_logits(draw):
    number = draw(st.integers(2, 14))
    parents = {"0": None}
    for label in range(1, number):
        above = draw(st.none() | st.integers(0, label - 1))
        parents[str(label)] = None if above is None else str(above)
    tree = LabelTree(parents)
    rows = st.lists(st.floats(-1e4, 1e4, width=32), min_size=len(tree.leaves), max_size=len(tree.leaves))
    logits = np.array(draw(st.lists(rows, min_size=1, max_size=4)), dtype=np.float32)
    temperatures = draw(st.lists(st.floats(0.05, 20), min_size=tree.num_levels, max_size=tree.num_levels))
    return tree, logits, temperatures


@given(trees_and_logits(), st.floats(0.01, 0.99))
def test_whatever_the_temperatures_no_label_is_likelier_than_its_parent_and_answers_are_paths(case, threshold):
    tree, logits, temperatures = case
    config = config_of(tree)
    config.calibration = Calibration(tuple(temperatures), (0.1,), (threshold,)).to_config()
    reader = LabelReader(config, max_error=0.2)
    found = reader(logits)
    assert np.allclose(found.probabilities.sum(axis=1), 1, atol=1e-5)
    order = [reader.class_names.index(leaf) for leaf in tree.leaves]
    by_label = tree.label_probabilities(found.probabilities[:, order])
    for column, label in enumerate(tree.labels):
        if tree.parents[label]:
            assert (by_label[:, column] <= by_label[:, tree.labels.index(tree.parents[label])]).all()
    for cell, path in enumerate(found.level_labels.tolist()):
        names = [tree.labels[index] for index in path]
        end = tree.path(names[-1])
        assert tuple(names[: len(end)]) == end
        assert set(names[len(end) :]) <= {end[-1]}
        assert (np.diff(found.level_probabilities[cell]) <= 0).all()
        depth = int(found.depth[cell])
        assert (found.level_probabilities[cell, :depth] >= threshold).all()
        assert depth == len(end) or found.level_probabilities[cell, depth] < threshold


@given(trees_and_logits())
def test_equal_temperatures_are_one_softmax_over_all_leaves(case):
    tree, logits, temperatures = case
    equal = [temperatures[0]] * tree.num_levels
    found = class_probabilities(tree, sorted(tree.leaves), logits, equal)
    assert np.allclose(found, softmax(logits.astype(float) / temperatures[0], axis=1), atol=1e-9)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_temperature_that_made_the_logits_is_found_again(sharpness):
    classes = ["a", "b", "c", "d"]
    tree = LabelTree(dict.fromkeys(classes))
    logits, truth = drawn_cells(classes, 6000, sharpness=sharpness)
    found = fit_calibration(tree, classes, logits, truth)
    assert found.temperatures[0] == pytest.approx(sharpness, rel=0.08)  # three standard errors of 6,000 cells


def test_every_level_gets_the_temperature_of_its_own_choices():
    """Choices between blood and fat are three times too sure, those below are twice too timid."""
    generator = np.random.default_rng(1)
    number = 8000
    top, below = generator.normal(size=(number, 2)) * 2, generator.normal(size=(number, 3)) * 2
    leaves = ["B", "CD4", "CD8"]
    is_fat = generator.random(number) > softmax(top, axis=1)[:, 0]
    at_two = softmax(below, axis=1)
    labels = ["fat" if fat else generator.choice(leaves, p=row) for fat, row in zip(is_fat, at_two, strict=True)]
    # The log-sum-exp of the leaves of blood must be its own score, as seen at the first level's temperature.
    lower = below * 0.5
    blood = top[:, :1] * 3 + lower - 3 * np.log(np.exp(lower / 3).sum(axis=1, keepdims=True))
    logits = np.concatenate([blood, top[:, 1:] * 3], axis=1)
    tree = LabelTree({"blood": None, "B": "blood", "CD4": "blood", "CD8": "blood", "fat": None})
    found = fit_calibration(tree, [*leaves, "fat"], logits, labels)
    assert found.temperatures == pytest.approx((3, 0.5), rel=0.08)


def test_answers_err_no_oftener_than_asked_on_other_cells_of_the_same_kind():
    classes = ["a", "b", "c"]
    config = config_of(classes=classes)
    logits, truth = drawn_cells(classes, 4000, sharpness=2.0)
    config.calibration = fit_calibration(LabelTree(dict.fromkeys(classes)), classes, logits, truth).to_config()
    others, other_truth = drawn_cells(classes, 4000, sharpness=2.0, seed=1)
    rows = realised_errors(config, others, other_truth)
    assert [row["asked"] for row in rows] == [0.01, 0.02, 0.05, 0.1]
    for row in rows:
        assert 0 < row["answered"] <= 1
        assert row["error"] <= row["asked"] + 0.02
    answered = [row["answered"] for row in rows]
    assert answered == sorted(answered)
    assert answered[-1] > answered[0] + 0.1  # more is answered by who accepts more


def test_cells_whose_label_is_not_known_are_errors_where_they_are_answered():
    config = config_of(classes=("a", "b"), calibration=Calibration((1.0,), (0.01,), (0.6,)).to_config())
    logits = np.array([[9.0, 0.0], [9.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    (row,) = realised_errors(config, logits, ["a", "other", "b"], asked=[0.05])
    assert row == {"asked": 0.05, "threshold": 0.6, "answered": 2 / 3, "answered_in_full": 2 / 3, "error": 0.5}


def test_unsure_cells_back_off_to_the_parent_and_then_to_unknown():
    config = config_of(TREE, calibration=Calibration((1.0,) * 3, (0.05,), (0.8,)).to_config())
    place = {name: CLASSES.index(name) for name in CLASSES}
    logits = np.full((4, len(CLASSES)), -9.0, dtype=np.float32)
    logits[0, place["CD4"]] = 9
    logits[1, [place["CD4"], place["CD8"]]] = 9
    logits[2, [place["CD4"], place["B"]]] = 9
    logits[3, [place["CD4"], place["fat"]]] = 9
    reader = LabelReader(config, max_error=0.05)
    answers = reader(logits).answers()
    names = [reader.tree.labels[index] if index >= 0 else "unknown" for index in answers.tolist()]
    assert names == ["CD4", "T", "blood", "unknown"]
    ends = LabelReader(config)(logits)  # asked for no error rate, it answers each with the end of its path
    assert ends.depth.tolist() == [len(TREE.path(reader.tree.labels[label])) for label in ends.answers().tolist()]
    assert set(ends.answers().tolist()) <= {reader.tree.labels.index(leaf) for leaf in TREE.leaves}


def test_an_answer_is_right_for_the_label_and_what_is_above_or_below_it():
    place = {label: index for index, label in enumerate(TREE.labels)}
    right = compatible_labels(TREE)
    assert right[place["T"], place["CD4"]]
    assert right[place["CD4"], place["T"]]
    assert right[place["fat"], place["fat"]]
    assert not right[place["CD4"], place["CD8"]]
    assert not right[place["B"], place["T"]]


def test_few_cells_vouch_for_little():
    classes = ["a", "b"]
    tree = LabelTree(dict.fromkeys(classes))
    calibration = fit_calibration(tree, classes, np.array([[5.0, -5.0]] * 9), ["a"] * 9)
    assert calibration.threshold(0.1) == 0
    with pytest.raises(ValueError, match=r"max_error=0.05: the validation cells of this checkpoint can vouch for 0.1"):
        calibration.threshold(0.05)


@pytest.mark.parametrize("wrong", [0, 1, -0.1, 5])
def test_error_rates_that_are_no_shares_are_refused(wrong):
    with pytest.raises(ValueError, match="max_error got"):
        LabelReader(config_of(), max_error=wrong)


def test_without_a_calibration_there_is_no_error_rate():
    with pytest.raises(ValueError, match=r"not calibrated.*screformer calibrate"):
        LabelReader(config_of(), max_error=0.05)


def test_a_calibration_of_another_tree_is_refused():
    with pytest.raises(ValueError, match="one for each of 3 levels is needed, got 1"):
        class_probabilities(TREE, CLASSES, np.zeros((1, len(CLASSES))), [1.0])


def test_no_cells_cannot_calibrate():
    with pytest.raises(ValueError, match="needs labelled cells"):
        fit_calibration(TREE, CLASSES, np.zeros((0, len(CLASSES))), [])


def test_cells_without_logits_have_no_answer():
    found = LabelReader(config_of())(np.full((2, 3), np.nan, dtype=np.float32))
    assert np.isnan(found.probabilities).all()
    assert found.depth.tolist() == [0, 0]
    assert found.answers().tolist() == [-1, -1]


def test_calibration_error_falls_and_each_level_counts_the_cells_that_are_known_there():
    logits, truth = drawn_cells(CLASSES, 2000, sharpness=3.0)
    truth[:100] = ["blood"] * 100
    config = config_of(TREE)
    raw = LabelReader(config)
    config.calibration = fit_calibration(TREE, CLASSES, logits, truth).to_config()
    described = describe_calibration(TREE, LabelReader(config)(logits), raw(logits), truth)
    assert [row["num_cells"] for row in described["levels"]] == [2000, 1900, 1900]
    for row in described["levels"]:
        assert row["expected_calibration_error"] < row["before"]
        assert sum(one["num_cells"] for one in row["reliability"]) == row["num_cells"]


def test_calibration_survives_the_checkpoint(tmp_path):
    calibration = Calibration((1.5, 0.7, 1.0), (0.01, 0.05), (0.9, 0.4))
    config_of(TREE, calibration=calibration.to_config()).save_pretrained(tmp_path)
    assert Calibration.from_config(ScReformerConfig.from_pretrained(tmp_path)) == calibration


def test_a_calibration_of_other_classes_is_not_used(tmp_path, caplog):
    logits, truth = drawn_cells(["a", "b"], 200, sharpness=3.0)
    config = config_of(classes=("a", "b"))
    calibrate(config, logits, truth, fitted_to="cells")
    config.save_pretrained(tmp_path)
    assert LabelReader(ScReformerConfig.from_pretrained(tmp_path)).calibration is not None
    assert not caplog.records
    other = ScReformerConfig.from_pretrained(tmp_path, num_labels=3)
    found = LabelReader(other)(np.array([[2.0, 0.0, 0.0]], dtype=np.float32))
    np.testing.assert_allclose(found.probabilities, softmax([[2.0, 0.0, 0.0]], axis=1), rtol=1e-6)
    assert "calibration is of other classes (2) than its own (3), and is not used" in caplog.text
    with pytest.raises(ValueError, match=r"not calibrated.*screformer calibrate"):
        LabelReader(other, max_error=0.05)


def test_the_worst_group_decides_and_small_ones_do_not():
    classes = ["a", "b"]
    tree = LabelTree(dict.fromkeys(classes))
    logits = np.tile([[2.0, -2.0]], (450, 1))
    labels = np.array(["a"] * 450)
    groups = np.array(["good"] * 200 + ["bad"] * 200 + ["small"] * 50)
    labels[200:220] = "b"  # a tenth of the answers in one group
    labels[400:425] = "b"  # half of them in a small one
    alone, by_group = (
        fit_calibration(tree, classes, logits, labels.tolist(), groups=given) for given in (None, groups)
    )
    assert alone.error_rates == (46 / 451,)
    assert by_group.error_rates == (46 / 451,)
    labels[400:425] = "a"
    alone, by_group = (
        fit_calibration(tree, classes, logits, labels.tolist(), groups=given) for given in (None, groups)
    )
    assert alone.error_rates == (21 / 451,)
    assert by_group.error_rates == (0.1,)
