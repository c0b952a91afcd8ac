"""Tokenized cells as a torch data set: views of the corpus's files, which stay on disk until a cell is asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch.utils.data import Dataset

from screformer.tokenization.corpus import Corpus
from screformer.train.sampler import BatchOfCells

Int64Array = npt.NDArray[np.int64]
Positions = Sequence[int] | npt.NDArray[np.integer[Any]]
Row = dict[str, Any]  # Any: arrays, and text of the other columns

TOKEN_TYPES = {"input_ids": pa.uint8(), "gene_ids": pa.uint16()}
CELLS_READ_AT_ONCE = 1024
LENGTHS_READ_AT_ONCE = 1 << 20
# Divisible by most numbers of processes and workers.
STREAM_SHARDS = 240


@dataclass(frozen=True)
class CellBatch:
    """Some cells, end to end in a few arrays: no Python object a gene, and none a cell but text.

    As a sequence it gives rows like those of `CellDataset`.

    Attributes
    ----------
    input_ids
        Bins of the expressed genes, uint8, cell after cell.
    gene_ids
        Their vocabulary positions, uint16, as long.
    counts
        Expressed genes of each cell (num_cells,).
    columns
        Other columns: name -> a value a cell.
    epoch
        In which a sampler drew them; None if none did.
    num_counted
        Cells, from the first on, that count in training; None if all do. See `BatchOfCells`.
    """

    input_ids: npt.NDArray[np.uint8]
    gene_ids: npt.NDArray[np.uint16]
    counts: Int64Array
    columns: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    epoch: int | None = None
    num_counted: int | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, place: int) -> Row:
        if not -len(self) <= place < len(self):
            msg = f"place must lie between {-len(self)} and {len(self) - 1}, got {place}"
            raise IndexError(msg)
        last = int(self.counts[: place % len(self) + 1].sum())
        first = last - int(self.counts[place])
        tokens = {"input_ids": self.input_ids[first:last], "gene_ids": self.gene_ids[first:last]}
        return tokens | {name: values[place] for name, values in self.columns.items()}

    def rows(self) -> Iterator[Row]:
        """Give every cell as a row."""
        bounds = np.concatenate(([0], np.cumsum(self.counts))).tolist()
        for place, (first, last) in enumerate(pairwise(bounds)):
            tokens = {"input_ids": self.input_ids[first:last], "gene_ids": self.gene_ids[first:last]}
            yield tokens | {name: values[place] for name, values in self.columns.items()}


class CellDataset(Dataset):
    """Cells of a corpus, in its order or as chosen; a `torch.utils.data.Dataset`.

    The files are mapped into memory when a cell of theirs is first asked for: what is held is pages that the system can
    drop. A copy in another process (a loader's worker, forked or spawned) maps them again by itself. The chosen row
    numbers take 4 bytes a cell (60 MB for 15 million), nothing if all are.

    Parameters
    ----------
    corpus
        Where the cells are.
    rows
        Row numbers in the corpus to take, in this order; default all.
    columns
        Text columns to give with each cell, for example ``["cell_type"]``.

    Raises
    ------
    ValueError
        A row number or a column is not in the corpus, or its files hold other types than a corpus has.
    """

    def __init__(self, corpus: Corpus, rows: Positions | None = None, *, columns: Sequence[str] = ()) -> None:
        self._files = [corpus.folder / shard["file"] for shard in corpus.manifest["shards"]]
        self._ends = np.cumsum([shard["num_cells"] for shard in corpus.manifest["shards"]]).tolist()
        self._rows = None if rows is None else _check_rows(rows, self._ends[-1])
        self._columns = tuple(columns)
        self._opened: dict[int, _Shard] = {}
        self._open(0)

    def __len__(self) -> int:
        return self._ends[-1] if self._rows is None else len(self._rows)

    def __getitem__(self, position: int) -> Row:
        """Return one cell: `input_ids` (uint8) and `gene_ids` (uint16) as views of the file, and the text columns.

        Raises
        ------
        IndexError
            There is no such cell.
        """
        if not -len(self) <= position < len(self):
            msg = f"position must lie between {-len(self)} and {len(self) - 1}, got {position}"
            raise IndexError(msg)
        part, place = self._find(int(self._rows_at([position % len(self)])[0]))
        first, last = part.offsets[place : place + 2].tolist()
        tokens = {"input_ids": part.input_ids[first:last], "gene_ids": part.gene_ids[first:last]}
        return tokens | {name: values[place].as_py() for name, values in part.columns.items()}

    def __getitems__(self, positions: Positions) -> CellBatch:
        """Return several cells, copied end to end; torch's loader asks for a batch this way."""
        found = [self._find(row) for row in self._rows_at(positions).tolist()]
        bounds = [part.offsets[place : place + 2].tolist() for part, place in found]
        input_ids = [part.input_ids[first:last] for (part, _), (first, last) in zip(found, bounds, strict=True)]
        gene_ids = [part.gene_ids[first:last] for (part, _), (first, last) in zip(found, bounds, strict=True)]
        return CellBatch(
            np.concatenate(input_ids) if found else np.empty(0, np.uint8),
            np.concatenate(gene_ids) if found else np.empty(0, np.uint16),
            np.array([last - first for first, last in bounds], dtype=np.int64),
            {name: [part.columns[name][place].as_py() for part, place in found] for name in self._columns},
            epoch=positions.epoch if isinstance(positions, BatchOfCells) else None,
            num_counted=positions.num_counted if isinstance(positions, BatchOfCells) else None,
        )

    @property
    def lengths(self) -> Int64Array:
        """Expressed genes of every cell (len(self),), from the files' offsets alone; 8 bytes a cell."""
        return self.lengths_of(np.arange(len(self)))

    @property
    def longest(self) -> int:
        """The most expressed genes of a cell, 0 if there are no cells."""
        starts = range(0, len(self), LENGTHS_READ_AT_ONCE)
        parts = (np.arange(start, min(start + LENGTHS_READ_AT_ONCE, len(self))) for start in starts)
        return max((int(self.lengths_of(part).max()) for part in parts), default=0)

    def lengths_of(self, positions: Positions) -> Int64Array:
        """Return the expressed genes of some cells, from the files' offsets alone: no token is read."""
        rows = self._rows_at(positions)
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        lengths = np.empty(len(rows), dtype=np.int64)
        first = 0
        while first < len(rows):
            row = int(rows[first])
            part, place = self._find(row)
            last = int(np.searchsorted(rows, row - place + part.num_cells))
            places = rows[first:last] - (row - place)
            lengths[order[first:last]] = part.offsets[places + 1] - part.offsets[places]
            first = last
        return lengths

    def __getstate__(self) -> dict[str, Any]:  # Any: attributes
        return {**self.__dict__, "_opened": {}}

    def _rows_at(self, positions: Positions) -> Int64Array:
        numbers = np.asarray(positions, dtype=np.int64)
        return numbers if self._rows is None else self._rows[numbers].astype(np.int64)

    def _find(self, row: int) -> tuple[_Part, int]:
        """Return the record batch that holds a row of the corpus, and the row's place in it."""
        number = bisect_right(self._ends, row)
        shard = self._opened.get(number) or self._open(number)
        place = row - (self._ends[number - 1] if number else 0)
        part = bisect_right(shard.ends, place)
        return shard.parts[part], place - (shard.ends[part - 1] if part else 0)

    def _open(self, number: int) -> _Shard:
        num_cells = self._ends[number] - (self._ends[number - 1] if number else 0)
        self._opened[number] = shard = _open_shard(self._files[number], self._columns, num_cells)
        return shard


def stream_cells(cells: CellDataset, *, num_shards: int = STREAM_SHARDS) -> datasets.IterableDataset:
    """Return the cells as a stream of rows, which knows `datasets`' ways: shuffle, split by node, resume.

    Each shard is a run of consecutive cells. Over all processes (`datasets.distributed.split_dataset_by_node`) and all
    workers of their loaders every cell comes exactly once an epoch, from as few files as may be if `num_shards` is a
    multiple of their number.

    Parameters
    ----------
    cells
        Where they are.
    num_shards
        Runs to cut them into, at most the number of cells. ``shuffle`` draws their order, so more mix better.

    Raises
    ------
    ValueError
        `num_shards` is below 1.
    """
    if num_shards < 1:
        msg = f"num_shards must be at least 1, got {num_shards}"
        raise ValueError(msg)
    bounds = np.linspace(0, len(cells), min(num_shards, max(1, len(cells))) + 1).astype(np.int64).tolist()
    return datasets.IterableDataset.from_generator(
        _read_runs, gen_kwargs={"cells": cells, "runs": list(pairwise(bounds))}
    )


def _read_runs(cells: CellDataset, runs: list[tuple[int, int]]) -> Iterator[Row]:
    for first, last in runs:
        for start in range(first, last, CELLS_READ_AT_ONCE):
            yield from cells.__getitems__(range(start, min(start + CELLS_READ_AT_ONCE, last))).rows()


class _Part(NamedTuple):
    """One record batch: the tokens of its cells, where each cell's begin, and the text columns."""

    num_cells: int
    offsets: npt.NDArray[np.integer[Any]]
    input_ids: npt.NDArray[np.uint8]
    gene_ids: npt.NDArray[np.uint16]
    columns: dict[str, pa.Array]


class _Shard(NamedTuple):
    """One file: its record batches, and the number of cells up to the end of each."""

    parts: list[_Part]
    ends: list[int]


def _open_shard(path: Path, columns: Sequence[str], num_cells: int) -> _Shard:
    """Map a file into memory; what it holds is read when it is looked at."""
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        _check_schema(path, reader.schema, columns)
        parts = [_view_part(path, batch, columns) for batch in reader if batch.num_rows]
    shard = _Shard(parts, np.cumsum([part.num_cells for part in parts]).tolist())
    if sum(part.num_cells for part in parts) != num_cells:
        msg = (
            f"corpus: {path} holds {sum(part.num_cells for part in parts)} cells, the manifest says {num_cells}; the "
            "file is not the one that was written. Build the corpus again"
        )
        raise ValueError(msg)
    return shard


def _check_schema(path: Path, schema: pa.Schema, columns: Sequence[str]) -> None:
    others = [name for name in schema.names if name not in TOKEN_TYPES]
    unknown = [name for name in columns if name not in others]
    if unknown:
        msg = f"columns: the corpus {path.parent} has no {unknown}; it has {others}"
        raise ValueError(msg)
    for name, kind in TOKEN_TYPES.items():
        found = schema.field(name).type if name in schema.names else pa.null()
        if not (pa.types.is_list(found) or pa.types.is_large_list(found)) or found.value_type != kind:
            msg = f"corpus: {name} in {path} must be lists of {kind}, got {found}; build the corpus again"
            raise ValueError(msg)


def _view_part(path: Path, batch: pa.RecordBatch, columns: Sequence[str]) -> _Part:
    lists = {name: batch.column(name) for name in TOKEN_TYPES}
    offsets = {name: column.offsets.to_numpy() for name, column in lists.items()}
    if any(column.null_count for column in lists.values()) or not np.array_equal(*offsets.values()):
        msg = f"corpus: {path} has cells whose input_ids and gene_ids differ in length; build the corpus again"
        raise ValueError(msg)
    values = {name: column.values.to_numpy() for name, column in lists.items()}
    texts = {name: batch.column(name) for name in columns}
    return _Part(batch.num_rows, offsets["gene_ids"], values["input_ids"], values["gene_ids"], texts)


def _check_rows(rows: Positions, num_cells: int) -> npt.NDArray[np.integer[Any]]:
    numbers = np.asarray(rows)
    if not len(numbers):
        return np.empty(0, dtype=np.uint32)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        msg = f"rows must be a list of row numbers, got {numbers.dtype} of shape {numbers.shape}"
        raise ValueError(msg)
    if numbers.min() < 0 or numbers.max() >= num_cells:
        msg = f"rows must lie between 0 and {num_cells - 1}, got {numbers.min()} to {numbers.max()}"
        raise ValueError(msg)
    return numbers.astype(np.uint32 if num_cells <= 2**32 else np.int64)
