"""A cell is recognised by its counts, whatever the file, the order of genes, or how its counts are stored."""

import json

import anndata
import numpy as np
import pytest
import scipy.sparse
from small_corpus import GENES, make_cells, make_tokenizer

from screformer.tokenization import GeneVocabulary, ScReformerTokenizer, build_corpus, open_count_matrix
from screformer.tokenization.cell_hashes import CellHasher, is_in, mix_with, seen_cells, write_seen_cells
from screformer.tokenization.expression_bins import CountsCSR, as_counts_csr

VOCABULARY = GeneVocabulary([f"ENSG{at:011d}" for at in range(30)])


def hash_counts(counts, names=None, vocabulary=VOCABULARY):
    names = vocabulary.ensembl_ids if names is None else names
    return CellHasher(vocabulary, vocabulary.map_names(names).positions).hash_cells(as_counts_csr(counts))


@pytest.fixture
def counts():
    """Raw counts of 50 cells; one is empty, one has a large count."""
    counts = np.random.default_rng(0).poisson(0.8, size=(50, 30))
    counts[7] = 0
    counts[8, 3] = 100_000
    return counts


def test_different_cells_differ_and_empty_ones_are_0(counts) -> None:
    hashes = hash_counts(counts)
    assert hashes.dtype == np.uint64
    assert len(np.unique(hashes)) == len(np.unique(counts, axis=0))
    assert np.flatnonzero(hashes == 0).tolist() == [7]


def test_one_count_more_changes_the_hash(counts) -> None:
    counts[7, 0] = 1
    for gene in range(30):
        more = counts.copy()
        more[:, gene] += 1
        assert not (hash_counts(more) == hash_counts(counts)).any()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_types_and_formats_do_not_matter(counts, kind) -> None:
    counts = np.minimum(counts, 200)
    expected = hash_counts(counts)
    for matrix in (counts, scipy.sparse.csr_matrix(counts), scipy.sparse.csc_matrix(counts)):
        assert (hash_counts(matrix.astype(kind)) == expected).all()


def test_order_of_genes_cells_and_vocabulary_does_not_matter(counts) -> None:
    expected = hash_counts(counts)
    order = np.random.default_rng(1).permutation(30)
    names = np.array(VOCABULARY.ensembl_ids)
    assert (hash_counts(counts[:, order], names[order]) == expected).all()
    assert (hash_counts(counts[::-1]) == expected[::-1]).all()
    assert (hash_counts(counts, names, GeneVocabulary(names[order].tolist())) == expected).all()


def test_columns_and_entries_of_one_gene_are_summed(counts) -> None:
    expected = hash_counts(counts)
    part = np.minimum(counts[:, :10], 1)
    split = np.concatenate([counts[:, :10] - part, counts[:, 10:], part], axis=1)
    names = VOCABULARY.ensembl_ids
    assert (hash_counts(split, [*names, *names[:10]]) == expected).all()
    csr = scipy.sparse.csr_matrix(counts)
    # Every entry twice, in descending order, with half of its count; explicit zeros too.
    rows = [np.repeat(np.arange(30)[::-1], 2) for _ in range(50)]
    halves = [np.stack([row[::-1] // 2, row[::-1] - row[::-1] // 2], axis=1).ravel() for row in counts]
    twice = CountsCSR(np.arange(51) * 60, np.concatenate(rows), np.concatenate(halves), 30)
    assert (CellHasher(VOCABULARY, np.arange(30)).hash_cells(twice) == hash_counts(csr)).all()


def test_genes_outside_the_vocabulary_do_not_matter(counts) -> None:
    other = np.concatenate([counts, np.full((50, 2), 9)], axis=1)
    names = [*VOCABULARY.ensembl_ids, "ENSG99999999999", "unknown"]
    assert (hash_counts(other, names) == hash_counts(counts)).all()


def test_hashes_are_spread_evenly() -> None:
    generator = np.random.default_rng(2)
    hashes = hash_counts(generator.poisson(1.0, size=(20_000, 30)))
    hashes = np.unique(hashes)
    for seed in (None, 1):
        bits = hashes if seed is None else mix_with(hashes, seed)
        share = np.mean((bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1), axis=0)
        # Five standard deviations of a fair coin.
        assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(len(hashes))


def test_is_in_an_index() -> None:
    index = np.array([3, 5, 2**63], np.uint64)
    assert is_in(index, np.array([5, 4, 2**63, 2**64 - 1, 0], np.uint64)).tolist() == [True, False, True, False, False]
    assert is_in(index[:0], index).tolist() == [False] * 3


@pytest.fixture
def corpus(tmp_path):
    make_cells(40, seed=0).write_h5ad(tmp_path / "cells.h5ad")
    return build_corpus(tmp_path / "cells.h5ad", tmp_path / "corpus", tokenizer=make_tokenizer())


def test_a_corpus_knows_its_cells_in_another_file(tmp_path, corpus) -> None:
    known, new = make_cells(40, seed=0)[10:25], make_cells(20, seed=1)
    new.obs_names = "new" + new.obs_names
    empty = new[:1].copy()
    empty.obs_names, empty.X = ["empty"], scipy.sparse.csr_matrix((1, len(GENES)), dtype=np.int32)
    mixed = anndata.concat([new, known, empty])[:, ::-1].copy()
    mixed.write_h5ad(tmp_path / "mixed.h5ad")
    write_seen_cells(tmp_path, [corpus.cell_hashes[:12], corpus.cell_hashes[:11]], corpus.tokenizer().gene_vocabulary)
    with open_count_matrix(tmp_path / "mixed.h5ad", vocabulary=corpus.tokenizer().gene_vocabulary) as matrix:
        found = seen_cells(matrix, corpus.tokenizer(), corpus.folder)
        assert (found.num_cells, found.num_seen, found.num_empty, found.num_indexed) == (36, 15, 1, 40)
        assert found.is_seen.tolist() == [False] * 20 + [True] * 15 + [False]
        assert found.share == 15 / 36
        of_checkpoint = seen_cells(matrix, corpus.tokenizer(), tmp_path)
        assert (of_checkpoint.num_seen, of_checkpoint.num_indexed) == (2, 12)


def test_an_index_that_cannot_be_compared_is_refused(tmp_path, corpus) -> None:
    with open_count_matrix(tmp_path / "cells.h5ad", vocabulary=corpus.tokenizer().gene_vocabulary) as matrix:
        other = ScReformerTokenizer(GeneVocabulary(GENES[:-1], name="fewer"))
        with pytest.raises(ValueError, match="hashed over other genes than those of the vocabulary 'fewer'"):
            seen_cells(matrix, other, corpus.folder)
        with pytest.raises(FileNotFoundError, match="says nothing of the cells it has seen"):
            seen_cells(matrix, corpus.tokenizer(), tmp_path)
        index = corpus.folder / "cell_hashes.npy"
        index.write_bytes(index.read_bytes()[:-1] + b"\0")
        with pytest.raises(ValueError, match=r"cell_hashes\.npy is damaged"):
            seen_cells(matrix, corpus.tokenizer(), corpus.folder)
        manifest = corpus.folder / "manifest.json"
        content = json.loads(manifest.read_text())
        content.pop("cell_hashes")
        manifest.write_text(json.dumps(content))
        with pytest.raises(FileNotFoundError, match=r"has no cell_hashes\.npy; build it again"):
            seen_cells(matrix, corpus.tokenizer(), corpus.folder)
