"""Counts become bins: exactly, whatever the form of the input, and never by a guess."""

import json
import os
import subprocess
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from transformers import BatchEncoding, DataCollatorWithPadding

from oracles import slow_tokenizer as oracle
from screformer.tokenization import GeneVocabulary, ScReformerTokenizer, expression_bins, row_tokens
from screformer.tokenization.tokenization_screformer import choose_gene_names

NUM_GENES = 40


def _vocabulary() -> GeneVocabulary:
    return GeneVocabulary(
        [f"ENSG{at:011d}" for at in range(NUM_GENES)],
        symbols=[f"GENE{at}" for at in range(NUM_GENES)],
        aliases=[[f"OLD{at}"] for at in range(NUM_GENES)],
        ambiguous_names=["TWO"],
        name="forty",
    )


def _counts(num_cells: int = 30, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Counts with ties, repeats of genes, unknown genes and columns in no order."""
    generator = np.random.default_rng(seed)
    names = [f"GENE{at}" for at in range(NUM_GENES)] + [f"OLD{at}" for at in range(5)] + ["unknown1", "unknown2"]
    generator.shuffle(names)
    counts = generator.negative_binomial(0.3, 0.05, size=(num_cells, len(names)))
    counts[:, names.index("GENE0")] += 1
    return counts, names


@pytest.fixture
def tokenizer() -> ScReformerTokenizer:
    return ScReformerTokenizer(_vocabulary())


def _adata(**arguments) -> anndata.AnnData:
    counts, names = _counts()
    return anndata.AnnData(scipy.sparse.csr_matrix(counts), var=pd.DataFrame(index=names), **arguments)


@pytest.mark.parametrize("binning", ["log2", "quantile"])
@pytest.mark.parametrize("num_bins", [3, 4, 6, 51, 254])
def test_bins_equal_the_slow_oracle(binning: str, num_bins: int) -> None:
    tokenizer = ScReformerTokenizer(_vocabulary(), binning=binning, num_bins=num_bins)
    counts, names = _counts()
    mapping = tokenizer.gene_vocabulary.map_names(names)
    tokens = tokenizer.tokenize_counts(scipy.sparse.csr_matrix(counts), mapping)
    assert (tokens.indptr.dtype, tokens.gene_ids.dtype, tokens.input_ids.dtype) == (np.int64, np.uint16, np.uint8)
    for cell, row in enumerate(counts):
        ours = slice(*tokens.indptr[cell : cell + 2])
        expected = oracle.tokenize_cell(row, mapping.positions, num_bins=num_bins, binning=binning)
        assert dict(zip(tokens.gene_ids[ours].tolist(), tokens.input_ids[ours].tolist(), strict=True)) == expected
        assert list(expected) == tokens.gene_ids[ours].tolist()


def test_log2_bins_are_exact_at_their_edges(tokenizer: ScReformerTokenizer) -> None:
    # 10,000 counts a cell: the normalised value is the count itself; edges are 3, 7, 15, 31.
    edges = np.array([1, 2, 3, 6, 7, 14, 15, 30, 31, 9891])
    encoded = tokenizer(edges[None, :], gene_names=[f"GENE{at}" for at in range(10)])
    assert edges.sum() == 10_000
    assert encoded["input_ids"][0, :10].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_quantile_bins_agree_with_numpy_and_share_ties() -> None:
    values = np.array([1, 1, 1, 2, 3, 5, 8, 8, 13, 100], dtype=float)
    bins = expression_bins.quantile_bins(values, np.zeros(10, int), num_bins=6)
    np.testing.assert_array_equal(bins, np.digitize(values, np.quantile(values, np.linspace(0, 1, 5))))
    alone = expression_bins.quantile_bins(np.array([7.0]), np.array([3]), num_bins=6)
    assert alone.tolist() == [5]


def test_denominator_is_every_count_of_the_cell_known_gene_or_not(tokenizer: ScReformerTokenizer) -> None:
    encoded = tokenizer([[30, 4970, 5000], [30, 4970, 0]], gene_names=["GENE0", "GENE1", "unknown"])
    assert encoded["input_ids"][:, 0].tolist() == [4, 5]  # 30 and 60 of 10,000


@pytest.mark.parametrize("binning", ["log2", "quantile"])
def test_order_of_cells_and_genes_and_blocks_changes_nothing(binning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ScReformerTokenizer(_vocabulary(), binning=binning)
    counts, names = _counts()
    expected = tokenizer(counts, gene_names=names)["input_ids"]
    generator = np.random.default_rng(1)
    rows, columns = generator.permutation(len(counts)), generator.permutation(len(names))
    shuffled = tokenizer(counts[rows][:, columns], gene_names=[names[at] for at in columns])["input_ids"]
    np.testing.assert_array_equal(shuffled, expected[rows])
    alone = np.concatenate([tokenizer(row[None, :], gene_names=names)["input_ids"] for row in counts])
    np.testing.assert_array_equal(alone, expected)
    monkeypatch.setattr(row_tokens, "ENTRIES_AT_ONCE", 50)
    np.testing.assert_array_equal(tokenizer(counts, gene_names=names)["input_ids"], expected)


def test_splitting_a_gene_into_two_columns_changes_nothing(tokenizer: ScReformerTokenizer) -> None:
    whole = tokenizer([[10, 90]], gene_names=["GENE3", "GENE4"])["input_ids"]
    split = tokenizer([[4, 90, 6]], gene_names=["GENE3", "GENE4", "OLD3"])["input_ids"]
    np.testing.assert_array_equal(split, whole)


def test_every_form_of_matrix_gives_the_same_tokens(tokenizer: ScReformerTokenizer, tmp_path) -> None:
    counts, names = _counts()
    expected = tokenizer(counts, gene_names=names)["input_ids"]
    csr = scipy.sparse.csr_matrix(counts)
    unsorted = scipy.sparse.csr_matrix((csr.data, csr.indices, csr.indptr), shape=csr.shape)[:, ::-1][:, ::-1]
    zeros = scipy.sparse.csr_matrix(np.ones_like(counts)).multiply(counts + 0).tocsr()
    forms = [
        csr,
        scipy.sparse.csr_array(counts),
        csr.tocsc(),
        csr.tocoo(),
        unsorted,
        zeros,
        counts.astype(np.float32),
        counts.astype(np.uint16),
        torch.tensor(counts),
        pd.DataFrame(counts),
        counts.tolist(),
    ]
    for form in forms:
        np.testing.assert_array_equal(tokenizer(form, gene_names=names)["input_ids"], expected)
    adata = _adata(layers={"counts": csr})
    np.testing.assert_array_equal(tokenizer(adata)["input_ids"], expected)
    np.testing.assert_array_equal(tokenizer(adata[3:5])["input_ids"], expected[3:5])
    np.testing.assert_array_equal(tokenizer(adata, layer="counts")["input_ids"], expected)
    np.testing.assert_array_equal(tokenizer(adata, gene_names=names)["input_ids"], expected)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    np.testing.assert_array_equal(tokenizer(backed)["input_ids"], expected)
    backed.file.close()


def test_entries_of_a_sparse_matrix_that_repeat_are_summed(tokenizer: ScReformerTokenizer) -> None:
    repeated = scipy.sparse.csr_matrix((np.array([4, 90, 6]), np.array([0, 1, 0]), np.array([0, 3])), shape=(1, 2))
    encoded = tokenizer(repeated, gene_names=["GENE3", "GENE4"])["input_ids"]
    np.testing.assert_array_equal(encoded, tokenizer([[10, 90]], gene_names=["GENE3", "GENE4"])["input_ids"])


def test_full_space_has_every_gene_in_order(tokenizer: ScReformerTokenizer) -> None:
    counts, names = _counts(5)
    for return_tensors in (None, "np"):
        encoded = tokenizer(counts, gene_names=names, return_tensors=return_tensors)
        assert isinstance(encoded, BatchEncoding)
        assert all(isinstance(array, np.ndarray) and array.dtype == np.int64 for array in encoded.values())
        assert {array.shape for array in encoded.values()} == {(5, NUM_GENES)}
        np.testing.assert_array_equal(encoded["gene_ids"][4], np.arange(NUM_GENES))
        assert encoded["attention_mask"].all()


def test_expressed_space_holds_the_same_tokens_padded_to_the_longest(tokenizer: ScReformerTokenizer) -> None:
    counts, names = _counts()
    full = tokenizer(counts, gene_names=names)["input_ids"]
    encoded = tokenizer(counts, gene_names=names, gene_space="expressed")
    assert encoded["input_ids"].shape[1] == (full > 0).sum(axis=1).max()
    is_token = encoded["attention_mask"] == 1
    assert (encoded["input_ids"][~is_token] == tokenizer.pad_token_id).all()
    assert (encoded["gene_ids"][~is_token] == 0).all()
    rebuilt = np.zeros_like(full)
    rows = np.nonzero(is_token)[0]
    rebuilt[rows, encoded["gene_ids"][is_token]] = encoded["input_ids"][is_token]
    np.testing.assert_array_equal(rebuilt, full)


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_torch_tensors_equal_the_arrays(tokenizer: ScReformerTokenizer, gene_space: str) -> None:
    counts, names = _counts(4)
    arrays = tokenizer(counts, gene_names=names, gene_space=gene_space)
    tensors = tokenizer(counts, gene_names=names, gene_space=gene_space, return_tensors="pt")
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), arrays[key])


def test_no_cells_give_no_rows(tokenizer: ScReformerTokenizer) -> None:
    for gene_space in ("full", "expressed"):
        encoded = tokenizer(np.zeros((0, 1)), gene_names=["GENE0"], gene_space=gene_space, return_tensors="pt")
        assert len(encoded["input_ids"]) == len(encoded["gene_ids"]) == 0


def test_special_ids_follow_the_bins() -> None:
    for num_bins in (3, 6, 254):
        tokenizer = ScReformerTokenizer(_vocabulary(), num_bins=num_bins)
        assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (num_bins, num_bins + 1)
        assert tokenizer.vocab_size == len(tokenizer) == len(tokenizer.get_vocab()) == num_bins + 2
        assert tokenizer.convert_tokens_to_ids(["0", str(num_bins - 1), "[MASK]"]) == [0, num_bins - 1, num_bins + 1]
        assert tokenizer.tokenize("0 2 [MASK] 1") == ["0", "2", "[MASK]", "1"]


def test_default_tokenizer_is_human_v1_with_six_bins() -> None:
    tokenizer = ScReformerTokenizer()
    assert tokenizer.gene_vocabulary.name == "human-v1"
    assert (tokenizer.num_bins, tokenizer.binning, tokenizer.target_sum) == (6, "log2", 10_000)
    assert tokenizer.num_genes == len(tokenizer.gene_vocabulary)


def test_decode_reads_as_text(tokenizer: ScReformerTokenizer) -> None:
    pad, mask = tokenizer.pad_token_id, tokenizer.mask_token_id
    assert tokenizer.decode([0, 5, mask, pad]) == "0 5 [MASK] [PAD]"
    assert tokenizer.decode([0, 5, mask, pad], skip_special_tokens=True) == "0 5"
    assert tokenizer.decode([0, 5, mask, pad], gene_ids=[3, 4, 5, 0]) == "GENE4:5 GENE5:[MASK]"
    assert tokenizer.decode([0, 5, mask, pad], gene_ids=[3, 4, 5, 0], skip_special_tokens=True) == "GENE4:5"
    assert tokenizer.decode(torch.tensor([[1, 2], [3, 4]])) == ["1 2", "3 4"]
    assert tokenizer.batch_decode([[1], [2]], gene_ids=np.array([[7], [8]])) == ["GENE7:1", "GENE8:2"]
    assert tokenizer.decode(3) == "3"


def test_transformers_collator_pads_gene_ids_too(tokenizer: ScReformerTokenizer) -> None:
    rows = [{"input_ids": [1, 2, 3], "gene_ids": [4, 5, 6]}, {"input_ids": [5], "gene_ids": [9]}]
    batch = DataCollatorWithPadding(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 6, 6]]
    assert batch["gene_ids"].tolist() == [[4, 5, 6], [9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    left = tokenizer.pad(rows, padding_side="left")
    assert left["gene_ids"][1] == [0, 0, 9]


def test_fingerprint_follows_what_gives_tokens_their_meaning(tokenizer: ScReformerTokenizer) -> None:
    vocabulary = _vocabulary()
    same = ScReformerTokenizer(vocabulary, min_gene_coverage=0.1, on_empty_cells="keep", target_sum=10_000.0)
    assert same.fingerprint == tokenizer.fingerprint
    others = [
        ScReformerTokenizer(vocabulary.subset(vocabulary.symbols[:39], name="forty")),
        ScReformerTokenizer(vocabulary, num_bins=7),
        ScReformerTokenizer(vocabulary, binning="quantile"),
        ScReformerTokenizer(vocabulary, target_sum=1_000),
    ]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 5
    quantile = ScReformerTokenizer(vocabulary, binning="quantile", target_sum=1_000)
    assert quantile.fingerprint == others[2].fingerprint


OPTIONS = {
    "num_bins": 9,
    "binning": "quantile",
    "target_sum": 5_000,
    "min_gene_coverage": 0.25,
    "on_empty_cells": "keep",
}


def test_save_and_load_is_lossless(tmp_path) -> None:
    saved = ScReformerTokenizer(_vocabulary(), **OPTIONS)
    saved.save_pretrained(tmp_path / "first")
    loaded = ScReformerTokenizer.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert loaded.gene_vocabulary == saved.gene_vocabulary
    assert {key: getattr(loaded, key) for key in OPTIONS} == OPTIONS
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.get_vocab() == saved.get_vocab()
    for name in ("genes.json", "tokenization_screformer.py", "gene_vocabulary.py", "expression_bins.py"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    first, second = (
        json.loads((tmp_path / folder / "tokenizer_config.json").read_text()) for folder in ("first", "second")
    )
    assert first["auto_map"] == {"AutoTokenizer": ["tokenization_screformer.ScReformerTokenizer", None]}
    assert second == first  # though from_pretrained gives it words of its own
    assert str(tmp_path) not in json.dumps([first, second])
    assert not list((tmp_path / "first").glob("*.part"))


def test_number_of_bins_may_be_changed_at_loading(tmp_path) -> None:
    ScReformerTokenizer(_vocabulary(), num_bins=9).save_pretrained(tmp_path)
    loaded = ScReformerTokenizer.from_pretrained(tmp_path, num_bins=4)
    assert (loaded.num_bins, loaded.pad_token_id, loaded.mask_token_id, len(loaded)) == (4, 4, 5, 6)


def test_filename_prefix_is_kept(tmp_path) -> None:
    ScReformerTokenizer(_vocabulary()).save_pretrained(tmp_path, filename_prefix="cells")
    loaded = ScReformerTokenizer(vocab_file=tmp_path / "cells-genes.json")
    assert loaded.gene_vocabulary == _vocabulary()


WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        # Not SciPy, which an earlier transformers takes from scikit-learn where that is installed.
        if name.split(".")[0] in {"screformer", "anndata", "pandas", "datasets", "h5py"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
encoded = tokenizer([[1, 0, 99], [3, 4, 0]], gene_names=["GENE1", "OLD2", "ENSG00000000003.4"])
assert not [name for name in sys.modules if name.startswith("screformer")]
tokenizer.save_pretrained(sys.argv[2])
print(type(tokenizer).__name__, tokenizer.fingerprint, encoded["input_ids"].sum(), tokenizer.num_bins)
"""


@pytest.mark.parametrize("has_config", [True, False])
def test_autotokenizer_loads_the_folder_without_the_package(tmp_path, has_config: bool) -> None:
    saved = ScReformerTokenizer(_vocabulary(), **OPTIONS)
    folder = tmp_path / "checkpoint"
    saved.save_pretrained(folder)
    if has_config:
        (folder / "config.json").write_text('{"model_type": "screformer"}')
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(folder), str(tmp_path / "again")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = ["GENE1", "OLD2", "ENSG00000000003.4"]
    expected = saved([[1, 0, 99], [3, 4, 0]], gene_names=names)["input_ids"].sum()
    assert done.stdout.split() == ["ScReformerTokenizer", saved.fingerprint, str(expected), "9"]
    assert (tmp_path / "again" / "genes.json").read_bytes() == (folder / "genes.json").read_bytes()
    assert (tmp_path / "again" / "gene_vocabulary.py").is_file()


def test_ensembl_column_is_used_where_it_knows_more() -> None:
    tokenizer = ScReformerTokenizer(_vocabulary())
    ids = [f"ENSG{at:011d}" for at in range(3)]
    var = pd.DataFrame({"note": ["x", "y", "z", "w"], "id": [*ids, ""]}, index=["a", "b", "GENE2", "GENE3"])
    columns = {key: var[key] for key in var}
    chosen = choose_gene_names(var.index, columns, vocabulary=tokenizer.gene_vocabulary)
    assert chosen.source == "var['id']"
    assert chosen.mapping.positions.tolist() == [0, 1, 2, 3]
    named = choose_gene_names(var.index, columns, vocabulary=tokenizer.gene_vocabulary, gene_column="note")
    assert named.source == "var['note']"
    better = choose_gene_names([f"GENE{at}" for at in range(4)], columns, vocabulary=tokenizer.gene_vocabulary)
    assert better.source == "var_names"


@pytest.mark.parametrize("form", [scipy.sparse.csr_matrix, np.array])
@pytest.mark.parametrize("column", ["feature_types", "feature_type"])
def test_features_that_are_no_genes_are_left_out(tokenizer: ScReformerTokenizer, form, column) -> None:
    adata = _adata()
    expected = tokenizer(adata)
    counts = np.insert(adata.X.toarray(), [0, 5], 500, axis=1)
    names = np.insert(adata.var_names.to_numpy(object), [0, 5], ["OLD7", "OLD8"])
    types = np.insert(np.full(adata.n_vars, "Gene Expression", object), [0, 5], "Antibody Capture")
    mixed = anndata.AnnData(form(counts), var=pd.DataFrame({column: types}, index=names))
    mixed.layers["counts"] = mixed.X
    for encoded in (tokenizer(mixed), tokenizer(mixed, layer="counts"), tokenizer(mixed, gene_names=list(names))):
        np.testing.assert_array_equal(encoded["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="got 3 for 49 columns"):
        tokenizer(mixed, gene_names=["GENE1", "GENE2", "GENE3"])
    mixed.var[column] = "gene"
    assert (tokenizer(mixed)["input_ids"] != expected["input_ids"]).any()


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, "", "nan", "NaN", "None", "NA", "<NA>"])
def test_var_names_fill_in_where_a_column_has_no_name(missing) -> None:
    vocabulary = GeneVocabulary(["ENSG1", "ENSG2"], symbols=["A", "B"], aliases=[["NaN", "None", "NA", "<NA>"], []])
    adata = anndata.AnnData(np.array([[1, 9]]), var=pd.DataFrame(index=["B", "x"]))
    adata.var["symbol"] = np.array([missing, "A"], dtype=object)
    encoded = ScReformerTokenizer(vocabulary)(adata, gene_column="symbol")
    assert encoded["input_ids"].tolist() == [[5, 5]]
    adata.var_names = [str(missing), "A"]
    assert ScReformerTokenizer(vocabulary)(adata)["input_ids"].tolist() == [[5, 0]]


def test_an_empty_cell_is_named_or_kept() -> None:
    counts = np.array([[1, 2, 0], [0, 0, 0], [0, 0, 7]])
    names = ["GENE0", "GENE1", "unknown"]
    options = {"min_gene_coverage": 0.1}
    with pytest.raises(ValueError, match=r"2 of 3 cells have no counts on known genes: rows \[1, 2\]"):
        ScReformerTokenizer(_vocabulary(), **options)(counts, gene_names=names)
    keeper = ScReformerTokenizer(_vocabulary(), on_empty_cells="keep", **options)
    encoded = keeper(counts, gene_names=names, gene_space="expressed")
    assert encoded["attention_mask"].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert not keeper(counts, gene_names=names)["input_ids"][1:].any()
    nothing = keeper(counts[1:2], gene_names=names, gene_space="expressed")
    assert nothing["input_ids"].tolist() == [[keeper.pad_token_id]]
    mapping = keeper.gene_vocabulary.map_names(names)
    with pytest.raises(ValueError, match=r"rows \[101, 102\]"):
        ScReformerTokenizer(_vocabulary()).tokenize_counts(counts, mapping, first_row=100)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "negative values, the least is -1"),
        (0.5, "not integers, such as 0.5; this looks normalised or log-transformed"),
        (np.nan, "1 values are NaN or infinite"),
        (np.inf, "1 values are NaN or infinite"),
    ],
)
def test_values_that_are_not_counts_are_refused(tokenizer: ScReformerTokenizer, value: float, message: str) -> None:
    counts = np.array([[1.0, 2.0], [3.0, value]])
    names = ["GENE0", "GENE1"]
    for form in (counts, scipy.sparse.csr_matrix(counts)):
        with pytest.raises(ValueError, match=message):
            tokenizer(form, gene_names=names)
        with pytest.raises(ValueError, match=message):
            tokenizer.tokenize_counts(form, tokenizer.gene_vocabulary.map_names(names))


