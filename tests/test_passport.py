"""A passport says what a file of counts holds, refuses what cannot be used, and names the remedy."""

import json
import re
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from screformer.tokenization import GeneVocabulary, ScReformerTokenizer, example_cells_path, open_count_matrix
from screformer.tokenization.count_tally import CountTally
from screformer.tokenization.mitochondrial_genes import is_mitochondrial
from screformer.tokenization.organism import guess_organism, organism_of_ids
from screformer.tokenization.passport import InputPassport, check_passport, inspect_counts, inspect_file
from screformer.tokenization.passport_problems import FATAL_CODES, PROBLEM_CODES

NUM_CELLS = 60


@pytest.fixture(scope="module")
def tokenizer() -> ScReformerTokenizer:
    return ScReformerTokenizer()


@pytest.fixture(scope="module")
def all_genes() -> anndata.AnnData:
    """Return sixty of the packaged cells."""
    return anndata.read_h5ad(example_cells_path())[:NUM_CELLS].copy()


@pytest.fixture(scope="module")
def cells(all_genes) -> anndata.AnnData:
    """Return the same cells with every fifth gene."""
    return all_genes[:, ::5].copy()


@pytest.fixture
def inspect(tmp_path, tokenizer):
    """Return a function: cells -> their passport, through a file."""

    def make(adata: anndata.AnnData, **options) -> InputPassport:
        adata.write_h5ad(tmp_path / "cells.h5ad")
        return inspect_file(tmp_path / "cells.h5ad", **{"tokenizer": tokenizer, "progress": False, **options})

    return make


def codes(passport: InputPassport) -> list[str]:
    return [problem.code for problem in passport.problems]


def with_values(adata: anndata.AnnData, change) -> anndata.AnnData:
    """Return the cells with other values in X; a function of the CSR matrix."""
    return anndata.AnnData(change(adata.X.astype(np.float32)), obs=adata.obs.copy(), var=adata.var.copy())


def renamed(adata: anndata.AnnData, names: list[str]) -> anndata.AnnData:
    """Return the cells with these gene names, and no others."""
    return anndata.AnnData(adata.X.copy(), obs=adata.obs.copy(), var=pd.DataFrame(index=names))


def test_numbers_are_those_of_the_whole_matrix(cells, inspect, tokenizer) -> None:
    passport = inspect(cells, min_genes=1500)
    counts = cells.X.toarray()
    genes, sums = (counts > 0).sum(axis=1), counts.sum(axis=1)
    assert (passport.file, passport.format) == ("cells.h5ad", "h5ad")
    assert (passport.num_cells, passport.num_genes) == counts.shape
    assert (passport.count_source, passport.gene_source) == ("X", "var_names")
    assert passport.num_cells_below_minimum == (genes < 1500).sum() > 0
    expected = np.quantile(genes, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], method="lower")
    assert passport.genes_per_cell == tuple(expected)
    expected = np.quantile(sums, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], method="lower")
    np.testing.assert_allclose(passport.counts_per_cell, expected, rtol=1 / 128)
    assert (passport.counts_per_cell.least, passport.counts_per_cell.most) == (sums.min(), sums.max())
    assert passport.largest_count == counts.max()
    positions = tokenizer.gene_vocabulary.map_names(cells.var_names).positions
    assert passport.gene_coverage == pytest.approx(counts[:, positions >= 0].sum() / counts.sum())
    lost = np.flatnonzero(positions < 0)
    assert len(passport.unmatched) == len(lost)
    assert {gene.name: gene.counts for gene in passport.unmatched} == {
        cells.var_names[at]: counts[:, at].sum() for at in lost
    }
    assert [gene.counts for gene in passport.unmatched] == sorted(counts[:, lost].sum(axis=0), reverse=True)
    assert passport.organism.name == "human"
    assert passport.gene_ids.type == "symbol"
    assert passport.problems == passport.refusals == ()
    check_passport(passport)


@pytest.mark.parametrize("num_rows", [7, 60])
def test_blocks_do_not_matter(cells, inspect, monkeypatch, num_rows: int) -> None:
    expected = inspect(cells)
    monkeypatch.setattr("screformer.tokenization.passport.CELLS_PER_BLOCK", num_rows)
    assert inspect(cells) == expected


def test_a_passport_survives_json(cells, inspect) -> None:
    passport = inspect(cells, allow=["low-coverage"])
    content = json.loads(json.dumps(passport.to_dict(), allow_nan=False))
    assert InputPassport.from_dict(content) == passport
    short = passport.to_dict(max_unmatched=3)
    assert len(short["unmatched"]) == 3
    assert short["num_unmatched"] == len(passport.unmatched) > 3


