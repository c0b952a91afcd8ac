"""Attention between genes: the model's own probabilities, summed by gene and cell type."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from small_corpus import GENES, NUM_GENES, make_cells, make_tokenizer
from test_annotate import save_checkpoint
from typer.testing import CliRunner

from screformer import ScReformerModel
from screformer.annotation import annotate, find_gene_interactions, interactions_file, load_encoder
from screformer.annotation import attention_weights as weights_module
from screformer.annotation.interaction_files import strongest_genes
from screformer.cli import app
from screformer.lsh_attention import exact_attention, lsh_attention

EVERYTHING = {"label_column": "cell_type", "min_mass": 0, "progress": False}


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """Return a function: overrides of the configuration -> folder of an encoder."""
    return lambda **overrides: save_checkpoint(tiny_config, tmp_path / "model", ScReformerModel, **overrides)


def dense_attention(module, query_key):
    """Attention (H, L, L) of one cell, as what the model's plain form makes of the columns of an identity matrix."""
    _, heads, length, width = query_key.shape
    columns = []
    for start in range(0, length, width):
        value = torch.zeros(length, width)
        stop = min(start + width, length)
        value[range(start, stop), range(stop - start)] = 1
        value = value.expand(1, heads, -1, -1)
        if module.is_exact:
            attended = exact_attention(query_key, value)
        else:
            options = {"bucket_size": module.bucket_size, "hashing": module.hashing, "implementation": "reference"}
            attended = lsh_attention(query_key, value, module.rotations, **options)
        columns.append(attended[0, :, :, : stop - start])
    return torch.cat(columns, dim=-1)


