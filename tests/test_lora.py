"""Adapters learn in reversible layers as in plain ones, and leave an ordinary checkpoint with the adapter beside it."""

import json
import shutil
import sys

import anndata
import pytest
import torch
from learning_options import MODEL, interrupt, make_uneven_cells, settings
from safetensors.torch import load_file
from small_corpus import make_corpus
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from screformer.annotation.annotate import annotate_file
from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train import finetune as finetune_module
from screformer.train.arguments import (
    FineTuningDataArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)
from screformer.train.evaluate import evaluate_checkpoint
from screformer.train.finetune import finetune
from screformer.train.lora import LORA_TARGETS, add_adapters, check_not_sharded, has_adapters
from screformer.train.pretrain import pretrain
from screformer.train.starting_model import starting_model
from screformer.train.trainable import choose_trainable

peft = pytest.importorskip("peft")
# peft asks transformers for it by a name that transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BY_DONOR = {"group_column": "donor", "test_groups": ["human4"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), cells=make_uneven_cells())


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """Return the folder of a masked-bin model, as pretraining leaves one."""
    torch.manual_seed(3)
    model = starting_model(
        ScReformerForMaskedLM, open_corpus(corpus).tokenizer(), ModelArguments(config_overrides=MODEL)
    )
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    open_corpus(corpus).tokenizer().save_pretrained(folder)
    return str(folder)


def with_adapters(base, **options):
    return ModelArguments(checkpoint=base, lora_rank=4, lora_dropout=0.1, **options)


@pytest.fixture(scope="module")
def tuned(corpus, base, tmp_path_factory):
    """Return the folder of a finished fine-tuning by adapters."""
    training = settings(tmp_path_factory.mktemp("tuned") / "run")
    return finetune(with_adapters(base), FineTuningDataArguments(corpus=corpus, **BY_DONOR), training).output_dir


def classifier_of(base, tmp_path=None):
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)


# Gradients


def lora_gradients(base, model_class, *, reversible):
    model = model_class.from_pretrained(base).double()
    model.config.reversible = reversible
    torch.manual_seed(5)
    adapted = add_adapters(model, with_adapters(base))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at the start, and then A has no gradient
            torch.nn.init.normal_(parameter, std=0.3)
    cells = torch.randint(0, 6, (2, 40), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1]) if model_class is ScReformerForCellClassification else cells
    torch.manual_seed(1)  # of the dropout, lora_dropout too
    loss = adapted.train()(input_ids=cells, labels=labels).loss
    loss.backward()
    return loss, {name: each.grad for name, each in adapted.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("model_class", [ScReformerForCellClassification, ScReformerForMaskedLM])
@pytest.mark.filterwarnings("ignore:.*newly initialized.*")
def test_gradients_in_reversible_layers_are_those_of_plain_ones(base, model_class):
    torch.manual_seed(0)
    loss, found = lora_gradients(base, model_class, reversible=True)
    torch.manual_seed(0)
    plain_loss, expected = lora_gradients(base, model_class, reversible=False)
    torch.testing.assert_close(loss, plain_loss)
    adapters = [name for name in found if "lora_" in name]
    assert len(adapters) == 2 * 2 * 5  # A and B, of five projections in two layers
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-11)


# What learns


@pytest.mark.parametrize("model_class", [ScReformerForCellClassification, ScReformerForMaskedLM])
def test_adapters_and_the_whole_head_learn_and_nothing_else(base, model_class):
    head = "classifier" if model_class is ScReformerForCellClassification else "head"
    adapted = add_adapters(model_class.from_pretrained(base), with_adapters(base))
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    others = {name for name in learning if "lora_" not in name}
    heads = {
        name.partition(".")[2] for name, _ in getattr(model_class.from_pretrained(base), head).named_parameters(head)
    }
    assert {name.partition("modules_to_save.default.")[2] for name in others} == heads
    assert has_adapters(adapted)
    assert not has_adapters(model_class.from_pretrained(base))


def test_a_linear_path_that_starts_as_a_regression_stays_it(base):
    model = ScReformerForCellClassification.from_pretrained(base, classifier_paths=["convolution", "linear"])
    model.classifier.linear_path.requires_grad_(False)
    adapted = add_adapters(model, with_adapters(base))
    heads = {name: each for name, each in adapted.named_parameters() if ".modules_to_save." in name}
    assert any("linear_path" in name for name in heads)
    assert {name for name, each in heads.items() if not each.requires_grad} == {
        name for name in heads if "linear_path" in name
    }


