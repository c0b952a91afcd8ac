"""A shard of a corpus: the work item that describes it, and the function that any process can write it with."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from screformer.tokenization.cell_filters import DUPLICATE, BoolArray, CellFilters, keep_tokens
from screformer.tokenization.cell_hashes import CellHasher, UInt64Array
from screformer.tokenization.corpus_files import (
    TOKENIZER_FOLDER,
    WORK_FOLDER,
    Manifest,
    aside,
    checksum,
    read_json,
    write_json,
)
from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
from screformer.tokenization.expression_bins import CountsCSR, as_counts_csr, as_whole_numbers
from screformer.tokenization.gene_vocabulary import GeneMapping
from screformer.tokenization.mitochondrial_genes import is_mitochondrial
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer, TokenizedCells

OWN_COLUMNS = ("input_ids", "gene_ids", "cell_id", "cell_hash")
CELLS_PER_BLOCK = 1024
_open = threading.local()  # what this thread has open: a Dask worker may have several


@dataclass(frozen=True)
class ShardItem:
    """A run of cells of one source that is to become one file; plain values only, for any process to work on.

    Attributes
    ----------
    run
        Names the call that made the item: nothing that an earlier call left open is used for it.
    folder, file
        Where the shard goes; the folder has the tokenizer.
    source, matrix
        Number of the source, and what `open_count_matrix` opens it with.
    first_cell, num_cells
        Rows of the source.
    fingerprint
        Of the tokenizer.
    obs_columns
        To keep, as text.
    allow
        As for `open_count_matrix`.
    filters
        What a cell must have.
    keep_empty
        Whether cells without counts on known genes stay.
    """

    run: str
    folder: str
    file: str
    source: int
    matrix: Mapping[str, Any]  # Any: JSON
    first_cell: int
    num_cells: int
    fingerprint: str
    obs_columns: tuple[str, ...]
    allow: tuple[str, ...]
    filters: CellFilters
    keep_empty: bool


class _Source(NamedTuple):
    """A source open for reading, with what is known of its genes."""

    matrix: CountMatrix
    tokenizer: ScReformerTokenizer
    mapping: GeneMapping
    is_mitochondrial: BoolArray
    hasher: CellHasher


class _Block(NamedTuple):
    """The kept cells of a block, and what was met on the way."""

    tokens: TokenizedCells
    hashes: UInt64Array
    rows: npt.NDArray[np.int64]  # within the block
    dropped: dict[str, int]


def write_shard(item: ShardItem, *, advance: Callable[[int], object] | None = None) -> Manifest:
    """Tokenize the cells of an item, write them as an Arrow file, and return its entry of the manifest.

    The bytes depend on nothing but the item. The entry is also left in the work folder, for a run that goes on later.

    Raises
    ------
    FileNotFoundError
        The folder is not there, as on a worker that does not share the file system.
    ValueError
        Values are no counts; or this process has another tokenizer, as of another release.
    """
    source = _open_source(item)
    path = Path(item.folder) / item.file
    beside = aside(path)
    features = corpus_features(item.obs_columns)
    dropped: Counter[str] = Counter()
    num_cells, num_tokens, first = 0, 0, item.first_cell
    blocks = source.matrix.blocks(CELLS_PER_BLOCK, start=first, stop=first + item.num_cells)
    with name_in_errors(source.matrix), ArrowWriter(features=features, path=str(beside)) as writer:
        for block in blocks:
            made = _tokenize_block(as_counts_csr(block), source, item, first)
            stop = first + block.shape[0]
            texts = _read_texts(source.matrix, item.obs_columns, made.rows, first, stop)
            writer.write_table(_arrow_table(made, texts, features), CELLS_PER_BLOCK)
            dropped.update(made.dropped)
            num_cells, num_tokens = num_cells + len(made.rows), num_tokens + len(made.tokens.input_ids)
            first = stop
            if advance is not None:
                advance(block.shape[0])
        writer.finalize()
    entry = {
        "file": item.file,
        "source": item.source,
        "first_cell": item.first_cell,
        "num_source_cells": item.num_cells,
        "num_cells": num_cells,
        "num_tokens": num_tokens,
        "dropped": {reason: number for reason, number in sorted(dropped.items()) if number},
        "sha256": checksum(beside),
    }
    os.replace(beside, path)
    write_entry(path.parent, entry)
    return entry


def write_entry(folder: Path, entry: Manifest) -> None:
    """Leave a shard's entry for a run that goes on later."""
    write_json(_entry_path(folder, entry["file"]), entry)


