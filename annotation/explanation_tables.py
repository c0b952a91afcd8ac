"""What an explanation is stored as: a table of genes, Parquet, an h5ad."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData
from scipy import sparse

from screformer.annotation.explained_cells import SomeCells
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.train.result_files import written_aside

VALUES_LAYER, CLASS_COLUMN = "values", "explained_class"


def gene_table(
    values: npt.NDArray[np.float32],
    bins: npt.NDArray[np.uint8],
    vocabulary: GeneVocabulary,
    background: npt.NDArray[np.uint8],
    regression_weights: npt.NDArray[np.float64] | None = None,
) -> pd.DataFrame:
    """Return a row a gene with a value in some cell, the one that counts most first.

    ``gene`` and ``ensembl_id``; ``mean_abs_value`` and ``mean_value`` over the cells, and ``mean_where_expressed`` over
    those that express it (NaN: none); ``sign``, 1 where high expression raises the score (the correlation of value and
    bin over the cells, or where the bin is the same in all the mean value), -1 where it lowers it; ``mean_bin`` and
    ``share_expressed`` of the cells, ``background_share_expressed``; ``regression_place``, the gene's place by a
    logistic regression's weight times the mean bin, 0 without one.

    Parameters
    ----------
    values, bins
        (cells, num_genes).
    vocabulary
        The model's genes.
    background
        (cells, num_genes): bins of the background.
    regression_weights
        (num_genes,), of a bin.
    """
    mean_abs = np.abs(values).mean(axis=0)
    genes = np.argsort(-mean_abs, kind="stable")[: int((mean_abs > 0).sum())]
    own, levels = values[:, genes].astype(np.float64), bins[:, genes].astype(np.float64)
    together = ((own - own.mean(axis=0)) * (levels - levels.mean(axis=0))).mean(axis=0)
    signs = np.sign(np.where(np.abs(together) > 1e-12, together, own.mean(axis=0)))
    num_expressed = (levels > 0).sum(axis=0)
    where_expressed = np.where(
        num_expressed > 0, (own * (levels > 0)).sum(axis=0) / np.maximum(num_expressed, 1), np.nan
    )
    places = np.zeros(len(vocabulary), dtype=np.int64)
    if regression_weights is not None:
        by_regression = np.argsort(-np.abs(regression_weights) * bins.mean(axis=0), kind="stable")
        places[by_regression] = np.arange(1, len(places) + 1)
    return pd.DataFrame(
        {
            "gene": [vocabulary.symbols[gene] for gene in genes],
            "ensembl_id": [vocabulary.ensembl_ids[gene] for gene in genes],
            "mean_abs_value": mean_abs[genes],
            "mean_value": own.mean(axis=0),
            "mean_where_expressed": where_expressed,
            "sign": signs.astype(int),
            "mean_bin": levels.mean(axis=0),
            "share_expressed": (levels > 0).mean(axis=0),
            "background_share_expressed": (background[:, genes] > 0).mean(axis=0),
            "regression_place": places[genes],
        }
    )


def write_parquet(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Write the tables of all classes as one, with a column ``class`` and a column ``rank``."""
    whole = pd.concat(
        [
            of_class.assign(rank=np.arange(1, len(of_class) + 1)).assign(**{"class": name})
            for name, of_class in tables.items()
        ],
        ignore_index=True,
    )
    with written_aside(path) as aside:
        whole.to_parquet(aside, index=False)


def write_h5ad(
    cells: Mapping[str, SomeCells],
    values: Mapping[str, npt.NDArray[np.float32]],
    vocabulary: GeneVocabulary,
    record: dict[str, Any],
    path: Path,
) -> None:
    """Write the explained cells: ``X`` are their bins, the layer ``values`` what each gene adds to the class's score.

    ``obs["explained_class"]`` says which class, ``obs["label"]`` what the cell is; a cell of two classes is in two
    rows. ``varm["mean_abs_value"]`` and ``varm["mean_value"]`` have a column a class.
    """
    parts = []
    for name, own in cells.items():
        obs = pd.DataFrame(
            {CLASS_COLUMN: name, "label": own.labels.astype(object), "cell": own.names, "row": own.rows},
            index=[f"{cell} {name}" for cell in own.names],
        )
        parts.append((obs, sparse.csr_matrix(own.bins), sparse.csr_matrix(values[name])))
    obs = pd.concat([part[0] for part in parts])
    var = pd.DataFrame({"symbol": list(vocabulary.symbols)}, index=list(vocabulary.ensembl_ids))
    adata = AnnData(
        sparse.vstack([part[1] for part in parts], format="csr"), obs=obs.astype({CLASS_COLUMN: "category"}), var=var
    )
    adata.layers[VALUES_LAYER] = sparse.vstack([part[2] for part in parts], format="csr")
    for key, measure in (
        ("mean_abs_value", lambda each: np.abs(each).mean(axis=0)),
        ("mean_value", lambda each: each.mean(axis=0)),
    ):
        adata.varm[key] = pd.DataFrame({name: measure(each) for name, each in values.items()}, index=var.index)
    adata.uns["explanation"] = record
    with written_aside(path) as aside:
        adata.write_h5ad(aside, compression="gzip")
