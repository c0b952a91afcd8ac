"""Gene vectors by skip-gram with negative sampling (word2vec, by gensim), over pairs of genes or walks on a graph.

A sentence is a pair of co-expressed genes (Gene2vec, Du et al. 2019), or the genes that a walk over a graph meets
(node2vec). The same sentences, options and seed give the same vectors, to the bit, with the same versions on the same
kind of machine: one thread, a fixed hash, a shuffle by the seed.
"""

from __future__ import annotations

import tempfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from screformer.tokenization.gene2vec import GeneVectors, names_of
from screformer.tokenization.gene_vocabulary import GeneVocabulary

SENTENCES_A_WRITE = 100_000
LEAST_RATE_SHARE = 0.004  # of the learning rate, at the end: word2vec's 0.0001 of 0.025


def train_skip_gram(
    sentences: npt.NDArray[np.int32],
    vocabulary: GeneVocabulary,
    *,
    num_dimensions: int = 200,
    window: int = 1,
    num_epochs: int = 10,
    num_negatives: int = 5,
    learning_rate: float = 0.025,
    seed: int = 2022,
) -> GeneVectors:
    """Train a vector for every gene that is in a sentence.

    Parameters
    ----------
    sentences
        int32 (num_sentences, length): positions in `vocabulary`; pairs have the length 2.
    vocabulary
        What the positions mean. The vectors are named by its Ensembl ids.
    num_dimensions
        Length of a vector; 200 as in the paper.
    window
        How far apart genes of a sentence may be to count as neighbours.
    num_epochs
        Readings of all sentences.
    num_negatives
        Random genes that each neighbour is told apart from.
    learning_rate
        At the start; it falls linearly.
    seed
        Of the shuffle, the first vectors, and the negatives.

    Raises
    ------
    ModuleNotFoundError
        gensim is not installed.
    ValueError
        A number is out of its range.
    """
    _check_sentences(sentences, len(vocabulary))
    for name, value in (
        ("num_dimensions", num_dimensions),
        ("window", window),
        ("num_epochs", num_epochs),
        ("num_negatives", num_negatives),
        ("learning_rate", learning_rate),
    ):
        if value <= 0:
            msg = f"{name}: more than 0, got {value}"
            raise ValueError(msg)
    word2vec = _import_word2vec()
    with tempfile.TemporaryDirectory(prefix="gene2vec-") as folder:
        corpus_file = Path(folder) / "sentences.txt"
        _write_sentences(sentences, corpus_file, seed)
        model = word2vec(
            vector_size=num_dimensions,
            window=window,
            negative=num_negatives,
            alpha=learning_rate,
            seed=seed,
            sg=1,
            min_count=1,
            sample=0,  # a pair that loses one gene teaches nothing
            workers=1,
            hashfxn=_hash_text,
        )
        model.build_vocab(corpus_file=str(corpus_file))
        rates = np.linspace(learning_rate, LEAST_RATE_SHARE * learning_rate, num_epochs + 1).tolist()
        for epoch in tqdm(range(num_epochs), desc="skip-gram", unit="epoch", disable=None):
            model.train(
                corpus_file=str(corpus_file),
                total_examples=model.corpus_count,
                total_words=model.corpus_total_words,
                epochs=1,
                start_alpha=rates[epoch],
                end_alpha=rates[epoch + 1],
            )
    positions = np.unique(sentences)
    vectors = np.stack([model.wv[str(position)] for position in positions.tolist()])
    return GeneVectors(names_of(vocabulary, positions), vectors.astype(np.float32))


def _check_sentences(sentences: npt.NDArray[np.int32], num_genes: int) -> None:
    if sentences.ndim != 2 or len(sentences) == 0 or sentences.shape[1] < 2:
        msg = f"sentences: (number, at least 2 genes) is needed, got shape {sentences.shape}"
        raise ValueError(msg)
    if sentences.min() < 0 or sentences.max() >= num_genes:
        msg = f"sentences: positions 0 to {num_genes - 1} are allowed, got {sentences.min()} to {sentences.max()}"
        raise ValueError(msg)


def _import_word2vec() -> Any:  # gensim has no types
    if find_spec("gensim") is None:
        msg = 'training gene vectors needs gensim: pip install "screformer[gene2vec]"'
        raise ModuleNotFoundError(msg)
    from gensim.models import Word2Vec

    return Word2Vec


def _write_sentences(sentences: npt.NDArray[np.int32], path: Path, seed: int) -> None:
    """Write one sentence a line, in random order; gensim then reads them without Python, far faster."""
    order = np.random.default_rng(seed).permutation(len(sentences))
    words = [str(position) for position in range(int(sentences.max()) + 1)]
    with path.open("w", encoding="ascii") as file:
        for start in range(0, len(order), SENTENCES_A_WRITE):
            chosen = sentences[order[start : start + SENTENCES_A_WRITE]].tolist()
            file.writelines(" ".join([words[gene] for gene in sentence]) + "\n" for sentence in chosen)


def _hash_text(text: str) -> int:
    return zlib.crc32(text.encode())
