"""What a training run costs: cells and tokens a second, time and memory, counted as it runs and summed when it resumes.

`MeasuredTrainer` counts; `TrainingTelemetry` keeps the sums and travels with the Trainer's checkpoints;
`HistoryWriter` leaves the curves beside them while the run goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import ExportableState, ProgressCallback

from screformer.train.figures import plot_training_curves
from screformer.train.process_memory import forget_peak, peak_process_memory
from screformer.train.result_files import finite, write_json

HISTORY_FILE, CURVES_FILE = "log_history.json", "training_curves.png"
EVENT_FILES = "runs/*/events.out.tfevents.*"  # TensorBoard's
GIGABYTE = 10**9
FEW_STEPS = 50
logger = logging.getLogger(__name__)
# Of an interrupted run the curves may be older than its history: they are drawn anew when so many times the drawing's
# own time has passed, so that they never take more than a twentieth of it.
CURVES_INTERVAL = 20
# What `report_to` may name -> how its package is had. Others are known to transformers alone.
REPORTERS = {"tensorboard": "pip install 'screformer[tensorboard]'", "trackio": "pip install trackio"}


@dataclass
class Usage:
    """What a run has taken, over all its sessions and processes.

    Attributes
    ----------
    seconds
        From the beginning of training to its end, evaluations and checkpoints included.
    seconds_in_steps
        Of these, without evaluations and checkpoints: what speed is measured on.
    num_cells, num_tokens
        Trained on; a cell counts again in every epoch, padding never does.
    peak_process_bytes
        The most that was resident in the memory of one process.
    peak_device_bytes
        The most that tensors held on one GPU; 0 without one.
    num_sessions
        1, and one more each time that the run was resumed.
    """

    seconds: float = 0.0
    seconds_in_steps: float = 0.0
    num_cells: int = 0
    num_tokens: int = 0
    peak_process_bytes: int = 0
    peak_device_bytes: int = 0
    num_sessions: int = 0

    @property
    def cells_per_second(self) -> float | None:
        """Speed of the steps; None before the first."""
        return self.num_cells / self.seconds_in_steps if self.seconds_in_steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the steps; None before the first."""
        return self.num_tokens / self.seconds_in_steps if self.seconds_in_steps else None


class _Stopwatch:
    """Adds up the time between `go` and `pause`."""

    def __init__(self) -> None:
        self._before = 0.0
        self._started: float | None = None

    def go(self) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def pause(self) -> None:
        self._before, self._started = self.seconds, None

    @property
    def seconds(self) -> float:
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before + running


