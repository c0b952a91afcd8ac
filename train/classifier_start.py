"""How the cell classifier of a new fine-tuning run starts: which paths it has, and a linear path that already knows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from screformer.benchmarks.simple_baselines import fit_logistic_regression
from screformer.configuration_screformer import CLASSIFIER_PATHS
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import Corpus
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import CellCollator
from screformer.train.labelled_cells import LabelledCells

logger = logging.getLogger(__name__)

CELLS_AT_ONCE = 4096
POOLED_CELLS, POOLED_AT_ONCE = 256, 8
MAX_CELLS = 20_000  # a regression learns little more from more cells, and takes minutes


@dataclass
class ClassifierArguments:
    """What the cell type's logits are made of."""

    _argument_group_name = "classifier"

    classifier_paths: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Paths whose logits are added up: convolution (the paper's), pooled (mean and maximum of the "
            "genes' vectors), linear (each gene's bin). Default: the checkpoint's, or convolution."
        },
    )
    linear_start: Literal["zeros", "logistic_regression"] = field(
        default="zeros",
        metadata={"help": "Where a linear path starts: logistic_regression fits one to the training cells' bins."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError for paths that do not exist, or a start without a linear path."""
        unknown = sorted(set(self.classifier_paths) - set(CLASSIFIER_PATHS))
        if unknown or len(set(self.classifier_paths)) < len(self.classifier_paths):
            allowed = ", ".join(CLASSIFIER_PATHS)
            raise ValueError(f"classifier_paths got {self.classifier_paths}; it must be some of {allowed}, each once")
        if self.linear_start not in ("zeros", "logistic_regression"):
            raise ValueError(f"linear_start got {self.linear_start!r}; it must be zeros or logistic_regression")
        if self.linear_start != "zeros" and "linear" not in self.classifier_paths:
            raise ValueError(
                f"linear_start={self.linear_start!r} needs a linear path, but classifier_paths are "
                f"{self.classifier_paths}; add linear to them"
            )

    @property
    def config_values(self) -> dict[str, Any]:  # Any: a field's value
        """Fields of the model's config."""
        return {"classifier_paths": list(self.classifier_paths)} if self.classifier_paths else {}


def start_classifier(
    model: ScReformerForCellClassification,
    arguments: ClassifierArguments,
    corpus: Corpus,
    cells: LabelledCells,
    *,
    seed: int,
) -> dict[str, Any]:  # Any: JSON
    """Give the pooled and the linear path of a classifier their start from the training cells, and describe it.

    A path that came with the checkpoint for the same labels is started anew as well.
    """
    rows = cells.rows[cells.split.train]
    facts: dict[str, Any] = {}
    if model.classifier.pooled_path is not None:
        chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:POOLED_CELLS])
        model.classifier.pooled_path.start(_pool(model, CellDataset(corpus, chosen)))
        facts["pooled_start"] = {"num_cells": len(chosen)}
    if model.classifier.linear_path is not None:
        if arguments.linear_start == "logistic_regression":
            groups = None if cells.groups is None else cells.groups[cells.split.train]
            labels = cells.labels[cells.split.train]
            facts["linear_start"] = start_linear_path(model, corpus, rows, labels, groups=groups, seed=seed)
        else:
            model.start_linear_path()
    return facts


def _pool(model: ScReformerForCellClassification, cells: CellDataset) -> torch.Tensor:
    collate, was_training = CellCollator.from_config(model.config), model.training
    model.eval()
    firsts = range(0, len(cells), POOLED_AT_ONCE)
    batches = [cells.__getitems__(list(range(first, min(first + POOLED_AT_ONCE, len(cells))))) for first in firsts]
    pooled = torch.cat([model.pool_cells(collate(batch)) for batch in batches])
    model.train(was_training)
    return pooled


def start_linear_path(
    model: ScReformerForCellClassification,
    corpus: Corpus,
    rows: npt.NDArray[np.int64],
    labels: npt.NDArray[np.str_],
    *,
    groups: npt.NDArray[np.str_] | None,
    seed: int,
) -> dict[str, Any]:  # Any: JSON
    """Fit a logistic regression to the bins of the training cells, start the linear path with it, and describe it.

    Its strength is chosen by holding out whole groups where there are at least two, else cells: see
    `screformer.benchmarks.simple_baselines.logistic_regression`.

    Parameters
    ----------
    model
        Has a linear path.
    corpus, rows
        Where the training cells are.
    labels, groups
        Of each of `rows`; `groups` may be None.
    seed
        Fixes the inner folds, and which cells are taken of more than 20,000.
    """
    if len(rows) > MAX_CELLS:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:MAX_CELLS])
        rows, labels, groups = rows[chosen], labels[chosen], None if groups is None else groups[chosen]
    levels = read_levels(corpus, rows, model.config.num_genes, model.config.num_bins)
    fitted = fit_logistic_regression(levels, labels, groups=groups, seed=seed)
    order = [model.config.label2id[name] for name in fitted.labels]
    weight = np.zeros((model.config.num_labels, model.config.num_genes))
    bias = np.full(model.config.num_labels, fitted.biases.min())
    weight[order], bias[order] = fitted.weights, fitted.biases
    model.start_linear_path(torch.from_numpy(weight).float(), torch.from_numpy(bias).float())
    search = {f"{strength:g}": score for strength, score in fitted.search.items()}
    logger.info("the linear path starts as a logistic regression of %d cells, C=%g", len(rows), fitted.inverse_strength)
    return {"num_cells": len(rows), "inverse_strength": fitted.inverse_strength, "search": search}


def read_levels(corpus: Corpus, rows: npt.NDArray[np.int64], num_genes: int, num_bins: int) -> sparse.csr_array:
    """Return the bins of cells as shares of the highest, float64 (cells, genes): what a linear path reads."""
    dataset = CellDataset(corpus, rows)
    batches = [
        dataset.__getitems__(list(range(first, min(first + CELLS_AT_ONCE, len(rows)))))
        for first in range(0, len(rows), CELLS_AT_ONCE)
    ]
    counts = np.concatenate([batch.counts for batch in batches])
    indptr = np.concatenate([[0], np.cumsum(counts)])
    bins = np.concatenate([batch.input_ids for batch in batches]) / (num_bins - 1)
    gene_ids = np.concatenate([batch.gene_ids for batch in batches]).astype(np.int32)
    return sparse.csr_array((bins, gene_ids, indptr), shape=(len(rows), num_genes))
