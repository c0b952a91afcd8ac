"""A trained model's outputs for many cells, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerPreTrainedModel
from screformer.train.batch_size import (
    AUTO,
    BatchSize,
    check_batch_size,
    choose_inference_batch_size,
    longest_cell,
    tokens_of,
)
from screformer.train.cell_dataset import CellBatch, CellDataset
from screformer.train.collator import CellCollator, GeneSpace
from screformer.train.cuda_graphs import GraphedForward
from screformer.train.packed_batches import expand_batch

# Cells of similar length are batched together within this many batches, so that little is padding.
BATCHES_SORTED_TOGETHER = 32

OutputName = Literal["logits", "cell_embedding"]
Rows = CellDataset | CellBatch | Sequence[Mapping[str, Any]]  # Any: lists, arrays, text


class BatchInference:
    """Gives one vector a cell, in the order of the cells; it does not depend on the batches.

    Parameters
    ----------
    model
        On the device to run on. Its training mode is the same after each call.
    output
        Which of the model's outputs: a classifier's ``"logits"`` (num_labels wide), the ``"cell_embedding"``
        (hidden_size wide), or several of them, which then stand side by side.
    batch_size
        Cells a forward pass; ``"auto"``: as many as fit into the memory that is free when the first cells come.
    gene_space
        ``"full"`` or ``"expressed"`` instead of the config's.
    cuda_graphs
        Whether a GPU replays recorded kernels, see `cuda_graphs`: for small batches of all genes.

    Raises
    ------
    ValueError
        `batch_size` is below 1, `gene_space` is neither of the two, or several outputs are to be recorded.
    """

    def __init__(
        self,
        model: ScReformerPreTrainedModel,
        output: OutputName | Sequence[OutputName],
        *,
        batch_size: BatchSize = 32,
        gene_space: GeneSpace | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        check_batch_size(batch_size)
        self.model = model
        self.outputs = [output] if isinstance(output, str) else list(output)
        if cuda_graphs and len(self.outputs) > 1:
            raise ValueError(f"cuda_graphs: one output can be recorded, got {self.outputs}; ask for them one by one")
        self.batch_size = batch_size
        self.gene_space = model.config.gene_space if gene_space is None else gene_space
        widths = {"logits": model.config.num_labels, "cell_embedding": model.config.hidden_size}
        self.width = sum(widths[name] for name in self.outputs)
        self._collator = CellCollator.from_config(model.config, gene_space=self.gene_space)
        self._compute = GraphedForward(model, self.outputs[0]) if cuda_graphs else None
        self._collator.packed = model.device.type == "cuda" and self._collator.can_pack

    def choose_batch_size(self, longest: int) -> int:
        """Return the batch size; ``"auto"`` becomes one that fits, for cells of at most `longest` expressed genes.

        Raises
        ------
        ValueError
            Not even one cell fits, or the free memory of the model's device is not known.
        """
        if self.batch_size == AUTO:
            num_tokens = tokens_of(self.model.config, self.gene_space, longest)
            self.batch_size = choose_inference_batch_size(self.model, num_tokens=num_tokens).batch_size
        return self.batch_size

    def __call__(self, rows: Rows, *, advance: Callable[[int], object] | None = None) -> npt.NDArray[np.float32]:
        """Return (cells, width).

        Parameters
        ----------
        rows
            Cells: a `CellDataset`, a `datasets.Dataset`, or any sequence of mappings with ``input_ids`` and
            ``gene_ids`` of the expressed genes.
        advance
            Called after each batch with its number of cells.

        Raises
        ------
        ValueError
            A cell has no expressed gene.
        """
        batch_size = self.choose_batch_size(longest_cell(rows)) if self.batch_size == AUTO else self.batch_size
        outputs = np.empty((len(rows), self.width), dtype=np.float32)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                # While a GPU is at one batch the next is made and sent; only then is the first one's result waited for.
                earlier: tuple[npt.NDArray[np.int64], torch.Tensor] | None = None
                for numbers, cells in batches_of_similar_length(rows, batch_size):
                    result = self._forward(self._collator(cells))
                    if earlier is not None:
                        outputs[earlier[0]] = earlier[1].cpu().numpy()
                    earlier = numbers, result
                    if advance is not None:
                        advance(len(numbers))
                if earlier is not None:
                    outputs[earlier[0]] = earlier[1].cpu().numpy()
        finally:
            self.model.train(was_training)
        return outputs

    def _forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the outputs of a batch, on the device."""
        is_cuda = self.model.device.type == "cuda"
        sent = {
            name: (tensor.pin_memory() if is_cuda else tensor).to(self.model.device, non_blocking=is_cuda)
            for name, tensor in batch.items()
        }
        expanded = expand_batch(sent, self.model.config.num_genes)
        if self._compute is not None:
            return self._compute(expanded).float()
        given = self.model(**expanded)
        return torch.cat([given[name].float() for name in self.outputs], dim=1)


