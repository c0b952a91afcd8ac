import math

import pytest
import torch
from accelerate import Accelerator
from small_corpus import TINY_MODEL, make_corpus

from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train import pretrain as pretrain_module
from screformer.train.arguments import ModelArguments, PretrainingArguments, PretrainingDataArguments
from screformer.train.held_out_loss import HeldOutLoss, ignore_repeated_cells


def test_the_loss_of_held_out_cells_does_not_depend_on_their_batches(tmp_path):
    corpus = open_corpus(make_corpus(tmp_path))
    data = PretrainingDataArguments(corpus=str(corpus.folder), held_out_fraction=0.4)
    model = pretrain_module.starting_model(
        ScReformerForMaskedLM, corpus.tokenizer(), ModelArguments(config_overrides=TINY_MODEL)
    )
    losses = []
    for batch_size in (1, 3, 19):
        training = PretrainingArguments(
            output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=batch_size
        )
        losses.append(pretrain_module._make_trainer(model, corpus, data, training).evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_every_target_weighs_the_same_and_a_batch_without_any_nothing():
    loss = HeldOutLoss()
    assert math.isnan(loss.mean())
    loss.add(torch.tensor(1.0), torch.tensor([[3, -100], [2, 1]]))
    loss.add(torch.tensor(5.0), torch.tensor([[-100, 4]]))
    loss.add(torch.tensor(math.nan), torch.tensor([[-100, -100]]))
    assert loss.mean() == pytest.approx((3 * 1 + 5) / 4)


@pytest.mark.parametrize(
    ("process", "at_the_end", "remainder", "kept"),
    [(0, True, 3, 2), (1, True, 3, 1), (1, True, 1, 0), (1, True, 0, 2), (1, False, 3, 2), (1, True, -1, 2)],
)
def test_cells_that_fill_up_the_last_batches_are_ignored(monkeypatch, process, at_the_end, remainder, kept):
    accelerator = Accelerator(cpu=True)
    # Two processes with two cells each at a step.
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(Accelerator, "process_index", process)
    monkeypatch.setattr(type(accelerator.gradient_state), "end_of_dataloader", at_the_end)
    monkeypatch.setattr(type(accelerator.gradient_state), "remainder", remainder)
    given = torch.tensor([[1, 2], [3, 4]])
    labels = ignore_repeated_cells(given, accelerator)
    assert (labels[:kept] == given[:kept]).all()
    assert (labels[kept:] == -100).all()
    assert given.min() == 1
