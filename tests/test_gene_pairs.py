import anndata
import numpy as np
import pandas as pd
import pytest
from small_corpus import GENES, NUM_GENES, make_cells, make_corpus, make_tokenizer

from screformer.tokenization import gene_pairs
from screformer.tokenization.corpus import build_corpus, open_corpus
from screformer.tokenization.gene_pairs import CellGroup, PairRules, cell_groups, find_gene_pairs, measure_genes

LOOSE = PairRules(min_correlation=0.3, min_z=0, num_neighbors=5, min_cell_share=0, min_cells=2)


def correlated_cells(num_cells=300, seed=0):
    """Return raw counts in which the genes 0 to 2, and 3 to 5, rise and fall together."""
    generator = np.random.default_rng(seed)
    rates = np.full((num_cells, NUM_GENES), 2.0)
    for first in (0, 3):
        rates[:, first : first + 3] *= generator.gamma(0.5, 4, size=(num_cells, 1))
    rates[:, -1] = 3000
    obs = pd.DataFrame({"donor": np.where(np.arange(num_cells) % 3, "a", "b")}, index=map(str, range(num_cells)))
    return anndata.AnnData(generator.poisson(rates).astype(np.int32), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(
        make_corpus(tmp_path_factory.mktemp("pairs"), cells=correlated_cells(), num_bins=12, obs_columns=["donor"])
    )


def dense_bins(corpus, rows=None):
    cells = corpus.dataset if rows is None else corpus.dataset.select(rows)
    bins = np.zeros((len(cells), NUM_GENES))
    for row, cell in enumerate(cells):
        bins[row, cell["gene_ids"]] = cell["input_ids"]
    return bins


def pairs_of(found, group=0):
    chosen = found.groups == group
    return dict(zip(map(tuple, found.genes[chosen].tolist()), found.correlations[chosen].tolist(), strict=True))


def test_correlations_are_those_of_the_bins(corpus):
    rules = PairRules(min_correlation=0, min_z=0, num_neighbors=NUM_GENES, min_cell_share=0, min_cells=1)
    found = pairs_of(find_gene_pairs(corpus, rules))
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.corrcoef(dense_bins(corpus).T)  # NaN for the last gene, which has the same bin in every cell
    for first in range(NUM_GENES):
        for second in range(first + 1, NUM_GENES):
            if expected[first, second] > 1e-6:
                assert found.pop((first, second)) == pytest.approx(expected[first, second], abs=1e-5)
    assert not {pair for pair, value in found.items() if value > 1e-6}


def test_planted_pairs_are_found_and_no_others(corpus):
    found = find_gene_pairs(corpus, LOOSE)
    assert set(pairs_of(found)) == {(0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5)}
    assert found.genes.dtype == np.int32
    row = {"group": "cells.h5ad", "num_cells": 300, "num_genes": found.num_genes[0], "num_pairs": 6}
    assert found.describe() == [row]
    assert len(found) == 6


def test_the_result_does_not_depend_on_memory_or_blocks(corpus, monkeypatch):
    rules = PairRules(min_correlation=0, min_z=0, num_neighbors=4, min_cell_share=0, min_cells=1)
    whole = find_gene_pairs(corpus, rules)
    monkeypatch.setattr(gene_pairs, "CELLS_PER_BLOCK", 17)
    monkeypatch.setattr(gene_pairs, "ROWS_PER_CHOICE", 3)
    tiled = find_gene_pairs(corpus, rules, memory=4 * NUM_GENES * 7 / 1e9)  # seven genes at a time
    assert np.array_equal(whole.genes, tiled.genes)
    np.testing.assert_allclose(whole.correlations, tiled.correlations, atol=1e-6)


def test_memory_bounds_the_sums_held_at_a_time(corpus):
    group, num_held = cell_groups(corpus)[0], 5
    moments = measure_genes(corpus, group, NUM_GENES)
    genes = np.arange(20)
    memory = 4 * len(genes) * num_held / 1e9
    tiles = list(gene_pairs._correlation_tiles(corpus, group.rows, moments, genes, memory))
    assert [first for first, _ in tiles] == [0, 5, 10, 15]
    assert all(tile.shape == (num_held, 20) for _, tile in tiles)


def test_groups_are_correlated_apart(corpus):
    found = find_gene_pairs(corpus, LOOSE, group_column="donor")
    assert found.group_names == ["a", "b"]
    assert found.num_cells == [200, 100]
    for group, donor in enumerate("ab"):
        rows = [row for row, value in enumerate(corpus.dataset["donor"]) if value == donor]
        expected = np.corrcoef(dense_bins(corpus, rows)[:, :-1].T)  # the last has the same bin everywhere
        for (first, second), value in pairs_of(found, group).items():
            assert value == pytest.approx(expected[first, second], abs=1e-5)


def test_each_file_is_a_group(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        correlated_cells(60, seed).write_h5ad(tmp_path / f"{name}.h5ad")
    made = build_corpus(
        [tmp_path / "one.h5ad", tmp_path / "two.h5ad"],
        tmp_path / "corpus",
        tokenizer=make_tokenizer(12),
        cells_per_shard=25,
    )
    groups = cell_groups(made)
    assert [group.name for group in groups] == ["one.h5ad", "two.h5ad"]
    assert np.array_equal(np.concatenate([group.rows for group in groups]), np.arange(120))
    # Two groups find the same pairs, which then count twice.
    found = find_gene_pairs(made, LOOSE)
    assert np.unique(found.genes, axis=0).shape[0] < len(found)


def test_values_of_a_column_are_read_in_parts(corpus, monkeypatch):
    whole = cell_groups(corpus, group_column="donor")
    monkeypatch.setattr(gene_pairs, "VALUES_A_READ", 7)
    for one, other in zip(whole, cell_groups(corpus, group_column="donor"), strict=True):
        assert one.name == other.name
        assert np.array_equal(one.rows, other.rows)
        assert set(corpus.dataset.select(one.rows)["donor"]) == {one.name}


def test_large_groups_are_sampled_the_same_way_every_time(corpus):
    first, again, other = (cell_groups(corpus, max_cells=50, seed=seed)[0].rows for seed in (1, 1, 2))
    assert len(first) == len(set(first.tolist())) == 50
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (np.diff(first) > 0).all()
    assert find_gene_pairs(corpus, PairRules(max_cells=50)).num_cells == [50]


def test_few_cells_need_higher_correlations():
    rules = PairRules(min_correlation=0.1, min_z=5)
    assert rules.threshold(100_000) == 0.1
    # Under independence one pair in 3.5 million passes: five standard errors of Fisher's z.
    assert np.arctanh(rules.threshold(103)) * np.sqrt(100) == pytest.approx(5)
    assert rules.least_cells(100) == 10
    assert rules.least_cells(5001) == 51


def test_chance_passes_seldom(tmp_path):
    cells = make_cells(200, types=["same"])
    corpus = open_corpus(make_corpus(tmp_path, cells=cells, num_bins=12))
    with pytest.raises(ValueError, match=r"no pair of genes passes in 200 cells with PairRules\(.*loosen the rules"):
        find_gene_pairs(corpus)


def test_genes_are_measured_as_they_are(corpus):
    rows = np.arange(10, 40)
    moments = measure_genes(corpus, CellGroup("some", rows), NUM_GENES)
    bins = dense_bins(corpus, rows)
    assert moments.num_cells == 30
    np.testing.assert_array_equal(moments.num_expressing, (bins > 0).sum(axis=0))
    np.testing.assert_allclose(moments.means, bins.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(moments.standard_deviations, bins.std(axis=0), atol=1e-7)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"min_correlation": 1.5}, r"min_correlation: 0 to 1, got 1\.5"),
        ({"min_z": -1}, "min_z: at least 0, got -1"),
        ({"num_neighbors": 0}, "num_neighbors: at least 1, got 0"),
        ({"min_cell_share": 2}, "min_cell_share: 0 to 1, got 2"),
        ({"min_cells": 0}, "min_cells: at least 1, got 0"),
        ({"max_cells": 9}, "max_cells: at least 10, got 9"),
        ({"min_correlation": float("nan")}, "min_correlation: 0 to 1, got nan"),
    ],
)
def test_rules_are_in_their_range(rules, message):
    with pytest.raises(ValueError, match=message):
        PairRules(**rules)


def test_unknown_columns_and_no_memory_are_refused(corpus):
    with pytest.raises(ValueError, match=r"group_column='batch' is not in the corpus, which has \[.*'donor'\]"):
        find_gene_pairs(corpus, group_column="batch")
    with pytest.raises(ValueError, match="memory: more than 0 GB, got 0"):
        find_gene_pairs(corpus, memory=0)


def test_nearest_pairs_are_those_of_a_search_with_fewer_neighbors(corpus):
    rules = {"min_correlation": 0, "min_z": 0, "min_cell_share": 0, "min_cells": 1}
    many, few = (
        find_gene_pairs(corpus, PairRules(num_neighbors=count, **rules), group_column="donor") for count in (12, 3)
    )
    assert len(many) > len(few)
    nearest = many.nearest(3)
    for group in (0, 1):
        assert pairs_of(nearest, group).keys() == pairs_of(few, group).keys()
    assert len(many.nearest(12)) == len(many)
