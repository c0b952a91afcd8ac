"""A training run as a folder: begin or resume it, train, and leave a full checkpoint with its results beside it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, enable_full_determinism, set_seed
from transformers.trainer_utils import IntervalStrategy, get_last_checkpoint, seed_worker

from screformer.tokenization.corpus import Corpus
from screformer.train.arguments import ScReformerTrainingArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.class_weights import ClassWeightedLoss
from screformer.train.collator import CellCollator
from screformer.train.lora import ADAPTER_FOLDER, check_not_sharded, has_adapters, merge_adapters
from screformer.train.parameter_groups import slow_lower_layers
from screformer.train.resources import RESOURCE_FILES, write_resources
from screformer.train.result_files import finite, read_json, software_versions, write_json
from screformer.train.sampler import CellBatchSampler, Rank
from screformer.train.seen_cells import SEEN_FILES, record_seen_cells
from screformer.train.telemetry import (
    CURVES_FILE,
    HISTORY_FILE,
    HistoryWriter,
    MeasuredTrainer,
    check_report_to,
    remove_event_files,
)

logger = logging.getLogger(__name__)

RECORD_FILE, METRICS_FILE, BY_BIN_FIGURE = "training.json", "metrics.json", "masked_genes.png"
# Settings that change what is learned; the others (logging, workers, devices) may differ when a run is resumed.
DEFINING_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps",
    "optim", "seed", "data_seed", "metric_for_best_model", "early_stopping_patience", "fp16", "bf16",
    "shuffle_block_size", "shuffle_buffer_size", "train_sampling_strategy", "lr_scheduler_kwargs",
    "label_smoothing_factor", "class_weights", "layer_lr_decay", "freeze", "full_determinism",
)  # fmt: skip
GROUP_BY_LENGTH = "group_by_length"


class TrainingResult(NamedTuple):
    """Where the checkpoint is, and the content of its metrics.json."""

    output_dir: Path
    metrics: dict[str, Any]


class CellTrainer(MeasuredTrainer):
    """The Trainer with block-shuffled cells, and a second collator for evaluation: the same masks every time.

    Cells of a `CellDataset` are block-shuffled (`train_sampling_strategy` ``"random"``), and in batches of similar
    length on top of it (``"group_by_length"``); each process reads its own part. Other data sets and strategies are the
    Trainer's own.

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
        self.eval_data_collator = eval_data_collator
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

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the Trainer's optimizer, with slower lower layers if `layer_lr_decay` asks for them."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.layer_lr_decay != 1:
            named = (self.model if model is None else model).named_parameters()
            layers = self.model.config.num_hidden_layers
            slow_lower_layers(optimizer, named, self.args.layer_lr_decay, num_layers=layers)
        return optimizer

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

    def describe_evaluation(self, folder: Path) -> dict[str, Any]:
        """Return what the last evaluation found beside numbers, for metrics.json; figures of it go to `folder`."""
        return {}


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
    check_report_to(training)
    folder = Path(training.output_dir)
    # The other processes of a distributed run wait here, and then see what the first has left.
    with training.main_process_first(local=False, desc="preparing the output folder"):
        if training.overwrite and training.process_index == 0:
            _remove_run(folder)
        earlier = read_json(folder / RECORD_FILE) if (folder / RECORD_FILE).exists() else None
        is_finished = earlier is not None and earlier["state"] == "finished"
        # What stopped before its first checkpoint has nothing to lose, and its settings do not matter.
        if earlier is not None and (is_finished or _last_checkpoint(folder)):
            _refuse_other_settings(folder, earlier, record)
        if is_finished:
            logger.info("%s holds this run, finished; nothing to do. Start over with --overwrite.", folder)
            return TrainingResult(folder, read_json(folder / METRICS_FILE))
        if training.process_index == 0:
            write_json(folder / RECORD_FILE, record)
    checkpoint = training.resume_from_checkpoint or _last_checkpoint(folder)
    if checkpoint:
        logger.info("resuming from %s. To start over instead: --overwrite, which deletes it.", checkpoint)
    return checkpoint


def set_seeds(training: ScReformerTrainingArguments) -> None:
    """Seed every generator and, with `full_determinism`, allow only operations that always give the same result."""
    if training.full_determinism:
        enable_full_determinism(training.seed)
    else:
        set_seed(training.seed)


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
    ``training_curves.png``, ``resources.json`` and ``resources.md``, ``training.json`` and ``seen_cells.npy``; the
    Trainer's own ``checkpoint-*`` folders are removed unless `keep_checkpoints` was asked for. History and curves are
    there from the first evaluation on.

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
    check_not_sharded(trainer)
    history = HistoryWriter(folder, title=str(record["task"]).capitalize(), scores=scores)
    trainer.add_callback(history)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.batch_sampler is not None and trainer.batch_sampler.padding.num_tokens:
        logger.info("%.1f%% of the tokens of training were padding", 100 * trainer.batch_sampler.padding.share)
    log_history = list(trainer.state.log_history)
    evaluation = trainer.evaluate() if len(trainer.eval_dataset) else {}
    evaluation |= {f"eval_{name}": value for name, value in trainer.describe_evaluation(folder).items()}
    metrics = {
        **{
            f"{held_out_name}_{name.removeprefix('eval_')}": value
            for name, value in evaluation.items()
            if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))
        },
        "training_loss": outcome.training_loss,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "training_seconds": trainer.telemetry.usage().seconds,
    }
    if has_adapters(trainer.model):
        merge_adapters(trainer, folder / ADAPTER_FOLDER)
    trainer.save_model()
    if trainer.is_world_process_zero():
        # A pickle of the arguments; training.json has them as text.
        (folder / "training_args.bin").unlink(missing_ok=True)
        history.write(log_history)
        write_resources(folder, trainer, task=record["task"])
        write_json(folder / METRICS_FILE, finite(metrics))
        record_seen_cells(folder, corpus, used_rows, checkpoint=record["model"]["checkpoint"])
        write_json(folder / RECORD_FILE, {**record, "state": "finished"})
        if not training.keep_checkpoints:
            _remove_checkpoints(folder)
    return TrainingResult(folder, finite(metrics))


def log_to_console(training: ScReformerTrainingArguments) -> None:
    """Show the log on the console: everything from the main process, warnings from the others."""
    level = logging.INFO if training.process_index == 0 else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("screformer").setLevel(level)


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(folder) if folder.is_dir() else None


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
    _remove_checkpoints(folder)
    shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
    results = (METRICS_FILE, HISTORY_FILE, CURVES_FILE, BY_BIN_FIGURE, *RESOURCE_FILES, *SEEN_FILES)
    for name in (RECORD_FILE, *results, "model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    remove_event_files(folder)


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        # Nothing but what a Trainer wrote.
        if (checkpoint / "trainer_state.json").exists():
            logger.info("deleting %s", checkpoint)
            shutil.rmtree(checkpoint)
