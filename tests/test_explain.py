"""`screformer explain`: planted genes are found, checks say what is true, a run that is killed goes on."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_corpus import GENES, make_cells, make_tokenizer
from typer.testing import CliRunner

from screformer.annotation import explained_cells, explanation_run
from screformer.annotation.attributions import Sampling
from screformer.annotation.class_explanation import ExplainOptions
from screformer.annotation.explain import explain_file
from screformer.annotation.explained_cells import SomeCells
from screformer.annotation.explained_score import ClassScore
from screformer.annotation.explanation_checks import (
    completeness,
    deletion_and_insertion,
    marker_overlap,
    read_marker_genes,
    regression_weights,
    stability,
)
from screformer.annotation.explanation_figures import plot_beeswarm, plot_class_heat_map
from screformer.annotation.explanation_page import asked_sentence, check_sentences
from screformer.annotation.explanation_run import Checks, Explainer, activations_kept, estimate, workers_of
from screformer.annotation.explanation_tables import gene_table
from screformer.annotation.trained_model import TrainedModel
from screformer.cli import app
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.train.inference import BatchInference

LABELS = ["alpha", "beta"]
NUM_GENES = len(GENES)
RAISES, LOWERS = 2, 8  # alpha expresses genes 0 to 5, beta 6 to 11
CHECKS = Checks(completeness=4, stability=6, curves=4)


@pytest.fixture
def trained(tiny_config):
    """Return a classifier to which one gene speaks for alpha and one against it."""
    tokenizer = make_tokenizer()
    tokenizer.on_empty_cells = "keep"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ScReformerForCellClassification(
            tiny_config(
                num_genes=NUM_GENES,
                num_hidden_layers=1,
                num_hashes=1,
                num_labels=2,
                gene_space="full",
                classifier_paths=["convolution", "linear"],
                tokenizer_fingerprint=tokenizer.fingerprint,
                id2label=dict(enumerate(LABELS)),
                label2id={label: index for index, label in enumerate(LABELS)},
            )
        )
    model.classifier.silence_deep_paths()
    weight = torch.zeros(2, NUM_GENES)
    weight[0, RAISES], weight[0, LOWERS] = 6.0, -3.0
    model.start_linear_path(weight, torch.zeros(2))
    return TrainedModel(model.eval().requires_grad_(False), tokenizer, "planted")


@pytest.fixture
def cells(tmp_path):
    adata = make_cells(40)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def options(*classes, **given):
    defaults = {"num_cells": 12, "num_background": 20, "checks": CHECKS, "sampling": Sampling(num_points=4)}
    return ExplainOptions(classes or ("alpha",), **defaults | given)


def explained(trained, cells, output, *classes, label_column="cell_type", overwrite=False, background=None, **given):
    return explain_file(
        cells,
        trained,
        output,
        options(*classes, **given),
        label_column=label_column,
        overwrite=overwrite,
        background=background,
        progress=False,
    )


def test_planted_genes_are_found_and_everything_is_written(trained, cells, tmp_path):
    markers = tmp_path / "markers.txt"
    markers.write_text(f"GENE{RAISES}\nGENE{LOWERS}\nGENE30\n")
    found = explained(
        trained, cells, tmp_path / "out", "alpha", "beta", genes=[GENES[RAISES], "GENE30"], markers=markers
    )
    alpha, beta = found.results["classes"]
    assert (alpha["class"], alpha["num_cells"], beta["class"]) == ("alpha", 12, "beta")
    table = found.tables["alpha"]
    assert table["gene"].tolist() == [f"GENE{RAISES}", f"GENE{LOWERS}"]  # no other gene has a value
    assert table["sign"].tolist() == [1, -1]
    assert table["mean_value"].iloc[0] > 0
    asked, without = alpha["genes_asked"]
    assert (asked["gene"], asked["place"], asked["share_expressed"]) == (f"GENE{RAISES}", 1, 1.0)
    assert asked["background_share_expressed"] < 1
    assert 0 < asked["regression_place"] < 10
    assert without == {"gene": "GENE30", "place": None}
    assert alpha["completeness"]["median_gap"] < 1e-3
    assert alpha["markers"]["hits"] == 2
    assert alpha["markers"]["num_markers"] == 3

    names = {path.name for path in (tmp_path / "out").iterdir()}
    of_classes = {f"{figure}-{name}.png" for figure in ("beeswarm", "curves", "genes") for name in LABELS}
    pages = {f"explanation.{ending}" for ending in ("h5ad", "html", "json", "md")}
    assert names == {"classes.png", "genes.parquet", *of_classes, *pages}
    for name in names:
        if name.endswith(".png"):
            with Image.open(tmp_path / "out" / name) as image:
                assert min(image.size) > 150
    assert json.loads((tmp_path / "out" / "explanation.json").read_text()) == found.results
    stored = pd.read_parquet(tmp_path / "out" / "genes.parquet")
    assert stored.query("`class` == 'alpha' and rank == 1")["gene"].tolist() == [f"GENE{RAISES}"]
    adata = anndata.read_h5ad(tmp_path / "out" / "explanation.h5ad")
    assert adata.shape == (24, NUM_GENES)
    assert set(adata.obs["explained_class"]) == {"alpha", "beta"}
    of_alpha = adata[adata.obs["explained_class"] == "alpha"]
    np.testing.assert_allclose(
        np.abs(of_alpha.layers["values"].toarray()).mean(axis=0), adata.varm["mean_abs_value"]["alpha"], rtol=1e-5
    )
    text = (tmp_path / "out" / "explanation.md").read_text()
    for words in (
        "It adds up", "It stays the same", "Genes taken away", "Known markers: 2 of the 2 genes",
        f"Among the 20 genes that count most are 1 of the 2 that were asked for: GENE{RAISES}; high expression raises "
        "the score. The others: GENE30, in none of these cells.", ", `explain_file`, screformer",
    ):  # fmt: skip
        assert words in text
    html = (tmp_path / "out" / "explanation.html").read_text()
    assert html.count("data:image/png;base64,") == 7
    assert "http://" not in html
    assert str(found).startswith(f"alpha, 12 cells: GENE{RAISES}, GENE{LOWERS} (-)")


def test_values_of_a_linear_model_are_weight_times_difference(trained, cells, tmp_path):
    explained(trained, cells, tmp_path / "out")
    adata = anndata.read_h5ad(tmp_path / "out" / "explanation.h5ad")
    values, bins = adata.layers["values"].toarray(), adata.X.toarray()
    # A straight line over the cells, by the weight over the highest bin.
    slope = np.polyfit(bins[:, RAISES], values[:, RAISES], 1)[0]
    assert slope == pytest.approx(6.0 / 5, rel=1e-3)


def test_classes_whose_names_differ_in_signs_alone_have_figures_of_their_own(trained, cells, tmp_path):
    few = {"num_cells": 4, "checks": Checks(completeness=2, stability=3, curves=2)}
    explained(trained, cells, tmp_path / "out", "a:b=alpha", "A b=beta", "beta", **few)
    names = {path.name for path in (tmp_path / "out").glob("beeswarm-*.png")}
    assert names == {"beeswarm-1-a_b.png", "beeswarm-2-A_b.png", "beeswarm-beta.png"}
    page = (tmp_path / "out" / "explanation.md").read_text()
    assert all(name in page for name in names)


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_without_labels_the_model_says_which_cells_are_of_the_class(trained, cells, tmp_path, gene_space):
    found = explained(trained, cells, tmp_path / "out", label_column=None, gene_space=gene_space)
    adata = anndata.read_h5ad(tmp_path / "out" / "explanation.h5ad")
    assert set(adata.obs["label"]) == {"alpha"}
    # Those whose gene that speaks for alpha outweighs the other.
    level = adata.X.toarray()
    assert (6 * level[:, RAISES] > 3 * level[:, LOWERS]).all()
    assert found.results["gene_space"] == gene_space


def test_the_background_may_be_of_another_file(trained, cells, tmp_path):
    other = make_cells(30, seed=5)
    found = explained(trained, cells, tmp_path / "out", background=other, num_background=10)
    assert found.results["num_background"] == 10
    assert found.results["background_file"] == "AnnData"
    assert len(found.results["inputs"]) == 2


def test_a_background_may_lack_the_labels_and_the_model_names_it(trained, cells, tmp_path, caplog):
    other = make_cells(30, seed=5)
    del other.obs["cell_type"]
    found = explained(trained, cells, tmp_path / "out", background=other)
    assert "the background, has no column 'cell_type': the model names its cells" in caplog.text
    assert found.results["classes"][0]["top"][0]["regression_place"] is not None
    with pytest.raises(ValueError, match="obs column 'kind' is not in"):
        explained(trained, cells, tmp_path / "two", background=other, label_column="kind")


def test_cells_that_are_compared_with_themselves_are_counted_and_told(trained, cells, tmp_path, caplog):
    few = {"num_cells": 4, "checks": Checks(completeness=2, stability=3, curves=2)}
    apart = explained(trained, cells, tmp_path / "apart", **few)
    assert apart.results["num_in_background"] == 0
    own = explained(trained, cells, tmp_path / "own", background=cells, num_background=40, **few)
    assert own.results["num_in_background"] == 4
    assert "4 of the cells to explain are in the background cells.h5ad too" in caplog.text
    assert (
        "40 background cells of cells.h5ad, 4 of which are explained too"
        in (tmp_path / "own" / "explanation.md").read_text()
    )
    caplog.clear()
    all_there_are = explained(trained, cells, tmp_path / "all", num_background=39, **few)
    assert "fewer than num_background=39" in caplog.text
    assert all_there_are.results["num_in_background"] in (3, 4)


def test_of_a_background_without_labels_only_the_drawn_cells_are_named(trained, cells, tmp_path, monkeypatch):
    named = []

    class Counted(BatchInference):
        def __call__(self, rows, **options):
            named.append(len(rows))
            return super().__call__(rows, **options)

    monkeypatch.setattr(explained_cells, "BatchInference", Counted)
    other = make_cells(30, seed=5)
    explained(trained, cells, tmp_path / "out", background=other, label_column=None, num_background=10)
    assert named == [40, 10, 10]  # those of the file, and both draws


def test_a_run_that_is_killed_goes_on_where_it_was(trained, cells, tmp_path, monkeypatch):
    whole = explained(trained, cells, tmp_path / "whole")
    monkeypatch.setattr(explanation_run, "CELLS_PER_BLOCK", 4)
    calls, price = [], 1 + explanation_run.NUM_PILOT_CELLS * workers_of(trained.model, Sampling())

    def count(*given, number, **others):
        calls.append(number)
        if len(calls) == price + 10 and stops:
            raise KeyboardInterrupt
        return attribute(*given, number=number, **others)

    attribute, stops = explanation_run.attribute, True
    monkeypatch.setattr(explanation_run, "attribute", count)
    with pytest.raises(KeyboardInterrupt):
        explained(trained, cells, tmp_path / "out")
    assert not (tmp_path / "out" / "explanation.json").exists()
    stops = False
    calls.clear()
    again = explained(trained, cells, tmp_path / "out")
    # Two blocks of four were there; some are explained once more as their points alone say.
    assert len(calls) == price + (12 - 8) + CHECKS.stability + CHECKS.completeness
    pd.testing.assert_frame_equal(again.tables["alpha"], whole.tables["alpha"])
    assert again.results["seconds"] is None
    assert whole.results["seconds"] > 0
    assert not (tmp_path / "out" / "values.partial").exists()


def test_an_earlier_explanation_is_not_lost(trained, cells, tmp_path):
    explained(trained, cells, tmp_path / "out")
    with pytest.raises(FileExistsError, match="has an explanation; choose another folder, or replace it with"):
        explained(trained, cells, tmp_path / "out")
    assert explained(trained, cells, tmp_path / "out", "beta", overwrite=True).results["classes"][0]["class"] == "beta"
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "beeswarm-beta.png", "curves-beta.png", "genes-beta.png"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"classes": ["gamma"]}, r"class 'gamma': \['gamma'\] are none of the model's labels; it has alpha, beta"),
        ({"classes": ["alpha", "alpha"]}, "classes got .* at least one is needed, and each once"),
        ({"genes": ["GENE999"]}, "'GENE999' is unknown"),
        ({"num_cells": 0}, "num_cells got 0; at least 1"),
        ({"sampling": Sampling("lime")}, "method got 'lime'"),
        ({"label_column": "nothing"}, "nothing"),
        (
            {"label_column": "donor"},
            r"class 'alpha': cells.h5ad has no cell of it \(column 'donor'\); there are human1",
        ),
    ],
)
def test_what_cannot_be_explained_is_refused_before_anything_is_written(trained, cells, tmp_path, given, words):
    classes, column = given.pop("classes", ["alpha"]), given.pop("label_column", "cell_type")
    with pytest.raises(ValueError, match=words):
        explained(trained, cells, tmp_path / "out", *classes, label_column=column, **given)
    assert not (tmp_path / "out").exists()


def test_markers_are_of_the_class_that_they_are_said_to_be_of(trained, cells, tmp_path):
    rows = [
        ("Human", "Normal", "A", f"GENE{RAISES}"),
        ("Human", "Normal", "B", "GENE7"),
        ("Mouse", "Normal", "A", "GENE9"),
    ]
    table = tmp_path / "markers.csv"
    pd.DataFrame(rows, columns=["species", "cancer", "celltype", "gene"]).to_csv(table, index=False)
    given = {"markers": table, "marker_types": ["alpha=A"]}
    alpha, beta = explained(trained, cells, tmp_path / "out", "alpha", "beta", **given).results["classes"]
    assert alpha["markers"]["num_markers"] == 1
    assert beta["markers"] is None
    with pytest.raises(ValueError, match=r"markers.csv has no gene for cell types \['C'\]"):
        explained(trained, cells, tmp_path / "other", "alpha", markers=table, marker_types=["C"])
    pd.DataFrame({"name": ["x"]}).to_csv(table, index=False)
    with pytest.raises(ValueError, match=r"one of .*'gene', 'symbol', 'marker'.* is needed"):
        read_marker_genes(table)


def test_files_of_others_in_the_folder_stay(trained, cells, tmp_path):
    for name in ("explanation.docx", "genes-of-interest.png", "explanation.old"):
        (tmp_path / name).write_text("mine")
    explained(trained, cells, tmp_path)
    explained(trained, cells, tmp_path, overwrite=True)
    assert all((tmp_path / name).read_text() == "mine" for name in ("explanation.docx", "genes-of-interest.png"))
    assert (tmp_path / "explanation.old").exists()


def test_what_does_not_stay_the_same_or_is_of_few_cells_is_said_so(trained, cells, tmp_path):
    explained(trained, cells, tmp_path)
    one = json.loads((tmp_path / "explanation.json").read_text())["classes"][0]
    assert any(line.startswith("It stays the same: with") for line in check_sentences(one))
    one["stability"]["rank_correlation"] = -0.05
    one["num_cells"] = 3
    told = check_sentences(one)
    assert any(line.startswith("It does not stay the same: with another seed and a background") for line in told)
    curves = [line for line in told if line.startswith("Genes ")]
    assert all("of too few cells for an interval" in line and "faster" not in line for line in curves)


def test_genes_that_were_asked_for_are_told_of_wherever_they_are():
    row = {"gene": "A", "place": 1, "sign": 1}
    assert "1 of the 1 that were asked for: A; high expression raises the score." in asked_sentence([row])
    assert "A; high expression of A lowers the score." in asked_sentence([row | {"sign": -1}])
    far = row | {"place": 21, "share_expressed": 0.5, "background_share_expressed": 0.4, "regression_place": None}
    assert asked_sentence([far]) == (
        "None of the 1 genes that were asked for is among the 20 that count most. The others: A, place 21, which 50% "
        "of these cells express and 40% of the background."
    )


@pytest.mark.parametrize(("gap", "words"), [(0.02, "It adds up: "), (0.021, "It does not add up well: ")])
def test_values_that_miss_their_sum_are_not_called_sums(gap, words):
    curves = {"steps": [0, 1], "deletion_probability": {"areas": {"explanation": 0.5}, "less": {}}}
    curves["insertion_probability"] = curves["deletion_probability"]
    one = {
        "num_cells": 3,
        "completeness": {"median_gap": gap, "largest_gap": 0.5, "mean_effect": 1.0, "num_cells": 3},
        "stability": {"num_genes": 9, "rank_correlation": 0.9, "num_cells": 3, "shared": 1.0},
        "curves": curves,
        "markers": None,
    }
    sentence = check_sentences(one)[0]
    assert sentence.startswith(words)
    assert ("take more points" in sentence) == (gap > 0.02)


def make_explainer(trained):
    adata = make_cells(40)
    tokens = trained.tokenizer(adata, gene_space="full", return_tensors="np")
    return Explainer(trained.model, tokens["input_ids"].astype(np.uint8), "full"), ClassScore("alpha", (0,))


@pytest.mark.parametrize("num_workers", [2, 5])
def test_cells_that_are_worked_on_beside_each_other_are_as_those_alone(trained, num_workers):
    explainer, score = make_explainer(trained)
    threads = torch.get_num_threads()

    def values(number):
        return one.values(score, one.background[number], Sampling(num_points=4), number=number)

    one = explainer._replace(gene_space="expressed", batch_size=3)
    alone = np.stack([values(number) for number in range(12)])
    one = one._replace(batch_size=None, num_workers=num_workers)
    with activations_kept(one, 40):
        assert not trained.model.config.reversible
        np.testing.assert_allclose(np.stack(list(one.map(values, range(12)))), alone, atol=1e-5)
    assert trained.model.config.reversible
    assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError):
        list(one.map(lambda number: 1 / number, range(12)))
    assert torch.get_num_threads() == threads


def test_activations_that_are_large_are_not_kept(trained):
    explainer, _ = make_explainer(trained)
    with activations_kept(explainer, 10**8):
        assert trained.model.config.reversible


def test_only_our_own_methods_work_on_several_cells(trained):
    assert workers_of(trained.model, Sampling()) == torch.get_num_threads()
    assert workers_of(trained.model, Sampling("shap")) == workers_of(trained.model, Sampling("deep")) == 1


def test_values_that_do_not_add_up_are_told(trained):
    explainer, score = make_explainer(trained)
    bins, sampling = explainer.background[:3], Sampling(num_points=4)
    values = np.stack([explainer.values(score, own, sampling, number=0) for own in bins])
    assert completeness(explainer, score, bins, values, sampling)["largest_gap"] < 1e-3
    assert completeness(explainer, score, bins, values * 1.1, sampling)["median_gap"] == pytest.approx(0.1, abs=1e-3)


def test_stability_is_of_the_ranks_of_the_genes_that_count():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(5, 300)).astype(np.float32) * np.linspace(5, 0.1, 300, dtype=np.float32)
    same, other = stability(values, values), stability(values, generator.normal(size=(5, 300)).astype(np.float32))
    assert (same["rank_correlation"], same["shared"], same["num_genes"]) == (pytest.approx(1), 1, 100)
    assert abs(other["rank_correlation"]) < 0.4
    assert other["shared"] < 0.5


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_curves_tell_a_good_order_from_a_bad_one(trained, gene_space):
    explainer, score = make_explainer(trained)
    explainer, bins = explainer._replace(gene_space=gene_space), explainer.background[0:8:2]
    good = np.zeros(bins.shape)
    good[:, RAISES] = 1
    described = deletion_and_insertion(explainer, score, bins, {"explanation": good, "random genes": -good}).describe()
    falls, rises = described["deletion"], described["insertion"]
    assert falls["curves"]["explanation"][1] < 0.5 < falls["curves"]["random genes"][1]
    assert falls["less"]["random genes"]["interval"][1] < 0
    assert rises["less"]["random genes"]["interval"][0] > 0
    # At no gene taken both are the cell itself.
    assert falls["curves"]["explanation"][0] == falls["curves"]["random genes"][0]


def test_a_cell_whose_genes_are_all_taken_away_is_left_out_of_that_step(trained):
    explainer, score = make_explainer(trained)
    bins = explainer.background[:4].copy()
    bins[0, 3:] = 0
    bins[0, :3] = 1
    order = np.arange(bins.shape[1], dtype=float) * np.ones((4, 1))
    curves = deletion_and_insertion(explainer, score, bins, {"explanation": order, "random genes": -order})
    assert np.isnan(curves.deletion["explanation"][0, 3:]).all()
    described = curves.describe()
    for name in ("deletion_probability", "insertion_probability"):
        assert np.isfinite(described[name]["less"]["random genes"]["interval"]).all()
        assert np.isfinite(described[name]["areas"]["explanation"])
    expected = curves.deletion["explanation"][1:, 3].mean()
    assert described["deletion"]["curves"]["explanation"][3] == pytest.approx(expected)


def test_the_regression_weighs_genes_by_what_tells_the_class_from_others(trained):
    explainer, score = make_explainer(trained)
    bins = explainer.background
    labels = np.array(["alpha", "beta"] * 20)
    cells = SomeCells([""] * 40, np.arange(40), labels, bins)
    weights = regression_weights(cells, score.labels(trained.model.config))
    assert set(np.argsort(-weights)[:4].tolist()) <= set(range(6))  # genes of alpha
    assert regression_weights(cells._replace(labels=np.array(["beta"] * 40)), ["alpha"]) is None


def test_markers_among_the_top_are_counted_beside_chance():
    importance = np.arange(1000, 0, -1, dtype=float)
    is_marker, is_seen = np.zeros(1000, dtype=bool), np.ones(1000, dtype=bool)
    is_marker[:10] = True
    found = marker_overlap(importance, is_marker, is_seen)
    assert (found["hits"], found["num_top"], found["expected"]) == (10, 100, 1.0)
    assert found["p"] < 1e-9
    assert marker_overlap(importance[::-1], is_marker, is_seen)["p"] == 1.0


def test_the_price_is_a_line_over_the_tokens(trained, monkeypatch):
    explainer, score = make_explainer(trained)
    explainer = explainer._replace(gene_space="expressed")
    clock = [0.0]

    def slow(cell, *_, **__):
        clock[0] += 1.0 + len(cell.positions)
        return np.zeros(len(cell.positions))

    monkeypatch.setattr(explanation_run, "attribute", slow)
    monkeypatch.setattr(explanation_run.time, "perf_counter", lambda: clock[0])
    bins = explainer.background
    price = estimate(explainer, {score: bins}, Sampling(), Checks(0, 0, 0))
    assert price.seconds == pytest.approx((1.0 + np.count_nonzero(bins, axis=1)).sum(), rel=1e-6)
    twice = estimate(explainer, {score: bins}, Sampling(), Checks(0, 40, 0))
    assert twice.seconds == pytest.approx(2 * price.seconds, rel=0.02)
    assert price.peak_bytes > 0
    assert str(price._replace(seconds=125.0, peak_bytes=2_000_000_000)) == "about 2 min 05 s, up to 2.0 GB"


def test_signs_say_what_high_expression_does():
    bins = np.array([[0, 5, 2], [5, 0, 2]], dtype=np.uint8)
    values = np.array([[-1.0, -2.0, 0.5], [1.0, 2.0, 0.5]], dtype=np.float32)
    vocabulary = GeneVocabulary(["ENSG1", "ENSG2", "ENSG3"], symbols=["A", "B", "C"])
    table = gene_table(values, bins, vocabulary, bins[:1], np.array([1.0, -5.0, 0.0]))
    assert table["gene"].tolist() == ["B", "A", "C"]
    assert table["sign"].tolist() == [-1, 1, 1]
    assert table["mean_where_expressed"].tolist() == [-2.0, 1.0, 0.5]
    assert table["background_share_expressed"].tolist() == [1.0, 0.0, 1.0]
    assert table["regression_place"].tolist() == [1, 2, 3]


def test_figures_of_hard_cases_are_drawn(tmp_path):
    values, bins = np.zeros((3, 5), dtype=np.float32), np.zeros((3, 5), dtype=np.uint8)
    values[:, 1] = 1.0
    plot_beeswarm(values, bins, list("abcde"), tmp_path / "one.png", title="one gene", num_bins=6)
    plot_beeswarm(values * 0, bins, list("abcde"), tmp_path / "none.png", title="no gene", num_bins=6)
    plot_class_heat_map(pd.DataFrame({"a class with a very long name": [0.0]}, index=["gene"]), tmp_path / "map.png")
    assert all((tmp_path / f"{name}.png").exists() for name in ("one", "none", "map"))


def test_the_command_line(trained, cells, tmp_path):
    trained.model.save_pretrained(tmp_path / "model")
    trained.tokenizer.save_pretrained(tmp_path / "model")
    given = ["explain", "--model", str(tmp_path / "model"), "--cells", str(cells), "--class", "alpha", "-o"]
    given += [str(tmp_path / "out"), "--label-column", "cell_type", "--num-cells", "3", "--num-background", "5"]
    result = CliRunner().invoke(app, [*given, "--points", "2", "--sum-error", "0.2"])
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "out" / "explanation.json").read_text())
    assert kept["sampling"] == {
        "method": "expected_gradients", "num_points": 2, "seed": 0, "max_sum_error": 0.2
    }  # fmt: skip
    assert kept["classes"][0]["completeness"]["as_drawn"] >= 0
    assert "By the points alone they would miss it by" in result.output
    left = CliRunner().invoke(app, [*given, "--points", "2", "--sum-error", "1", "--overwrite"])
    assert left.exit_code == 0, left.output
    assert json.loads((tmp_path / "out" / "explanation.json").read_text())["sampling"]["max_sum_error"] is None
    assert "By the points alone" not in left.output
    assert "3 cells beside 5: about 0 min" in result.output
    assert "alpha, 3 cells: GENE" in result.output
    again = CliRunner().invoke(app, given)
    assert again.exit_code == 1
    assert "has an explanation" in again.output
