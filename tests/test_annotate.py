"""Annotation adds cell types to a copy of the file, and changes or forgets nothing else."""

import json
import logging
import re

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from small_corpus import NUM_GENES, make_cells, make_corpus, make_tokenizer

from screformer.annotation import annotate_file
from screformer.annotation import cell_source as cell_source_module
from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.tokenization.count_matrix import CountMatrix
from screformer.tokenization.passport import inspect_file
from screformer.train.inference import BatchInference, predict_probabilities

LABELS = ["alpha", "beta", "mast"]
# The Cell Ontology knows mast cells for certain.
NEW_OBS = [f"screformer_{name}" for name in ("cell_type", "probability", "abstained", "ontology_term_id")]


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    return save_checkpoint(tiny_config, tmp_path / "finetuned")


@pytest.fixture
def cells(tmp_path):
    path = tmp_path / "cells.h5ad"
    make_cells().write_h5ad(path)
    return path


def save_checkpoint(tiny_config, folder, model_class=ScReformerForCellClassification, tokenizer=None, **overrides):
    tokenizer = tokenizer or make_tokenizer()
    defaults = {
        "num_genes": NUM_GENES,
        "classifier_hidden_sizes": [64, 32],
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
    }
    with torch.random.fork_rng():
        torch.manual_seed(2)  # one whose cells differ in their labels
        model = model_class(tiny_config(**{**defaults, **overrides}))
    if model_class is ScReformerForCellClassification:
        with torch.no_grad():  # so that cells get different labels
            model.classifier.convolution_path.output.weight.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def annotate(cells, checkpoint, output, **options):
    """Return the annotated cells and the summary."""
    summary = annotate_file(cells, checkpoint, output, **{"progress": False, **options})
    return anndata.read_h5ad(output), summary


def contents(path):
    """Return name -> values of every dataset, and name@attribute -> value, as text."""
    found = {}

    def read(name, element):
        if isinstance(element, h5py.Dataset):
            found[name] = f"{element.dtype} {np.asarray(element[()]).tolist()}"
        found.update({f"{name}@{key}": str(value) for key, value in element.attrs.items()})

    with h5py.File(path, "r") as file:
        file.visititems(read)
    return found


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_probabilities_are_those_of_evaluation_on_the_same_cells(cells, checkpoint, tmp_path, gene_space):
    rows = open_corpus(make_corpus(tmp_path)).dataset
    model = ScReformerForCellClassification.from_pretrained(checkpoint)
    expected = predict_probabilities(model, rows, gene_space=gene_space, progress=False)
    annotated, _ = annotate(cells, checkpoint, tmp_path / "out.h5ad", gene_space=gene_space)
    table = annotated.obsm["screformer_probabilities"]
    assert table.dtype == np.float32
    assert np.ptp(table, axis=0).min() > 0.01
    np.testing.assert_allclose(table, expected, atol=1e-5)


def test_columns_follow_from_the_table_of_probabilities(cells, checkpoint, tmp_path):
    annotated, summary = annotate(cells, checkpoint, tmp_path / "out.h5ad")
    table = annotated.obsm["screformer_probabilities"]
    labels = np.array(annotated.uns["screformer"]["labels"])
    cell_types, probability, abstained, terms = (annotated.obs[name] for name in NEW_OBS)
    np.testing.assert_array_equal(terms == "CL:0000097", cell_types == "mast")
    np.testing.assert_array_equal(terms.isna(), cell_types != "mast")
    assert abstained.dtype == bool
    assert not abstained.any()
    assert labels.tolist() == LABELS
    assert isinstance(cell_types.dtype, pd.CategoricalDtype)
    assert probability.dtype == np.float32
    assert cell_types.tolist() == labels[table.argmax(axis=1)].tolist()
    np.testing.assert_array_equal(probability, table.max(axis=1))
    assert cell_types.value_counts().to_dict() == summary.label_counts
    assert set(cell_types.cat.categories) == set(cell_types)
    assert len(summary.label_counts) > 1
    assert summary.mean_probability == pytest.approx(probability.mean())


