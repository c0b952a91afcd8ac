"""A corpus of a file that is not stored by rows is the corpus of one that is, and rewrites it once."""

import tempfile

import anndata
from scipy import sparse
from small_corpus import make_cells, make_tokenizer

from screformer.tokenization import count_matrix
from screformer.tokenization.corpus import build_corpus


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
