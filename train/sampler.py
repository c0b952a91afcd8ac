"""The order in which training sees cells: random blocks of neighbours, shuffled inside a buffer of many blocks.

A file that is too large for memory reads fast in runs and slowly cell by cell. So blocks of consecutive cells are drawn
at random, as many as a buffer holds, and the buffer's cells are shuffled (the scheme of scDataset, D'Ascenzo and
Cultrera di Montesano 2025). A data set that is smaller than the buffer is shuffled fully.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
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
# Cells of similar length are looked for among those of so many steps.
BATCHES_GROUPED = 50

# What a generator is for, beside the number of the buffer.
_CELLS, _STEPS = 0, 1


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


class BatchOfCells(list[int]):
    """Numbers of the cells of one batch, with what their collator must know.

    Attributes
    ----------
    epoch
        In which they are drawn; masks follow from it.
    num_counted
        Cells, from the first on, that count; what comes after them only keeps a process busy that has no cell in this
        step.
    """

    def __init__(self, cells: Iterable[int] = (), *, epoch: int = 0, num_counted: int = 0) -> None:
        super().__init__(cells)
        self.epoch = epoch
        self.num_counted = num_counted


class BlockShuffleSampler(_Resumable, Sampler[int]):
    """Gives every cell exactly once an epoch; blocks of neighbours stay near each other in time.

    Memory: 4 bytes a block (3.75 MB for 15 million cells in blocks of 16; twelve while an epoch begins) and 16 bytes a
    cell of the buffer.

    Parameters
    ----------
    num_cells
        To choose from: numbers 0 to `num_cells` - 1.
    shuffling
        Block, buffer and seed.

    Raises
    ------
    ValueError
        There are no cells.
    """

    def __init__(self, num_cells: int, shuffling: Shuffling | None = None) -> None:
        super().__init__()
        if num_cells < 1:
            msg = f"num_cells must be at least 1, got {num_cells}; there is nothing to shuffle"
            raise ValueError(msg)
        self.num_cells = num_cells
        self.shuffling = shuffling or Shuffling()

    def __len__(self) -> int:
        return self.num_cells

    def __iter__(self) -> Iterator[int]:
        number, skipped = divmod(self._begin(), self.shuffling.buffer_size)
        for buffer in self.buffers(first=number):
            for cell in buffer[skipped:].tolist():
                self._num_given += 1
                yield cell
            skipped = 0

    def buffers(self, *, first: int = 0) -> Iterator[Int64Array]:
        """Give the shuffled cells of each buffer, from buffer number `first` on."""
        order = _BlockOrder(self.num_cells, self.shuffling, self.epoch)
        for places in order.buffers(first, self.shuffling.buffer_size):
            yield order.cells(places)


class CellBatchSampler(_Resumable, Sampler[list[int]]):
    """Batches of block-shuffled cells, shared out over processes step by step.

    All processes together take at every step the cells that one process with batches as many times larger takes: the
    order of the cells, and with it what is learned, follows from the seed and not from how many share the work. Of a
    step's cells, those of blocks that stand together in the order go to one process, so that most blocks are read by
    one process only.

    With `lengths_of` the cells of a step are of similar length: within `BATCHES_GROUPED` steps of a buffer the cells
    are sorted by it, and the buffer's steps are shuffled.

    Every cell counts exactly once an epoch. The last step may be smaller; a process that it leaves without a cell gets
    one that does not count.

    Parameters
    ----------
    num_cells
        To choose from.
    batch_size
        Cells a batch, for each process.
    shuffling
        Block, buffer and seed. With `lengths_of` the buffer is taken as whole steps.
    lengths_of
        Gives the lengths of the cells with these numbers; asked a buffer at a time.
    rank
        This process.
    drop_last
        Leave out a last step that is not full.

    Attributes
    ----------
    padding
        Of this process's batches since the sampler was made; counted with `lengths_of` only.

    Raises
    ------
    ValueError
        `batch_size` is below 1, there is no such rank, no cell, or too few for one step with `drop_last`.
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
        self.rank = rank or Rank()
        self._step_size = batch_size * self.rank.num_processes
        _check_shares(num_cells, batch_size, self.rank, drop_last=drop_last)
        self.num_cells = num_cells
        self.batch_size = batch_size
        self.shuffling = shuffling or Shuffling()
        self.drop_last = drop_last
        self.padding = Padding(0, 0)
        self._lengths_of = lengths_of

    def __len__(self) -> int:
        return self.num_cells // self._step_size if self.drop_last else _ceil_divide(self.num_cells, self._step_size)

    def __iter__(self) -> Iterator[BatchOfCells]:
        order = _BlockOrder(self.num_cells, self.shuffling, self.epoch)
        start = self._begin()
        steps = self._steps(order, start) if self._lengths_of is None else self._grouped_steps(order, start)
        for step in itertools.islice(steps, len(self) - start):
            self._num_given += 1
            own = self._share(step.places)
            if step.lengths is not None:
                self._count_padding(step.lengths[own])
            # Without a cell of its own a process still takes part in the step, with one of the others'.
            given = own if len(own) else np.zeros(1, dtype=np.int64)
            cells = order.cells(step.places[given]).tolist()
            yield BatchOfCells(cells, epoch=self.epoch, num_counted=len(own))

    def _steps(self, order: _BlockOrder, start: int) -> Iterator[_Step]:
        """Give each step, from number `start` on: the next cells of the order."""
        number, skipped = divmod(start * self._step_size, self.shuffling.buffer_size)
        waiting = np.empty(0, dtype=np.int64)
        for buffer in order.buffers(number, self.shuffling.buffer_size):
            waiting = np.concatenate((waiting, buffer[skipped:]))
            skipped = 0
            num_full = len(waiting) // self._step_size
            *steps, waiting = np.split(waiting, np.arange(1, num_full + 1) * self._step_size)
            yield from (_Step(places) for places in steps)
        if len(waiting):
            yield _Step(waiting)

    def _grouped_steps(self, order: _BlockOrder, start: int) -> Iterator[_Step]:
        """Give each step, from number `start` on: cells of similar length, from whole steps of a buffer."""
        steps_a_buffer = max(1, self.shuffling.buffer_size // self._step_size)
        first, skipped = divmod(start, steps_a_buffer)
        for number, places in enumerate(order.buffers(first, steps_a_buffer * self._step_size), start=first):
            num_full = len(places) // self._step_size
            if self.drop_last:
                places = places[: num_full * self._step_size]
            steps = self._sort(order, places)
            # A smaller step stays at the end.
            generator = _generator(self.shuffling.seed, self.epoch, _CELLS, number, _STEPS)
            in_order = [*generator.permutation(num_full), *range(num_full, len(steps))]
            yield from [steps[place] for place in in_order][skipped:]
            skipped = 0

    def _sort(self, order: _BlockOrder, places: Int64Array) -> list[_Step]:
        """Return the steps of a buffer, its cells sorted by length within windows."""
        assert self._lengths_of is not None
        lengths = self._lengths_of(order.cells(places))
        windows = np.arange(len(places)) // (BATCHES_GROUPED * self._step_size)
        sorted_by_length = np.lexsort((-lengths, windows))
        bounds = range(0, len(places), self._step_size)
        parts = [sorted_by_length[bound : bound + self._step_size] for bound in bounds]
        return [_Step(places[part], lengths[part]) for part in parts]

    def _share(self, places: Int64Array) -> Int64Array:
        """Return which of a step's cells are this process's."""
        process, num_processes = self.rank
        if num_processes == 1:
            return np.arange(len(places))
        first, last = (len(places) * number // num_processes for number in (process, process + 1))
        return np.argsort(places)[first:last]

    def _count_padding(self, lengths: Int64Array) -> None:
        num_tokens = int(lengths.max(initial=0)) * len(lengths)
        num_padded = num_tokens - int(lengths.sum())
        self.padding = Padding(self.padding.num_tokens + num_tokens, self.padding.num_padded + num_padded)


class _Step(NamedTuple):
    """The cells that all processes together take at once: their places in the epoch's order, and lengths if asked."""

    places: Int64Array
    lengths: Int64Array | None = None


class _BlockOrder:
    """All cells of an epoch as a sequence of shuffled blocks, any stretch of which can be had without the rest."""

    def __init__(self, num_cells: int, shuffling: Shuffling, epoch: int) -> None:
        self._num_cells, self._size = num_cells, shuffling.block_size
        self._seed, self._epoch = shuffling.seed, epoch
        num_blocks = _ceil_divide(num_cells, self._size)
        order = _generator(shuffling.seed, epoch).permutation(num_blocks)
        # The cells that the last block lacks, and where the blocks after it begin too early by as many.
        self._missing = num_blocks * self._size - num_cells
        self._short_end = (int(np.flatnonzero(order == num_blocks - 1)[0]) + 1) * self._size - self._missing
        self._order = order.astype(np.uint32)

    def buffers(self, first: int, size: int) -> Iterator[Int64Array]:
        """Give the shuffled places of each stretch of `size` cells, from stretch number `first` on."""
        for start in range(first * size, self._num_cells, size):
            places = np.arange(start, min(start + size, self._num_cells))
            yield _generator(self._seed, self._epoch, _CELLS, start // size).permutation(places)

    def cells(self, places: Int64Array) -> Int64Array:
        """Return the cells that stand at these places of the order."""
        places = np.where(places >= self._short_end, places + self._missing, places)
        blocks, offsets = np.divmod(places, self._size)
        return self._order[blocks].astype(np.int64) * self._size + offsets


def _check_shares(num_cells: int, batch_size: int, rank: Rank, *, drop_last: bool) -> None:
    """Raise ValueError unless every process gets batches."""
    if batch_size < 1:
        msg = f"batch_size must be at least 1, got {batch_size}"
        raise ValueError(msg)
    process, num_processes = rank
    if not 0 <= process < num_processes:
        msg = f"rank: process must lie between 0 and num_processes - 1 = {num_processes - 1}, got {process}"
        raise ValueError(msg)
    if num_cells < 1:
        msg = f"num_cells must be at least 1, got {num_cells}; there is nothing to train on"
        raise ValueError(msg)
    if drop_last and num_cells < batch_size * num_processes:
        msg = (
            f"drop_last leaves no batch of batch_size={batch_size} for {num_processes} processes with {num_cells} "
            "cells; choose a smaller batch_size"
        )
        raise ValueError(msg)


def _generator(seed: int, *places: int) -> np.random.Generator:
    """Return a private generator for one thing of one epoch."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=places))


def _ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)
