"""A fine-tuned classifier's paths, and a linear path that starts as a logistic regression of the training cells."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from small_corpus import TINY_MODEL, make_cells, make_corpus

from screformer.benchmarks.simple_baselines import fit_logistic_regression
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization import open_corpus
from screformer.train import classifier_start
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.classifier_start import ClassifierArguments
from screformer.train.collator import CellCollator
from screformer.train.expression_levels import read_levels
from screformer.train.finetune import finetune, main
from screformer.train.labelled_cells import split_labelled_cells
from screformer.train.result_files import read_json

TINY = ModelArguments(config_overrides=[*TINY_MODEL, "classifier_dropout=0.0", "gene_space=expressed"])
BY_DONOR = {"test_groups": ["human4"], "group_column": "donor"}
WIDE = ClassifierArguments(classifier_paths=["convolution", "pooled", "linear"], linear_start="logistic_regression")


def settings(folder: Path, **options) -> FineTuningArguments:
    options = {"num_train_epochs": 1, "learning_rate": 0.0, "gradient_accumulation_steps": 1, **options}
    return FineTuningArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def started(corpus: str, tmp_path_factory: pytest.TempPathFactory):
    """A model that learned nothing after its start: the learning rate is 0."""
    folder = tmp_path_factory.mktemp("started")
    data = FineTuningDataArguments(corpus=corpus, group_column="donor", test_groups=[donors(corpus)[-1]])
    finetune(TINY, data, settings(folder), WIDE)
    return folder, data


def donors(corpus: str) -> list[str]:
    return sorted(set(open_corpus(corpus).dataset["donor"]))


def test_the_linear_path_is_the_regression_that_the_training_cells_give(corpus: str, started) -> None:
    folder, data = started
    opened = open_corpus(corpus)
    model = ScReformerForCellClassification.from_pretrained(folder).eval()
    cells = split_labelled_cells(opened, data, 2022)
    rows, train = cells.rows, cells.split.train
    levels = read_levels(opened, rows, model.config.num_genes, model.config.num_bins)
    expected = fit_logistic_regression(
        levels[train], cells.labels[train], groups=cells.groups[train], is_scaled=False, seed=2022
    )
    batch = CellCollator.from_config(model.config)([CellDataset(opened, rows)[place] for place in range(len(rows))])
    with torch.inference_mode():
        logits = model(**batch).logits.numpy()
    assert tuple(model.config.id2label.values()) == expected.labels
    np.testing.assert_allclose(logits, levels @ expected.weights.T + expected.biases, rtol=1e-3, atol=1e-3)


def test_the_deep_paths_learn_and_the_regression_stays(corpus: str, started, tmp_path: Path) -> None:
    folder, data = started
    finetune(TINY, data, settings(tmp_path, learning_rate=1e-2), WIDE)
    before, after = (
        ScReformerForCellClassification.from_pretrained(path).classifier.state_dict() for path in (folder, tmp_path)
    )
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"convolution_path", "pooled_path"}


def test_what_a_checkpoint_has_learned_is_kept(corpus: str, started, tmp_path: Path) -> None:
    folder, data = started
    finetune(ModelArguments(checkpoint=str(folder)), data, settings(tmp_path))
    before, after = (
        ScReformerForCellClassification.from_pretrained(path).classifier.state_dict() for path in (folder, tmp_path)
    )
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_the_record_says_how_it_started(started) -> None:
    folder, _ = started
    record = read_json(folder / "training.json")
    assert record["classifier"]["linear_start"] == "logistic_regression"
    assert record["linear_start"]["chosen"] in record["linear_start"]["search"]
    assert record["pooled_start"]["num_cells"] > 1


def test_the_pooled_path_is_centred_on_training_cells(corpus: str, started) -> None:
    folder, data = started
    opened = open_corpus(corpus)
    model = ScReformerForCellClassification.from_pretrained(folder).eval()
    cells = split_labelled_cells(opened, data, 2022)
    rows = cells.rows[cells.split.train]
    batch = CellCollator.from_config(model.config)([CellDataset(opened, rows)[place] for place in range(len(rows))])
    path = model.classifier.pooled_path
    pooled = (model.pool_cells(batch) - path.center) * path.scale
    torch.testing.assert_close(pooled.mean(0), torch.zeros(32), atol=1e-2, rtol=0)
    torch.testing.assert_close(pooled.std(0), torch.ones(32), atol=0.05, rtol=0)


def test_a_regression_on_gene_vectors_knows_what_the_checkpoint_does(corpus: str, started, tmp_path: Path) -> None:
    folder, data = started
    onto = ClassifierArguments(classifier_paths=["linear"], linear_start="gene_vectors")
    result = finetune(ModelArguments(checkpoint=str(folder)), data, settings(tmp_path), onto)
    model = ScReformerForCellClassification.from_pretrained(result.output_dir)
    vectors = model.screformer.embeddings.gene_embeddings.weight.detach()
    weights = model.classifier.linear_path.output.weight.detach()
    assert torch.linalg.matrix_rank(torch.cat([vectors.T, weights]), rtol=1e-5) == vectors.shape[1]
    facts = read_json(tmp_path / "training.json")["linear_start"]
    assert facts["chosen"].startswith("gene vectors, C=")
    assert max(facts["search"].values()) == 1  # two types that differ in six genes each


def test_test_cells_have_no_part_in_the_start(corpus: str, started, tmp_path: Path, monkeypatch) -> None:
    from screformer.train import classifier_start

    _, data = started
    seen = []
    original = classifier_start.CellDataset

    def spy(corpus_, rows=None, **options):
        seen.extend(np.asarray(rows).tolist())
        return original(corpus_, rows, **options)

    monkeypatch.setattr(classifier_start, "CellDataset", spy)
    finetune(TINY, data, settings(tmp_path, max_steps=1), WIDE)
    cells = split_labelled_cells(open_corpus(corpus), data, 2022)
    assert set(seen) == set(cells.rows[cells.split.train].tolist())


def test_of_many_cells_a_rare_type_keeps_some(tmp_path: Path, monkeypatch) -> None:
    cells = make_cells(90)
    cells.obs["cell_type"] = ["rare" if row % 30 == 7 else ["alpha", "beta"][row % 2] for row in range(90)]
    corpus = make_corpus(tmp_path, cells=cells)
    monkeypatch.setattr(classifier_start, "MAX_CELLS", 12)
    monkeypatch.setattr(classifier_start, "CELLS_OF_EACH_TYPE", 2)
    data = FineTuningDataArguments(corpus=corpus, validation_fraction=0.2, test_fraction=0.0)
    chosen = split_labelled_cells(open_corpus(corpus), data, 2022)
    drawn = np.random.default_rng(2022).permutation(chosen.split.train)[:12]
    assert "rare" not in chosen.labels[drawn]  # by chance alone
    finetune(TINY, data, settings(tmp_path / "run", max_steps=1), WIDE)
    weight = ScReformerForCellClassification.from_pretrained(tmp_path / "run").classifier.linear_path.output.weight
    assert (weight != 0).any(dim=1).all()


def test_paths_are_added_to_a_checkpoint_and_stay(corpus: str, tmp_path: Path) -> None:
    data = FineTuningDataArguments(corpus=corpus)
    finetune(TINY, data, settings(tmp_path / "paper", max_steps=1))
    again = ModelArguments(checkpoint=str(tmp_path / "paper"))
    finetune(again, data, settings(tmp_path / "wide", max_steps=1), ClassifierArguments(["pooled", "linear"]))
    config = ScReformerForCellClassification.from_pretrained(tmp_path / "wide").config
    assert config.classifier_paths == ["pooled", "linear"]
    finetune(ModelArguments(checkpoint=str(tmp_path / "wide")), data, settings(tmp_path / "third", max_steps=1))
    assert ScReformerForCellClassification.from_pretrained(tmp_path / "third").config.classifier_paths == [
        "pooled",
        "linear",
    ]


def test_two_labels_give_a_logit_each() -> None:
    generator = np.random.default_rng(0)
    features = sparse.csr_array(generator.random((40, 5)))
    labels = np.where(features.toarray()[:, 0] > 0.5, "b", "a")
    fitted = fit_logistic_regression(features, labels, inverse_strengths=[1.0])
    assert fitted.weights.shape == (2, 5)
    logits = features @ fitted.weights.T + fitted.biases
    assert ((logits[:, 1] > logits[:, 0]) == (labels == "b")).mean() > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classifier_paths": ["pool"]}, "it must be some of convolution, pooled, linear, each once"),
        ({"classifier_paths": ["linear", "linear"]}, "each once"),
        ({"linear_start": "logistic_regression"}, r"needs a linear path, but classifier_paths are \[\]; add linear"),
        (
            {"classifier_paths": ["linear"], "linear_start": "ones"},
            "'ones'; it must be one of zeros, logistic_regression",
        ),
    ],
)
def test_wrong_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierArguments(**options)


def test_the_command_line_has_them(corpus: str, tmp_path: Path) -> None:
    arguments = (
        f"--corpus {corpus} --preset tiny --gene_space expressed --max_steps 1 --use_cpu --output_dir {tmp_path}"
    )
    main([*arguments.split(), "--classifier_paths", "linear", "--linear_start", "logistic_regression"])
    config = ScReformerForCellClassification.from_pretrained(tmp_path).config
    assert config.classifier_paths == ["linear"]


@pytest.mark.parametrize(
    ("options", "fitted_to"),
    [
        (
            {"test_groups": ["human4"], "group_column": "donor"},
            "training cells, each by a regression of the other groups",
        ),
        ({**BY_DONOR, "validation_groups": ["human3"]}, "validation cells"),
        ({}, "validation cells"),
        ({"validation_fraction": 0.0}, "training cells, each by a regression of the other folds"),
    ],
)
def test_groups_that_were_not_trained_on_calibrate_before_other_cells(
    corpus: str, tmp_path: Path, options: dict, fitted_to: str
) -> None:
    data = FineTuningDataArguments(corpus=corpus, **options)
    selection = {"eval_strategy": "no", "load_best_model_at_end": False} if "validation_fraction" in options else {}
    start = ClassifierArguments(classifier_paths=["convolution", "linear"], linear_start="principal_components")
    trained = finetune(TINY, data, settings(tmp_path, **selection), start)
    record = read_json(tmp_path / "calibration.json")
    assert record["fitted_to"] == fitted_to == trained.metrics["validation_calibrated_on"]
    calibration = ScReformerForCellClassification.from_pretrained(tmp_path).config.calibration
    assert {name: record[name] for name in calibration} == calibration
    assert (tmp_path / "calibration.png").exists()
    parts = read_json(tmp_path / "splits.json")["num_cells"]
    assert record["num_cells"] == parts["validation" if "validation" in fitted_to else "train"]
