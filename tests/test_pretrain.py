import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_corpus import TINY_MODEL, make_cells, make_corpus, make_tokenizer
from transformers import AutoModelForMaskedLM, AutoTokenizer, TrainerCallback

from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train import pretrain as pretrain_module
from screformer.train.arguments import ModelArguments, PretrainingArguments, PretrainingDataArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import CellCollator
from screformer.train.pretrain import main, pretrain
from screformer.train.result_files import finite
from screformer.train.sampler import BatchOfCells
from screformer.train.training_run import CellTrainer, early_stopping

NEW_MODEL = ModelArguments(config_overrides=TINY_MODEL)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def settings(output, **overrides):
    defaults = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    return PretrainingArguments(output_dir=str(output), use_cpu=True, disable_tqdm=True, **{**defaults, **overrides})


@pytest.fixture(scope="module")
def pretrained(corpus, tmp_path_factory):
    """Return the result of one finished run of 12 epochs."""
    output = tmp_path_factory.mktemp("run") / "pretrained"
    return pretrain(NEW_MODEL, PretrainingDataArguments(corpus=corpus), settings(output, num_train_epochs=12))


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_output_is_a_full_checkpoint(pretrained, corpus):
    model = AutoModelForMaskedLM.from_pretrained(pretrained.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(pretrained.output_dir)
    assert isinstance(model, ScReformerForMaskedLM)
    assert model.config.tokenizer_fingerprint == tokenizer.fingerprint == open_corpus(corpus).tokenizer().fingerprint
    names = {path.name for path in pretrained.output_dir.iterdir()}
    assert {"modeling_screformer.py", "tokenization_screformer.py", "lsh_attention.py", "genes.json"} <= names


def test_output_has_the_results_and_no_pickle(pretrained):
    names = {path.name for path in pretrained.output_dir.rglob("*")}
    assert {"metrics.json", "log_history.json", "training_curves.png", "training.json"} <= names
    assert {"masked_genes.png", "resources.json", "resources.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [name for name in names if name.startswith("checkpoint-")]


def test_the_record_says_how_the_checkpoint_was_made(pretrained, corpus):
    record = read(pretrained.output_dir, "training.json")
    assert record["state"] == "finished"
    assert record["training"]["seed"] == 2022
    assert record["model"]["config_overrides"] == TINY_MODEL
    assert record["corpus"]["num_cells"] == 48
    assert record["corpus"]["sources"][0]["name"] == "cells.h5ad"
    assert {"torch", "transformers", "screformer", "python"} <= set(record["versions"])


def test_held_out_loss_falls_and_accuracy_stands_beside_the_commonest_bin(pretrained):
    history = read(pretrained.output_dir, "log_history.json")
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    metrics = pretrained.metrics
    assert metrics == read(pretrained.output_dir, "metrics.json")
    assert metrics["held_out_loss"] == pytest.approx(min(losses), rel=1e-4)
    assert metrics["held_out_loss"] < 0.5 * losses[0]
    # Which genes are high follows from the other genes, so the model can do better than one answer for all.
    assert metrics["held_out_masked_accuracy"] >= metrics["held_out_majority_bin_accuracy"] > 0
    assert metrics["held_out_majority_bin_share"] < 1
    assert metrics["held_out_masked_accuracy"] >= metrics["held_out_gene_majority_accuracy"] > 0
    assert metrics["held_out_masked_loss"] < metrics["held_out_gene_frequency_loss"]
    by_bin = metrics["held_out_by_bin"]
    assert [row["bin"] for row in by_bin] == [1, 2, 3, 4, 5]
    assert sum(row["num_masked_genes"] for row in by_bin) == metrics["held_out_num_masked_genes"]


def test_held_out_cells_are_never_trained_on_and_masked_the_same_every_time(corpus, tmp_path):
    model = pretrain_module.starting_model(ScReformerForMaskedLM, open_corpus(corpus).tokenizer(), NEW_MODEL)
    data = PretrainingDataArguments(corpus=corpus)
    trainer = pretrain_module._make_trainer(model, open_corpus(corpus), data, settings(tmp_path))
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (43, 5)
    training, held_out = (
        {str(row["input_ids"]) for row in rows} for rows in (trainer.train_dataset, trainer.eval_dataset)
    )
    assert not training & held_out
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    collator, cells = trainer.data_collator, trainer.train_dataset
    first, again = (
        collator(cells.__getitems__(BatchOfCells(range(8), epoch=epoch, num_counted=8)))["labels"] for epoch in (0, 1)
    )
    assert not torch.equal(first, again)


def seen_cells(corpus, tmp_path, monkeypatch, **data):
    """Return the donors of all cells that a run's trainer was given."""
    given = {}

    def keep(trainer, *_, **__):
        given["rows"] = [trainer.train_dataset[i]["gene_ids"].tolist() for i in range(len(trainer.train_dataset))]
        given["rows"] += [trainer.eval_dataset[i]["gene_ids"].tolist() for i in range(len(trainer.eval_dataset))]
        raise KeyboardInterrupt

    monkeypatch.setattr(CellTrainer, "train", keep)
    with pytest.raises(KeyboardInterrupt):
        pretrain(NEW_MODEL, PretrainingDataArguments(corpus=corpus, **data), settings(tmp_path / "out"))
    return given["rows"]


def test_excluded_groups_are_neither_trained_on_nor_held_out(corpus, tmp_path, monkeypatch):
    rows = seen_cells(corpus, tmp_path, monkeypatch, group_column="donor", exclude_groups=["human1", "human4"])
    dataset = open_corpus(corpus).dataset
    kept = [row["gene_ids"] for row in dataset if row["donor"] in ("human2", "human3")]
    assert len(kept) == 24
    assert sorted(rows) == sorted(kept)


def test_cells_that_may_be_of_an_excluded_group_are_left_out(tmp_path, caplog):
    cells = make_cells()
    donors = cells.obs["donor"].astype(object)
    donors.iloc[:5] = np.nan
    cells.obs["donor"] = donors
    corpus = open_corpus(make_corpus(tmp_path, cells=cells))
    data = PretrainingDataArguments(corpus=str(corpus.folder), group_column="donor", exclude_groups=["human4"])
    rows = np.sort(np.concatenate(pretrain_module._split_cells(corpus, data, 0)))
    assert rows.tolist() == [row for row, donor in enumerate(donors) if donor != "human4" and row >= 5]
    assert "5 cells have no value in column 'donor' and are left out" in caplog.text


def test_an_unknown_group_to_exclude_is_named(corpus, tmp_path):
    data = PretrainingDataArguments(corpus=corpus, group_column="donor", exclude_groups=["human5"])
    with pytest.raises(ValueError, match=r"exclude_groups has \['human5'\]; the groups of column 'donor' are"):
        pretrain(NEW_MODEL, data, settings(tmp_path / "out"))


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_accumulation_changes_neither_loss_nor_gradient(corpus, tmp_path, gene_space):
    def step(batch_size, accumulation):
        torch.manual_seed(0)
        model = pretrain_module.starting_model(
            ScReformerForMaskedLM,
            open_corpus(corpus).tokenizer(),
            replace(NEW_MODEL, gene_space=gene_space, config_overrides=[*TINY_MODEL, "hidden_dropout_prob=0"]),
        )
        collator = CellCollator.from_config(model.config, masked_fraction=0.15)
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
            train_dataset=CellDataset(open_corpus(corpus)),
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


def test_an_interrupted_run_is_resumed_where_it_was(corpus, tmp_path, monkeypatch, caplog):
    class Interrupt(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch >= 2:
                raise KeyboardInterrupt

    data = PretrainingDataArguments(corpus=corpus)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_module, "early_stopping", lambda training: [*early_stopping(training), Interrupt()])
        with pytest.raises(KeyboardInterrupt):
            pretrain(NEW_MODEL, data, settings(tmp_path / "run"))
    assert read(tmp_path / "run", "training.json")["state"] == "running"
    with caplog.at_level(logging.INFO, logger="screformer"):
        result = pretrain(NEW_MODEL, data, settings(tmp_path / "run"))
    assert "resuming from" in caplog.text
    assert "checkpoint-12" in caplog.text
    assert "--overwrite" in caplog.text
    assert (result.metrics["steps"], result.metrics["epochs"]) == (18, 3)
    epochs = [entry["epoch"] for entry in read(result.output_dir, "log_history.json") if "eval_loss" in entry]
    assert epochs == [1, 2, 3]


def test_a_finished_run_is_returned_without_training(pretrained, corpus, caplog):
    weights = pretrained.output_dir / "model.safetensors"
    written = weights.stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="screformer"):
        again = pretrain(
            NEW_MODEL, PretrainingDataArguments(corpus=corpus), settings(pretrained.output_dir, num_train_epochs=12)
        )
    assert again == pretrained
    assert weights.stat().st_mtime_ns == written
    assert "finished; nothing to do" in caplog.text


def test_other_settings_are_refused_in_a_used_folder_and_overwrite_starts_over(corpus, tmp_path):
    data, output = PretrainingDataArguments(corpus=corpus), tmp_path / "run"
    first = pretrain(NEW_MODEL, data, settings(output, num_train_epochs=1))
    with pytest.raises(ValueError, match=r"other settings \(learning_rate: 0.01 -> 0.02\).*--overwrite"):
        pretrain(NEW_MODEL, data, settings(output, num_train_epochs=1, learning_rate=2e-2))
    with pytest.raises(ValueError, match=r"masked_fraction: 0.15 -> 0.3"):
        pretrain(NEW_MODEL, replace(data, masked_fraction=0.3), settings(output, num_train_epochs=1))
    again = pretrain(NEW_MODEL, data, settings(output, num_train_epochs=1, learning_rate=2e-2, overwrite=True))
    assert again.metrics["held_out_loss"] != first.metrics["held_out_loss"]


def test_a_run_that_failed_at_once_does_not_block_its_folder(corpus, tmp_path):
    data = PretrainingDataArguments(corpus=corpus)
    with pytest.raises(ValueError, match=r"fraction=0\.001 of 48 cells holds out 0"):
        pretrain(NEW_MODEL, replace(data, held_out_fraction=0.001), settings(tmp_path / "run"))
    assert pretrain(NEW_MODEL, data, settings(tmp_path / "run", num_train_epochs=1)).metrics["steps"] == 6


def test_patience_stops_and_zero_never_does(corpus, tmp_path):
    data = PretrainingDataArguments(corpus=corpus)
    still = {"learning_rate": 0.0, "num_train_epochs": 4}
    stopped = pretrain(NEW_MODEL, data, settings(tmp_path / "a", early_stopping_patience=1, **still))
    went_on = pretrain(NEW_MODEL, data, settings(tmp_path / "b", early_stopping_patience=0, **still))
    assert (stopped.metrics["epochs"], went_on.metrics["epochs"]) == (2, 4)


def test_training_without_evaluations_runs_to_its_end(corpus, tmp_path):
    unwatched = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    result = pretrain(NEW_MODEL, PretrainingDataArguments(corpus=corpus), settings(tmp_path, max_steps=2, **unwatched))
    assert result.metrics["steps"] == 2
    assert result.metrics["held_out_loss"] > 0


def test_the_same_seed_gives_the_same_weights(corpus, tmp_path):
    data = PretrainingDataArguments(corpus=corpus)
    runs = [pretrain(NEW_MODEL, data, settings(tmp_path / name, num_train_epochs=1)).output_dir for name in ("a", "b")]
    first, second = ((run / "model.safetensors").read_bytes() for run in runs)
    assert first == second


def test_pretraining_goes_on_from_a_checkpoint(pretrained, corpus, tmp_path):
    result = pretrain(
        ModelArguments(checkpoint=str(pretrained.output_dir)),
        PretrainingDataArguments(corpus=corpus),
        settings(tmp_path / "more", num_train_epochs=1, learning_rate=0.0),
    )
    assert result.metrics["held_out_loss"] == pytest.approx(pretrained.metrics["held_out_loss"], rel=1e-4)


def test_refuses_a_checkpoint_of_another_tokenizer(pretrained, tmp_path):
    other = make_corpus(tmp_path, num_bins=8)
    with pytest.raises(ValueError, match=r"40 genes, 6 bins\), but the corpus was made with .*40 genes, 8 bins"):
        pretrain(
            ModelArguments(checkpoint=str(pretrained.output_dir)),
            PretrainingDataArguments(corpus=other),
            settings(tmp_path / "run"),
        )


def test_a_checkpoint_without_fingerprint_passes_with_a_warning_if_its_sizes_fit(pretrained, tmp_path, caplog):
    model = ScReformerForMaskedLM.from_pretrained(pretrained.output_dir)
    model.config.tokenizer_fingerprint = None
    model.save_pretrained(tmp_path / "nameless")
    arguments = ModelArguments(checkpoint=str(tmp_path / "nameless"))
    tokenizer = make_tokenizer()
    started = pretrain_module.starting_model(ScReformerForMaskedLM, tokenizer, arguments)
    assert "does not say which tokenizer" in caplog.text
    assert started.config.tokenizer_fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="was trained with tokenizer None"):
        pretrain_module.starting_model(ScReformerForMaskedLM, make_tokenizer(num_bins=8), arguments)


def test_refuses_overrides_that_are_no_field_of_the_config():
    for name in ("hiden_size", "num_genes"):
        with pytest.raises(ValueError, match=rf"config_overrides has \['{name}'\]"):
            pretrain_module.starting_model(
                ScReformerForMaskedLM, make_tokenizer(), ModelArguments(config_overrides=[f"{name}=8"])
            )


def test_a_diverged_loss_is_null_in_json():
    assert finite({"loss": [float("nan"), torch.tensor(1.5)], "name": "x"}) == {
        "loss": [None, 1.5],
        "name": "x",
    }


def test_command_line_trains(corpus, tmp_path):
    main(
        ["--corpus", corpus, "--config_overrides", *TINY_MODEL, "--gene_space", "expressed", "--num_train_epochs", "1",
         "--output_dir", str(tmp_path / "run"), "--use_cpu", "--disable_tqdm", "True"]
    )  # fmt: skip
    assert read(tmp_path / "run", "config.json")["gene_space"] == "expressed"
    assert read(tmp_path / "run", "training.json")["state"] == "finished"


def test_command_line_ends_with_a_message_where_something_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*is not a corpus"):
        main(["--corpus", str(tmp_path / "absent"), "--output_dir", str(tmp_path / "run"), "--use_cpu"])
