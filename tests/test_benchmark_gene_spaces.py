"""Expressed genes beside every gene."""

import json

import pytest
from scipy import sparse
from small_corpus import make_cells
from test_annotate import save_checkpoint

from screformer.benchmarks.gene_spaces import compare_gene_spaces, main


@pytest.fixture
def model(tiny_config, tmp_path):
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    return save_checkpoint(tiny_config, tmp_path / "model")


def test_what_differs_is_written_and_said(model, tmp_path, caplog):
    given = ["--model", str(model), "--cells", str(tmp_path / "cells.h5ad"), "--num-cells", "16"]
    main([*given, "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "gene_spaces.json").read_text())
    assert found["num_cells"] == 16
    speeds = found["cells_per_second"]
    assert found["ratio"] == pytest.approx(speeds["expressed"] / speeds["full"], rel=0.01)
    assert 0 <= found["label_agreement"] <= 1
    assert 0 < found["embedding_drift"] < 2  # both spaces have other neighbours
    assert f"{found['ratio']:.1f} times the cells a second of every gene" in caplog.text
    assert "| cells with the same label |" in (tmp_path / "out" / "gene_spaces.md").read_text()
    assert (tmp_path / "out" / "gene_spaces.png").exists()
    assert str(tmp_path) not in json.dumps(found)


def test_where_every_gene_is_expressed_nothing_differs(tiny_config, tmp_path):
    cells = make_cells()
    cells.X = sparse.csr_matrix(cells.X.toarray() + 1)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    model = save_checkpoint(tiny_config, tmp_path / "model")
    found = compare_gene_spaces(model, tmp_path / "cells.h5ad", num_cells=16)
    assert found["genes_per_cell"] == 40
    assert found["label_agreement"] == 1
    assert found["embedding_drift"] < 1e-5
    assert found["embedding_cosine"] == pytest.approx(1)
    assert found["largest_probability_difference"] < 1e-5


def test_fewer_cells_than_a_batch_are_refused(model, tmp_path):
    with pytest.raises(SystemExit, match="num_cells got 4; at least a batch, 8, is needed"):
        main(["--model", str(model), "--cells", str(tmp_path / "cells.h5ad"), "--num-cells", "4"])
