"""What annotation and embedding write is an ordinary h5ad to others: anndata, scanpy, and CELLxGENE's readers.

The rules of CELLxGENE are those of the validator of `cellxgene-schema` 7.1.2 and of the explorer `cellxgene` 1.3.0.
"""

import re

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from scipy import sparse
from small_corpus import NUM_GENES, make_cells, make_tokenizer

from screformer import ScReformerForCellClassification
from screformer.annotation import annotate_file, embed_file

PARENTS = {"islet": None, "alpha": "islet", "beta": "islet", "duct": None}
LABELS = ["alpha", "beta", "duct"]
EMPTY = 5  # the number of a cell without counts
OBSM_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]*")


@pytest.fixture
def written(tiny_config, tmp_path):
    """Return the path of a file with one empty cell, annotated by a model with a label tree and then embedded."""
    tokenizer, cells = make_tokenizer(), make_cells()
    cells.X = sparse.csr_matrix(cells.X.toarray() * (np.arange(cells.n_obs) != EMPTY)[:, None])
    cells.obsm["X_umap"] = np.random.default_rng(0).normal(size=(cells.n_obs, 2))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ScReformerForCellClassification(
            tiny_config(
                num_genes=NUM_GENES,
                tokenizer_fingerprint=tokenizer.fingerprint,
                id2label=dict(enumerate(LABELS)),
                label2id={label: number for number, label in enumerate(LABELS)},
                label_parents=PARENTS,
            )
        )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    annotate_file(tmp_path / "cells.h5ad", tmp_path / "model", tmp_path / "annotated.h5ad", progress=False)
    embed_file(tmp_path / "annotated.h5ad", tmp_path / "model", tmp_path / "written.h5ad", progress=False)
    return tmp_path / "written.h5ad"


def cellxgene_problems(adata):
    """Return what CELLxGENE would refuse, convert or leave out, as the names of the elements."""
    problems = [] if adata.obs_names.is_unique and all(type(name) is str for name in adata.obs_names) else ["obs_names"]
    problems += [] if adata.obs.columns.is_unique else ["obs"]
    for name, column in adata.obs.items():
        if isinstance(column.dtype, pd.CategoricalDtype):
            # Kinds of one type, not bool, and none without cells.
            kinds, unused = set(map(type, column.cat.categories)), set(column.cat.categories) - set(column)
            is_good = len(kinds) <= 1 and bool not in kinds and not unused
        else:
            is_good = str(column.dtype) in {"bool", "float32", "int32", "int16", "int8", "uint16", "uint8"}
        problems += [] if is_good else [f"obs/{name}"]
    for name, table in adata.obsm.items():
        is_good = type(table) is np.ndarray and table.ndim == 2 and table.shape[1] >= 2 and table.dtype.kind in "fiu"
        is_good = is_good and not np.isinf(table).any() and not np.isnan(table).all()
        problems += [] if is_good and OBSM_NAME.fullmatch(name.removeprefix("X_")) else [f"obsm/{name}"]
    for name, value in adata.uns.items():
        is_good = np.ndim(value) > 0 or not hasattr(value, "__len__") or len(value) > 0
        if name.endswith("_colors"):
            categories = adata.obs[name.removesuffix("_colors")].dropna().unique()
            is_good = len(value) >= len(categories) and all(re.fullmatch("#[0-9a-fA-F]{6}", each) for each in value)
        problems += [] if is_good else [f"uns/{name}"]
    return problems


def keys_with_slash(value):
    """Return the keys with a '/' in nested dictionaries; HDF5 would make groups of them."""
    if not isinstance(value, dict):
        return []
    return [key for key in value if "/" in key] + [found for each in value.values() for found in keys_with_slash(each)]


def test_cellxgene_finds_nothing_to_refuse(written):
    adata = anndata.read_h5ad(written)
    adata.obs = adata.obs.drop(columns=make_cells().obs.columns)  # those that were there before
    assert len(adata.obs.columns) == 7
    assert set(adata.obsm) == {"X_umap", "X_screformer", "screformer_probabilities"}
    assert cellxgene_problems(adata) == []
    assert keys_with_slash(adata.uns) == []


