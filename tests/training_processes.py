"""Training runs in processes of their own, alone or several together: what a launcher does, without its import times.

The processes are forked from a server that has the package imported. Each is a fresh one to the libraries: nothing
distributed, no random number drawn.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

DEADLINE_SECONDS = 400  # of a busy machine
VOLATILE = ("runtime", "per_second", "memory_gb")


@dataclass(frozen=True)
class Change:
    """What differs from a plain run of `main`.

    Attributes
    ----------
    environment
        Variables to set.
    frozen
        Parts of parameter names that are not trained.
    killed_at
        (moment, step) at which the process kills itself: "begin" and "end" of a step, "saving" (the model is written,
        the rest of the checkpoint is not), "saved".
    """

    environment: dict = field(default_factory=dict)
    frozen: str | None = None
    killed_at: tuple | None = None


def run(task, argv, *, num_processes=1, change=None):
    """Run `pretrain` or `finetune` with these arguments and return the exit codes of its processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_processes", "screformer.train.pretrain", "screformer.train.finetune"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [(rank, num_processes, port) for rank in range(num_processes)]
    processes = [context.Process(target=_run_as_one, args=(task, argv, place, change or Change())) for place in places]
    for process in processes:
        process.start()
    deadline = time.monotonic() + DEADLINE_SECONDS
    # Where one fails the others would wait for it.
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        processes[0].join(0.05)
        if any(process.exitcode for process in processes):
            time.sleep(1)
            break
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def read_run(folder):
    """Return the history of a run without times, its metrics and its weights."""
    folder = Path(folder)
    history, metrics = (json.loads((folder / name).read_text()) for name in ("log_history.json", "metrics.json"))
    metrics.pop("training_seconds")
    metrics.pop("validation_calibrated_on", None)  # words
    # One level deep, as pytest.approx wants it.
    for row in metrics.pop("held_out_by_bin", []):
        metrics |= {f"bin {row['bin']} {name}": value for name, value in row.items() if value is not None}
    history = [
        {name: value for name, value in entry.items() if not name.endswith(VOLATILE)}
        for entry in history
        if "train_runtime" not in entry
    ]
    return history, metrics, load_file(folder / "model.safetensors")


def _run_as_one(task, argv, place, change):
    from screformer.train import finetune, pretrain

    # As in a process that was not made by multiprocessing: loaders fork their workers, which end with it.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    os.environ.update(change.environment)
    rank, num_processes, port = place
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    if change.environment.get("ACCELERATE_USE_FSDP") == "true":
        _allow_fsdp_on_the_processor()
    module = {"pretrain": pretrain, "finetune": finetune}[task]
    if change.frozen is not None:
        _freeze(module, change.frozen)
    name = {"pretrain": "MaskedGeneTrainer", "finetune": "CellTypeTrainer"}[task]
    setattr(module, name, _changed_trainer(getattr(module, name), change))
    module.main(argv)


def _changed_trainer(base, change):
    moment, step = change.killed_at or (None, None)

    class ChangedTrainer(base):
        """Writes down how it was distributed, and dies when it must."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            self._die_at("begin")
            result = super().training_step(model, inputs, num_items_in_batch)
            if self.args.process_index == 0 and self.state.global_step == 0:
                kinds = sorted({type(parameter).__name__ for parameter in model.parameters()})
                names = [kind.__name__ for kind in type(model).__mro__]
                how = {"model": names, "parameters": kinds, "distributed": str(self.accelerator.distributed_type)}
                Path(f"{self.args.output_dir}.how.json").write_text(json.dumps(how))
            return result

        def _maybe_log_save_evaluate(self, *args, **kwargs):
            self._die_at("end")
            super()._maybe_log_save_evaluate(*args, **kwargs)

        def _save_optimizer_and_scheduler(self, output_dir):
            self._die_at("saving")
            super()._save_optimizer_and_scheduler(output_dir)

        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            self._die_at("saved")

        def _die_at(self, what):
            if (what, self.state.global_step) == (moment, step):
                sys.stderr.flush()
                os.kill(os.getpid(), signal.SIGKILL)

    return ChangedTrainer


def _freeze(module, part):
    start = module.starting_model

    def start_frozen(*args, **kwargs):
        model = start(*args, **kwargs)
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.requires_grad_(False)
        return model

    module.starting_model = start_frozen


def _allow_fsdp_on_the_processor():
    """Let accelerate choose FSDP, which it does for devices only; all that it then does is its own and torch's."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    initialize = AcceleratorState.__init__

    def choose_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if self.distributed_type == DistributedType.MULTI_CPU and "fsdp_plugin" in self.__dict__:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = choose_fsdp
