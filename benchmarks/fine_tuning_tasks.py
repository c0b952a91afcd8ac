"""The cells that fine-tuning is compared on, donors or folds held out, and what logistic regression scores there."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
from scipy import sparse

from screformer.benchmarks.simple_baselines import BaselineResult, log1p_cp10k, logistic_regression
from screformer.tokenization import (
    ScReformerTokenizer,
    build_corpus,
    example_cells_path,
    open_corpus,
    open_count_matrix,
)
from screformer.tokenization.corpus_files import MANIFEST
from screformer.train.labelled_cells import draw_of_each_label
from screformer.train.metrics import cell_type_scores
from screformer.train.splits import cross_validation_folds

LABELS = "cell_type"
MIN_CELLS = 10
NUM_FOLDS = 5
BLOCK = 1024


class Task(NamedTuple):
    """Labelled cells in groups that are tested in turn.

    Attributes
    ----------
    name
        For file names and tables.
    cells, corpus
        The h5ad and the corpus made of it.
    label_column, group_column
        Of the labels, and of the donors or folds.
    groups
        All donors or folds.
    rare_labels
        Labels with too few cells to say anything; their cells are left out.
    epochs
        Of every model instead of its own number, for a quick look.
    """

    name: str
    cells: str
    corpus: str
    label_column: str
    group_column: str
    groups: tuple[str, ...]
    rare_labels: tuple[str, ...]
    epochs: float | None = None

    def folds(self) -> list[tuple[str, ...]]:
        """Each group alone."""
        return [(group,) for group in self.groups]

    def pairs(self) -> list[tuple[str, ...]]:
        """Every choice of all groups but two."""
        return list(itertools.combinations(self.groups, len(self.groups) - 2))


def make_tasks(work: Path, cells: str | Path | None) -> list[Task]:
    """Build the corpora that are not there yet; `cells` are dealt into five folds, stratified by label."""
    tasks = [make_task("pancreas", Path(example_cells_path()), work, "donor")]
    if cells is not None:
        path = work / f"{Path(cells).stem}-folds.h5ad"
        if not path.exists():
            deal_into_folds(Path(cells), path)
        tasks.append(make_task(Path(cells).stem, path, work, "fold"))
    return tasks


def deal_into_folds(cells: Path, path: Path, *, label_column: str = LABELS) -> None:
    """Write the cells with a column `fold`, dealt into five, stratified by label."""
    adata = anndata.read_h5ad(cells)
    folds = np.empty(adata.n_obs, dtype=object)
    labels = adata.obs[label_column].astype(str)
    for number, split in enumerate(cross_validation_folds(labels, num_folds=NUM_FOLDS)):
        folds[split.test] = f"fold{number + 1}"
    adata.obs["fold"] = folds
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial.h5ad")
    adata.write_h5ad(aside)
    aside.rename(path)


def make_task(name: str, cells: Path, work: Path, group_column: str, *, label_column: str = LABELS) -> Task:
    """Return a task of cells with labels and groups; its corpus is made in `work`, unless it is there."""
    corpus = work / f"{name}-corpus"
    if not (corpus / MANIFEST).exists():
        shutil.rmtree(corpus, ignore_errors=True)
        build_corpus(cells, corpus, tokenizer=ScReformerTokenizer(), obs_columns=[label_column, group_column])
    with open_count_matrix(cells) as matrix:
        labels = [str(label or "") for label in matrix.obs_column(label_column)]
        groups = sorted({str(group) for group in matrix.obs_column(group_column)})
    rare = tuple(sorted(label for label, number in Counter(labels).items() if label and number < MIN_CELLS))
    return Task(name, str(cells), str(corpus), label_column, group_column, tuple(groups), rare)


def regression_scores(
    task: Task, test_groups: Sequence[str], *, cells_per_label: int | None = None, seed: int = 0
) -> dict[str, Any]:  # Any: JSON
    """Return what a logistic regression scores in each test group, fitted to the cells that a model would train on.

    These are all cells of the other groups, or `cells_per_label` of each label, drawn by `seed` as fine-tuning does.
    """
    scores, search = {}, {}
    for group, fitted, truth in fit_regressions(task, test_groups, cells_per_label=cells_per_label, seed=seed):
        scores[group] = score_labels(fitted.predictions, truth)
        search = {"inverse_strength": fitted.inverse_strength}
    return {"groups": scores, **search}


def fit_regressions(
    task: Task, test_groups: Sequence[str], *, cells_per_label: int | None = None, seed: int = 0
) -> Iterator[tuple[str, BaselineResult, list[str]]]:
    """Yield (test group, the regression's result there, true labels), see `regression_scores`."""
    vocabulary = open_corpus(task.corpus).tokenizer().gene_vocabulary
    with open_count_matrix(task.cells, vocabulary=vocabulary) as matrix:
        counts = sparse.vstack(list(matrix.blocks(BLOCK)), format="csr")
        labels = np.array([str(label or "") for label in matrix.obs_column(task.label_column)])
        groups = np.array([str(group) for group in matrix.obs_column(task.group_column)])
        positions = matrix.map_genes(vocabulary).positions
    used = np.flatnonzero((labels != "") & ~np.isin(labels, task.rare_labels))
    features = log1p_cp10k(counts, gene_positions=positions)[used]
    labels, groups = labels[used], groups[used]
    train = np.flatnonzero(~np.isin(groups, test_groups))
    if cells_per_label is not None:
        train = draw_of_each_label(train, labels, cells_per_label, seed)
    for group in test_groups:
        test = np.flatnonzero(groups == group)
        fitted = logistic_regression(
            features[train],
            labels[train],
            features[test],
            labels=sorted(set(labels[train].tolist())),
            train_groups=groups[train] if task.group_column == "donor" else None,
        )
        yield group, fitted, labels[test].tolist()


def score_labels(predicted: Sequence[str], truth: Sequence[str]) -> dict[str, float]:
    """Return accuracy, macro_f1 and balanced_accuracy of label names."""
    ids = {name: index for index, name in enumerate(sorted({*predicted, *truth}))}
    arrays = [np.array([ids[name] for name in labels], dtype=np.int64) for labels in (predicted, truth)]
    return cell_type_scores(arrays[0], arrays[1])
