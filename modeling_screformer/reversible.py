"""Reversible residual layers (Gomez et al. 2017; Kitaev et al. 2020, section 3): activations recomputed, not stored.

A layer maps two streams to two streams, ``y1 = x1 + attention(x2)`` and ``y2 = x2 + feed_forward(y1)``, so that its
inputs follow from its outputs. The forward pass keeps the last layer's outputs only; the backward pass rebuilds each
layer's inputs and hands them to the layer below.

What is chosen in the forward pass is replayed in the backward pass, not chosen again: dropout (the random state) and
LSH buckets (the token order). Otherwise rounding in the rebuilt inputs could move a token to another bucket and the
gradient would be that of another function.

Both branches run over blocks of a batch (see token_blocks.py), in the forward pass and in the backward pass alike.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .token_blocks import BlockPlan, TokenBlock, plan_blocks


class Streams(NamedTuple):
    """The two residual streams, each (B, L, hidden)."""

    first: Tensor
    second: Tensor


class TokenOrders:
    """The order that each layer's attention sorts the tokens of a cell into, to be used again.

    The first forward pass that is given an empty one fills it, with its only cell's. Later passes take the order from
    it and hash nothing, for any number of cells with the same genes: what attends to what stays as it was while their
    embeddings change, as explanations need it.

    Attributes
    ----------
    layers
        (1, H, R, L) each; None where attention is exact.
    """

    def __init__(self) -> None:
        self.layers: list[Tensor | None] = []

    def check(self, shape: torch.Size) -> None:
        """Raise ValueError unless cells of (B, L, ...) fit."""
        known = next((order.shape[-1] for order in self.layers if order is not None), None)
        if not self.layers and shape[0] != 1:
            msg = f"token_orders is empty and the batch has {shape[0]} cells; fill it with a pass of one cell."
            raise ValueError(msg)
        if known is not None and known != shape[1]:
            msg = f"token_orders are of {known} tokens, the batch has {shape[1]}; give cells with the same genes."
            raise ValueError(msg)

    def of_layer(self, depth: int) -> Tensor | None:
        """Return a layer's order; None where it is not known yet, or attention is exact."""
        return self.layers[depth] if depth < len(self.layers) else None

    def keep(self, depth: int, orders: list[Tensor | None]) -> None:
        """Keep what a layer used, if it is not known yet."""
        if depth == len(self.layers):
            self.layers.append(orders[0])


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

    @torch.compiler.disable
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        reversible: bool = True,
        token_orders: TokenOrders | None = None,
    ) -> Streams:
        """Return both streams after the last layer; they start as two copies of ``hidden_states`` (B, L, hidden).

        With ``reversible=False`` plain autograd stores every activation: the same numbers, more memory. Padding keeps
        its input, or whatever else costs nothing. ``torch.compile`` of a model around it breaks its graph here, once.
        ``token_orders`` are filled or used, see :class:`TokenOrders`.
        """
        streams = Streams(hidden_states, hidden_states)
        if not (reversible and torch.is_grad_enabled()):
            for streams in self.iterate(hidden_states, attention_mask, token_orders):  # noqa: B007 - the last ones
                pass
            return streams
        tape, plan = _Tape(), plan_blocks(hidden_states, attention_mask)
        if token_orders is not None:
            token_orders.check(hidden_states.shape)
        for depth, layer in enumerate(self.layers):
            is_last = depth == len(self.layers) - 1
            parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
            call = _Call(layer, tape, is_last, plan, _orders_of_blocks(token_orders, depth, plan))
            streams = Streams(*_ReversibleLayerFunction.apply(call, *streams, *parameters))
            if token_orders is not None:
                token_orders.keep(depth, call.orders)
        return streams

    def iterate(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, token_orders: TokenOrders | None = None
    ) -> Iterator[Streams]:
        """Yield both streams after each layer, by plain autograd."""
        plan, streams = plan_blocks(hidden_states, attention_mask), Streams(hidden_states, hidden_states)
        if token_orders is not None:
            token_orders.check(hidden_states.shape)
        for depth, layer in enumerate(self.layers):
            orders = _orders_of_blocks(token_orders, depth, plan)
            first = _add_branch(streams.first, streams.second, _attend_blocks(layer, plan, orders))
            streams = Streams(first, _add_branch(streams.second, first, _feed_blocks(layer, plan)))
            if token_orders is not None:
                token_orders.keep(depth, orders)
            yield streams


def _orders_of_blocks(token_orders: TokenOrders | None, depth: int, plan: BlockPlan) -> list[Tensor | None]:
    """Return a layer's token order for each block of attention; None where it is to be found."""
    order = None if token_orders is None else token_orders.of_layer(depth)
    if order is None:
        return [None] * len(plan.attention)
    return [order.expand(block.cells.stop - block.cells.start, -1, -1, -1) for block in plan.attention]


BlockBranch = tuple[TokenBlock, Callable[[Tensor], Tensor]]


def _attend_blocks(layer: Any, plan: BlockPlan, orders: list[Tensor | None]) -> Iterator[BlockBranch]:
    """Yield each block with the attention branch for it; ``orders`` gives or takes each block's token order."""
    for index, block in enumerate(plan.attention):

        def attend(hidden_states: Tensor, index: int = index) -> Tensor:
            attended, orders[index] = layer.attend(hidden_states, plan.masks[index], orders[index])
            return attended

        yield block, attend


def _feed_blocks(layer: Any, plan: BlockPlan) -> Iterator[BlockBranch]:
    """Yield each block with the feed-forward branch for it."""
    for block in plan.feed_forward:
        yield block, layer.feed


