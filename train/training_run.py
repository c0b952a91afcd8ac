"""A training run as a folder: begin or resume it, train, and leave a full checkpoint with its results beside it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import EarlyStoppingCallback, enable_full_determinism, set_seed
from transformers.trainer_utils import IntervalStrategy

from screformer.annotation.unknown_types import UNKNOWN_TYPES_FILE
from screformer.model_cards.card_inputs import INPUTS_FILE
from screformer.model_cards.golden_cells import CELLS, FACTS
from screformer.model_cards.published_files import CHECKSUMS
from screformer.tokenization.corpus import Corpus
from screformer.tokenization.corpus_files import checksum
from screformer.train.arguments import ScReformerTrainingArguments
from screformer.train.calibration_record import CALIBRATION_FIGURE, CALIBRATION_FILE
from screformer.train.cell_trainer import CellTrainer
from screformer.train.checkpoints import (
    last_whole_checkpoint,
    mean_training_loss,
    remove_broken_checkpoints,
    remove_checkpoints,
)
from screformer.train.distillation_report import remove_report
from screformer.train.evaluate import CONFUSION_FILE, EVALUATION_FILE, PREDICTIONS_FILE, RELIABILITY_FILE, ROC_FILE
from screformer.train.lora import ADAPTER_FOLDER, check_not_sharded, has_adapters, merge_adapters
from screformer.train.resources import RESOURCE_FILES, write_resources
from screformer.train.result_files import (
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    finite,
    hash_weights,
    read_json,
    software_versions,
    write_json,
)
from screformer.train.seen_cells import SEEN_FILES, record_seen_cells
from screformer.train.telemetry import (
    CURVES_FILE,
    HISTORY_FILE,
    FewStepsWarner,
    HistoryWriter,
    check_report_to,
    remove_event_files,
)
from screformer.train.tree_targets import CELL_ONTOLOGY

logger = logging.getLogger(__name__)

RECORD_FILE, METRICS_FILE, BY_BIN_FIGURE = "training.json", "metrics.json", "masked_genes.png"
CARD_FILE, DOWNSTREAM_FILE = "README.md", "downstream.json"
# Settings that change what is learned; the others (logging, workers, devices) may differ when a run is resumed.
DEFINING_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "warmup_steps",
    "optim", "seed", "data_seed", "metric_for_best_model", "early_stopping_patience", "fp16", "bf16",
    "shuffle_block_size", "shuffle_buffer_size", "train_sampling_strategy", "lr_scheduler_kwargs",
    "label_smoothing_factor", "class_weights", "layer_lr_decay", "freeze", "full_determinism",
)  # fmt: skip
# The same, of which the records of older runs may say nothing; the second lot where evaluations choose or stop.
LATER_SETTINGS = ("unknown_types", "load_best_model_at_end")
SETTINGS_OF_SELECTION = ("eval_strategy", "eval_steps", "save_strategy", "greater_is_better")
CONTENT = "content"  # section of the record: sha256 of what the run began with


class TrainingResult(NamedTuple):
    """Where the checkpoint is, and the content of its metrics.json."""

    output_dir: Path
    metrics: dict[str, Any]


def describe_run(
    task: str, training: ScReformerTrainingArguments, corpus: Mapping[str, Any], **arguments: Any
) -> dict[str, Any]:  # Any: JSON; arguments are dataclasses
    """Return the record of a run: what it does, with which settings, cells and versions."""
    return {
        "task": task,
        "state": "running",
        "corpus": dict(corpus),
        **{name: asdict(value) for name, value in arguments.items()},
        CONTENT: _hash_content(arguments),
        "training": training.to_dict(),
        "num_processes": training.world_size,
        "versions": software_versions(),
    }


def _hash_content(arguments: Mapping[str, Any]) -> dict[str, str | None]:  # Any: dataclasses
    """Return sha256 of the start checkpoint's weights and of files of gene vectors and labels, None for what is none.

    A checkpoint on the Hub has none.
    """
    model, cells = arguments.get("model"), arguments.get("cells")
    checkpoint = getattr(model, "checkpoint", None)
    files = {"gene2vec": getattr(model, "gene2vec", None), "label_tree": getattr(cells, "label_tree", None)}
    paths = {name: Path((value or "").removeprefix(f"{CELL_ONTOLOGY}:")) for name, value in files.items()}
    return {
        "checkpoint": None if checkpoint is None else hash_weights(checkpoint),
        **{name: checksum(path) if path.is_file() else None for name, path in paths.items()},
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
    trainer.add_callback(FewStepsWarner())
    trainer.train(resume_from_checkpoint=checkpoint)
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
        "training_loss": mean_training_loss(trainer.state.log_history),
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
            remove_checkpoints(folder)
    return TrainingResult(folder, finite(metrics))


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
    for section in sorted(set(record) - {"state", "versions", CONTENT}):
        old, new = earlier.get(section), record[section]
        if not isinstance(old, dict) or not isinstance(new, dict):
            old, new = {section: old}, {section: new}
        names = _defining_settings(old, new) if section == "training" else sorted({*old, *new})
        differences += [
            f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)
        ]
    differences += _changed_content(earlier, record)
    if differences:
        raise ValueError(
            f"output_dir {str(folder)!r} holds a run with other settings ({'; '.join(differences)}). Choose another "
            "output_dir, or start over with overwrite (--overwrite), which deletes that run's checkpoints and results"
        )


def _defining_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that must be the same in both."""
    is_chosen = any(each.get("load_best_model_at_end") or each.get("early_stopping_patience") for each in (old, new))
    later = (*LATER_SETTINGS, *(SETTINGS_OF_SELECTION if is_chosen else ()))
    return [*DEFINING_SETTINGS, *(name for name in later if name in old and name in new)]


def _changed_content(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Say of which of the files that the run began with the content is another; what either does not know passes."""
    old, new = earlier.get(CONTENT, {}), record.get(CONTENT, {})
    changed = [name for name in new if None not in (old.get(name), new[name]) and old[name] != new[name]]
    return [f"the content of {name} has changed since" for name in changed]


def _remove_run(folder: Path) -> None:
    remove_checkpoints(folder)
    remove_broken_checkpoints(folder)
    shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)
    results = (METRICS_FILE, HISTORY_FILE, CURVES_FILE, BY_BIN_FIGURE, *RESOURCE_FILES, *SEEN_FILES)
    of_classifiers = (UNKNOWN_TYPES_FILE, CALIBRATION_FILE, CALIBRATION_FIGURE)
    # What was measured and told of the weights that go.
    evaluation = (EVALUATION_FILE, PREDICTIONS_FILE, CONFUSION_FILE, ROC_FILE, RELIABILITY_FILE, DOWNSTREAM_FILE)
    card = (CARD_FILE,) if (folder / RECORD_FILE).exists() else ()  # where there was no run it is somebody's own
    published = (*card, INPUTS_FILE, CELLS, FACTS, CHECKSUMS)
    weights = (WEIGHTS_FILE, WEIGHTS_INDEX, *(path.name for path in folder.glob("model-*-of-*.safetensors")))
    for name in (RECORD_FILE, *results, *of_classifiers, *evaluation, *published, *weights):
        (folder / name).unlink(missing_ok=True)
    remove_report(folder)
    remove_event_files(folder)
