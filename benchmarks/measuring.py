"""Time and peak memory of one call, and how a measurement grows with length.

*Time* is wall time of a call, after one that warms up. Contestants are called in turn, round after round, so that a
slow minute of the machine meets all of them; their medians are compared within one run only.

*Peak memory* is taken in a fresh process for each call: the highest resident set during the call above the resident
set just before it, when weights and inputs are there already and calls at a tiny shape have filled the libraries' own
buffers. So weights and inputs do not count; outputs, activations and gradients (of inputs and of parameters) do. There,
for every contestant, the C library hands freed blocks of 8 MB and more back at once, as in our commands (see
``train/process_memory.py``): what it hoards otherwise is not the contestants'. It needs Linux
(``/proc/self/clear_refs``). On CUDA it is what PyTorch's allocator handed out above what it had before.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from screformer.tokenization.freed_memory import give_back_freed_memory
from screformer.train.process_memory import return_large_blocks

Row = dict[str, Any]  # Any: one row of a JSON table
Step = Literal["forward", "training"]
STEPS: tuple[Step, ...] = ("forward", "training")
PLACE = ("series", "step", "batch_size", "length", "num_layers")  # what tells rows apart, with the contestant
GIGABYTE, MEGABYTE = 10**9, 10**6
FIT_FROM, FIT_TO = 4 * 1024, 64 * 1024
CLEAR_PEAK = "5"  # proc(5): sets VmHWM back to what is resident now
CLEAR_REFS = Path("/proc/self/clear_refs")
WARM_UP_CHUNKS = 4


class CannotRunError(RuntimeError):
    """A call cannot be measured at a shape; the message is the reason, as results give it."""


@dataclass(frozen=True)
class Shape:
    """The shape to run at; attention alone has no use for `num_layers` and `intermediate_size`."""

    length: int
    batch_size: int = 1
    num_layers: int = 1
    hidden_size: int = 200
    num_heads: int = 10
    intermediate_size: int = 800
    bucket_size: int = 64
    num_hashes: int = 4


class Workload(NamedTuple):
    """Something to measure, at one shape.

    Attributes
    ----------
    forward
        Computes the output.
    inputs
        Leaves that get gradients in the training step, as the parameters of `module` do.
    gradient
        What the backward pass starts from, as for the loss ``(output * gradient).sum()``.
    module
        Is in training mode in the training step only.
    """

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    gradient: Tensor
    module: nn.Module | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The module's parameters."""
        return [] if self.module is None else list(self.module.parameters())


Build = Callable[[Shape, str], Workload]  # shape, device


class MemoryUse(NamedTuple):
    """Peak memory of a call, how much of it is gradients of parameters, and the time of that one call."""

    peak_bytes: int
    parameter_gradient_bytes: int
    seconds: float


def make_call(workload: Workload, step: Step) -> Callable[[], None]:
    """Return the call to measure: the forward pass without gradients, or forward and backward (no optimizer)."""
    if workload.module is not None:
        workload.module.train(step == "training")
    if step == "forward":
        return torch.no_grad()(lambda: _discard(workload.forward()))
    for tensor in workload.inputs:
        tensor.requires_grad_()

    def train() -> None:
        for tensor in (*workload.inputs, *workload.parameters):
            tensor.grad = None
        workload.forward().backward(workload.gradient)

    return train


