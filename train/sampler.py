"""The order in which training sees cells: random blocks of neighbours, shuffled inside a buffer of many blocks.

A file that is too large for memory reads fast in runs and slowly cell by cell. So blocks of consecutive cells are drawn
at random, as many as a buffer holds, and the buffer's cells are shuffled (the scheme of scDataset, D'Ascenzo and
Cultrera di Montesano 2025). A data set that is smaller than the buffer is shuffled fully.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Int64Array = npt.NDArray[np.int64]
LengthsOf = Callable[[Int64Array], Int64Array]

# By measurement, see benchmarks/results/feeding_cpu.md.
BLOCK_SIZE = 16
BUFFER_SIZE = 16_384
# Cells of similar length are looked for among those of so many batches.
BATCHES_GROUPED = 50


@dataclass(frozen=True)
class Shuffling:
    """How cells are shuffled.

    Attributes
    ----------
    block_size
        Consecutive cells that are drawn together; 1 is a full shuffle.
    buffer_size
        Cells that are shuffled among each other.
    seed
        Fixes every epoch's order.

    Raises
    ------
    ValueError
        A size is below 1, the buffer is smaller than a block, or the seed is negative.
    """

    block_size: int = BLOCK_SIZE
    buffer_size: int = BUFFER_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.block_size <= self.buffer_size:
            msg = (
                f"block_size must be at least 1 and at most buffer_size, got {self.block_size} and {self.buffer_size}; "
                "block_size=1 shuffles fully"
            )
            raise ValueError(msg)
        if self.seed < 0:
            msg = f"seed must be at least 0, got {self.seed}"
            raise ValueError(msg)


class Rank(NamedTuple):
    """Which of how many processes."""

    process: int = 0
    num_processes: int = 1


class Padding(NamedTuple):
    """Tokens of the batches that were made, and those of them that only fill cells up to their batch's longest."""

    num_tokens: int
    num_padded: int

    @property
    def share(self) -> float:
        """Padded tokens of all."""
        return self.num_padded / max(1, self.num_tokens)


class _Resumable:
    """Where an epoch begins, and how much of it has been handed out."""

    def __init__(self) -> None:
        self.epoch = 0
        self._start = 0
        self._num_given = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        if epoch != self.epoch:
            self._start = self._num_given = 0
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how much of it has been handed out; workers of a loader fetch ahead of their use."""
        return {"epoch": self.epoch, "start": self._num_given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on after what had been handed out; the cells before are not touched."""
        self.epoch, self._start = state["epoch"], state["start"]
        self._num_given = self._start

    def _begin(self) -> int:
        """Return where this iteration begins; the one after it begins at the beginning."""
        self._num_given, self._start = self._start, 0
        return self._num_given


