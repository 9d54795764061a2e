"""Parts of a model found by what they are: decoder, layers, routers, stacked experts, learned tables of positions."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from torch import nn

from qvera.utils.errors import InputError

_ROUTER = re.compile(r"(?:^|\.)router(?:\.|$)")
_GATES = ("gate", "shared_expert_gate")
_LAYER_LISTS = ("layers", "h", "blocks", "layer")


def decoder_of(model: Any) -> Any:
    """What a language model calls before its head: embeddings, layers and the last norm.

    transformers' ``get_decoder`` returns the whole model where a class misnames its decoder (Llama 4's text model).
    Then it is the part that holds the input embedding.
    """
    found = model.get_decoder()
    if found is not model or model.get_output_embeddings() is None:
        return found
    embedding = model.get_input_embeddings()
    for child in model.children():
        if child is not embedding and any(module is embedding for module in child.modules()):
            return child
    return found


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a decoder or encoder, in order; the module itself if it has no list of layers."""
    for module in (decoder, getattr(decoder, "encoder", None), getattr(decoder, "decoder", None)):
        for name in _LAYER_LISTS:
            if isinstance(found := getattr(module, name, None), nn.ModuleList):
                return list(found)
    return [decoder]


def routers(model: nn.Module) -> set[str]:
    """Names of the linears that choose experts: an adapter there would change which weights a token meets."""
    modules = dict(model.named_modules())
    found = set()
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        is_gate = last in _GATES and hasattr(modules[parent], "experts")
        if isinstance(module, nn.Linear) and (is_gate or _ROUTER.search(name) or returns_more(module)):
            found.add(name)
    return found


def beside_the_layers(model: nn.Module) -> set[str]:
    """Names of the linears that ``all-linear`` leaves out: heads, poolers, `routers`, and what images go through.

    Of a language model this is all outside of its decoder: also a vision tower, which text never reaches. Of another
    model it is all outside of transformers' base model, such as a classifier.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    backbone: Any = getattr(model, "base_model", model) if head is None else decoder_of(model)
    inside = set(map(id, backbone.modules()))
    found = routers(model)
    for name, module in model.named_modules():
        outside = id(module) not in inside or module is head
        if outside or "pooler" in name.split("."):
            found.add(name)
    return found


def returns_more(module: nn.Module) -> bool:
    """Whether this subclass of a linear returns more than a product, as Llama 4's router does."""
    return isinstance(module, nn.Linear) and "Router" in type(module).__name__


def expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that hold all experts of a layer in one tensor [experts, .., ..], by name: not quantized, not adapted."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and _holds_experts(model, name.rpartition(".")[0])
    }


def _holds_experts(model: nn.Module, name: str) -> bool:
    return "experts" in name.split(".") or "Experts" in type(model.get_submodule(name)).__name__


_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def position_limit(model: nn.Module) -> int | None:
    """The most tokens of a row, by the decoder's table. None: the model computes its positions (RoPE, ALiBi)."""
    of_peft: Any = getattr(model, "get_base_model", None)
    inner: Any = model if of_peft is None else of_peft()
    backbone: nn.Module = inner if inner.get_output_embeddings() is None else decoder_of(inner)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # OPT begins at its offset, RoBERTa behind the padding's position
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - int(getattr(module, "offset", unused))
    return None


def require_positions(model: nn.Module, lengths: np.ndarray) -> None:
    """Raise InputError if a row is longer than `position_limit`. ``lengths``: tokens of each row."""
    limit = position_limit(model)
    if limit is not None and len(lengths) and lengths.max() > limit:
        raise InputError(
            f"data.max_length: a row has {lengths.max():,} tokens, and the model has positions for {limit:,}. Set it "
            f"to {limit} or less."
        )
