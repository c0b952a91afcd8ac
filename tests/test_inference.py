"""A cell's output is its own: not that of its batch, its neighbours or its place."""

import numpy as np
import pytest
import torch
from small_corpus import NUM_GENES, make_corpus

from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerModel
from screformer.tokenization.corpus import open_corpus
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import CellCollator
from screformer.train.inference import BatchInference, predict_logits, predict_probabilities


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(make_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def rows(corpus):
    return list(corpus.dataset)


@pytest.fixture
def model(tiny_config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ScReformerForCellClassification(tiny_config(num_genes=NUM_GENES))


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_predictions_keep_the_order_and_do_not_depend_on_the_batch(model, rows, gene_space):
    together = predict_logits(model, rows, gene_space=gene_space, progress=False)
    assert np.ptp(together, axis=0).min() > 0.01
    for batch_size in (1, 5):
        again = predict_logits(model, rows, gene_space=gene_space, batch_size=batch_size, progress=False)
        np.testing.assert_allclose(again, together, atol=1e-5)
    turned = predict_logits(model, rows[::-1], gene_space=gene_space, batch_size=5, progress=False)
    np.testing.assert_allclose(turned[::-1], together, atol=1e-5)


def test_predictions_equal_the_models_own(model, rows):
    with torch.no_grad():
        expected = model.eval()(**CellCollator.from_config(model.config)(rows)).logits
    np.testing.assert_allclose(predict_logits(model, rows, progress=False), expected, atol=1e-5)


def test_embeddings_equal_the_encoders_own(tiny_config, rows):
    encoder = ScReformerModel(tiny_config(num_genes=NUM_GENES)).eval()
    with torch.no_grad():
        expected = encoder(**CellCollator.from_config(encoder.config)(rows)).cell_embedding
    embeddings = BatchInference(encoder, "cell_embedding", batch_size=7)(rows)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_progress_counts_every_cell_once(model, rows):
    advanced = []
    BatchInference(model, "logits", batch_size=7)(rows, advance=advanced.append)
    assert max(advanced) == 7
    assert sum(advanced) == len(rows)


def test_probabilities_sum_to_one_for_lists_and_datasets_alike(model, rows, corpus):
    from_list = predict_probabilities(model, rows, progress=False)
    from_dataset = predict_probabilities(model, corpus.dataset.with_format("numpy"), progress=False)
    np.testing.assert_allclose(from_list.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(from_list, from_dataset)
    cells = CellDataset(corpus)
    np.testing.assert_array_equal(from_list, predict_probabilities(model, cells, progress=False))
    turned = predict_probabilities(model, CellDataset(corpus, np.arange(48)[::-1]), batch_size=5, progress=False)
    np.testing.assert_allclose(turned[::-1], from_list, atol=1e-5)
    flat = cells.__getitems__(range(48))
    np.testing.assert_allclose(predict_probabilities(model, flat, progress=False), from_list, atol=1e-5)
    assert from_list.dtype == np.float32


def test_prediction_leaves_the_training_mode_as_it_was(model, rows):
    for mode in (True, False):
        model.train(mode)
        predict_logits(model, rows[:2], progress=False)
        assert model.training is mode


def test_no_cells_give_no_predictions(model):
    assert predict_probabilities(model, [], progress=False).shape == (0, 3)


def test_refuses_a_batch_without_cells_and_an_unknown_gene_space(model, rows):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        predict_logits(model, rows, batch_size=0)
    with pytest.raises(ValueError, match="gene_space must be 'full' or 'expressed', got 'some'"):
        predict_logits(model, rows, gene_space="some")
