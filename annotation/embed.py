"""A vector for every cell of a file, written into a copy of it or a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from screformer.annotation.added_elements import AddedElements, FloatArray, check_key
from screformer.annotation.annotated_copy import dated
from screformer.annotation.cell_numbers import CellNumbers
from screformer.annotation.cell_source import warn_of_empty_cells
from screformer.annotation.measured_file import FileToMeasure, MeasuredFile, NewElements, measure_and_write
from screformer.annotation.processes import find_processes
from screformer.annotation.trained_model import TrainedModel, load_encoder
from screformer.modeling_screformer import ScReformerModel
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
    model: str | Path | TrainedModel[ScReformerModel],
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
    """Write `cells` with a vector for every cell: all of them, in the same order.

    As h5ad, with everything else that the file held, and new in it:

    - ``obsm["X_{key}"]``: the encoder's ``cell_embedding``, float32 (cells, hidden_size), for example for
      ``scanpy.pp.neighbors(adata, use_rep="X_screformer")`` (which takes no NaN: leave empty cells out).
    - ``uns["{key}_embedding"]``: the model, the `input`'s passport, versions and date.

    As .csv, .tsv or .parquet: a table of the vectors, and the record beside it as JSON.

    A cell without counts on known genes has a vector of NaN. A cell's vector depends on its counts alone, not on
    `batch_size` or on other cells. Blocks, resuming and several processes are as for `annotate_file`.

    Parameters
    ----------
    cells
        Raw counts in any format of `open_count_matrix`.
    model
        Folder or Hub id of a checkpoint, pretrained or fine-tuned, or one from `load_encoder`.
    output
        File to write: .h5ad, .csv, .tsv or .parquet.
    layer, gene_column, allow, batch_size, gene_space, overwrite, progress, device
        As for `annotate_file`.
    key
        What the new names are made of.

    Raises
    ------
    OSError
        `cells` or the checkpoint is not there, or `output` is (FileExistsError).
    ValueError
        The file has problems that are not allowed (see `inspect_counts`); the checkpoint is of
        another model or has another tokenizer than it was trained with; the new names are taken; an option is
        out of its range. Nothing is left of the output then.
    """
    processes = find_processes()
    options = {"layer": layer, "gene_column": gene_column, "key": key, "progress": progress}
    file = FileToMeasure.check(cells, output, allow=allow, overwrite=overwrite, **options)
    check_key(key)
    name, record_name = f"X_{key}", f"{key}_embedding"
    trained = load_encoder(model, device=device or processes.device)
    inference = BatchInference(trained.model, "cell_embedding", batch_size=batch_size, gene_space=gene_space)
    facts = {"model": trained.describe(), "gene_space": inference.gene_space}
    num_empty = 0

    def elements(measured: MeasuredFile) -> AddedElements:
        nonlocal num_empty
        num_empty = sum(int(np.isnan(values[:, 0]).sum()) for _, values in measured.numbers.read())
        columns = [f"embedding_{number}" for number in range(inference.width)]
        record = {**facts, "input": measured.source.describe_input(), "num_empty_cells": num_empty}
        blocks = partial(_named_blocks, measured.numbers, name)
        return AddedElements({}, {name: columns}, {record_name: dated(record)}, blocks)

    measured = measure_and_write(
        file,
        trained.tokenizer,
        inference,
        NewElements([], [name], [record_name]),
        task="embed",
        facts=facts,
        elements=elements,
        processes=processes,
    )
    if processes.is_main:
        warn_of_empty_cells(num_empty, measured.source.num_cells, consequence="their vectors are NaN")
    return EmbeddingSummary(
        output=file.output,
        num_cells=measured.source.num_cells,
        num_empty_cells=num_empty,
        hidden_size=inference.width,
        gene_coverage=measured.source.passport.gene_coverage,
        count_source=measured.matrix.count_source,
        gene_source=measured.matrix.gene_source,
        embedding_name=name,
    )


def _named_blocks(numbers: CellNumbers, name: str) -> Iterator[tuple[slice, Mapping[str, FloatArray]]]:
    for cells, values in numbers.read():
        yield cells, {name: values}
