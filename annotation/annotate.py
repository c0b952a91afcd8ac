"""Cell types for cells: a file, written into a copy of it or a table, or an AnnData object."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from screformer.annotation.added_elements import AddedElements, add_to_anndata, check_key
from screformer.annotation.callable_module import CallableModule
from screformer.annotation.cell_annotator import AnnotationOptions, CellAnnotator, NewNames
from screformer.annotation.cell_numbers import NumbersInMemory
from screformer.annotation.cell_source import CellSource, warn_of_empty_cells
from screformer.annotation.measured_file import FileToMeasure, MeasuredFile, NewElements, measure_and_write
from screformer.annotation.processes import find_processes
from screformer.annotation.trained_model import TrainedModel, load_classifier
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.passport_problems import check_allowed
from screformer.train.batch_size import BatchSize
from screformer.train.collator import GeneSpace

if TYPE_CHECKING:
    from anndata import AnnData

NO_CONSEQUENCE = "they have no label"
Classifier = str | Path | TrainedModel[ScReformerForCellClassification]


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
    num_abstained
        Other cells that were called unknown.
    label_counts
        Cell type -> cells, the most frequent first; only types that were given.
    mean_probability
        Mean probability of the given types; NaN if no cell got one.
    gene_coverage
        Share of the input's counts that fall on genes the model knows.
    count_source, gene_source
        Where in the input counts and gene names were.
    names
        Of what is new in the file.
    seconds
        From opening the cells to the finished file.
    """

    output: Path
    num_cells: int
    num_empty_cells: int
    num_abstained: int
    label_counts: dict[str, int]
    mean_probability: float
    gene_coverage: float
    count_source: str
    gene_source: str
    names: NewNames
    seconds: float

    def __str__(self) -> str:
        """Give a few readable lines."""
        types = ", ".join(f"{name} {count}" for name, count in self.label_counts.items())
        unknown = f"; {self.num_abstained} unknown" if self.num_abstained else ""
        return "\n".join(
            [
                f"{self.num_cells} cells: {types or 'no labels'}{unknown}; "
                f"{self.num_empty_cells} without counts on known genes",
                f"counts from {self.count_source}, genes by {self.gene_source}; "
                f"{self.gene_coverage:.1%} of the counts are on genes that the model knows",
                f"{self.output}: {', '.join(f'obs[{name!r}]' for name in self.names.obs)}, "
                f"{', '.join(f'obsm[{name!r}]' for name in self.names.obsm)}",
                f"{self.num_cells / max(self.seconds, 1e-9):,.0f} cells a second, {self.seconds:,.1f} s in all",
            ]
        )


def annotate_file(
    cells: str | Path,
    model: Classifier,
    output: str | Path,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    allow: Sequence[str] = (),
    batch_size: BatchSize = 32,
    gene_space: GeneSpace | None = None,
    max_error: float | None = None,
    unknown_below: float | None = None,
    cluster_column: str | None = None,
    embeddings: bool = False,
    key: str = "screformer",
    overwrite: bool = False,
    progress: bool = True,
    device: str | None = None,
) -> AnnotationSummary:
    """Write `cells` with a cell type for every cell: all of them, in the same order.

    As h5ad, with everything else that the file held, and new in it:

    - ``obs["{key}_cell_type"]``: the answer, a categorical: the most probable type; with `max_error`, of a cell that is
      not sure enough the type above it in the model's label tree, and in the end "unknown".
    - ``obs["{key}_probability"]``: its probability, float32; of an unknown cell that of the likeliest first label.
    - ``obs["{key}_abstained"]``: whether the cell is unknown, or has no label because it has no counts on known genes.
    - With `max_error` or `unknown_below` also ``obs["{key}_best_guess"]``: the most probable type whether sure or not.
    - ``obs["{key}_unknown_p"]``, of a checkpoint that can tell: the share of cells of known types that look at least as
      strange (see `annotation.unknown_types`); near 0 for types that the model does not know.
    - ``obs["{key}_ontology_term_id"]``: the answer's id in the Cell Ontology, where it is certain; no column if that is
      so of no label.
    - Of a model with a label tree, ``obs["{key}_level_1"]`` and so on: the label at each level, from the top down the
      likeliest below the one before; where the answer ends its end again; and ``obs["{key}_level_1_probability"]``, of
      the likeliest label there.
    - ``obsm["{key}_probabilities"]``: all probabilities, float32 (cells, labels), calibrated where the checkpoint is.
    - ``obsm["X_{key}"]`` with `embeddings`: the encoder's vector of each cell, float32 (cells, hidden_size).
    - ``uns["{key}"]``: the `labels` of those columns, the model, the `input`'s passport (see `InputPassport`), versions
      and date.

    As .csv, .tsv or .parquet: a table of these, and the record beside it as JSON.

    A cell without counts on known genes has no type (NaN) and NaN probabilities. A cell's result depends on its counts
    alone, not on `batch_size` or on other cells. The cells are read in blocks and may be larger than memory. Results
    are kept in a folder beside `output` (its name ends in .partial) until all are there: a run that is stopped goes on
    where it was, but for a block, and several processes (torchrun, accelerate launch) share the blocks.

    Parameters
    ----------
    cells
        Raw counts in any format of `open_count_matrix`.
    model
        Folder or Hub id of a fine-tuned checkpoint, or one from `load_classifier`.
    output
        File to write: .h5ad, .csv, .tsv or .parquet.
    layer, gene_column
        Where counts and gene names are; found by themselves when left out (see `open_count_matrix`).
    allow
        Codes of problems of the file to accept, such as "low-coverage" (`PROBLEM_CODES`).
    batch_size
        Cells a forward pass; ``"auto"``: as many as fit into free memory.
    gene_space
        ``"full"`` or ``"expressed"`` instead of the checkpoint's.
    max_error
        Share of the answers that may be wrong, such as 0.05; None answers every cell. On cells like those that the
        checkpoint was calibrated on (see `annotation.calibration`) no more of the answers are wrong.
    unknown_below
        Cells whose ``unknown_p`` is lower are called unknown: about as large a share of cells of known types is so too.
    cluster_column
        Column of `obs` with a clustering: adds ``obs["{key}_cluster_vote"]``, the label that at least half of a
        cluster's cells have (of those with an answer; at the deepest level of the tree where one has), else "unknown",
        and ``obs["{key}_cluster_vote_share"]``. A vote depends on the other cells; it replaces no cell's own label.
    embeddings
        Whether to add the encoder's vectors.
    key
        What the new names begin with.
    overwrite
        Replace `output` if it exists, and in it all that an earlier annotation of the same `key` left, whatever its
        options. What `embed_file` wrote stays.
    progress
        Whether to show progress bars.
    device
        For example ``"cuda"``; default a GPU if there is one.

    Raises
    ------
    OSError
        `cells` or the checkpoint is not there, or `output` is (FileExistsError).
    ValueError
        The file has problems that are not allowed (see `inspect_counts`); the checkpoint has no trained classifier,
        another tokenizer than it was trained with, or no calibration where `max_error` needs it; the new names are
        taken; an option is out of its range. Nothing is left of the output then.
    """
    begin, processes = time.monotonic(), find_processes()
    options = {"layer": layer, "gene_column": gene_column, "key": key, "progress": progress}
    file = FileToMeasure.check(cells, output, allow=allow, overwrite=overwrite, **options)
    check_key(key)
    annotator = CellAnnotator(
        load_classifier(model, device=device or processes.device),
        AnnotationOptions(batch_size, gene_space, max_error, cluster_column, embeddings, unknown_below),
        key=key,
    )
    found = None

    def elements(measured: MeasuredFile) -> AddedElements:
        nonlocal found
        found = annotator.read(measured.numbers)
        return annotator.elements(found, measured.numbers, measured.matrix, measured.source, replace=overwrite)

    names = annotator.names
    measured = measure_and_write(
        file,
        annotator.trained.tokenizer,
        annotator.measure,
        NewElements(names.obs, names.obsm, [key]),
        task="annotate",
        facts=annotator.facts(),
        elements=elements,
        processes=processes,
        check=annotator.check_clusters,
    )
    assert found is not None
    if processes.is_main:
        warn_of_empty_cells(found.num_empty, measured.source.num_cells, consequence=NO_CONSEQUENCE)
    return AnnotationSummary(
        output=file.output,
        num_cells=measured.source.num_cells,
        num_empty_cells=found.num_empty,
        num_abstained=found.num_abstained,
        label_counts=annotator.count_labels(found),
        mean_probability=found.mean_probability,
        gene_coverage=measured.source.passport.gene_coverage,
        count_source=measured.matrix.count_source,
        gene_source=measured.matrix.gene_source,
        names=names,
        seconds=time.monotonic() - begin,
    )


