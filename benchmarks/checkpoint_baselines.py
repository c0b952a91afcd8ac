"""Majority class and logistic regression beside a checkpoint: its own training cells, its own test cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from screformer.benchmarks.simple_baselines import simple_baselines
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.overlap import tokenizer_of
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
        Of the classifier, in its order.
    seed
        Of the search for the regression's penalty.

    Returns
    -------
    Name -> metrics as of `classification_metrics`, with ``seconds`` and ``inverse_strength``.

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
        row_of = {name: row for row, name in enumerate(matrix.cell_ids)}
        mapping = matrix.map_genes(tokenizer_of(folder).gene_vocabulary)
        name_of_file = matrix.name
    missing = [name for part in Split._fields for name in parts[part] if name not in row_of]
    if missing:
        raise ValueError(
            f"cells: {name_of_file} lacks {len(missing):,} cells of splits.json, such as {missing[0]!r}; give the file "
            "that the corpus was made of"
        )
    split = Split(*(np.array([row_of[name] for name in parts[part]]) for part in Split._fields))
    fitted = simple_baselines(
        counts,
        labels.tolist(),
        split,
        labels=label_names,
        gene_positions=mapping.positions,
        groups=groups,
        seed=seed,
    )
    id_of = {name: index for index, name in enumerate(label_names)}
    truth = np.array([id_of[label] for label in labels[split.test].tolist()])
    return {
        name: classification_metrics(truth, row.probabilities, label_names)
        | {"seconds": row.seconds, "inverse_strength": row.inverse_strength}
        for name, row in fitted.items()
    }
