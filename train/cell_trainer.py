"""The Trainer of cells: block-shuffled, shared out among processes, with options of its own for loss and optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from screformer.train.cell_dataset import CellDataset
from screformer.train.checkpoints import LogBeforeSaving
from screformer.train.class_weights import ClassWeightedLoss
from screformer.train.collator import CellCollator
from screformer.train.compiled_layers import compile_layers
from screformer.train.held_out_loss import HeldOutLoss, ignore_repeated_cells
from screformer.train.packed_batches import expand_batch
from screformer.train.parameter_groups import slow_lower_layers
from screformer.train.sampler import CellBatchSampler, Rank
from screformer.train.telemetry import MeasuredTrainer

GROUP_BY_LENGTH = "group_by_length"


class CellTrainer(MeasuredTrainer):
    """The Trainer with block-shuffled cells, and a second collator for evaluation: the same masks every time.

    Cells of a `CellDataset` are block-shuffled (`train_sampling_strategy` ``"random"``), and in batches of similar
    length on top of it (``"group_by_length"``); processes share the cells of each step. Other data sets and strategies
    are the Trainer's own.

    A checkpoint's ``trainer_state.json`` is written when all else of it is there. Under FSDP the model is one unit, and
    checkpoints are ordinary ones.

    Parameters
    ----------
    eval_data_collator
        Collates held-out cells.
    *args, **kwargs
        As for `transformers.Trainer`.
    """

    data_collator: CellCollator
    label_smoother: Any  # Any: Trainer's own
    compute_loss_func: Any

    def __init__(self, *args: Any, eval_data_collator: CellCollator, **kwargs: Any) -> None:  # Any: Trainer's own
        super().__init__(*args, **kwargs)
        self.add_callback(LogBeforeSaving)
        if self.args.compile_layers:
            compile_layers(self.model)
        if self.is_fsdp_enabled:
            _shard_as_one_unit(self.accelerator.state.fsdp_plugin)
        self.eval_data_collator = eval_data_collator
        wanted = self.args.pack_batches
        for collator in (self.data_collator, eval_data_collator):
            can_pack = isinstance(collator, CellCollator) and collator.can_pack
            if can_pack and (self.args.device.type == "cuda" if wanted is None else wanted):
                collator.packed = True
        self._held_out_loss, self._is_evaluating = HeldOutLoss(), False
        self.batch_sampler: CellBatchSampler | None = None

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of training cells."""
        cells, training = self.train_dataset, self.args
        if not isinstance(cells, CellDataset) or training.train_sampling_strategy not in ("random", GROUP_BY_LENGTH):
            return super().get_train_dataloader()
        self.batch_sampler = CellBatchSampler(
            len(cells),
            self._train_batch_size,
            training.shuffling,
            lengths_of=cells.lengths_of if training.train_sampling_strategy == GROUP_BY_LENGTH else None,
            rank=Rank(training.process_index, training.world_size),
            drop_last=training.dataloader_drop_last,
        )
        num_workers = training.dataloader_num_workers
        loader = DataLoader(
            cells,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=num_workers,
            pin_memory=training.dataloader_pin_memory,
            persistent_workers=training.dataloader_persistent_workers,
            multiprocessing_context=training.dataloader_multiprocessing_context,
            prefetch_factor=training.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=num_workers, rank=training.process_index),
        )
        # The batches are this process's own; accelerate, told of one process, does not share them out again.
        return prepare_data_loader(
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            # The loader sends a batch before it gives out the one before: from pinned memory nothing waits for it.
            non_blocking=training.dataloader_pin_memory,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the Trainer's optimizer, with slower lower layers if `layer_lr_decay` asks for them."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.layer_lr_decay != 1:
            named = (self.model if model is None else model).named_parameters()
            layers = self.model.config.num_hidden_layers
            slow_lower_layers(optimizer, named, self.args.layer_lr_decay, num_layers=layers)
        return optimizer

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:  # Any: tensors
        return expand_batch(super()._prepare_inputs(inputs), self.data_collator.num_genes)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do a step; a packed batch is laid out first."""
        return super().training_step(model, self._prepare_inputs(inputs), *args, **kwargs)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:  # Any: Trainer's own
        """Return the loss to learn by; of held-out cells the plain one, so that runs with other options compare."""
        # A loss of labels of another form, as of distillation, is the only one there is.
        if model.training or not isinstance(self.compute_loss_func, ClassWeightedLoss | None):
            return super().compute_loss(model, *args, **kwargs)
        options = self.label_smoother, self.compute_loss_func
        self.label_smoother = self.compute_loss_func = None
        try:
            return super().compute_loss(model, *args, **kwargs)
        finally:
            self.label_smoother, self.compute_loss_func = options

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:  # Any: Trainer's own
        """Return loss, logits and labels of a batch; the loss is counted target by target."""
        inputs = self._prepare_inputs(inputs)
        if "labels" in inputs:
            inputs = {**inputs, "labels": ignore_repeated_cells(inputs["labels"], self.accelerator)}
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and "labels" in inputs:
            self._held_out_loss.add(loss, inputs["labels"])
        return loss, logits, labels

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:  # Any: Trainer's own
        # Not known while held-out cells are looked at: their losses stay means of a batch, which are weighted later.
        return None if self._is_evaluating else super()._get_num_items_in_batch(*args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:  # Any: Trainer's own
        """Evaluate; the loss is the mean over all targets."""
        self._held_out_loss, self._is_evaluating = HeldOutLoss(), True
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._is_evaluating = False
        if f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = self._held_out_loss.mean()
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        with _without_fsdp_class(self.model):
            super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process writes the state of the Trainer next; by then all others have written theirs.
        self.accelerator.wait_for_everyone()

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:  # Any: Trainer's own
        if isinstance(eval_dataset, CellDataset) and self.args.train_sampling_strategy == GROUP_BY_LENGTH:
            return np.argsort(-eval_dataset.lengths, kind="stable")
        return super()._get_eval_sampler(eval_dataset)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:  # Any: Trainer's own
        """Return the loader of held-out cells."""
        with self._collating_held_out_cells():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:  # Any: Trainer's own
        """Return the loader of `predict`'s cells, as held-out ones: nothing is left out of them at random."""
        with self._collating_held_out_cells():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _collating_held_out_cells(self) -> Iterator[None]:
        training_collator = self.data_collator
        self.data_collator = self.eval_data_collator
        try:
            yield
        finally:
            self.data_collator = training_collator

    def describe_evaluation(self, folder: Path) -> dict[str, Any]:
        """Return what the last evaluation found beside numbers, for metrics.json; figures of it go to `folder`."""
        return {}


def _shard_as_one_unit(plugin: Any) -> None:  # Any: accelerate's FullyShardedDataParallelPlugin
    """Change what FSDP can be told, but does not work here."""
    # Reversible layers run inside a function of autograd, where FSDP does not see them begin and end, and so could not
    # gather their weights one by one.
    plugin.auto_wrap_policy = None
    # Of sharded checkpoints the Trainer writes no model.safetensors, and on some processes does not find the best.
    plugin.set_state_dict_type("FULL_STATE_DICT")


@contextmanager
def _without_fsdp_class(model: torch.nn.Module) -> Iterator[None]:
    """Give a model that FSDP made one of its own classes back its class, after which its code and config are saved."""
    changed = type(model)
    own = next(kind for kind in changed.__mro__ if not issubclass(kind, FSDPModule))
    model.__class__ = cast(type[torch.nn.Module], own)
    try:
        yield
    finally:
        model.__class__ = changed