def test_the_report_names_what_was_found(all_genes, inspect) -> None:
    text = str(inspect(all_genes))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0] == "file           cells.h5ad (h5ad): 60 cells x 20,125 genes"
    assert "X: raw counts" in text
    text = " ".join(text.split())
    assert "17,652 of 20,125 names are in the vocabulary human-v1, 98.9% of the counts are on them" in text
    assert re.search(r"938 known by an alias or earlier symbol: H3F3A: H3-3A; GNB2L1: RACK1;", text)
    assert re.search(r"20 named more than once, counts summed: NEBL: NEBL, C10orf113;", text)
    assert "1 ambiguous, left out: NKX6.1" in text
    assert re.search(r"2,473 not matched, most counts first: RPL26 \([\d,]+\); MALAT1 ", text)
    assert "organism human: by counts: 100.0% upper-case symbols (human)" in text
    assert lines[-1] == "verdict        accepted"


def test_the_report_has_every_refusal_with_its_fix(cells, inspect) -> None:
    bad = with_values(cells, lambda counts: counts.log1p())
    bad.obs_names = ["twice", "twice", *bad.obs_names[2:]]
    bad.layers["umi"] = cells.X.copy()
    passport = inspect(bad)
    text = " ".join(str(passport).split())
    assert "verdict REFUSED, 1 to mend not-counts counts: " in text
    assert "fix " in text
    assert "--allow not-counts" in text
    assert "1 have the name of an earlier cell" in text
    assert "verdict accepted allowed not-counts: counts:" in " ".join(str(inspect(bad, allow=["not-counts"])).split())


def test_mitochondrial_counts_are_known_by_symbol_and_by_id() -> None:
    names = ["MT-CO1", "mt-Co1", "MT.CO1", "ENSG00000198804", "ENSMUSG00000064351.3", "MTOR", "MT1X", "ENSG00000198851"]
    assert is_mitochondrial(names).tolist() == [True] * 5 + [False] * 3


def test_the_share_of_mitochondrial_counts(cells, inspect) -> None:
    assert inspect(cells).mitochondrial_share is None
    names = ["MT-CO1", *cells.var_names[1:]]
    extra = cells.X.tolil()
    extra[:, 0] = 100
    share = inspect(anndata.AnnData(extra.tocsr(), var=pd.DataFrame(index=names))).mitochondrial_share
    assert share == pytest.approx(6000 / extra.sum())


# Values


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            lambda counts: counts.log1p(),
            "not-counts",
            "are not integers, such as .* in row 0; this looks normalised",
        ),
        (lambda counts: counts * 0.1, "not-counts", "looks normalised"),
        (lambda counts: -counts, "invalid-values", "values are negative, which looks scaled, such as -.* in row 0"),
        (lambda counts: counts * np.float32(1e30), "invalid-values", "larger than 2147483647, which no count is"),
        (lambda counts: counts * 0, "no-counts", "the values are all 0. Found in X"),
    ],
)
def test_values_that_are_no_counts_are_refused(cells, inspect, change, code: str, message: str) -> None:
    passport = inspect(with_values(cells, change))
    assert codes(passport) == [code]
    with pytest.raises(ValueError, match=rf"^cells.h5ad: counts: .*{message}.*--layer NAME.*authors"):
        check_passport(passport)
    if code in PROBLEM_CODES:
        check_passport(inspect(with_values(cells, change), allow=[code]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 0.5])
def test_one_wrong_value_in_the_last_cell_is_found(cells, tokenizer, tmp_path, value: float) -> None:
    def spoil(counts):
        counts.data[-1] = value
        return counts

    with_values(cells, lambda counts: counts).write_h5ad(tmp_path / "cells.h5ad")
    with open_count_matrix(tmp_path / "cells.h5ad") as matrix:
        blocks = [spoil(block.astype(np.float32)) for block in matrix.blocks(NUM_CELLS)]
        matrix.blocks = lambda num_rows: blocks
        passport = inspect_counts(matrix, tokenizer, progress=False)
        assert codes(passport) == ["not-counts" if value == 0.5 else "invalid-values"]
        assert "1" in passport.problems[0].message
        assert f"{value:g} in row 59" in passport.problems[0].message
        assert np.isfinite(passport.counts_per_cell).all()


