"""What training and evaluation read of a corpus beside its tokens: columns, cell names, and facts for the record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from screformer.tokenization.corpus import Corpus

TOKEN_COLUMNS = ("input_ids", "gene_ids")
NOT_TEXT = (*TOKEN_COLUMNS, "cell_hash")
# Of what a manifest says of a file.
OF_A_SOURCE = (
    "name", "sha256", "num_cells", "num_kept", "num_genes", "format", "count_source", "gene_source", "gene_coverage",
)  # fmt: skip


def read_column(corpus: Corpus, column: str, *, argument: str) -> npt.NDArray[np.str_]:
    """Return a text column of the corpus, "" where a value is missing.

    Raises
    ------
    ValueError
        The corpus has no such column; `argument` is named as the one to change.
    """
    known = [name for name in corpus.dataset.column_names if name not in NOT_TEXT]
    if column not in known:
        raise ValueError(
            f"{argument}: the corpus {corpus.folder} has no column {column!r}; it has {known}. Name one of these, or "
            "build the corpus with that obs column"
        )
    return np.array(["" if value is None else value for value in corpus.dataset[column]], dtype=np.str_)


def name_cells(corpus: Corpus) -> npt.NDArray[np.str_]:
    """Return a unique name for each cell: its id, or ``source/id`` where several files have the same ids.

    Raises
    ------
    ValueError
        One file has an id twice.
    """
    cell_ids = read_column(corpus, "cell_id", argument="corpus")
    if len(set(cell_ids.tolist())) == len(cell_ids):
        return cell_ids
    sources = [corpus.manifest["sources"][shard["source"]]["name"] for shard in corpus.manifest["shards"]]
    repeats = [shard["num_cells"] for shard in corpus.manifest["shards"]]
    names = [f"{source}/{cell_id}" for source, cell_id in zip(np.repeat(sources, repeats), cell_ids, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(
            f"corpus: in {corpus.folder} a file has the same cell id twice; make obs_names unique "
            "(adata.obs_names_make_unique()) and build the corpus again"
        )
    return np.array(names, dtype=np.str_)


def describe_corpus(corpus: Corpus) -> dict[str, Any]:
    """Return what identifies the corpus, for JSON: cells, tokenizer, and its sources with their passports in brief."""
    return {
        "num_cells": len(corpus),
        "tokenizer_fingerprint": corpus.manifest["tokenizer"]["fingerprint"],
        "vocabulary": corpus.manifest["tokenizer"]["vocabulary"],
        "sources": [_describe_source(source) for source in corpus.manifest["sources"]],
        **({"split": corpus.manifest["split"]} if corpus.has_split else {}),
    }


def _describe_source(source: Mapping[str, Any]) -> dict[str, Any]:
    passport = source["passport"]
    return {key: source[key] for key in OF_A_SOURCE} | {
        "dropped": source["dropped"],
        "allowed": passport["allowed"],
        "organism": passport["organism"]["name"],
        "gene_ids": passport["gene_ids"]["type"],
        "median_genes_per_cell": passport["genes_per_cell"]["median"],
        "median_counts_per_cell": passport["counts_per_cell"]["median"],
    }
