"""Cells of a file, looked through once and then given to a model block by block, in the file's order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from screformer.annotation.cell_numbers import CellNumbers
from screformer.annotation.processes import Processes
from screformer.tokenization.count_matrix import BLOCKS_BETWEEN_GIVING_BACK, CountMatrix
from screformer.tokenization.freed_memory import give_back_freed_memory
from screformer.tokenization.passport import inspect_counts
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer, TokenizedCells

logger = logging.getLogger(__name__)
CELLS_PER_BLOCK = 1024
UNMATCHED_RECORDED = 100


class CellMeasure(Protocol):
    """What gives a row of numbers for each cell, such as `BatchInference`.

    Attributes
    ----------
    width
        Numbers a cell.
    """

    width: int

    def choose_batch_size(self, longest: int) -> int:
        """Return how many cells, of at most `longest` expressed genes, are measured together."""
        ...

    def __call__(
        self, rows: Sequence[Mapping[str, Any]], *, advance: Callable[[int], object] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return (cells, width)."""
        ...


class CellSource:
    """Cells that a tokenizer can read.

    All counts are looked at before the first cell is given to a model, so that a bad value in the last cell is found
    in minutes and not at the end of a long run, and what is refused does not depend on the order of cells.

    Parameters
    ----------
    matrix
        Opened; stays so.
    tokenizer
        One that keeps empty cells.
    allow
        Codes of problems to accept (see `inspect_counts`).
    progress
        Whether to show progress bars.

    Attributes
    ----------
    num_cells
        Cells of the file.
    passport
        What the file holds.
    state
        Size and time of a file, None of what is none.
    longest_cell
        The most genes with counts in a cell, whether in the vocabulary or not.

    Raises
    ------
    ValueError
        The file has problems that are not allowed.
    """

    def __init__(
        self,
        matrix: CountMatrix,
        tokenizer: ScReformerTokenizer,
        *,
        allow: Sequence[str] = (),
        progress: bool = True,
    ) -> None:
        assert tokenizer.on_empty_cells == "keep"
        self.num_cells = matrix.num_cells
        self._matrix = matrix
        self._tokenizer = tokenizer
        self._progress = progress
        self._mapping = matrix.map_genes(tokenizer.gene_vocabulary)
        self.passport = inspect_counts(matrix, tokenizer, allow=allow, progress=progress, refuse=True)
        self.state = None
        if isinstance(matrix.path, Path) and matrix.path.is_file():
            stat = matrix.path.stat()
            self.state = (stat.st_size, stat.st_mtime_ns)
        self.longest_cell = max(1, int(self.passport.genes_per_cell.most))

    def cells_per_block(self, measure: CellMeasure) -> int:
        """Return how many cells are read and measured together; `measure` chooses its batch size."""
        return max(CELLS_PER_BLOCK, measure.choose_batch_size(self.longest_cell))

    def measure(
        self,
        measure: CellMeasure,
        numbers: CellNumbers,
        *,
        task: str,
        processes: Processes | None = None,
        wanted: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Measure the cells of all blocks that `numbers` lacks; NaN for a cell without counts on known genes.

        Several processes share the blocks.

        Parameters
        ----------
        measure
            What to do with the cells.
        numbers
            Where the results go.
        task
            Name on the progress bar.
        processes
            Default: this one alone.
        wanted
            (cells,): cells to measure; the others get NaN too. Default: all.

        Raises
        ------
        ValueError
            The model gives NaN or infinity for a cell; or the batch size is ``"auto"`` and not even one cell fits.
        """
        processes = processes or Processes()
        mine = set(range(processes.rank, numbers.num_blocks, processes.num_processes))
        missing = sorted(mine - numbers.done())
        sizes = {number: numbers.rows(number).stop - numbers.rows(number).start for number in mine}
        total, found = sum(sizes.values()), sum(size for number, size in sizes.items() if number not in missing)
        show = self._progress and processes.is_main
        with tqdm(total=total, initial=found, desc=task, unit="cell", disable=not show) as bar:
            for done, number in enumerate(missing, start=1):
                cells = numbers.rows(number)
                numbers.write(
                    number, self._measure_block(measure, cells, bar, None if wanted is None else wanted[cells])
                )
                if done % BLOCKS_BETWEEN_GIVING_BACK == 0:
                    give_back_freed_memory()

    def read(
        self, cells: slice, *, wanted: npt.NDArray[np.bool_] | None = None
    ) -> tuple[npt.NDArray[np.bool_], list[dict[str, npt.NDArray[Any]]]]:
        """Return which of the `cells` are wanted and have counts on known genes, and these as corpus rows.

        Parameters
        ----------
        cells
            Of the file.
        wanted
            (cells of the slice,); default all.
        """
        tokens = self._tokenize(cells)
        has_genes = np.diff(tokens.indptr) > 0
        if wanted is not None:
            has_genes &= wanted
        return has_genes, _corpus_rows(tokens, has_genes)

    def _measure_block(
        self, measure: CellMeasure, cells: slice, bar: tqdm, wanted: npt.NDArray[np.bool_] | None
    ) -> npt.NDArray[np.float32]:
        has_genes, rows = self.read(cells, wanted=wanted)
        outputs = np.full((len(has_genes), measure.width), np.nan, dtype=np.float32)
        outputs[has_genes] = measure(rows, advance=bar.update)
        refuse_not_finite(outputs[has_genes], cells.start + np.flatnonzero(has_genes))
        bar.update(int((~has_genes).sum()))
        return outputs

    def _tokenize(self, cells: slice, chosen: npt.NDArray[np.int64] | None = None) -> TokenizedCells:
        """Return the tokens of a block, or of some of its cells, by their places in it."""
        (block,) = self._matrix.blocks(cells.stop - cells.start, start=cells.start, stop=cells.stop)
        return self._tokenizer.tokenize_counts(
            block if chosen is None else block[chosen],
            self._mapping,
            first_row=cells.start,
            allow_fractions="not-counts" in self.passport.allowed,
        )

    def read_tokens(self, cells: npt.NDArray[np.int64], *, task: str) -> Iterator[TokenizedCells]:
        """Yield the tokens of some cells, whose numbers ascend, block by block; `task` is on the progress bar."""
        with tqdm(total=len(cells), desc=task, unit="cell", disable=not self._progress) as bar:
            for start in range(0, self.num_cells, CELLS_PER_BLOCK):
                block = slice(start, min(start + CELLS_PER_BLOCK, self.num_cells))
                first, end = np.searchsorted(cells, [block.start, block.stop])
                if end > first:
                    yield self._tokenize(block, cells[first:end] - start)
                    bar.update(end - first)

    def bins_of(self, cells: npt.NDArray[np.int64], *, task: str) -> npt.NDArray[np.uint8]:
        """Return the bin of each gene of the vocabulary, (cells, num_genes), as `read_tokens`."""
        bins = np.zeros((len(cells), self._tokenizer.num_genes), dtype=np.uint8)
        start = 0
        for tokens in self.read_tokens(cells, task=task):
            lengths = np.diff(tokens.indptr)
            rows = start + np.repeat(np.arange(len(lengths)), lengths)
            bins[rows, tokens.gene_ids] = tokens.input_ids
            start += len(lengths)
        return bins

    def describe_input(self) -> dict[str, Any]:  # Any: JSON
        """Return the passport for the record, with as many of the genes that are not known as are of use there."""
        return self.passport.to_dict(max_unmatched=UNMATCHED_RECORDED)


def warn_of_empty_cells(num_empty: int, num_cells: int, *, consequence: str) -> None:
    """Log, once a file, that cells without counts on known genes get no result."""
    if num_empty:
        logger.warning("%d of %d cells have no counts on known genes: %s", num_empty, num_cells, consequence)


def _corpus_rows(tokens: TokenizedCells, chosen: npt.NDArray[np.bool_]) -> list[dict[str, npt.NDArray[Any]]]:
    """Return the chosen cells as corpus rows, which share memory with `tokens`."""
    rows = []
    for cell in np.flatnonzero(chosen):
        entries = slice(tokens.indptr[cell], tokens.indptr[cell + 1])
        rows.append({"input_ids": tokens.input_ids[entries], "gene_ids": tokens.gene_ids[entries]})
    return rows


def refuse_not_finite(outputs: npt.NDArray[np.float32], cells: npt.NDArray[np.int64]) -> None:
    """Raise ValueError if an output of a model, (cells, width), is NaN or infinite; `cells` are rows of the file."""
    is_broken = ~np.isfinite(outputs).all(axis=1)
    if is_broken.any():
        raise ValueError(
            f"model: its output for {is_broken.sum()} cells is NaN or infinite, the first is row "
            f"{int(cells[is_broken.argmax()])}. Its weights are damaged or its training diverged; use "
            "another checkpoint"
        )
