"""Training on labels of a tree: cells may be named at any level, and one classifier of the leaves learns from all.

A cell whose label is not a leaf says that its type is one of the leaves below: its likelihood is the sum of theirs. So
a cell known only as a lymphoid cell trains that, and leaves it open which. A label's probability is always the sum of
its leaves', and no label is less likely than one below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from screformer.annotation.cell_ontology import cell_ontology_tree
from screformer.annotation.label_tree import LabelTree, predict_levels, unknown_labels
from screformer.train.collator import IGNORED_LABEL
from screformer.train.metrics import cell_type_scores
from screformer.train.tree_metrics import hierarchical_scores

UHAF_PREFIX, CELL_ONTOLOGY = "uhaf:", "cell_ontology"


def open_label_tree(name: str, labels: Sequence[str] | npt.NDArray[np.str_]) -> LabelTree:
    """Return a tree of ``uhaf:ORGAN``, of the Cell Ontology, or of a CSV of labels and parents.

    Parameters
    ----------
    name
        ``cell_ontology`` for the tree of `labels` and the broad types above them (`cell_ontology_tree`), or
        ``cell_ontology:FILE`` with a file's terms, one a line, instead of the broad types; else as said.
    labels
        Of the cells that train. Only the Cell Ontology needs them: other trees are whole, whatever the labels.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        uHAF has no such organ, the table is none of a tree, or a label or term is not in the Cell Ontology.
    """
    if name.startswith(UHAF_PREFIX):
        return LabelTree.uhaf(name.removeprefix(UHAF_PREFIX))
    if name == CELL_ONTOLOGY:
        return cell_ontology_tree(np.asarray(labels).tolist())
    if name.startswith(f"{CELL_ONTOLOGY}:"):
        lines = Path(name.removeprefix(f"{CELL_ONTOLOGY}:")).read_text(encoding="utf-8-sig").splitlines()
        return cell_ontology_tree(np.asarray(labels).tolist(), above=[line.strip() for line in lines if line.strip()])
    return LabelTree.read(name)


class TreeTargets:
    """The labels of a tree as ids, and which leaves each of them may be.

    Ids of leaves come first: they are the classifier's. Other labels follow.

    Parameters
    ----------
    tree
        Has all labels of the cells.
    training_labels
        Of the cells that train, at any level. The tree is cut to them and what is above them, so that its leaves are
        the labels that have no subtype in training.

    Attributes
    ----------
    tree
        The part that is left.
    leaves, names
        Labels in the order of ids: the leaves alone, and all.
    label2id
        Of all labels.

    Raises
    ------
    ValueError
        A label is not in the tree.
    """

    def __init__(self, tree: LabelTree, training_labels: Sequence[str] | npt.NDArray[np.str_]) -> None:
        seen = sorted(set(np.asarray(training_labels).tolist()))
        unknown = unknown_labels(tree, seen)
        if unknown:
            raise ValueError(
                f"label_tree has no {unknown}; it has {', '.join(tree.labels)}. Add them to the tree, or leave their "
                "cells out with exclude_labels"
            )
        self.tree = tree.restrict(seen)
        self.leaves = tuple(sorted(self.tree.leaves))
        inner = sorted(set(self.tree.labels) - set(self.leaves))
        self.names = (*self.leaves, *inner)
        self.label2id = {name: number for number, name in enumerate(self.names)}
        self.is_below = np.array([[name in self.tree.path(leaf) for leaf in self.leaves] for name in self.names])

    def compute_metrics(self, prediction: Any) -> dict[str, float]:  # Any: transformers' EvalPrediction
        """Return validation scores of an epoch: of the predicted path, at the level of each cell's label.

        Those of `metrics.cell_type_scores`, and beside them those of `tree_metrics.hierarchical_scores`.
        """
        truth = [self.names[number] for number in np.asarray(prediction.label_ids).tolist()]
        probabilities = torch.from_numpy(np.asarray(prediction.predictions, dtype=np.float64)).softmax(dim=-1).numpy()
        levels = predict_levels(self.tree, self.leaves, probabilities).labels
        depths = np.array([len(self.tree.path(label)) for label in truth])
        seen = [self.tree.labels[index] for index in levels[np.arange(len(truth)), depths - 1].tolist()]
        ids = [np.array([self.label2id[name] for name in names], dtype=np.int64) for names in (seen, truth)]
        ends = [self.tree.labels[index] for index in levels[:, -1].tolist()]
        hierarchical = hierarchical_scores(self.tree, ends, truth)
        kept = ("hierarchical_f1", "subtype_accuracy")
        return {**cell_type_scores(*ids), **{name: hierarchical[name] for name in kept}}


class TreeLoss:
    """The mean over cells of minus the logarithm of the probability that the type is one below the cell's label.

    Parameters
    ----------
    targets
        Which ids there are.
    weights
        (labels,) of each cell's label; None for 1.
    """

    def __init__(self, targets: TreeTargets, weights: Tensor | None = None) -> None:
        self.is_below = torch.from_numpy(targets.is_below)
        self.weights = weights

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of a batch, as ``Trainer(compute_loss_func=...)`` asks for it."""
        logits, known = outputs["logits"].float(), labels.clamp(min=0)
        is_below = self.is_below.to(logits.device)[known]
        losses = logits.logsumexp(dim=-1) - logits.masked_fill(~is_below, -torch.inf).logsumexp(dim=-1)
        if self.weights is not None:
            losses = losses * self.weights.to(losses.device)[known]
        # A cell that only keeps a process busy has the label -100, and a loss of 0.
        is_counted = labels != IGNORED_LABEL
        num_cells = is_counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return (losses * is_counted).sum() / num_cells


def tree_weights(targets: TreeTargets, labels: npt.NDArray[np.str_]) -> Tensor:
    """Return a weight for each id, so that labels that cells have weigh the same; 1 for those that no cell has."""
    numbers = np.array([(labels == name).sum() for name in targets.names])
    present = numbers > 0
    weights = np.ones(len(numbers))
    weights[present] = len(labels) / (present.sum() * numbers[present])
    return torch.tensor(weights, dtype=torch.float32)
