"""Two processes learn what one learns from the same cells: step by step the same loss, at the end the same weights."""

import json

import pytest
import torch
from small_corpus import TINY_MODEL, make_cells, make_corpus
from training_processes import Change, read_run, run
from transformers import AutoModelForMaskedLM

# Where there are no buckets, rounding cannot move a token to another one.
SMOOTH = [*TINY_MODEL, "num_hidden_layers=2", "attention=exact", "hidden_dropout_prob=0", "classifier_dropout=0"]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), cells=make_cells(45))


def arguments(corpus, output, *, batch_size, **options):
    # SGD, because Adam makes steps out of the rounding of gradients that are 0. 41 cells of training: a sixth step of
    # one cell, which leaves the second process without.
    given = {
        "corpus": corpus, "output_dir": output, "gene_space": "expressed", "num_train_epochs": 2, "disable_tqdm": True,
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 1, "optim": "sgd",
        "learning_rate": 0.1, "logging_steps": 1, "early_stopping_patience": 0, **options,
    }  # fmt: skip
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [*flags, "--use_cpu", "--config_overrides", *SMOOTH]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Return what one process learns in pretraining."""
    folder = tmp_path_factory.mktemp("alone")
    assert run("pretrain", arguments(corpus, folder / "run", batch_size=8)) == [0]
    return read_run(folder / "run")


def assert_same(found, expected):
    history, metrics, weights = found
    expected_history, expected_metrics, expected_weights = expected
    assert [entry["step"] for entry in history] == [entry["step"] for entry in expected_history]
    for entry, other in zip(history, expected_history, strict=True):
        # The Trainer counts epochs in batches. Else: float32 sums in another order.
        assert {**entry, "epoch": other["epoch"]} == pytest.approx(other, rel=1e-4)
    assert metrics == pytest.approx(expected_metrics, rel=1e-4)
    assert set(weights) == set(expected_weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], atol=1e-5, rtol=1e-4)


def how(folder):
    return json.loads(folder.with_name(f"{folder.name}.how.json").read_text())


@pytest.mark.parametrize("strategy", ["random", pytest.param("group_by_length", marks=pytest.mark.slow)])
def test_two_processes_pretrain_as_one_does(corpus, alone, tmp_path, strategy):
    options = {"train_sampling_strategy": strategy}
    if strategy != "random":
        assert run("pretrain", arguments(corpus, tmp_path / "alone", batch_size=8, **options)) == [0]
        alone = read_run(tmp_path / "alone")
    given = arguments(corpus, tmp_path / "run", batch_size=4, **options)
    assert run("pretrain", given, num_processes=2) == [0, 0]
    assert "DistributedDataParallel" in how(tmp_path / "run")["model"]
    losses = [entry["loss"] for entry in alone[0] if "loss" in entry]
    assert len(losses) == 12
    assert len(set(losses)) == 12
    assert_same(read_run(tmp_path / "run"), alone)


def test_two_processes_fine_tune_as_one_does_with_frozen_and_accumulated_parts(corpus, tmp_path):
    frozen = Change(frozen="embeddings")
    assert run("finetune", arguments(corpus, tmp_path / "alone", batch_size=8), change=frozen) == [0]
    given = arguments(corpus, tmp_path / "run", batch_size=2, gradient_accumulation_steps=2)
    assert run("finetune", given, num_processes=2, change=frozen) == [0, 0]
    assert_same(read_run(tmp_path / "run"), read_run(tmp_path / "alone"))


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", pytest.param("SHARDED_STATE_DICT", marks=pytest.mark.slow)])
def test_fsdp_learns_the_same_and_leaves_an_ordinary_checkpoint(corpus, alone, tmp_path, kind):
    change = Change(environment={**FSDP, "FSDP_STATE_DICT_TYPE": kind})
    output = tmp_path / "run"
    assert run("pretrain", arguments(corpus, output, batch_size=4), num_processes=2, change=change) == [0, 0]
    assert how(output)["parameters"] == ["DTensor"]
    assert_same(read_run(output), alone)
    model = AutoModelForMaskedLM.from_pretrained(output)
    assert type(model).__name__ == "ScReformerForMaskedLM"
    assert model.config.architectures == ["ScReformerForMaskedLM"]
    names = [path.name for path in output.rglob("*")]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".distcp"))]
    assert "modeling_screformer.py" in names


def test_another_number_of_processes_is_another_run(corpus, tmp_path):
    assert run("pretrain", arguments(corpus, tmp_path / "run", batch_size=4, max_steps=1)) == [0]
    record = json.loads((tmp_path / "run/training.json").read_text())
    assert record["num_processes"] == 1
    assert run("pretrain", arguments(corpus, tmp_path / "run", batch_size=4, max_steps=1), num_processes=2)[0] == 1
