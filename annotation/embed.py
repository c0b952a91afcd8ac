"""A vector for every cell of a file, written into a copy of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from screformer.annotation.annotated_copy import (
    add_cell_matrix,
    add_record,
    annotated_copy,
    check_format,
    check_names_free,
    check_paths,
)
from screformer.annotation.cell_source import CellSource, warn_of_empty_cells
from screformer.annotation.trained_model import load_encoder
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.passport_problems import check_allowed
from screformer.train.batch_size import BatchSize
from screformer.train.collator import GeneSpace
from screformer.train.inference import BatchInference


@dataclass(frozen=True)
class EmbeddingSummary:
    """What `embed_file` wrote.

    Attributes
    ----------
    output
        The new file.
    num_cells
        Its cells, as many as in the input.
    num_empty_cells
        Cells without counts on known genes; their vectors are NaN.
    hidden_size
        Numbers a cell.
    gene_coverage
        Share of the input's counts that fall on genes the model knows.
    count_source, gene_source
        Where in the input counts and gene names were.
    embedding_name
        The name in `obsm`.
    """

    output: Path
    num_cells: int
    num_empty_cells: int
    hidden_size: int
    gene_coverage: float
    count_source: str
    gene_source: str
    embedding_name: str

    def __str__(self) -> str:
        """Give a few readable lines."""
        return "\n".join(
            [
                f"{self.num_cells} cells, {self.hidden_size} numbers each; "
                f"{self.num_empty_cells} without counts on known genes",
                f"counts from {self.count_source}, genes by {self.gene_source}; "
                f"{self.gene_coverage:.1%} of the counts are on genes that the model knows",
                f"{self.output}: obsm[{self.embedding_name!r}]",
            ]
        )


def embed_file(
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
) -> EmbeddingSummary:
    """Write a copy of `cells` with a vector for every cell.

    The copy has the same cells in the same order, and everything else that the file held. New in it:

    - ``obsm["X_{key}"]``: the encoder's ``cell_embedding``, float32 (cells, hidden_size), for example for
      ``scanpy.pp.neighbors(adata, use_rep="X_screformer")``.
    - ``uns["{key}_embedding"]``: the model, the `input`'s passport, versions and date.

    A cell without counts on known genes has a vector of NaN. A cell's vector depends on its counts alone, not on
    `batch_size` or on other cells. The file is read, and the vectors are written, in blocks.

    Parameters
    ----------
    cells
        h5ad file with raw counts.
    model
        Folder or Hub id of a checkpoint, pretrained or fine-tuned.
    output
        h5ad file to write.
    layer, gene_column, allow, batch_size, gene_space, overwrite, progress, device
        As for `annotate_file`.
    key
        What the new names are made of.

    Raises
    ------
    OSError
        `cells` or the checkpoint is not there, or `output` is (FileExistsError).
    ValueError
        The file is not h5ad, or has problems that are not allowed (see `inspect_counts`); the checkpoint is of
        another model or has another tokenizer than it was trained with; the new names are taken; an option is
        out of its range. Nothing is left of the output then.
    """
    allowed = check_allowed(allow)
    source_path, target = check_paths(cells, output, overwrite=overwrite)
    name, record_name = f"X_{key}", f"{key}_embedding"
    trained = load_encoder(model, device=device)
    inference = BatchInference(trained.model, "cell_embedding", batch_size=batch_size, gene_space=gene_space)
    vocabulary = trained.tokenizer.gene_vocabulary
    with open_count_matrix(
        source_path, layer=layer, gene_column=gene_column, vocabulary=vocabulary, allow=allowed
    ) as matrix:
        check_format(matrix)
        check_names_free(source_path, key, obsm=[name], uns=[record_name], overwrite=overwrite)
        source = CellSource(matrix, trained.tokenizer, allow=allowed, progress=progress)
        num_empty = 0
        with annotated_copy(source_path, target) as file:
            embeddings = add_cell_matrix(file, name, source.num_cells, inference.width)
            for rows, block in source.outputs(inference, task="embed"):
                embeddings[rows] = block
                num_empty += int(np.isnan(block[:, 0]).sum())
            record = {"model": trained.describe(), "gene_space": inference.gene_space}
            add_record(file, record_name, {**record, "input": source.describe_input(), "num_empty_cells": num_empty})
    warn_of_empty_cells(num_empty, source.num_cells, consequence="their vectors are NaN")
    return EmbeddingSummary(
        output=target,
        num_cells=source.num_cells,
        num_empty_cells=num_empty,
        hidden_size=inference.width,
        gene_coverage=source.passport.gene_coverage,
        count_source=matrix.count_source,
        gene_source=matrix.gene_source,
        embedding_name=name,
    )
