"""Compile the decoder layers of a model with torch.compile. Tested on CPUs only.

A model's layers are alike, so the first one's code serves all. Lengths are symbolic. A threshold on the number of
tokens would need a version for each side, so compiled layers always take the low-rank path, with C, and whole weights.

Only training passes run compiled. torch keeps at most 8 versions of a function's code and then runs it plainly; masks,
caches and dense weights of evaluations would use them up before the first step.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qvera.models import stream
from qvera.models.loader import causal_model
from qvera.models.structure import decoder_layers, decoder_of
from qvera.utils.errors import InputError


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the decoder layers for training passes, and return their number. Streamed layers raise InputError."""
    inner = causal_model(model)
    if stream.facts_of(inner) is not None:
        raise InputError(
            "training.torch_compile: the layers of this base are streamed to the device, which compiled code does not "
            "wait for. Leave torch_compile out, or set model.stream: false."
        )
    layers = decoder_layers(decoder_of(inner))
    for layer in layers:
        layer.forward = _compiled_in_training(layer, backend)
    return len(layers)


def _compiled_in_training(layer: nn.Module, backend: str | Callable[..., Any]) -> Callable[..., Any]:
    plain = layer.forward
    compiled = torch.compile(plain, backend=backend, dynamic=True)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training and torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward
