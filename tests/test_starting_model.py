import logging

import numpy as np
import pytest
import torch
from small_corpus import GENES, TINY_MODEL, make_corpus, make_tokenizer

from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM
from screformer.tokenization.gene2vec import GeneVectors, save_gene_vectors
from screformer.train.arguments import ModelArguments
from screformer.train.pretrain import main
from screformer.train.starting_model import starting_model

NUM_KNOWN = 30


@pytest.fixture
def vectors_path(tmp_path):
    values = np.random.default_rng(0).normal(2, 3, size=(NUM_KNOWN + 1, 16)).astype(np.float32)
    save_gene_vectors(GeneVectors([*GENES[:NUM_KNOWN], "NOSUCHGENE"], values), tmp_path / "vectors.safetensors")
    return str(tmp_path / "vectors.safetensors")


def start(model_class=ScReformerForMaskedLM, **options):
    torch.manual_seed(0)
    labels = {} if model_class is ScReformerForMaskedLM else {"label_names": ["alpha", "beta"]}
    arguments = ModelArguments(**{"preset": "tiny", "config_overrides": TINY_MODEL, **options})
    return starting_model(model_class, make_tokenizer(), arguments, **labels)


@pytest.mark.parametrize("model_class", [ScReformerForMaskedLM, ScReformerForCellClassification])
def test_gene_embeddings_start_from_the_vectors_and_the_others_stay(vectors_path, model_class, caplog):
    with caplog.at_level(logging.INFO, logger="screformer"):
        model = start(model_class, gene2vec=vectors_path)
    weight = model.base_model.embeddings.gene_embeddings.weight.detach()
    random = start(model_class).base_model.embeddings.gene_embeddings.weight.detach()
    torch.testing.assert_close(weight[NUM_KNOWN:], random[NUM_KNOWN:])
    given = torch.from_numpy(np.random.default_rng(0).normal(2, 3, size=(NUM_KNOWN + 1, 16)).astype(np.float32))
    scale = model.config.embedding_initializer_range / given[:NUM_KNOWN].std()
    torch.testing.assert_close(weight[:NUM_KNOWN], given[:NUM_KNOWN] * scale)
    assert "30 of the 40 genes (75.0%) have a vector" in caplog.text
    assert "NOSUCHGENE" in caplog.text


def test_vectors_of_another_length_are_refused_with_both_numbers(vectors_path):
    with pytest.raises(ValueError, match=r"vectors of length 16, but the model's hidden_size is 32; train vectors"):
        start(gene2vec=vectors_path, config_overrides=["hidden_size=32", *TINY_MODEL[1:]])


def test_a_checkpoint_brings_its_own_embeddings(vectors_path):
    with pytest.raises(ValueError, match=r"gene2vec='vectors.npy' is where .* checkpoint='pretrained' brings its own"):
        ModelArguments(checkpoint="pretrained", gene2vec="vectors.npy")


def test_the_command_line_of_pretraining_takes_the_vectors(vectors_path, tmp_path):
    corpus = make_corpus(tmp_path)
    options = ["--corpus", corpus, "--preset", "tiny", "--config_overrides", *TINY_MODEL, "--gene2vec", vectors_path]
    shorter = ["--max_steps", "1", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    main([*options, *shorter, "--learning_rate", "0", "--warmup_steps", "0"])
    trained = ScReformerForMaskedLM.from_pretrained(tmp_path / "out").base_model.embeddings.gene_embeddings.weight
    torch.testing.assert_close(
        trained[:NUM_KNOWN], start(gene2vec=vectors_path).base_model.embeddings.gene_embeddings.weight[:NUM_KNOWN]
    )
