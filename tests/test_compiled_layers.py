"""Dense parts of layers that are compiled: the same numbers and gradients, within reversible layers too."""

import pytest
import torch
from small_corpus import TINY_MODEL, make_corpus
from torch._dynamo.utils import counters

from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.train import cell_trainer
from screformer.train.arguments import ModelArguments, PretrainingArguments, PretrainingDataArguments
from screformer.train.compiled_layers import compile_layers
from screformer.train.pretrain import pretrain

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about its compiler


@pytest.mark.parametrize("reversible", [True, False])
def test_numbers_and_gradients_are_the_same(reversible):
    torch.manual_seed(0)
    config = ScReformerConfig.preset("tiny", num_genes=64, reversible=reversible)
    model, cells = ScReformerForMaskedLM(config), torch.randint(0, 6, (2, 64))
    plain = model(cells, labels=cells)
    plain.loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    names = set(model.state_dict())
    torch._dynamo.reset()
    counters.clear()
    assert compile_layers(model, backend="aot_eager") == 2
    compiled = model(cells, labels=cells)
    compiled.loss.backward()
    assert counters["stats"]["unique_graphs"] >= 2  # projections and feed-forward
    torch.testing.assert_close(compiled.logits, plain.logits)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name])
    assert set(model.state_dict()) == names


def test_a_run_can_ask_for_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        cell_trainer,
        "compile_layers",
        lambda model: asked.append(compile_layers(model, backend="aot_eager")),
    )
    training = PretrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, use_cpu=True, disable_tqdm=True, compile_layers=True
    )
    data = PretrainingDataArguments(corpus=make_corpus(tmp_path))
    result = pretrain(ModelArguments(config_overrides=TINY_MODEL), data, training)
    assert asked == [1]
    ScReformerForMaskedLM.from_pretrained(result.output_dir)
