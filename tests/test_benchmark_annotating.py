"""A large file annotated, killed on the way: the whole of it (slow), and what is checked and written."""

import json

import anndata
import pytest
from small_corpus import make_cells
from test_annotate import save_checkpoint

from screformer.annotation import annotate_file
from screformer.benchmarks import annotating
from screformer.benchmarks.annotating import _check, main, write_annotating


@pytest.fixture
def files(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(annotating, "CHECKED_CELLS", 8)
    model = save_checkpoint(tiny_config, tmp_path / "model")
    make_cells(60).write_h5ad(tmp_path / "cells.h5ad")
    annotate_file(tmp_path / "cells.h5ad", model, tmp_path / "annotated.h5ad", progress=False)
    return model, tmp_path / "cells.h5ad", tmp_path / "annotated.h5ad"


def test_a_faithful_file_passes_and_others_do_not(files, tmp_path):
    assert _check(*files) == {"is_order_kept": True, "num_checked": 24, "are_labels_the_same": True}
    adata = anndata.read_h5ad(files[2])
    adata[::-1].copy().write_h5ad(tmp_path / "reversed.h5ad")
    assert not _check(files[0], files[1], tmp_path / "reversed.h5ad")["is_order_kept"]
    labels = adata.obs["screformer_cell_type"].cat
    adata.obs["screformer_cell_type"] = labels.rename_categories(list(labels.categories[::-1]))
    adata.write_h5ad(tmp_path / "wrong.h5ad")
    assert not _check(files[0], files[1], tmp_path / "wrong.h5ad")["are_labels_the_same"]


def test_what_was_found_is_written(tmp_path):
    found = {
        "num_cells": 5000,
        "model_gigabytes": 0.7,
        "peak_gigabytes": 1.5,
        "beside_model_gigabytes": 0.8,
        "cells_per_second": 107.2,
        "blocks_before_kill": 3,
        "blocks_kept": 3,
        "gene_space": "expressed",
        "is_order_kept": True,
        "num_checked": 24,
        "are_labels_the_same": False,
    }
    write_annotating(found, tmp_path / "out", command="it")
    table = (tmp_path / "out" / "annotating.md").read_text()
    assert "| beside the model, GB | 0.80 (wanted under 2) |" in table
    assert "| labels those of the cells alone | NO (24 cells) |" in table
    assert json.loads((tmp_path / "out" / "annotating.json").read_text())["num_cells"] == 5000
    assert (tmp_path / "out" / "annotating.png").exists()


def test_too_few_cells_to_kill_the_run_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="num_cells got 4096; more than 4096 are needed"):
        main(["--model", str(tmp_path), "--num-cells", "4096", "--work", str(tmp_path)])


@pytest.mark.slow
def test_a_run_is_killed_and_goes_on(files, tmp_path):
    given = ["--model", str(files[0]), "--source", str(files[1]), "--num-cells", "5000"]
    main([*given, "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "annotating.json").read_text())
    assert found["blocks_kept"] >= 3
    assert found["is_order_kept"]
    assert found["are_labels_the_same"]
    assert 0 < found["beside_model_gigabytes"] < found["peak_gigabytes"]
