"""Cell types as a tree: reading, paths, levels, probabilities that are consistent, predictions that form a path."""

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from screformer.annotation.label_tree import LabelTree, predict_levels, unknown_labels
from screformer.train.tree_metrics import hierarchical_scores, score_levels

IMMUNE = {
    "lymphoid": None, "T cell": "lymphoid", "CD4 T": "T cell", "CD8 T": "T cell", "B cell": "lymphoid",
    "myeloid": "", "monocyte": "myeloid", "fat cell": None,
}  # fmt: skip


@pytest.fixture
def tree():
    return LabelTree(IMMUNE)


def test_paths_and_levels(tree):
    assert tree.path("CD4 T") == ("lymphoid", "T cell", "CD4 T")
    assert [tree.at_level("CD4 T", level) for level in (1, 2, 3, 4)] == ["lymphoid", "T cell", "CD4 T", "CD4 T"]
    assert tree.at_level("fat cell", 3) == "fat cell"
    assert tree.leaves == ("CD4 T", "CD8 T", "B cell", "monocyte", "fat cell")
    assert tree.num_levels == 3
    assert tree.is_within("CD4 T", "lymphoid")
    assert not tree.is_within("lymphoid", "CD4 T")
    assert repr(tree) == "LabelTree(8 labels, 5 leaves, 3 levels)"


def test_every_label_comes_before_what_is_below_it_whatever_the_order_given():
    tree = LabelTree(dict(reversed(IMMUNE.items())))
    for label in tree.labels:
        parent = tree.parents[label]
        assert parent is None or tree.labels.index(parent) < tree.labels.index(label)


def test_restricted_to_some_labels_it_keeps_what_is_above_them(tree):
    small = tree.restrict(["CD8 T", "myeloid"])
    assert small.labels == ("lymphoid", "T cell", "CD8 T", "myeloid")
    assert small.leaves == ("CD8 T", "myeloid")
    assert unknown_labels(tree, ["CD8 T", "x", "a", "x"]) == ["a", "x"]


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ({}, "needs labels"),
        ({"": None}, "each of them a name"),
        ({"a": "b"}, r"parents that are no labels: \['b'\]"),
        ({"a": "b", "b": "a"}, "is above itself: a > b > a"),
        ({"a": "a"}, "'a' is above itself"),
    ],
)
def test_what_is_no_tree_is_refused(parents, message):
    with pytest.raises(ValueError, match=message):
        LabelTree(parents)


def test_unknown_labels_and_levels_are_named(tree):
    with pytest.raises(ValueError, match="'neuron' is not in the tree, which has lymphoid, T cell"):
        tree.path("neuron")
    with pytest.raises(ValueError, match="level got 0; the first is 1"):
        tree.at_level("T cell", 0)