@pytest.mark.parametrize("targets", [["value"], ["query_key", "feed_forward"]])
def test_targets_choose_the_projections(base, targets):
    adapted = add_adapters(ScReformerForMaskedLM.from_pretrained(base), with_adapters(base, lora_targets=targets))
    found = {name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name}
    ends = [end for target in targets for end in LORA_TARGETS[target]]
    assert {name.partition("layers.")[2] for name in found} == {f"{layer}.{end}" for layer in (0, 1) for end in ends}


def test_alpha_is_twice_the_rank_unless_given(base):
    for options, expected in (({}, 8), ({"lora_alpha": 3.0}, 3)):
        adapted = add_adapters(ScReformerForMaskedLM.from_pretrained(base), with_adapters(base, **options))
        settings_found = adapted.peft_config["default"]
        assert (settings_found.r, settings_found.lora_alpha, settings_found.lora_dropout) == (4, expected, 0.1)


# What is left behind


def test_the_folder_holds_an_ordinary_checkpoint_and_the_adapter_and_no_pickle(tuned):
    names = {str(path.relative_to(tuned)) for path in tuned.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "genes.json", "modeling_screformer.py", "metrics.json"} <= names
    adapter = {name for name in names if "adapter" in name}
    assert adapter == {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert not [name for name in names if name.startswith("checkpoint-")]
    expected = ScReformerForCellClassification(AutoModelForSequenceClassification.from_pretrained(tuned).config)
    assert load_file(tuned / "model.safetensors").keys() == expected.state_dict().keys()


def test_the_adapter_on_the_base_gives_the_logits_of_the_merged_checkpoint(tuned, base):
    cells = torch.randint(0, 6, (4, 40), generator=torch.Generator().manual_seed(0))
    merged = AutoModelForSequenceClassification.from_pretrained(tuned).eval()
    adapted = peft.PeftModel.from_pretrained(classifier_of(base), tuned / "adapter").eval()
    with torch.no_grad():
        # float32: W x + B A x in one case, (W + B A) x in the other.
        torch.testing.assert_close(adapted(input_ids=cells).logits, merged(cells).logits, rtol=1e-4, atol=1e-5)
        untrained = classifier_of(base).eval()(cells).logits
    assert not torch.allclose(untrained, merged(cells).logits, atol=1e-2)


def test_only_projections_and_head_differ_from_the_base(tuned, base):
    before, after = load_file(f"{base}/model.safetensors"), load_file(tuned / "model.safetensors")
    ends = tuple(f"{end}.weight" for each in LORA_TARGETS.values() for end in each)
    for name in before:
        if name.startswith("screformer."):
            assert torch.equal(before[name], after[name]) != name.endswith(ends), name


def test_the_checkpoint_is_evaluated_and_annotates(tuned, corpus, tmp_path):
    metrics = json.loads((tuned / "metrics.json").read_text())
    history = json.loads((tuned / "log_history.json").read_text())
    best = max(entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry)
    assert metrics["validation_accuracy"] == best > 0.5
    evaluation = evaluate_checkpoint(tuned, corpus, tmp_path / "evaluation", part="validation", batch_size=4)
    assert evaluation["accuracy"] == pytest.approx(best)
    make_uneven_cells().write_h5ad(tmp_path / "cells.h5ad")
    annotate_file(tmp_path / "cells.h5ad", tuned, tmp_path / "annotated.h5ad")
    assert "screformer_cell_type" in anndata.read_h5ad(tmp_path / "annotated.h5ad").obs


def test_starting_over_removes_the_adapter(tuned, corpus, base, tmp_path):
    shutil.copytree(tuned, tmp_path / "run")
    training = settings(tmp_path / "run", max_steps=1, overwrite=True)
    finetune(ModelArguments(checkpoint=base), FineTuningDataArguments(corpus=corpus), training)
    assert not (tmp_path / "run" / "adapter").exists()


def test_pretraining_goes_on_with_adapters(corpus, base, tmp_path):
    training = PretrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, use_cpu=True, disable_tqdm=True
    )
    result = pretrain(with_adapters(base), PretrainingDataArguments(corpus=corpus), training)
    cells = torch.randint(0, 6, (2, 40), generator=torch.Generator().manual_seed(0))
    merged = AutoModelForMaskedLM.from_pretrained(result.output_dir).eval()
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForMaskedLM.from_pretrained(base), result.output_dir / "adapter"
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(cells).logits, merged(cells).logits, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_is_resumed_and_ends_in_the_same_weights(corpus, base, tmp_path, monkeypatch, caplog):
    data, options = (
        FineTuningDataArguments(corpus=corpus),
        {"layer_lr_decay": 0.7, "metric_for_best_model": "eval_loss"},
    )
    unbroken = finetune(with_adapters(base), data, settings(tmp_path / "unbroken", **options))
    with monkeypatch.context() as patch:
        interrupt(patch, finetune_module)
        with pytest.raises(KeyboardInterrupt):
            finetune(with_adapters(base), data, settings(tmp_path / "run", **options))
    checkpoint = tmp_path / "run" / "checkpoint-8"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    caplog.set_level("INFO", logger="screformer")
    resumed = finetune(with_adapters(base), data, settings(tmp_path / "run", **options))
    assert "checkpoint-8" in caplog.text
    model = AutoModelForSequenceClassification.from_pretrained(resumed.output_dir)
    adapters = sum(
        each.numel() for each in load_file(resumed.output_dir / "adapter/adapter_model.safetensors").values()
    )
    head = sum(each.numel() for each in model.classifier.parameters())
    total = sum(each.numel() for each in model.parameters()) + adapters - head
    assert f"{adapters} of {total} parameters learn" in caplog.text
    assert resumed.metrics["best_step"] == unbroken.metrics["best_step"] == 12
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (resumed.output_dir / name).read_bytes() == (unbroken.output_dir / name).read_bytes()
    with pytest.raises(ValueError, match=r"lora_rank: 4 -> 8"):
        finetune(
            ModelArguments(checkpoint=base, lora_rank=8, lora_dropout=0.1), data, settings(tmp_path / "run", **options)
        )


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 0}, "lora_rank got 0; it must be at least 1"),
        ({"lora_rank": 8, "lora_alpha": 0.0}, "lora_alpha got 0.0; it must be above 0"),
        ({"lora_rank": 8, "lora_dropout": 1.0}, "lora_dropout got 1.0; it must be at least 0 and below 1"),
        (
            {"lora_rank": 8, "lora_targets": ["key"]},
            r"lora_targets has \['key'\]; allowed are query_key, value, output",
        ),
        ({"lora_alpha": 16.0}, "lora_alpha=16.0 without lora_rank; set it too, for example --lora_rank 8"),
        (
            {"lora_dropout": 0.1, "lora_targets": ["value"]},
            r"lora_dropout=0.1, lora_targets=\['value'\] without lora_rank",
        ),
        ({"lora_rank": 8, "checkpoint": None}, "lora_rank=8 trains small changes .* --checkpoint pretrained"),
    ],
)
def test_values_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelArguments(**{"checkpoint": "pretrained", **options})


