"""Adapters of several owners on one loaded base: those that answer requests, and one that is trained meanwhile.

They share one PEFT model, so that adapters of one seed share its pair A, B. Answers are computed in a layout of their
own (`qvera.evaluation.generate.generating`): copies of weights in layers, and a forward pass by which each token uses
its own adapter. `training_layout` takes a training pass out of that without undoing it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qvera.adapters.files.save_load import put_on
from qvera.adapters.layer import QveraLinear, adapted_layers

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from qvera.adapters.config import QveraConfig
    from qvera.models.loader import Base

_OF_ANSWERS = ("_row_forward", "_inference_weight", "_inference_pack")
"""What modules have for answers alone. Without it they compute as in a run of training."""


def add_adapter(base: Base, name: str, config: QveraConfig) -> PeftModel:
    """Put a fresh adapter on a loaded base, beside those that it has; nothing of the model is trained afterwards.

    Raises:
        InputError: a target matches nothing or no linear.
    """
    if base.adapted is None:
        base.adapted = put_on(base.model, config, name)
    else:
        base.adapted.add_adapter(name, config)
    base.adapted.requires_grad_(False).eval()
    return base.adapted


def leave_to_training(model: nn.Module, adapter: str) -> None:
    """Make layers that carry this adapter alone compute as their base layers do, outside of `training_layout`.

    So answers stay what they are to the bit, though there are more layers now.
    """
    for layer in adapted_layers(model):
        if set(layer.qvera_settings) == {adapter}:
            layer._disable_adapters = True


def give_to_answers(model: nn.Module, adapter: str) -> list[QveraLinear]:
    """The layers that carry an adapter which answers; they take part in the layout of answers from now on."""
    layers = [layer for layer in adapted_layers(model) if layer.carries(adapter)]
    for layer in layers:
        layer._disable_adapters = False
    return layers


@contextlib.contextmanager
def training_layout(model: nn.Module, adapter: str) -> Iterator[None]:
    """A context in which layers compute as in a run that trains this adapter, whatever they hold for answers.

    The layout of answers stays in memory, so entering and leaving cost a look at each module and no copy: a training
    pass reads the stored weight, and so does backward. Making the layout anew would dequantize or pack each weight.
    In it a training pass would be correct too, since backward never reads the copies. But forward takes the packed ones
    where an input needs no gradient, so the last bits would depend on what memory allowed for answers.
    """
    kept: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module in model.modules():
            own = module.__dict__
            names = [name for name in _OF_ANSWERS if name in own]
            if isinstance(module, QveraLinear):
                names += ["_active_adapter", "_disable_adapters"]
            if not names:
                continue
            kept.append((module, {name: own.pop(name) for name in names}))
            if isinstance(module, QveraLinear):
                module._active_adapter, module._disable_adapters = adapter, False
        yield
    finally:
        for module, values in kept:
            for name in _OF_ANSWERS:
                module.__dict__.pop(name, None)
            module.__dict__.update(values)