def read_whole_entry(folder: Path, file: str) -> Manifest | None:
    """Return the entry of a shard that an earlier run finished, None if it did not or the shard has changed since."""
    path = _entry_path(folder, file)
    if not path.is_file():
        return None
    entry = read_json(path)
    return entry if is_whole(folder, entry) else None


def has_entries(folder: Path) -> bool:
    """Whether any shard was finished."""
    return any((folder / WORK_FOLDER).glob("cells-*.json"))


def is_whole(folder: Path, entry: Manifest) -> bool:
    """Whether the file of an entry is there and as it was written."""
    path = folder / entry["file"]
    return path.is_file() and checksum(path) == entry["sha256"]


def read_hashes(path: Path) -> UInt64Array:
    """Return the hashes of a shard's cells, uint64 (num_cells,)."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        parts = [batch.column("cell_hash").to_numpy() for batch in reader]
        return np.concatenate([np.zeros(0, np.uint64), *parts])


def drop_cells(folder: Path, entry: Manifest, is_kept: BoolArray) -> Manifest:
    """Write a shard again with only the cells for which `is_kept` holds, and return its new entry.

    Stopped half-way, the file or its entry is as before, or the two do not fit and the shard is made again.
    """
    path = folder / entry["file"]
    beside = aside(path)
    first, num_tokens = 0, 0
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        features = datasets.Features.from_arrow_schema(reader.schema)
        with ArrowWriter(features=features, path=str(beside)) as writer:
            for batch in reader:
                kept = batch.filter(pa.array(is_kept[first : first + batch.num_rows]))
                first += batch.num_rows
                num_tokens += len(kept.column("input_ids").flatten())
                writer.write_table(pa.Table.from_batches([kept]), CELLS_PER_BLOCK)
            writer.finalize()
    num_kept = int(is_kept.sum())
    num_dropped = entry["dropped"].get(DUPLICATE, 0) + entry["num_cells"] - num_kept
    changed = {
        "num_cells": num_kept,
        "num_tokens": num_tokens,
        "dropped": dict(sorted({**entry["dropped"], DUPLICATE: num_dropped}.items())),
        "sha256": checksum(beside),
    }
    os.replace(beside, path)
    write_entry(folder, entry | changed)
    return entry | changed


def corpus_features(obs_columns: Sequence[str]) -> datasets.Features:
    """Columns of a corpus."""
    lists = {
        name: datasets.List(datasets.Value(kind)) for name, kind in (("input_ids", "uint8"), ("gene_ids", "uint16"))
    }
    texts = {name: datasets.Value("string") for name in ("cell_id", *obs_columns)}
    return datasets.Features(lists | {"cell_hash": datasets.Value("uint64")} | texts)


def close_sources() -> None:
    """Close what this thread has open."""
    source = getattr(_open, "source", None)
    if source is not None:
        source.matrix.close()
    _open.source = _open.key = None


class name_in_errors:  # noqa: N801 - reads as a word of the `with` statement
    """Put the file's name before the message of a ValueError."""

    def __init__(self, matrix: CountMatrix) -> None:
        self._name = matrix.name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError) and not str(error).startswith(self._name):
            msg = f"{self._name}: {error}"
            raise ValueError(msg) from error