def test_everything_else_in_the_file_stays_as_it_was(checkpoint, tmp_path):
    before = make_cells()
    before.layers["log"] = before.X.astype(np.float32).log1p()
    before.obsm["X_pca"] = np.random.default_rng(0).normal(size=(48, 3))
    before.obsp["near"] = sparse.random(48, 48, 0.1, format="csr", random_state=0)
    before.varm["loadings"] = np.ones((NUM_GENES, 2))
    before.uns["palette"] = {"alpha": "#ff0000"}
    before.obs["doublet"] = pd.array([True, None] * 24, dtype="boolean")
    before.raw = before
    before.write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    bytes_before = (tmp_path / "cells.h5ad").read_bytes()
    after, _ = annotate(tmp_path / "cells.h5ad", checkpoint, tmp_path / "new" / "out.h5ad")
    assert (tmp_path / "cells.h5ad").read_bytes() == bytes_before
    assert files_in(tmp_path / "new") == ["out.h5ad"]
    assert list(after.obs.columns) == [*before.obs.columns, *NEW_OBS]
    old, new = contents(tmp_path / "cells.h5ad"), contents(tmp_path / "new" / "out.h5ad")
    del old["obs@column-order"]
    assert len(old) > 50
    assert {name: new.get(name) for name in old} == old
    parts = {*(f"obs/{name}" for name in NEW_OBS), "obsm/screformer_probabilities", "uns/screformer"}
    added = {name for name in set(new) - set(old) if not name.startswith(tuple(parts))}
    assert added == {"obs@column-order"}


def test_results_do_not_depend_on_batches_blocks_or_the_order_of_cells(cells, checkpoint, tmp_path, monkeypatch):
    whole, _ = annotate(cells, checkpoint, tmp_path / "whole.h5ad")
    make_cells()[::-1].copy().write_h5ad(tmp_path / "turned_cells.h5ad")
    monkeypatch.setattr(cell_source_module, "CELLS_PER_BLOCK", 7)
    few, _ = annotate(cells, checkpoint, tmp_path / "few.h5ad", batch_size=5)
    turned, _ = annotate(tmp_path / "turned_cells.h5ad", checkpoint, tmp_path / "turned.h5ad", batch_size=5)
    assert turned.obs_names.tolist() == whole.obs_names.tolist()[::-1]
    for other, order in ((few, slice(None)), (turned, slice(None, None, -1))):
        table = other.obsm["screformer_probabilities"][order]
        np.testing.assert_allclose(table, whole.obsm["screformer_probabilities"], atol=1e-5)


def test_cells_without_known_counts_get_no_label_and_change_no_other(cells, checkpoint, tmp_path, caplog):
    original = make_cells()
    counts = np.hstack([original.X.toarray(), np.zeros((48, 1), np.int32)])
    extra = np.zeros((2, NUM_GENES + 1), np.int32)
    extra[1, -1] = 9  # a count, but on a gene that no one knows
    var = pd.DataFrame(index=[*original.var_names, "unheard_of"])
    obs = pd.DataFrame(index=["empty", *original.obs_names, "foreign"])
    with_empty = anndata.AnnData(sparse.csr_matrix(np.vstack([extra[:1], counts, extra[1:]])), obs=obs, var=var)
    with_empty.write_h5ad(tmp_path / "with_empty.h5ad")
    expected, _ = annotate(cells, checkpoint, tmp_path / "out.h5ad")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    annotated, summary = annotate(tmp_path / "with_empty.h5ad", checkpoint, tmp_path / "out_empty.h5ad", batch_size=4)
    assert annotated.obs_names.tolist() == obs.index.tolist()
    assert summary.num_empty_cells == annotated.uns["screformer"]["num_empty_cells"] == 2
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert messages == ["2 of 50 cells have no counts on known genes: they have no label"]
    for place in (0, -1):
        assert annotated.obs[["screformer_cell_type", "screformer_probability"]].iloc[place].isna().all()
        assert annotated.obs["screformer_abstained"].iloc[place]
        assert np.isnan(annotated.obsm["screformer_probabilities"][place]).all()
    assert annotated.obs[NEW_OBS[0]][1:-1].tolist() == expected.obs[NEW_OBS[0]].tolist()
    np.testing.assert_allclose(
        annotated.obsm["screformer_probabilities"][1:-1], expected.obsm["screformer_probabilities"], atol=1e-5
    )


