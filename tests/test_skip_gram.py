import logging
from itertools import combinations

import numpy as np
import pytest

from screformer.tokenization import skip_gram
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.tokenization.skip_gram import train_skip_gram

NUM_GENES = 20
OPTIONS = {"num_dimensions": 8, "num_epochs": 5}


@pytest.fixture
def vocabulary():
    return GeneVocabulary([f"ENSG{number:011d}" for number in range(NUM_GENES)])


@pytest.fixture
def two_clusters():
    """Every pair within the genes 0 to 7 and 10 to 17, fifty times."""
    pairs = [pair for first in (0, 10) for pair in combinations(range(first, first + 8), 2)]
    return np.array(pairs * 50, np.int32)


def test_genes_of_the_same_pairs_come_near(vocabulary, two_clusters):
    pytest.importorskip("gensim")
    vectors = train_skip_gram(two_clusters, vocabulary, learning_rate=0.1, **OPTIONS)
    assert vectors.genes == [vocabulary.ensembl_ids[gene] for gene in [*range(8), *range(10, 18)]]
    assert vectors.vectors.shape == (16, 8)
    directions = vectors.vectors / np.linalg.norm(vectors.vectors, axis=1, keepdims=True)
    similarity = directions @ directions.T
    within = similarity[:8, :8][~np.eye(8, dtype=bool)]
    assert within.min() > similarity[:8, 8:].max()


def test_the_same_seed_gives_the_same_bits(vocabulary, two_clusters):
    pytest.importorskip("gensim")
    first, again, other = (train_skip_gram(two_clusters, vocabulary, seed=seed, **OPTIONS) for seed in (1, 1, 2))
    assert np.array_equal(first.vectors, again.vectors)
    assert not np.array_equal(first.vectors, other.vectors)


def test_walks_are_sentences_too(vocabulary):
    pytest.importorskip("gensim")
    # Two rings; neighbours on a ring are within two steps.
    steps = (np.arange(200)[:, None] + np.arange(12)) % 8
    walks = np.concatenate([steps, steps + 10]).astype(np.int32)
    vectors = train_skip_gram(walks, vocabulary, window=2, learning_rate=0.1, **OPTIONS).vectors
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = directions @ directions.T
    assert similarity[:8, :8].mean() > similarity[:8, 8:].mean() + 0.3


def test_the_hash_is_a_checksum_and_not_that_of_the_process():
    assert skip_gram._hash_text("17") == 1060745282


def test_gensims_absence_is_said_with_the_remedy(vocabulary, two_clusters, monkeypatch):
    monkeypatch.setattr(skip_gram, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r'needs gensim: pip install "screformer\[gene2vec\]"'):
        train_skip_gram(two_clusters, vocabulary)


@pytest.mark.parametrize("name", ["num_dimensions", "window", "num_epochs", "num_negatives", "learning_rate"])
def test_numbers_are_positive(vocabulary, two_clusters, name):
    with pytest.raises(ValueError, match=f"{name}: more than 0, got 0"):
        train_skip_gram(two_clusters, vocabulary, **{name: 0})


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (np.zeros((0, 2), np.int32), r"at least 2 genes\) is needed, got shape \(0, 2\)"),
        (np.zeros((3, 1), np.int32), r"got shape \(3, 1\)"),
        (np.zeros(4, np.int32), r"got shape \(4,\)"),
        (np.array([[0, NUM_GENES]], np.int32), "positions 0 to 19 are allowed, got 0 to 20"),
        (np.array([[-1, 3]], np.int32), "got -1 to 3"),
    ],
)
def test_sentences_are_positions(vocabulary, sentences, message):
    with pytest.raises(ValueError, match=message):
        train_skip_gram(sentences, vocabulary)


def test_nothing_is_left_behind(vocabulary, two_clusters, tmp_path, monkeypatch, caplog):
    pytest.importorskip("gensim")
    monkeypatch.setattr(skip_gram.tempfile, "tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        train_skip_gram(two_clusters, vocabulary, **OPTIONS)
    assert not list(tmp_path.iterdir())
    assert not caplog.records
