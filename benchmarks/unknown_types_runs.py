"""One type left out of training, one donor to test on: how well cells of the type are told from those of others."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from screformer.annotation.unknown_types import fit_unknown_types
from screformer.benchmarks.fine_tuning_runs import Run, System, fine_tune
from screformer.benchmarks.fine_tuning_tasks import BLOCK, Task
from screformer.benchmarks.unknown_types_candidates import Cells, logit_measures, measure_candidates
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import open_corpus
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.train.cell_dataset import CellDataset
from screformer.train.corpus_columns import read_column
from screformer.train.expression_levels import as_levels, read_levels
from screformer.train.inference import predict_logits
from screformer.train.result_files import write_json

Kind = Literal["measures", "classifiers"]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MODEL, SHIPPED = "classifier", "detector"
CLASSIFIER = System("finetune-small", "finetune-small")


class LeftOut(NamedTuple):
    """A type that no training cell has, and the donor whose cells are asked about.

    Attributes
    ----------
    task
        All its labels but the one left out train, however rare.
    donor
        Not in training.
    cell_type
        Not in training either.
    folder
        For the results.
    """

    task: Task
    donor: str
    cell_type: str
    folder: str

    def result(self, kind: Kind) -> Path:
        """Return the path of a JSON."""
        return Path(self.folder) / kind / f"{self.task.name}-{self.donor}-{self.cell_type}.json"


def measure(left_out: LeftOut) -> str:
    """Fit everything that needs no network, write how well it tells the type, and return the path of the JSON."""
    cells = read_cells(left_out.task)
    is_test, is_unknown = cells.donors == left_out.donor, cells.labels == left_out.cell_type
    train = Cells(*(values[~is_test & ~is_unknown] for values in cells))
    asked = is_test & (is_unknown | np.isin(cells.labels, train.labels))
    return _measure(left_out, train, cells.levels[asked], is_unknown[asked])


def measure_other_cells(left_out: LeftOut, path: str | Path) -> str:
    """Do the same with the cells of a file as those of unknown types, beside the donor's; all types train."""
    tokenizer = open_corpus(left_out.task.corpus).tokenizer()
    with open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary) as matrix:
        mapping = matrix.map_genes(tokenizer.gene_vocabulary)
        tokens = [tokenizer.tokenize_counts(block, mapping) for block in matrix.blocks(BLOCK)]
    sizes = tokenizer.num_genes, tokenizer.num_bins
    others = [as_levels(each.indptr, each.gene_ids, each.input_ids, *sizes).astype(np.float32) for each in tokens]
    cells = read_cells(left_out.task)
    is_test = cells.donors == left_out.donor
    train = Cells(*(values[~is_test] for values in cells))
    known = cells.levels[is_test & np.isin(cells.labels, train.labels)]
    levels = sparse.vstack([known, *others], format="csr")
    return _measure(left_out, train, levels, np.arange(levels.shape[0]) >= known.shape[0])


def _measure(left_out: LeftOut, train: Cells, levels: sparse.csr_array, is_unknown: BoolArray) -> str:
    found = measure_candidates(train, levels)
    num_bins = open_corpus(left_out.task.corpus).tokenizer().num_bins
    detector = fit_unknown_types(train.levels, train.labels, groups=train.donors, num_bins=num_bins)
    scores = detector.score_levels(levels)
    found[SHIPPED] = -np.log(scores.astype(np.float64))
    facts = _describe(left_out, found, is_unknown)
    facts["share_below"] = {
        kind: {f"{level:g}": round(float((scores[chosen] < level).mean()), 4) for level in (0.01, 0.05)}
        for kind, chosen in (("known", ~is_unknown), ("unknown", is_unknown))
    }
    write_json(left_out.result("measures"), facts)
    return str(left_out.result("measures"))


def classify(left_out: LeftOut) -> str:
    """Train the classifier, write how well its softmax tells the type, and return the path of the JSON."""
    torch.set_num_threads(1)
    task = left_out.task._replace(rare_labels=(left_out.cell_type,))
    trained = fine_tune(Run(task, (left_out.donor,), left_out.cell_type, CLASSIFIER, 0, left_out.folder))
    corpus = open_corpus(task.corpus)
    model = ScReformerForCellClassification.from_pretrained(trained.output_dir).eval()
    labels = read_column(corpus, task.label_column, argument="label_column")
    is_test = read_column(corpus, task.group_column, argument="group_column") == left_out.donor
    asked = np.flatnonzero(is_test & np.isin(labels, [*model.config.label2id, left_out.cell_type]))
    logits = predict_logits(model, CellDataset(corpus, asked), progress=False).astype(np.float64)
    is_unknown = labels[asked] == left_out.cell_type
    found = {f"{MODEL}: {name}": values for name, values in logit_measures(logits).items()}
    facts = _describe(left_out, found, is_unknown)
    is_unsure = softmax(logits, axis=1).max(axis=1) < 0.5
    facts["share_below_half"] = {
        kind: round(float(is_unsure[chosen].mean()), 4)
        for kind, chosen in (("known", ~is_unknown), ("unknown", is_unknown))
    }
    write_json(left_out.result("classifiers"), facts | {"training_seconds": trained.metrics["training_seconds"]})
    shutil.rmtree(trained.output_dir)
    return str(left_out.result("classifiers"))


def read_cells(task: Task) -> Cells:
    """Return all labelled cells of a task."""
    corpus = open_corpus(task.corpus)
    tokenizer = corpus.tokenizer()
    labels = read_column(corpus, task.label_column, argument="label_column")
    donors = read_column(corpus, task.group_column, argument="group_column")
    rows = np.flatnonzero(labels != "")
    levels = read_levels(corpus, rows, tokenizer.num_genes, tokenizer.num_bins)
    return Cells(levels.astype(np.float32), labels[rows], donors[rows])


def _describe(left_out: LeftOut, strangeness: Mapping[str, FloatArray], is_unknown: BoolArray) -> dict[str, Any]:
    return {
        "task": left_out.task.name,
        "donor": left_out.donor,
        "cell_type": left_out.cell_type,
        "num_unknown": int(is_unknown.sum()),
        "num_known": int((~is_unknown).sum()),
        "auroc": {name: round(float(roc_auc_score(is_unknown, values)), 4) for name, values in strangeness.items()},
        "found_at_5_percent": {name: round(_found(values, is_unknown), 4) for name, values in strangeness.items()},
    }


def _found(values: FloatArray, is_unknown: BoolArray) -> float:
    """Return the share of unknown cells stranger than all but 5% of the known ones."""
    return float((values[is_unknown] > np.quantile(values[~is_unknown], 0.95)).mean())