def test_the_record_says_what_was_done_with_what(cells, checkpoint, tmp_path):
    annotated, summary = annotate(cells, checkpoint, tmp_path / "out.h5ad")
    record = annotated.uns["screformer"]
    assert record["model"]["name"] == str(checkpoint)
    assert record["model"]["tokenizer_fingerprint"] == make_tokenizer().fingerprint
    assert len(record["model"]["weights_sha256"]) == 64
    assert record["input"]["file"] == "cells.h5ad"
    assert (record["input"]["count_source"], record["input"]["gene_source"]) == ("X", "var_names")
    assert record["input"]["gene_coverage"] == summary.gene_coverage == 1
    assert record["input"]["gene_mapping"]["num_by_ensembl_id"] == NUM_GENES
    assert record["gene_space"] == "full"
    assert {"screformer", "torch", "anndata", "python"} <= set(record["versions"])
    assert record["date"].endswith("+00:00")


def test_the_record_holds_the_passport(cells, checkpoint, tmp_path):
    annotated, _ = annotate(cells, checkpoint, tmp_path / "out.h5ad", allow=["low-coverage"])
    record = annotated.uns["screformer"]["input"]
    expected = inspect_file(cells, make_tokenizer(), allow=["low-coverage"], progress=False).to_dict()
    assert set(record) == {name for name, value in expected.items() if value is not None}
    assert record["allowed"].tolist() == ["low-coverage"]
    assert record["genes_per_cell"] == expected["genes_per_cell"]
    assert record["organism"]["name"] == "human"
    assert record["evidence"]["source"].tolist() == ["X"]
    assert record["evidence"]["is_counts"].tolist() == [True]
    assert record["problems"].size == record["unmatched"].size == 0


def test_problems_that_are_allowed_are_in_the_record(checkpoint, tmp_path):
    cells = make_cells()
    cells.X = cells.X.astype(np.float32) * 0.7
    cells.var_names = [*cells.var_names[:-1], "not/safe"]  # the gene with most of the counts
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"allow: 'everything' is no code of a problem; these can be allowed: not-c"):
        annotate_file(tmp_path / "cells.h5ad", tmp_path / "nowhere", tmp_path / "out.h5ad", allow=["everything"])
    codes = ["not-counts", "low-coverage"]
    annotated, summary = annotate(tmp_path / "cells.h5ad", checkpoint, tmp_path / "out.h5ad", layer="X", allow=codes)
    record = annotated.uns["screformer"]["input"]
    assert record["problems"]["code"].tolist() == record["allowed"].tolist() == codes
    assert record["unmatched"]["name"].tolist() == ["not/safe"]
    assert record["unmatched"]["counts"].tolist() == pytest.approx([cells.X[:, -1].sum()])
    assert summary.gene_coverage == record["gene_coverage"] < 0.5
    assert annotated.obs["screformer_cell_type"].notna().all()


def test_genes_named_twice_are_in_the_record(checkpoint, tmp_path):
    cells = make_cells()
    cells.var_names = ["GENE1", *cells.var_names[1:]]  # gene 1 twice, gene 0 not at all
    cells.write_h5ad(tmp_path / "cells.h5ad")
    annotated, _ = annotate(tmp_path / "cells.h5ad", checkpoint, tmp_path / "out.h5ad")
    assert annotated.uns["screformer"]["input"]["gene_mapping"]["summed"].tolist() == ["GENE1: GENE1, ENSG00000000002"]


def test_summary_reads_well(cells, checkpoint, tmp_path):
    _, summary = annotate(cells, checkpoint, tmp_path / "out.h5ad")
    text = str(summary)
    assert text.startswith("48 cells: ")
    assert "counts from X, genes by var_names; 100.0% of the counts" in text
    added = ", ".join(f"obs[{name!r}]" for name in NEW_OBS)
    assert f"{tmp_path / 'out.h5ad'}: {added}, obsm['screformer_probabilities']" in text
    assert "cells a second" in text


