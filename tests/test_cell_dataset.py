"""Cells come from the corpus's files as they are there, in any process, without a Python object a gene."""

import json
import multiprocessing
import pickle
import shutil
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from datasets.distributed import split_dataset_by_node
from small_corpus import make_cells, make_tokenizer
from torch.utils.data import DataLoader

from screformer.tokenization.corpus import build_corpus, open_corpus
from screformer.train import cell_dataset as module
from screformer.train.cell_dataset import CellBatch, CellDataset, stream_cells
from screformer.train.collator import CellCollator
from screformer.train.sampler import BlockShuffleSampler, CellBatchSampler, Shuffling

# Python 3.12 and later say this of every data loader with workers.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return a corpus of two files, five shards and several record batches a shard."""
    folder = tmp_path_factory.mktemp("cells")
    for name, seed, num_cells in (("a", 0, 60), ("b", 1, 43)):
        make_cells(num_cells, seed).write_h5ad(folder / f"{name}.h5ad")
    paths = [folder / "a.h5ad", folder / "b.h5ad"]
    corpus = build_corpus(
        paths, folder / "corpus", tokenizer=make_tokenizer(), obs_columns=["cell_type", "donor"], cells_per_shard=25
    )
    for shard in corpus.manifest["shards"]:
        rewrite_shard(corpus.folder / shard["file"], cells_a_batch=7)
    return open_corpus(corpus.folder)


def rewrite_shard(path, change=lambda table: table, cells_a_batch=None):
    """Write a file again with what `change` makes of its table, in record batches of so many cells."""
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        table = change(reader.read_all().combine_chunks())
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=cells_a_batch)


@pytest.fixture(scope="module")
def rows(corpus):
    return [
        {"input_ids": row["input_ids"], "gene_ids": row["gene_ids"], "cell_type": row["cell_type"]}
        for row in corpus.dataset
    ]


def as_lists(row):
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}


def names_of(batches):
    return sorted(name for batch in batches for name in batch.columns["cell_id"])


def identity(batch):
    return batch


def test_every_cell_is_as_the_corpus_has_it(corpus, rows):
    cells = CellDataset(corpus, columns=["cell_type"])
    assert len(cells) == 103
    assert [as_lists(cell) for cell in cells] == rows
    assert as_lists(cells[-1]) == rows[-1]
    assert (cells[0]["input_ids"].dtype, cells[0]["gene_ids"].dtype) == (np.uint8, np.uint16)


def test_a_batch_is_its_cells_end_to_end(corpus, rows):
    cells = CellDataset(corpus, columns=["cell_type"])
    order = np.random.default_rng(0).permutation(103)
    batch = cells.__getitems__(order)
    assert isinstance(batch, CellBatch)
    assert [as_lists(row) for row in batch] == [as_lists(row) for row in batch.rows()]
    assert [as_lists(row) for row in batch] == [rows[number] for number in order]
    assert as_lists(batch[-1]) == rows[order[-1]]
    assert len(cells.__getitems__([])) == 0


def test_chosen_rows_come_in_their_order(corpus, rows):
    chosen = np.array([99, 3, 3, 50, 0])
    cells = CellDataset(corpus, chosen, columns=["cell_type"])
    assert [as_lists(cell) for cell in cells] == [rows[number] for number in chosen]
    assert [as_lists(cell) for cell in cells.__getitems__([4, 0])] == [rows[0], rows[99]]
    assert cells._rows.nbytes == 4 * 5
    assert len(CellDataset(corpus, [])) == 0


def test_lengths_are_those_of_the_cells_and_no_token_is_read(corpus, rows, monkeypatch):
    expected = [len(row["gene_ids"]) for row in rows]
    cells = CellDataset(corpus)
    for shard in range(5):
        parts = cells._open(shard).parts
        parts[:] = [part._replace(input_ids=None, gene_ids=None) for part in parts]
    np.testing.assert_array_equal(cells.lengths, expected)
    order = np.random.default_rng(1).permutation(103)[:40]
    np.testing.assert_array_equal(cells.lengths_of(order), np.array(expected)[order])
    assert cells.longest == max(expected)
    monkeypatch.setattr(module, "LENGTHS_READ_AT_ONCE", 10)
    assert CellDataset(corpus, order).longest == max(np.array(expected)[order])
    assert CellDataset(corpus, []).longest == 0