class TrainingTelemetry(TrainerCallback, ExportableState):
    """Keeps the sums of a run, in the Trainer's checkpoints too: a resumed run goes on counting where that one was.

    What an interrupted session did after its last checkpoint is lost, and with it its time: it is not counted.

    Attributes
    ----------
    earlier
        The `Usage` of the sessions before this one, as a dict; the Trainer sets it from a checkpoint.
    """

    def __init__(self) -> None:
        self.earlier: dict[str, Any] = asdict(Usage())  # Any: JSON
        self._begin()

    def _begin(self) -> None:
        self._in_session, self._in_steps = _Stopwatch(), _Stopwatch()
        self._is_training = False
        # Of this process, and of all of them when they last met.
        self._num_cells, self._num_tokens = 0, torch.zeros((), dtype=torch.long)
        self._gathered = Usage()
        self._logged = Usage()

    def count(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Add a batch of training cells."""
        tokens = inputs["input_ids"]
        self._num_cells += len(tokens)
        mask = inputs.get("attention_mask")
        # Stays on the device until it is asked for, so that no step waits for it.
        self._num_tokens = self._num_tokens + (tokens.numel() if mask is None else mask.sum())

    def usage(self) -> Usage:
        """Return what the run has taken until now; cells, tokens and memory as of when the processes last met."""
        earlier, session = Usage(**self.earlier), self._gathered
        return Usage(
            seconds=earlier.seconds + self._in_session.seconds,
            seconds_in_steps=earlier.seconds_in_steps + self._in_steps.seconds,
            num_cells=earlier.num_cells + session.num_cells,
            num_tokens=earlier.num_tokens + session.num_tokens,
            peak_process_bytes=max(earlier.peak_process_bytes, session.peak_process_bytes),
            peak_device_bytes=max(earlier.peak_device_bytes, session.peak_device_bytes),
            num_sessions=earlier.num_sessions + 1,
        )

    def numbers_to_log(self) -> dict[str, float]:
        """Return speed since this was last asked for, and the peaks of memory in gigabytes."""
        usage, before = self.usage(), self._logged
        self._logged = usage
        recent = Usage(
            seconds_in_steps=usage.seconds_in_steps - before.seconds_in_steps,
            num_cells=usage.num_cells - before.num_cells,
            num_tokens=usage.num_tokens - before.num_tokens,
        )
        logs = {
            "cells_per_second": recent.cells_per_second,
            "tokens_per_second": recent.tokens_per_second,
            "peak_memory_gb": usage.peak_process_bytes / GIGABYTE or None,
            "peak_gpu_memory_gb": usage.peak_device_bytes / GIGABYTE or None,
        }
        return {name: value for name, value in logs.items() if value is not None}

    def state(self) -> dict[str, Any]:  # Any: as ExportableState has it
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"earlier": asdict(self.usage())}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks."""
        self._begin()
        self._logged = Usage(**self.earlier)
        # A checkpoint of an older release does not have it, and the Trainer only saves what it knows of.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        forget_peak()
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)
        self._is_training = True
        self._in_session.go()
        if not args.eval_on_start:  # else they go on after it
            self._in_steps.go()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add up all processes where that will be logged or saved, and leave evaluations out of the speed."""
        if control.should_log or control.should_evaluate or control.should_save:
            self._meet(args.device)
        if control.should_evaluate or control.should_save:
            self._in_steps.pause()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do as after a step."""
        self.on_step_end(args, state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the clock of the steps go on, unless a checkpoint comes first."""
        if self._is_training and not control.should_save:
            self._in_steps.go()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the clock of the steps go on."""
        if self._is_training:
            self._in_steps.go()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clocks."""
        self._in_steps.pause()
        self._meet(args.device)
        self._in_session.pause()
        self._is_training = False

    def _meet(self, device: torch.device) -> None:
        """Sum cells and tokens over all processes, and take the largest peaks."""
        own = [self._num_cells, int(self._num_tokens), peak_process_memory(), peak_device_memory(device)]
        everyone = gather(torch.tensor([own], device=device))
        num_cells, num_tokens, _, _ = everyone.sum(dim=0).tolist()
        _, _, peak_process, peak_device = everyone.amax(dim=0).tolist()
        self._gathered = Usage(
            num_cells=num_cells,
            num_tokens=num_tokens,
            peak_process_bytes=peak_process,
            peak_device_bytes=peak_device,
        )


class MeasuredTrainer(Trainer):
    """A Trainer that counts its cells and tokens and logs its speed and memory; its bar shows them.

    With every loss ``cells_per_second``, ``tokens_per_second``, ``peak_memory_gb`` and, on a GPU,
    ``peak_gpu_memory_gb`` are logged, and so reach the history and whatever `report_to` names.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: Trainer's own
        super().__init__(*args, **kwargs)
        self.add_callback(TrainingTelemetry())
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(TrainingBar())

    @property
    def telemetry(self) -> TrainingTelemetry:
        """The counter; another object after a checkpoint was loaded, and so never to be kept."""
        return next(item for item in self.callback_handler.callbacks if isinstance(item, TrainingTelemetry))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count the batch and train on it."""
        self.telemetry.count(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, speed and memory added where a training loss is."""
        if "loss" in logs:
            logs = {**logs, **self.telemetry.numbers_to_log()}
        super().log(logs, *args, **kwargs)


class TrainingBar(ProgressCallback):
    """A bar of steps with the time left; loss and speed stand in it instead of a line a log, a line an evaluation."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest numbers."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            speeds = {"cells/s": logs.get("cells_per_second"), "tokens/s": logs.get("tokens_per_second")}
            shown = {"loss": f"{logs['loss']:.4f}"} | {name: f"{value:,.0f}" for name, value in speeds.items() if value}
            self.training_bar.set_postfix(shown)
        elif "eval_loss" in logs:
            self.training_bar.write(describe_scores(logs))


def describe_scores(logs: Mapping[str, Any]) -> str:
    """Return an evaluation in a line: the epoch, the loss on held-out cells, and the scores between 0 and 1."""
    scores = {
        name.removeprefix("eval_").replace("_", " "): value
        for name, value in logs.items()
        if name.startswith("eval_") and name.endswith(("_accuracy", "_f1"))
    }
    parts = [f"held-out loss {logs['eval_loss']:.4f}", *(f"{name} {value:.4f}" for name, value in scores.items())]
    return f"epoch {logs.get('epoch', 0):g}: {', '.join(parts)}"


class FewStepsWarner(TrainerCallback):
    """Says so where a run has hardly any optimizer steps and nobody asked for so few."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn."""
        if args.max_steps <= 0 and state.max_steps < FEW_STEPS and state.is_world_process_zero:
            logger.warning(
                "the training has %d optimizer steps, of %d x %d cells each: hardly anything is learned in so few. "
                "Take a recipe for few cells (finetune-small, pretrain-tiny), smaller steps "
                "(--per_device_train_batch_size, --gradient_accumulation_steps), or more epochs (--num_train_epochs)",
                state.max_steps,
                args.gradient_accumulation_steps,
                args.train_batch_size * args.world_size,
            )


class HistoryWriter(TrainerCallback):
    """Writes history and curves after every evaluation, so that a run leaves them whatever ends it.

    Parameters
    ----------
    folder
        Of the run.
    title, scores
        As for `plot_training_curves`.
    """

    def __init__(self, folder: Path, *, title: str, scores: Sequence[str]) -> None:
        self.folder, self.title, self.scores = folder, title, scores
        self._is_training = False
        self._draw_again_at = 0.0

    def write(self, log_history: Sequence[Mapping[str, Any]], *, draws: bool = True) -> None:
        """Write ``log_history.json`` and, if it `draws`, the same as ``training_curves.png``."""
        history = finite(list(log_history))
        write_json(self.folder / HISTORY_FILE, history)
        if draws:
            plot_training_curves(history, self.folder / CURVES_FILE, title=self.title, scores=self.scores)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to listen."""
        self._is_training = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write, if this is an evaluation during the training."""
        if not (self._is_training and state.is_world_process_zero):
            return
        start = time.monotonic()
        draws = start >= self._draw_again_at
        self.write(state.log_history, draws=draws)
        if draws:
            now = time.monotonic()
            self._draw_again_at = now + CURVES_INTERVAL * (now - start)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen no more: what comes now is the evaluation of the model that is kept."""
        self._is_training = False


def peak_device_memory(device: torch.device) -> int:
    """Return the most bytes that tensors held on a GPU since the run began; 0 where the device is none."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def check_report_to(training: TrainingArguments) -> None:
    """Raise ValueError, naming the remedy, where `report_to` names TensorBoard or trackio and it is not installed."""
    installed = get_available_reporting_integrations()
    for name, remedy in REPORTERS.items():
        if name in training.report_to and name not in installed:
            raise ValueError(
                f"report_to={training.report_to}: the package {name} is not installed; {remedy}, or leave {name} out"
            )


def remove_event_files(folder: Path) -> None:
    """Delete what TensorBoard was told of earlier runs in `folder`, and the folders that held nothing else."""
    for path in folder.glob(EVENT_FILES):
        path.unlink()
    for place in (*folder.glob("runs/*"), folder / "runs"):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