def test_counts_and_names_are_taken_from_where_the_user_says(cells, checkpoint, tmp_path):
    expected, _ = annotate(cells, checkpoint, tmp_path / "expected.h5ad")
    moved = make_cells()
    moved.layers["umi"], moved.X = moved.X, moved.X.astype(np.float32).log1p()
    moved.var["id"] = moved.var_names
    moved.var_names = [f"row{number}" for number in range(NUM_GENES)]
    moved.write_h5ad(tmp_path / "moved.h5ad")
    options = {"layer": "umi", "gene_column": "id", "key": "mine", "batch_size": 48}
    annotated, summary = annotate(tmp_path / "moved.h5ad", checkpoint, tmp_path / "out.h5ad", **options)
    np.testing.assert_array_equal(annotated.obsm["mine_probabilities"], expected.obsm["screformer_probabilities"])
    assert summary.names.obs == [name.replace("screformer", "mine") for name in NEW_OBS]
    assert summary.names.obsm == ["mine_probabilities"]
    assert (summary.count_source, summary.gene_source) == ("layers/umi", "var['id']")
    with pytest.raises(ValueError, match=r"layer='counts' is not in moved.h5ad, which has the layers \['umi'\]"):
        annotate(tmp_path / "moved.h5ad", checkpoint, tmp_path / "no.h5ad", layer="counts")


def test_a_file_without_obsm_and_uns_is_annotated_too(cells, checkpoint, tmp_path):
    with h5py.File(cells, "r+") as file:
        for name in ("obsm", "uns"):
            del file[name]
    annotated, _ = annotate(cells, checkpoint, tmp_path / "out.h5ad")
    assert annotated.obsm["screformer_probabilities"].shape == (48, 3)
    assert "labels" in annotated.uns["screformer"]


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_a_file_of_anndata_0_7_is_annotated_too(cells, checkpoint, tmp_path):
    expected, _ = annotate(cells, checkpoint, tmp_path / "expected.h5ad")
    with h5py.File(cells, "r+") as file:
        obs = file["obs"]
        obs.attrs["encoding-version"] = "0.1.0"
        for name in ("cell_type", "donor"):
            column = expected.obs[name].astype("category").cat
            del obs[name]
            categories = obs.create_dataset(f"__categories/{name}", data=list(column.categories))
            obs.create_dataset(name, data=column.codes.to_numpy()).attrs["categories"] = categories.ref
    annotated, _ = annotate(cells, checkpoint, tmp_path / "out.h5ad")
    assert list(annotated.obs.columns) == list(expected.obs.columns)
    for name in expected.obs.columns:
        assert annotated.obs[name].tolist() == expected.obs[name].tolist()


def test_existing_names_and_files_are_replaced_only_when_asked(cells, checkpoint, tmp_path):
    first, second = tmp_path / "first.h5ad", tmp_path / "second.h5ad"
    expected, _ = annotate(cells, checkpoint, first)
    with pytest.raises(FileExistsError, match=r"output: .*first.h5ad exists; .*overwrite=True \(--overwrite\)"):
        annotate_file(cells, checkpoint, first)
    names = re.escape(", ".join([*(f"obs[{name!r}]" for name in NEW_OBS), "obsm['screformer_probabilities'], uns"]))
    with pytest.raises(ValueError, match=rf"key='screformer': first.h5ad has {names}.*\(--key\).*\(--overwrite\)"):
        annotate_file(first, checkpoint, second, progress=False)
    assert not second.exists()
    again, _ = annotate(first, checkpoint, second, overwrite=True)
    assert list(again.obs.columns) == list(expected.obs.columns)
    both, _ = annotate(first, checkpoint, second, key="other", overwrite=True)
    np.testing.assert_array_equal(both.obsm["other_probabilities"], both.obsm["screformer_probabilities"])


