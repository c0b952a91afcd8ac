"""`screformer inspect` says what a file holds, whether it may pass, and how many of its cells have been seen."""

import json

import anndata
import numpy as np
import pytest
from small_corpus import make_cells, make_corpus, make_tokenizer
from typer.testing import CliRunner

from screformer.cli import app
from screformer.tokenization import GeneVocabulary, example_cells_path
from screformer.tokenization.overlap import find_seen_cells, tokenizer_of


def run(*arguments):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    return result, " ".join(result.output.replace("\r", "\n").split())


@pytest.fixture
def cells(tmp_path):
    """Return the path of a file with twenty of the packaged cells and every eighth gene."""
    path = tmp_path / "cells.h5ad"
    anndata.read_h5ad(example_cells_path())[:20, ::8].copy().write_h5ad(path)
    return path


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Return the folder of a corpus of 48 small cells, whose genes are the default vocabulary."""
    monkeypatch.setattr(GeneVocabulary, "human_v1", lambda: make_tokenizer().gene_vocabulary)
    return make_corpus(tmp_path)


def test_a_good_file_is_accepted(cells, tmp_path):
    result, text = run(cells, "--json", tmp_path / "new" / "passport.json", "--min-genes", 300)
    assert result.exit_code == 0
    assert "file cells.h5ad (h5ad): 20 cells x 2,516 genes" in text
    assert text.endswith("verdict accepted")
    content = json.loads((tmp_path / "new" / "passport.json").read_text())
    assert (content["num_cells"], content["min_genes"], content["problems"]) == (20, 300, [])
    assert len(content["unmatched"]) == content["num_unmatched"] > 100


def test_a_bad_file_is_refused_with_the_flag_that_mends_it(cells, tmp_path):
    adata = anndata.read_h5ad(cells)
    adata.layers["umi"] = adata.X.copy()
    adata.X = adata.X.astype(np.float32).log1p()
    adata.write_h5ad(cells)
    result, text = run(cells)
    assert result.exit_code == 1
    assert "error:" not in text
    assert "verdict REFUSED, 1 to mend not-counts" in text
    assert "fix Raw counts are in layers/umi: --layer umi;" in text
    assert run(cells, "--layer", "umi")[0].exit_code == 0
    result, text = run(cells, "--allow", "not-counts")
    assert result.exit_code == 0
    assert "verdict accepted allowed not-counts" in text


def test_a_mistake_is_one_message(cells, tmp_path):
    for arguments, message in (
        ((tmp_path / "absent.h5ad",), "there is no file"),
        ((cells, "--allow", "all"), "error: allow: 'all' is no code of a problem; these can be allowed: not-counts,"),
        ((cells, "--json", cells), "cells.h5ad: the name of a new file is needed"),
        ((cells, "--json", tmp_path), "the name of a new file is needed"),
        ((cells, "--against", tmp_path), "is neither a finished corpus nor a checkpoint: it has no tokenizer"),
    ):
        result, text = run(*arguments)
        assert result.exit_code == 1
        assert message in text
    assert [path.name for path in tmp_path.iterdir()] == ["cells.h5ad"]


def test_the_cells_of_a_corpus_are_recognised_in_any_order_among_others(corpus, tmp_path):
    seen, others = make_cells(), make_cells(num_cells=10, seed=1)
    shuffled = anndata.concat([seen[30:], others, seen[:5]], index_unique="-", keys=["a", "b", "c"])[:, ::-1].copy()
    shuffled.obs_names = [f"renamed{at}" for at in range(33)]
    shuffled.write_h5ad(tmp_path / "mixed.h5ad")
    result, text = run(tmp_path / "mixed.h5ad", "--against", corpus, "--json", tmp_path / "passport.json")
    assert result.exit_code == 0, text
    assert f"seen 23 of 33 cells (69.7%) are in {corpus}" in text
    record = json.loads((tmp_path / "passport.json").read_text())["seen"]
    assert record == {"folder": corpus, "num_seen": 23, "num_indexed": 48}
    expected = [True] * 18 + [False] * 10 + [True] * 5
    assert find_seen_cells(tmp_path / "mixed.h5ad", corpus).is_seen.tolist() == expected


def test_the_vocabulary_is_that_of_the_folder(corpus, monkeypatch):
    monkeypatch.undo()
    assert tokenizer_of(corpus).fingerprint == make_tokenizer().fingerprint != tokenizer_fingerprint_by_default()
    with pytest.raises(FileNotFoundError, match=r"against: nowhere is neither a finished corpus nor a checkpoint"):
        tokenizer_of("nowhere")


def tokenizer_fingerprint_by_default():
    from screformer.tokenization import ScReformerTokenizer

    return ScReformerTokenizer().fingerprint


def test_a_checkpoint_that_does_not_say_what_it_has_seen(cells, tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "checkpoint")
    make_cells().write_h5ad(tmp_path / "small.h5ad")
    result, text = run(tmp_path / "small.h5ad", "--against", tmp_path / "checkpoint")
    assert result.exit_code == 1
    assert "says nothing of the cells it has seen" in text
