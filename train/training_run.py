"""A training run as a folder: begin or resume it, train, and leave a full checkpoint with its results beside it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate.data_loader import prepare_data_loader
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import IntervalStrategy, seed_worker

from screformer.tokenization.corpus import Corpus
from screformer.train.arguments import ScReformerTrainingArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.checkpoints import (
    LogBeforeSaving,
    last_whole_checkpoint,
    mean_training_loss,
    remove_broken_checkpoints,
    remove_checkpoints,
)
from screformer.train.collator import CellCollator
from screformer.train.figures import plot_training_curves
from screformer.train.held_out_loss import HeldOutLoss, ignore_repeated_cells
from screformer.train.result_files import read_json, software_versions, write_json
from screformer.train.sampler import CellBatchSampler, Rank
from screformer.train.seen_cells import SEEN_FILES, record_seen_cells

logger = logging.getLogger(__name__)

RECORD_FILE, METRICS_FILE, HISTORY_FILE = "training.json", "metrics.json", "log_history.json"
CURVES_FILE = "training_curves.png"
# Settings that change what is learned; the others (logging, workers, devices) may differ when a run is resumed.
DEFINING_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps",
    "optim", "seed", "data_seed", "metric_for_best_model", "early_stopping_patience", "fp16", "bf16",
    "shuffle_block_size", "shuffle_buffer_size", "train_sampling_strategy",
)  # fmt: skip
GROUP_BY_LENGTH = "group_by_length"


class TrainingResult(NamedTuple):
    """Where the checkpoint is, and the content of its metrics.json."""

    output_dir: Path
    metrics: dict[str, Any]


class CellTrainer(Trainer):
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

    def __init__(self, *args: Any, eval_data_collator: CellCollator, **kwargs: Any) -> None:  # Any: Trainer's own
        super().__init__(*args, **kwargs)
        self.add_callback(LogBeforeSaving)
        if self.is_fsdp_enabled:
            _shard_as_one_unit(self.accelerator.state.fsdp_plugin)
        self.eval_data_collator = eval_data_collator
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
            loader, device=self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:  # Any: Trainer's own
        """Return loss, logits and labels of a batch; the loss is counted target by target."""
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
        training_collator = self.data_collator
        self.data_collator = self.eval_data_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = training_collator


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


def describe_run(
    task: str, training: ScReformerTrainingArguments, corpus: Mapping[str, Any], **arguments: Any
) -> dict[str, Any]:  # Any: JSON; arguments are dataclasses
    """Return the record of a run: what it does, with which settings, cells and versions."""
    return {
        "task": task,
        "state": "running",
        "corpus": dict(corpus),
        **{name: asdict(value) for name, value in arguments.items()},
        "training": training.to_dict(),
        "num_processes": training.world_size,
        "versions": software_versions(),
    }


def begin_run(training: ScReformerTrainingArguments, record: Mapping[str, Any]) -> TrainingResult | str | None:
    """Return the result of a finished run in the output folder, the checkpoint to resume from, or None to start anew.

    Raises
    ------
    ValueError
        The folder holds a run with other settings; the message names them and how to start over.
    """
    assert training.output_dir is not None
    folder = Path(training.output_dir)
    # The other processes of a distributed run wait here, and then see what the first has left.
    with training.main_process_first(local=False, desc="preparing the output folder"):
        if training.overwrite and training.process_index == 0:
            _remove_run(folder)
        earlier = read_json(folder / RECORD_FILE) if (folder / RECORD_FILE).exists() else None
        is_finished = earlier is not None and earlier["state"] == "finished"
        # What stopped before its first checkpoint has nothing to lose, and its settings do not matter.
        if earlier is not None and (is_finished or last_whole_checkpoint(folder)):
            _refuse_other_settings(folder, earlier, record)
        if is_finished:
            if training.process_index == 0 and not training.keep_checkpoints:
                remove_checkpoints(folder)  # where the run was killed before it could
            logger.info("%s holds this run, finished; nothing to do. Start over with --overwrite.", folder)
            return TrainingResult(folder, read_json(folder / METRICS_FILE))
        if training.process_index == 0:
            remove_broken_checkpoints(folder)
            write_json(folder / RECORD_FILE, record)
    checkpoint = training.resume_from_checkpoint or last_whole_checkpoint(folder)
    if checkpoint:
        logger.info("resuming from %s. To start over instead: --overwrite, which deletes it.", checkpoint)
    return checkpoint


def early_stopping(training: ScReformerTrainingArguments) -> list[EarlyStoppingCallback]:
    """Return the callback that stops after `early_stopping_patience` evaluations without improvement, if any.

    Without evaluations during the training (``eval_strategy="no"``) there is nothing to stop by.
    """
    if training.early_stopping_patience == 0 or training.eval_strategy == IntervalStrategy.NO:
        return []
    return [EarlyStoppingCallback(early_stopping_patience=training.early_stopping_patience)]


def train_and_save(
    trainer: CellTrainer,
    record: Mapping[str, Any],
    *,
    checkpoint: str | None,
    held_out_name: str,
    scores: Sequence[str],
    corpus: Corpus,
    used_rows: npt.NDArray[np.int64],
) -> TrainingResult:
    """Train, keep the best model, and write everything that belongs to it.

    The output folder then holds the checkpoint (model, tokenizer, code), ``metrics.json``, ``log_history.json``,
    ``training_curves.png``, ``training.json`` and ``seen_cells.npy``; the Trainer's own ``checkpoint-*`` folders are
    removed unless `keep_checkpoints` was asked for.

    Parameters
    ----------
    trainer
        Ready to train.
    record
        From `describe_run`.
    checkpoint
        To resume from.
    held_out_name
        Name of the held-out cells; prefix of their numbers in ``metrics.json``.
    scores
        Numbers to draw beside the loss.
    corpus, used_rows
        The cells that training and selection use, for the index of seen cells.
    """
    training: ScReformerTrainingArguments = trainer.args
    folder = Path(str(training.output_dir))
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.batch_sampler is not None and trainer.batch_sampler.padding.num_tokens:
        logger.info("%.1f%% of the tokens of training were padding", 100 * trainer.batch_sampler.padding.share)
    log_history = _finite(trainer.state.log_history)
    evaluation = trainer.evaluate()
    metrics = {
        **{
            f"{held_out_name}_{name.removeprefix('eval_')}": value
            for name, value in evaluation.items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))
        },
        "training_loss": mean_training_loss(trainer.state.log_history),
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "training_seconds": outcome.metrics["train_runtime"],
    }
    trainer.save_model()
    if trainer.is_world_process_zero():
        # A pickle of the arguments; training.json has them as text.
        (folder / "training_args.bin").unlink(missing_ok=True)
        write_json(folder / HISTORY_FILE, log_history)
        plot_training_curves(log_history, folder / CURVES_FILE, title=str(record["task"]).capitalize(), scores=scores)
        write_json(folder / METRICS_FILE, _finite(metrics))
        record_seen_cells(folder, corpus, used_rows, checkpoint=record["model"]["checkpoint"])
        write_json(folder / RECORD_FILE, {**record, "state": "finished"})
        if not training.keep_checkpoints:
            remove_checkpoints(folder)
    return TrainingResult(folder, _finite(metrics))


def log_to_console(training: ScReformerTrainingArguments) -> None:
    """Show the log on the console: everything from the main process, warnings from the others."""
    level = logging.INFO if training.process_index == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("screformer").setLevel(level)


def leave_process_group() -> None:
    """Take leave of the other processes of a distributed run, so that none ends while another still talks to it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _refuse_other_settings(folder: Path, earlier: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the differences, unless both records describe the same run."""
    differences = []
    for section in sorted(set(record) - {"state", "versions"}):
        old, new = earlier.get(section), record[section]
        if not isinstance(old, dict) or not isinstance(new, dict):
            old, new = {section: old}, {section: new}
        names = DEFINING_SETTINGS if section == "training" else sorted({*old, *new})
        differences += [
            f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)
        ]
    if differences:
        raise ValueError(
            f"output_dir {str(folder)!r} holds a run with other settings ({'; '.join(differences)}). Choose another "
            "output_dir, or start over with overwrite (--overwrite), which deletes that run's checkpoints and results"
        )


def _remove_run(folder: Path) -> None:
    remove_checkpoints(folder)
    remove_broken_checkpoints(folder)
    for name in (RECORD_FILE, METRICS_FILE, HISTORY_FILE, CURVES_FILE, *SEEN_FILES, "model.safetensors"):
        (folder / name).unlink(missing_ok=True)


def _finite(value: Any) -> Any:  # Any: JSON
    """Return `value` with None for NaN and infinity, which JSON does not know (a diverged run has them)."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, torch.Tensor):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
