"""Inference as CUDA graphs: the kernels of a batch shape are recorded once, and later launched all at once.

With every gene a batch has always the same shape, and a small one takes the CPU longer to launch than the GPU to
compute. Where batches are large, or differ in length, there is nothing to gain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

WARM_UP_CALLS = 3  # kernels compile, and libraries set memory aside, before anything can be recorded
MOST_SHAPES = 4  # a recording keeps the memory of its activations

Batch = Mapping[str, Tensor]
Shape = tuple[tuple[str, torch.Size, torch.dtype], ...]


class Recording(NamedTuple):
    """A graph, the tensors that it reads and the one that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    output: Tensor


class GraphedForward:
    """A model's output for batches, replayed from CUDA graphs where it can be, else computed as ever.

    The first batch of a shape is recorded; at most four shapes are. On another device, and where recording fails
    (which is said once), the model is called. The numbers are the same.

    Parameters
    ----------
    model
        In evaluation mode; its weights may change in place, not move.
    output
        Name of the output to return, such as ``"logits"``.
    """

    def __init__(self, model: nn.Module, output: str) -> None:
        self.model = model
        self.output = output
        self._recordings: dict[Shape, Recording] = {}
        self._can_record = True

    def __call__(self, batch: Batch) -> Tensor:
        """Return the output of a batch, whose tensors are on the model's device."""
        if not (self._can_record and is_on_gpu(batch)):
            return self._compute(batch)
        shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(batch.items()))
        if shape not in self._recordings:
            if len(self._recordings) == MOST_SHAPES:
                return self._compute(batch)
            try:
                self._recordings[shape] = self._record(batch)
            except RuntimeError as error:
                self._can_record = False
                logger.warning("inference runs without CUDA graphs: %s", str(error).strip().splitlines()[0])
                return self._compute(batch)
        recording = self._recordings[shape]
        for name, tensor in batch.items():
            recording.inputs[name].copy_(tensor, non_blocking=True)
        recording.graph.replay()
        return recording.output.clone()  # the next replay writes into the same memory

    def _compute(self, batch: Batch) -> Tensor:
        output: Tensor = self.model(**batch)[self.output]
        return output

    def _record(self, batch: Batch) -> Recording:
        inputs = {name: tensor.clone() for name, tensor in batch.items()}
        return record(lambda: self._compute(inputs), inputs)


def is_on_gpu(batch: Batch) -> bool:
    """Whether a batch is on a device that has CUDA graphs."""
    return next(iter(batch.values())).device.type == "cuda"


def record(compute: Callable[[], Tensor], inputs: dict[str, Tensor]) -> Recording:
    """Record a computation on given tensors as a CUDA graph.

    Raises
    ------
    RuntimeError
        Something in it cannot be recorded, such as waiting for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = compute()
    return Recording(graph, inputs, output)
