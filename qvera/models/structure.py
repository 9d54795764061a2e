"""Parts of a model found by what they are: decoder, layers, routers, stacked experts, learned tables of positions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_ROUTER = re.compile(r"(?:^|\.)router(?:\.|$)")
_GATES = ("gate", "shared_expert_gate")
_LAYER_LISTS = ("layers", "h", "blocks", "layer")
_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def causal_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """What a language model calls before its head: embeddings, layers and the last norm."""
    found, head = model.get_decoder(), model.get_output_embeddings()
    if head is not None and (found is model or found is head):
        # a class that misnames its decoder (Llama 4's text model, ModernBERT's head): it holds the input embedding
        embedding = model.get_input_embeddings()
        for child in model.children():
            if child is not embedding and any(module is embedding for module in child.modules()):
                return child
    if found is not model and getattr(found, "lm_head", None) is not None:  # of Llama 4 with images: a model by itself
        return decoder_of(found)
    return found


def image_model(model: PreTrainedModel | PeftModel) -> Any:
    """The part of a model that takes images among text, and calls its decoder with their features in their places."""
    return causal_model(model).base_model


def core_of(model: PreTrainedModel | PeftModel) -> nn.Module:
    """What a pass calls: the decoder, whose head the loss applies by chunks, or a model with a head of its own."""
    inner = causal_model(model)
    return inner if inner.get_output_embeddings() is None else decoder_of(inner)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a decoder or encoder, in order; the module itself if it has no list of layers."""
    for module in (decoder, getattr(decoder, "encoder", None), getattr(decoder, "decoder", None)):
        for name in _LAYER_LISTS:
            if isinstance(found := getattr(module, name, None), nn.ModuleList):
                return list(found)
    return [decoder]


def head_size(model: nn.Module) -> int | None:
    """The size of the attention heads by the model's config; None where it names none."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size, hidden, heads = (getattr(config, key, None) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(size, int):
        return size
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None


def beside_the_layers(model: nn.Module) -> set[str]:
    """Names of the linears that ``all-linear`` leaves out: heads, poolers, routers, and what images go through.

    Of a language model this is all outside of its decoder: also a vision tower, which text never reaches. Of another
    model it is all outside of transformers' base model, such as a classifier.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    backbone: Any = getattr(model, "base_model", model) if head is None else decoder_of(model)
    inside, found = set(map(id, backbone.modules())), routers(model)
    for name, module in model.named_modules():
        if id(module) not in inside or module is head or "pooler" in name.split("."):
            found.add(name)
    return found


def routers(model: nn.Module) -> set[str]:
    """Names of the linears that choose a token's experts, or weigh them: never adapted, and never quantized.

    Either would change which weights a token meets.
    """
    modules, found = dict(model.named_modules()), set()
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        parts = name.split(".")
        above = ((".".join(parts[:i]), part) for i, part in enumerate(parts))
        is_gate = any(part in _GATES and hasattr(modules[owner], "experts") for owner, part in above)
        if is_gate or _ROUTER.search(name) or returns_more(module):
            found.add(name)
    return found


def returns_more(module: nn.Module) -> bool:
    """Whether this subclass of a linear returns more than a product, as Llama 4's router does."""
    return isinstance(module, nn.Linear) and "Router" in type(module).__name__


def expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that hold all experts of a layer in one tensor [experts, .., ..], or [experts · .., ..], by name."""
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        is_named = "experts" in owner.split(".") or "Experts" in type(module).__name__
        is_weight = parameter.dim() == 3 or (parameter.dim() == 2 and not isinstance(module, nn.Linear))
        if is_weight and is_named and not key.endswith("bias"):
            found[name] = parameter
    return found


def position_limit(model: Any) -> int | None:
    """The most tokens of a row, by the decoder's table. None: the model computes its positions (RoPE, ALiBi)."""
    for name, module in core_of(model).named_modules():
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
