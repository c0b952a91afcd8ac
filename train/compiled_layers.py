"""What is dense in a layer compiled: normalisation with projections, and the feed-forward branch, each fused.

The Trainer's ``--torch_compile`` compiles what is around the encoder: reversible layers run inside a function of
autograd, where the compiler stops. The parts of each layer can be compiled by themselves.
"""

from __future__ import annotations

import torch
from torch import nn

from screformer.modeling_screformer import ScReformerLayer


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> int:
    """Let the dense parts of every layer be compiled when they are first run; return how many layers there are.

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
        layer.project = torch.compile(layer.project, backend=backend)  # type: ignore[method-assign]
        layer.feed = torch.compile(layer.feed, backend=backend)  # type: ignore[method-assign]
    return len(layers)
