"""Options that both trainings share: schedule, bfloat16 without a GPU, determinism, and resuming with them."""

import json
import math

import pytest
import torch
from learning_options import MODEL, interrupt, make_classifier_trainer, settings
from safetensors.torch import load_file
from seeing_trainer import make_trainer
from small_corpus import make_corpus

from screformer.train import finetune as finetune_module
from screformer.train.arguments import (
    FineTuningArguments,
    FineTuningDataArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)
from screformer.train.finetune import finetune
from screformer.train.pretrain import pretrain

NEW_MODEL = ModelArguments(config_overrides=MODEL)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def test_the_cosine_schedule_warms_up_and_falls_to_zero(corpus, tmp_path):
    trainer = make_trainer(
        corpus, tmp_path, max_steps=20, logging_steps=1, learning_rate=1e-2, lr_scheduler_type="cosine"
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    warm_up = [0, 0.5]
    cosine = [(1 + math.cos(math.pi * step / 18)) / 2 for step in range(18)]
    assert rates == pytest.approx([1e-2 * factor for factor in (*warm_up, *cosine)])


# bfloat16


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there the accelerator takes it")
@pytest.mark.parametrize("arguments", [PretrainingArguments, FineTuningArguments])
def test_bfloat16_without_an_accelerator_is_the_cpus_and_said(arguments, caplog):
    caplog.set_level("INFO", logger="screformer")
    training = arguments(bf16=True)
    assert (training.use_cpu, training.bf16, training.device.type) == (True, True, "cpu")
    assert "bf16 on the CPU, as there is no accelerator" in caplog.text
    assert arguments().use_cpu is False


def test_bfloat16_on_the_cpu_computes_in_it_and_keeps_the_weights(corpus, tmp_path):
    losses = []
    for bf16 in (False, True):
        training = settings(
            tmp_path / str(bf16), bf16=bf16, learning_rate=0.0, max_steps=1, logging_steps=1, eval_strategy="no",
            save_strategy="no", load_best_model_at_end=False,
        )  # fmt: skip
        trainer = make_classifier_trainer(corpus, training)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    # bfloat16 has 8 bits: near, but not the same.
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


# Determinism


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_full_determinism_is_switched_on_before_the_model_is_made(corpus, tmp_path, task, restored_determinism):
    options = {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "full_determinism": True, "freeze": "embeddings"}
    weights = []
    for number in range(2):
        torch.use_deterministic_algorithms(False)
        output = str(tmp_path / str(number))
        if task == "pretrain":
            training = PretrainingArguments(output_dir=output, **options)
            result = pretrain(NEW_MODEL, PretrainingDataArguments(corpus=corpus), training)
        else:
            training = FineTuningArguments(output_dir=output, gradient_accumulation_steps=1, **options)
            result = finetune(NEW_MODEL, FineTuningDataArguments(corpus=corpus), training)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        weights.append((result.output_dir / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    record = json.loads((result.output_dir / "training.json").read_text())["training"]
    assert (record["full_determinism"], record["freeze"]) == (True, "embeddings")


def test_seeds_are_set_either_way(restored_determinism):
    from screformer.train.training_run import set_seeds

    drawn = []
    for deterministic in (False, True, False):
        set_seeds(FineTuningArguments(use_cpu=True, full_determinism=deterministic, seed=5))
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] == drawn[2]


# Resuming


def test_an_interrupted_run_goes_on_with_its_options_and_refuses_others(corpus, tmp_path, monkeypatch):
    data = FineTuningDataArguments(corpus=corpus)
    options = {
        "layer_lr_decay": 0.5, "freeze": "embeddings", "class_weights": "balanced", "label_smoothing_factor": 0.1,
        "lr_scheduler_type": "cosine", "load_best_model_at_end": False, "early_stopping_patience": 0,
    }  # fmt: skip
    unbroken = finetune(NEW_MODEL, data, settings(tmp_path / "unbroken", **options))
    with monkeypatch.context() as patch:
        interrupt(patch, finetune_module)
        with pytest.raises(KeyboardInterrupt):
            finetune(NEW_MODEL, data, settings(tmp_path / "run", **options))
    for name, value in {
        "layer_lr_decay": 0.9,
        "freeze": "none",
        "class_weights": "none",
        "label_smoothing_factor": 0.0,
        "lr_scheduler_type": "linear",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "full_determinism": True,
    }.items():
        with pytest.raises(ValueError, match=rf"holds a run with other settings \({name}: "):
            finetune(NEW_MODEL, data, settings(tmp_path / "run", **{**options, name: value}))
    resumed = finetune(NEW_MODEL, data, settings(tmp_path / "run", **options))
    assert resumed.metrics["steps"] == unbroken.metrics["steps"] == 12
    found, expected = (load_file(result.output_dir / "model.safetensors") for result in (resumed, unbroken))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