def test_cells_are_views_of_the_file(corpus):
    cells = CellDataset(corpus)
    first = cells[0]["gene_ids"]
    assert np.shares_memory(first, cells[0]["gene_ids"])
    assert not first.flags.writeable
    assert pa.total_allocated_bytes() < 1e6


def test_reading_makes_no_object_a_gene(corpus):
    cells = CellDataset(corpus)
    order = list(range(103))
    cells.__getitems__(order)
    tracemalloc.start()
    batch = cells.__getitems__(order)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A Python integer has 28 bytes, a gene here 3; the rest is a few hundred a cell, for a moment.
    assert held < 3 * len(batch.gene_ids) + 8 * 103 + 4000
    assert peak < 3 * len(batch.gene_ids) + 1000 * 103


def test_a_copy_opens_the_files_anew(corpus, rows):
    cells = CellDataset(corpus, columns=["cell_type"])
    cells[0]
    text = pickle.dumps(cells)
    assert len(text) < 3000
    copy = pickle.loads(text)
    assert not copy._opened
    assert [as_lists(cell) for cell in copy] == rows


@pytest.mark.parametrize(("method", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_give_every_cell_once(corpus, method, num_workers):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    cells = CellDataset(corpus, columns=["cell_id"])
    cells[0]
    expected = names_of([cells.__getitems__(range(103))])
    sampler = CellBatchSampler(103, 8, Shuffling(4, 32), lengths_of=cells.lengths_of)
    loader = DataLoader(
        cells, batch_sampler=sampler, num_workers=num_workers, collate_fn=identity, multiprocessing_context=method
    )
    assert names_of(loader) == expected


def test_single_cells_and_batches_give_the_same_tensors(corpus):
    cells = CellDataset(corpus)
    collator = CellCollator(6, 7, 40, masked_fraction=0.15, deterministic=True)
    by_batch = DataLoader(cells, batch_size=8, collate_fn=collator)
    order = BlockShuffleSampler(103, Shuffling(4, 32))
    again = list(order)
    by_rows = collator([cells[number] for number in again[:8]])
    first = next(iter(DataLoader(cells, batch_size=8, sampler=order, collate_fn=collator)))
    assert all((first[name] == by_rows[name]).all() for name in by_rows)
    assert sum(len(batch["input_ids"]) for batch in by_batch) == 103


@pytest.mark.parametrize(
    ("num_shards", "num_ranks", "num_workers"),
    [(1, 2, 0), (5, 2, 0), (240, 1, 0), (240, 2, 0), (5, 1, 2), (5, 3, 2), (12, 3, 2)],
)
def test_a_stream_gives_every_cell_once_over_ranks_and_workers(corpus, num_shards, num_ranks, num_workers):
    cells = CellDataset(corpus, columns=["cell_id"])
    expected = [row["cell_id"] for row in cells]
    seen = []
    for rank in range(num_ranks):
        stream = split_dataset_by_node(stream_cells(cells, num_shards=num_shards), rank=rank, world_size=num_ranks)
        loader = DataLoader(stream, batch_size=8, num_workers=num_workers, collate_fn=identity)
        seen += [row["cell_id"] for batch in loader for row in batch]
    assert sorted(seen) == sorted(expected)


def test_a_stream_is_shuffled_anew_each_epoch_and_goes_on_where_it_was(corpus):
    cells = CellDataset(corpus, columns=["cell_id"])
    stream = stream_cells(cells, num_shards=20).shuffle(seed=0, buffer_size=30)
    orders = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        orders.append([row["cell_id"] for row in stream])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    plain = stream_cells(cells, num_shards=20)
    names = [row["cell_id"] for row in plain]
    iterator = iter(plain)
    seen = [next(iterator)["cell_id"] for _ in range(40)]
    resumed = stream_cells(cells, num_shards=20)
    resumed.load_state_dict(plain.state_dict())
    assert seen + [row["cell_id"] for row in resumed] == names


def test_a_streams_batches_are_what_models_take(corpus):
    collator = CellCollator(6, 7, 40, gene_space="expressed")
    batches = list(DataLoader(stream_cells(CellDataset(corpus)), batch_size=8, collate_fn=collator))
    assert sum(len(batch["gene_ids"]) for batch in batches) == 103


def test_shards_without_cells_are_passed_over(corpus, rows, tmp_path):
    shutil.copytree(corpus.folder, tmp_path / "corpus")
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    with pa.ipc.open_stream(str(corpus.folder / "cells-00000.arrow")) as reader:
        schema = reader.schema
    with pa.ipc.new_stream(str(tmp_path / "corpus/empty.arrow"), schema):
        pass
    for place in (0, 2, 7):
        manifest["shards"].insert(place, {"file": "empty.arrow", "num_cells": 0})
    (tmp_path / "corpus/manifest.json").write_text(json.dumps(manifest))
    cells = CellDataset(open_corpus(tmp_path / "corpus"), columns=["cell_type"])
    assert [as_lists(cell) for cell in cells] == rows


def replace_shard(corpus, folder, change):
    """Return the corpus with a first shard that `change` has made of its table."""
    shutil.copytree(corpus.folder, folder)
    rewrite_shard(folder / "cells-00000.arrow", change)
    return open_corpus(folder)


def test_large_lists_are_read_too(corpus, rows, tmp_path):
    def change(table):
        return table.cast(pa.schema([("input_ids", pa.large_list(pa.uint8())), *list(table.schema)[1:]]))

    cells = CellDataset(replace_shard(corpus, tmp_path / "corpus", change), columns=["cell_type"])
    assert [as_lists(cell) for cell in cells] == rows


def test_refuses_rows_and_columns_that_the_corpus_lacks(corpus):
    cells = CellDataset(corpus, [0, 1])
    with pytest.raises(IndexError, match="position must lie between -2 and 1, got 2"):
        cells[2]
    with pytest.raises(IndexError, match="place must lie between -2 and 1, got -3"):
        cells.__getitems__([0, 1])[-3]
    with pytest.raises(ValueError, match="rows must lie between 0 and 102, got 0 to 103"):
        CellDataset(corpus, [0, 103])
    with pytest.raises(ValueError, match="rows must lie between 0 and 102, got -1 to 5"):
        CellDataset(corpus, [5, -1])
    with pytest.raises(ValueError, match="rows must be a list of row numbers, got bool"):
        CellDataset(corpus, np.ones(103, dtype=bool))
    with pytest.raises(ValueError, match=r"columns: the corpus .* has no \['lineage'\]; it has \[.*'cell_type'"):
        CellDataset(corpus, columns=["lineage"])
    with pytest.raises(ValueError, match="num_shards must be at least 1, got 0"):
        stream_cells(cells, num_shards=0)


def test_refuses_files_that_are_not_a_corpus(corpus, tmp_path):
    def retype(table):
        return table.set_column(0, "input_ids", table["input_ids"].cast(pa.list_(pa.int32())))

    with pytest.raises(ValueError, match=r"input_ids in .* must be lists of uint8, got list<.*int32.*>; build the"):
        CellDataset(replace_shard(corpus, tmp_path / "a", retype))
    with pytest.raises(ValueError, match=r"gene_ids in .* must be lists of uint16, got null"):
        CellDataset(replace_shard(corpus, tmp_path / "b", lambda table: table.drop_columns("gene_ids")))
    with pytest.raises(ValueError, match="holds 24 cells, the manifest says 25"):
        CellDataset(replace_shard(corpus, tmp_path / "c", lambda table: table.slice(1)))

    def shift(table):
        return table.set_column(0, "input_ids", [table["input_ids"].to_pylist()[::-1]])

    with pytest.raises(ValueError, match="has cells whose input_ids and gene_ids differ in length"):
        CellDataset(replace_shard(corpus, tmp_path / "d", lambda table: shift_types(table, shift)))


def shift_types(table, change):
    return change(table).cast(table.schema)