def predict_probabilities(
    model: ScReformerForCellClassification,
    rows: Rows,
    *,
    batch_size: BatchSize = 32,
    gene_space: GeneSpace | None = None,
    progress: bool = True,
) -> npt.NDArray[np.float32]:
    """Return class probabilities (cells, classes), in the order of `rows`.

    Parameters
    ----------
    model
        A classifier, on the device to run on. Its training mode is the same afterwards.
    rows
        Cells: a `CellDataset`, a `datasets.Dataset`, or any sequence of mappings with ``input_ids`` and ``gene_ids``.
    batch_size
        Cells a forward pass; ``"auto"``: as many as fit into free memory. The probabilities do not depend on it.
    gene_space
        ``"full"`` or ``"expressed"`` instead of the config's.
    progress
        Whether to show a progress bar.
    """
    return softmax(predict_logits(model, rows, batch_size=batch_size, gene_space=gene_space, progress=progress))


def predict_logits(
    model: ScReformerForCellClassification,
    rows: Rows,
    *,
    batch_size: BatchSize = 32,
    gene_space: GeneSpace | None = None,
    progress: bool = True,
) -> npt.NDArray[np.float32]:
    """Return logits (cells, classes), in the order of `rows`; parameters as for `predict_probabilities`.

    Raises
    ------
    ValueError
        `batch_size` is below 1, or ``"auto"`` and not even one cell fits; or a cell has no expressed gene.
    """
    inference = BatchInference(model, "logits", batch_size=batch_size, gene_space=gene_space)
    with tqdm(total=len(rows), unit="cell", disable=not progress) as bar:
        return inference(rows, advance=bar.update)


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return class probabilities of logits (cells, classes)."""
    return torch.from_numpy(logits).softmax(dim=-1).numpy()


def batches_of_similar_length(
    rows: Rows, batch_size: int
) -> Iterator[tuple[npt.NDArray[np.int64], CellBatch | list[Mapping[str, Any]]]]:
    """Give (row numbers, rows) of each batch; the longest cells of a window come first, to fail early if at all."""
    window = batch_size * BATCHES_SORTED_TOGETHER
    for start in range(0, len(rows), window):
        numbers = np.arange(start, min(start + window, len(rows)))
        if isinstance(rows, CellDataset):
            lengths, cells = rows.lengths_of(numbers), []
        else:
            cells = _fetch(rows, numbers.tolist())
            lengths = np.array([len(cell["gene_ids"]) for cell in cells])
        order = np.argsort(-lengths, kind="stable")
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            if isinstance(rows, CellDataset):
                yield numbers[places], rows.__getitems__(numbers[places])
            else:
                yield numbers[places], [cells[place] for place in places]


def _fetch(rows: CellBatch | Sequence[Mapping[str, Any]], numbers: list[int]) -> list[Mapping[str, Any]]:
    # A `datasets.Dataset` fetches many rows at once much faster than one by one.
    fetch = getattr(rows, "__getitems__", None)
    return list(fetch(numbers)) if fetch is not None else [rows[number] for number in numbers]
