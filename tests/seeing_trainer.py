"""A trainer that writes down which cells it was given, batch by batch; run as a program, one process of several."""

import json
import os
import sys
from pathlib import Path

import torch
from small_corpus import TINY_MODEL
from transformers import TrainerCallback

from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train.arguments import ModelArguments, PretrainingArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import CellCollator
from screformer.train.starting_model import starting_model
from screformer.train.training_run import CellTrainer


class SeeingTrainer(CellTrainer):
    """Keeps the cells of every batch, as text of their tokens."""

    def training_step(self, model, inputs, *args, **kwargs):
        tokens = torch.where(inputs["labels"] == -100, inputs["input_ids"], inputs["labels"])
        self.seen.append([str(row) for row in tokens.tolist()])
        return super().training_step(model, inputs, *args, **kwargs)


class StopAt(TrainerCallback):
    """Ends the run as a killed one ends, after so many steps."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def make_trainer(corpus_folder, output, *, stop_at=-1, **options):
    """Return a trainer of a tiny model on all cells."""
    corpus = open_corpus(corpus_folder)
    torch.manual_seed(0)
    model = starting_model(
        ScReformerForMaskedLM, corpus.tokenizer(), ModelArguments(config_overrides=TINY_MODEL, gene_space="full")
    )
    collator = CellCollator.from_config(model.config, masked_fraction=0.15)
    defaults = {
        "per_device_train_batch_size": 4,
        "shuffle_block_size": 4,
        "shuffle_buffer_size": 16,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "learning_rate": 1e-3,
    }
    trainer = SeeingTrainer(
        model=model,
        args=PretrainingArguments(
            output_dir=str(output), use_cpu=True, disable_tqdm=True, num_train_epochs=2, **{**defaults, **options}
        ),
        train_dataset=CellDataset(corpus),
        data_collator=collator,
        eval_data_collator=collator,
        callbacks=[StopAt(stop_at)],
    )
    trainer.seen = []
    return trainer


def main():
    """Train as one of several processes, and write what this one saw and learned."""
    corpus_folder, output, options = sys.argv[1:]
    trainer = make_trainer(corpus_folder, output, **json.loads(options))
    trainer.train()
    weights = [tensor.tolist() for tensor in trainer.model.parameters()]
    result = {"seen": trainer.seen, "steps": trainer.state.global_step, "weights": weights}
    Path(output, f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        # What is left of gloo's threads sometimes waits for ever for a peer that is gone, when Python frees it.
        os._exit(0)


if __name__ == "__main__":
    main()
