"""Training on labels at any level of a tree: the loss, the scores, and a classifier that learns from all cells."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from small_corpus import TINY_MODEL, make_cells, make_corpus
from small_teacher import make_teacher
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from screformer.annotation.annotate import annotate_file
from screformer.annotation.explained_cells import CellFile, choose_cells
from screformer.annotation.explained_score import ClassScore
from screformer.annotation.label_tree import LabelTree
from screformer.annotation.trained_model import load_classifier
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import open_corpus
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.classifier_start import ClassifierArguments
from screformer.train.evaluate import evaluate_checkpoint
from screformer.train.finetune import finetune
from screformer.train.result_files import read_json, write_json
from screformer.train.tree_targets import TreeLoss, TreeTargets, open_label_tree, tree_weights

TREE = LabelTree({"islet": None, "alpha": "islet", "beta": "islet", "other": None, "duct": "other", "fat": "other"})
LABELS = np.array(["beta", "islet", "alpha", "other", "beta"])


@pytest.fixture
def targets():
    return TreeTargets(TREE, LABELS)


def test_leaves_are_the_labels_without_subtypes_in_training_and_come_first(targets):
    assert targets.leaves == ("alpha", "beta", "other")
    assert targets.names == ("alpha", "beta", "other", "islet")
    assert targets.is_below.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]


def test_the_loss_is_minus_the_logarithm_of_the_probability_of_what_is_below(targets):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 3, -100])
    loss = TreeLoss(targets)({"logits": logits}, labels)
    probabilities = logits.float().softmax(dim=-1)
    expected = -torch.stack([probabilities[0, 0], probabilities[1, 2], probabilities[2, :2].sum()]).log()
    assert loss == pytest.approx(float(expected.mean()), rel=1e-5)
    assert TreeLoss(targets)({"logits": logits}, labels, 6) == pytest.approx(float(expected.sum()) / 6, rel=1e-5)


def test_of_leaves_it_is_the_cross_entropy_with_its_gradient(targets):
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 2, 1, 1, 0])
    weights = torch.tensor([1.0, 2.0, 0.5, 9.0])
    ours = torch.autograd.grad(TreeLoss(targets, weights)({"logits": logits}, labels), logits)[0]
    theirs = torch.autograd.grad((cross_entropy(logits, labels, reduction="none") * weights[labels]).mean(), logits)[0]
    torch.testing.assert_close(ours, theirs)


def test_an_inner_label_leaves_it_open_which_leaf_it_is(targets):
    logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
    TreeLoss(targets)({"logits": logits}, torch.tensor([3])).backward()
    below = logits.detach()[0, :2].softmax(dim=0)
    # What the leaves below gain they gain in the proportion that they have.
    torch.testing.assert_close(logits.grad[0, :2] / logits.grad[0, :2].sum(), below)
    assert logits.grad[0, 2] > 0


def test_weights_make_the_labels_that_cells_have_equal(targets):
    weights = tree_weights(targets, LABELS)
    assert weights.tolist() == pytest.approx([5 / 4, 5 / 8, 5 / 4, 5 / 4])


def test_predictions_are_scored_at_the_level_of_each_label(targets):
    # alpha, beta, alpha, other predicted; islet is right for the first three.
    logits = 9 * np.eye(3)[[0, 1, 0, 2]]
    scores = targets.compute_metrics(EvalPrediction(logits, np.array([3, 1, 1, 3])))
    assert scores["accuracy"] == scores["subtype_accuracy"] == 2 / 4
    assert 0 < scores["macro_f1"] < 1
    assert scores["hierarchical_f1"] == pytest.approx(2 * (4 / 7) * (4 / 6) / (4 / 7 + 4 / 6))
    # The likeliest leaf is "other", but islet cells are likelier together: as annotation says, from the top down.
    undecided = np.log([[0.3, 0.25, 0.45]])
    assert targets.compute_metrics(EvalPrediction(undecided, np.array([3])))["accuracy"] == 1


def test_labels_that_are_not_in_the_tree_are_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"label_tree has no \['mast'\]; it has islet, alpha, .* exclude_labels"):
        TreeTargets(TREE, ["alpha", "mast"])


def test_trees_are_uhaf_s_or_of_a_file(tmp_path):
    assert open_label_tree("uhaf:Heart", ["T cell"]) == LabelTree.uhaf("Heart")
    (tmp_path / "tree.csv").write_text("label,parent\nislet,\nalpha,islet\n")
    assert open_label_tree(str(tmp_path / "tree.csv"), ["alpha"]).leaves == ("alpha",)


def test_trees_of_the_cell_ontology_have_broad_types_or_a_file_s_above_the_labels(tmp_path):
    labels = np.array(["T cells", "B cell", "T cells"])
    assert open_label_tree("cell_ontology", labels) == LabelTree(
        {
            "T cells": "lymphocyte",
            "B cell": "lymphocyte",
            "lymphocyte": "leukocyte",
            "leukocyte": "hematopoietic cell",
            "hematopoietic cell": None,
        }
    )
    (tmp_path / "terms.txt").write_text("CL:0000842\n\nneuron\nt cell \n")
    found = open_label_tree(f"cell_ontology:{tmp_path / 'terms.txt'}", labels)
    assert found == LabelTree(
        {"T cells": "mononuclear leukocyte", "B cell": "mononuclear leukocyte", "mononuclear leukocyte": None}
    )
    (tmp_path / "terms.txt").write_text("lymphoid\n")
    with pytest.raises(ValueError, match=r"terms that are not in the Cell Ontology.*'lymphoid' \("):
        open_label_tree(f"cell_ontology:{tmp_path / 'terms.txt'}", labels)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_label_tree("cell_ontology:nowhere", labels)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A corpus with half of the alpha cells known as islet cells only, and its tree."""
    folder = tmp_path_factory.mktemp("mixed")
    cells = make_cells(96, types=["alpha", "beta", "duct"])
    labels = cells.obs["cell_type"].to_numpy().astype(object)
    labels[np.flatnonzero(labels == "alpha")[::2]] = "islet"
    cells.obs["cell_type"] = labels
    (folder / "tree.csv").write_text("label,parent\nislet,\nalpha,islet\nbeta,islet\nduct,\n")
    return make_corpus(folder, cells=cells), str(folder / "tree.csv")


