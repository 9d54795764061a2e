"""Weights that ZeRO-3 spreads over the ranks: which they are, how large they are as a whole, and how to read one outside of
its module's call. Without ZeRO-3 nothing here does anything, and DeepSpeed is not imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def is_sharded(parameter: Any) -> bool:
    """Whether a rank holds only its share of this parameter, which is gathered while its module is called."""
    return hasattr(parameter, "ds_id")


def any_sharded(model: nn.Module) -> bool:
    """Whether all ranks have to walk through this model together."""
    return any(is_sharded(p) for p in model.parameters())


def decoder_layers(decoder: Any) -> list[nn.Module]:
    """What is run, and gathered, one after the other; the decoder itself where it has no layers."""
    layers = getattr(decoder, "layers", None)
    return [decoder] if layers is None else list(layers)


def whole_numel(parameter: Any) -> int:
    """Elements of the whole parameter, on however many ranks."""
    return int(parameter.ds_numel) if is_sharded(parameter) else parameter.numel()


def held_bytes(parameter: Any) -> int:
    """Bytes that this process keeps of a parameter between uses: all of it, or its share."""
    if not is_sharded(parameter):
        return parameter.numel() * parameter.element_size()
    return parameter.ds_tensor.numel() * parameter.ds_tensor.element_size()


@contextlib.contextmanager
def gathered(parameters: Iterable[Any]) -> Iterator[None]:
    """For the time of the block these parameters are whole on every rank, to be read. All ranks have to come here."""
    spread = [p for p in parameters if is_sharded(p)]
    if not spread:
        yield
        return
    from qvera.distributed.zero_settings import deepspeed_module

    with deepspeed_module().zero.GatheredParameters(spread):
        yield


def gather_at_call(module: nn.Module) -> None:
    """Make a module that no DeepSpeed engine knows, such as the output head, gather its own weights whenever it is called."""
    blocks: list[Any] = []

    def before(_: nn.Module, __: Any) -> None:
        blocks.append(gathered(module.parameters(recurse=False)))
        blocks[-1].__enter__()

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        blocks.pop().__exit__(None, None, None)

    if any(is_sharded(p) for p in module.parameters(recurse=False)):
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)
