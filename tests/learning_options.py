"""What the tests of training options share: uneven cells, a small classifier, and trainers of it."""

import numpy as np
import torch
from small_corpus import make_cells
from transformers import TrainerCallback

from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import open_corpus
from screformer.train import finetune as finetune_module
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.labelled_cells import split_labelled_cells
from screformer.train.starting_model import starting_model
from screformer.train.trainable import choose_trainable
from screformer.train.training_run import early_stopping

# Two layers and several buckets a cell; no dropout, so that losses can be computed again.
MODEL = [
    "hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32", "bucket_size=8",
    "num_hashes=1", "classifier_hidden_sizes=[16, 8]", "hidden_dropout_prob=0", "classifier_dropout=0",
]  # fmt: skip


def make_uneven_cells():
    """Return 48 cells, a quarter of them beta."""
    cells = make_cells()
    cells.obs["cell_type"] = np.where(np.arange(48) % 4 == 1, "beta", "alpha")
    return cells


def settings(output, **overrides):
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "early_stopping_patience": 0,
    }
    return FineTuningArguments(output_dir=str(output), use_cpu=True, disable_tqdm=True, **{**defaults, **overrides})


def one_step(output, **overrides):
    """Return the settings of a run of one step and no evaluation."""
    defaults = {
        "max_steps": 1,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "warmup_steps": 0,
    }
    return settings(output, **{**defaults, **overrides})


def make_classifier_trainer(corpus_folder, training, **model):
    """Return the trainer that fine-tuning makes, of a model with the same weights every time."""
    corpus, data = open_corpus(corpus_folder), FineTuningDataArguments(corpus=corpus_folder)
    cells = split_labelled_cells(corpus, data, seed=0)
    torch.manual_seed(0)
    arguments = ModelArguments(**{"config_overrides": MODEL, **model})
    started = starting_model(
        ScReformerForCellClassification, corpus.tokenizer(), arguments, label_names=["alpha", "beta"]
    )
    started = choose_trainable(started, arguments, training)
    return finetune_module._make_trainer(started, corpus, cells, data, training)


class InterruptAt(TrainerCallback):
    """Ends a run as a killed one ends, after so many epochs."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch >= self.epoch:
            raise KeyboardInterrupt


def interrupt(monkeypatch, *modules, epoch=2):
    """Let runs of these modules end after so many epochs."""
    for module in modules:
        monkeypatch.setattr(module, "early_stopping", lambda training: [*early_stopping(training), InterruptAt(epoch)])
