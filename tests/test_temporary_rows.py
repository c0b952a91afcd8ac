"""Entries in any order become rows on disk: the right ones, in little memory, and nothing is left behind."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import sparse

from screformer.tokenization import temporary_rows
from screformer.tokenization.stored_rows import CompressedColumns
from screformer.tokenization.temporary_rows import RowsWriter, open_shared_rows, rewrite_by_rows


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Return TMPDIR of this test."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def _columns(num_cells=300, num_genes=70, seed=0, dtype=np.int32):
    matrix = sparse.random(num_cells, num_genes, 0.2, format="csc", random_state=seed)
    matrix.data = np.ceil(matrix.data * 9).astype(dtype)
    return matrix, CompressedColumns(matrix.data, matrix.indices, matrix.indptr, matrix.shape)


@pytest.mark.parametrize("entries_per_band", [1, 50, 10**6])
@pytest.mark.parametrize("entries_at_once", [1, 64, 10**6])
def test_rows_are_those_of_the_matrix(monkeypatch, entries_per_band, entries_at_once):
    monkeypatch.setattr(temporary_rows, "ENTRIES_PER_BAND", entries_per_band)
    monkeypatch.setattr("screformer.tokenization.stored_rows.ENTRIES_AT_ONCE", entries_at_once)
    matrix, stored = _columns(num_cells=40)
    rows = rewrite_by_rows(stored, "cells")
    block = rows.read(0, 40)
    assert block.has_sorted_indices
    assert (block != matrix).nnz == 0
    assert (rows.read(7, 19) != matrix[7:19]).nnz == 0
    rows.close()


def test_a_matrix_without_entries_has_rows(place):
    stored = CompressedColumns(np.zeros(0), np.zeros(0, int), np.zeros(8, int), (5, 7))
    rows = rewrite_by_rows(stored, "cells")
    assert rows.read(0, 5).shape == (5, 7)
    rows.close()


def test_there_are_never_more_bands_than_can_be_numbered(monkeypatch):
    monkeypatch.setattr(temporary_rows, "ENTRIES_PER_BAND", 1)
    monkeypatch.setattr(temporary_rows, "MAX_BANDS", 16)
    generator = np.random.default_rng(0)
    for _ in range(100):
        lengths = generator.integers(0, 50, 200) * (generator.random(200) < 0.5)
        edges = temporary_rows._band_edges(np.concatenate([[0], np.cumsum(lengths)]))
        assert len(edges) - 1 <= 16
        assert edges[0] == 0
        assert edges[-1] == 200
        assert (np.diff(edges) > 0).all()


def test_closing_removes_the_folder_and_others_may_read_until_then(place):
    matrix, stored = _columns()
    rows = rewrite_by_rows(stored, "cells")
    other = open_shared_rows(str(rows.folder))
    assert (other.read(3, 200) != matrix[3:200]).nnz == 0
    other.close()
    assert rows.folder.parent == place
    assert rows.folder.is_dir()
    rows.close()
    assert list(place.iterdir()) == []
    assert open_shared_rows(str(rows.folder)) is None
    assert open_shared_rows(None) is None


def test_letting_go_without_closing_removes_the_folder_too(place):
    _, stored = _columns()
    rows = rewrite_by_rows(stored, "cells")
    del rows
    assert list(place.iterdir()) == []


def test_nothing_stays_after_an_error(place):
    matrix, _ = _columns()
    matrix.indices[-1] = 10_000
    stored = CompressedColumns(matrix.data, matrix.indices, matrix.indptr, matrix.shape)
    with pytest.raises(ValueError, match="10000, allowed are 0 to 299"):
        rewrite_by_rows(stored, "cells")
    with pytest.raises(RuntimeError, match="stopped"), RowsWriter(5, np.dtype(int), "cells"):
        raise RuntimeError("stopped")
    assert list(place.iterdir()) == []


def test_a_disk_without_room_is_said_before_and_while_writing(place, monkeypatch):
    _, stored = _columns()
    usage = shutil.disk_usage(place)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match=r"cells must be rewritten by rows.*0.00 GB free.*TMPDIR") as caught:
            rewrite_by_rows(stored, "cells")
    assert caught.value.errno == errno.ENOSPC

    def fill_up(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(temporary_rows, "_write_at", fill_up)
    with pytest.raises(OSError, match="cells must be rewritten by rows"):
        rewrite_by_rows(stored, "cells")
    assert list(place.iterdir()) == []


@pytest.mark.skipif(temporary_rows.fcntl is None, reason="locks of this kind are not on Windows")
def test_what_a_killed_process_left_is_removed_and_what_lives_is_not(place):
    program = (
        "import numpy as np, os, sys, signal\n"
        "from screformer.tokenization.temporary_rows import RowsWriter\n"
        "writer = RowsWriter(5, np.dtype(int), 'cells')\n"
        "print(writer.folder, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(place)}, capture_output=True, check=False
    )
    left = Path(done.stdout.decode().strip())
    assert left.is_dir()
    _, stored = _columns()
    living = rewrite_by_rows(stored, "cells")
    assert not left.exists()
    another = rewrite_by_rows(stored, "cells")
    assert living.folder.is_dir()
    living.close()
    another.close()
    assert list(place.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_leaves_the_folder_to_its_parent(place):
    _, stored = _columns()
    rows = rewrite_by_rows(stored, "cells")
    child = os.fork()
    if child == 0:
        rows.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert rows.folder.is_dir()
    rows.close()
    assert list(place.iterdir()) == []


MEASURE = """
import sys, resource
import numpy as np
from screformer.tokenization import GeneVocabulary, count_evidence, open_count_matrix, stored_rows, temporary_rows
temporary_rows.ENTRIES_PER_BAND = stored_rows.ENTRIES_AT_ONCE = 1 << 17
stored_rows.VALUES_AT_ONCE = 1 << 18
count_evidence.SMALL_MATRIX = 1 << 17
vocabulary = GeneVocabulary([f"ENSG{at:011d}" for at in range(2000)])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for path in sys.argv[1:]:  # the first is small: it loads what is loaded once
    before, total = peak(), 0
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        for block in matrix.blocks(256):
            total += int(block.sum(dtype=np.int64))
    print(total, peak() - before)
