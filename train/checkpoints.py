"""Checkpoints of a run that may be killed at any moment: which of them are whole, and a history without gaps."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

logger = logging.getLogger(__name__)


class LogBeforeSaving(TrainerCallback):
    """Logs the loss at every checkpoint and at the end.

    The Trainer forgets at an interruption what it has summed up since its last log. So logs end where checkpoints do,
    and the history of a resumed run is that of an unbroken one.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # Any: Trainer's own
        """Ask for a log if the run saves or ends here."""
        control.should_log |= (
            control.should_save or control.should_training_stop or state.global_step >= state.max_steps
        )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # Any: Trainer's own
        """Ask for a log if the run saves or ends here."""
        self.on_step_end(args, state, control)


def mean_training_loss(log_history: Iterable[Mapping[str, Any]]) -> float | None:  # Any: JSON
    """Return the mean loss of all steps of a run, before and after its interruptions; None if there were none."""
    total, last_step = 0.0, 0
    for entry in log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last_step)
            last_step = entry["step"]
    return total / last_step if last_step else None


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint of a run that was written to its end, if any.

    The state of the Trainer is what is written last (see `CellTrainer`).
    """
    whole = [path for path in _checkpoints(folder) if _is_whole(path)]
    return str(max(whole, key=_step)) if whole else None


def remove_broken_checkpoints(folder: Path) -> None:
    """Delete what an interruption has left half written, so that nothing takes it for a checkpoint."""
    for path in _checkpoints(folder):
        if not _is_whole(path):
            logger.warning("deleting %s: it was not written to its end", path)
            shutil.rmtree(path)


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints that a Trainer wrote into a folder, and nothing else."""
    for path in _checkpoints(folder):
        if (path / TRAINER_STATE_NAME).exists():
            logger.info("deleting %s", path)
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and re.fullmatch(r".*-\d+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