def test_freezing_beside_adapters_is_refused(base, tmp_path):
    model = ScReformerForMaskedLM.from_pretrained(base)
    with pytest.raises(ValueError, match="freeze='encoder' and lora_rank=4: adapters leave every weight"):
        choose_trainable(model, with_adapters(base), settings(tmp_path, freeze="encoder"))


def test_without_peft_the_message_says_how_to_get_it(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'lora_rank needs the package peft: pip install "screformer\[lora\]"'):
        add_adapters(ScReformerForMaskedLM.from_pretrained(base), with_adapters(base))


def test_the_command_line_says_that_peft_is_missing(corpus, base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    arguments = ["--corpus", corpus, "--checkpoint", base, "--lora_rank", "4", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"error: lora_rank needs the package peft"):
        finetune_module.main([*arguments, "--use_cpu"])


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_weights_in_shards_are_refused(base, kind):
    class Sharded:
        model = add_adapters(ScReformerForMaskedLM.from_pretrained(base), with_adapters(base))
        is_fsdp_enabled = is_deepspeed_enabled = False

    setattr(Sharded, kind, True)
    with pytest.raises(ValueError, match="lora_rank does not work with FSDP or DeepSpeed"):
        check_not_sharded(Sharded)
    Sharded.model = ScReformerForMaskedLM.from_pretrained(base)
    check_not_sharded(Sharded)
