"""Experiments of TileDB-SOMA and of CELLxGENE Census open by address; a missing package is named."""

import sys
import warnings
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
from format_writers import take_cells, write_soma
from scipy import sparse

from screformer.tokenization import GeneVocabulary, example_cells_path, open_count_matrix
from screformer.tokenization.soma_experiment import CensusAddress, parse_census_address


@pytest.fixture(scope="module")
def cells():
    return take_cells(anndata.read_h5ad(example_cells_path()), 40, 90)


@pytest.fixture(scope="module")
def vocabulary(cells):
    return GeneVocabulary([f"ENSG{at:011d}" for at in range(90)], symbols=[str(name) for name in cells.var_names])


@pytest.fixture(scope="module")
def census(cells, tmp_path_factory):
    """Return a folder laid out as the Census is: census_data/ORGANISM/ms/RNA/X/{raw, normalized}."""
    pytest.importorskip("tiledbsoma", reason="tiledbsoma is not installed")
    import tiledbsoma
    import tiledbsoma.io

    folder = tmp_path_factory.mktemp("census") / "soma"
    adata = cells.copy()
    adata.obs["tissue"] = ["heart", "lung", "heart", "blood"] * 10
    adata.var = adata.var.rename(columns={"ensembl_id": "feature_id"}).assign(feature_name=cells.var_names)
    adata.var.index = [str(at) for at in range(90)]
    adata.layers["normalized"] = adata.X.multiply(1e4 / adata.X.sum(1)).tocsr().astype(np.float32)
    with warnings.catch_warnings(), tiledbsoma.Collection.create(str(folder)) as root:
        warnings.simplefilter("ignore")
        data = root.add_new_collection("census_data")
        tiledbsoma.io.from_anndata(
            f"{folder}/census_data/homo_sapiens",
            adata,
            measurement_name="RNA",
            X_layer_name="raw",
        )
        data["homo_sapiens"] = tiledbsoma.Experiment.open(f"{folder}/census_data/homo_sapiens")
    return folder


def test_addresses_are_taken_apart():
    assert parse_census_address("census://2025-01-30/homo_sapiens") == CensusAddress(
        None, "2025-01-30", "homo_sapiens", None
    )
    address = "census://stable/homo_sapiens?tissue == 'heart' and is_primary_data == True"
    assert parse_census_address(address).cells == "tissue == 'heart' and is_primary_data == True"
    assert parse_census_address("census:///a/b/mus_musculus?x%20==%201") == CensusAddress(
        "/a/b", None, "mus_musculus", "x == 1"
    )
    for wrong in ("census://", "census://stable", "census://stable/", "census://a/b/c", "census:///b", "census:stable"):
        with pytest.raises(ValueError, match="is no address of CELLxGENE Census; write census://VERSION/ORGANISM"):
            parse_census_address(wrong)


def test_a_missing_package_is_named_with_the_extra(cells, tmp_path, monkeypatch):
    (tmp_path / "soma" / "__group").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "tiledbsoma", None)
    for address in (tmp_path / "soma", "s3://bucket/experiment", "census://stable/homo_sapiens"):
        with pytest.raises(ImportError, match=r'needs the package tiledbsoma: pip install "screformer\[soma\]"'):
            open_count_matrix(address)


def test_the_census_needs_its_own_package(monkeypatch):
    pytest.importorskip("tiledbsoma", reason="tiledbsoma is not installed")
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    with pytest.raises(ImportError, match="homo_sapiens needs the package cellxgene-census: pip install"):
        open_count_matrix("census://stable/homo_sapiens")


def test_the_census_is_opened_by_version(census, cells, vocabulary, monkeypatch):
    import tiledbsoma

    asked = []

    def open_soma(**arguments):
        asked.append(arguments)
        return tiledbsoma.open(str(census))

    monkeypatch.setitem(sys.modules, "cellxgene_census", SimpleNamespace(open_soma=open_soma))
    with open_count_matrix("census://2025-01-30/homo_sapiens", vocabulary=vocabulary) as matrix:
        assert matrix.format == "cellxgene-census"
        assert matrix.path == matrix.name == "census://2025-01-30/homo_sapiens"
        assert matrix.num_cells == 40
    assert asked[0]["census_version"] == "2025-01-30"


