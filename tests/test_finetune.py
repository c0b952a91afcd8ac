import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_corpus import TINY_MODEL, make_cells, make_corpus, make_tokenizer
from transformers import AutoModelForSequenceClassification

from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train import finetune as finetune_module
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.collator import CellCollator
from screformer.train.corpus_columns import name_cells
from screformer.train.finetune import finetune, main
from screformer.train.labelled_cells import split_labelled_cells
from screformer.train.starting_model import starting_model
from screformer.train.training_run import CellTrainer

NEW_MODEL = ModelArguments(config_overrides=TINY_MODEL)
BY_DONOR = {"group_column": "donor", "test_groups": ["human4"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def settings(output, **overrides):
    defaults = {
        "num_train_epochs": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "early_stopping_patience": 0,
    }
    return FineTuningArguments(output_dir=str(output), use_cpu=True, disable_tqdm=True, **{**defaults, **overrides})


@pytest.fixture(scope="module")
def finetuned(corpus, tmp_path_factory):
    """Return the result of one run that learns the two types."""
    output = tmp_path_factory.mktemp("run") / "finetuned"
    data = FineTuningDataArguments(corpus=corpus, **BY_DONOR)
    return finetune(NEW_MODEL, data, settings(output, num_train_epochs=10))


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_learns_the_types_and_names_them(finetuned):
    assert finetuned.metrics["validation_accuracy"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(finetuned.output_dir)
    assert isinstance(model, ScReformerForCellClassification)
    assert model.config.id2label == {0: "alpha", 1: "beta"}
    assert model.config.label2id == {"alpha": 0, "beta": 1}


def test_output_has_the_results_and_no_pickle(finetuned):
    names = {path.name for path in finetuned.output_dir.rglob("*")}
    expected = {"metrics.json", "log_history.json", "training_curves.png", "training.json", "splits.json", "genes.json"}
    assert expected | {"cell_types.png"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_the_best_epoch_is_kept(finetuned):
    history = read(finetuned.output_dir, "log_history.json")
    accuracies = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    assert len(accuracies) == 10
    assert finetuned.metrics["validation_accuracy"] == max(accuracies)


def test_splits_name_every_cell_once_and_keep_the_donor_apart(finetuned, corpus):
    splits = read(finetuned.output_dir, "splits.json")
    dataset = open_corpus(corpus).dataset
    donor_of = dict(zip(dataset["cell_id"], dataset["donor"], strict=True))
    parts = [splits[name] for name in ("train", "validation", "test")]
    assert sorted(cell for part in parts for cell in part) == sorted(donor_of)
    assert {donor_of[cell] for cell in splits["test"]} == {"human4"}
    assert "human4" not in {donor_of[cell] for cell in splits["train"] + splits["validation"]}
    assert splits["num_cells"] == {"train": 28, "validation": 8, "test": 12}
    assert (splits["label_column"], splits["group_column"], splits["test_groups"]) == ("cell_type", "donor", ["human4"])


def test_test_cells_have_no_influence_on_the_model(corpus, tmp_path):
    # The same cells, but those of the test donor measured anew: the weights must be the same to the last bit.
    cells, others = make_cells(), make_cells(seed=9)
    is_test = (cells.obs["donor"] == "human4").to_numpy()
    cells.X = np.where(is_test[:, None], others.X.toarray(), cells.X.toarray())
    changed = make_corpus(tmp_path, cells=cells)
    weights = []
    for number, folder in enumerate((corpus, changed)):
        data = FineTuningDataArguments(corpus=folder, **BY_DONOR)
        result = finetune(NEW_MODEL, data, settings(tmp_path / f"run{number}", num_train_epochs=2))
        weights.append((result.output_dir / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_random_split_is_60_20_20(corpus, tmp_path):
    data = FineTuningDataArguments(corpus=corpus)
    result = finetune(NEW_MODEL, data, settings(tmp_path / "run", num_train_epochs=1))
    assert read(result.output_dir, "splits.json")["num_cells"] == {"train": 28, "validation": 10, "test": 10}


def test_validation_can_be_a_whole_donor(corpus, tmp_path):
    data = FineTuningDataArguments(corpus=corpus, validation_groups=["human3"], **BY_DONOR)
    result = finetune(NEW_MODEL, data, settings(tmp_path / "run", num_train_epochs=1))
    assert read(result.output_dir, "splits.json")["num_cells"] == {"train": 24, "validation": 12, "test": 12}


def test_cells_without_label_and_excluded_ones_are_left_out(tmp_path, caplog):
    cells = make_cells()
    labels = cells.obs["cell_type"].astype(object)
    labels.iloc[:3], labels.iloc[3:7] = np.nan, "doublet"
    cells.obs["cell_type"] = labels
    folder = make_corpus(tmp_path, cells=cells)
    data = FineTuningDataArguments(corpus=folder, exclude_labels=["doublet"])
    with caplog.at_level(logging.INFO, logger="screformer"):
        result = finetune(NEW_MODEL, data, settings(tmp_path / "run", num_train_epochs=1))
    assert "7 of 48 cells have no label or an excluded one" in caplog.text
    splits = read(result.output_dir, "splits.json")
    named = splits["train"] + splits["validation"] + splits["test"]
    assert sorted(named) == sorted(cells.obs_names[7:])
    assert read(result.output_dir, "config.json")["label2id"] == {"alpha": 0, "beta": 1}


def test_validation_cells_of_a_label_that_training_lacks_are_left_out_with_a_warning(tmp_path, caplog):
    cells = make_cells()
    cells.obs["cell_type"] = np.where(cells.obs_names == "cell4", "mast", cells.obs["cell_type"])
    assert cells.obs.loc["cell4", "donor"] == "human3"
    folder = make_corpus(tmp_path, cells=cells)
    data = FineTuningDataArguments(corpus=folder, validation_groups=["human3"], **BY_DONOR)
    result = finetune(NEW_MODEL, data, settings(tmp_path / "run", num_train_epochs=1))
    assert "1 validation cells are left out: training has no cell with their labels ['mast']" in caplog.text
    assert "cell4" not in read(result.output_dir, "splits.json")["validation"]


def test_gene_dropout_reaches_training_cells_only(corpus, tmp_path):
    opened, data = open_corpus(corpus), FineTuningDataArguments(corpus=corpus, gene_dropout=0.4)
    cells = split_labelled_cells(opened, data, 0)
    model = starting_model(
        ScReformerForCellClassification, opened.tokenizer(), NEW_MODEL, label_names=["alpha", "beta"]
    )
    trainer = finetune_module._make_trainer(model, opened, cells, data, settings(tmp_path))
    training = sum(int((batch["input_ids"] > 0).sum()) for batch in trainer.get_train_dataloader())
    validation, predicted = (
        sum(int((batch["input_ids"] > 0).sum()) for batch in loader)
        for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(trainer.train_dataset))
    )
    expressed = [sum(len(row["gene_ids"]) for row in rows) for rows in (trainer.train_dataset, trainer.eval_dataset)]
    assert 0.5 * expressed[0] < training < 0.7 * expressed[0]
    assert [predicted, validation] == expressed


def test_fine_tuning_starts_from_the_pretrained_encoder(corpus, tmp_path):
    opened = open_corpus(corpus)
    pretrained = starting_model(ScReformerForMaskedLM, opened.tokenizer(), NEW_MODEL)
    pretrained.save_pretrained(tmp_path / "pretrained")
    result = finetune(
        ModelArguments(checkpoint=str(tmp_path / "pretrained")),
        FineTuningDataArguments(corpus=corpus),
        settings(tmp_path / "run", num_train_epochs=1, learning_rate=0.0),
    )
    tuned = load_file(result.output_dir / "model.safetensors")
    for name, tensor in pretrained.screformer.state_dict(prefix="screformer.").items():
        assert torch.equal(tensor, tuned[name])


def test_a_classifier_can_be_tuned_to_other_labels(finetuned, tmp_path):
    folder = make_corpus(tmp_path, cells=make_cells(types=["acinar", "ductal", "mast"]))
    result = finetune(
        ModelArguments(checkpoint=str(finetuned.output_dir)),
        FineTuningDataArguments(corpus=folder),
        settings(tmp_path / "run", num_train_epochs=1),
    )
    config = read(result.output_dir, "config.json")
    assert config["label2id"] == {"acinar": 0, "ductal": 1, "mast": 2}


def test_patience_of_one_stops_after_one_epoch_without_better_accuracy(corpus, tmp_path):
    data = FineTuningDataArguments(corpus=corpus)
    result = finetune(NEW_MODEL, data, settings(tmp_path / "run", learning_rate=0.0, early_stopping_patience=1))
    assert result.metrics["epochs"] == 2


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_accumulation_changes_neither_loss_nor_gradient(corpus, tmp_path, gene_space):
    opened = open_corpus(corpus)

    def step(batch_size, accumulation):
        torch.manual_seed(0)
        overrides = [*TINY_MODEL, "hidden_dropout_prob=0", "classifier_dropout=0"]
        model = starting_model(
            ScReformerForCellClassification,
            opened.tokenizer(),
            ModelArguments(gene_space=gene_space, config_overrides=overrides),
            label_names=["alpha", "beta"],
        )
        collator = CellCollator.from_config(model.config, label_column="cell_type", label2id=model.config.label2id)
        trainer = CellTrainer(
            model=model,
            args=settings(
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                learning_rate=0.0,
                logging_steps=1,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
            ),
            train_dataset=opened.dataset,
            data_collator=collator,
            eval_data_collator=collator,
        )
        trainer.train()
        return trainer.state.log_history[0]

    whole = step(8, 1)
    for accumulated in (step(4, 2), step(2, 4)):
        # float32 sums in another order; the bug this guards against is a factor of 2 and 4.
        assert accumulated["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert accumulated["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_finished_run_is_returned_and_other_settings_are_refused(finetuned, corpus):
    data = FineTuningDataArguments(corpus=corpus, **BY_DONOR)
    again = finetune(NEW_MODEL, data, settings(finetuned.output_dir, num_train_epochs=10))
    assert again == finetuned
    with pytest.raises(ValueError, match=r"test_groups: \['human4'\] -> \['human1'\]"):
        finetune(NEW_MODEL, replace(data, test_groups=["human1"]), settings(finetuned.output_dir, num_train_epochs=10))


def test_refuses_a_column_that_the_corpus_lacks(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"label_column: the corpus .* has no column 'lineage'; it has \['cell_id', "):
        finetune(NEW_MODEL, FineTuningDataArguments(corpus=corpus, label_column="lineage"), settings(tmp_path))
    with pytest.raises(ValueError, match=r"group_column: the corpus .* has no column 'plate'"):
        finetune(
            NEW_MODEL,
            FineTuningDataArguments(corpus=corpus, group_column="plate", test_groups=["1"]),
            settings(tmp_path),
        )


def test_refuses_one_label_and_an_empty_validation(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"has the labels \['beta'\] in training; two are needed"):
        finetune(NEW_MODEL, FineTuningDataArguments(corpus=corpus, exclude_labels=["alpha"]), settings(tmp_path))
    with pytest.raises(ValueError, match="validation_fraction=0 leaves no cells to choose the best epoch by"):
        finetune(NEW_MODEL, FineTuningDataArguments(corpus=corpus, validation_fraction=0.0), settings(tmp_path))


def test_cells_of_several_files_with_the_same_ids_get_their_files_names(tmp_path):
    from screformer.tokenization.corpus import build_corpus

    for name, seed in (("a", 0), ("b", 1)):
        make_cells(num_cells=8, seed=seed).write_h5ad(tmp_path / f"{name}.h5ad")
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    corpus = build_corpus(paths, tmp_path / "corpus", tokenizer=make_tokenizer(), cells_per_shard=5)
    names = name_cells(corpus)
    assert len(set(names.tolist())) == 16
    assert (names[0], names[7], names[8]) == ("a.h5ad/cell0", "a.h5ad/cell7", "b.h5ad/cell0")


def test_refuses_a_file_that_has_a_cell_id_twice(tmp_path):
    cells = make_cells(num_cells=8)
    cells.obs_names = ["twice"] * 2 + [f"cell{number}" for number in range(6)]
    corpus = open_corpus(make_corpus(tmp_path, cells=cells))
    with pytest.raises(ValueError, match="a file has the same cell id twice"):
        name_cells(corpus)


def test_command_line_fine_tunes(corpus, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"corpus: {corpus}\ngroup_column: donor\ntest_groups: [human4]\nnum_train_epochs: 1\nuse_cpu: true\n"
        f"disable_tqdm: true\noutput_dir: {tmp_path / 'run'}\nconfig_overrides: {json.dumps(TINY_MODEL)}\n"
    )
    main([str(tmp_path / "run.yaml"), "--gene_dropout", "0.1"])
    record = read(tmp_path / "run", "training.json")
    assert record["cells"]["gene_dropout"] == 0.1
    assert record["training"]["gradient_accumulation_steps"] == 60


def test_command_line_ends_with_a_message_where_a_column_is_missing(corpus, tmp_path):
    with pytest.raises(SystemExit, match="error: label_column: the corpus"):
        main(["--corpus", corpus, "--label_column", "lineage", "--output_dir", str(tmp_path), "--use_cpu"])
