"""Which parameters learn, and how fast: by their depth, from the embeddings over the layers to the head."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

FREEZABLE = ("none", "embeddings", "encoder")

_LAYER = re.compile(r"(?:^|\.)encoder\.layers\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)embeddings\.")


def parameter_depth(name: str, num_layers: int) -> int:
    """Return how far up a parameter is: 0 for embeddings, 1 to `num_layers` for layers, one more for the head."""
    layer = _LAYER.search(name)
    if layer is not None:
        return int(layer[1]) + 1
    return 0 if _EMBEDDINGS.search(name) else num_layers + 1


def check_freeze(freeze: str) -> None:
    """Raise ValueError unless `freeze` names a part or is a number of layers."""
    if freeze not in FREEZABLE and not (freeze.isdecimal() and int(freeze) > 0):
        raise ValueError(
            f"freeze got {freeze!r}; allowed are {', '.join(FREEZABLE)}, or a number of lowest layers, for example 2"
        )


def freeze_lowest(model: nn.Module, freeze: str) -> None:
    """Exclude the lower part of a model from training: its parameters get no gradient and do not change.

    Parameters
    ----------
    model
        One of ours, with or without head.
    freeze
        ``"none"``, ``"embeddings"``, ``"encoder"`` (embeddings and every layer), or a number of layers: the embeddings
        and so many of the lowest.

    Raises
    ------
    ValueError
        `freeze` is none of these, or more layers than the model has.
    """
    check_freeze(freeze)
    config: Any = model.config  # Any: modules have no such attribute, ours do
    num_layers: int = config.num_hidden_layers
    depth = {"none": -1, "embeddings": 0, "encoder": num_layers}.get(freeze)
    if depth is None:
        depth = int(freeze)
    if depth > num_layers:
        raise ValueError(
            f"freeze got {freeze}, but the model has {num_layers} layers; freeze fewer, or all of them with 'encoder'"
        )
    for name, parameter in model.named_parameters():
        if parameter_depth(name, num_layers) <= depth:
            parameter.requires_grad_(False)


def check_layer_lr_decay(layer_lr_decay: float) -> None:
    """Raise ValueError unless `layer_lr_decay` is a factor above 0 and at most 1."""
    if not 0 < layer_lr_decay <= 1:
        raise ValueError(
            f"layer_lr_decay got {layer_lr_decay}; it must be above 0 and at most 1 (0.9 is usual; 1: every layer "
            "learns at the same rate)"
        )


def slow_lower_layers(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    layer_lr_decay: float,
    *,
    num_layers: int,
) -> None:
    """Split an optimizer's groups by depth: below the head each layer's rate is `layer_lr_decay` times that above.

    What else a group has, such as its weight decay, stays. The head comes first, so that its rate is the one logged.

    Parameters
    ----------
    optimizer
        Fresh: no step was taken and no scheduler was made.
    named_parameters
        Of the model whose parameters it has.
    layer_lr_decay
        Factor from a layer to the one below; the embeddings are below the lowest.
    num_layers
        Layers of the model.
    """
    depth_of = {id(parameter): parameter_depth(name, num_layers) for name, parameter in named_parameters}
    head = num_layers + 1
    groups: list[tuple[int, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        by_depth = defaultdict(list)
        for parameter in group["params"]:
            by_depth[depth_of[id(parameter)]].append(parameter)
        for depth, parameters in by_depth.items():
            rate = group["lr"] * layer_lr_decay ** (head - depth)
            groups.append((depth, {**group, "params": parameters, "lr": rate}))
    optimizer.param_groups[:] = [group for _, group in sorted(groups, key=lambda item: -item[0])]