def _open_source(item: ShardItem) -> _Source:
    key = json.dumps([item.run, item.folder, item.source])
    if getattr(_open, "key", None) == key:
        return _open.source
    close_sources()
    tokenizer = load_tokenizer(item)
    vocabulary = tokenizer.gene_vocabulary
    matrix = open_count_matrix(**{"vocabulary": vocabulary, "allow": item.allow, **item.matrix})
    mapping = matrix.map_genes(vocabulary)
    _open.source = _Source(
        matrix,
        tokenizer,
        mapping,
        is_mitochondrial(matrix.gene_names),
        CellHasher(vocabulary, mapping.positions),
    )
    _open.key = key
    return _open.source


def load_tokenizer(item: ShardItem) -> ScReformerTokenizer:
    """Load the tokenizer beside the shards, once in a run; it keeps empty cells, which the filters drop and count.

    Raises
    ------
    FileNotFoundError
        The folder is not there, as on a worker that does not share the file system.
    ValueError
        It has another fingerprint in this process, as of another release.
    """
    if getattr(_open, "run", None) == item.run:
        return _open.tokenizer
    folder = Path(item.folder) / TOKENIZER_FOLDER
    if not folder.is_dir():
        msg = (
            f"output: a worker does not find {folder}. The output folder and the files must be on a file system that "
            "all workers share, under the same path"
        )
        raise FileNotFoundError(msg)
    tokenizer = ScReformerTokenizer.from_pretrained(folder, on_empty_cells="keep")
    if tokenizer.fingerprint != item.fingerprint:
        msg = (
            f"scheduler: the tokenizer of {folder} has the fingerprint {tokenizer.fingerprint} on a worker and "
            f"{item.fingerprint} here; install the same release of screformer everywhere"
        )
        raise ValueError(msg)
    _open.run, _open.tokenizer = item.run, tokenizer
    return tokenizer


def _tokenize_block(counts: CountsCSR, source: _Source, item: ShardItem, first_row: int) -> _Block:
    whole = as_whole_numbers(counts.data)
    counts = counts if whole is None else counts._replace(data=whole)
    tokens = source.tokenizer.tokenize_counts(
        counts, source.mapping, first_row=first_row, allow_fractions="not-counts" in item.allow
    )
    reasons = item.filters.judge(counts, tokens, source.is_mitochondrial, keep_empty=item.keep_empty)
    is_kept = ~np.logical_or.reduce(list(reasons.values()))
    dropped = {reason: int(cells.sum()) for reason, cells in reasons.items()}
    hashes = source.hasher.hash_cells(counts)
    return _Block(keep_tokens(tokens, is_kept), hashes[is_kept], np.flatnonzero(is_kept), dropped)


def _read_texts(
    matrix: CountMatrix, obs_columns: Collection[str], rows: npt.NDArray[np.int64], first: int, stop: int
) -> dict[str, pa.Array]:
    """Return the names and the chosen columns of the kept cells of a block."""
    readers: dict[str, Callable[..., Sequence[str | None]]] = {"cell_id": matrix.read_cell_ids}
    readers |= {name: partial(matrix.obs_column, name) for name in obs_columns}
    return {name: pa.array(read(start=first, stop=stop), pa.string()).take(rows) for name, read in readers.items()}


def _arrow_table(made: _Block, texts: Mapping[str, pa.Array], features: datasets.Features) -> pa.Table:
    offsets = pa.array(made.tokens.indptr.astype(np.int32))
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(made.tokens.input_ids)),
        "gene_ids": pa.ListArray.from_arrays(offsets, pa.array(made.tokens.gene_ids)),
        "cell_hash": pa.array(made.hashes),
        **texts,
    }
    return pa.table({name: columns[name] for name in features}).cast(features.arrow_schema)


def _entry_path(folder: Path, file: str) -> Path:
    return folder / WORK_FOLDER / f"{Path(file).stem}.json"
