"""Raw counts are found by their values, read in blocks, and refused where there are none."""

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from screformer.tokenization import GeneVocabulary, ScReformerTokenizer, example_cells_path, open_count_matrix
from screformer.tokenization.passport import inspect_counts

COUNTS = np.random.default_rng(0).poisson(0.5, size=(23, 12))


@pytest.fixture
def vocabulary() -> GeneVocabulary:
    return GeneVocabulary([f"ENSG{at:011d}" for at in range(12)], symbols=[f"GENE{at}" for at in range(12)])


def _write(path: Path, matrix, **arguments) -> Path:
    obs = pd.DataFrame(
        {"kind": pd.Categorical(["a", None] + ["b"] * 21), "number": range(23)},
        index=[f"cell{at}" for at in range(23)],
    )
    adata = anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"GENE{at}" for at in range(12)]), **arguments)
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize(
    "form", [scipy.sparse.csr_matrix, np.asarray, lambda x: scipy.sparse.csr_matrix(x.astype(np.float32))]
)
@pytest.mark.parametrize("num_rows", [1, 7, 23, 100])
def test_blocks_are_the_matrix_in_order(tmp_path, vocabulary, form, num_rows: int) -> None:
    path = _write(tmp_path / "cells.h5ad", form(COUNTS))
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        blocks = list(matrix.blocks(num_rows))
        assert all(block.shape[0] <= num_rows for block in blocks)
        assert all(isinstance(block, scipy.sparse.csr_matrix) for block in blocks)
        np.testing.assert_array_equal(scipy.sparse.vstack(blocks).toarray(), COUNTS)
        part = scipy.sparse.vstack(list(matrix.blocks(num_rows, start=4, stop=11)))
        np.testing.assert_array_equal(part.toarray(), COUNTS[4:11])
        assert (matrix.num_cells, matrix.num_genes) == (23, 12)
        assert matrix.notes == []


def test_columns_are_converted_with_a_note(tmp_path, vocabulary) -> None:
    path = _write(tmp_path / "cells.h5ad", scipy.sparse.csc_matrix(COUNTS))
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert matrix.notes == []
        for _ in range(2):
            np.testing.assert_array_equal(scipy.sparse.vstack(list(matrix.blocks(5))).toarray(), COUNTS)
        assert len(matrix.notes) == 1
        assert "stored by columns" in matrix.notes[0]


def test_a_block_reads_only_its_rows(tmp_path, vocabulary, monkeypatch) -> None:
    path = _write(tmp_path / "cells.h5ad", scipy.sparse.csr_matrix(COUNTS))
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        read = []
        original = h5py.Dataset.__getitem__

        def spy(dataset, key, **arguments):
            values = original(dataset, key, **arguments)
            if dataset.name.startswith("/X/") and not dataset.name.endswith("indptr"):
                read.append(np.size(values))
            return values

        monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
        block = next(matrix.blocks(3, start=6))
        assert max(read) == block.nnz < (COUNTS > 0).sum()


def test_counts_are_found_by_value_in_x_then_layer_then_raw(tmp_path, vocabulary) -> None:
    normalised = scipy.sparse.csr_matrix(np.log1p(COUNTS))
    counts = scipy.sparse.csr_matrix(COUNTS)
    path = _write(tmp_path / "x.h5ad", counts, layers={"counts": normalised})
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert matrix.count_source == "X"
    path = _write(tmp_path / "layer.h5ad", normalised, layers={"counts": counts})
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert matrix.count_source == "layers/counts"
        np.testing.assert_array_equal(next(matrix.blocks(23)).toarray(), COUNTS)
    adata = anndata.AnnData(counts, var=pd.DataFrame(index=[f"GENE{at}" for at in range(12)]))
    adata.raw = adata
    adata = adata[:, :3].copy()
    adata.X = normalised[:, :3]
    adata.write_h5ad(tmp_path / "raw.h5ad")
    with open_count_matrix(tmp_path / "raw.h5ad", vocabulary=vocabulary) as matrix:
        assert matrix.count_source == "raw"
        assert len(matrix.gene_names) == 12
        np.testing.assert_array_equal(next(matrix.blocks(23)).toarray(), COUNTS)