def annotate(
    adata: AnnData,
    model: Classifier,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    allow: Sequence[str] = (),
    batch_size: BatchSize = 32,
    gene_space: GeneSpace | None = None,
    max_error: float | None = None,
    unknown_below: float | None = None,
    cluster_column: str | None = None,
    embeddings: bool = False,
    key_added: str = "screformer",
    copy: bool = False,
    progress: bool = True,
    device: str | None = None,
) -> AnnData | None:
    """Add a cell type for every cell to an AnnData object, as functions of scanpy do.

    What is added is what `annotate_file` writes. The object may be backed by a file; its counts are not changed.

    Parameters
    ----------
    adata
        Cells with raw counts in `X`, a layer or `raw`.
    model, layer, gene_column, allow, batch_size, gene_space, max_error, unknown_below, cluster_column, embeddings
        As for `annotate_file`.
    progress, device
        As for `annotate_file`.
    key_added
        What the new names begin with; what an earlier annotation of this key left in the object is replaced.
    copy
        Return a changed copy, in memory, and leave `adata` as it is.

    Returns
    -------
    AnnData or None
        The copy, if one was asked for.

    Raises
    ------
    OSError, ValueError
        As `annotate_file` does. The object is unchanged then.

    Examples
    --------
    .. code-block:: python

        adata = anndata.read_h5ad("cells.h5ad")
        screformer.annotation.annotate(adata, "quickstart/checkpoint", max_error=0.05)
        adata.obs["screformer_cell_type"].value_counts()
    """
    allowed = check_allowed(allow)
    check_key(key_added)
    annotator = CellAnnotator(
        load_classifier(model, device=device),
        AnnotationOptions(batch_size, gene_space, max_error, cluster_column, embeddings, unknown_below),
        key=key_added,
    )
    tokenizer = annotator.trained.tokenizer
    matrix = open_count_matrix(
        adata, layer=layer, gene_column=gene_column, vocabulary=tokenizer.gene_vocabulary, allow=allowed
    )
    annotator.check_clusters(matrix)
    source = CellSource(matrix, tokenizer, allow=allowed, progress=progress)
    numbers = NumbersInMemory(source.num_cells, annotator.measure.width, source.cells_per_block(annotator.measure))
    source.measure(annotator.measure, numbers, task="annotate")
    found = annotator.read(numbers)
    elements = annotator.elements(found, numbers, matrix, source, replace=True)
    target = adata if not copy else adata.to_memory() if adata.isbacked else adata.copy()
    add_to_anndata(target, elements)
    warn_of_empty_cells(found.num_empty, source.num_cells, consequence=NO_CONSEQUENCE)
    return target if copy else None


sys.modules[__name__].__class__ = CallableModule
