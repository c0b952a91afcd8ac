"""Cell types for a file of cells, written into a copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd

from screformer.annotation.annotated_copy import (
    add_cell_matrix,
    add_obs_columns,
    add_record,
    annotated_copy,
    check_format,
    check_names_free,
    check_paths,
)
from screformer.annotation.cell_source import CellSource, warn_of_empty_cells
from screformer.annotation.label_tree import LabelTree, LevelPredictions, predict_levels
from screformer.annotation.trained_model import load_classifier
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.passport_problems import check_allowed
from screformer.train.batch_size import BatchSize
from screformer.train.collator import GeneSpace
from screformer.train.inference import BatchInference, softmax

NO_LABEL = -1


class NewNames(NamedTuple):
    """What `annotate_file` adds: columns of `obs`, those of levels in pairs, and a matrix of `obsm`."""

    cell_type: str
    probability: str
    probabilities: str
    levels: tuple[tuple[str, str], ...] = ()

    @property
    def obs(self) -> list[str]:
        """The columns of `obs`."""
        return [self.cell_type, self.probability, *(name for pair in self.levels for name in pair)]


@dataclass(frozen=True)
class AnnotationSummary:
    """What `annotate_file` wrote.

    Attributes
    ----------
    output
        The new file.
    num_cells
        Its cells, as many as in the input.
    num_empty_cells
        Cells without counts on known genes; they have no label.
    label_counts
        Predicted cell type -> cells, the most frequent first; only types that were predicted.
    mean_probability
        Mean probability of the predicted types; NaN if no cell got one.
    gene_coverage
        Share of the input's counts that fall on genes the model knows.
    count_source, gene_source
        Where in the input counts and gene names were.
    names
        Of what is new in the file.
    """

    output: Path
    num_cells: int
    num_empty_cells: int
    label_counts: dict[str, int]
    mean_probability: float
    gene_coverage: float
    count_source: str
    gene_source: str
    names: NewNames

    def __str__(self) -> str:
        """Give a few readable lines."""
        types = ", ".join(f"{name} {count}" for name, count in self.label_counts.items())
        return "\n".join(
            [
                f"{self.num_cells} cells: {types or 'no labels'}; {self.num_empty_cells} without counts on known genes",
                f"counts from {self.count_source}, genes by {self.gene_source}; "
                f"{self.gene_coverage:.1%} of the counts are on genes that the model knows",
                f"{self.output}: {', '.join(f'obs[{name!r}]' for name in self.names.obs)}, "
                f"obsm[{self.names.probabilities!r}]",
            ]
        )


def annotate_file(
    cells: str | Path,
    model: str | Path,
    output: str | Path,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    allow: Sequence[str] = (),
    batch_size: BatchSize = 32,
    gene_space: GeneSpace | None = None,
    key: str = "screformer",
    overwrite: bool = False,
    progress: bool = True,
    device: str | None = None,
) -> AnnotationSummary:
    """Write a copy of `cells` with a cell type for every cell.

    The copy has the same cells in the same order, and everything else that the file held. New in it:

    - ``obs["{key}_cell_type"]``: the most probable type, a categorical of the types that were predicted.
    - ``obs["{key}_probability"]``: its probability, float32.
    - Of a model with a label tree, ``obs["{key}_level_1"]`` and so on: the label at each level, from the top down the
      likeliest below the one before, where the path ends its end again; and ``obs["{key}_level_1_probability"]``.
      The cell type is the path's end then.
    - ``obsm["{key}_probabilities"]``: all probabilities, float32 (cells, labels).
    - ``uns["{key}"]``: the `labels` of those columns, the model, the `input`'s passport (see `InputPassport`), versions
      and date.

    A cell without counts on known genes has no type (NaN) and NaN probabilities. A cell's result depends on its counts
    alone, not on `batch_size` or on other cells. The file is read in blocks and may be larger than memory.

    Parameters
    ----------
    cells
        h5ad file with raw counts.
    model
        Folder or Hub id of a fine-tuned checkpoint.
    output
        h5ad file to write.
    layer, gene_column
        Where counts and gene names are; found by themselves when left out (see `open_count_matrix`).
    allow
        Codes of problems of the file to accept, such as "low-coverage" (`PROBLEM_CODES`).
    batch_size
        Cells a forward pass; ``"auto"``: as many as fit into free memory.
    gene_space
        ``"full"`` or ``"expressed"`` instead of the checkpoint's.
    key
        What the new names begin with.
    overwrite
        Replace `output`, and elements of the new names that the file has, if they exist.
    progress
        Whether to show progress bars.
    device
        For example ``"cuda"``; default a GPU if there is one.

    Raises
    ------
    OSError
        `cells` or the checkpoint is not there, or `output` is (FileExistsError).
    ValueError
        The file is not h5ad, or has problems that are not allowed (see `inspect_counts`); the checkpoint has no
        trained classifier or another tokenizer than it was trained with; the new names are taken; an option is
        out of its range. Nothing is left of the output then.
    """
    allowed = check_allowed(allow)
    source_path, target = check_paths(cells, output, overwrite=overwrite)
    trained = load_classifier(model, device=device)
    parents = trained.model.config.label_parents
    tree = LabelTree(parents) if parents else None
    names = NewNames(
        f"{key}_cell_type",
        f"{key}_probability",
        f"{key}_probabilities",
        tuple(
            (f"{key}_level_{level}", f"{key}_level_{level}_probability")
            for level in range(1, 1 + (tree.num_levels if tree else 0))
        ),
    )
    inference = BatchInference(trained.model, "logits", batch_size=batch_size, gene_space=gene_space)
    labels = [trained.model.config.id2label[index] for index in range(inference.width)]
    vocabulary = trained.tokenizer.gene_vocabulary
    with open_count_matrix(
        source_path, layer=layer, gene_column=gene_column, vocabulary=vocabulary, allow=allowed
    ) as matrix:
        check_format(matrix)
        check_names_free(source_path, key, obs=names.obs, obsm=[names.probabilities], uns=[key], overwrite=overwrite)
        source = CellSource(matrix, trained.tokenizer, allow=allowed, progress=progress)
        with annotated_copy(source_path, target) as file:
            predicted = _predict_into(file, source, inference, labels, names, tree)
            num_empty = int((predicted.types == NO_LABEL).sum())
            record = {"labels": labels, "model": trained.describe(), "gene_space": inference.gene_space}
            add_record(file, key, {**record, "input": source.describe_input(), "num_empty_cells": num_empty})
    warn_of_empty_cells(num_empty, source.num_cells, consequence="they have no label")
    has_label = predicted.types != NO_LABEL
    return AnnotationSummary(
        output=target,
        num_cells=source.num_cells,
        num_empty_cells=num_empty,
        label_counts=_count_labels(predicted.types[has_label], labels),
        mean_probability=float(predicted.probabilities[has_label].mean()) if has_label.any() else float("nan"),
        gene_coverage=source.passport.gene_coverage,
        count_source=matrix.count_source,
        gene_source=matrix.gene_source,
        names=names,
    )


class _Predicted(NamedTuple):
    """Of each cell: number of the most probable type, or NO_LABEL, and its probability."""

    types: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float32]


def _predict_into(
    file: h5py.File,
    source: CellSource,
    inference: BatchInference,
    labels: list[str],
    names: NewNames,
    tree: LabelTree | None,
) -> _Predicted:
    """Predict all cells and write what was found to `file`, the full table block by block."""
    levels = None
    if tree is not None:
        class_of = np.array([labels.index(label) if label in labels else NO_LABEL for label in tree.labels])
        shape = source.num_cells, tree.num_levels
        levels = LevelPredictions(np.full(shape, NO_LABEL), np.full(shape, np.nan, dtype=np.float32))
    predicted = _Predicted(np.full(source.num_cells, NO_LABEL), np.full(source.num_cells, np.nan, dtype=np.float32))
    table = add_cell_matrix(file, names.probabilities, source.num_cells, len(labels))
    for rows, logits in source.outputs(inference, task="annotate"):
        table[rows] = block = softmax(logits)
        is_empty = np.isnan(block[:, 0])
        chosen, probabilities = block.argmax(axis=1), block.max(axis=1)
        if tree is not None and levels is not None:
            # From the top down, so that the labels of a cell form a path; its end is the cell's type.
            found = predict_levels(tree, labels, block)
            levels.labels[rows] = np.where(is_empty[:, None], NO_LABEL, found.labels)
            levels.probabilities[rows] = found.probabilities
            chosen = class_of[found.labels[:, -1]]
            probabilities = np.take_along_axis(block, chosen[:, None], axis=1)[:, 0]
        predicted.types[rows] = np.where(is_empty, NO_LABEL, chosen)
        predicted.probabilities[rows] = probabilities
    # Types that no cell has would be empty groups to whoever goes on with the file.
    cell_types = pd.Categorical.from_codes(predicted.types, categories=labels).remove_unused_categories()
    columns: dict[str, pd.Categorical | np.ndarray] = {
        names.cell_type: cell_types,
        names.probability: predicted.probabilities,
    }
    if tree is not None and levels is not None:
        for level, (label_name, probability_name) in enumerate(names.levels):
            of_level = pd.Categorical.from_codes(levels.labels[:, level], categories=list(tree.labels))
            columns[label_name] = of_level.remove_unused_categories()
            columns[probability_name] = levels.probabilities[:, level]
    add_obs_columns(file, columns)
    return predicted


def _count_labels(types: npt.NDArray[np.int64], labels: list[str]) -> dict[str, int]:
    """Return label -> cells, the most frequent first, without those of no cell."""
    pairs = zip(labels, np.bincount(types, minlength=len(labels)).tolist(), strict=True)
    return {label: count for label, count in sorted(pairs, key=lambda pair: -pair[1]) if count}
