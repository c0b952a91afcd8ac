"""How well batches are mixed: the entropy of their labels and origins, beside a full shuffle's.

Measured on labels alone, in the order that mixes worst: files one after another, in each the cells sorted by type. A
batch's entropy (bits) is that of the shares of its labels; a full shuffle's is the most that any order can expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from screformer.benchmarks.measuring import Row
from screformer.train.sampler import CellBatchSampler, LengthsOf, Shuffling

Codes = npt.NDArray[np.int64]

CELLS_A_FILE = 20_000
CELLS_A_RUN = 1000  # neighbours, as origin of a cell
BATCHES = 2000
BATCHES_AN_EPOCH = 10  # few, so that they are from many buffers


class Origins(NamedTuple):
    """What is known of each cell: its label, the file it is from, and the run of neighbours; as numbers from 0."""

    label: Codes
    file: Codes
    run: Codes


def sorted_origins(label_counts: Sequence[int], num_cells: int, *, cells_a_file: int = CELLS_A_FILE) -> Origins:
    """Return the origins of cells in files that are sorted by label, with labels as frequent as `label_counts`."""
    shares = np.cumsum(label_counts) / np.sum(label_counts)
    number = np.arange(num_cells)
    places = (number % cells_a_file + 0.5) / np.minimum(cells_a_file, num_cells)
    label = np.minimum(np.searchsorted(shares, places), len(shares) - 1)
    return Origins(label, number // cells_a_file, number // CELLS_A_RUN)


def entropies(batches: Iterable[Sequence[int]], codes: Codes) -> npt.NDArray[np.float64]:
    """Return the entropy (bits) of the codes of each batch."""
    found = []
    for batch in batches:
        _, counts = np.unique(codes[np.asarray(batch)], return_counts=True)
        shares = counts / counts.sum()
        found.append(float(-(shares * np.log2(shares)).sum()))
    return np.array(found)


def measure_shufflings(
    origins: Origins,
    block_sizes: Sequence[int],
    buffer_sizes: Sequence[int],
    *,
    batch_size: int,
    lengths_of: LengthsOf | None = None,
    num_batches: int = BATCHES,
) -> list[Row]:
    """Return a row for each block and buffer size: mean entropies of batches, and divided by a full shuffle's."""
    num_cells = len(origins.label)
    full = list(_some_batches(CellBatchSampler(num_cells, batch_size, Shuffling(1, num_cells)), num_batches))
    best = {name: float(entropies(full, codes).mean()) for name, codes in origins._asdict().items()}
    rows = []
    for block_size in block_sizes:
        for buffer_size in buffer_sizes:
            if buffer_size < block_size:
                continue
            shuffling = Shuffling(block_size, buffer_size)
            sampler = CellBatchSampler(num_cells, batch_size, shuffling, lengths_of=lengths_of)
            batches = list(_some_batches(sampler, num_batches))
            row: Row = {"block_size": block_size, "buffer_size": buffer_size, "batch_size": batch_size}
            for name, codes in origins._asdict().items():
                row[f"{name}_entropy"] = float(entropies(batches, codes).mean())
                row[f"{name}_entropy_of_full_shuffle"] = best[name]
                row[f"{name}_share"] = row[f"{name}_entropy"] / best[name] if best[name] else 1.0
            rows.append(row)
    return rows


def _some_batches(sampler: CellBatchSampler, num_batches: int) -> Iterator[list[int]]:
    """Give batches from the beginnings of as many epochs as it takes."""
    given = 0
    for epoch in range(num_batches):
        sampler.set_epoch(epoch)
        for batch in islice(sampler, min(BATCHES_AN_EPOCH, num_batches - given)):
            given += 1
            yield batch
        if given == num_batches:
            return