def test_the_remedy_is_the_layer_that_holds_counts(cells, inspect) -> None:
    log = with_values(cells, lambda counts: counts.log1p())
    log.layers["umi"] = cells.X.copy()
    passport = inspect(log)
    assert codes(passport) == ["not-counts"]
    assert passport.problems[0].remedy.startswith("Raw counts are in layers/umi: --layer umi;")
    assert inspect(log, layer="umi").problems == ()


@pytest.mark.parametrize("change", [lambda counts: counts * 2, lambda counts: counts.minimum(1)])
def test_whole_numbers_that_do_not_look_like_counts_are_refused(cells, inspect, change) -> None:
    passport = inspect(with_values(cells, change))
    assert codes(passport) == ["not-counts"]
    assert not passport.evidence[0].is_counts
    assert passport.problems[0].message == f"{passport.evidence[0].problem} Found in X"
    check_passport(inspect(with_values(cells, change), allow=["not-counts"]))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int64, np.float16, np.float64])
def test_counts_of_any_type_are_summed(dtype) -> None:
    counts = scipy.sparse.csr_matrix(np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=np.float32))
    counts.data = counts.data.astype(dtype)
    tally = CountTally(np.array([True, True, False]), min_genes=3)
    tally.add(counts)
    assert tally.gene_counts.tolist() == [2, 1, 2]
    assert (tally.num_cells, tally.num_values, tally.largest) == (3, 5, 1)
    assert (tally.num_without_counts, tally.num_empty_cells, tally.num_below_minimum) == (1, 1, 2)


def test_stored_zeros_are_no_genes() -> None:
    counts = scipy.sparse.csr_matrix(([0.0, 2.0, 0.0], [0, 1, 2], [0, 2, 3]), shape=(2, 3))
    tally = CountTally(np.ones(3, bool), min_genes=1)
    tally.add(counts)
    assert tally.genes_per_cell[:1] + tally.genes_per_cell[-1:] == (0, 1)
    assert (tally.num_without_counts, tally.num_below_minimum) == (1, 1)


def test_an_empty_tally_is_all_zero() -> None:
    tally = CountTally(np.ones(3, bool), min_genes=1)
    tally.add(scipy.sparse.csr_matrix((0, 3)))
    assert set(tally.genes_per_cell + tally.counts_per_cell) == {0}


def test_columns_out_of_range_and_what_is_no_number_are_refused() -> None:
    tally = CountTally(np.ones(3, bool), min_genes=1)
    counts = scipy.sparse.csr_matrix(np.ones((2, 3)))
    counts.indices[-1] = 7
    with pytest.raises(ValueError, match=r"columns from 0 to 2 are needed, one a gene; .* It is damaged"):
        tally.add(counts)
    with pytest.raises(ValueError, match="columns from 0 to 2"):
        tally.add(scipy.sparse.csr_matrix(np.ones((2, 4))))
    with pytest.raises(ValueError, match="real numbers are needed, got complex128"):
        tally.add(scipy.sparse.csr_matrix(np.ones((2, 3), dtype=complex)))


# Genes


def test_too_few_known_counts_are_refused_and_allowed(cells, inspect) -> None:
    names = [f"unheard_of{at}" if at % 3 else name for at, name in enumerate(cells.var_names)]
    passport = inspect(renamed(cells, names))
    assert codes(passport) == ["low-coverage"]
    with pytest.raises(ValueError, match=r"% of the counts fall on genes of the vocabulary 'human-v1', at least 50.0%"):
        check_passport(passport)
    assert "--gene-column NAME" in passport.problems[0].remedy
    allowed = inspect(renamed(cells, names), allow=["low-coverage"])
    check_passport(allowed)
    assert allowed.allowed == ("low-coverage",)
    assert codes(allowed) == ["low-coverage"]


def test_names_that_are_not_known_at_all_are_refused_before_the_counts_are_read(cells, tokenizer, tmp_path) -> None:
    renamed(cells, [f"{at}" for at in range(cells.n_vars)]).write_h5ad(tmp_path / "cells.h5ad")
    with open_count_matrix(tmp_path / "cells.h5ad") as matrix:
        assert codes(inspect_counts(matrix, tokenizer, progress=False)) == ["no-known-genes"]
        matrix.blocks = lambda num_rows: pytest.fail("read")
        with pytest.raises(ValueError, match=r"most of them are numbers; they begin with \['0', .*--gene-column NAME"):
            inspect_counts(matrix, tokenizer, refuse=True, progress=False)


def test_the_remedy_names_the_column_that_is_known(cells, inspect) -> None:
    bad = renamed(cells, [f"{at}" for at in range(cells.n_vars)])
    bad.var["length"] = "1000"
    bad.var["gene_name"] = cells.var_names.to_numpy()
    passport = inspect(bad)
    assert codes(passport) == ["no-known-genes"]
    assert passport.problems[0].remedy.endswith("of 4025 are known by gene_name: --gene-column gene_name")
    assert inspect(bad, gene_column="gene_name").problems == ()


@pytest.mark.parametrize(
    ("rename", "organism", "evidence"),
    [
        (lambda name, at: name.capitalize(), "mouse", "symbols like Trp53"),
        (lambda name, at: f"ENSMUSG{at:011d}", "mouse", "100.0% ids ENSMUSG (mouse)"),
        (lambda name, at: f"ENSRNOG{at:011d}.1", "other", "100.0% ids ENSRNOG (rat)"),
        (lambda name, at: f"FBgn{at:07d}", "other", "ids FBgn (fly)"),
        (lambda name, at: f"{'GRCh38' if at % 2 else 'mm10'}_{name}", "mixed", "names beginning with mm10_ (mouse)"),
        (lambda name, at: name if at % 2 else f"ENSMUSG{at:011d}", "mixed", "ids ENSMUSG (mouse)"),
    ],
)
def test_other_species_are_refused_with_the_evidence(cells, inspect, rename, organism: str, evidence: str) -> None:
    passport = inspect(renamed(cells, [rename(name, at) for at, name in enumerate(cells.var_names)]))
    assert passport.organism.name == organism
    assert evidence in passport.organism.evidence
    assert codes(passport)[0] == "wrong-species"
    with pytest.raises(ValueError, match=r"cells.h5ad: gene names: (several species|these are not human genes)"):
        check_passport(passport)


def test_other_species_are_refused_by_their_names_alone(cells, tokenizer, tmp_path) -> None:
    renamed(cells, [f"ENSMUSG{at:011d}" for at in range(cells.n_vars)]).write_h5ad(tmp_path / "cells.h5ad")
    with open_count_matrix(tmp_path / "cells.h5ad") as matrix:
        matrix.blocks = lambda num_rows: pytest.fail("read")
        with pytest.raises(
            ValueError, match=r"not human genes \(by names: 100.0% ids ENSMUSG .* none of the 4025 names"
        ):
            inspect_counts(matrix, tokenizer, refuse=True, progress=False)


def test_a_few_counts_of_another_species_do_not_matter(cells, inspect) -> None:
    names = [f"ENSMUSG{at:011d}" if at % 500 == 0 else name for at, name in enumerate(cells.var_names)]
    passport = inspect(renamed(cells, names))
    assert passport.organism.name == "human"
    assert 0 < passport.organism.share_mouse < 0.05
    assert passport.problems == ()


def test_unknown_names_tell_no_species() -> None:
    assert guess_organism(["1", "2", "gene_3"]).name == "unknown"
    assert guess_organism(["YAL001C", "YAL002W"], known_share=0.0).name == "unknown"
    assert guess_organism(["CD3E", "C1orf112", "HLA-A"]).name == "human"
    assert guess_organism(["Cd3e", "H2-K1", "1700001C02Rik", "mt-Nd1", "Rps27rt"]).share_mouse == pytest.approx(0.8)
    counts = np.array([0.0, 5.0])
    assert guess_organism(["mm10_Cd3e", "GRCh38_CD3E"], gene_counts=counts).name == "human"
    assert guess_organism(["mm10_Cd3e", "GRCh38_CD3E"], gene_counts=counts * 0).name == "mixed"


@pytest.mark.parametrize(
    ("ids", "organism"),
    [
        (["ENSG00000198851"], "human"),
        (["ENSMUSG00000032093"], "mouse"),
        (["ENSRNOG00000016069"], "other"),
        (["ENSG00000198851", "ENSMUSG00000032093"], "mixed"),
        (["A", "B"], "unknown"),
    ],
)
def test_the_species_of_a_vocabulary(ids: list[str], organism: str) -> None:
    assert organism_of_ids(ids) == organism


def test_a_mouse_vocabulary_takes_mouse_cells_and_refuses_human_ones(cells, inspect) -> None:
    ids = [f"ENSMUSG{at:011d}" for at in range(cells.n_vars)]
    mouse = ScReformerTokenizer(GeneVocabulary(ids, symbols=[name.capitalize() for name in cells.var_names]))
    assert inspect(renamed(cells, ids), tokenizer=mouse).problems == ()
    assert codes(inspect(cells, tokenizer=mouse)) == ["wrong-species"]


