"""Cells whose genes are changed in silico, and what a classifier then says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from screformer.annotation.calibration import LabelReader
from screformer.annotation.cell_source import CELLS_PER_BLOCK, refuse_not_finite
from screformer.tokenization.tokenization_screformer import TokenizedCells
from screformer.train.inference import BatchInference

Change = Literal["zero", "raise"]
GeneSet = tuple[int, ...]  # positions in the vocabulary, ascending
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]
Row = Mapping[str, npt.NDArray[Any]]  # Any: uint16 gene_ids and uint8 input_ids
SHIFTS = ("cosine_distance", "euclidean_distance", "own_probability", "labels_changed")


class BinChange(NamedTuple):
    """What happens to a gene's bin: it becomes 0 (not expressed), or rises by `bins`, up to `highest`."""

    change: Change
    bins: int
    highest: int

    def __call__(self, bins: UInt8Array) -> UInt8Array:
        """Return the new bins."""
        if self.change == "zero":
            return np.zeros_like(bins)
        return np.minimum(bins.astype(np.int64) + self.bins, self.highest).astype(np.uint8)


class ChangedCells(NamedTuple):
    """The cells in which a change is one.

    Attributes
    ----------
    cells
        Places among the chosen cells, ascending.
    bins
        (cells, genes): the new bins.
    num_emptied
        Cells besides them that would be left without any expressed gene, of which a model can say nothing.
    """

    cells: Int64Array
    bins: UInt8Array
    num_emptied: int


