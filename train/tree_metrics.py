"""Scores of predictions in a label tree: hierarchical precision, recall and F1, and scTab's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from screformer.annotation.label_tree import LabelTree


def hierarchical_scores(tree: LabelTree, predicted: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Return how much of the ways from the top to the predicted and to the true labels is shared.

    ``hierarchical_precision``, ``hierarchical_recall`` and ``hierarchical_f1`` (Kiritchenko et al. 2005): each label
    stands for itself and all above it, and the labels of all cells are counted together. ``subtype_accuracy``: a
    prediction is right if it is the label or a subtype of it, and wrong if it is above (scTab, Fischer et al. 2024).
    ``exact_accuracy``: if it is the label.

    Parameters
    ----------
    tree
        Has all of the labels.
    predicted, truth
        A label a cell, at any level.

    Raises
    ------
    ValueError
        There are no cells, lengths differ, or a label is not in the tree.
    """
    if not len(truth) or len(predicted) != len(truth):
        raise ValueError(f"predicted and truth must have one label a cell, got {len(predicted)} and {len(truth)}")
    ours, theirs = ([set(tree.path(label)) for label in labels] for labels in (predicted, truth))
    shared = sum(len(own & other) for own, other in zip(ours, theirs, strict=True))
    precision, recall = shared / sum(map(len, ours)), shared / sum(map(len, theirs))
    pairs = list(zip(predicted, truth, strict=True))
    return {
        "hierarchical_precision": precision,
        "hierarchical_recall": recall,
        "hierarchical_f1": 2 * precision * recall / (precision + recall) if shared else 0.0,
        "subtype_accuracy": sum(tree.is_within(own, true) for own, true in pairs) / len(pairs),
        "exact_accuracy": sum(own == true for own, true in pairs) / len(pairs),
    }