def test_a_normalised_anndata_is_told_where_its_counts_are(tokenizer: ScReformerTokenizer) -> None:
    adata = _adata()
    adata.layers["raw_counts"] = adata.X.copy()
    adata.raw = adata.copy()
    adata.X = adata.X * 0.37
    adata.layers["scaled"] = adata.X.copy()
    with pytest.raises(ValueError, match=r"found in: layer='raw_counts', adata.raw.to_adata\(\)"):
        tokenizer(adata)
    del adata.layers["raw_counts"]
    adata.raw = None
    with pytest.raises(ValueError, match=r"No layer .* holds whole numbers \(layers: \['scaled'\]\)"):
        tokenizer(adata)


def test_gene_names_are_asked_for_and_counted(tokenizer: ScReformerTokenizer) -> None:
    counts = np.ones((2, 3), int)
    with pytest.raises(ValueError, match="gene_names is missing"):
        tokenizer(counts)
    with pytest.raises(ValueError, match="got 2 for 3 columns"):
        tokenizer(counts, gene_names=["GENE0", "GENE1"])
    with pytest.raises(ValueError, match="has 2 names, the counts have 3 columns"):
        tokenizer.tokenize_counts(counts, tokenizer.gene_vocabulary.map_names(["GENE0", "GENE1"]))
    with pytest.raises(ValueError, match="are of an AnnData"):
        tokenizer(counts, gene_names=["GENE0"] * 3, layer="counts")


