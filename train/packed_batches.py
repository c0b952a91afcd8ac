"""Batches as their expressed genes alone, which a GPU lays out over every gene itself.

Of 17,330 genes a cell expresses one or two thousand. Laid out on the CPU a cell is 139 KB (277 KB with the labels of
masked genes) that go through the memory of the CPU and over the bus; packed it is 3 bytes an expressed gene (4 with
labels). The Trainer's loaders pin packed batches and send them while the step before still runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

COUNTS = "counts"
LARGEST_GENE, LARGEST_TOKEN, LARGEST_LABEL = 2**15 - 1, 2**8 - 1, 2**7 - 1
IGNORED = -100  # the label of a gene that is not to be predicted

Integers = npt.NDArray[np.integer]


def can_pack(num_genes: int, vocab_size: int) -> bool:
    """Whether genes fit into 16 bits, and bins and special tokens into 8."""
    return num_genes - 1 <= LARGEST_GENE and vocab_size - 1 <= min(LARGEST_TOKEN, LARGEST_LABEL)


def pack_cells(
    counts: Integers, gene_ids: Integers, tokens: Integers, labels: Integers | None = None
) -> dict[str, Tensor]:
    """Return a packed batch: ``counts`` (B,) int32, and of all cells end to end (N,) ``gene_ids`` int16, ``input_ids``
    uint8, and ``labels`` int8 if there are any.

    Parameters
    ----------
    counts
        (B,) expressed genes of each cell, N in all.
    gene_ids, tokens
        (N,) positions in the vocabulary, and what the model sees there.
    labels
        (N,) bins to predict, -100 where there is nothing to predict.
    """
    batch = {
        COUNTS: torch.from_numpy(counts.astype(np.int32)),
        "gene_ids": torch.from_numpy(gene_ids.astype(np.int16)),
        "input_ids": torch.from_numpy(tokens.astype(np.uint8)),
    }
    if labels is not None:
        batch["labels"] = torch.from_numpy(labels.astype(np.int8))
    return batch


def expand_batch(batch: Mapping[str, Tensor], num_genes: int) -> dict[str, Tensor]:
    """Lay a packed batch out over every gene, on its device: what the collator gives of the same cells, as int64.

    Batches that are not packed, and what else a packed one holds, stay as they are. Nothing waits for the device.
    """
    if COUNTS not in batch:
        return dict(batch)
    counts, genes = batch[COUNTS], batch["gene_ids"]
    num_cells = len(counts)
    first = torch.arange(num_cells, device=genes.device) * num_genes
    places = first.repeat_interleave(counts, output_size=len(genes)) + genes

    def spread(values: Tensor, fill: int) -> Tensor:
        laid_out = torch.full((num_cells * num_genes,), fill, dtype=torch.int64, device=genes.device)
        return laid_out.scatter_(0, places, values.long()).view(num_cells, num_genes)

    expanded = {name: tensor for name, tensor in batch.items() if name not in (COUNTS, "gene_ids")}
    expanded["input_ids"] = spread(batch["input_ids"], 0)
    if "labels" in batch and batch["labels"].dtype == torch.int8:
        expanded["labels"] = spread(batch["labels"], IGNORED)
    return expanded
