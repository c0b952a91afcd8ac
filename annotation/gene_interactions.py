"""Which genes attend to which, in the cells of each type: a trained model's own relations between genes.

Attention is a relation that the model computes with, no proof of biology: `screformer benchmark attention-interactions`
says how far it tells known interactions from other pairs, beside how often genes are expressed at all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_matrix

from screformer.annotation.calibration import LabelReader
from screformer.annotation.cell_numbers import NumbersInMemory
from screformer.annotation.cell_source import CELLS_PER_BLOCK, CellSource
from screformer.annotation.interaction_sums import NO_TYPE, Int64Array, InteractionSums
from screformer.annotation.trained_model import TrainedModel, load_classifier, load_encoder
from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerModel
from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.tokenization.passport_problems import check_allowed
from screformer.train.batch_size import BatchSize
from screformer.train.collator import GeneSpace
from screformer.train.inference import BatchInference

if TYPE_CHECKING:
    from anndata import AnnData

AnyModel = str | Path | TrainedModel[ScReformerModel] | TrainedModel[ScReformerForCellClassification]
Labels = npt.NDArray[np.str_]
SEED = 2022
logger = logging.getLogger(__name__)


class TypeInteractions(NamedTuple):
    """Pairs of genes in the cells of one type; sparse (G, G), row = query gene, column = key gene.

    Attributes
    ----------
    name
        The type.
    num_cells
        Cells of it.
    attention
        Attention probability, mean over all cells of the type, 0 where one of the genes is no token; pruned.
    attention_given_both
        Mean over the cells that express both genes, of the same pairs.
    cells_with_both
        How many cells these are, of all pairs; on the diagonal, cells that express the gene.
    """

    name: str
    num_cells: int
    attention: csr_matrix
    attention_given_both: csr_matrix
    cells_with_both: csr_matrix


@dataclass(frozen=True)
class GeneInteractions:
    """What `find_gene_interactions` found.

    Attributes
    ----------
    genes
        int64 (G,): positions in the vocabulary, rising.
    ensembl_ids, symbols
        Of these genes.
    types
        By name.
    record
        Settings, model and input, as JSON values.
    """

    genes: Int64Array
    ensembl_ids: list[str]
    symbols: list[str]
    types: list[TypeInteractions]
    record: dict[str, Any]

    def table(self, of_type: TypeInteractions) -> pd.DataFrame:
        """Return a row for each ordered pair of genes, the highest mean attention first."""
        pairs = of_type.attention.tocoo()
        order = np.argsort(-pairs.data, kind="stable")
        query, key = pairs.row[order], pairs.col[order]

        def at_pairs(matrix: csr_matrix) -> npt.NDArray[Any]:
            return np.asarray(matrix[query, key]).ravel()

        def named(codes: npt.NDArray[np.int64], names: Sequence[str]) -> pd.Categorical:
            of_name, categories = pd.factorize(np.array(names, dtype=object))
            return pd.Categorical.from_codes(of_name[codes], categories)

        type_names = [one.name for one in self.types]
        return pd.DataFrame(
            {
                "cell_type": named(np.full(len(order), type_names.index(of_type.name)), type_names),
                "query_gene": named(query, self.ensembl_ids),
                "query_symbol": named(query, self.symbols),
                "key_gene": named(key, self.ensembl_ids),
                "key_symbol": named(key, self.symbols),
                "mean_attention": pairs.data[order].astype(np.float32),
                "attention_given_both": at_pairs(of_type.attention_given_both).astype(np.float32),
                "cells_with_both": at_pairs(of_type.cells_with_both).astype(np.int32),
            }
        )


def find_gene_interactions(
    cells: str | Path | AnnData,
    model: AnyModel,
    *,
    label_column: str | None = None,
    genes: Sequence[str] | None = None,
    max_genes: int = 2000,
    min_mass: float = 1e-6,
    attention_layers: Sequence[int] | None = None,
    max_cells: int | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    allow: Sequence[str] = (),
    batch_size: BatchSize = 32,
    gene_space: GeneSpace | None = None,
    progress: bool = True,
    device: str | None = None,
) -> GeneInteractions:
    """Return the attention that each gene gives each other gene, a mean over the cells of every type.

    It is the probability that the model computes with: over all hash rounds, mean over heads and layers. A gene's
    attention to all tokens of a cell sums to 1; what goes to genes that are not asked for is not shown.

    With G genes and T types, at most 20 G^2 T bytes are held (32 with all genes as tokens), sparse: 80 MB a type with
    2,000 genes, however many cells there are and however long. The cell in work takes some hundred megabytes.

    Parameters
    ----------
    cells
        Raw counts in any format of `open_count_matrix`, or an AnnData object.
    model
        Folder or Hub id of a checkpoint, or a loaded one; without `label_column` it must be a fine-tuned classifier.
    label_column
        Column of `obs` with the types; cells without one are left out. None: the model's own labels.
    genes
        Ensembl ids or symbols: only pairs among these.
    max_genes
        Without `genes`: those that the most of the cells express, so many.
    min_mass
        Pairs whose mean attention in a type is lower are left out there.
    attention_layers
        Numbers of the model's layers, from 0; None: all. To see each by itself, ask for one at a time.
    max_cells
        The most cells of a type, drawn at random.
    layer, gene_column, allow, batch_size, gene_space, progress, device
        As for `annotate_file`. The result does not depend on the batch size.

    Raises
    ------
    OSError
        `cells` or the checkpoint is not there.
    ValueError
        An option is out of its range; a gene or a column is not known; no cell is left; or as for `annotate_file`.
    """
    _check_options(genes, max_genes, min_mass, max_cells)
    allowed = check_allowed(allow)
    trained, encoder = _load(model, label_column, device)
    vocabulary = trained.tokenizer.gene_vocabulary
    positions = None if genes is None else find_genes(genes, vocabulary)
    with open_count_matrix(cells, layer=layer, gene_column=gene_column, vocabulary=vocabulary, allow=allowed) as matrix:
        if label_column is not None:
            matrix.obs_column(label_column, stop=1)  # before anything is computed
        source = CellSource(matrix, trained.tokenizer, allow=allowed, progress=progress)
        inference: dict[str, Any] = {"batch_size": batch_size, "gene_space": gene_space}
        labels = _read_labels(matrix, label_column) if label_column else _predict_labels(source, trained, inference)
        names, types = _types_of_cells(labels, max_cells, label_column)
        if positions is None:
            positions = most_expressed_genes(source, types != NO_TYPE, len(vocabulary), max_genes)
        sums = InteractionSums(encoder, positions, len(names), layers=attention_layers, **inference)
        sums.add_all(source, types, progress=progress)
        settings = {
            "label_column": label_column, "num_genes": len(positions), "genes_given": genes is not None,
            "min_mass": min_mass, "attention_layers": sums.layers, "max_cells": max_cells, "seed": SEED,
            "gene_space": sums.gene_space,
        }  # fmt: skip
        record = {"model": trained.describe(), "settings": settings, "input": source.describe_input()}
    return GeneInteractions(
        genes=positions,
        ensembl_ids=[vocabulary.ensembl_ids[gene] for gene in positions],
        symbols=[vocabulary.symbols[gene] for gene in positions],
        types=[_finish_type(sums, index, name, min_mass) for index, name in enumerate(names) if sums.num_cells[index]],
        record=record,
    )


def find_genes(names: Sequence[str], vocabulary: GeneVocabulary) -> Int64Array:
    """Return the positions of genes in the vocabulary, rising.

    Raises
    ------
    ValueError
        A name is not known, or fewer than two genes are left.
    """
    positions = vocabulary.map_names(list(names)).positions.astype(np.int64)
    unknown = [name for name, position in zip(names, positions, strict=True) if position < 0]
    if unknown:
        raise ValueError(
            f"genes: the model does not know {', '.join(unknown[:5])}{', ...' if unknown[5:] else ''} "
            f"({len(unknown)} of {len(names)}); give Ensembl ids or symbols of its vocabulary, {vocabulary.name}"
        )
    found = np.unique(positions)
    if len(found) < 2:
        raise ValueError(f"genes: at least two are needed for a pair, got {list(names)}")
    return found


def most_expressed_genes(
    source: CellSource, wanted: npt.NDArray[np.bool_], num_genes: int, max_genes: int
) -> Int64Array:
    """Return the genes that the most of the `wanted` cells (cells,) express, at most `max_genes`, rising."""
    num_expressing = np.zeros(num_genes, dtype=np.int64)
    for first in range(0, source.num_cells, CELLS_PER_BLOCK):
        cells = slice(first, min(first + CELLS_PER_BLOCK, source.num_cells))
        if wanted[cells].any():
            for row in source.read(cells, wanted=wanted[cells])[1]:
                num_expressing[row["gene_ids"]] += 1
    order = np.argsort(-num_expressing, kind="stable")[:max_genes]
    return np.sort(order[num_expressing[order] > 0])


def _load(
    model: AnyModel, label_column: str | None, device: str | None
) -> tuple[TrainedModel[Any], ScReformerModel]:  # Any: either kind
    """Return the checkpoint, a classifier where that must name the types, and its encoder."""
    given: Any = model
    trained: TrainedModel[Any] = (load_encoder if label_column else load_classifier)(given, device=device)
    if isinstance(trained.model, ScReformerForCellClassification):
        return trained, trained.model.screformer
    if not label_column:
        raise ValueError("label_column: name a column of obs, or give a fine-tuned classifier, which names the types")
    return trained, trained.model


def _check_options(genes: Sequence[str] | None, max_genes: int, min_mass: float, max_cells: int | None) -> None:
    if isinstance(genes, str):
        raise ValueError(f"genes: a list of names is needed, got the text {genes!r}")
    if max_genes < 2:
        raise ValueError(f"max_genes got {max_genes}; at least 2 are needed for a pair")
    if not 0 <= min_mass < 1:
        raise ValueError(f"min_mass got {min_mass:g}; it must be at least 0 and below 1, the attention of one gene")
    if max_cells is not None and max_cells < 1:
        raise ValueError(f"max_cells got {max_cells}; it must be at least 1, or None for all cells")


def _read_labels(matrix: CountMatrix, label_column: str) -> Labels:
    return np.array([label or "" for label in matrix.obs_column(label_column)], dtype=np.str_)


def _predict_labels(source: CellSource, trained: TrainedModel[Any], options: dict[str, Any]) -> Labels:
    """Return the model's label of each cell, empty for those without counts on known genes."""
    reader, inference = LabelReader(trained.model.config), BatchInference(trained.model, "logits", **options)
    numbers = NumbersInMemory(source.num_cells, inference.width, source.cells_per_block(inference))
    source.measure(inference, numbers, task="label")
    labels = np.array([*reader.tree.labels, ""])
    parts = []
    for _, logits in numbers.read():
        is_empty = np.isnan(logits[:, 0])
        answers = reader(np.nan_to_num(logits)).answers()
        parts.append(labels[np.where(is_empty, len(labels) - 1, answers)])
    return np.concatenate(parts)


