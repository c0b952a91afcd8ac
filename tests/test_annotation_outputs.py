"""Annotating and embedding cells of every format, into every kind of output, and AnnData objects."""

import json
import shutil
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from format_writers import write_h5ad, write_loom, write_mmwrite_folder, write_old_h5ad, write_tenx_h5
from scipy import sparse
from small_corpus import make_cells, make_corpus, make_tokenizer
from test_formats import WRITERS

from screformer import ScReformerConfig
from screformer.annotation import annotate, annotate_file, embed_file, load_classifier
from screformer.annotation import cell_source as cell_source_module
from screformer.annotation.calibration import Calibration
from screformer.annotation.unknown_types import UnknownTypeDetector, fit_unknown_types
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization import open_corpus, open_count_matrix
from screformer.train.expression_levels import read_levels

QUIET = {"progress": False}
COLUMNS = ["screformer_cell_type", "screformer_probability", "screformer_abstained"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = make_tokenizer()
    config = ScReformerConfig(
        num_genes=tokenizer.num_genes,
        num_bins=tokenizer.num_bins,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        bucket_size=8,
        num_hashes=1,
        classifier_hidden_sizes=[16, 8],
        tokenizer_fingerprint=tokenizer.fingerprint,
        id2label={0: "alpha", 1: "beta", 2: "mast"},
        label2id={"alpha": 0, "beta": 1, "mast": 2},
        label_parents={"islet": None, "alpha": "islet", "beta": "islet", "mast": None},
        calibration=Calibration((1.0, 1.0), (0.05, 0.5), (0.9, 0.0)).to_config(),
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ScReformerForCellClassification(config)
    with torch.no_grad():  # so that cells get different labels
        model.classifier.convolution_path.output.weight.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cells():
    adata = make_cells()
    adata.var["ensembl_id"] = adata.var_names
    adata.obs["depth"] = np.arange(48) / 4
    adata.var["length"] = np.arange(adata.n_vars)
    return adata


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_format_gives_the_same_labels_and_keeps_order_counts_and_columns(name, cells, checkpoint, tmp_path):
    if name.startswith("soma"):
        pytest.importorskip("tiledbsoma")
    elif name.startswith("zarr"):
        pytest.importorskip("zarr")
    if name.startswith("h5ad-0"):  # whose writer knows text alone
        del cells.obs["depth"], cells.var["length"]
    kind, write = WRITERS[name]
    source = write(cells, tmp_path)
    annotate(cells, checkpoint, **QUIET)
    annotate_file(source, checkpoint, tmp_path / "out.h5ad", **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", anndata.OldFormatWarning)
        found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert found.obs_names.tolist() == cells.obs_names.tolist()
    pd.testing.assert_frame_equal(
        found.obs[COLUMNS], cells.obs[COLUMNS], rtol=1e-5, check_categorical=False, check_names=False
    )
    values = found.X if found.raw is None or found.X is not None else found.raw.X
    np.testing.assert_array_equal(sparse.csr_matrix(values).toarray(), cells.X.toarray())
    assert found.uns["screformer"]["input"]["format"] == kind
    if "cell_type" in open_count_matrix(source).obs_columns:
        assert found.obs["cell_type"].tolist() == cells.obs["cell_type"].tolist()


def test_a_zarr_folder_is_copied_with_all_that_it_holds(cells, checkpoint, tmp_path):
    pytest.importorskip("zarr")
    cells.layers["log"] = cells.X.astype(np.float32).log1p()
    cells.obsm["X_pca"] = np.random.default_rng(0).normal(size=(48, 3))
    cells.obsp["near"] = sparse.random(48, 48, 0.1, format="csr", random_state=0)
    cells.uns["palette"] = {"alpha": "#ff0000", "names": np.array(["a", "b"]), "number": 3, "flag": True}
    cells.obs["doublet"] = pd.array([True, None] * 24, dtype="boolean")
    cells.obs["batch"] = pd.Categorical(["x", None] * 24)
    cells.raw = cells
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata announces another format
        cells.write_zarr(tmp_path / "cells.zarr")
    annotate_file(tmp_path / "cells.zarr", checkpoint, tmp_path / "out.h5ad", **QUIET)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    expected = anndata.read_zarr(tmp_path / "cells.zarr")
    pd.testing.assert_frame_equal(found.obs[expected.obs.columns.tolist()], expected.obs)
    pd.testing.assert_frame_equal(found.var, expected.var)
    for group in ("layers", "obsm", "obsp"):
        for key, values in getattr(expected, group).items():
            ours = getattr(found, group)[key]
            dense = [each.toarray() if sparse.issparse(each) else each for each in (ours, values)]
            np.testing.assert_array_equal(*dense)
    assert found.uns["palette"]["alpha"] == "#ff0000"
    assert list(found.uns["palette"]["names"]) == ["a", "b"]
    assert found.uns["palette"]["number"] == 3
    assert found.raw.shape == expected.raw.shape


def test_features_that_are_no_genes_are_kept_in_the_copy(cells, checkpoint, tmp_path):
    types = ["Gene Expression"] * 38 + ["Antibody Capture"] * 2
    source = write_tenx_h5(cells, tmp_path, feature_types=types)
    annotate_file(source, checkpoint, tmp_path / "out.h5ad", allow=["low-coverage"], **QUIET)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(found.X.toarray(), cells.X.toarray())
    assert found.var["feature_types"].tolist() == types


def test_numbers_of_other_formats_stay_numbers(cells, checkpoint, tmp_path):
    source = write_loom(cells, tmp_path)
    annotate_file(source, checkpoint, tmp_path / "out.h5ad", **QUIET)
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(found.obs["depth"], cells.obs["depth"])
    assert found.obs["donor"].dtype == "category"


@pytest.mark.parametrize(
    "names",
    [
        ["1_1", "11"], ["007", "7"], ["1e3", "2"], ["nan", "3"], ["inf", "3"], ["1.0", "1"], [" 1", "1"], ["+1", "2"],
        ["1.", "2"], ["1.10", "2"], ["-0", "0"], ["٣", "4"], ["9007199254740993", "9007199254740992"], ["1.2.3", "1"],
    ],
)  # fmt: skip
def test_names_that_python_reads_as_numbers_stay_names(names, cells, checkpoint, tmp_path):
    cells.obs["plate"] = names * 24
    source = write_loom(cells, tmp_path)
    annotate_file(source, checkpoint, tmp_path / "out.h5ad", **QUIET)
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obs["plate"].astype(str).tolist() == names * 24


def test_numbers_as_they_are_written_become_numbers(cells, checkpoint, tmp_path):
    cells.obs["share"], cells.obs["size"] = [1e-05, -2.5, 1e16] * 16, [0, -3, 12] * 16
    annotate_file(write_loom(cells, tmp_path), checkpoint, tmp_path / "out.h5ad", **QUIET)
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert found["share"].tolist() == cells.obs["share"].tolist()
    assert found["size"].tolist() == cells.obs["size"].tolist()
    assert found["size"].dtype == np.int64


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_tables_have_a_row_a_cell_and_the_record_beside_them(suffix, cells, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cell_source_module, "CELLS_PER_BLOCK", 7)
    source = write_mmwrite_folder(cells, tmp_path)
    options = {"embeddings": True, "max_error": 0.1, "batch_size": 4, **QUIET}
    summary = annotate_file(source, checkpoint, tmp_path / f"out{suffix}", **options)
    read = {".csv": pd.read_csv, ".tsv": lambda path: pd.read_csv(path, sep="\t"), ".parquet": pd.read_parquet}[suffix]
    table = read(tmp_path / f"out{suffix}")
    expected = annotate(cells, checkpoint, copy=True, **options)
    assert table["cell_id"].tolist() == cells.obs_names.tolist()
    for name in summary.names.obs:
        if expected.obs[name].dtype == "category":
            texts = [values.astype(object).where(values.notna(), None) for values in (table[name], expected.obs[name])]
            assert texts[0].tolist() == texts[1].tolist()
        else:
            np.testing.assert_allclose(table[name].astype(float), expected.obs[name].astype(float), rtol=1e-5)
    probabilities = [f"probability_{label}" for label in ("alpha", "beta", "mast")]
    np.testing.assert_allclose(table[probabilities], expected.obsm["screformer_probabilities"], rtol=1e-5)
    embedding = [f"embedding_{number}" for number in range(16)]
    np.testing.assert_allclose(table[embedding], expected.obsm["X_screformer"], rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / f"out{suffix}.json").read_text())["screformer"]
    assert record["max_error"] == 0.1
    assert record["input"]["num_cells"] == 48


def test_embeddings_are_those_of_embed(cells, checkpoint, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    annotate_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "both.h5ad", embeddings=True, **QUIET)
    embed_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "embedded.parquet", **QUIET)
    both = anndata.read_h5ad(tmp_path / "both.h5ad").obsm["X_screformer"]
    alone = pd.read_parquet(tmp_path / "embedded.parquet").set_index("cell_id")
    np.testing.assert_array_equal(both, alone.to_numpy(dtype=np.float32))
    assert alone.index.tolist() == cells.obs_names.tolist()


def test_unsure_cells_back_off_and_the_best_guess_stays(cells, checkpoint):
    sure = annotate(cells, checkpoint, copy=True, **QUIET).obs
    unsure = annotate(cells, checkpoint, max_error=0.1, copy=True, **QUIET)
    obs = unsure.obs
    assert obs["screformer_best_guess"].tolist() == sure["screformer_cell_type"].tolist()
    is_unknown = obs["screformer_cell_type"] == "unknown"
    np.testing.assert_array_equal(obs["screformer_abstained"], is_unknown)
    first = sure["screformer_level_1_probability"].to_numpy()
    np.testing.assert_array_equal(is_unknown, first < 0.9)
    assert unsure.uns["screformer"]["threshold"] == 0.9
    assert unsure.uns["screformer"]["num_abstained"] == is_unknown.sum()
    is_islet = (obs["screformer_cell_type"] == "islet").to_numpy()
    second = sure["screformer_level_2_probability"].to_numpy()
    np.testing.assert_array_equal(is_islet, (first >= 0.9) & (second < 0.9) & sure["screformer_level_1"].eq("islet"))
    assert is_unknown.any() or is_islet.any()
    # Where an answer ends, its end repeats.
    for level in ("screformer_level_1", "screformer_level_2"):
        assert (obs.loc[is_unknown, level] == "unknown").all()
        assert (obs.loc[is_islet, level] == "islet").all()


def test_anndata_objects_of_every_kind_are_annotated_alike(cells, checkpoint, tmp_path):
    expected = annotate(cells, checkpoint, copy=True, **QUIET)
    assert list(cells.obs.columns) == ["cell_type", "donor", "depth"]  # a copy was asked for
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    by_columns, dense, in_raw, in_layer = (cells.copy() for _ in range(4))
    by_columns.X = sparse.csc_matrix(by_columns.X)
    dense.X = dense.X.toarray()
    in_raw.raw = in_raw
    in_raw.X = in_raw.X.astype(np.float32).log1p()
    in_layer.layers["counts"] = in_layer.X
    in_layer.X = in_layer.X.astype(np.float32).log1p()
    for adata in (backed, by_columns, dense, in_raw, in_layer):
        assert annotate(adata, checkpoint, **QUIET) is None
        pd.testing.assert_frame_equal(adata.obs[COLUMNS], expected.obs[COLUMNS], rtol=1e-5)
    backed.file.close()
    reverse = cells[::-1][:10]
    with pytest.warns(anndata.ImplicitModificationWarning, match="initializing view as actual"):
        annotate(reverse, load_classifier(checkpoint), **QUIET)
    pd.testing.assert_frame_equal(
        reverse.obs[COLUMNS], expected.obs[COLUMNS].iloc[::-1][:10], rtol=1e-5, check_categorical=False
    )


def test_an_annotated_object_can_be_written_and_read(cells, checkpoint, tmp_path):
    annotate(cells, checkpoint, embeddings=True, max_error=0.1, key_added="mine", **QUIET)
    cells.write_h5ad(tmp_path / "mine.h5ad")
    again = anndata.read_h5ad(tmp_path / "mine.h5ad")
    pd.testing.assert_frame_equal(again.obs, cells.obs)
    np.testing.assert_array_equal(again.obsm["X_mine"], cells.obsm["X_mine"])
    assert again.uns["mine"]["labels"].tolist() == ["alpha", "beta", "mast"]


def new_names(adata):
    columns = [name for name in adata.obs if name.startswith("screformer_")]
    return columns, [name for name in adata.obsm if "screformer" in name]


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("write", [write_h5ad, write_old_h5ad])
def test_nothing_of_an_earlier_annotation_stays_beside_a_new_one(write, cells, checkpoint, tmp_path):
    del cells.obs["depth"], cells.var["length"]
    cells.obs["screformer_note"] = cells.obs["my_screformer_level_1"] = cells.obs["donor"]
    source = write(cells, tmp_path)
    options = {"allow": ["low-coverage"], **QUIET}
    plain, full, again = (tmp_path / f"{name}.h5ad" for name in ("plain", "full", "again"))
    annotate_file(source, checkpoint, plain, **options)
    many = {"max_error": 0.1, "cluster_column": "donor", "embeddings": True, **options}
    annotate_file(source, checkpoint, full, **many)
    found = anndata.read_h5ad(full)
    annotate_file(full, checkpoint, again, overwrite=True, **options)
    expected = anndata.read_h5ad(plain)
    assert {"screformer_best_guess", "screformer_cluster_vote", "screformer_cluster_vote_share"} <= set(found.obs)
    assert sorted(anndata.read_h5ad(again).obs) == sorted(expected.obs)
    assert new_names(anndata.read_h5ad(again))[1] == ["screformer_probabilities"]
    annotate(found, checkpoint, **options)
    assert sorted(found.obs) == sorted(expected.obs)
    assert new_names(found)[1] == ["screformer_probabilities"]
    cells.obs["screformer_level_3"] = cells.obs["donor"]
    source.unlink()
    source = write(cells, tmp_path)
    annotate_file(source, checkpoint, again, overwrite=True, **options)
    assert sorted(anndata.read_h5ad(again).obs) == sorted(expected.obs)


def test_what_embed_wrote_stays(cells, checkpoint, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    embed_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "embedded.h5ad", **QUIET)
    for source, output in (("embedded", "first"), ("first", "second")):
        annotate_file(tmp_path / f"{source}.h5ad", checkpoint, tmp_path / f"{output}.h5ad", overwrite=True, **QUIET)
    found = anndata.read_h5ad(tmp_path / "second.h5ad")
    annotate(found, checkpoint, **QUIET)
    assert sorted(found.obsm) == ["X_screformer", "screformer_probabilities"]


def test_a_copy_of_an_object_on_disk_is_in_memory(cells, checkpoint, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    copied = annotate(backed, checkpoint, copy=True, **QUIET)
    assert not copied.isbacked
    assert "screformer_cell_type" in copied.obs
    assert "screformer_cell_type" not in backed.obs
    backed.file.close()


def test_a_normalised_object_is_refused_and_unchanged(cells, checkpoint):
    cells.X = cells.X.astype(np.float32).log1p()
    with pytest.raises(ValueError, match="the AnnData object has no raw counts"):
        annotate(cells, checkpoint, **QUIET)
    assert list(cells.obs.columns) == ["cell_type", "donor", "depth"]
    assert not cells.uns


def test_clusters_vote_in_columns_of_their_own(cells, checkpoint, tmp_path):
    alone = annotate(cells, checkpoint, copy=True, **QUIET).obs
    cells.obs["leiden"] = pd.Categorical(["0", "1", None] * 16)
    voted = annotate(cells, checkpoint, cluster_column="leiden", copy=True, **QUIET).obs
    pd.testing.assert_frame_equal(voted[COLUMNS], alone[COLUMNS])
    for cluster in ("0", "1"):
        members = voted[voted["leiden"] == cluster]
        assert members["screformer_cluster_vote"].nunique() == 1
        winner = members["screformer_cluster_vote"].iloc[0]
        at_level = members[["screformer_level_1", "screformer_level_2"]].astype(str).eq(winner).any(axis=1)
        np.testing.assert_allclose(members["screformer_cluster_vote_share"], at_level.mean(), rtol=1e-6)
    nowhere = voted["leiden"].isna()
    assert voted.loc[nowhere, ["screformer_cluster_vote", "screformer_cluster_vote_share"]].isna().all(axis=None)
    with pytest.raises(ValueError, match=r"cluster_column='louvain' is not in the AnnData object, which has \['cell_t"):
        annotate(cells, checkpoint, cluster_column="louvain", **QUIET)


def test_labels_that_the_cell_ontology_knows_have_their_ids(cells, checkpoint):
    trained = load_classifier(checkpoint)
    trained.model.config.id2label = {0: "T cell", 1: "B cells", 2: "mystery"}
    trained.model.config.label_parents = None
    trained.model.config.calibration = None
    obs = annotate(cells, trained, copy=True, **QUIET).obs
    expected = {"T cell": "CL:0000084", "B cells": "CL:0000236", "mystery": None}
    found = obs["screformer_ontology_term_id"].astype(object).where(obs["screformer_ontology_term_id"].notna(), None)
    assert found.tolist() == [expected[label] for label in obs["screformer_cell_type"]]
    assert set(obs["screformer_cell_type"]) & {"T cell", "B cells"}
    trained.model.config.id2label = {0: "alpha", 1: "beta", 2: "mystery"}
    assert "screformer_ontology_term_id" not in annotate(cells, trained, copy=True, **QUIET).obs


def test_cells_of_unknown_types_are_called_so_where_asked(cells, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    with pytest.raises(ValueError, match=r"unknown_below=0.05: .* has no detector of unknown types"):
        annotate(cells, tmp_path / "model", unknown_below=0.05, **QUIET)
    corpus = open_corpus(make_corpus(tmp_path, cells=make_cells(300)))
    rows = np.arange(300)
    levels = read_levels(corpus, rows, 40, 6)
    labels = np.array(corpus.dataset["cell_type"])
    fit_unknown_types(levels, labels, num_bins=6, seed=0).save(tmp_path / "model")
    cells.X = sparse.csr_matrix(np.vstack([cells.X.toarray()[:40], cells.X.toarray()[:8, ::-1]]))  # eight strange ones
    with pytest.raises(ValueError, match="unknown_below got 2; it must be a share"):
        annotate(cells, tmp_path / "model", unknown_below=2, **QUIET)
    plain = annotate(cells, tmp_path / "model", copy=True, **QUIET)
    assert not plain.obs["screformer_abstained"].any()
    p_values = plain.obs["screformer_unknown_p"].to_numpy()
    expected = UnknownTypeDetector.from_pretrained(tmp_path / "model").score(
        [{"input_ids": row["input_ids"], "gene_ids": row["gene_ids"]} for row in tokens_of(cells)]
    )
    np.testing.assert_allclose(p_values, expected)
    assert p_values[40:].max() < 0.05 < np.median(p_values[:40])
    asked = annotate(cells, tmp_path / "model", unknown_below=0.05, copy=True, **QUIET).obs
    np.testing.assert_array_equal(asked["screformer_cell_type"] == "unknown", p_values < 0.05)
    np.testing.assert_array_equal(asked["screformer_best_guess"], plain.obs["screformer_cell_type"])
    assert (asked.loc[asked["screformer_abstained"], "screformer_level_1"] == "unknown").all()


def tokens_of(cells):
    batch = make_tokenizer()(cells, gene_space="expressed")
    for ids, genes, mask in zip(batch["input_ids"], batch["gene_ids"], batch["attention_mask"], strict=True):
        kept = np.asarray(mask, dtype=bool)
        yield {"input_ids": np.asarray(ids)[kept], "gene_ids": np.asarray(genes)[kept]}
