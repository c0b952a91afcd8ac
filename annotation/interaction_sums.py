"""Attention between genes, summed over the cells of each type while the cells pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_matrix, csr_matrix, diags
from torch import Tensor
from tqdm.auto import tqdm

from screformer.annotation.attention_weights import AttentionCall, sum_attention, watch_attention
from screformer.annotation.cell_source import CELLS_PER_BLOCK, CellSource
from screformer.modeling_screformer import ScReformerModel
from screformer.train.batch_size import BatchSize
from screformer.train.collator import CellCollator, GeneSpace
from screformer.train.inference import BatchInference, batches_of_similar_length

NO_TYPE = -1
Int64Array = npt.NDArray[np.int64]
Rows = Sequence[Mapping[str, Any]]  # Any: tokens


class InteractionSums:
    """Sums over cells, a sparse (G, G) matrix each for every type; row = query gene, column = key gene.

    At most 12 G^2 bytes a matrix, or 8 for the numbers of cells, whatever the number of cells and the length of a cell.

    Parameters
    ----------
    encoder
        On the device to run on. Its training mode is the same after each call.
    genes
        (G,) positions in the vocabulary, rising.
    num_types
        Types of cells.
    layers
        Numbers of the layers whose mean is taken; None: all.
    batch_size, gene_space
        As for `BatchInference`.

    Attributes
    ----------
    num_cells
        (types,): cells that were added.
    attention
        Of each type: attention, mean over heads and layers, summed over cells.
    attention_of_both
        The same over the cells that express both genes.
    cells_with_both
        Of each type: how many cells express both genes; on the diagonal, the gene.

    Raises
    ------
    ValueError
        A layer that the model lacks, or as `BatchInference`.
    """

    def __init__(
        self,
        encoder: ScReformerModel,
        genes: Int64Array,
        num_types: int,
        *,
        layers: Sequence[int] | None = None,
        batch_size: BatchSize = 32,
        gene_space: GeneSpace | None = None,
    ) -> None:
        inference = BatchInference(encoder, "cell_embedding", batch_size=batch_size, gene_space=gene_space)
        self.layers = _check_layers(layers, encoder.config.num_hidden_layers)
        self.gene_space = inference.gene_space
        self.genes, self.num_cells = genes, np.zeros(num_types, dtype=np.int64)
        shape = len(genes), len(genes)
        self.attention = [csr_matrix(shape, dtype=np.float64) for _ in range(num_types)]
        self.cells_with_both = [csr_matrix(shape, dtype=np.int32) for _ in range(num_types)]
        # Where only expressed genes are tokens, there is no other attention.
        is_full = self.gene_space == "full"
        self.attention_of_both = list(self.attention) if is_full else self.attention
        self._encoder, self._choose_batch_size = encoder, inference.choose_batch_size
        self._collator = CellCollator.from_config(encoder.config, gene_space=self.gene_space)
        self._place = torch.full((encoder.config.num_genes,), -1)
        self._place[torch.from_numpy(genes)] = torch.arange(len(genes))

    def add_all(self, source: CellSource, types: Int64Array, *, progress: bool = True) -> None:
        """Add all cells of a file that have a type, (cells,); -1 is none. Cells without known counts are left out."""
        with tqdm(total=int((types != NO_TYPE).sum()), desc="interactions", unit="cell", disable=not progress) as bar:
            for first in range(0, source.num_cells, CELLS_PER_BLOCK):
                cells = slice(first, min(first + CELLS_PER_BLOCK, source.num_cells))
                wanted = types[cells] != NO_TYPE
                if wanted.any():
                    is_read, rows = source.read(cells, wanted=wanted)
                    self.add(rows, types[cells][is_read], longest=source.longest_cell, advance=bar.update)
                    bar.update(int(wanted.sum()) - len(rows))

    def add(
        self, rows: Rows, types: Int64Array, *, longest: int, advance: Callable[[int], object] | None = None
    ) -> None:
        """Add cells.

        Parameters
        ----------
        rows
            Corpus rows; their genes are in vocabulary order, as the tokenizer gives them.
        types
            (cells,): the type of each.
        longest
            The most expressed genes that any cell has, for a batch size of ``"auto"``.
        advance
            Called after each batch with its number of cells.

        Raises
        ------
        ValueError
            The model gives NaN.
        """
        was_training = self._encoder.training
        self._encoder.eval()
        try:
            with torch.inference_mode():
                for numbers, cells in batches_of_similar_length(rows, self._choose_batch_size(longest)):
                    self._add_batch(self._collator(cells), types[numbers])
                    if advance is not None:
                        advance(len(numbers))
        finally:
            self._encoder.train(was_training)

    def _add_batch(self, batch: dict[str, Tensor], types: Int64Array) -> None:
        places = self._place.expand(len(types), -1)
        if "gene_ids" in batch:
            places = torch.where(batch["attention_mask"] == 1, self._place[batch["gene_ids"]], -1)
        # [PAD] is not among the wanted places, so that what is not bin 0 there is expressed.
        is_expressed = (places >= 0) & (batch["input_ids"] > 0)
        self._count(places, is_expressed, types)
        device = self._encoder.device

        def receive(call: AttentionCall) -> None:
            for cell in range(len(call.query_key)):
                number = call.first_cell + cell
                self._add_cell(call, cell, places[number], is_expressed[number], int(types[number]))

        with watch_attention(self._encoder, self.layers, receive):
            self._encoder(**{name: tensor.to(device) for name, tensor in batch.items()})

    def _add_cell(self, call: AttentionCall, cell: int, places: Tensor, is_expressed: Tensor, type_id: int) -> None:
        of_tokens = slice(0, call.num_tokens(cell))
        is_wanted = places[of_tokens] >= 0
        sums = sum_attention(call, cell, is_wanted.to(call.query_key.device)) / len(self.layers)
        if not np.isfinite(sums.data).all():
            raise ValueError(
                f"model: its attention in layer {call.layer} is NaN or infinite. Its weights are damaged or its "
                "training diverged; use another checkpoint"
            )
        genes = places[of_tokens][is_wanted].numpy()
        self.attention[type_id] = self.attention[type_id] + self._among_genes(sums, genes)
        if self.attention_of_both is not self.attention:
            kept = diags(is_expressed[of_tokens][is_wanted].numpy().astype(np.float64))
            of_both = self._among_genes(kept @ sums @ kept, genes)
            self.attention_of_both[type_id] = self.attention_of_both[type_id] + of_both

    def _among_genes(self, sums: csr_matrix, genes: Int64Array) -> csr_matrix:
        """Return the sums of a cell's tokens, `genes` (tokens,), among all genes."""
        pairs = sums.tocoo()
        shape = len(self.genes), len(self.genes)
        return coo_matrix((pairs.data, (genes[pairs.row], genes[pairs.col])), shape=shape).tocsr()

    def _count(self, places: Tensor, is_expressed: Tensor, types: Int64Array) -> None:
        cells, tokens = (each.numpy() for each in is_expressed.nonzero(as_tuple=True))
        ones, shape = np.ones(len(cells), dtype=np.int32), (len(types), len(self.genes))
        has_gene = csr_matrix((ones, (cells, places.numpy()[cells, tokens])), shape=shape)
        for type_id in np.unique(types):
            of_type = has_gene[types == type_id]
            self.num_cells[type_id] += of_type.shape[0]
            self.cells_with_both[type_id] = self.cells_with_both[type_id] + of_type.T @ of_type


def _check_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    if layers is None:
        return list(range(num_layers))
    chosen = sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_layers:
        raise ValueError(f"attention_layers got {list(layers)}; the model has the layers 0 to {num_layers - 1}")
    return chosen