def _types_of_cells(labels: Labels, max_cells: int | None, label_column: str | None) -> tuple[list[str], Int64Array]:
    """Return the types' names, and the number of each cell's; NO_TYPE for what is left out."""
    names = sorted(set(labels.tolist()) - {""})
    if not names:
        raise ValueError(f"label_column={label_column!r}: no cell has a label; name another column")
    if num_missing := int((labels == "").sum()):
        logger.warning("%d of %d cells have no label and are left out", num_missing, len(labels))
    types = np.where(labels == "", NO_TYPE, np.searchsorted(names, labels)).astype(np.int64)
    if max_cells is not None:
        lots = np.random.default_rng(SEED).permutation(len(types))
        for index in range(len(names)):
            own = np.flatnonzero(types == index)
            types[own[np.argsort(lots[own])[max_cells:]]] = NO_TYPE
    return names, types


def _finish_type(sums: InteractionSums, index: int, name: str, min_mass: float) -> TypeInteractions:
    num_cells, both = int(sums.num_cells[index]), sums.cells_with_both[index]
    attention = sums.attention[index] / num_cells
    attention.data[attention.data < min_mass] = 0
    attention.eliminate_zeros()
    shares = both.astype(np.float64)
    shares.data = 1 / shares.data
    given_both = sums.attention_of_both[index].multiply(shares).multiply(attention > 0).tocsr()
    return TypeInteractions(name, num_cells, attention, given_both, both)
