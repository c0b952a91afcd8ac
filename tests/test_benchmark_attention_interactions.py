"""Attention between genes judged by labelled pairs, beside co-expression and frequency."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score
from small_corpus import GENES, NUM_GENES
from test_annotate import save_checkpoint
from typer.testing import CliRunner

from screformer import ScReformerModel
from screformer.annotation import find_gene_interactions
from screformer.benchmarks.attention_interaction_figures import format_attention_interactions
from screformer.benchmarks.attention_interactions import NAME, main
from screformer.benchmarks.attention_pair_scores import (
    ADJUSTED,
    ATTENTION,
    BOTH,
    COEXPRESSION,
    FREQUENCY,
    OF_ATTENTION,
    RATIO,
    UNTRAINED,
    PairSums,
    correlations_of_pairs,
    judge_scores,
    scores_of_attention,
)
from screformer.benchmarks.ranking_areas import areas_with_intervals
from screformer.cli import app

NUM_BLOCKS, NUM_TEST = 3, 30  # genes of a block rise and fall together; genes 0 to 29 are of the test pairs


def make_cells(num_cells=60):
    generator = np.random.default_rng(0)
    rates = 3 * generator.gamma(0.7, 2, size=(num_cells, NUM_BLOCKS))[:, np.arange(NUM_GENES) % NUM_BLOCKS]
    rates[:, -1] = 5000
    obs = pd.DataFrame({"cell_type": "any"}, index=[f"cell{number}" for number in range(num_cells)])
    counts = sparse.csr_matrix(generator.poisson(rates).astype(np.int32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))


def write_pairs(path, is_interaction):
    """Write all test pairs, and a few of the other splits, which the benchmark does not look at."""
    rows = ["gene_a\tgene_b\tlabel\tsplit"]
    for split, start in (("train", 30), ("valid", 34)):
        rows += [f"{GENES[start]}\t{GENES[start + 1 + label]}\t{label}\t{split}" for label in (0, 1)]
    for first in range(NUM_TEST):
        rows += [
            f"{GENES[first]}\t{GENES[second]}\t{int(is_interaction(first, second))}\ttest" for second in range(first)
        ]
    path.write_text("\n".join(rows))
    return str(path)


@pytest.fixture
def folder(tiny_config, tmp_path):
    """A random model, which knows nothing, and cells."""
    save_checkpoint(tiny_config, tmp_path / "model", ScReformerModel, gene_space="expressed")
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path


def run(folder, pairs, *extra):
    given = [
        "--model",
        folder / "model",
        "--cells",
        folder / "cells.h5ad",
        "--pairs",
        pairs,
        "--output",
        folder / "out",
    ]
    main([*map(str, given), *extra])
    return json.loads((folder / "out" / f"{NAME}.json").read_text())


def outcomes(results, score=ATTENTION):
    return {row["rival"]: row["outcome"] for row in results["differences"] if row["score"] == score}


def test_attention_that_is_noise_loses_to_coexpression(folder, capsys):
    results = run(folder, write_pairs(folder / "pairs.tsv", lambda a, b: a % NUM_BLOCKS == b % NUM_BLOCKS))
    areas = {row["score"]: row["area"] for row in results["scores"]}
    assert areas[COEXPRESSION] > 0.95
    assert all(outcomes(results, score)[COEXPRESSION] == "loss" for score in (BOTH, RATIO, ADJUSTED))
    assert outcomes(results)[COEXPRESSION] == "loss"
    assert results["verdict"].startswith("Attention loses: area ")
    assert f"**{results['verdict']}**" in capsys.readouterr().out


def test_attention_that_knows_the_pairs_wins(folder):
    found = find_gene_interactions(
        make_cells(), folder / "model", label_column="cell_type", min_mass=0, progress=False, genes=GENES[:NUM_TEST]
    )
    mass = found.types[0].attention.toarray()
    mass = mass + mass.T
    threshold = np.quantile(mass[np.triu_indices(NUM_TEST, 1)], 0.75)
    results = run(folder, write_pairs(folder / "pairs.tsv", lambda a, b: mass[a, b] > threshold))
    assert next(row["area"] for row in results["scores"] if row["score"] == ATTENTION) == 1
    assert set(outcomes(results).values()) == {"win"}
    assert results["verdict"].startswith("Attention wins: area 1.000; a win against gene frequency (+")


def test_the_files_say_what_was_measured(folder):
    pairs = write_pairs(folder / "pairs.tsv", lambda a, b: (a + b) % 2)
    results = run(folder, pairs, "--max-cells", "40", "--attention-layers", "1", "--gene-space", "full")
    assert {row["score"] for row in results["scores"]} == {
        FREQUENCY, COEXPRESSION, *OF_ATTENTION, *(f"{UNTRAINED}{score}" for score in OF_ATTENTION)
    }  # fmt: skip
    assert len(results["differences"]) == 3 * len(OF_ATTENTION)
    assert results["cells"] == {"file": "cells.h5ad", "num_cells": 40, "seed": 2022}
    assert results["pairs"]["num_read"] == results["pairs"]["num_used"] == 435
    assert (results["attention_layers"], results["gene_space"]) == ([1], "full")
    assert {"date", "versions", "device", "command"} <= set(results)
    assert str(folder) not in json.dumps(results)
    assert (folder / "out" / f"{NAME}.md").read_text() == format_attention_interactions(results)
    assert (folder / "out" / f"{NAME}.png").read_bytes().startswith(b"\x89PNG")


def test_the_untrained_control_is_another_model_of_the_same_shape(folder):
    results = run(folder, write_pairs(folder / "pairs.tsv", lambda a, b: a % 2))
    areas = {row["score"]: row["area"] for row in results["scores"]}
    assert areas[BOTH] != areas[f"{UNTRAINED}{BOTH}"]


def test_frequency_and_marginals_are_taken_out():
    """Attention in proportion to the product of frequencies says nothing once these are known."""
    generator = np.random.default_rng(0)
    rates = generator.uniform(0.1, 0.9, size=(400, 2))
    product = rates.prod(axis=1)
    chosen = np.where(np.arange(400) % 4 == 0, 2.0, 1.0)  # every fourth pair is attended to twice as much
    scores = scores_of_attention(PairSums(7 * product * chosen, 3 * product, product), rates)
    labels = chosen == 2
    assert roc_auc_score(labels, scores[ATTENTION]) < 0.85
    assert roc_auc_score(labels, scores[ADJUSTED]) == 1
    assert roc_auc_score(labels, scores[RATIO]) == 1
    assert abs(np.corrcoef(scores[ADJUSTED], np.log(product))[0, 1]) < 1e-6


def test_areas_are_those_of_scikit_learn_and_intervals_hold_them():
    generator = np.random.default_rng(1)
    labels = generator.random(300) < 0.3
    scores = np.stack([labels + generator.normal(size=300), generator.integers(0, 4, 300), np.zeros(300)])
    found = areas_with_intervals(scores, labels, seed=3)
    np.testing.assert_allclose(found.areas, [roc_auc_score(labels, one) for one in scores])
    low, high = found.interval(0)
    assert low < found.areas[0] < high
    # Hanley and McNeil (1982): the standard error of such an area is about .03.
    assert found.drawn[0].std() == pytest.approx(0.03, abs=0.01)
    assert found.interval(2) == [0.5, 0.5]


def test_a_difference_that_may_be_chance_is_a_tie():
    generator = np.random.default_rng(0)
    labels = (np.arange(200) % 2).astype(np.float32)
    names = [FREQUENCY, COEXPRESSION, *OF_ATTENTION, *(f"{UNTRAINED}{score}" for score in OF_ATTENTION)]
    results = judge_scores({name: generator.normal(size=200) + labels for name in names}, labels)
    assert set(outcomes(results).values()) == {"tie"}
    assert results["verdict"].startswith("Attention ties: area ")


def test_correlations_are_those_of_the_bins():
    bins = np.random.default_rng(0).poisson(1.0, size=(50, 6)).astype(np.float32)
    bins[:, 5] = 0
    pairs = np.array([[0, 1], [4, 2], [3, 5]])
    expected = np.corrcoef(bins[:, :5].T)
    found = correlations_of_pairs(sparse.csr_matrix(bins), pairs)
    np.testing.assert_allclose(found, [expected[0, 1], expected[4, 2], 0], atol=1e-6)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--max-cells", "2"], "max_cells got 2; at least 5 are needed"),
        (["--max-genes", "1"], "max_genes got 1; at least 2 are needed"),
        (["--max-genes", "2"], "pairs: of 435 test pairs between known genes 1 are of genes that at least"),
        (["--attention-layers", "7"], r"attention_layers got \[7\]"),
    ],
)
def test_bad_options_are_one_message(folder, extra, message):
    pairs = write_pairs(folder / "pairs.tsv", lambda a, b: a % 2)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run(folder, pairs, *extra)
    assert not (folder / "out").exists()


def test_the_command_line_of_the_package_has_it():
    result = CliRunner().invoke(app, ["benchmark", "attention-interactions", "--help"])
    assert result.exit_code == 0
    assert "example: screformer benchmark attention-interactions" in " ".join(result.output.split())