def test_refuses_paths_that_cannot_be_right(cells, checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cells: there is no file or folder .*missing.h5ad"):
        annotate_file(tmp_path / "missing.h5ad", checkpoint, tmp_path / "out.h5ad")
    with pytest.raises(ValueError, match=r"output: .*cells.h5ad is the file that is read; choose another name"):
        annotate_file(cells, checkpoint, tmp_path / "finetuned" / ".." / "cells.h5ad", overwrite=True)
    (tmp_path / "folder.h5ad").mkdir()
    for name in ("out.txt", "folder.h5ad"):
        message = r"output: the name of a file that ends in .h5ad, .csv, .tsv, .parquet is needed, got"
        with pytest.raises(ValueError, match=message):
            annotate_file(cells, checkpoint, tmp_path / name, overwrite=True)
    (tmp_path / "text.h5ad").write_text("not HDF5")
    with pytest.raises(ValueError, match=r"text.h5ad is not an h5ad file"):
        annotate_file(tmp_path / "text.h5ad", checkpoint, tmp_path / "out.h5ad")
    with pytest.raises(ValueError, match=r"path: the folder .*finetuned holds none of the formats that can be read"):
        annotate_file(checkpoint, checkpoint, tmp_path / "out.h5ad")
    for key in ("", "a/b"):
        with pytest.raises(ValueError, match="key: the beginning of the new names, without '/', is needed; got"):
            annotate_file(cells, checkpoint, tmp_path / "out.h5ad", key=key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"gene_space": "some"}, "gene_space must be 'full'"),
    ],
)
def test_refuses_options_out_of_range(cells, checkpoint, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        annotate_file(cells, checkpoint, tmp_path / "out.h5ad", progress=False, **options)


def test_a_checkpoint_without_a_trained_classifier_is_refused_with_the_remedy(cells, tiny_config, tmp_path):
    pretrained = save_checkpoint(tiny_config, tmp_path / "pretrained", ScReformerForMaskedLM)
    remedy = rf"has no trained cell type classifier .*screformer finetune --checkpoint {re.escape(str(pretrained))}"
    with pytest.raises(ValueError, match=remedy):
        annotate_file(cells, pretrained, tmp_path / "out.h5ad", progress=False)
    # What counts are the weights, not what the config says of itself.
    config = json.loads((pretrained / "config.json").read_text())
    config["architectures"] = ["ScReformerForCellClassification"]
    (pretrained / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=remedy):
        annotate_file(cells, pretrained, tmp_path / "out.h5ad", progress=False)


@pytest.mark.parametrize(
    "overrides",
    [
        {"problem_type": "multi_label_classification"},
        {"id2label": {0: "cell"}, "label2id": {"cell": 0}, "num_labels": 1},
    ],
)
def test_a_model_that_does_not_choose_one_type_is_refused(cells, tiny_config, tmp_path, overrides):
    folder = save_checkpoint(tiny_config, tmp_path / "other", **overrides)
    with pytest.raises(ValueError, match="does not choose one of several cell types"):
        annotate_file(cells, folder, tmp_path / "out.h5ad", progress=False)


def test_other_checkpoints_and_none_are_refused(cells, checkpoint, tiny_config, tmp_path):
    with pytest.raises(OSError, match=r"model: .*nowhere is neither a folder with a whole checkpoint .* nor a Hub"):
        annotate_file(cells, tmp_path / "nowhere", tmp_path / "out.h5ad", progress=False)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"model: .* holds a model of type 'bert'; a 'screformer' checkpoint"):
        annotate_file(cells, tmp_path / "bert", tmp_path / "out.h5ad", progress=False)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lack \d+ parts of the model, such as screformer.encoder"):
        annotate_file(cells, checkpoint, tmp_path / "out.h5ad", progress=False)


def test_a_tokenizer_that_is_not_the_models_is_refused(cells, tiny_config, tmp_path, caplog):
    folder = save_checkpoint(tiny_config, tmp_path / "mixed", tokenizer_fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"was trained with tokenizer 000.*but the tokenizer in it is .* restore"):
        annotate_file(cells, folder, tmp_path / "out.h5ad", progress=False)
    unsaid = save_checkpoint(tiny_config, tmp_path / "unsaid", tokenizer_fingerprint=None)
    with caplog.at_level(logging.WARNING, logger="screformer"):
        annotate_file(cells, unsaid, tmp_path / "out.h5ad", progress=False)
    assert "does not say which tokenizer it was trained with" in caplog.text
    other = {"tokenizer": make_tokenizer(8), "tokenizer_fingerprint": None}
    with pytest.raises(ValueError, match=r"\(40 genes, 6 bins\), but the tokenizer in it is .* \(40 genes, 8 bins\)"):
        annotate_file(
            cells, save_checkpoint(tiny_config, tmp_path / "misfit", **other), tmp_path / "no.h5ad", progress=False
        )


def test_bad_counts_in_the_last_cell_are_found_before_the_first_prediction(checkpoint, tmp_path, monkeypatch):
    make_cells(num_cells=1100).write_h5ad(tmp_path / "cells.h5ad")
    read_blocks = CountMatrix.blocks

    def spoil_the_last_value(matrix, num_rows, **options):
        for block in read_blocks(matrix, num_rows, **options):
            block = block.astype(np.float32)
            if block.shape[0] < num_rows:
                block.data[-1] = 0.5
            yield block

    monkeypatch.setattr(CountMatrix, "blocks", spoil_the_last_value)
    monkeypatch.setattr(BatchInference, "__call__", lambda *_, **__: pytest.fail("predicted"))
    message = (
        r"cells.h5ad: counts: 1 of \d+ values are not integers, such as 0.5 in row 1099.*Found in X. .*--layer NAME"
    )
    with pytest.raises(ValueError, match=message):
        annotate_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "out.h5ad", progress=False)


