import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from small_corpus import GENES, NUM_GENES, make_tokenizer
from typer.testing import CliRunner

from screformer.benchmarks import gene_interactions, pair_classifier
from screformer.benchmarks.gene_interaction_figures import format_gene_interactions, plot_gene_interactions
from screformer.benchmarks.gene_interactions import (
    BOTH,
    FREQUENCY,
    NAME,
    OWN,
    RANDOM,
    benchmark_gene_interactions,
    component_features,
    expression_features,
    main,
)
from screformer.cli import app
from screformer.tokenization.corpus import build_corpus
from screformer.tokenization.gene2vec import GeneVectors, save_gene_vectors
from screformer.tokenization.gene_pairs import cell_groups, measure_genes

NUM_BLOCKS = 3  # genes of a block rise and fall together: 0, 3, 6 ... and 1, 4, 7 ... and 2, 5, 8 ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus whose co-expressed genes interact, and the pairs; genes 0-20 train, 21-29 valid, 30-38 test."""
    pytest.importorskip("gensim")
    folder, generator = tmp_path_factory.mktemp("genes"), np.random.default_rng(0)
    rates = 3 * generator.gamma(0.7, 2, size=(200, NUM_BLOCKS))[:, np.arange(NUM_GENES) % NUM_BLOCKS]
    rates[:, -1] = 5000
    obs = pd.DataFrame(index=[f"cell{number}" for number in range(200)])
    counts = sparse.csr_matrix(generator.poisson(rates).astype(np.int32))
    anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES)).write_h5ad(folder / "cells.h5ad")
    build_corpus(folder / "cells.h5ad", folder / "corpus", tokenizer=make_tokenizer(12))
    rows = [
        f"{GENES[first]}\t{GENES[second]}\t{int(first % NUM_BLOCKS == second % NUM_BLOCKS)}\t{split}"
        for split, start, stop in (("train", 0, 21), ("valid", 21, 30), ("test", 30, 39))
        for first in range(start, stop)
        for second in range(start, first)
    ]
    (folder / "pairs.tsv").write_text("\n".join(["gene_a\tgene_b\tlabel\tsplit", *rows]))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_classifier, "MAX_STEPS", 120)
        patch.setattr(pair_classifier, "BATCH_SIZE", 64)
        given = GeneVectors(GENES, np.random.default_rng(1).normal(size=(NUM_GENES, 4)).astype(np.float32))
        save_gene_vectors(given, folder / "given.npy")
        arguments = ["--pairs", folder / "pairs.tsv", "--corpus", folder / "corpus", "--output", folder / "out"]
        options = ["--neighbors", "5", "20", "--dimensions", "8", "--epochs", "60", "--seeds", "1", "2"]
        main([*map(str, arguments), *options, "--vectors", f"given={folder / 'given.npy'}"])
    return json.loads((folder / "out" / f"{NAME}.json").read_text())


def test_planted_interactions_are_known_to_our_vectors_alone(results):
    test = {row["contestant"]: row["test"] for row in results["contestants"]}
    assert test[OWN] > 0.9
    assert test[BOTH] > 0.8
    assert max(test[RANDOM], test["given"]) < 0.8
    assert results["cosine_alone"] > 0.9


def test_the_file_says_what_was_measured(results):
    assert len(results["contestants"]) == 7
    for row in results["contestants"]:
        assert len(row["scores"]) == 2
        assert row["test"] == pytest.approx(np.mean([score["test"] for score in row["scores"]]), abs=1e-4)
    best = max(results["selection"], key=lambda row: row["valid"])
    assert results["chosen"]["num_neighbors"] == best["num_neighbors"]
    assert results["pairs"]["test"] == {
        "num_read": 36, "num_used": 36, "share_positive_read": 0.25, "share_positive_used": 0.25,
    }  # fmt: skip
    assert results["cells"][0]["num_cells"] == 200
    assert results["published"]["auc"] == 0.720


def test_table_and_figure_are_drawn_from_the_file(results, folder, tmp_path):
    text = (folder / "out" / f"{NAME}.md").read_text()
    assert text == format_gene_interactions(results)
    for row in results["contestants"]:
        assert f"| {row['contestant']}" in text
    assert "Published: 0.720" in text
    one_seed = {**results, "contestants": [{**row, "test_spread": None} for row in results["contestants"]]}
    plot_gene_interactions(one_seed, tmp_path / "figure.png")
    for path in (tmp_path / "figure.png", folder / "out" / f"{NAME}.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_features_of_the_cells_are_what_they_say(folder):
    corpus = gene_interactions.open_corpus(folder / "corpus")
    groups = cell_groups(corpus)
    moments = [measure_genes(corpus, groups[0], NUM_GENES)]
    expressed = expression_features(moments)
    np.testing.assert_allclose(np.exp(expressed[:, 0]), (moments[0].num_expressing + 0.5) / 201, rtol=1e-5)
    np.testing.assert_allclose(expressed[:, 1], moments[0].means, rtol=1e-5)
    components = component_features(corpus, groups, moments)
    assert components.shape == (NUM_GENES, 25)
    # Three blocks: three components hold what genes share, and genes of a block are alike in them.
    similarity = np.corrcoef(components[:-1, :3])
    is_same = np.equal.outer(np.arange(NUM_GENES - 1) % NUM_BLOCKS, np.arange(NUM_GENES - 1) % NUM_BLOCKS)
    assert similarity[is_same].min() > similarity[~is_same].max()


@pytest.mark.parametrize("name", ["neighbors", "dimensions", "seeds"])
@pytest.mark.parametrize("values", [[], [0]])
def test_lists_of_positive_numbers_are_needed(folder, tmp_path, name, values):
    with pytest.raises(ValueError, match=f"{name}: one or more positive numbers are needed, got"):
        benchmark_gene_interactions(tmp_path, pairs=folder / "pairs.tsv", corpus=folder / "corpus", **{name: values})


def test_mistakes_on_the_command_line_are_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--pairs", "p", "--corpus", "c", "--vectors", "released.txt"])
    assert stop.value.code == 2
    assert "NAME=FILE is needed, got ['released.txt']" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: folder: .* is not a corpus"):
        main(["--pairs", "p", "--corpus", str(tmp_path)])


def test_the_command_line_of_the_package_has_it():
    result = CliRunner().invoke(app, ["benchmark", "genes", "--help"])
    assert result.exit_code == 0
    assert "example: python -m screformer.benchmarks.gene_interactions" in " ".join(result.output.split())


def test_frequency_is_among_the_contestants(results):
    assert FREQUENCY in {row["contestant"] for row in results["contestants"]}
