"""``batch_size="auto"`` chooses by memory alone, says so, and leaves results and steps as they are."""

import logging

import anndata
import numpy as np
import pytest
import torch
from small_corpus import NUM_GENES, TINY_MODEL, make_cells, make_corpus, make_tokenizer
from typer.testing import CliRunner

from screformer import ScReformerForCellClassification, ScReformerForMaskedLM, ScReformerModel
from screformer.annotation import annotate_file, embed_file
from screformer.cli import app
from screformer.tokenization.corpus import open_corpus
from screformer.train import batch_size as batch_size_module
from screformer.train import memory as memory_module
from screformer.train.argument_parser import parse_arguments
from screformer.train.arguments import (
    FineTuningArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)
from screformer.train.batch_size import (
    check_batch_size,
    choose_inference_batch_size,
    fit_training_batch_size,
    longest_cell,
    read_batch_size,
    tokens_of,
)
from screformer.train.cell_dataset import CellDataset
from screformer.train.inference import BatchInference, predict_logits
from screformer.train.memory import USED_SHARE, largest_batch_size, predict_memory
from screformer.train.pretrain import pretrain
from screformer.train.result_files import read_json


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path)


@pytest.fixture
def model(tiny_config):
    return ScReformerForCellClassification(tiny_config(num_genes=NUM_GENES))


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    tokenizer = make_tokenizer()
    config = tiny_config(num_genes=NUM_GENES, tokenizer_fingerprint=tokenizer.fingerprint)
    ScReformerForCellClassification(config).save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "checkpoint"


@pytest.fixture
def give_memory(monkeypatch):
    """Return a function that sets how many bytes are free."""

    def give(available):
        for module in (memory_module, batch_size_module):
            monkeypatch.setattr(module, "available_memory", lambda device: available)

    return give


def enough_for(model, batch_size, *, training, num_tokens=NUM_GENES):
    """Return free bytes that hold this many cells and no more."""
    options = {"num_tokens": num_tokens, "training": training, "head": batch_size_module._head_of(model)}
    choice = largest_batch_size(model.config, available=10**12, most=batch_size, **options)
    return int(choice.needed / USED_SHARE) + 1


def training_arguments(tmp_path, kind=FineTuningArguments, **options):
    return kind(output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **options)


def test_what_a_batch_size_may_be():
    for batch_size in (1, 256, "auto"):
        check_batch_size(batch_size)
    assert (read_batch_size("12"), read_batch_size("auto")) == (12, "auto")
    with pytest.raises(ValueError, match="batch_size must be a number or 'auto', got 'large'"):
        read_batch_size("large")
    with pytest.raises(ValueError, match="batch_size must be a number or 'auto', got '-3'"):
        read_batch_size("-3")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        read_batch_size("0")


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_inference_takes_as_many_cells_as_fit_and_says_so(model, give_memory, caplog, batch_size):
    give_memory(enough_for(model, batch_size, training=False))
    with caplog.at_level(logging.INFO, logger="screformer"):
        assert choose_inference_batch_size(model, num_tokens=NUM_GENES).batch_size == batch_size
    assert f'batch size "auto": {batch_size} cells at once: they need' in caplog.text


def test_expressed_cells_are_as_long_as_the_longest_and_full_ones_have_every_gene(model, corpus):
    rows = open_corpus(corpus).dataset
    longest = max(len(row["gene_ids"]) for row in rows)
    assert longest_cell(rows) == longest_cell(list(rows)) == longest_cell(CellDataset(open_corpus(corpus))) == longest
    assert longest_cell(rows.select([0, 1])) >= longest_cell(list(rows.select([0, 1])))
    assert longest_cell([]) == 1
    assert tokens_of(model.config, "full", 5) == NUM_GENES
    assert tokens_of(model.config, "expressed", 5) == 5
    assert tokens_of(model.config, "expressed", 5000) == NUM_GENES


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_predictions_are_those_of_any_batch_size(model, corpus, give_memory, gene_space):
    rows = open_corpus(corpus).dataset
    num_tokens = tokens_of(model.config, gene_space, longest_cell(rows))
    give_memory(enough_for(model, 5, training=False, num_tokens=num_tokens))
    advanced = []
    inference = BatchInference(model, "logits", batch_size="auto", gene_space=gene_space)
    chosen = inference(rows, advance=advanced.append)
    assert max(advanced) == inference.batch_size == 5
    expected = predict_logits(model, rows, gene_space=gene_space, progress=False)
    np.testing.assert_allclose(chosen, expected, atol=1e-5)


def test_files_are_annotated_and_embedded_by_a_batch_size_chosen_once(checkpoint, tmp_path, give_memory, caplog):
    give_memory(10**9)
    options = {"progress": False, "overwrite": True}
    with caplog.at_level(logging.INFO, logger="screformer"):
        annotate_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "auto.h5ad", batch_size="auto", **options)
        embed_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "vectors.h5ad", batch_size="auto", **options)
    assert caplog.text.count('batch size "auto": ') == 2
    annotate_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "seven.h5ad", batch_size=7, **options)
    auto, seven = (anndata.read_h5ad(tmp_path / name) for name in ("auto.h5ad", "seven.h5ad"))
    np.testing.assert_allclose(auto.obsm["screformer_probabilities"], seven.obsm["screformer_probabilities"], atol=1e-5)


