"""Reversible residual layers (Gomez et al. 2017; Kitaev et al. 2020, section 3): activations recomputed, not stored.

A layer maps two streams to two streams, ``y1 = x1 + attention(x2)`` and ``y2 = x2 + feed_forward(y1)``, so that its
inputs follow from its outputs. The forward pass keeps the last layer's outputs only; the backward pass rebuilds each
layer's inputs and hands them to the layer below.

What is chosen in the forward pass is replayed in the backward pass, not chosen again: dropout (the random state) and
LSH buckets (the token order). Otherwise rounding in the rebuilt inputs could move a token to another bucket and the
gradient would be that of another function.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Streams(NamedTuple):
    """The two residual streams, each (B, L, hidden)."""

    first: Tensor
    second: Tensor


class ReversibleLayer(Protocol):
    """What a layer of a :class:`ReversibleSequence` offers (besides being an ``nn.Module``)."""

    attention: nn.Module
    feed_forward: nn.Module

    def attend(
        self, hidden_states: Tensor, attention_mask: Tensor | None, order: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention branch's output and the token order it used."""
        ...

    def feed(self, hidden_states: Tensor) -> Tensor:
        """Return the feed-forward branch's output."""
        ...


class ReversibleSequence(nn.Module):
    """Runs reversible layers one after another.

    Parameters
    ----------
    layers
        Modules that offer ``attend`` and ``feed`` (see :class:`ReversibleLayer`).
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, reversible: bool = True
    ) -> Streams:
        """Return both streams after the last layer; they start as two copies of ``hidden_states`` (B, L, hidden).

        With ``reversible=False`` plain autograd stores every activation: the same numbers, more memory.
        """
        streams = Streams(hidden_states, hidden_states)
        if not (reversible and torch.is_grad_enabled()):
            for layer in self.layers:
                streams = _plain(layer, streams, attention_mask)
            return streams
        tape = _Tape()
        for depth, layer in enumerate(self.layers):
            is_last = depth == len(self.layers) - 1
            parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            streams = Streams(
                *_ReversibleLayerFunction.apply(layer, tape, is_last, attention_mask, *streams, *parameters)
            )
        return streams

    def iterate(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Iterable[Streams]:
        """Yield both streams after each layer, by plain autograd."""
        streams = Streams(hidden_states, hidden_states)
        for layer in self.layers:
            streams = _plain(layer, streams, attention_mask)
            yield streams


def _plain(layer: Any, streams: Streams, attention_mask: Tensor | None) -> Streams:
    """Run a layer by plain autograd."""
    first = streams.first + layer.attend(streams.second, attention_mask, None)[0]
    return Streams(first, streams.second + layer.feed(first))


class _Tape:
    """Hands rebuilt streams from one layer's backward pass to that of the layer below, within one backward pass."""

    def __init__(self) -> None:
        self.streams: Streams | None = None

    def take(self) -> Streams:
        assert self.streams is not None, "layers run their backward passes from last to first"
        streams, self.streams = self.streams, None
        return streams


class _RandomState(NamedTuple):
    """The random state before a branch ran, to draw the same dropout again."""

    cpu: Tensor
    device_type: str
    device: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> "_RandomState":
        module = _device_random_module(device)
        return cls(torch.get_rng_state(), device.type, None if module is None else module.get_rng_state(device))

    def replay(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context in which this state rules; what ruled before comes back afterwards."""
        stack = ExitStack()
        module = _device_random_module(device)
        devices = [] if module is None else [device]
        fork_type = "cuda" if module is None else device.type
        stack.enter_context(torch.random.fork_rng(devices=devices, device_type=fork_type))
        torch.set_rng_state(self.cpu)
        if module is not None and self.device is not None:
            module.set_rng_state(self.device, device)
        return stack


def _device_random_module(device: torch.device) -> Any:  # torch.cuda, torch.xpu, …: modules with the same functions
    return None if device.type in ("cpu", "meta", "mps") else torch.get_device_module(device)


def _draws_random_numbers(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Dropout) and child.training and child.p > 0 for child in module.modules())


def _autocast_like(device_type: str, enabled: bool, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, dtype=dtype, enabled=True) if enabled else nullcontext()


class _ReversibleLayerFunction(torch.autograd.Function):
    """One layer: forward without a graph; backward from the outputs.

    The layer's parameters are inputs of the function, so that their gradients return through autograd like any other:
    one accumulation a parameter (as DistributedDataParallel needs), and ``torch.autograd.grad`` and eval mode work.
    """

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context has no public type
        layer: Any,
        tape: _Tape,
        is_last: bool,
        attention_mask: Tensor | None,
        first: Tensor,
        second: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = first.device
        ctx.layer, ctx.tape, ctx.is_last, ctx.attention_mask = layer, tape, is_last, attention_mask
        ctx.parameters = parameters
        ctx.autocast = (device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        ctx.random_before_attend = ctx.random_before_feed = None
        is_random = _draws_random_numbers(layer)
        if is_random:
            ctx.random_before_attend = _RandomState.capture(device)
        attended, ctx.order = layer.attend(second, attention_mask, None)
        new_first = first + attended
        if is_random:
            ctx.random_before_feed = _RandomState.capture(device)
        new_second = second + layer.feed(new_first)
        if is_last:
            ctx.save_for_backward(new_first, new_second)
        return new_first, new_second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_first: Tensor, grad_second: Tensor) -> tuple[Tensor | None, ...]:
        layer, parameters = ctx.layer, ctx.parameters
        first, second = Streams(*ctx.saved_tensors) if ctx.is_last else ctx.tape.take()

        fed, from_first, from_feed = _branch_gradients(
            ctx, layer.feed, first, parameters, grad_second, ctx.random_before_feed
        )
        second = second - fed
        grad_first = grad_first + from_first

        def attend(hidden_states: Tensor) -> Tensor:
            return layer.attend(hidden_states, ctx.attention_mask, ctx.order)[0]

        attended, from_second, from_attend = _branch_gradients(
            ctx, attend, second, parameters, grad_first, ctx.random_before_attend
        )
        first = first - attended
        grad_second = grad_second + from_second

        ctx.tape.streams = Streams(first, second)
        parameter_gradients = (_add(*pair) for pair in zip(from_feed, from_attend, strict=True))
        return None, None, None, None, grad_first, grad_second, *parameter_gradients


def _branch_gradients(
    ctx: Any,
    branch: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    parameters: tuple[Tensor, ...],
    grad_output: Tensor,
    random_state: _RandomState | None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Run a branch again; return its output and the gradients of its input and of the layer's parameters."""
    leaf = hidden_states.detach().requires_grad_()
    replay = nullcontext() if random_state is None else random_state.replay(leaf.device)
    with torch.enable_grad(), replay, _autocast_like(*ctx.autocast):
        output = branch(leaf)
    gradients = torch.autograd.grad(output, (leaf, *parameters), grad_output.to(output.dtype), allow_unused=True)
    return output.detach(), gradients[0], gradients[1:]


def _add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right