@pytest.mark.parametrize(
    ("num_ids", "type_"), [(4_025, "ensembl"), (2_000, "mixed"), (100, "symbol"), (None, "unknown")]
)
def test_the_type_of_gene_names(cells, inspect, num_ids: int | None, type_: str) -> None:
    names = [f"row{at}" if num_ids is None else f"ENSG{at:011d}" for at in range(cells.n_vars)]
    names[num_ids or cells.n_vars :] = cells.var_names[num_ids or cells.n_vars :]
    ids = inspect(renamed(cells, names)).gene_ids
    assert ids.type == type_
    assert ids.share_ensembl == pytest.approx((num_ids or 0) / cells.n_vars)
    assert ids.share_ensembl + ids.share_symbols + ids.share_others == pytest.approx(1)


# Cells


def test_empty_cells_are_counted(cells, inspect) -> None:
    counts = cells.X.tolil()
    counts[7] = 0
    names = [*cells.var_names, "unheard_of"]
    counts = scipy.sparse.hstack([counts, np.eye(NUM_CELLS, 1, -3)]).tolil()
    counts[3, :-1] = 0
    adata = anndata.AnnData(counts.tocsr(), var=pd.DataFrame(index=names))
    passport = inspect(adata)
    assert (passport.num_empty_cells, passport.num_without_counts) == (2, 1)
    assert passport.problems == ()


def test_names_of_many_cells_are_not_compared(cells, inspect, monkeypatch) -> None:
    cells = cells.copy()
    cells.obs_names = ["same"] * NUM_CELLS
    assert inspect(cells).num_repeated_cells == NUM_CELLS - 1
    monkeypatch.setattr("screformer.tokenization.passport.MOST_CELL_IDS_COMPARED", 10)
    assert inspect(cells).num_repeated_cells is None


def test_a_file_that_changes_while_it_is_read_is_refused(cells, tokenizer, tmp_path) -> None:
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    with open_count_matrix(path) as matrix:
        read = matrix.blocks

        def blocks_of_a_growing_file(num_rows):
            for block in read(num_rows):
                with Path(path).open("ab") as file:
                    file.write(b"more")
                yield block

        matrix.blocks = blocks_of_a_growing_file
        with pytest.raises(ValueError, match=r"^cells.h5ad changed while it was read. Wait until"):
            inspect_counts(matrix, tokenizer, progress=False)


# What may pass


def test_unknown_codes_are_an_error_that_lists_the_codes(cells, inspect) -> None:
    listed = "not-counts, low-coverage, wrong-species"
    for allow, message in (
        (["everything"], "'everything' is no code of a problem"),
        ([FATAL_CODES[0]], "'no-counts' cannot be allowed"),
    ):
        with pytest.raises(ValueError, match=f"allow: {message}; these can be allowed: {listed}"):
            inspect(cells, allow=allow)


def test_several_problems_are_said_at_once(cells, inspect) -> None:
    bad = renamed(cells, [name.capitalize() if at % 4 else f"x{at}" for at, name in enumerate(cells.var_names)])
    bad.X = bad.X.astype(np.float32).log1p()
    passport = inspect(bad)
    assert codes(passport)[:2] == ["not-counts", "wrong-species"]
    with pytest.raises(ValueError, match=r"^cells.h5ad: counts: .*--allow not-counts. gene names: .*wrong-species"):
        check_passport(passport)
    assert len(inspect(bad, allow=["not-counts"]).refusals) == len(passport.problems) - 1


def test_fractions_are_tokenized_only_when_they_are_allowed(tokenizer) -> None:
    mapping = tokenizer.gene_vocabulary.map_names(["CD3E", "CD2", "MALAT1"])
    counts = np.array([[0.4, 8.0, 10_000.0], [0.5, 0.0, 0.25]])
    with pytest.raises(ValueError, match="not integers"):
        tokenizer.tokenize_counts(counts, mapping)
    tokens = tokenizer.tokenize_counts(counts, mapping, allow_fractions=True)
    order = np.argsort(mapping.positions[:2])
    assert tokens.input_ids.tolist() == [*np.array([1, 3])[order], 5]
    for wrong in (-0.5, np.nan):
        with pytest.raises(ValueError, match=r"negative|NaN"):
            tokenizer.tokenize_counts(np.array([[wrong, 1.0, 1.0]]), mapping, allow_fractions=True)


def test_progress_is_shown_when_asked_for(cells, inspect, capsys) -> None:
    inspect(cells)
    assert capsys.readouterr().err == ""
    inspect(cells, progress=True)
    assert "inspect: 100%" in capsys.readouterr().err
