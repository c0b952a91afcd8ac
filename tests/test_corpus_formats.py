"""A corpus is the same whatever its sources are stored as, and a source is all the files that it is made of."""

import os
import tempfile
from pathlib import Path

import anndata
import pytest
from format_writers import write_tenx_folder
from scipy import sparse
from small_corpus import make_cells, make_tokenizer

from screformer.tokenization import corpus_build, count_matrix
from screformer.tokenization.corpus import build_corpus, open_corpus


def test_columns_are_rewritten_once_and_give_the_same_shards(tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "place"))
    cells = make_cells()
    calls = []
    original = count_matrix.rewrite_by_rows

    def spy(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(count_matrix, "rewrite_by_rows", spy)
    shards = []
    for name, form in (("rows", sparse.csr_matrix), ("columns", sparse.csc_matrix)):
        path = tmp_path / f"{name}.h5ad"
        anndata.AnnData(form(cells.X), obs=cells.obs, var=cells.var).write_h5ad(path)
        corpus = build_corpus(path, tmp_path / name, tokenizer=make_tokenizer(), cells_per_shard=10, num_workers=1)
        shards.append([shard["sha256"] for shard in corpus.manifest["shards"]])
    assert shards[0] == shards[1]
    assert len(shards[0]) == 5
    assert len(calls) == 1
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="open files cannot be counted here")
def test_of_many_rewritten_sources_few_files_stay_open(tmp_path, monkeypatch):
    (tmp_path / "columns").mkdir()
    paths = []
    for seed in range(6):
        cells = make_cells(8, seed=seed)
        paths.append(tmp_path / "columns" / f"{seed}.h5ad")
        anndata.AnnData(sparse.csc_matrix(cells.X), obs=cells.obs, var=cells.var).write_h5ad(paths[-1])
    num_open = []
    inspect_sources = corpus_build._inspect_sources

    def count_files(*arguments):
        num_open.append(len(os.listdir("/dev/fd")))
        return inspect_sources(*arguments)

    monkeypatch.setattr(corpus_build, "_inspect_sources", count_files)
    for some in (paths[:1], paths):
        build_corpus(some, tmp_path / str(len(some)), tokenizer=make_tokenizer())
    assert num_open[1] - num_open[0] <= 5  # one lock for each source more
    assert len(open_corpus(tmp_path / "6")) == 48


def _write_tenx(folder, **options):
    cells = make_cells(8)
    cells.var["ensembl_id"] = cells.var_names
    return write_tenx_folder(cells, folder, compressed=False, **options)


@pytest.mark.parametrize("table", ["features.tsv", "barcodes.tsv"])
def test_the_tables_beside_a_matrix_are_part_of_it(tmp_path, table):
    folder = _write_tenx(tmp_path)
    build_corpus(folder / "matrix.mtx", tmp_path / "corpus", tokenizer=make_tokenizer())
    build_corpus(folder / "matrix.mtx", tmp_path / "corpus", tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match=r"matrix.mtx has the same content as .*; give each file once"):
        build_corpus([folder, folder / "matrix.mtx"], tmp_path / "twice", tokenizer=make_tokenizer())
    lines = (folder / table).read_text().splitlines(keepends=True)
    (folder / table).write_text("".join(reversed(lines)))
    with pytest.raises(ValueError, match=r"made otherwise: files .*\(or their content\)"):
        build_corpus(folder / "matrix.mtx", tmp_path / "corpus", tokenizer=make_tokenizer())


def test_a_matrix_may_have_brackets_in_its_name(tmp_path):
    folder = _write_tenx(tmp_path, prefix="GSM[1]_")
    assert len(build_corpus(folder / "GSM[1]_matrix.mtx", tmp_path / "corpus", tokenizer=make_tokenizer())) == 8