"""


def _write_large(path, num_cells, layout):
    """Write counts as large as asked, a piece at a time; return their sum."""
    num_genes, per_gene = 2000, num_cells // 4
    with h5py.File(path, "w") as file:
        for name, names in (("obs", range(num_cells)), ("var", [f"ENSG{at:011d}" for at in range(num_genes)])):
            group = file.create_group(name)
            group.attrs.update({"_index": "_index", "column-order": [], "encoding-type": "dataframe"})
            group["_index"] = np.array(list(map(str, names)), h5py.string_dtype())
        generator = np.random.default_rng(0)
        if layout == "dense":
            file.create_dataset("X", (num_cells, num_genes), np.float32, chunks=(num_cells // 100, 50))
            for first in range(0, num_cells, 1000):
                counts = generator.poisson(0.3, (min(1000, num_cells - first), num_genes))
                counts[:, 0] += 500  # as real cells have
                file["X"][first : first + 1000] = counts
            return
        group = file.create_group("X")
        group.attrs.update({"encoding-type": f"{layout}_matrix", "shape": (num_cells, num_genes)})
        num_runs, limit = (num_genes, num_cells) if layout == "csc" else (num_cells, num_genes)
        per_run = num_genes * per_gene // num_runs
        for key, dtype in (("data", np.float32), ("indices", np.int32)):
            group.create_dataset(key, (num_genes * per_gene,), dtype)
        for run in range(0, num_runs, 100):
            size = min(100, num_runs - run) * per_run
            group["indices"][run * per_run : run * per_run + size] = generator.integers(0, limit, size)
            group["data"][run * per_run : run * per_run + size] = generator.integers(1, 90, size)
        group["indptr"] = np.arange(num_runs + 1, dtype=np.int64) * per_run


@pytest.mark.parametrize("layout", ["csc", "csr", "dense"])
def test_memory_stays_far_below_the_size_of_the_matrix(tmp_path, layout):
    """The matrix takes 80 MB of numbers; reading it may take 30 MB, whatever there was before."""
    _write_large(tmp_path / "small.h5ad", 200, layout)
    _write_large(tmp_path / "large.h5ad", 20_000 if layout != "dense" else 10_000, layout)
    paths = [str(tmp_path / f"{size}.h5ad") for size in ("small", "large")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    _, (total, growth) = (map(int, line.split()) for line in done.stdout.splitlines())
    with h5py.File(paths[1]) as file:
        values = file["X"]["data"][:] if layout != "dense" else file["X"][:]
    assert values.nbytes * (2 if layout != "dense" else 1) >= 80_000_000
    assert total == int(values.sum(dtype=np.float64))
    assert growth < 30_000_000
