"""Many adapters on one loaded base: those that answer, and one that is trained meanwhile.

For answers the layers hold copies of weights and choose adapters by token (`qvera.evaluation.generate.generating`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, VeraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from qvera.adapters.adapter_file import read_adapter, read_config
from qvera.adapters.bank import AdapterBank, AdapterShape, User, fit_to_bank
from qvera.adapters.config import PEFT_TYPE, QveraConfig
from qvera.adapters.layer import QveraLinear, adapted_layers, linear_specs
from qvera.adapters.methods import method_of
from qvera.adapters.products.slots import PATHS
from qvera.adapters.save_load import load_vectors, put_on
from qvera.adapters.tuner import warn_of_other_base
from qvera.models.loader import Base
from qvera.utils.errors import InputError

_OF_ANSWERS = ("mixed", "_inference_weight", "_inference_pack")
"""Attributes that modules have for answers only. Without them they compute as in training."""


def load_adapters(
    model: nn.Module, directories: Mapping[str, Path], progress: Callable[[int], None] | None = None
) -> PeftModel:
    """Put many QVERA adapters on a loaded base model, to answer with; ranks, seeds and targets may differ.

    Each row of a batch names its adapter: ``model(..., adapter_names=[...])``, or ``adapters`` of
    `qvera.evaluation.generate.generate`. ``directories`` is adapter name → directory; ``progress`` is called with the
    number of adapters read so far. InputError: one of them is no QVERA adapter, or not one for this model.
    """
    if not directories:
        raise InputError("load_adapters: takes at least one adapter directory.")
    # adapters of one shape share a bank; those of methods without a path by slots are ordinary adapters of the model
    specs, alone, together = linear_specs(model), dict[str, QveraConfig](), dict[str, QveraConfig]()
    banked: dict[AdapterShape, dict[str, Mapping[str, Tensor]]] = {}
    for number, (name, given) in enumerate(directories.items(), 1):
        config = require_shareable(read_config(Path(given)), Path(given))
        if method_of(config).peft_type in PATHS:
            shape, vectors = fit_to_bank(config, read_adapter(Path(given))[1], specs, Path(given))
            banked.setdefault(shape, {})[name] = vectors
            together[name] = config
        else:
            alone[name] = config
        if progress is not None:
            progress(number)
    warn_of_other_base(model, together)
    base, users = Base(cast("PreTrainedModel", model), None, {}), dict[str, User]()
    for number, (shape, members) in enumerate(banked.items()):
        adapted = add_adapter(base, f"__shape_{number}__", shape.config)
        # slot 0 stays zeros, for rows that use no adapter of this bank
        bank = AdapterBank(adapted, 1 + len(members), f"__shape_{number}__")
        for slot, (name, vectors) in enumerate(members.items(), 1):
            bank.put(slot, vectors)
            users[name] = bank, slot
    for number, (name, config) in enumerate(alone.items()):
        users[name] = key = f"__alone_{number}__"  # torch takes no name with a dot for a module
        adapted = add_adapter(base, key, config)
        load_vectors(adapted, read_adapter(Path(directories[name]))[1], str(directories[name]), key)
    adapted.base_model.__dict__["banked"] = users
    return adapted


def require_shareable(config: QveraConfig | VeraConfig, directory: Path) -> QveraConfig:
    """The config of an adapter that can be one of many on a model.

    InputError: it is PEFT's own VeRA, trains more than vectors (token rows, modules, biases), or targets a pattern.
    """
    if not isinstance(config, QveraConfig):
        why = f"is an adapter of PEFT's VeRA; many on one model have to be {PEFT_TYPE} adapters."
        raise InputError(f"{directory}: {why}")
    if config.added_tokens or config.modules_to_save or config.bias != "none":
        why = "has token rows, trained modules or biases beside its vectors; load it alone."
        raise InputError(f"{directory}: {why}")
    if isinstance(config.target_modules, str):
        raise InputError(f"{directory}: its targets are a pattern, not names; many adapters need names.")
    return config


def add_adapter(base: Base, name: str, config: QveraConfig) -> PeftModel:
    """Put a fresh adapter on a loaded base, beside others; InputError if a target matches no linear.

    Nothing in the model is trained afterwards.
    """
    if base.adapted is None:
        base.adapted = put_on(base.model, config, name)
    else:
        base.adapted.add_adapter(name, config)
    base.adapted.requires_grad_(False).eval()
    return base.adapted


def leave_to_training(model: nn.Module, adapter: str) -> None:
    """Switch off layers that carry only this adapter, outside of `training_layout`, so that answers do not change."""
    for layer in adapted_layers(model):
        if set(layer.qvera_settings) == {adapter}:
            layer._disable_adapters = True


def give_to_answers(model: nn.Module, adapter: str) -> list[QveraLinear]:
    """Switch on the layers that carry this adapter, for answers, and return them."""
    layers = [layer for layer in adapted_layers(model) if layer.carries(adapter)]
    for layer in layers:
        layer._disable_adapters = False
    return layers


@contextlib.contextmanager
def training_layout(model: nn.Module, adapter: str) -> Iterator[None]:
    """Make layers compute, within the context, as in a run that trains this adapter.

    What they hold for answers stays in memory, so nothing is dequantized or packed anew. Training could use it, but
    forward reads packed weights where an input needs no gradient: the last bits would depend on free memory.
    """
    kept: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module in model.modules():
            own, is_adapted = module.__dict__, isinstance(module, QveraLinear)
            names = [name for name in _OF_ANSWERS if name in own]
            names += ["_active_adapter", "_disable_adapters"] if is_adapted else []
            if names:
                kept.append((module, {name: own.pop(name) for name in names}))
            if is_adapted:
                own.update(_active_adapter=adapter, _disable_adapters=False)
        yield
    finally:
        for module, values in kept:
            # first what was set within the context, which the module may not have had before
            for name in _OF_ANSWERS:
                module.__dict__.pop(name, None)
            module.__dict__.update(values)