def test_what_cellxgene_refuses_is_seen():
    adata = make_cells(4)
    adata.obs = pd.DataFrame(
        {
            "good": pd.Categorical(["a", "b", None, "a"]),
            "unused": pd.Categorical(["a"] * 4, categories=["a", "b"]),
            "mixed": pd.Categorical([1, "b", 1, 1]),
            "wide": [0.5] * 4,
            "number": np.zeros(4, dtype=np.float32),
        },
        index=["w", "x", "y", "y"],
    )
    adata.obsm = {
        "X_good": np.array([[0, np.nan]] * 4),
        "X_narrow": np.zeros((4, 1)),
        "X_infinite": np.full((4, 2), np.inf),
        "X_nothing": np.full((4, 2), np.nan),
        "two words": np.zeros((4, 2)),
    }
    adata.uns = {"nothing": {}, "good_colors": np.array(["#00ff00"]), "made": {"at": {"a/b": 1}}}
    assert cellxgene_problems(adata) == [
        "obs_names", "obs/unused", "obs/mixed", "obs/wide", "obsm/X_narrow", "obsm/X_infinite", "obsm/X_nothing",
        "obsm/two words", "uns/nothing", "uns/good_colors",
    ]  # fmt: skip
    assert keys_with_slash(adata.uns) == ["a/b"]


def test_it_is_copied_cut_and_written_again_as_it_is(written, tmp_path):
    before = anndata.read_h5ad(written)
    before.copy().write_h5ad(tmp_path / "again.h5ad")
    after = anndata.read_h5ad(tmp_path / "again.h5ad")
    pd.testing.assert_frame_equal(after.obs, before.obs)
    for name, table in before.obsm.items():
        np.testing.assert_array_equal(after.obsm[name], table)
    assert after.uns["screformer"]["labels"].tolist() == LABELS
    assert str(after.uns) == str(before.uns)
    part = before[before.obs["screformer_level_1"].notna()].copy()
    part.write_h5ad(tmp_path / "part.h5ad")
    assert anndata.read_h5ad(tmp_path / "part.h5ad").n_obs == before.n_obs - 1
    assert anndata.concat([before, after], index_unique="-").n_obs == 2 * before.n_obs
    backed = anndata.read_h5ad(written, backed="r")
    assert backed.obs["screformer_cell_type"].notna().sum() == before.n_obs - 1
    backed.file.close()


def test_every_element_has_anndata_s_marks(written):
    unmarked = []

    def look(name, element):
        in_sparse_matrix = str(element.parent.attrs.get("encoding-type")).startswith("cs")  # whose arrays have none
        if not in_sparse_matrix and not {"encoding-type", "encoding-version"} <= set(element.attrs):
            unmarked.append(name)

    with h5py.File(written, "r") as file:
        file.visititems(look)
    assert unmarked == []


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")  # of matplotlib, at scanpy's colour maps
def test_scanpy_finds_neighbours_and_draws(written, tmp_path):
    sc = pytest.importorskip("scanpy")
    pyplot.switch_backend("Agg")
    adata = anndata.read_h5ad(written)
    # The empty cell has no vector, and no neighbours.
    with pytest.raises(ValueError, match="contains NaN"):
        sc.pp.neighbors(adata, use_rep="X_screformer", n_neighbors=5)
    has_vector = ~np.isnan(adata.obsm["X_screformer"]).any(axis=1)
    assert np.flatnonzero(~has_vector).tolist() == [EMPTY]
    some = adata[has_vector].copy()
    sc.pp.neighbors(some, use_rep="X_screformer", n_neighbors=5)
    assert some.obsp["distances"].shape == (47, 47)
    for cells in (adata, some):
        sc.pl.umap(cells, color=["screformer_cell_type", "screformer_level_1", "screformer_probability"], show=False)
        assert len(cells.uns["screformer_cell_type_colors"]) == cells.obs["screformer_cell_type"].nunique()
        pyplot.close("all")
        cells.write_h5ad(tmp_path / "drawn.h5ad")
        drawn = anndata.read_h5ad(tmp_path / "drawn.h5ad")
        drawn.obs = drawn.obs.drop(columns=make_cells().obs.columns)
        assert cellxgene_problems(drawn) == []