def test_cells_of_a_local_copy_are_chosen_by_a_condition(census, cells, vocabulary):
    hearts = np.flatnonzero(np.arange(40) % 2 == 0)
    address = f"census://{census}/homo_sapiens?tissue == 'heart'"
    with open_count_matrix(address, gene_column="feature_name", vocabulary=vocabulary) as matrix:
        assert matrix.count_source == "RNA/X/raw"
        assert [one.source for one in matrix.evidence] == ["RNA/X/raw", "RNA/X/normalized"]
        assert [one.is_counts for one in matrix.evidence] == [True, False]
        assert matrix.gene_names == list(cells.var_names)
        assert matrix.num_cells == 20
        for num_rows in (1, 6, 50):
            found = sparse.vstack(list(matrix.blocks(num_rows)))
            assert (found != cells.X[hearts]).nnz == 0
        assert set(matrix.obs_column("tissue")) == {"heart"}
        assert matrix.cell_ids == list(cells.obs_names[hearts])
        assert matrix.obs_column("donor", start=3, stop=9) == list(cells.obs["donor"].iloc[hearts[3:9]])
        with open_count_matrix(**matrix.source) as other:
            assert (sparse.vstack(list(other.blocks(6))) != cells.X[hearts]).nnz == 0
            assert other.gene_names == matrix.gene_names
    with pytest.raises(ValueError, match="has no cells"):
        open_count_matrix(f"census://{census}/homo_sapiens?tissue == 'brain'", vocabulary=vocabulary)
    with pytest.raises(ValueError, match="cannot be opened as a part of CELLxGENE Census"):
        open_count_matrix(f"census://{census}/homo_sapiens?absent == 'brain'", vocabulary=vocabulary)
    with pytest.raises(ValueError, match=r"names no organism of the Census; it has \['homo_sapiens'\]"):
        open_count_matrix(f"census://{census}/mus_musculus", vocabulary=vocabulary)
    with pytest.raises(ValueError, match="cannot be opened as a part of CELLxGENE Census"):
        open_count_matrix(f"census://{census}/census_data/homo_sapiens", vocabulary=vocabulary)


def test_what_is_no_experiment_is_refused_with_the_way_to_one(census, vocabulary, tmp_path):
    with pytest.raises(ValueError, match=r"is a SOMACollection, not an experiment. Name an organism .*census:///"):
        open_count_matrix(census, vocabulary=vocabulary)
    with pytest.raises(ValueError, match=r"is a SOMACollection, not .*Name the experiment in it.*\['homo_sapiens'\]"):
        open_count_matrix(census / "census_data", vocabulary=vocabulary)
    with open_count_matrix(census / "census_data" / "homo_sapiens", vocabulary=vocabulary) as matrix:
        assert matrix.format == "soma"
        assert matrix.num_cells == 40
    (tmp_path / "empty" / "__group").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty cannot be opened as a TileDB-SOMA experiment"):
        open_count_matrix(tmp_path / "empty", vocabulary=vocabulary)


def test_an_experiment_whose_genes_have_no_names_is_refused(cells, vocabulary, tmp_path):
    path = write_soma(cells, tmp_path)
    import tiledbsoma

    with tiledbsoma.open(str(path)) as experiment:
        var = str(experiment.ms["RNA"].var.uri)
    with tiledbsoma.open(var, "w") as table:
        del table.metadata["soma_dataframe_original_index_name"]
        table.metadata["soma_dataframe_original_index_name"] = '"elsewhere"'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("screformer.tokenization.soma_experiment.GENE_NAMES", ("symbol",))
        with pytest.raises(ValueError, match=r"the genes of RNA/X/raw are named in none of \['symbol'\], only in"):
            open_count_matrix(path, vocabulary=vocabulary)
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert matrix.gene_names == list(cells.var_names)


def test_an_experiment_without_measurements_and_one_too_small_are_refused(cells, vocabulary, tmp_path):
    path = write_soma(cells, tmp_path)
    import tiledbsoma

    with tiledbsoma.open(str(path / "obs"), "w") as obs:
        obs.tiledbsoma_resize_soma_joinid_shape(99)
    import pandas as pd
    import pyarrow as pa

    with tiledbsoma.open(str(path / "obs")) as obs:
        table = pd.concat([part.to_pandas() for part in obs.read()]).assign(soma_joinid=lambda x: x.soma_joinid + 41)
        schema = obs.schema
    with tiledbsoma.open(str(path / "obs"), "w") as obs:
        obs.write(pa.Table.from_pandas(table, schema=schema, preserve_index=False))
    with pytest.raises(ValueError, match=r"RNA/X/raw has the shape \(40, 90\), but .* name cell 80 and gene 89"):
        open_count_matrix(path, vocabulary=vocabulary)
    with tiledbsoma.open(str(path / "ms"), "d") as measurements:
        del measurements["RNA"]
    with pytest.raises(ValueError, match="soma is an experiment without measurements"):
        open_count_matrix(path, vocabulary=vocabulary)


def test_tiles_are_not_merged_by_several_threads(cells, tmp_path):
    # With it TileDB 2.30 ended the process in one of ten runs of these tests beside others.
    with open_count_matrix(write_soma(cells, tmp_path)) as matrix:
        context = matrix._file._experiment.context
    assert int(context.tiledb_config["sm.query.sparse_global_order.preprocess_tile_merge"]) == 0