class CellTokens:
    """Tokens of the cells to perturb: about 8 bytes for each expressed gene of each.

    Parameters
    ----------
    blocks
        Tokens of runs of the cells. Cells without an expressed gene are left out.
    numbers
        Row of each cell in the file.
    num_genes
        Of the vocabulary.

    Attributes
    ----------
    numbers
        Rows of those that are kept.
    num_expressing
        (num_genes,): cells that express each gene.
    mean_bins
        (num_genes,): mean bin of each gene in the cells that express it, 0 where none does.
    """

    def __init__(self, blocks: Iterable[TokenizedCells], numbers: Int64Array, num_genes: int) -> None:
        parts = list(blocks)
        lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.indptr) for part in parts)])
        self._gene_ids = np.concatenate([np.zeros(0, np.uint16), *(part.gene_ids for part in parts)])
        self._bins = np.concatenate([np.zeros(0, np.uint8), *(part.input_ids for part in parts)])
        self.numbers, self._lengths = numbers[lengths > 0], lengths[lengths > 0]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._lengths)])
        shape = len(self.numbers), num_genes
        self._by_gene = sparse.csr_array((self._bins, self._gene_ids.astype(np.int32), self._starts), shape).tocsc()
        self.num_expressing = np.diff(self._by_gene.indptr).astype(np.int64)
        sums = np.bincount(self._gene_ids, weights=self._bins, minlength=num_genes)
        self.mean_bins = sums / np.maximum(self.num_expressing, 1)

    def __len__(self) -> int:
        """Count the cells."""
        return len(self.numbers)

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokens, in hexadecimal."""
        digest = hashlib.sha256()
        for values in (self._starts, self._gene_ids, self._bins):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def row(self, cell: int) -> Row:
        """Return a cell as a corpus row."""
        entries = slice(self._starts[cell], self._starts[cell + 1])
        return {"gene_ids": self._gene_ids[entries], "input_ids": self._bins[entries]}

    def changeable(self, change: BinChange) -> Int64Array:
        """Return the genes, ascending, that are changed in some cell if each is changed alone."""
        if change.change == "zero":
            return np.flatnonzero(self.num_expressing)
        at_top = np.bincount(self._gene_ids[self._bins == change.highest], minlength=len(self.num_expressing))
        return np.flatnonzero(at_top < len(self))

    def changed_by(self, genes: GeneSet, change: BinChange) -> ChangedCells:
        """Return the cells in which changing all of `genes` changes anything, and how."""
        bins = self._by_gene[:, list(genes)].toarray()
        new_bins = change(bins)
        is_emptied = (self._lengths == (bins > 0).sum(axis=1)) & ~new_bins.any(axis=1)
        is_changed = (new_bins != bins).any(axis=1) & ~is_emptied
        return ChangedCells(np.flatnonzero(is_changed), new_bins[is_changed], int(is_emptied.sum()))


def replace_bins(row: Row, genes: GeneSet, bins: UInt8Array) -> Row:
    """Return a cell in which `genes` have these bins; those with bin 0 are not in it, as in any corpus row."""
    stays, is_expressed = ~np.isin(row["gene_ids"], genes), bins > 0
    gene_ids = np.concatenate([row["gene_ids"][stays], np.array(genes, dtype=np.uint16)[is_expressed]])
    input_ids = np.concatenate([row["input_ids"][stays], bins[is_expressed]])
    order = np.argsort(gene_ids)
    return {"gene_ids": gene_ids[order], "input_ids": input_ids[order]}


class CellOutputs(NamedTuple):
    """What the model says of cells: logits and probabilities (cells, classes), embeddings (cells, hidden), answers."""

    logits: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32]
    embeddings: npt.NDArray[np.float32]
    answers: Int64Array

    def take(self, cells: Int64Array) -> CellOutputs:
        """Return those of some cells."""
        return CellOutputs(self.logits[cells], self.probabilities[cells], self.embeddings[cells], self.answers[cells])


class PerturbationMeasure:
    """Measures how far a change of genes moves cells: means over the cells that it changes.

    The columns are `SHIFTS` (cosine and Euclidean distance of the embeddings, change of the probability of a cell's own
    class, share of cells with another label), then the change of each class's probability, then of each class's logit,
    and then, of every two classes, how many cells went from the first to the second.

    Parameters
    ----------
    cells
        To be changed.
    inference
        Gives logits and cell embeddings, in this order.
    reader
        Reads the logits.
    change
        Of the bins.
    own_class
        The class whose probability is followed as the cells' own; None: of each cell the label that it has unchanged.
    advance
        Called with the number of cells after each batch.

    Attributes
    ----------
    before
        What the model says of the unchanged cells.
    num_statistics
        Columns that are means; the others are counts.
    width
        All columns.
    """

    def __init__(
        self,
        cells: CellTokens,
        inference: BatchInference,
        reader: LabelReader,
        change: BinChange,
        *,
        own_class: str | None,
        advance: Callable[[int], object] | None = None,
    ) -> None:
        self.cells, self.change = cells, change
        self._inference, self._reader = inference, reader
        self._num_classes = len(reader.class_names)
        self.num_statistics = len(SHIFTS) + 2 * self._num_classes
        self.width = self.num_statistics + self._num_classes**2
        place_of = {name: place for place, name in enumerate(reader.class_names)}
        self._class_of_label = np.array([place_of.get(label, -1) for label in reader.tree.labels])
        every = np.arange(len(cells))
        blocks = [every[start : start + CELLS_PER_BLOCK] for start in range(0, len(cells), CELLS_PER_BLOCK)]
        given = [self._outputs([cells.row(cell) for cell in block], block, advance) for block in blocks]
        self.before = CellOutputs(*(np.concatenate(values) for values in zip(*given, strict=True)))
        own = self.before.answers if own_class is None else np.full(len(cells), place_of[own_class])
        self._own = own[:, None]

    def __call__(self, genes: GeneSet, *, advance: Callable[[int], object] | None = None) -> npt.NDArray[np.float32]:
        """Return (width,); means over no cell are NaN."""
        changed = self.cells.changed_by(genes, self.change)
        totals = np.zeros(self.width)
        for start in range(0, len(changed.cells), CELLS_PER_BLOCK):
            part = slice(start, start + CELLS_PER_BLOCK)
            cells = changed.cells[part]
            pairs = zip(cells, changed.bins[part], strict=True)
            rows = [replace_bins(self.cells.row(cell), genes, bins) for cell, bins in pairs]
            totals += self._sum_shifts(cells, self._outputs(rows, cells, advance))
        totals[: self.num_statistics] /= len(changed.cells) or np.nan
        return totals.astype(np.float32)

    def _outputs(self, rows: list[Row], cells: Int64Array, advance: Callable[[int], object] | None) -> CellOutputs:
        values = self._inference(rows, advance=advance)
        refuse_not_finite(values, self.cells.numbers[cells])
        logits, embeddings = np.split(values, [self._num_classes], axis=1)
        read = self._reader(logits)
        answers = self._class_of_label[read.level_labels[:, -1]]
        return CellOutputs(logits, read.probabilities, embeddings, answers)

    def _sum_shifts(self, cells: Int64Array, after: CellOutputs) -> npt.NDArray[np.float64]:
        before = self.before.take(cells)
        old, new = before.embeddings.astype(np.float64), after.embeddings.astype(np.float64)
        lengths = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
        cosines = (old * new).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
        gains = after.probabilities.astype(np.float64) - before.probabilities
        shifts = np.array(
            [
                (1 - cosines).sum(),
                np.linalg.norm(new - old, axis=1).sum(),
                np.take_along_axis(gains, self._own[cells], axis=1).sum(),
                (after.answers != before.answers).sum(),
            ]
        )
        logits = (after.logits.astype(np.float64) - before.logits).sum(axis=0)
        pairs = np.bincount(before.answers * self._num_classes + after.answers, minlength=self._num_classes**2)
        return np.concatenate([shifts, gains.sum(axis=0), logits, pairs])
