"""Made cells: distinct, reproducible block by block, like their parents, and in a file that everything reads."""

import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from screformer.benchmarks.many_cells import main, make_blocks, make_many_cells, read_real_cells
from screformer.tokenization import example_cells_path, open_count_matrix


@pytest.fixture(scope="module")
def real():
    return read_real_cells(example_cells_path())


def rows_of(counts):
    return [(row.indices.tobytes(), row.data.tobytes()) for row in counts]


def test_no_two_cells_are_the_same(real):
    rows = [row for block in make_blocks(real, 1500, cells_per_block=500) for row in rows_of(block.counts)]
    assert len(rows) == len(set(rows)) == 1500


def test_a_longer_file_begins_with_the_same_cells(real):
    short = next(make_blocks(real, 30, seed=3, cells_per_block=64))
    blocks = list(make_blocks(real, 100, seed=3, cells_per_block=64))
    assert [block.counts.shape[0] for block in blocks] == [64, 36]
    assert rows_of(blocks[0].counts[:30]) == rows_of(short.counts)
    other = next(make_blocks(real, 30, seed=4, cells_per_block=64))
    assert not set(rows_of(other.counts)) & set(rows_of(short.counts))


def test_made_cells_are_as_deep_and_sparse_as_real_ones_and_keep_their_type(real):
    block = next(make_blocks(real, 600, cells_per_block=600))
    for measure in (lambda counts: counts.sum(axis=1).mean(), lambda counts: np.diff(counts.indptr).mean()):
        assert 0.6 < measure(block.counts) / measure(real.counts) < 1.3
    assert block.counts.has_sorted_indices
    assert block.counts.data.min() == 1
    types = real.cell_types[block.first_parents]
    names = real.var.index.tolist()
    insulin = np.log1p(block.counts[:, names.index("INS")].toarray().ravel())
    assert insulin[types == "beta"].mean() > 2 + insulin[types == "ductal"].mean()


@pytest.mark.parametrize(("compression", "dtype"), [("gzip", "float32"), ("lzf", "int32"), ("none", "uint16")])
def test_the_file_is_read_by_anndata_and_by_us(tmp_path, real, compression, dtype):
    path = make_many_cells(tmp_path / "made.h5ad", 70, compression=compression, dtype=dtype, cells_per_block=32)
    expected = sparse.vstack([block.counts for block in make_blocks(real, 70, cells_per_block=32)])
    adata = anndata.read_h5ad(path)
    assert adata.X.dtype == dtype
    assert (expected != adata.X).nnz == 0
    assert adata.obs_names[-1] == "made-cell-69"
    assert set(adata.obs["donor"]) <= set(real.donors)
    assert set(adata.obs["dataset"]) == {"made-0"}
    assert json.loads(adata.uns["made_cells"])["cells"] == 70
    with h5py.File(path) as file:
        assert file["X/data"].compression == (None if compression == "none" else compression)
        assert file["X/indptr"].chunks == file["obs/_index"].chunks == (1 << 15,)
    with open_count_matrix(path) as matrix:
        assert (next(matrix.blocks(70)) != expected).nnz == 0
    assert [one.name for one in tmp_path.iterdir()] == ["made.h5ad"]


def test_cells_without_type_or_donor_are_mixed_all_the_same(tmp_path):
    counts = np.full((3, 5), 100)
    counts[2] = 1  # too few counts to be drawn from
    names = [f"ENSG0000000000{number}" for number in range(5)]
    anndata.AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "real.h5ad")
    path = make_many_cells(tmp_path / "made.h5ad", 5, source=tmp_path / "real.h5ad", progress=False)
    adata = anndata.read_h5ad(path)
    assert set(adata.obs["cell_type"]) == {"unknown"}
    assert adata.X.sum(axis=1).min() > 200
    anndata.AnnData(sparse.csr_matrix(counts[1:]), var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "one.h5ad")
    with pytest.raises(ValueError, match=r"1 cells of one\.h5ad have 200 counts; two are needed"):
        make_many_cells(tmp_path / "other.h5ad", 5, source=tmp_path / "one.h5ad")


def test_wrong_options_are_refused_and_nothing_stays(tmp_path):
    output = tmp_path / "made.h5ad"
    for options, message in (
        ({"num_cells": 0}, "num_cells: at least 1, got 0"),
        ({"num_cells": 1, "cells_per_block": 0}, "cells_per_block: at least 1"),
        ({"num_cells": 1, "compression": "zip"}, "compression: one of 'gzip', 'lzf', 'none', got 'zip'"),
        ({"num_cells": 1, "dtype": "int8"}, "dtype: one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make_many_cells(output, **options)
    assert not list(tmp_path.iterdir())
    output.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        make_many_cells(output, 1)


def test_command_line(tmp_path, capsys):
    main(["3", "--output", str(tmp_path / "made.h5ad"), "--seed", "5"])
    assert capsys.readouterr().out == f"{tmp_path / 'made.h5ad'}\n"
    assert anndata.read_h5ad(tmp_path / "made.h5ad").shape[0] == 3
    with pytest.raises(SystemExit, match="error: num_cells: at least 1"):
        main(["0", "--output", str(tmp_path / "none.h5ad")])