def run(corpus: str, tree: str, folder: Path, classifier: ClassifierArguments | None = None, **options):
    model = ModelArguments(config_overrides=[*TINY_MODEL, "classifier_dropout=0.0", "gene_space=expressed"])
    data = FineTuningDataArguments(corpus=corpus, label_tree=tree)
    options = {"num_train_epochs": 25, "learning_rate": 1e-2, "gradient_accumulation_steps": 1, **options}
    training = FineTuningArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=8,
        early_stopping_patience=0, seed=1, **options,
    )  # fmt: skip
    return finetune(model, data, training, classifier)


@pytest.fixture(scope="module")
def trained(mixed, tmp_path_factory):
    return run(*mixed, tmp_path_factory.mktemp("trained") / "model", class_weights="balanced")


def test_a_classifier_of_the_leaves_learns_from_cells_at_any_level(trained):
    result = trained
    config = ScReformerForCellClassification.from_pretrained(result.output_dir).config
    assert [config.id2label[number] for number in range(config.num_labels)] == ["alpha", "beta", "duct"]
    assert config.label_parents == {"islet": None, "alpha": "islet", "beta": "islet", "duct": None}
    assert result.metrics["validation_accuracy"] > 0.9
    assert result.metrics["validation_loss"] < 0.5


def test_evaluation_has_the_scores_of_each_level(mixed, trained, tmp_path, caplog):
    evaluation = evaluate_checkpoint(trained.output_dir, mixed[0], tmp_path, part="all", progress=False)
    assert evaluation == read_json(tmp_path / "evaluation.json")
    hierarchy = evaluation["hierarchy"]
    assert (hierarchy["num_cells"], hierarchy["num_unknown_cells"]) == (96, 0)
    first, second = hierarchy["levels"]
    # Of the 16 islet cells nothing is known at the second level; ducts are leaves at the first, and repeat.
    assert (first["num_cells"], second["num_cells"]) == (96, 80)
    assert first["accuracy"] >= second["accuracy"] > 0.9
    assert evaluation["num_cells_above_classes"] == 16
    assert evaluation["num_cells"] == 80
    assert evaluation["unknown_labels"] == []
    assert hierarchy["hierarchical_f1"] > 0.8


def test_what_is_scored_is_what_annotation_gives(mixed, tmp_path):
    # Of weights that know little, the likeliest class of many cells is not in the likeliest branch.
    model = make_teacher(tmp_path / "model", label_names=["alpha", "beta", "duct"], gene_space="expressed")
    config = read_json(tmp_path / "model/config.json")
    parents = {"islet": None, "alpha": "islet", "beta": "islet", "duct": None}
    flat = {"temperatures": [20.0, 20.0], "error_rates": [], "thresholds": []}
    write_json(tmp_path / "model/config.json", {**config, "label_parents": parents, "calibration": flat})
    source = Path(mixed[0]).parent / "cells.h5ad"
    annotate_file(source, model, tmp_path / "out.h5ad", progress=False)
    given = anndata.read_h5ad(tmp_path / "out.h5ad").obs["screformer_cell_type"].astype(str)
    evaluation = evaluate_checkpoint(model, mixed[0], tmp_path / "scores", part="all", progress=False)
    rows = pd.read_csv(tmp_path / "scores/predictions.tsv", sep="\t", index_col="cell_id")
    assert rows["predicted"].tolist() == given[rows.index].tolist()
    table = rows[["probability_alpha", "probability_beta", "probability_duct"]]
    likeliest = table.idxmax(axis=1).str.removeprefix("probability_")
    assert (likeliest != rows["predicted"]).sum() > 2
    assert evaluation["accuracy"] == pytest.approx((rows["predicted"] == rows["label"]).mean())
    confusion = pd.crosstab(rows["label"], rows["predicted"]).reindex(columns=evaluation["label_names"], fill_value=0)
    assert evaluation["confusion_matrix"] == confusion.to_numpy().tolist()
    of_prediction = [table.loc[cell, f"probability_{name}"] for cell, name in rows["predicted"].items()]
    assert rows["confidence"].tolist() == of_prediction
    auc = roc_auc_score(rows["label"] == "duct", rows["probability_duct"])
    assert evaluation["per_class"]["duct"]["auc"] == pytest.approx(auc, abs=1e-3)
    file = CellFile(source, label_column=None, progress=False)
    scores = [ClassScore.parse(load_classifier(model).model.config, name) for name in ("islet", "duct")]
    chosen = choose_cells(
        file, None, load_classifier(model), scores, num_cells=96, num_background=9, gene_space="expressed", seed=0
    )
    for cells in chosen.of_class:
        assert cells.labels.tolist() == given[cells.names].tolist()