def test_counts_of_more_genes_elsewhere_are_noted(tmp_path, vocabulary, caplog) -> None:
    adata = anndata.AnnData(scipy.sparse.csr_matrix(COUNTS), var=pd.DataFrame(index=[f"GENE{at}" for at in range(12)]))
    adata.raw = adata
    adata = adata[:, :3].copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    note = (
        "raw has counts of 12 genes, X of 3 alone, and the sum of a cell's counts is of these: to take all genes, pass "
        "layer='raw' (--layer raw)."
    )
    tokenizer = ScReformerTokenizer(vocabulary, on_empty_cells="keep")
    for source in (tmp_path / "cells.h5ad", adata):
        caplog.clear()
        with open_count_matrix(source, vocabulary=vocabulary) as matrix:
            assert (matrix.count_source, matrix.num_genes, matrix.notes) == ("X", 3, [note])
            assert inspect_counts(matrix, tokenizer, progress=False).notes == (note,)
            assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
                f"{matrix.name}: {note}"
            ]
            known = matrix.source
        with open_count_matrix(source, layer="raw", vocabulary=vocabulary) as matrix:
            assert matrix.notes == []
    with open_count_matrix(source, vocabulary=vocabulary, **{k: known[k] for k in ("layer", "opened")}) as other:
        assert other.notes == [note]


@pytest.mark.parametrize("dtype", ["float16", ">i4", ">f4"])
def test_dense_numbers_in_memory_are_counts(vocabulary, dtype) -> None:
    adata = anndata.AnnData(COUNTS.astype(dtype), var=pd.DataFrame(index=[f"GENE{at}" for at in range(12)]))
    for cells, expected in ((adata, COUNTS), (adata[3:8], COUNTS[3:8])):
        with open_count_matrix(cells, vocabulary=vocabulary) as matrix:
            np.testing.assert_array_equal(scipy.sparse.vstack(list(matrix.blocks(4))).toarray(), expected)