def test_unknown_genes_are_refused_with_examples(tokenizer: ScReformerTokenizer) -> None:
    with pytest.raises(ValueError, match=r"none of the 2 names is in the vocabulary 'forty'.*\['0', '1'\]"):
        tokenizer(np.ones((2, 2), int), gene_names=["0", "1"])
    with pytest.raises(ValueError, match=r"40.0% of the counts .* such as \['unknown', 'TWO'\]"):
        tokenizer([[4, 3, 3]], gene_names=["GENE0", "unknown", "TWO"])


def test_mouse_symbols_are_refused(tokenizer: ScReformerTokenizer) -> None:
    with pytest.raises(ValueError, match="2 of 2 known names match only when upper and lower case are ignored"):
        tokenizer([[4, 3]], gene_names=["Gene0", "Gene1"])


def test_wrong_places_in_an_anndata_are_refused(tokenizer: ScReformerTokenizer) -> None:
    adata = _adata()
    with pytest.raises(ValueError, match=r"layer='absent' is not in adata.layers, which has \[\]"):
        tokenizer(adata, layer="absent")
    with pytest.raises(ValueError, match=r"gene_column='absent' is not a column of var"):
        tokenizer(adata, gene_column="absent")
    adata.layers["counts"] = adata.X
    adata.X = None
    with pytest.raises(
        ValueError, match=r"adata.X is None; name the layer with raw counts, layer= one of \['counts'\]"
    ):
        tokenizer(adata)