def test_nothing_is_written_where_not_even_one_cell_fits(checkpoint, tmp_path, give_memory):
    give_memory(1000)
    with pytest.raises(ValueError, match="batch_size 'auto': not even one cell of 40 tokens fits on cpu"):
        annotate_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "out.h5ad", batch_size="auto", progress=False)
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize("command", ["annotate", "embed"])
def test_command_lines_take_auto_and_name_what_is_wrong(checkpoint, tmp_path, command):
    arguments = [command, str(tmp_path / "cells.h5ad"), "--model", str(checkpoint), "-o", str(tmp_path / "out.h5ad")]
    refused = CliRunner().invoke(app, [*arguments, "--batch-size", "many"])
    assert refused.exit_code == 1
    assert "error: batch_size must be a number or 'auto', got 'many'" in refused.output
    assert CliRunner().invoke(app, [*arguments, "--batch-size", "auto"]).exit_code == 0
    assert (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize(("fits", "expected"), [(1, (1, 360)), (7, (6, 60)), (11, (10, 36)), (100, (90, 4))], ids=str)
def test_training_keeps_the_cells_of_a_step(model, tmp_path, give_memory, caplog, fits, expected):
    give_memory(enough_for(model, fits, training=True))
    training = training_arguments(tmp_path, batch_size="auto")
    with caplog.at_level(logging.INFO, logger="screformer"):
        chosen = fit_training_batch_size(training, model, longest=NUM_GENES)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == expected
    assert chosen["batch"]["per_device_train_batch_size"] == expected[0]
    assert f"360 cells a step are {expected[1]} batches of {expected[0]}; " in caplog.text
    assert 1 <= training.per_device_eval_batch_size <= 32


def test_training_without_auto_is_left_alone(model, tmp_path, give_memory):
    give_memory(1)
    training = training_arguments(tmp_path)
    assert fit_training_batch_size(training, model, longest=NUM_GENES) == {}
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (6, 60)


def test_half_precision_and_other_heads_are_what_is_predicted_for(tiny_config, tmp_path, give_memory, monkeypatch):
    asked = []

    def note(config, **options):
        asked.append((options["training"], options["dtype"], options["head"], options["num_tokens"]))
        return predict_memory(config, **options)

    monkeypatch.setattr(memory_module, "predict_memory", note)
    give_memory(10**9)
    training = training_arguments(tmp_path, PretrainingArguments, batch_size="auto", bf16=True)
    config = tiny_config(num_genes=NUM_GENES, gene_space="expressed")
    fit_training_batch_size(training, ScReformerForMaskedLM(config), longest=20)
    assert set(asked) == {(True, "bfloat16", "masked_lm", 20), (False, "bfloat16", "masked_lm", 20)}
    asked.clear()
    choose_inference_batch_size(ScReformerModel(config), num_tokens=20)
    assert set(asked) == {(False, "float32", None, 20)}


def test_processes_share_the_memory_and_agree(model, tmp_path, give_memory, monkeypatch):
    give_memory(2 * enough_for(model, 10, training=True))
    training = training_arguments(tmp_path, batch_size="auto")
    monkeypatch.setattr(type(training), "world_size", 2)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda choices: [*choices, (8, 3)])
    fit_training_batch_size(training, model, longest=NUM_GENES)
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (8, 45)
    assert training.per_device_eval_batch_size == 3


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_run_keeps_its_settings_and_records_what_was_chosen(corpus, tmp_path, give_memory):
    def run(available):
        give_memory(available)
        training = training_arguments(
            tmp_path, PretrainingArguments, batch_size="auto", per_device_train_batch_size=12, max_steps=2
        )
        model_arguments = ModelArguments(config_overrides=TINY_MODEL)
        return pretrain(model_arguments, PretrainingDataArguments(corpus=corpus), training)

    result = run(10**9)
    record = read_json(result.output_dir / "training.json")
    assert record["training"]["batch_size"] == "auto"
    assert record["training"]["per_device_train_batch_size"] == 12  # what was asked for
    chosen = record["batch"]
    assert chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"] == 12
    assert chosen["available_bytes"] == 10**9
    # The same run on a machine with less memory is not another run.
    assert run(10**7).metrics == result.metrics


def test_training_arguments_take_auto_alone(capsys):
    def parse(*argv):
        (training,) = parse_arguments(
            [FineTuningArguments], [*argv, "--use_cpu"], program="finetune", description="", example=""
        )
        return training

    assert parse().batch_size is None
    assert parse("--batch_size", "auto").batch_size == parse("--batch-size", "auto").batch_size == "auto"
    with pytest.raises(SystemExit):
        parse("--batch_size", "12")
    assert "'auto'" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"batch_size got 12; 'auto' is allowed\. A number .* per_device_train_batch_size"
    ):
        FineTuningArguments(batch_size=12, use_cpu=True)


def test_a_model_on_another_device_has_no_known_memory(model):
    with pytest.raises(ValueError, match="free memory is known of 'cpu' and 'cuda'"):
        choose_inference_batch_size(model.to(torch.device("meta")), num_tokens=NUM_GENES)
