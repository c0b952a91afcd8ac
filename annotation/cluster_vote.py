"""Votes within clusters: what most cells of a user's cluster are called, beside what each cell is called by itself.

Majority voting over groups of similar cells is known from CellTypist (Domínguez Conde et al. 2022,
https://doi.org/10.1126/science.abl5197). A vote is no prediction: it depends on the other cells, and on who made the
clusters. So it never replaces a cell's own label, and has columns of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from screformer.annotation.calibration import UNKNOWN
from screformer.annotation.label_tree import LabelTree, unknown_labels

NO_LABEL = -1
CELLS_OF_TABLE = 1 << 24  # clusters x labels that are counted at once
# Votes are whole multiples of float32's resolution below 1, and their sums exact: in whatever order they are added.
PARTS_OF_A_VOTE = 1 << 24

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]


class ClusterVotes(NamedTuple):
    """What the cluster of each cell voted for.

    Attributes
    ----------
    labels
        (cells,) Code of the winner; -1 where no label has the share that was asked for, where nobody voted, and for
        cells in no cluster.
    shares
        (cells,) The winner's share of the cluster's votes, also of one whose share is too small; NaN where nobody
        voted, and for cells in no cluster.
    """

    labels: Int64Array
    shares: Float64Array


def vote_within_clusters(
    labels: npt.NDArray[np.integer[Any]],
    clusters: Sequence[Any] | npt.NDArray[Any] | pd.Series,  # Any: whatever names a cluster
    *,
    weights: npt.NDArray[np.floating[Any]] | None = None,
    tree: LabelTree | None = None,
    min_share: float = 0.0,
) -> ClusterVotes:
    """Return for each cell the label with the most votes in its cluster.

    Of labels with equally many votes the one with the smallest code wins. With a tree, a vote for a label is also one
    for each label above it, and the winner is found from the top down: at each level, of the labels below the one
    before, that with the most votes, as long as its share of all votes is at least `min_share`. With a `min_share`
    above 0.5 that is the deepest label whose share is large enough.

    Parameters
    ----------
    labels
        (cells,) Codes; -1 for a cell without a label, which does not vote but gets the vote of its cluster. With a
        tree, places in its `labels`.
    clusters
        (cells,) Names of any kind, or a categorical; missing values (NaN, None) for cells in no cluster.
    weights
        (cells,) From 0 to 1, such as the probabilities of the labels, rounded to 2^-24; None: each cell has one vote.
    tree
        Of the labels.
    min_share
        From 0 to 1: what share the winner must have. With a tree above 0.

    Raises
    ------
    ValueError
        Lengths differ, or a value is outside of its range.

    Examples
    --------
    >>> votes = vote_within_clusters(np.array([0, 1, 1, -1, 0]), ["a", "a", "a", "a", None])
    >>> votes.labels.tolist(), votes.shares.round(2).tolist()
    ([1, 1, 1, 1, -1], [0.67, 0.67, 0.67, 0.67, nan])
    """
    codes = np.asarray(labels)
    members = pd.factorize(pd.Series(clusters))[0].astype(np.int64)
    parts = _check(codes, members, weights, tree, min_share)
    num_clusters = int(members.max(initial=NO_LABEL)) + 1
    winners, shares = np.full(num_clusters, NO_LABEL), np.full(num_clusters, np.nan)
    num_labels = len(tree.labels) if tree else int(codes.max(initial=NO_LABEL)) + 1
    if num_labels:
        voters = np.flatnonzero((codes != NO_LABEL) & (members != NO_LABEL))
        voters = voters[np.argsort(members[voters], kind="stable")]
        for start in range(0, num_clusters, max(1, CELLS_OF_TABLE // num_labels)):
            block = slice(start, min(num_clusters, start + max(1, CELLS_OF_TABLE // num_labels)))
            chosen = voters[slice(*np.searchsorted(members[voters], [block.start, block.stop]))]
            place = (members[chosen] - start) * num_labels + codes[chosen]
            size = (block.stop - start) * num_labels
            counts = np.bincount(place, weights=parts[chosen], minlength=size).astype(np.float64, copy=False)
            table = counts.reshape(-1, num_labels)
            winners[block], shares[block] = _walk_down(table, tree, min_share) if tree else _most(table, min_share)
    # The last place is that of cells in no cluster.
    return ClusterVotes(np.append(winners, NO_LABEL)[members], np.append(shares, np.nan)[members])


def _check(
    codes: npt.NDArray[np.integer[Any]],
    members: Int64Array,
    weights: npt.NDArray[np.floating[Any]] | None,
    tree: LabelTree | None,
    min_share: float,
) -> Float64Array:
    """Refuse what is no vote; return how many parts of a vote each cell has."""
    if codes.ndim != 1 or codes.shape != members.shape or (weights is not None and np.shape(weights) != codes.shape):
        shapes = [codes.shape, members.shape, *([] if weights is None else [np.shape(weights)])]
        raise ValueError(f"labels, clusters and weights need one value a cell; they have the shapes {shapes}")
    most = len(tree.labels) - 1 if tree else codes.max(initial=NO_LABEL)
    if len(codes) and not (codes.dtype.kind in "iu" and codes.min() >= NO_LABEL and codes.max() <= most):
        raise ValueError(
            f"labels must be whole numbers from -1 (no label) to {most}, got {codes.dtype} from {codes.min()} to "
            f"{codes.max()}"
        )
    if not 0 <= min_share <= 1 or (tree and not min_share):
        raise ValueError(
            f"min_share got {min_share}; it must be from 0 to 1, and above 0 with a tree, which is gone down as long "
            "as a label has that share (0.5 is usual)"
        )
    if weights is None:
        return np.full(len(codes), float(PARTS_OF_A_VOTE))
    values = np.where(codes == NO_LABEL, 0.0, weights)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("weights of cells with a label must be from 0 to 1, without NaN; probabilities are")
    return np.rint(values * PARTS_OF_A_VOTE)


def _most(table: Float64Array, min_share: float) -> ClusterVotes:
    """Return winner and share of each row of votes, (clusters, labels)."""
    total, winners = table.sum(axis=1), table.argmax(axis=1)
    shares = np.divide(table.max(axis=1), total, out=np.full(len(table), np.nan), where=total > 0)
    return ClusterVotes(np.where(shares >= min_share, winners, NO_LABEL), shares)


def _walk_down(table: Float64Array, tree: LabelTree, min_share: float) -> ClusterVotes:
    """Return the same with a tree: votes count for what is above, too, and the deepest label with its share wins."""
    paths = [tree.path(label) for label in tree.labels]
    total = table.sum(axis=1)
    table = table @ np.array([[label in path for label in tree.labels] for path in paths], dtype=np.float64)
    place = {label: index for index, label in enumerate(tree.labels)}
    below: dict[int, list[int]] = {}
    for path in paths:
        below.setdefault(place[path[-2]] if len(path) > 1 else NO_LABEL, []).append(place[path[-1]])
    winners, shares = np.full(len(table), NO_LABEL), np.full(len(table), np.nan)
    going = np.flatnonzero(total > 0)
    for level in range(tree.num_levels):
        before, goes_on = winners[going], np.zeros(len(going), dtype=bool)
        for parent in np.unique(before).tolist():
            children, rows = np.array(below.get(parent, []), dtype=np.int64), np.flatnonzero(before == parent)
            if not len(children):
                continue
            votes = table[np.ix_(going[rows], children)]
            share = votes.max(axis=1) / total[going[rows]]
            goes_on[rows] = enough = share >= min_share
            winners[going[rows[enough]]] = children[votes[enough].argmax(axis=1)]
            # What fell short is said only where nothing above it won.
            said = np.ones_like(enough) if level == 0 else enough
            shares[going[rows[said]]] = share[said]
        going = going[goes_on]
    return ClusterVotes(winners, shares)


def cluster_vote_columns(
    cell_types: pd.Series | pd.Categorical,
    clusters: Sequence[Any] | npt.NDArray[Any] | pd.Series,  # Any: as in `vote_within_clusters`
    *,
    key: str = "screformer",
    weights: npt.NDArray[np.floating[Any]] | None = None,
    tree: LabelTree | None = None,
    min_share: float = 0.0,
) -> dict[str, pd.Categorical | npt.NDArray[np.float32]]:
    """Return the columns of a vote: ``{key}_cluster_vote`` and ``{key}_cluster_vote_share``, float32.

    Where no label reaches `min_share` the vote is "unknown"; it is missing for clusters in which nobody voted, and for
    cells in no cluster, whose share is NaN.

    Parameters
    ----------
    cell_types
        Label of each cell, such as ``obs["screformer_cell_type"]``; missing for cells without one. Of labels with
        equally many votes the first category wins; with a tree the first of its `labels`.
    clusters, weights, tree, min_share
        As for `vote_within_clusters`.
    key
        What the names begin with.

    Raises
    ------
    ValueError
        As `vote_within_clusters`, or a label is not in the tree.
    """
    labels = pd.Categorical(cell_types)
    names = [str(name) for name in labels.categories]
    codes = labels.codes.astype(np.int64)
    if tree is not None:
        unknown = unknown_labels(tree, names)
        if unknown:
            raise ValueError(f"cell_types has {unknown}, which the tree has not; it has {', '.join(tree.labels)}")
        place = {label: index for index, label in enumerate(tree.labels)}
        codes = np.array([*(place[name] for name in names), NO_LABEL])[codes]
        names = list(tree.labels)
    votes = vote_within_clusters(codes, clusters, weights=weights, tree=tree, min_share=min_share)
    if UNKNOWN not in names:
        names.append(UNKNOWN)
    is_unknown = (votes.labels == NO_LABEL) & ~np.isnan(votes.shares)
    voted = pd.Categorical.from_codes(np.where(is_unknown, names.index(UNKNOWN), votes.labels), categories=names)
    return {
        f"{key}_cluster_vote": voted.remove_unused_categories(),
        f"{key}_cluster_vote_share": votes.shares.astype(np.float32),
    }