def test_a_fraction_late_in_the_file_is_seen(tmp_path, vocabulary) -> None:
    counts = scipy.sparse.random(3000, 12, density=0.9, random_state=0, format="csr")
    counts.data = np.ceil(counts.data * 5)
    for entry in (0, counts.nnz // 2, counts.nnz - 1):
        spoiled = counts.copy()
        spoiled.data[entry] = 0.5
        anndata.AnnData(spoiled).write_h5ad(tmp_path / "cells.h5ad")
        with pytest.raises(ValueError, match="looks normalised"):
            open_count_matrix(tmp_path / "cells.h5ad", vocabulary=vocabulary)


def test_a_layer_is_used_when_named(tmp_path, vocabulary) -> None:
    counts = scipy.sparse.csr_matrix(COUNTS)
    path = _write(tmp_path / "cells.h5ad", counts * 2, layers={"other": counts})
    with open_count_matrix(path, layer="other", vocabulary=vocabulary) as matrix:
        assert matrix.count_source == "layers/other"
        assert next(matrix.blocks(23)).sum() == COUNTS.sum()
    with pytest.raises(ValueError, match=r"layer='absent' is not in cells.h5ad, which has the layers \['other'\]"):
        open_count_matrix(path, layer="absent", vocabulary=vocabulary)


def test_a_place_can_be_named_and_opened_though_it_holds_no_counts(tmp_path, vocabulary) -> None:
    counts, normalised = scipy.sparse.csr_matrix(COUNTS), scipy.sparse.csr_matrix(np.log1p(COUNTS))
    path = _write(tmp_path / "cells.h5ad", normalised, layers={"counts": counts, "X": counts * 2})
    for layer, source, total in (
        ("X", "X", np.log1p(COUNTS).sum()),
        ("layers/X", "layers/X", 2 * COUNTS.sum()),
        ("counts", "layers/counts", COUNTS.sum()),
    ):
        with open_count_matrix(path, layer=layer, vocabulary=vocabulary, allow=["not-counts"]) as matrix:
            assert matrix.count_source == matrix.evidence[0].source == source
            assert {one.source for one in matrix.evidence} == {"X", "layers/counts", "layers/X"}
            assert next(matrix.blocks(23)).sum() == pytest.approx(total)
            with open_count_matrix(**matrix.source) as other:
                assert next(other.blocks(23)).sum() == pytest.approx(total)
                assert other.evidence == matrix.evidence
    with pytest.raises(ValueError, match=r"X: .*looks normalised.*Pass layer= one of \['counts', 'X'\]"):
        open_count_matrix(path, layer="X", vocabulary=vocabulary)
    path = _write(tmp_path / "no_counts.h5ad", normalised)
    with open_count_matrix(path, vocabulary=vocabulary, allow=["not-counts"]) as matrix:
        assert not matrix.evidence[0].is_counts


def test_empty_names_of_a_named_column_are_filled_by_the_var_names(tmp_path, vocabulary) -> None:
    adata = anndata.AnnData(scipy.sparse.csr_matrix(COUNTS))
    adata.var_names = [f"GENE{at}" for at in range(12)]
    adata.var["id"] = ["", *vocabulary.ensembl_ids[1:]]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with open_count_matrix(tmp_path / "cells.h5ad", gene_column="id", vocabulary=vocabulary) as matrix:
        assert matrix.gene_names == ["GENE0", *vocabulary.ensembl_ids[1:]]
    with open_count_matrix(tmp_path / "cells.h5ad", gene_column="var_names", vocabulary=vocabulary) as matrix:
        assert matrix.gene_source == "var_names"


def test_a_normalised_file_is_refused_with_the_layers_that_would_do(tmp_path, vocabulary) -> None:
    normalised = scipy.sparse.csr_matrix(np.log1p(COUNTS))
    path = _write(tmp_path / "one.h5ad", normalised)
    with pytest.raises(ValueError, match=r"one.h5ad has no raw counts. X: .*looks normalised.*ask the file's authors"):
        open_count_matrix(path, vocabulary=vocabulary)
    path = _write(tmp_path / "two.h5ad", normalised, layers={"spliced": scipy.sparse.csr_matrix(COUNTS)})
    with pytest.raises(ValueError, match=r"Pass layer= one of \['spliced'\]"):
        open_count_matrix(path, vocabulary=vocabulary)
    path = _write(tmp_path / "three.h5ad", np.zeros((23, 12)))
    with pytest.raises(ValueError, match="X: the values looked at are all 0"):
        open_count_matrix(path, vocabulary=vocabulary)


def test_genes_are_named_by_what_the_vocabulary_knows_best(tmp_path, vocabulary) -> None:
    adata = anndata.AnnData(scipy.sparse.csr_matrix(COUNTS))
    adata.var_names = [f"feature{at}" for at in range(12)]
    adata.var["id"] = vocabulary.ensembl_ids
    adata.var["symbol"] = vocabulary.symbols
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with open_count_matrix(tmp_path / "cells.h5ad", vocabulary=vocabulary) as matrix:
        assert matrix.gene_source == "var['id']"
        assert matrix.map_genes(vocabulary).positions.tolist() == list(range(12))
    with open_count_matrix(tmp_path / "cells.h5ad", gene_column="symbol", vocabulary=vocabulary) as matrix:
        assert matrix.gene_names == vocabulary.symbols
    with pytest.raises(ValueError, match="gene_column='absent' is not a column of var"):
        open_count_matrix(tmp_path / "cells.h5ad", gene_column="absent", vocabulary=vocabulary)


def test_obs_is_read_as_text(tmp_path, vocabulary) -> None:
    path = _write(tmp_path / "cells.h5ad", scipy.sparse.csr_matrix(COUNTS))
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert matrix.cell_ids[:2] == ["cell0", "cell1"]
        assert matrix.obs_columns == ["kind", "number"]
        assert matrix.obs_column("kind")[:3] == ["a", None, "b"]
        assert matrix.obs_column("number")[:2] == ["0", "1"]
        with pytest.raises(
            ValueError, match=r"obs column 'absent' is not in cells.h5ad, which has \['kind', 'number'\]"
        ):
            matrix.obs_column("absent")
        with pytest.raises(ValueError, match="num_rows: at least 1, got 0"):
            next(matrix.blocks(0))


def test_what_is_no_h5ad_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_count_matrix(tmp_path / "absent.h5ad")
    (tmp_path / "text.h5ad").write_text("genes")
    with pytest.raises(ValueError, match="is not an h5ad file"):
        open_count_matrix(tmp_path / "text.h5ad")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["matrix"] = np.ones(3)
    with pytest.raises(ValueError, match=r"is HDF5 but not h5ad \(it has \['matrix'\]"):
        open_count_matrix(tmp_path / "other.h5ad")
    adata = anndata.AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["b"]))
    adata.write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(ValueError, match="It has no matrix at all"):
        open_count_matrix(tmp_path / "empty.h5ad")


def test_the_packaged_cells_open() -> None:
    with open_count_matrix(example_cells_path()) as matrix:
        assert repr(matrix).startswith("CountMatrix(pancreas_baron2016.h5ad: 2142 cells x 20125 genes, counts in X")
        assert next(matrix.blocks(10)).shape == (10, 20125)
