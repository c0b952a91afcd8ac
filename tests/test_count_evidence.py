"""Counts are told from what is not by their values: real cells, and what is often made of them."""

import os
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from screformer.tokenization import GeneVocabulary, count_evidence, example_cells_path, open_count_matrix
from screformer.tokenization.count_evidence import examine_counts
from screformer.tokenization.stored_rows import CompressedColumns, CompressedRows, dense_matrix

REAL_FILES = sorted(Path(os.environ.get("SCREFORMER_REAL_CELLS", "/nowhere")).glob("*.h5ad"))


@pytest.fixture(scope="module")
def cells():
    return sparse.csr_matrix(anndata.read_h5ad(example_cells_path()).X[::20]).astype(np.float64)


def _examine(matrix, dtype=np.float32):
    matrix = sparse.csr_matrix(matrix).astype(dtype)
    return examine_counts("X", CompressedRows(matrix.data, matrix.indices, matrix.indptr, matrix.shape))


def _normalise(cells, target=10_000):
    return sparse.diags(target / np.asarray(cells.sum(1)).ravel()) @ cells


def _thin(cells, num_counts, seed=0):
    """Return cells as if sequenced less: each count kept with the same probability, `num_counts` a cell."""
    share = np.minimum(1, num_counts / np.asarray(cells.sum(1)).ravel())
    thinned = cells.tocsr().copy()
    generator = np.random.default_rng(seed)
    thinned.data = generator.binomial(thinned.data.astype(int), np.repeat(share, np.diff(thinned.indptr))).astype(float)
    thinned.eliminate_zeros()
    return thinned


def _estimate(cells):
    """Return cells some of whose counts are shared between genes, as quantifiers of transcripts give them."""
    estimated = cells.copy()
    estimated.data[::3] += 0.25
    return estimated


def _round(matrix):
    rounded = matrix.copy()
    rounded.data = np.round(rounded.data)
    rounded.eliminate_zeros()
    return rounded


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("num_counts", [1e9, 2000, 1000, 500, 250, 100])
def test_counts_are_counts_at_any_depth(cells, dtype, num_counts):
    evidence = _examine(_thin(cells, num_counts), dtype)
    assert evidence.problem is None
    assert evidence.is_counts
    assert evidence.share_integers == 1
    assert evidence.num_cells_sampled == cells.shape[0]


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_normalise, r"are not integers.*looks normalised: every cell sums to 10000"),
        (
            lambda x: _normalise(x).log1p(),
            r"normalised or log-transformed: log1p of values that summed to 1e\+04",
        ),
        (lambda x: _normalise(x, 1e6).log1p() / np.log(2), r"log2\(x \+ 1\) of values that summed to 1e\+06"),
        (lambda x: x.log1p(), "looks normalised or log-transformed. Pass raw counts"),
        (lambda x: _estimate(x), r"normalised or estimated \(RSEM, Salmon, SoupX"),
        (lambda x: -x, "negative values, the least is -.*looks scaled"),
        (lambda x: x * np.nan, "values are NaN or infinite"),
        (lambda x: x * np.inf, "values are NaN or infinite"),
        (lambda x: x * 0, "the values looked at are all 0"),
        (lambda x: x > 0, "every value is 1: this says whether a gene was seen"),
        (lambda x: _round(x.log1p()), "none over .* though a cell has .* log-transformed and then rounded"),
        (lambda x: _round(_normalise(x).log1p()), "log-transformed and then rounded"),
        (lambda x: _round(_normalise(x, 1e6).log1p() / np.log(2)), "log-transformed and then rounded"),
        (lambda x: _round(_normalise(x)), "cells have no gene with a count of 1.*normalised or multiplied"),
        (lambda x: x * 3, "normalised or multiplied and then rounded"),
        (lambda x: x * 1e5, r"largest value is .* whole numbers above 16777216 are not exact in float32"),
    ],
)
def test_what_is_made_of_counts_is_recognised(cells, spoil, problem):
    evidence = _examine(spoil(cells))
    assert not evidence.is_counts
    with pytest.raises(ValueError, match=problem):
        raise ValueError(evidence.problem)


def test_large_counts_are_exact_as_integers_and_as_float64(cells):
    cells = cells.copy()
    cells.data[0] = 2**24 + 2
    assert not _examine(cells, np.float32).is_counts
    assert _examine(cells, np.float64).is_counts
    assert _examine(cells, np.int32).is_counts


def test_a_few_small_cells_are_not_suspected():
    generator = np.random.default_rng(0)
    assert _examine(generator.poisson(0.5, (200, 60))).is_counts
    assert _examine(generator.poisson(0.5, (20, 1500))).is_counts
    assert _examine(np.eye(50)).is_counts
    assert _examine(np.full((40, 40), 7)).is_counts


def test_ten_sums_that_differ_are_not_called_constant(cells):
    half_rounded = cells.copy()
    half_rounded.data[::2] += 0.25
    assert "sums to" not in _examine(half_rounded).problem


def test_text_is_no_count():
    stored = dense_matrix(np.array([["3", "1"], ["0", "2"]]))
    assert examine_counts("X", stored).problem.startswith("the values are of type <U1, such as text, not numbers; conv")


def test_blocks_are_spread_over_the_matrix(monkeypatch):
    monkeypatch.setattr(count_evidence, "SAMPLED_VALUES", 100)
    matrix = sparse.csr_matrix(np.ones((1000, 10)) * 2)
    read = []

    class Spied(CompressedRows):
        def read(self, start, stop):
            read.append((start, stop))
            return super().read(start, stop)

    evidence = examine_counts("X", Spied(matrix.data, matrix.indices, matrix.indptr, matrix.shape))
    assert read == [(0, 20), (245, 265), (490, 510), (735, 755), (980, 1000)]
    assert evidence == count_evidence.CountEvidence("X", True, None, 1000, 1.0, 2.0, 2.0, 100, (20.0, 20.0, 20.0))


def test_a_large_matrix_by_columns_is_sampled_without_whole_cells(cells, monkeypatch):
    monkeypatch.setattr(count_evidence, "SMALL_MATRIX", 1000)
    monkeypatch.setattr(count_evidence, "SAMPLED_VALUES", 500)
    for matrix, is_counts in ((cells, True), (_normalise(cells).log1p(), False)):
        columns = matrix.tocsc()
        stored = CompressedColumns(columns.data, columns.indices, columns.indptr, columns.shape)
        evidence = examine_counts("X", stored)
        assert evidence.is_counts == is_counts
        assert evidence.num_values == 20 * 500
        assert evidence.num_cells_sampled == 0
        assert evidence.cell_sums == (0, 0, 0)


@pytest.mark.skipif(not REAL_FILES, reason="the real files are not here")
@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: path.stem)
def test_real_files_hold_counts(path):
    with open_count_matrix(path, vocabulary=GeneVocabulary(["ENSG00000000001"])) as matrix:
        assert matrix.count_source == "X"
        assert matrix.evidence[0].problem is None