@pytest.mark.parametrize("cells", ["a sentence", [["a", "b"]], None])
def test_what_is_not_a_matrix_of_numbers_is_refused(tokenizer: ScReformerTokenizer, cells) -> None:
    with pytest.raises(TypeError, match="raw counts are needed"):
        tokenizer(cells, gene_names=["GENE0", "GENE1"])


def test_a_single_row_is_told_to_be_a_matrix(tokenizer: ScReformerTokenizer) -> None:
    with pytest.raises(ValueError, match=r"got shape \(2,\); one cell is counts\[None, :\]"):
        tokenizer(np.array([1, 2]), gene_names=["GENE0", "GENE1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bins": 2}, "num_bins: a whole number from 3 to 254"),
        ({"num_bins": 255}, "num_bins: a whole number from 3 to 254"),
        ({"num_bins": True}, "num_bins"),
        ({"num_bins": 6.0}, "num_bins"),
        ({"binning": "log"}, "binning: one of 'log2', 'quantile', got 'log'"),
        ({"target_sum": 0}, "target_sum: a positive number"),
        ({"target_sum": float("nan")}, "target_sum: a positive number"),
        ({"min_gene_coverage": 1.5}, "min_gene_coverage: a share from 0 to 1"),
        ({"on_empty_cells": "drop"}, "on_empty_cells: one of 'error', 'keep'"),
        ({"pad_token": "<pad>"}, r"pad_token: always '\[PAD\]' here, got '<pad>'"),
        ({"vocab_file": "genes.json"}, "either vocabulary or vocab_file"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScReformerTokenizer(_vocabulary(), **options)


def test_wrong_calls_are_refused(tokenizer: ScReformerTokenizer) -> None:
    counts, names = _counts(2)
    with pytest.raises(ValueError, match="gene_space: one of 'full', 'expressed', got 'all'"):
        tokenizer(counts, gene_names=names, gene_space="all")
    with pytest.raises(ValueError, match="return_tensors: one of None, 'np', 'pt', got 'tf'"):
        tokenizer(counts, gene_names=names, return_tensors="tf")
    with pytest.raises(ValueError, match="tokens cannot be added"):
        tokenizer.add_tokens(["[CLS]"])
    with pytest.raises(ValueError, match="token 'x' is not one of"):
        tokenizer.convert_tokens_to_ids("x")
    with pytest.raises(ValueError, match=r"token id 8 is not in 0\.\.7"):
        tokenizer.decode([8])