def time_in_turn(
    calls: Mapping[str, Callable[[], None]], *, repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the seconds of each call, `repeats` a name: one round to warm up, then all in turn, round after round."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device=device))
    return seconds


def seconds_of(call: Callable[[], None], *, device: str = "cpu") -> float:
    """Return the wall time of a call; on CUDA that of its kernels, by events."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def can_measure_memory() -> bool:
    """Return whether the system tells the peak of this process's memory."""
    return CLEAR_REFS.exists()


def peak_memory(call: Callable[[], None], *, device: str = "cpu") -> int:
    """Return the bytes that a call needs at its highest above what was there before; see the module's text.

    What this process has freed and kept is used again unseen: for results, take `memory_in_new_process`.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not can_measure_memory():
        raise OSError(f"peak memory on the CPU needs Linux, which has {CLEAR_REFS}; this is {sys.platform}.")
    give_back_freed_memory()
    CLEAR_REFS.write_text(CLEAR_PEAK)
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


def memory_in_new_process(
    build: Build, shape: Shape, step: Step, *, device: str = "cpu", memory_limit: float, time_limit: float
) -> MemoryUse:
    """Return the peak memory of a step in a process of its own.

    Parameters
    ----------
    build
        A function at the top of a module that can be imported.
    shape, step, device
        What to run, and where.
    memory_limit
        GB; a call that wants more fails (CPU only).
    time_limit
        Seconds after which the process is ended.

    Raises
    ------
    CannotRunError
        The call wants more memory or time, or fails.
    """
    request = {
        "build": f"{build.__module__}:{build.__name__}",
        "shape": asdict(shape),
        "step": step,
        "device": device,
        "memory_limit": memory_limit,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "screformer.benchmarks.measuring", json.dumps(request)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=time_limit, check=False)
    except subprocess.TimeoutExpired as error:
        raise CannotRunError(f"no result within {time_limit:g} s") from error
    if done.returncode < 0:
        raise CannotRunError(f"ended by signal {-done.returncode} (out of memory, most likely)")
    if done.returncode:
        raise CannotRunError(_reason(done.stderr, memory_limit))
    return MemoryUse(**json.loads(done.stdout.splitlines()[-1]))


def fit_exponent(lengths: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the exponent e of ``value ~ length ** e`` by least squares on logarithms; None below two lengths."""
    if len(set(lengths)) < 2:
        return None
    x, y = ([math.log(number) for number in numbers] for numbers in (lengths, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def describe_device(device: str) -> dict[str, Any]:
    """Return the processor's name and the number of threads."""
    if torch.device(device).type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device), "threads": torch.get_num_threads()}
    cpu_info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpu_info.read_text(), re.MULTILINE) if cpu_info.exists() else []
    return {"type": "cpu", "name": names[0] if names else "unknown", "threads": torch.get_num_threads()}


def _measure_memory(request: Mapping[str, Any]) -> MemoryUse:
    """Do what `memory_in_new_process` asks for, in this process."""
    return_large_blocks()
    torch.set_num_threads(request["threads"])
    module, _, name = request["build"].partition(":")
    build: Build = getattr(importlib.import_module(module), name)
    shape, step, device = Shape(**request["shape"]), request["step"], request["device"]
    for warm_up in STEPS:
        make_call(build(replace(shape, length=WARM_UP_CHUNKS * shape.bucket_size, batch_size=1), device), warm_up)()
    workload = build(shape, device)
    call = make_call(workload, step)
    if torch.device(device).type == "cpu":
        _limit_memory(request["memory_limit"])
    start = time.perf_counter()
    peak = peak_memory(call, device=device)
    seconds = time.perf_counter() - start
    gradients = [tensor.grad for tensor in workload.parameters if tensor.grad is not None]
    return MemoryUse(peak, sum(gradient.nbytes for gradient in gradients), seconds)


def _limit_memory(gigabytes: float) -> None:
    """Make this process fail, rather than the machine, when it asks for more than this above what it has."""
    import resource  # Unix only

    most = status_bytes("VmData") + int(gigabytes * GIGABYTE)
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def status_bytes(name: str) -> int:
    """Return a size that Linux gives of this process: VmRSS is resident, VmHWM the most that was, RssAnon no file's."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"Linux gives {name} of every process"
    return int(found[1]) * 1024


def _reason(error_text: str, memory_limit: float) -> str:
    """Return the one line that says why a process failed."""
    if re.search(r"can't allocate memory|MemoryError|OutOfMemoryError|bad_alloc", error_text):
        return f"needs more than {memory_limit:g} GB"
    lines = error_text.strip().splitlines()
    return lines[-1] if lines else "failed without a message"


def _discard(_: object) -> None:
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the memory of one call, as `memory_in_new_process` asks for in its only argument, and write JSON."""
    (request,) = sys.argv[1:] if argv is None else argv
    sys.stdout.write(json.dumps(_measure_memory(json.loads(request))._asdict()) + "\n")


if __name__ == "__main__":
    main()