@pytest.mark.parametrize(
    "text",
    [
        "label,parent\nlymphoid,\nT cell,lymphoid\n",
        "child,father\nlymphoid,Cell\nT cell,lymphoid\n",
        "\ufeffcell_type,parent,note\nlymphoid,,x\nT cell , lymphoid,y\n",
    ],
)
def test_tables_are_read(tmp_path, text):
    (tmp_path / "tree.csv").write_text(text, encoding="utf-8")
    (tmp_path / "tree.csv.gz").write_bytes(gzip.compress(text.encode()))
    expected = LabelTree({"lymphoid": None, "T cell": "lymphoid"})
    assert LabelTree.read(tmp_path / "tree.csv") == LabelTree.read(tmp_path / "tree.csv.gz") == expected
    assert hash(LabelTree.read(tmp_path / "tree.csv")) == hash(expected)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("name,parent\na,\n", {}, r"has the columns \['name', 'parent'\]; a header with label"),
        ("label,parent\na,\na,b\nb,\n", {}, "gives 'a' two parents, '' and 'b'; keep one"),
        ("label,parent\na,\n", {"organ": "Heart"}, "has no column organ"),
        ("organ,label,parent\nHeart,a,\n", {"organ": "Lung"}, "organ got 'Lung'; .* has Heart"),
        ("organ,label,parent\nHeart,a,\n", {}, "organ got None"),
        ("label,parent\na,x\nb,y\n", {}, r"parents that are no labels: \['x', 'y'\]"),
    ],
)
def test_tables_that_say_something_else_are_refused(tmp_path, text, options, message):
    (tmp_path / "tree.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        LabelTree.read(tmp_path / "tree.csv", **options)


def test_uhaf_has_the_heart_s_twelve_first_level_types():
    heart = LabelTree.uhaf("heart")
    assert len(heart.labels) == 57
    first = [label for label in heart.labels if heart.parents[label] is None]
    assert len(first) == 12
    assert {"Cardiomyocyte cell", "Pericyte", "Neuroglial cell"} <= set(first)
    assert heart.path("T cell") == ("Lymphoid cell", "T cell")
    assert LabelTree.uhaf("Pancreas").num_levels == 4
    with pytest.raises(ValueError, match=r"organ got 'Tail'; uHAF 2\.2\.0 has Adipose, Adrenal gland"):
        LabelTree.uhaf("Tail")


@st.composite
def trees(draw):
    number = draw(st.integers(1, 12))
    return LabelTree({f"n{at}": draw(st.sampled_from([None, *(f"n{i}" for i in range(at))])) for at in range(number)})


@given(trees(), st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
def test_no_label_is_less_likely_than_one_below_it_and_predictions_form_a_path(tree, seed, dtype):
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=10, size=(6, len(tree.leaves)))
    leaf = np.exp(logits - logits.max(axis=1, keepdims=True))
    leaf = (leaf / leaf.sum(axis=1, keepdims=True)).astype(dtype)
    found = tree.label_probabilities(leaf)
    assert found.dtype == dtype
    for column, label in enumerate(tree.labels):
        of_leaves = leaf[:, [label in tree.path(each) for each in tree.leaves]].sum(axis=1)
        np.testing.assert_allclose(found[:, column], of_leaves, rtol=1e-5, atol=1e-7)
        if tree.parents[label] is not None:
            assert (found[:, column] <= found[:, tree.labels.index(tree.parents[label])]).all()
    predicted = tree.predict_levels(found)
    assert predicted.shape == (6, tree.num_levels)
    for row in predicted:
        labels = [tree.labels[index] for index in row]
        path = tree.path(labels[-1])
        assert labels == [tree.at_level(path[-1], level) for level in range(1, tree.num_levels + 1)]
        assert path[-1] in tree.leaves


def test_the_likeliest_branch_wins_over_the_likeliest_leaf(tree):
    # CD4 T, CD8 T, B cell, monocyte, fat cell
    probabilities = tree.label_probabilities(np.array([[0.2, 0.2, 0.2, 0.4, 0.0]]))
    assert [tree.labels[index] for index in tree.predict_levels(probabilities)[0]] == ["lymphoid", "T cell", "CD4 T"]


def test_leaves_of_another_tree_are_refused(tree):
    with pytest.raises(ValueError, match=r"leaf_probabilities has shape \(2, 4\); it must be \(cells, 5\)"):
        tree.label_probabilities(np.ones((2, 4)))


def test_scores(tree):
    scores = hierarchical_scores(
        tree, ["CD4 T", "T cell", "CD4 T", "fat cell"], ["CD8 T", "CD8 T", "lymphoid", "fat cell"]
    )
    # Shared: 2, 2, 1, 1 of 3 + 2 + 3 + 1 predicted and 3 + 3 + 1 + 1 true.
    assert scores["hierarchical_precision"] == pytest.approx(6 / 9)
    assert scores["hierarchical_recall"] == pytest.approx(6 / 8)
    assert scores["hierarchical_f1"] == pytest.approx(2 * (6 / 9) * (6 / 8) / (6 / 9 + 6 / 8))
    assert scores["subtype_accuracy"] == pytest.approx(2 / 4)  # CD4 T is a lymphoid cell, T cell is above CD8 T
    assert scores["exact_accuracy"] == pytest.approx(1 / 4)
    assert hierarchical_scores(tree, ["fat cell"], ["monocyte"])["hierarchical_f1"] == 0
    with pytest.raises(ValueError, match="one label a cell, got 1 and 2"):
        hierarchical_scores(tree, ["T cell"], ["T cell", "B cell"])


def test_classes_in_any_order_give_the_levels(tree):
    names = ["fat cell", "monocyte", "B cell", "CD8 T", "CD4 T"]
    probabilities = np.array([[0.1, 0.1, 0.1, 0.2, 0.5], [np.nan] * 5])
    found = predict_levels(tree, names, probabilities)
    assert [tree.labels[index] for index in found.labels[0]] == ["lymphoid", "T cell", "CD4 T"]
    np.testing.assert_allclose(found.probabilities[0], [0.8, 0.7, 0.5])
    assert np.isnan(found.probabilities[1]).all()
    with pytest.raises(ValueError, match="they must be the tree's leaves"):
        predict_levels(tree, names[:4], probabilities[:, :4])


def test_levels_are_scored_where_the_label_says_something(tree):
    names = list(tree.leaves)
    scores = score_levels(tree, names, np.eye(5, dtype=np.float32), ["CD4 T", "T cell", "monocyte", "fat cell", "x"])
    # Predicted: CD4 T, CD8 T, B cell, monocyte; the label x is in no tree.
    assert (scores["num_cells"], scores["num_unknown_cells"]) == (4, 1)
    assert [(row["num_cells"], row["accuracy"]) for row in scores["levels"]] == [(4, 0.5), (4, 0.5), (3, 1 / 3)]
    assert scores["subtype_accuracy"] == 0.5
    assert score_levels(tree, names, np.eye(5, dtype=np.float32)[:1], ["x"])["levels"] == []
