"""Embedding adds the encoder's vector of every cell to a copy of the file, from any checkpoint."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from small_corpus import NUM_GENES, make_cells, make_tokenizer

import screformer.annotation
from screformer import ScReformerForCellClassification, ScReformerForMaskedLM, ScReformerModel
from screformer.annotation import annotate_file, embed_file
from screformer.annotation import cell_source as cell_source_module
from screformer.train.inference import BatchInference


@pytest.fixture
def save_checkpoint(tiny_config, tmp_path):
    """Return a function: model class -> folder of a checkpoint, the same encoder for each class."""

    def save(model_class):
        tokenizer = make_tokenizer()
        folder = tmp_path / model_class.__name__
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(tiny_config(num_genes=NUM_GENES, tokenizer_fingerprint=tokenizer.fingerprint))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def cells(tmp_path):
    path = tmp_path / "cells.h5ad"
    make_cells().write_h5ad(path)
    return path


def embed(cells, checkpoint, output, **options):
    """Return the cells with their vectors, and the summary."""
    summary = embed_file(cells, checkpoint, output, **{"progress": False, **options})
    return anndata.read_h5ad(output), summary


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
@pytest.mark.parametrize("model_class", [ScReformerModel, ScReformerForMaskedLM, ScReformerForCellClassification])
def test_vectors_are_the_encoders_own_whichever_checkpoint(cells, save_checkpoint, tmp_path, model_class, gene_space):
    checkpoint = save_checkpoint(model_class)
    batch = make_tokenizer()(make_cells(), gene_space=gene_space, return_tensors="pt")
    with torch.no_grad():
        expected = ScReformerModel.from_pretrained(checkpoint).eval()(**batch).cell_embedding
    embedded, summary = embed(cells, checkpoint, tmp_path / "out.h5ad", gene_space=gene_space, batch_size=5)
    vectors = embedded.obsm["X_screformer"]
    assert vectors.dtype == np.float32
    assert vectors.shape == (48, 16)
    assert np.ptp(vectors, axis=0).min() > 0.01
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert (summary.num_cells, summary.hidden_size, summary.num_empty_cells) == (48, 16, 0)


def test_everything_else_stays_and_the_record_says_what_was_done(cells, save_checkpoint, tmp_path):
    checkpoint = save_checkpoint(ScReformerForMaskedLM)
    embedded, summary = embed(cells, checkpoint, tmp_path / "out.h5ad")
    before = anndata.read_h5ad(cells)
    pd.testing.assert_frame_equal(embedded.obs, before.obs)
    assert (embedded.X != before.X).nnz == 0
    record = embedded.uns["screformer_embedding"]
    assert record["model"]["name"] == str(checkpoint)
    assert record["model"]["tokenizer_fingerprint"] == make_tokenizer().fingerprint
    assert record["input"]["num_cells"] == 48
    assert record["input"]["gene_mapping"]["num_mapped"] == NUM_GENES
    text = str(summary)
    assert text.startswith("48 cells, 16 numbers each; 0 without counts on known genes")
    assert text.endswith(f"{tmp_path / 'out.h5ad'}: obsm['X_screformer']")


def test_cells_without_known_counts_get_nan_and_change_no_other(cells, save_checkpoint, tmp_path, caplog, monkeypatch):
    checkpoint = save_checkpoint(ScReformerModel)
    expected, _ = embed(cells, checkpoint, tmp_path / "expected.h5ad")
    before = make_cells()
    counts = sparse.vstack([before.X[:10], sparse.csr_matrix((1, NUM_GENES), dtype=np.int32), before.X[10:]])
    anndata.AnnData(counts.tocsr(), var=before.var).write_h5ad(tmp_path / "with_empty.h5ad")
    monkeypatch.setattr(cell_source_module, "CELLS_PER_BLOCK", 10)
    with caplog.at_level(logging.WARNING, logger="screformer"):
        embedded, summary = embed(tmp_path / "with_empty.h5ad", checkpoint, tmp_path / "out.h5ad", batch_size=3)
    assert "1 of 49 cells have no counts on known genes: their vectors are NaN" in caplog.text
    assert summary.num_empty_cells == 1
    vectors = embedded.obsm["X_screformer"]
    assert np.isnan(vectors[10]).all()
    np.testing.assert_allclose(np.delete(vectors, 10, axis=0), expected.obsm["X_screformer"], atol=1e-5)


def test_a_file_can_be_annotated_and_embedded_under_one_key(cells, save_checkpoint, tmp_path):
    checkpoint = save_checkpoint(ScReformerForCellClassification)
    annotate_file(cells, checkpoint, tmp_path / "annotated.h5ad", progress=False)
    both, _ = embed(tmp_path / "annotated.h5ad", checkpoint, tmp_path / "both.h5ad")
    assert {"screformer_cell_type", "screformer_probability"} < set(both.obs)
    assert set(both.obsm) == {"screformer_probabilities", "X_screformer"}
    assert set(both.uns) == {"screformer", "screformer_embedding"}


def test_existing_names_are_replaced_only_when_asked(cells, save_checkpoint, tmp_path):
    checkpoint = save_checkpoint(ScReformerModel)
    expected, _ = embed(cells, checkpoint, tmp_path / "first.h5ad")
    message = r"first.h5ad has obsm\['X_screformer'\], uns\['screformer_embedding'\] already; .*\(--key\)"
    with pytest.raises(ValueError, match=message):
        embed_file(tmp_path / "first.h5ad", checkpoint, tmp_path / "second.h5ad", progress=False)
    again, _ = embed(tmp_path / "first.h5ad", checkpoint, tmp_path / "second.h5ad", overwrite=True)
    np.testing.assert_array_equal(again.obsm["X_screformer"], expected.obsm["X_screformer"])


def test_nothing_is_left_when_the_model_fails(cells, save_checkpoint, tmp_path, monkeypatch):
    checkpoint = save_checkpoint(ScReformerModel)

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BatchInference, "__call__", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        embed_file(cells, checkpoint, tmp_path / "results" / "out.h5ad", progress=False)
    assert list((tmp_path / "results").iterdir()) == []


def test_refuses_the_input_as_output_and_options_out_of_range(cells, save_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is the file that is read; choose another name"):
        embed_file(cells, tmp_path, cells, overwrite=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        embed_file(cells, save_checkpoint(ScReformerModel), tmp_path / "out.h5ad", batch_size=-1)


def test_public_names_are_found_when_asked_for():
    assert {"AnnotationSummary", "annotate", "annotate_file", "embed_file"} <= set(dir(screformer.annotation))
    assert all(callable(getattr(screformer.annotation, name)) for name in dir(screformer.annotation))
    assert screformer.annotation.EmbeddingSummary.__module__ == "screformer.annotation.embed"
    with pytest.raises(AttributeError, match=r"module 'screformer.annotation' has no attribute 'nothing'"):
        _ = screformer.annotation.nothing


def test_annotate_is_a_function_and_a_module_of_the_same_name():
    from screformer.annotation import annotate

    assert annotate is screformer.annotation.annotate
    with pytest.raises(ValueError, match="key: the beginning of the new names"):
        screformer.annotation.annotate(None, "nowhere", key_added="a/b")
