"""Compressed rows give the same tokens, to the bit, as cells laid out densely in float64."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oracles import dense_tokenizer as oracle
from screformer.tokenization import GeneVocabulary, ScReformerTokenizer, row_tokens
from screformer.tokenization.expression_bins import (
    LARGEST_WHOLE,
    CountsCSR,
    as_whole_numbers,
    check_raw_counts,
    log2_bins,
    log2_thresholds,
)
from screformer.tokenization.row_tokens import BinRule, tokenize_rows

NUM_GENES = 24
DTYPES = ["bool", "uint8", "uint16", "uint32", "int8", "int16", "int32", "int64", "uint64", "float32", "float64"]
LARGEST = {"bool": 1, "uint8": 255, "uint16": 65_535, "int8": 127, "int16": 32_767, "float32": 2**24}
relaxed = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def matrices(draw):
    """Draw rows of any order and length, with repeats and zeros in them, and where their columns are."""
    num_columns = draw(st.integers(1, 30))
    num_rows = draw(st.integers(0, 6))
    dtype = draw(st.sampled_from(DTYPES))
    largest = draw(st.sampled_from([1, 3, 40, 300, 10**6, 2**31, 2**40]))
    largest = min(largest, LARGEST.get(dtype, 2**32 - 1 if dtype == "uint32" else 2**31 - 1))
    largest = draw(st.sampled_from([largest, 2**40])) if dtype in ("int64", "uint64", "float64") else largest
    repeats = draw(st.booleans())
    columns = st.lists(st.integers(0, num_columns - 1), max_size=25, unique=not repeats)
    rows = draw(st.lists(columns, min_size=num_rows, max_size=num_rows))
    if draw(st.booleans()):
        rows = [sorted(row) for row in rows]
    indices = np.array([column for row in rows for column in row], np.int32)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    low = draw(st.sampled_from([0, 1]))
    skewed = generator.integers(low, largest, size=len(indices), endpoint=True) >> generator.integers(
        0, 12, len(indices)
    )
    data = np.maximum(skewed, low).astype(dtype)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    kind = draw(st.sampled_from(["shuffled", "ascending", "shared"]))
    positions = generator.integers(-1, NUM_GENES, num_columns)
    if kind != "shared":
        spread = generator.permutation(max(NUM_GENES, num_columns))[:num_columns]
        positions = np.where(spread < NUM_GENES, spread, -1)
        positions = np.sort(positions) if kind == "ascending" else positions
    return CountsCSR(indptr, indices, data, num_columns), positions.astype(np.int32)


def check(counts, positions, rule):
    tokens = tokenize_rows(counts, positions, rule)
    assert [array.dtype for array in tokens] == [np.int64, np.uint16, np.uint8, np.float64, np.float64]
    expected = oracle.tokenize(
        counts.indptr,
        counts.indices,
        counts.data,
        positions,
        num_genes=NUM_GENES,
        num_bins=rule.num_bins,
        binning=rule.binning,
        target_sum=rule.target_sum,
    )
    np.testing.assert_array_equal(np.concatenate([[0], np.cumsum(tokens.lengths)]), expected[0])
    for ours, wanted in zip(tokens[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(ours, wanted)


@relaxed
@given(
    matrices(),
    st.sampled_from(["log2", "quantile"]),
    st.sampled_from([3, 4, 6, 51, 254]),
    st.sampled_from([10_000, 1e4, 1.0, 777.7, 2**20, 1e-40, 1e40]),
    st.sampled_from([1, 20, 1 << 17]),
)
def test_tokens_equal_the_dense_oracle(matrix, binning, num_bins, target_sum, entries_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_tokens, "ENTRIES_AT_ONCE", entries_at_once)
        check(*matrix, BinRule(binning, num_bins, target_sum))


@relaxed
@given(
    st.integers(1, LARGEST_WHOLE),
    st.sampled_from([3, 6, 20, 254]),
    st.sampled_from([10_000, 1.0, 777.7, 1e6, 0.3, 2.0**-100, 2.0**100]),
)
def test_thresholds_are_the_first_count_of_their_bin(total, num_bins, target_sum):
    (thresholds,) = log2_thresholds(np.array([total]), num_bins=num_bins, target_sum=target_sum)
    assert thresholds.shape == (num_bins - 1,)
    assert (np.diff(thresholds) >= 0).all()
    for offset, reaches in ((0, True), (-1, False)):
        values = thresholds + offset
        can_be = (values >= 1) & (values <= LARGEST_WHOLE)
        bins = log2_bins(values[can_be].astype(float), np.full(can_be.sum(), float(total)),
                         num_bins=num_bins, target_sum=target_sum)  # fmt: skip
        edges = np.arange(1, num_bins)[can_be]
        assert ((bins >= edges) == reaches).all()


@pytest.mark.parametrize("binning", ["log2", "quantile"])
@pytest.mark.parametrize("order", ["ascending", "shuffled", "shared"])
def test_common_files_never_take_the_plain_way(binning, order, monkeypatch):
    generator = np.random.default_rng(0)
    counts = scipy.sparse.csr_matrix(generator.negative_binomial(0.3, 0.02, size=(50, NUM_GENES)) * 20)
    positions = np.arange(NUM_GENES)
    if order != "ascending":
        generator.shuffle(positions)
    if order == "shared":
        positions[:4] = positions[4:8]
    matrix = CountsCSR(counts.indptr.astype(np.int64), counts.indices, counts.data, NUM_GENES)
    assert counts.data.max() > row_tokens.TABLE_SIZE
    monkeypatch.setattr(row_tokens, "_tokenize_any", None)
    check(matrix, positions, BinRule(binning, 6, 10_000))


def test_no_cells_and_no_entries_give_no_tokens():
    for num_cells in (0, 1, 3):
        empty = CountsCSR(np.zeros(num_cells + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), 5)
        for binning in ("log2", "quantile"):
            check(empty, np.arange(5), BinRule(binning, 6, 10_000))


def test_sums_come_with_the_tokens():
    vocabulary = GeneVocabulary(["ENSG1", "ENSG2"], symbols=["CD3D", "CD2"])
    tokenizer = ScReformerTokenizer(vocabulary, on_empty_cells="keep")
    mapping = vocabulary.map_names(["CD2", "other", "CD3D"])
    counts = scipy.sparse.csr_matrix(np.array([[4, 5, 6], [0, 7, 0], [0, 0, 0]], np.float32))
    tokens = tokenizer.tokenize_counts(counts, mapping)
    assert tokens.total_counts.tolist() == [15, 7, 0]
    assert tokens.known_counts.tolist() == [10, 0, 0]
    assert tokenizer.count_sums(counts, mapping) == (10, 22)


def test_sums_of_many_float32_counts_are_exact():
    vocabulary = GeneVocabulary(["ENSG1"], symbols=["CD3D"])
    tokenizer = ScReformerTokenizer(vocabulary)
    counts = scipy.sparse.csr_matrix(np.array([[2.0**24]] + [[1.0]] * 9, np.float32))
    assert tokenizer.count_sums(counts, vocabulary.map_names(["CD3D"])) == (2**24 + 9, 2**24 + 9)


def test_tokenizing_does_not_change_its_input():
    counts = scipy.sparse.csr_matrix(np.array([[4, 5, 6], [1, 7, 0]]))
    positions = np.array([1, 0, 1])
    before = counts.copy()
    matrix = CountsCSR(counts.indptr.astype(np.int64), counts.indices, counts.data, 3)
    check(matrix, positions, BinRule("quantile", 6, 10_000))
    assert positions.tolist() == [1, 0, 1]
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(counts, name), getattr(before, name))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [-1, 0.5, np.nan, np.inf, -np.inf])
def test_what_is_no_count_is_no_whole_number(value, dtype):
    data = np.array([1, value, 3], dtype)
    assert as_whole_numbers(data) is None
    with pytest.raises(ValueError, match=r"^counts: "):
        check_raw_counts(data)
    with pytest.raises(ValueError, match="negative values, the least is -1"):
        check_raw_counts(np.array([1, -1]))


def test_whole_numbers_are_not_copied_where_they_are_already():
    for dtype in ("uint8", "uint16", "int32"):
        data = np.array([1, 2], dtype)
        assert as_whole_numbers(data) is data
    assert as_whole_numbers(np.array([True])).dtype == np.uint8
    assert as_whole_numbers(np.array([LARGEST_WHOLE], np.int64)).dtype == np.int32
    assert as_whole_numbers(np.array([LARGEST_WHOLE + 1], np.int64)) is None
