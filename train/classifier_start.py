"""How the cell classifier of a new fine-tuning run starts: which paths it has, and a linear path that already knows."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse

from screformer.annotation.calibration_fit import calibrate
from screformer.benchmarks.simple_baselines import fit_logistic_regression
from screformer.configuration_screformer import CLASSIFIER_PATHS
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import Corpus
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import CellCollator
from screformer.train.component_regression import ABSENT, ComponentRegression, fit_component_regression
from screformer.train.expression_levels import read_levels
from screformer.train.labelled_cells import LabelledCells, draw_at_most

logger = logging.getLogger(__name__)

LinearStart = Literal["zeros", "logistic_regression", "principal_components", "gene_vectors"]
LINEAR_STARTS = get_args(LinearStart)
POOLED_CELLS, POOLED_AT_ONCE = 256, 8
# A regression learns little more from more cells, and takes minutes; of a rare type it needs some.
MAX_CELLS, CELLS_OF_EACH_TYPE = 20_000, 50


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
    linear_start: LinearStart = field(
        default="zeros",
        metadata={
            "help": "Where a linear path starts: zeros, or a logistic_regression on the training cells' bins, or one "
            "on their principal_components, as in the recipe finetune-small, or one on the sums of the model's "
            "gene_vectors, which a checkpoint has learned from unlabelled cells."
        },
    )

    def __post_init__(self) -> None:
        """Raise ValueError for paths that do not exist, or a start without a linear path."""
        unknown = sorted(set(self.classifier_paths) - set(CLASSIFIER_PATHS))
        if unknown or len(set(self.classifier_paths)) < len(self.classifier_paths):
            allowed = ", ".join(CLASSIFIER_PATHS)
            raise ValueError(f"classifier_paths got {self.classifier_paths}; it must be some of {allowed}, each once")
        if self.linear_start not in LINEAR_STARTS:
            raise ValueError(f"linear_start got {self.linear_start!r}; it must be one of {', '.join(LINEAR_STARTS)}")
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
    """Give new paths of a classifier their start from the training cells, and describe it.

    After a regression the other paths begin by saying nothing, and the linear path is not trained: the model starts as
    the regression, and learns what that lacks. A rate at which the others learn would take the regression's hundreds of
    small weights a cell apart in a few steps. What the regression's cross-validation said of held-out cells calibrates
    the model: the record is under ``calibration``.
    """
    rows = cells.rows[cells.split.train]
    facts: dict[str, Any] = {}
    if model.classifier.pooled_path is not None and not model.classifier.pooled_path.center.any():
        chosen = np.sort(np.random.default_rng(seed).permutation(rows)[:POOLED_CELLS])
        model.classifier.pooled_path.start(_pool(model, CellDataset(corpus, chosen)))
        facts["pooled_start"] = {"num_cells": len(chosen)}
    linear = model.classifier.linear_path
    if linear is not None and arguments.linear_start != "zeros":
        facts["linear_start"] = start_linear_path(model, arguments.linear_start, corpus, cells, seed=seed)
        facts["calibration"] = facts["linear_start"].pop("calibration", None)
        linear.requires_grad_(False)
        model.classifier.silence_deep_paths()
    elif linear is not None and not linear.output.weight.any():
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
    model: ScReformerForCellClassification, start: LinearStart, corpus: Corpus, cells: LabelledCells, *, seed: int
) -> dict[str, Any]:  # Any: JSON
    """Fit a logistic regression to the bins of the training cells, start the linear path with it, and describe it.

    Its settings are chosen by holding out whole groups where there are at least two, else cells: see
    `screformer.benchmarks.simple_baselines` and `screformer.train.component_regression`.

    Parameters
    ----------
    model
        Has a linear path.
    start
        Any but ``"zeros"``.
    corpus, cells
        Their training part is fitted to.
    seed
        Fixes the inner folds, and which cells are taken of more than 20,000: as many, and some of each rare type.
    """
    # In a label tree cells may have labels that are no class.
    train = cells.split.train[np.isin(cells.labels[cells.split.train], list(model.config.label2id))]
    train = draw_at_most(train, cells.labels, MAX_CELLS, of_each=CELLS_OF_EACH_TYPE, seed=seed)
    labels, groups = cells.labels[train], None if cells.groups is None else cells.groups[train]
    levels = read_levels(corpus, cells.rows[train], model.config.num_genes, model.config.num_bins)
    gene_embeddings = model.screformer.embeddings.gene_embeddings.weight.detach().double().cpu().numpy()
    fitted = _fit(start, levels, labels, groups, gene_embeddings if start == "gene_vectors" else None, seed)
    order = [model.config.label2id[name] for name in fitted.labels]
    weight = np.zeros((model.config.num_labels, model.config.num_genes))
    bias = np.full(model.config.num_labels, fitted.biases.min())
    weight[order], bias[order] = fitted.weights, fitted.biases
    model.start_linear_path(torch.from_numpy(weight).float(), torch.from_numpy(bias).float())
    logger.info("the linear path starts as a regression of %d cells on bins: %s", len(train), fitted.chosen)
    facts: dict[str, Any] = {"num_cells": len(train), "chosen": fitted.chosen, "search": dict(fitted.search)}
    if fitted.held_out is not None:
        facts |= {"calibration": _calibrate(model, fitted.held_out, order, labels, groups)}
    return facts


def _calibrate(
    model: ScReformerForCellClassification,
    held_out: npt.NDArray[np.float32],
    order: list[int],
    labels: npt.NDArray[np.str_],
    groups: npt.NDArray[np.str_] | None,
) -> dict[str, Any] | None:  # Any: JSON
    """Calibrate by what the regression said of cells that it had not seen: where it can, of donors it had not seen."""
    is_known = np.isfinite(held_out).all(axis=1)
    if not is_known.any():
        return None
    logits = np.full((int(is_known.sum()), model.config.num_labels), ABSENT, dtype=np.float32)
    logits[:, order] = held_out[is_known]
    is_by_group = groups is not None and len(set(groups.tolist())) > 1
    kind = "groups" if is_by_group else "folds"
    fitted_to = f"training cells, each by a regression of the other {kind}"
    known_groups = groups[is_known] if is_by_group and groups is not None else None
    record = calibrate(model.config, logits, labels[is_known].tolist(), fitted_to=fitted_to, groups=known_groups)
    return record | {"by_group": is_by_group}


def _fit(
    start: LinearStart,
    levels: sparse.csr_array,
    labels: npt.NDArray[np.str_],
    groups: npt.NDArray[np.str_] | None,
    gene_vectors: npt.NDArray[np.float64] | None,
    seed: int,
) -> ComponentRegression:
    if gene_vectors is not None:
        # Of a few cells a type, whose donors lack types, a search learns nothing: scikit-learn's default.
        return fit_component_regression(
            levels, labels, groups=groups, gene_vectors=gene_vectors, inverse_strengths=(1.0,), seed=seed
        )
    if start == "principal_components":
        return fit_component_regression(levels, labels, groups=groups, seed=seed)
    fitted = fit_logistic_regression(levels, labels, groups=groups, is_scaled=False, seed=seed)
    search = {f"C={strength:g}": score for strength, score in fitted.search.items()}
    return ComponentRegression(fitted.labels, fitted.weights, fitted.biases, f"C={fitted.inverse_strength:g}", search)
