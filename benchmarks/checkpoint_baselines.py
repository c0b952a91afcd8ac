"""Majority class and logistic regression beside a checkpoint: its own training cells, its own test cells."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from screformer.benchmarks.comparison_statistics import mcnemar
from screformer.benchmarks.simple_baselines import simple_baselines
from screformer.model_cards.comparison import PAIRED
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.overlap import tokenizer_of
from screformer.train.evaluate import PREDICTIONS_FILE
from screformer.train.metrics import classification_metrics
from screformer.train.result_files import read_json
from screformer.train.splits import Split

Json = dict[str, Any]


def score_baselines(cells: str | Path, checkpoint: str | Path, label_names: list[str], *, seed: int) -> dict[str, Json]:
    """Return the scores of majority class and logistic regression on a classifier's own split.

    Parameters
    ----------
    cells
        Raw counts of the cells that the classifier was trained and tested on, with their labels.
    checkpoint
        Folder with ``splits.json`` and the tokenizer.
    label_names
        Of the classifier, in its order. Cells with other labels are left out, as `evaluate_checkpoint` does.
    seed
        Of the search for the regression's penalty.

    Returns
    -------
    Name -> metrics as of `classification_metrics`, with ``seconds`` and ``inverse_strength``; and ``paired`` where the
    folder has the classifier's ``predictions.tsv`` of the same cells: on how many of them it alone is right, the
    baseline alone, and McNemar's exact p-value of the two.

    Raises
    ------
    OSError
        There is no ``splits.json``.
    ValueError
        The file lacks cells or a column of the split.
    """
    folder = Path(checkpoint)
    parts = read_json(folder / "splits.json")
    with open_count_matrix(cells) as matrix:
        counts = sparse.vstack(list(matrix.blocks(1000)), format="csr")
        labels = np.array(matrix.obs_column(parts["label_column"]), dtype=np.str_)
        column = parts["group_column"]
        groups = None if column is None else [str(group) for group in matrix.obs_column(column)]
        names = list(matrix.cell_ids)
        row_of = {name: row for row, name in enumerate(names)}
        mapping = matrix.map_genes(tokenizer_of(folder).gene_vocabulary)
        name_of_file = matrix.name
    missing = [name for part in Split._fields for name in parts[part] if name not in row_of]
    if missing:
        raise ValueError(
            f"cells: {name_of_file} lacks {len(missing):,} cells of splits.json, such as {missing[0]!r}; give the file "
            "that the corpus was made of"
        )
    is_class = np.isin(labels, label_names)  # of a label tree, labels above the classes are right or wrong of none
    rows = {part: [row_of[name] for name in parts[part] if is_class[row_of[name]]] for part in Split._fields}
    split = Split(*(np.array(rows[part], dtype=np.int64) for part in Split._fields))
    fitted = simple_baselines(
        counts,
        labels.tolist(),
        split,
        labels=label_names,
        gene_positions=mapping.positions,
        groups=groups,
        seed=seed,
    )
    said = _predictions_of(folder, [names[row] for row in split.test.tolist()])
    id_of = {name: index for index, name in enumerate(label_names)}
    truth = np.array([id_of[label] for label in labels[split.test].tolist()])
    return {
        name: classification_metrics(truth, row.probabilities, label_names)
        | {"seconds": row.seconds, "inverse_strength": row.inverse_strength}
        | ({} if said is None else {PAIRED: _paired(said, row.predictions, labels[split.test].tolist())})
        for name, row in fitted.items()
    }


def _predictions_of(folder: Path, cells: Sequence[str]) -> list[str] | None:
    """Return what a classifier said of each cell; None if it is not known of all."""
    path = folder / PREDICTIONS_FILE
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        said = {row["cell_id"]: row["predicted"] for row in csv.DictReader(file, delimiter="\t")}
    return [said[cell] for cell in cells] if said.keys() >= set(cells) else None


def _paired(model: Sequence[str], baseline: Sequence[str], truth: Sequence[str]) -> Json:
    triples = list(zip(model, baseline, truth, strict=True))
    only_model = sum(ours == right != theirs for ours, theirs, right in triples)
    only_baseline = sum(theirs == right != ours for ours, theirs, right in triples)
    return {
        "only_model_right": only_model,
        "only_baseline_right": only_baseline,
        "p_value": mcnemar(only_model, only_baseline),
    }