class BlockShuffleSampler(_Resumable, Sampler[int]):
    """Gives every cell exactly once an epoch, over all ranks; blocks of neighbours stay near each other in time.

    Every rank has its own blocks (but those at the bounds between ranks), and as many cells as the others, up to one.
    Memory: 4 bytes a block (3.75 MB for 15 million cells in blocks of 16; twelve while an epoch begins) and 16 bytes a
    cell of the buffer.

    Parameters
    ----------
    num_cells
        To choose from: numbers 0 to `num_cells` - 1.
    shuffling
        Block, buffer and seed.
    rank
        This process.

    Raises
    ------
    ValueError
        There are fewer cells than ranks, or no such rank.
    """

    def __init__(self, num_cells: int, shuffling: Shuffling | None = None, *, rank: Rank | None = None) -> None:
        super().__init__()
        self.num_cells = num_cells
        self.shuffling = shuffling or Shuffling()
        self.rank = rank or Rank()
        process, num_processes = self.rank
        if not 0 <= process < num_processes:
            msg = f"rank: process must lie between 0 and num_processes - 1 = {num_processes - 1}, got {process}"
            raise ValueError(msg)
        if num_cells < num_processes:
            msg = f"num_cells={num_cells} is too few for {num_processes} processes; each needs at least one cell"
            raise ValueError(msg)
        self._first, self._last = (num_cells * number // num_processes for number in (process, process + 1))

    def __len__(self) -> int:
        return self._last - self._first

    def __iter__(self) -> Iterator[int]:
        number, skipped = divmod(self._begin(), self.shuffling.buffer_size)
        for buffer in self.buffers(first=number):
            for cell in buffer[skipped:].tolist():
                self._num_given += 1
                yield cell
            skipped = 0

    def buffers(self, *, first: int = 0, size: int | None = None) -> Iterator[Int64Array]:
        """Give the shuffled cells of each buffer, from buffer number `first` on; `size` instead of the buffer's own."""
        size = size or self.shuffling.buffer_size
        blocks = _BlockOrder(self.num_cells, self.shuffling, self.epoch)
        for number, start in enumerate(range(self._first, self._last, size)):
            if number >= first:
                cells = blocks.cells(start, min(start + size, self._last))
                yield _generator(self.shuffling.seed, self.epoch, self.rank.process, number).permutation(cells)


class CellBatchSampler(_Resumable, Sampler[list[int]]):
    """Batches of block-shuffled cells, as many on every rank.

    With `lengths_of` the batches are of similar length: within `BATCHES_GROUPED` batches of a buffer the cells are
    sorted by it, and the buffer's batches are shuffled. Every cell comes exactly once an epoch over all ranks; so that
    all have as many batches, the last two of a rank may be smaller. (Only where a rank has fewer cells than others have
    batches, which takes `batch_size` 1, it repeats one.)

    Parameters
    ----------
    num_cells
        To choose from.
    batch_size
        Cells a batch.
    shuffling
        Block, buffer and seed; the buffer is taken as whole batches.
    lengths_of
        Gives the lengths of the cells with these numbers; asked a buffer at a time.
    rank
        This process.
    drop_last
        Leave out batches that are not full.

    Attributes
    ----------
    padding
        Of the batches that were made since the sampler was; counted with `lengths_of` only.

    Raises
    ------
    ValueError
        `batch_size` is below 1, there are too few cells for the ranks, or for one batch with `drop_last`.
    """

    def __init__(
        self,
        num_cells: int,
        batch_size: int,
        shuffling: Shuffling | None = None,
        *,
        lengths_of: LengthsOf | None = None,
        rank: Rank | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            msg = f"batch_size must be at least 1, got {batch_size}"
            raise ValueError(msg)
        self._cells = BlockShuffleSampler(num_cells, shuffling, rank=rank)
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.padding = Padding(0, 0)
        self._lengths_of = lengths_of
        self._batches_a_buffer = max(1, self._cells.shuffling.buffer_size // batch_size)
        num_processes = self._cells.rank.num_processes
        if drop_last:
            self._num_batches = num_cells // num_processes // batch_size
        else:
            self._num_batches = _ceil_divide(_ceil_divide(num_cells, num_processes), batch_size)
        if not self._num_batches:
            msg = (
                f"drop_last leaves no batch of batch_size={batch_size} for {num_processes} processes with {num_cells} "
                "cells; choose a smaller batch_size"
            )
            raise ValueError(msg)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        self._cells.set_epoch(self.epoch)
        size = self._batches_a_buffer * self.batch_size
        last = _ceil_divide(len(self._cells), size) - 1
        start = self._begin()
        first = min(start // self._batches_a_buffer, last)
        skipped = start - first * self._batches_a_buffer
        for number, cells in enumerate(self._cells.buffers(first=first, size=size), start=first):
            # The last buffer may have to give one batch more, or, where the rest is dropped, none.
            left = self._num_batches - number * self._batches_a_buffer
            batches = self._cut(cells, number, left if number == last else self._batches_a_buffer)
            for batch in batches[skipped:]:
                self._num_given += 1
                yield batch.tolist()
            skipped = 0

    def _cut(self, cells: Int64Array, number: int, num_batches: int) -> list[Int64Array]:
        """Return the batches of one buffer."""
        if num_batches > len(cells):
            cells = np.concatenate((cells, cells[:1]))
        bounds = np.minimum(np.arange(num_batches + 1) * self.batch_size, len(cells))
        # Where another rank has a cell more, and with it a batch more, the last full batch lends one of its own.
        bounds[max(0, num_batches - 1)] = min(bounds[max(0, num_batches - 1)], len(cells) - 1)
        if self._lengths_of is None:
            return np.split(cells, bounds[1:])[:num_batches]
        cells, lengths = self._sort(cells[: bounds[-1]])
        batches = np.split(cells, bounds[1:])[:num_batches]
        self._count_padding(lengths, bounds)
        # A smaller batch stays at the end.
        num_full = num_batches - sum(len(batch) < self.batch_size for batch in batches)
        order = self._generator(number).permutation(num_full)
        return [batches[place] for place in order] + batches[num_full:]

    def _sort(self, cells: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the cells, sorted by length within windows, and their lengths."""
        assert self._lengths_of is not None
        lengths = self._lengths_of(cells)
        windows = np.arange(len(cells)) // (BATCHES_GROUPED * self.batch_size)
        order = np.lexsort((-lengths, windows))
        return cells[order], lengths[order]

    def _count_padding(self, lengths: Int64Array, bounds: Int64Array) -> None:
        num_tokens = int((np.maximum.reduceat(lengths, bounds[:-1]) * np.diff(bounds)).sum()) if len(lengths) else 0
        num_padded = num_tokens - int(lengths.sum())
        self.padding = Padding(self.padding.num_tokens + num_tokens, self.padding.num_padded + num_padded)

    def _generator(self, number: int) -> np.random.Generator:
        return _generator(self._cells.shuffling.seed, self.epoch, self._cells.rank.process, number, 1)


class _BlockOrder:
    """All cells of an epoch as a sequence of shuffled blocks, any stretch of which can be had without the rest."""

    def __init__(self, num_cells: int, shuffling: Shuffling, epoch: int) -> None:
        self._size = shuffling.block_size
        num_blocks = _ceil_divide(num_cells, self._size)
        order = _generator(shuffling.seed, epoch).permutation(num_blocks)
        # The cells that the last block lacks, and where the blocks after it begin too early by as many.
        self._missing = num_blocks * self._size - num_cells
        self._short_end = (int(np.flatnonzero(order == num_blocks - 1)[0]) + 1) * self._size - self._missing
        self._order = order.astype(np.uint32)

    def cells(self, first: int, last: int) -> Int64Array:
        places = np.arange(first, last)
        places[places >= self._short_end] += self._missing
        blocks, offsets = np.divmod(places, self._size)
        return self._order[blocks].astype(np.int64) * self._size + offsets


def _generator(seed: int, *places: int) -> np.random.Generator:
    """Return a private generator for one thing of one epoch."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=places))


def _ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)