@torch.no_grad()
def slow_attention_of_cell(model, cell, gene_space, layers):
    """Mean over heads and layers of one cell's attention, (genes, genes); the cell is alone in its batch."""
    batch = make_tokenizer()(cell, gene_space=gene_space, return_tensors="pt")
    seen = []
    modules = [model.encoder.layers[layer].attention for layer in layers]
    handles = [
        module.register_forward_pre_hook(lambda module, given: seen.append((module, given[0]))) for module in modules
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    genes = batch["gene_ids"][0] if gene_space == "expressed" else torch.arange(NUM_GENES)
    total = np.zeros((NUM_GENES, NUM_GENES))
    for module, query_key in seen:
        total[np.ix_(genes, genes)] += dense_attention(module, query_key).mean(dim=0).numpy() / len(layers)
    return total


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
@pytest.mark.parametrize("shape", [{"num_hashes": 1}, {"num_hashes": 4}, {"attention": "exact"}])
def test_sums_are_those_of_the_models_own_attention(checkpoint, gene_space, shape):
    folder, cells = checkpoint(**shape), make_cells(11)
    found = find_gene_interactions(cells, folder, gene_space=gene_space, batch_size=4, **EVERYTHING)
    model = ScReformerModel.from_pretrained(folder).eval()
    assert found.genes.tolist() == list(range(NUM_GENES))
    assert [one.name for one in found.types] == ["alpha", "beta"]
    has_gene = cells.X.toarray() > 0
    for one in found.types:
        of_type = np.flatnonzero(cells.obs["cell_type"] == one.name)
        slow = np.stack([slow_attention_of_cell(model, cells[cell], gene_space, [0, 1]) for cell in of_type])
        both = has_gene[of_type, :, None] & has_gene[of_type, None, :]
        assert one.num_cells == len(of_type)
        np.testing.assert_array_equal(one.cells_with_both.toarray(), both.sum(axis=0))
        np.testing.assert_allclose(one.attention.toarray(), slow.mean(axis=0), atol=1e-6)
        expected = (slow * both).sum(axis=0) / np.maximum(both.sum(axis=0), 1)
        np.testing.assert_allclose(one.attention_given_both.toarray(), expected, atol=1e-6)
        # Every token's attention is a probability: a gene's row sums to the share of cells in which it is a token.
        shares = 1.0 if gene_space == "full" else has_gene[of_type].mean(axis=0)
        np.testing.assert_allclose(
            np.asarray(one.attention.sum(axis=1)).ravel(), np.broadcast_to(shares, NUM_GENES), atol=1e-5
        )


@pytest.mark.parametrize("attention", ["lsh", "exact"])
def test_tiles_and_batches_change_nothing(checkpoint, monkeypatch, attention):
    folder = checkpoint(attention=attention)
    expected = find_gene_interactions(make_cells(6), folder, batch_size=6, **EVERYTHING)
    monkeypatch.setattr(weights_module, "MOST_SCORES", 200)
    monkeypatch.setattr(weights_module, "MOST_SUMS", 70)
    found = find_gene_interactions(make_cells(6), folder, batch_size=1, **EVERYTHING)
    for one, other in zip(found.types, expected.types, strict=True):
        np.testing.assert_allclose(one.attention.toarray(), other.attention.toarray(), atol=1e-6)


def test_a_layer_by_itself_and_the_mean_of_all(checkpoint):
    folder, cells = checkpoint(), make_cells(4)
    parts = [find_gene_interactions(cells, folder, attention_layers=one, **EVERYTHING) for one in ([0], [1], None)]
    first, second, mean = (one.types[0].attention.toarray() for one in parts)
    genes = parts[0].genes
    assert not np.allclose(first, second, atol=1e-3)
    np.testing.assert_allclose(mean, (first + second) / 2, atol=1e-6)
    model = ScReformerModel.from_pretrained(folder).eval()
    slow = [slow_attention_of_cell(model, cells[cell], model.config.gene_space, [1]) for cell in (0, 2)]
    np.testing.assert_allclose(second, np.mean(slow, axis=0)[np.ix_(genes, genes)], atol=1e-6)


def test_only_pairs_of_the_genes_asked_for_unchanged_by_that(checkpoint):
    folder, cells = checkpoint(), make_cells(8)
    every = find_gene_interactions(cells, folder, gene_space="expressed", **EVERYTHING)
    some = find_gene_interactions(
        cells, folder, gene_space="expressed", genes=["GENE30", GENES[3], "GENE7"], **EVERYTHING
    )
    assert some.symbols == ["GENE3", "GENE7", "GENE30"]
    for one, other in zip(some.types, every.types, strict=True):
        assert one.attention.shape == (3, 3)
        for few, all_of_it in zip(one[2:], other[2:], strict=True):
            np.testing.assert_allclose(few.toarray(), all_of_it.toarray()[np.ix_([3, 7, 30], [3, 7, 30])], atol=1e-9)


def test_the_most_often_expressed_genes_are_chosen(checkpoint):
    cells = make_cells(30)
    found = find_gene_interactions(cells, checkpoint(), max_genes=5, **EVERYTHING)
    num_expressing = (cells.X.toarray() > 0).sum(axis=0)
    assert num_expressing[found.genes].min() >= np.sort(num_expressing)[-5]
    assert len(found.genes) == 5


def test_pruning_keeps_the_largest_as_they_were(checkpoint):
    folder, cells = checkpoint(), make_cells(8)
    every = find_gene_interactions(cells, folder, **EVERYTHING)
    pruned = find_gene_interactions(cells, folder, **{**EVERYTHING, "min_mass": 0.03})
    for one, other in zip(pruned.types, every.types, strict=True):
        before = other.attention.toarray()
        assert 0 < one.attention.nnz < other.attention.nnz
        np.testing.assert_array_equal(one.attention.toarray(), np.where(before >= 0.03, before, 0))
        assert (one.attention_given_both.toarray()[before < 0.03] == 0).all()
        table = pruned.table(one)
        assert table["mean_attention"].is_monotonic_decreasing
        assert len(table) == one.attention.nnz
        assert table["mean_attention"].iloc[0] == np.float32(before.max())


def test_a_planted_pair_is_found(checkpoint):
    """Two genes share one identity vector, long and unlike all others: they must attend to each other."""
    trained = load_encoder(checkpoint(attention="exact"), device="cpu")
    weight = trained.model.embeddings.gene_embeddings.weight
    with torch.no_grad():
        trained.model.embeddings.positions.zero_()
        weight[10] = weight[25] = torch.linspace(-40, 40, 16).roll(5)
        for layer in trained.model.encoder.layers:
            layer.attention.query_key.weight.copy_(4 * torch.eye(16))
    found = find_gene_interactions(make_cells(12), trained, gene_space="full", **EVERYTHING)
    for one in found.types:
        top = found.table(one).head(2)
        assert {*zip(top["query_symbol"], top["key_symbol"], strict=True)} == {
            ("GENE10", "GENE25"),
            ("GENE25", "GENE10"),
        }


def test_types_are_the_models_own_where_no_column_is_named(tiny_config, tmp_path):
    classifier, cells = save_checkpoint(tiny_config, tmp_path / "classifier"), make_cells(24)
    found = find_gene_interactions(cells, classifier, min_mass=0, progress=False)
    annotate(cells, classifier, progress=False)
    assert len(found.types) > 1
    named = find_gene_interactions(cells, classifier, **{**EVERYTHING, "label_column": "screformer_cell_type"})
    for one, other in zip(found.types, named.types, strict=True):
        assert (one.name, one.num_cells) == (other.name, other.num_cells)
        np.testing.assert_allclose(one.attention.toarray(), other.attention.toarray(), atol=1e-9)


def test_cells_without_label_or_counts_are_left_out_and_types_can_be_drawn(checkpoint, caplog):
    folder, cells = checkpoint(), make_cells(20)
    expected = find_gene_interactions(cells[2:], folder, **EVERYTHING)
    cells.obs.loc["cell0", "cell_type"] = np.nan
    counts = cells.X.tolil()
    counts[1] = 0
    cells.X = counts.tocsr()
    found = find_gene_interactions(cells, folder, **EVERYTHING)
    assert "1 of 20 cells have no label" in caplog.text
    for one, other in zip(found.types, expected.types, strict=True):
        assert one.num_cells == 9
        np.testing.assert_allclose(one.attention.toarray(), other.attention.toarray(), atol=1e-6)
    few = [find_gene_interactions(cells, folder, max_cells=3, **EVERYTHING) for _ in range(2)]
    assert [one.num_cells for one in few[0].types] == [3, 3]
    assert (few[0].types[0].attention != few[1].types[0].attention).nnz == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": ["GENE1", "NOGENE"]}, r"genes: the model does not know NOGENE \(1 of 2\)"),
        ({"genes": ["GENE1", GENES[1]]}, "genes: at least two are needed for a pair"),
        ({"genes": "GENE1"}, "genes: a list of names is needed, got the text 'GENE1'"),
        ({"max_genes": 1}, "max_genes got 1; at least 2"),
        ({"min_mass": 1.0}, "min_mass got 1; it must be at least 0 and below 1"),
        ({"max_cells": 0}, "max_cells got 0; it must be at least 1"),
        ({"attention_layers": [2]}, r"attention_layers got \[2\]; the model has the layers 0 to 1"),
        ({"attention_layers": []}, r"attention_layers got \[\]"),
        ({"label_column": "kind"}, "obs column 'kind' is not in"),
        ({"label_column": None}, "name a column of obs, or give a fine-tuned classifier"),
        ({"label_column": "empty"}, "label_column='empty': no cell has a label"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(checkpoint, options, message):
    cells = make_cells(4)
    cells.obs["empty"] = pd.Series([None] * 4, index=cells.obs_names, dtype=object)
    with pytest.raises(ValueError, match=message):
        find_gene_interactions(cells, load_encoder(checkpoint()), **{**EVERYTHING, **options})


def test_a_damaged_model_is_refused(checkpoint):
    trained = load_encoder(checkpoint())
    with torch.no_grad():
        trained.model.encoder.layers[1].attention.query_key.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model: its attention in layer 1 is NaN or infinite"):
        find_gene_interactions(make_cells(4), trained, **EVERYTHING)
    assert not trained.model.encoder.layers[0].attention._forward_hooks


def test_the_command_writes_table_record_and_figure(checkpoint, tmp_path):
    make_cells(16).write_h5ad(tmp_path / "cells.h5ad")
    given = ["interactions", str(tmp_path / "cells.h5ad"), "--model", str(checkpoint()), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(
        app, [*given, "--label-column", "cell_type", "--max-genes", "20", "--min-mass", "0.001"]
    )
    assert result.exit_code == 0, result.output
    assert "alpha: 8 cells, " in result.output
    table = pd.read_parquet(tmp_path / "out" / "interactions.parquet")
    record = json.loads((tmp_path / "out" / "interactions.json").read_text())
    assert record["settings"]["num_genes"] == 20
    assert record["model"]["tokenizer_fingerprint"] == make_tokenizer().fingerprint
    assert {"date", "versions", "input"} <= set(record)
    found = find_gene_interactions(make_cells(16), checkpoint(), **{**EVERYTHING, "max_genes": 20, "min_mass": 0.001})
    expected = pd.concat([found.table(one) for one in found.types], ignore_index=True)
    pd.testing.assert_frame_equal(table, expected, check_categorical=False)
    for row in record["types"]:
        own = table[table["cell_type"] == row["cell_type"]]
        assert row["num_pairs"] == len(own)
        assert row["top_pairs"][0]["query_symbol"] == own["query_symbol"].iloc[0]
    assert (tmp_path / "out" / "interactions.png").read_bytes().startswith(b"\x89PNG")
    again = CliRunner().invoke(app, [*given, "--label-column", "cell_type"])
    assert again.exit_code == 1
    assert "has interactions.parquet, interactions.json, interactions.png; choose another folder" in again.output


def test_a_mistake_leaves_nothing(checkpoint, tmp_path):
    make_cells(4).write_h5ad(tmp_path / "cells.h5ad")
    given = ["interactions", str(tmp_path / "cells.h5ad"), "--model", str(checkpoint()), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*given, "--gene", "GENE1", "--gene", "NOGENE", "--label-column", "cell_type"])
    assert result.exit_code == 1
    assert "error: genes: the model does not know NOGENE" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_the_figure_shows_genes_that_many_cells_express(checkpoint, tmp_path):
    cells = make_cells(10)
    counts = cells.X.toarray()
    counts[:, 20] = 0
    counts[0, 20] = 5
    cells.X = sparse.csr_matrix(counts)
    one = find_gene_interactions(cells, checkpoint(), gene_space="full", **EVERYTHING).types[0]
    genes = strongest_genes(one)
    assert len(genes) == 30
    assert 20 not in genes
    mass = np.asarray(one.attention.sum(axis=0)).ravel() + np.asarray(one.attention.sum(axis=1)).ravel()
    assert (np.diff(mass[genes]) <= 1e-12).all()
    summary = interactions_file(make_file(cells, tmp_path), checkpoint(), tmp_path / "out", **EVERYTHING)
    assert str(summary).startswith("alpha: 5 cells, ")


def make_file(cells, folder):
    cells.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"