def test_annotation_writes_every_level(mixed, trained, tmp_path):
    cells = Path(mixed[0]).parent / "cells.h5ad"
    summary = annotate_file(cells, trained.output_dir, tmp_path / "out.h5ad", progress=False)
    assert "obs['screformer_level_1']" in str(summary)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    tree = LabelTree({"islet": None, "alpha": "islet", "beta": "islet", "duct": None})
    first, second = written.obs["screformer_level_1"], written.obs["screformer_level_2"]
    for above, below in zip(first, second, strict=True):
        assert (above, below) == (tree.at_level(below, 1), tree.at_level(below, 2))
    assert (written.obs["screformer_cell_type"].astype(str) == second.astype(str)).all()
    probabilities = written.obs[["screformer_level_1_probability", "screformer_level_2_probability"]].to_numpy()
    assert (probabilities[:, 0] >= probabilities[:, 1]).all()
    np.testing.assert_array_equal(probabilities[:, 1], written.obs["screformer_probability"].to_numpy())
    table = written.obsm["screformer_probabilities"]
    is_islet = (first == "islet").to_numpy()
    np.testing.assert_allclose(probabilities[is_islet, 0], table[is_islet, :2].sum(axis=1), rtol=1e-5)
    truth = written.obs["cell_type"].map({"alpha": "islet", "beta": "islet", "islet": "islet", "duct": "duct"})
    assert (truth.to_numpy() == first.astype(str).to_numpy()).mean() > 0.9


def test_a_regression_starts_from_the_cells_whose_labels_are_leaves(mixed, tmp_path):
    start = ClassifierArguments(classifier_paths=["convolution", "linear"], linear_start="logistic_regression")
    run(*mixed, tmp_path, start, num_train_epochs=1, learning_rate=1e-5)
    labels = dict(
        zip(open_corpus(mixed[0]).dataset["cell_id"], open_corpus(mixed[0]).dataset["cell_type"], strict=True)
    )
    train = [labels[name.rpartition(":")[2]] for name in read_json(tmp_path / "splits.json")["train"]]
    start_of = read_json(tmp_path / "training.json")["linear_start"]
    assert start_of["num_cells"] == sum(label != "islet" for label in train) < len(train)


def test_smoothing_has_no_meaning_here(mixed, tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 and label_tree='.*tree.csv': a label"):
        run(*mixed, tmp_path, label_smoothing_factor=0.1)


def test_labels_of_the_cell_ontology_train_at_several_levels_and_are_annotated(tmp_path):
    cells = make_cells(96, types=["T cells", "B cell", "pancreatic A cell"])
    labels = cells.obs["cell_type"].to_numpy().astype(object)
    labels[np.flatnonzero(labels == "T cells")[::2]] = "lymphocyte"
    cells.obs["cell_type"] = labels
    corpus = make_corpus(tmp_path, cells=cells)
    result = run(corpus, "cell_ontology", tmp_path / "model")
    config = ScReformerForCellClassification.from_pretrained(result.output_dir).config
    assert [config.id2label[number] for number in range(3)] == ["B cell", "T cells", "pancreatic A cell"]
    assert LabelTree(config.label_parents).path("T cells") == (
        "hematopoietic cell",
        "leukocyte",
        "lymphocyte",
        "T cells",
    )
    assert result.metrics["validation_accuracy"] > 0.9
    annotate_file(tmp_path / "cells.h5ad", result.output_dir, tmp_path / "out.h5ad", progress=False)
    written = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert set(written["screformer_level_1"]) == {"hematopoietic cell", "epithelial cell"}
    is_blood = written["cell_type"] != "pancreatic A cell"
    assert ((written["screformer_level_1"] == "hematopoietic cell") == is_blood).mean() > 0.9


def test_labels_that_are_not_in_the_cell_ontology_stop_training_with_suggestions(mixed, tmp_path):
    with pytest.raises(ValueError, match=r"labels that are not in the Cell Ontology.*'alpha' \(.*exclude_labels"):
        run(mixed[0], "cell_ontology", tmp_path)
