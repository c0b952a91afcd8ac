"""What a run took, as a table like the paper's table 1: everything measured but the paper's own column."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from screformer.train.result_files import finite, write_json, written_aside
from screformer.train.telemetry import GIGABYTE, MeasuredTrainer

RESOURCE_FILES = JSON_FILE, TABLE_FILE = "resources.json", "resources.md"
SECONDS_AN_HOUR = 3600
Json = dict[str, Any]  # Any: whatever JSON holds


class PaperRun(NamedTuple):
    """A row of the paper's table 1, with the cells and epochs of its sections 2.7 and 2.9."""

    device: str
    num_devices: int
    cells_per_device: int
    memory_gb: float
    hours: float
    num_cells: float
    epochs: float


# The paper's figures, the only ones here that are typed.
PAPER = {
    "pretraining": PaperRun("NVIDIA A100", 4, 64, 38, 160, 15e6, 50),
    "fine-tuning": PaperRun("NVIDIA A100", 1, 128, 35, 7, 425e3, 3),
}


def write_resources(folder: Path, trainer: MeasuredTrainer, *, task: str) -> Json:
    """Write ``resources.json`` and ``resources.md`` about a run that has ended, and return the content of the first.

    Parameters
    ----------
    folder
        Of the run.
    trainer
        That has trained.
    task
        ``"pretraining"`` and ``"fine-tuning"`` have the paper's row beside them.
    """
    resources = finite(describe_resources(trainer, task=task))
    write_json(folder / JSON_FILE, resources)
    with written_aside(folder / TABLE_FILE) as aside:
        aside.write_text(resource_table(resources), encoding="utf-8")
    return resources


def describe_resources(trainer: MeasuredTrainer, *, task: str) -> Json:
    """Return what a run took until now, over all its sessions and processes; see `write_resources`."""
    training, usage = trainer.args, trainer.telemetry.usage()
    num_devices = training.world_size * max(1, training.n_gpu)
    per_device, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    speed = usage.cells_per_second
    return {
        "task": task,
        "device": describe_device(training.device) | {"number": num_devices},
        "precision": _precision(training, trainer.model),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "cells_per_step": {
            "per_device": per_device,
            "accumulation": accumulation,
            "devices": num_devices,
            "total": per_device * accumulation * num_devices,
        },
        "peak_memory_gb": {
            "process": usage.peak_process_bytes / GIGABYTE or None,
            "gpu": usage.peak_device_bytes / GIGABYTE if training.device.type == "cuda" else None,
        },
        "seconds": usage.seconds,
        "seconds_in_steps": usage.seconds_in_steps,
        "hours": usage.seconds / SECONDS_AN_HOUR,
        "sessions": usage.num_sessions,
        "cells": usage.num_cells,
        "tokens": usage.num_tokens,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "cells_per_second": speed,
        "cells_per_second_and_device": None if speed is None else speed / num_devices,
        "tokens_per_second": usage.tokens_per_second,
        "paper": _paper_resources(PAPER[task]) if task in PAPER else None,
    }


def describe_device(device: torch.device) -> Json:
    """Return kind and name of what computes, and how many threads do where it is the processor."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    name = _processor_name() if device.type == "cpu" else platform.machine()
    return {"type": device.type, "name": name} | ({"threads": torch.get_num_threads()} if device.type == "cpu" else {})


def resource_table(resources: Mapping[str, Any]) -> str:
    """Return the table in Markdown: a row a figure, this run's and, where it has one, the paper's."""
    paper = resources["paper"]
    columns = [resources] if paper is None else [resources, paper]
    titles = ["This run"] if paper is None else ["This run", "The paper's (table 1)"]
    lines = [
        f"# What {resources['task']} took",
        "",
        "| | " + " | ".join(titles) + " |",
        "| --- |" + " ---: |" * len(titles),
        *("| " + " | ".join([title, *(show(column) for column in columns)]) + " |" for title, show in ROWS.items()),
        "",
        "Time is of training, evaluations and checkpoints included, and is summed where the run was interrupted and "
        "resumed; speed leaves them out. Padding is no token.",
    ]
    if paper is not None:
        lines[-1] += (
            " The paper's column is the paper's own, on its A100s, for a model and cells of another size; its speed is "
            "its cells times its epochs by its hours."
        )
    return "\n".join(lines) + "\n"


def _paper_resources(run: PaperRun) -> Json:
    cells = run.num_cells * run.epochs
    speed = cells / (run.hours * SECONDS_AN_HOUR)
    return {
        "device": {"type": "cuda", "name": run.device, "number": run.num_devices},
        "cells_per_step": {"per_device": run.cells_per_device},
        "peak_memory_gb": {"gpu": run.memory_gb},
        "hours": run.hours,
        "cells": cells,
        "epochs": run.epochs,
        "cells_per_second": speed,
        "cells_per_second_and_device": speed / run.num_devices,
    }


def _precision(training: TrainingArguments, model: torch.nn.Module) -> str:
    mixed = "bf16" if training.bf16 else "fp16" if training.fp16 else None
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{mixed} with {weights} weights" if mixed else weights


def _processor_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _device(resources: Mapping[str, Any]) -> str:
    device = resources["device"]
    threads = f" (threads: {device['threads']})" if "threads" in device else ""
    return f"{device['number']} x {device['name']}{threads}"


def _cells_per_step(resources: Mapping[str, Any]) -> str:
    cells = resources["cells_per_step"]
    if "total" not in cells:
        return f"{cells['per_device']} a device"
    return f"{cells['per_device']} x {cells['accumulation']} x {cells['devices']} = {cells['total']:,}"


def _number(resources: Mapping[str, Any], *keys: str) -> str:
    """Return a figure that is somewhere in `resources`, a dash if it is not."""
    value: Any = resources  # Any: JSON
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


ROWS = {
    "Device": _device,
    "Precision": lambda resources: _number(resources, "precision"),
    "Parameters of the model": lambda resources: _number(resources, "parameters"),
    "Cells a step (a device x accumulation x devices)": _cells_per_step,
    "Peak memory of a GPU, GB": lambda resources: _number(resources, "peak_memory_gb", "gpu"),
    "Peak memory of a process, GB": lambda resources: _number(resources, "peak_memory_gb", "process"),
    "Seconds": lambda resources: _number(resources, "seconds"),
    "Hours": lambda resources: _number(resources, "hours"),
    "Sessions": lambda resources: _number(resources, "sessions"),
    "Epochs": lambda resources: _number(resources, "epochs"),
    "Steps": lambda resources: _number(resources, "steps"),
    "Cells trained on": lambda resources: _number(resources, "cells"),
    "Cells a second": lambda resources: _number(resources, "cells_per_second"),
    "Cells a second and device": lambda resources: _number(resources, "cells_per_second_and_device"),
    "Tokens a second": lambda resources: _number(resources, "tokens_per_second"),
}
