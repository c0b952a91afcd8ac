"""Gene embeddings that start as principal components of the training cells."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse
from small_corpus import TINY_MODEL, make_cells, make_corpus

from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train import gene_start
from screformer.train.arguments import ModelArguments, PretrainingArguments, PretrainingDataArguments
from screformer.train.expression_levels import read_levels
from screformer.train.gene_start import component_gene_vectors
from screformer.train.pretrain import pretrain
from screformer.train.result_files import read_json

NEW_MODEL = ModelArguments(config_overrides=TINY_MODEL)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def settings(output, **options):
    """One step at a rate of 0: the start stays."""
    options = {"max_steps": 1, "learning_rate": 0.0, **options}
    return PretrainingArguments(output_dir=str(output), use_cpu=True, disable_tqdm=True, **options)


def cells_of(corpus, **options):
    return PretrainingDataArguments(corpus=corpus, gene_start="principal_components", **options)


def gene_embeddings(folder):
    return ScReformerForMaskedLM.from_pretrained(folder).screformer.embeddings.gene_embeddings.weight.detach()


def test_levels_are_the_bins_as_shares_of_the_highest(corpus):
    opened = open_corpus(corpus)
    levels = read_levels(opened, np.array([5, 2]), 40, 6)
    assert levels.shape == (2, 40)
    row = opened.dataset[2]
    expected = np.zeros(40)
    expected[row["gene_ids"]] = np.array(row["input_ids"]) / 5
    np.testing.assert_array_equal(levels.toarray()[1], expected)


def test_vectors_reproduce_the_best_approximation_of_the_cells():
    generator = np.random.default_rng(0)
    cells = generator.poisson(np.outer(generator.random(30), generator.random(20)) * 5).astype(float)
    cells[:, 7] = 0
    vectors = component_gene_vectors(sparse.csr_array(cells), 3, seed=0)
    # Their outer product is the square root of cells' @ cells, cut to the three largest singular values.
    values, directions = np.linalg.eigh(cells.T @ cells)
    expected = (directions[:, -3:] * np.sqrt(np.maximum(values[-3:], 0))) @ directions[:, -3:].T
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=0.05 * expected.max())
    np.testing.assert_allclose(vectors[7], 0, atol=1e-12)


def test_a_new_model_starts_from_its_training_cells_alone(corpus, tmp_path):
    data = cells_of(corpus, group_column="donor", exclude_groups=["human4"])
    result = pretrain(NEW_MODEL, data, settings(tmp_path / "out"))
    number = round(36 * 0.9)
    facts = read_json(tmp_path / "out" / "training.json")["gene_start"]
    assert facts == {"method": "principal_components", "num_cells": number, "num_dimensions": 16}
    found = gene_embeddings(result.output_dir)
    assert found.std() == pytest.approx(0.5, rel=1e-3)  # the config's embedding_initializer_range
    # Other donors' counts have no part in it.
    cells = make_cells()
    counts = cells.X.toarray()
    counts[cells.obs["donor"].to_numpy() == "human4", :5] = 500
    cells.X = sparse.csr_matrix(counts)
    other = make_corpus(tmp_path, cells=cells)
    again = pretrain(NEW_MODEL, replace(data, corpus=other), settings(tmp_path / "again"))
    torch.testing.assert_close(gene_embeddings(again.output_dir), found)


def test_genes_of_one_cell_type_are_closer_than_those_of_another(corpus, tmp_path):
    vectors = gene_embeddings(pretrain(NEW_MODEL, cells_of(corpus), settings(tmp_path)).output_dir)[:, 1:]
    alpha, beta = vectors[:6].mean(dim=0), vectors[6:12].mean(dim=0)
    assert torch.cosine_similarity(alpha, beta, dim=0) < -0.5
    assert torch.cosine_similarity(vectors[0], alpha, dim=0) > 0.5


def test_many_cells_are_drawn_from(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(gene_start, "MAX_CELLS", 20)
    pretrain(NEW_MODEL, cells_of(corpus), settings(tmp_path))
    assert read_json(tmp_path / "training.json")["gene_start"]["num_cells"] == 20


def test_too_few_cells_are_refused_with_the_remedy(corpus, tmp_path):
    model = ModelArguments(config_overrides=["hidden_size=64", *TINY_MODEL[1:]])
    with pytest.raises(ValueError, match="needs more training cells than the model's hidden_size of 64, got 43; use"):
        pretrain(model, cells_of(corpus), settings(tmp_path))


@pytest.mark.parametrize("other", [{"gene2vec": "vectors.npy"}, {"checkpoint": "somewhere"}])
def test_two_starts_are_refused(corpus, tmp_path, other):
    with pytest.raises(ValueError, match=r"gene_start='principal_components' and \{'.* both bring gene embeddings"):
        pretrain(ModelArguments(**other), cells_of(corpus), settings(tmp_path))


def test_a_start_that_does_not_exist_is_refused(corpus):
    with pytest.raises(ValueError, match="gene_start got 'ones'; it must be one of random, principal_components"):
        PretrainingDataArguments(corpus=corpus, gene_start="ones")