def test_a_file_of_which_too_little_is_known_is_refused(checkpoint, tmp_path):
    cells = make_cells()
    cells.var_names = [*cells.var_names[:-1], "unheard_of"]  # the gene with most of the counts
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"of the counts fall on genes of the vocabulary .* at least 50.0% must"):
        annotate_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "out.h5ad", progress=False)
    cells.var_names = [f"unheard_of{number}" for number in range(NUM_GENES)]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match="none of the 40 names is in the vocabulary"):
        annotate_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "out.h5ad", progress=False)


def test_a_run_that_fails_midway_goes_on_and_harms_nothing(cells, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cell_source_module, "CELLS_PER_BLOCK", 8)
    original, measured, fails = BatchInference.__call__, [], [True]

    def fail_once(self, rows, **options):
        if len(measured) == 2 and fails:
            fails.clear()
            raise RuntimeError("out of memory")
        measured.append(len(rows))
        return original(self, rows, **options)

    expected, _ = annotate(cells, checkpoint, tmp_path / "expected.h5ad")
    monkeypatch.setattr(BatchInference, "__call__", fail_once)
    output = tmp_path / "results" / "out.h5ad"
    output.parent.mkdir()
    output.write_text("of an earlier run")
    options = {"batch_size": 4, "overwrite": True, "progress": False}
    with pytest.raises(RuntimeError, match="out of memory"):
        annotate_file(cells, checkpoint, output, **options)
    assert output.read_text() == "of an earlier run"
    assert files_in(output.parent) == ["out.h5ad", "out.h5ad.partial"]
    found, _ = annotate(cells, checkpoint, output, **options)
    assert measured == [8] * 6  # none of the 48 cells twice
    assert files_in(output.parent) == ["out.h5ad"]
    pd.testing.assert_frame_equal(found.obs, expected.obs, rtol=1e-5)


def test_blocks_of_other_options_are_not_taken(cells, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cell_source_module, "CELLS_PER_BLOCK", 8)
    original, calls = BatchInference.__call__, []

    def fail_at_last(self, rows, **options):
        calls.append(len(rows))
        if len(calls) == 6:
            raise RuntimeError("out of memory")
        return original(self, rows, **options)

    monkeypatch.setattr(BatchInference, "__call__", fail_at_last)
    options = {"batch_size": 4, "progress": False}
    with pytest.raises(RuntimeError, match="out of memory"):
        annotate_file(cells, checkpoint, tmp_path / "out.h5ad", gene_space="expressed", **options)
    annotate_file(cells, checkpoint, tmp_path / "out.h5ad", gene_space="full", **options)
    assert len(calls) == 12


def test_a_folder_of_that_name_that_holds_something_else_is_left_alone(cells, checkpoint, tmp_path):
    mine = tmp_path / "out.h5ad.partial" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"output: the folder .*out.h5ad.partial.* holds something else; move it away"):
        annotate_file(cells, checkpoint, tmp_path / "out.h5ad", progress=False)
    assert mine.read_text() == "mine"


def test_a_model_that_gives_no_numbers_is_refused(cells, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        BatchInference, "__call__", lambda self, rows, **_: np.full((len(rows), self.width), np.inf, np.float32)
    )
    with pytest.raises(ValueError, match=r"model: its output for 48 cells is NaN or infinite, the first is row 0"):
        annotate_file(cells, checkpoint, tmp_path / "out.h5ad", progress=False)
    assert not (tmp_path / "out.h5ad").exists()


def test_progress_is_shown_when_asked_for(cells, checkpoint, tmp_path, capsys):
    annotate(cells, checkpoint, tmp_path / "quiet.h5ad")
    assert "annotate" not in capsys.readouterr().err
    annotate(cells, checkpoint, tmp_path / "shown.h5ad", progress=True)
    assert "annotate: 100%" in capsys.readouterr().err