def _add_branch(stream: Tensor, source: Tensor, branches: Iterable[BlockBranch]) -> Tensor:
    """Return ``stream`` plus what a branch makes of ``source``."""
    result = stream.clone()
    for block, branch in branches:
        block.of(result).add_(branch(block.of(source)))
    return result


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
        return cls(torch.get_rng_state(), device.type, _device_random_state(device))

    def replay(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return a context in which this state rules; what ruled before comes back afterwards."""
        stack = ExitStack()
        stack.callback(self.capture(device)._restore, device)
        self._restore(device)
        return stack

    def _restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is None:
            return
        if device.type == "mps":
            torch.mps.set_rng_state(self.device)
        else:
            torch.get_device_module(device).set_rng_state(self.device, device)


def _device_random_state(device: torch.device) -> Tensor | None:
    if device.type in ("cpu", "meta"):
        return None
    # torch.cuda, torch.xpu, … have the same functions; Apple's GPUs come one a machine.
    return torch.mps.get_rng_state() if device.type == "mps" else torch.get_device_module(device).get_rng_state(device)


def _draws_random_numbers(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Dropout) and child.training and child.p > 0 for child in module.modules())


class _Call(NamedTuple):
    """What a layer's forward pass is called with, besides tensors that have gradients."""

    layer: Any
    tape: _Tape
    is_last: bool
    plan: BlockPlan
    orders: list[Tensor | None]


class _ReversibleLayerFunction(torch.autograd.Function):
    """One layer: forward without a graph; backward from the outputs.

    The layer's parameters are inputs of the function, so that their gradients return through autograd like any other:
    one accumulation a parameter (as DistributedDataParallel needs), and ``torch.autograd.grad`` and eval mode work.
    """

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context has no public type
        call: _Call,
        first: Tensor,
        second: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device, layer = first.device, call.layer
        ctx.call, ctx.parameters = call, parameters
        ctx.autocast = (device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        ctx.random_before_attend = ctx.random_before_feed = None
        is_random = _draws_random_numbers(layer)
        if is_random:
            ctx.random_before_attend = _RandomState.capture(device)
        new_first = _add_branch(first, second, _attend_blocks(layer, call.plan, call.orders))
        call.orders[:] = map(_smaller, call.orders)
        if is_random:
            ctx.random_before_feed = _RandomState.capture(device)
        new_second = _add_branch(second, new_first, _feed_blocks(layer, call.plan))
        if call.is_last:
            ctx.save_for_backward(new_first, new_second)
        return new_first, new_second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_first: Tensor, grad_second: Tensor) -> tuple[Tensor | None, ...]:
        call, gradients = ctx.call, _ParameterGradients(ctx.parameters)
        if call.is_last:  # these belong to the user; those of the layers below are our own, and are overwritten
            first, second = (tensor.clone() for tensor in ctx.saved_tensors)
            grad_first, grad_second = grad_first.clone(), grad_second.clone()
        else:
            first, second = call.tape.take()

        branches = _feed_blocks(call.layer, call.plan)
        with _replay(ctx, ctx.random_before_feed, first.device):
            _undo_branch(second, first, grad_second, grad_first, branches, gradients)
        branches = _attend_blocks(call.layer, call.plan, list(call.orders))
        with _replay(ctx, ctx.random_before_attend, first.device):
            _undo_branch(first, second, grad_first, grad_second, branches, gradients)

        call.tape.streams = Streams(first, second)
        return None, grad_first, grad_second, *gradients.sums


class _ParameterGradients:
    """Sums of the gradients of a layer's parameters over blocks."""

    def __init__(self, parameters: tuple[Tensor, ...]) -> None:
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Iterable[Tensor | None]) -> None:
        for index, gradient in enumerate(gradients):
            known = self.sums[index]
            if known is None:
                self.sums[index] = gradient
            elif gradient is not None:
                known.add_(gradient)


def _undo_branch(
    stream: Tensor,
    source: Tensor,
    grad_stream: Tensor,
    grad_source: Tensor,
    branches: Iterable[BlockBranch],
    gradients: _ParameterGradients,
) -> None:
    """Undo ``stream += branch(source)`` in place, and add what flows back through the branch to ``grad_source``."""
    for block, branch in branches:
        leaf = block.of(source).detach().requires_grad_()
        output = branch(leaf)
        grad_output = block.of(grad_stream).to(output.dtype)
        grad_leaf, *of_parameters = torch.autograd.grad(
            output, (leaf, *gradients.parameters), grad_output, allow_unused=True
        )
        gradients.add(of_parameters)
        with torch.no_grad():
            block.of(stream).sub_(output)
            block.of(grad_source).add_(grad_leaf)


def _replay(ctx: Any, random_state: _RandomState | None, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context for running a branch again as it ran in the forward pass, with a graph."""
    stack = ExitStack()
    stack.enter_context(torch.enable_grad())
    if random_state is not None:
        stack.enter_context(random_state.replay(device))
    device_type, is_autocast, dtype = ctx.autocast
    if is_autocast:  # without its cache: weights cast in the forward pass have no graph
        stack.enter_context(torch.autocast(device_type, dtype=dtype, cache_enabled=False))
    return stack


def _smaller(order: Tensor | None) -> Tensor | None:
    """Keep token positions in 16 bits where they fit: this is what a layer's depth costs."""
    fits = order is not None and order.shape[-1] <= torch.iinfo(torch.int16).max
    return order.to(torch.int16) if fits and order is not None else order
