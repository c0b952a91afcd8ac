"""The feed-forward branches compiled: normalisation, products and activation fused, where a compiler is at hand.

The Trainer's ``--torch_compile`` compiles what is around the encoder: reversible layers run inside a function of
autograd, where the compiler stops. Each layer's feed-forward branch can be compiled by itself.
"""

from __future__ import annotations

import torch
from torch import nn

from screformer.modeling_screformer import ScReformerLayer


def compile_feed_forward(model: nn.Module, *, backend: str = "inductor") -> int:
    """Let every layer's feed-forward branch be compiled when it is first run; return how many layers there are.

    Weights, and what is saved of them, stay as they are.

    Parameters
    ----------
    model
        Any model with an encoder of this package in it.
    backend
        As for ``torch.compile``; the default needs Triton on a GPU, on a CPU a C++ compiler.
    """
    layers = [module for module in model.modules() if isinstance(module, ScReformerLayer)]
    for layer in layers:
        layer.feed = torch.compile(layer.feed, backend=backend)  # type: ignore[method-assign]
    return len(layers)
