"""Votes within clusters: those of a slow count, whatever the order of cells, and never in the place of predictions."""

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.slow_cluster_vote import slow_votes
from screformer.annotation import cluster_vote
from screformer.annotation.cluster_vote import cluster_vote_columns, vote_within_clusters
from screformer.annotation.label_tree import LabelTree

TREE = LabelTree(
    {"lymphoid": None, "T": "lymphoid", "CD4": "T", "CD8": "T", "B": "lymphoid", "myeloid": None, "fat": None}
)
PATHS = [[TREE.labels.index(above) for above in TREE.path(label)] for label in TREE.labels]
SHARES = st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.6, 2 / 3, 1.0])


@st.composite
def votes(draw, num_labels=7):
    cells = draw(
        st.lists(
            st.tuples(
                st.integers(-1, num_labels - 1),
                st.sampled_from([None, "a", "b", "c"]),
                st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, width=32)),
            ),
            min_size=1,
            max_size=30,
        )
    )
    labels, clusters, weights = zip(*cells, strict=True)
    return np.array(labels), list(clusters), np.array(weights, dtype=np.float32)


def as_pairs(found):
    return [
        (None if label == -1 else label, None if np.isnan(share) else share)
        for label, share in zip(found.labels.tolist(), found.shares.tolist(), strict=True)
    ]


@settings(deadline=None)
@given(votes(), st.booleans(), st.booleans(), SHARES)
def test_votes_are_those_of_a_slow_count(cells, is_weighted, has_tree, min_share):
    labels, clusters, weights = cells
    if has_tree and not min_share:
        min_share = 0.5
    found = vote_within_clusters(
        labels, clusters, weights=weights if is_weighted else None, tree=TREE if has_tree else None, min_share=min_share
    )
    expected = slow_votes(
        [None if label == -1 else label for label in labels.tolist()],
        clusters,
        weights=weights.tolist() if is_weighted else None,
        path_of=PATHS if has_tree else None,
        min_share=min_share,
    )
    assert as_pairs(found) == expected


@settings(deadline=None)
@given(votes(), st.randoms(use_true_random=False), st.booleans(), SHARES.filter(bool))
def test_neither_the_order_of_cells_nor_the_names_of_clusters_change_a_vote(cells, random, has_tree, min_share):
    labels, clusters, weights = cells
    options = {"tree": TREE if has_tree else None, "min_share": min_share}
    before = vote_within_clusters(labels, clusters, weights=weights, **options)
    order = list(range(len(labels)))
    random.shuffle(order)
    names = dict(zip(["a", "b", "c", None], [*random.sample([7, 8, 9], 3), np.nan], strict=True))
    renamed = np.array([names[clusters[cell]] for cell in order])
    after = vote_within_clusters(labels[order], renamed, weights=weights[order], **options)
    np.testing.assert_array_equal(after.labels, before.labels[order])
    np.testing.assert_array_equal(after.shares, before.shares[order])


@given(st.integers(0, 6), st.integers(1, 5), st.integers(0, 3), SHARES.filter(bool), st.booleans())
def test_a_unanimous_cluster_has_its_label_with_share_1(label, num_cells, num_silent, min_share, has_tree):
    labels = np.array([label] * num_cells + [-1] * num_silent)
    found = vote_within_clusters(labels, [0] * len(labels), min_share=min_share, tree=TREE if has_tree else None)
    assert set(found.labels.tolist()) == {label}
    assert set(found.shares.tolist()) == {1.0}


@given(votes(), st.sampled_from([0.5 + 2**-20, 0.6, 0.9, 1.0]))
def test_with_a_tree_it_is_the_deepest_label_that_has_the_share(cells, min_share):
    labels, clusters, _ = cells
    found = vote_within_clusters(labels, clusters, tree=TREE, min_share=min_share)
    for cluster in {name for name in clusters if name is not None}:
        members = [cell for cell, name in enumerate(clusters) if name == cluster]
        voted = [int(labels[cell]) for cell in members if labels[cell] >= 0]
        share = {label: sum(label in PATHS[vote] for vote in voted) / max(1, len(voted)) for label in range(7)}
        reached = [label for label in range(7) if share[label] >= min_share]
        deepest = max(reached, key=lambda label: len(PATHS[label]), default=-1)
        assert {int(found.labels[cell]) for cell in members} == {deepest}


def test_ties_go_to_the_smallest_code():
    assert vote_within_clusters(np.array([5, 3, 3, 5]), ["a"] * 4).labels.tolist() == [3] * 4
    index = TREE.labels.index
    tied = np.array([index("CD8"), index("CD4")])
    assert vote_within_clusters(tied, [1, 1], tree=TREE, min_share=0.5).labels.tolist() == [index("CD4")] * 2
    assert vote_within_clusters(tied, [1, 1], tree=TREE, min_share=0.6).labels.tolist() == [index("T")] * 2


