"""Scores of predictions in a label tree: hierarchical precision, recall and F1, and scTab's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from screformer.annotation.label_tree import LabelTree, predict_levels
from screformer.train.metrics import cell_type_scores


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


def score_levels(
    tree: LabelTree, class_names: Sequence[str], probabilities: npt.NDArray[np.float32], truth: Sequence[str]
) -> dict[str, Any]:  # Any: JSON
    """Return `hierarchical_scores` of the path that is predicted for each cell, and the scores of each level.

    At a level those cells count whose label says what they are there: it is at least as deep, or a leaf above, which
    repeats. ``levels`` has a row for each with ``level``, ``num_cells``, ``accuracy``, ``macro_f1`` and
    ``balanced_accuracy``. Labels that the tree does not have are left out, and counted in ``num_unknown_cells``.

    Parameters
    ----------
    tree
        Of the classifier.
    class_names, probabilities
        Of the classifier's classes, (cells, classes).
    truth
        A label a cell, at any level.
    """
    is_known = np.isin(np.asarray(truth), tree.labels)
    labels = [label for label, known in zip(truth, is_known.tolist(), strict=True) if known]
    scores: dict[str, Any] = {"num_cells": len(labels), "num_unknown_cells": int((~is_known).sum()), "levels": []}
    if not labels:
        return scores
    predicted = predict_levels(tree, class_names, probabilities[is_known]).labels
    scores |= hierarchical_scores(tree, [tree.labels[index] for index in predicted[:, -1].tolist()], labels)
    place = {label: index for index, label in enumerate(tree.labels)}
    for level in range(1, tree.num_levels + 1):
        counts = [len(tree.path(label)) >= level or label in tree.leaves for label in labels]
        cells = np.flatnonzero(counts)
        if not len(cells):
            continue
        true = np.array([place[tree.at_level(labels[cell], level)] for cell in cells.tolist()], dtype=np.int64)
        row = {"level": level, "num_cells": len(cells), **cell_type_scores(predicted[cells, level - 1], true)}
        scores["levels"].append(row)
    return scores
