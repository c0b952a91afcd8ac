"""Lower layers learn slower, frozen ones not at all, and the gradients of the others are those they always were."""

import pytest
import torch
from learning_options import MODEL, make_classifier_trainer, make_uneven_cells, one_step, settings
from safetensors.torch import load_file
from small_corpus import make_corpus

from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train.arguments import FineTuningDataArguments, ModelArguments
from screformer.train.finetune import finetune
from screformer.train.parameter_groups import freeze_lowest, parameter_depth
from screformer.train.starting_model import starting_model

NUM_LAYERS, HEAD = 2, 3
FROZEN_DEPTH = {"none": -1, "embeddings": 0, "1": 1, "2": 2, "encoder": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), cells=make_uneven_cells())


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("screformer.embeddings.gene_embeddings.weight", 0),
        ("embeddings.bin_embeddings.weight", 0),
        ("screformer.encoder.layers.0.attention.value.weight", 1),
        ("module.screformer.encoder.layers.11.feed_forward.2.bias", 12),
        ("base_model.model.screformer.encoder.layers.1.attention.value.lora_A.default.weight", 2),
        ("classifier.convolution_path.dense_1.weight", 13),
        ("head.decoder.bias", 13),
    ],
)
def test_depth_follows_from_a_parameters_name(name, depth):
    assert parameter_depth(name, 12) == depth


@pytest.mark.parametrize("model_class", [ScReformerForCellClassification, ScReformerForMaskedLM])
def test_every_parameter_has_the_depth_of_its_module(tiny_config, model_class):
    model = model_class(tiny_config())
    expected = {id(parameter): HEAD for parameter in model.parameters()}
    expected |= {id(parameter): 0 for parameter in model.screformer.embeddings.parameters()}
    for index, layer in enumerate(model.screformer.encoder.layers):
        expected |= {id(parameter): index + 1 for parameter in layer.parameters()}
    found = {id(parameter): parameter_depth(name, NUM_LAYERS) for name, parameter in model.named_parameters()}
    assert found == expected


# Rates


def test_rates_fall_with_depth_and_norms_and_biases_keep_no_weight_decay(corpus, tmp_path):
    options = {"learning_rate": 0.1, "weight_decay": 0.05}
    plain = make_classifier_trainer(corpus, settings(tmp_path, **options))
    decayed = make_classifier_trainer(corpus, settings(tmp_path, layer_lr_decay=0.5, **options))
    found = []
    for trainer in (plain, decayed):
        optimizer = trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        groups = {names[id(each)]: group for group in optimizer.param_groups for each in group["params"]}
        assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
        found.append(groups)
    for name, group in found[1].items():
        assert group["lr"] == pytest.approx(0.1 * 0.5 ** (HEAD - parameter_depth(name, NUM_LAYERS))), name
        assert group["weight_decay"] == found[0][name]["weight_decay"]
        assert group["betas"] == found[0][name]["betas"]
    assert found[1]["screformer.encoder.layers.0.attention_norm.weight"]["weight_decay"] == 0
    assert found[1]["classifier.convolution_path.dense_1.bias"]["weight_decay"] == 0
    assert found[1]["classifier.convolution_path.dense_1.weight"]["weight_decay"] == 0.05
    assert {group["lr"] for group in found[0].values()} == {0.1}


def test_a_step_moves_lower_layers_less_and_the_rate_of_the_head_is_logged(corpus, tmp_path):
    training = one_step(
        tmp_path, layer_lr_decay=0.5, learning_rate=1e-3, weight_decay=0.0, lr_scheduler_type="constant"
    )
    trainer = make_classifier_trainer(corpus, training)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    largest = dict.fromkeys(range(HEAD + 1), 0.0)
    for name, parameter in trainer.model.named_parameters():
        depth = parameter_depth(name, NUM_LAYERS)
        largest[depth] = max(largest[depth], (parameter.detach() - before[name]).abs().max().item())
    # The first step of Adam is the rate itself, in the direction of the gradient.
    assert [largest[depth] for depth in range(HEAD + 1)] == pytest.approx(
        [1e-3 * 0.5 ** (HEAD - depth) for depth in range(HEAD + 1)], rel=0.02
    )
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3


def test_a_second_call_does_not_slow_the_layers_again(corpus, tmp_path):
    trainer = make_classifier_trainer(corpus, settings(tmp_path, layer_lr_decay=0.5))
    rates = [group["lr"] for group in trainer.create_optimizer().param_groups]
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == rates


@pytest.mark.parametrize("layer_lr_decay", [0.0, -0.5, 1.1])
def test_a_factor_that_cannot_be_is_refused(tmp_path, layer_lr_decay):
    with pytest.raises(ValueError, match=rf"layer_lr_decay got {layer_lr_decay}; it must be above 0 and at most 1"):
        settings(tmp_path, layer_lr_decay=layer_lr_decay)


# Freezing


def gradients(tiny_config, cells, *, freeze="none", reversible=True):
    """Return name -> gradient of a classifier with dropout, which draws the same every time."""
    torch.manual_seed(0)
    model = ScReformerForCellClassification(tiny_config(reversible=reversible, hidden_dropout_prob=0.2)).double()
    freeze_lowest(model, freeze)
    torch.manual_seed(1)
    model.train()(cells, labels=torch.tensor([0, 1, 2])).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("freeze", FROZEN_DEPTH)
def test_frozen_parameters_get_no_gradient_and_the_others_the_one_they_had(tiny_config, random_cells, freeze):
    cells = random_cells()
    everything = gradients(tiny_config, cells)
    for reversible in (True, False):
        found = gradients(tiny_config, cells, freeze=freeze, reversible=reversible)
        for name, gradient in found.items():
            if parameter_depth(name, NUM_LAYERS) <= FROZEN_DEPTH[freeze]:
                assert gradient is None, name
            else:
                assert gradient.abs().sum() > 0, name
                torch.testing.assert_close(gradient, everything[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("freeze", ["1", "encoder"])
def test_frozen_weights_do_not_change_and_the_others_do(corpus, tmp_path, freeze, caplog):
    caplog.set_level("INFO", logger="screformer")
    start = starting_model(
        ScReformerForMaskedLM, open_corpus(corpus).tokenizer(), ModelArguments(config_overrides=MODEL)
    )
    start.save_pretrained(tmp_path / "start")
    training = settings(tmp_path / "run", freeze=freeze, num_train_epochs=1, weight_decay=0.1)
    finetune(ModelArguments(checkpoint=str(tmp_path / "start")), FineTuningDataArguments(corpus=corpus), training)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "run"))
    for name in dict(start.screformer.named_parameters(prefix="screformer")):
        is_frozen = parameter_depth(name, NUM_LAYERS) <= FROZEN_DEPTH[freeze]
        assert torch.equal(before[name], after[name]) == is_frozen, name
    assert "parameters learn" in caplog.text


@pytest.mark.parametrize("freeze", ["0", "-1", "head", "1.5", ""])
def test_a_part_that_there_is_not_is_refused(tmp_path, freeze):
    with pytest.raises(ValueError, match=rf"freeze got '{freeze}'; allowed are none, embeddings, encoder, or a number"):
        settings(tmp_path, freeze=freeze)


def test_more_layers_than_there_are_are_refused(tiny_config):
    with pytest.raises(ValueError, match="freeze got 3, but the model has 2 layers; freeze fewer"):
        freeze_lowest(ScReformerForMaskedLM(tiny_config()), "3")