@pytest.mark.parametrize(
    "clusters",
    [
        ["x", "x", None, "y"],
        pd.Series(["x", "x", None, "y"], index=[3, 2, 1, 0], dtype="category"),
        pd.Series([1, 1, None, 2], dtype="Int64"),
        np.array([1.0, 1.0, np.nan, 2.0]),
        np.array([1, 1, None, "1"], dtype=object),
        pd.Categorical(["x", "x", None, "y"], categories=["z", "y", "x"]),
    ],
)
def test_clusters_are_named_by_anything(clusters):
    found = vote_within_clusters(np.array([0, -1, 0, 1]), clusters)
    assert found.labels.tolist() == [0, 0, -1, 1]
    np.testing.assert_array_equal(found.shares, [1, 1, np.nan, 1])


def test_where_nobody_votes_there_is_no_label_and_no_share():
    for labels in ([-1, -1], [], np.zeros(0, int)):
        for tree in (None, TREE):
            found = vote_within_clusters(np.array(labels, dtype=int), ["a"] * len(labels), tree=tree, min_share=0.5)
            assert found.labels.tolist() == [-1] * len(labels)
            assert np.isnan(found.shares).all()
    found = vote_within_clusters(np.array([0, 1]), ["a", "a"], weights=np.array([0.0, 0.0]))
    assert found.labels.tolist() == [-1, -1]
    assert np.isnan(found.shares).all()


def test_many_clusters_are_counted_in_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    labels, clusters = generator.integers(-1, 7, 500), generator.integers(0, 40, 500)
    whole = [vote_within_clusters(labels, clusters, tree=tree, min_share=0.3) for tree in (None, TREE)]
    for size in (1, 50):
        monkeypatch.setattr(cluster_vote, "CELLS_OF_TABLE", size)
        for tree, expected in zip((None, TREE), whole, strict=True):
            found = vote_within_clusters(labels, clusters, tree=tree, min_share=0.3)
            np.testing.assert_array_equal(found.labels, expected.labels)
            np.testing.assert_array_equal(found.shares, expected.shares)


def test_a_million_cells_take_seconds():
    generator = np.random.default_rng(0)
    labels, clusters = generator.integers(-1, 7, 1_000_000), generator.integers(0, 1000, 1_000_000)
    begin = time.process_time()
    vote_within_clusters(labels, clusters, weights=generator.random(1_000_000), tree=TREE, min_share=0.2)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": [1, 2]}, r"one value a cell; they have the shapes \[\(3,\), \(2,\)\]"),
        ({"weights": np.ones(2)}, r"one value a cell; they have the shapes \[\(3,\), \(3,\), \(2,\)\]"),
        ({"labels": np.array([0, -2, 1])}, r"whole numbers from -1 \(no label\) to 1, got int64 from -2 to 1"),
        ({"labels": np.array([0.0, 1, 1])}, r"whole numbers from -1 .*, got float64"),
        ({"labels": np.array([0, 7, 1]), "tree": TREE, "min_share": 0.5}, "to 6, got int64 from 0 to 7"),
        ({"min_share": 1.5}, r"min_share got 1\.5; it must be from 0 to 1"),
        ({"tree": TREE}, r"min_share got 0\.0; .* above 0 with a tree"),
        ({"weights": np.array([0.5, np.nan, 1])}, "weights of cells with a label must be from 0 to 1"),
        ({"weights": np.array([0.5, 2, 1])}, "weights of cells with a label must be from 0 to 1"),
    ],
)
def test_what_is_no_vote_is_refused(options, message):
    options = {"labels": np.array([0, 1, 1]), "clusters": ["a", "a", "b"], **options}
    with pytest.raises(ValueError, match=message):
        vote_within_clusters(options.pop("labels"), options.pop("clusters"), **options)


def test_columns_say_that_they_are_votes_and_leave_predictions_alone():
    types = pd.Series(["CD4", "CD8", "CD4", "B", "fat", None, "B"], dtype="category")
    clusters = ["1", "1", "1", "2", "2", "3", None]
    before = types.copy()
    columns = cluster_vote_columns(types, clusters, min_share=0.6)
    assert list(columns) == ["screformer_cluster_vote", "screformer_cluster_vote_share"]
    voted, shares = columns.values()
    assert voted.tolist() == ["CD4", "CD4", "CD4", "unknown", "unknown", np.nan, np.nan]
    assert list(voted.categories) == ["CD4", "unknown"]
    np.testing.assert_array_equal(shares, np.array([2 / 3] * 3 + [0.5] * 2 + [np.nan] * 2, dtype=np.float32))
    pd.testing.assert_series_equal(types, before)


def test_columns_with_a_tree_have_broader_labels():
    types = pd.Categorical(["CD4", "CD8", "B", "fat", None])
    voted, shares = cluster_vote_columns(types, ["1"] * 5, key="k", tree=TREE, min_share=0.7).values()
    assert set(voted) == {"lymphoid"}
    assert set(shares.tolist()) == {0.75}
    with pytest.raises(ValueError, match=r"cell_types has \['mast'\], which the tree has not; it has lymphoid, T"):
        cluster_vote_columns(pd.Categorical(["mast"]), ["1"], tree=TREE, min_share=0.5)


def test_a_model_s_own_unknown_stays_one_category():
    voted, _ = cluster_vote_columns(pd.Categorical(["unknown", "a", "b"]), [1, 2, 2], min_share=0.9).values()
    assert voted.tolist() == ["unknown"] * 3
