"""Parts of a model found by what they are: decoder, layers, routers, stacked experts, learned tables of positions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

_ROUTER = re.compile(r"(?:^|\.)(?:router|indexer)(?:\.|$)")
_GATES = ("gate", "shared_expert_gate")
_READ = {"dt_proj": "A_log", "prediction_coefs": "router_norm", "correction_coefs": "router_norm"}
"""Linears of Mamba and of Gemma 3n whose weights are read without a call → another attribute of the module that holds
them, by which it is known."""
_OTHER_INPUTS = re.compile(r"(?:^|[._])(?:vision|visual|image|img|video|audio|speech)")
"""Names of parts that text does not go through. They matter within a decoder: Phi-4-multimodal has its towers there."""
_LAYER_LISTS = ("layers", "h", "blocks", "layer")
_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def causal_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """Return the decoder of a language model, which is all before its head: embeddings, layers and the last norm."""
    found, head = model.get_decoder(), model.get_output_embeddings()
    if head is not None and (found is model or found is head):
        # a class that misnames its decoder (Llama 4's text model, ModernBERT's head): it holds the input embedding
        embedding = model.get_input_embeddings()
        for child in model.children():
            if child is not embedding and any(module is embedding for module in child.modules()):
                return child
    # Llama 4 with images has a whole language model in this place
    if found is not model and getattr(found, "lm_head", None) is not None:
        return decoder_of(found)
    return found


def image_model(model: PreTrainedModel | PeftModel) -> Any:
    """The part of a model that takes images among text, and calls its decoder with their features in their places."""
    return causal_model(model).base_model


def core_of(model: PreTrainedModel | PeftModel) -> nn.Module:
    """Return what a pass calls: a language model's decoder (the loss applies its head by chunks), else the model."""
    inner = causal_model(model)
    return inner if inner.get_output_embeddings() is None else decoder_of(inner)


def decoder_layers(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a decoder or encoder, in order; the module itself if it has no list of layers."""
    for module in (decoder, getattr(decoder, "encoder", None), getattr(decoder, "decoder", None)):
        for name in _LAYER_LISTS:
            if isinstance(found := getattr(module, name, None), nn.ModuleList):
                return list(found)
    return [decoder]


def share_tied_modules(model: nn.Module) -> dict[str, str]:
    """Put one module in the places whose weights transformers ties, such as Zamba's shared block: name → its source.

    An adapter there is then that of every place, as the weights are, and in 4 bits they are stored once.
    """
    names, found = [name for name, _ in model.named_modules(remove_duplicate=False)], {}
    # transformers writes ties as patterns below the module that declares them; ties of single weights are left to it
    for prefix, owner in list(model.named_modules()):
        prefix = f"{prefix}." if prefix else ""
        ties: Any = getattr(owner, "_tied_weights_keys", None)
        for pattern, source in ties.items() if isinstance(ties, dict) else ():
            if pattern.endswith(".weight"):
                continue
            for name in names:
                if name != prefix + source and re.fullmatch(re.escape(prefix) + pattern, name):
                    model.set_submodule(name, model.get_submodule(prefix + source))
                    found[name] = prefix + source
    return found


def widest_layer(model: nn.Module) -> Any:
    """The config of the text's layers; where their heads differ (Gemma 4), that of a layer whose heads are largest."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(config, "is_heterogeneous", False):
        return config
    return max(config.per_layer_config, key=lambda layer: getattr(layer, "head_dim", None) or 0)


def head_size(model: nn.Module) -> int | None:
    """The size of the attention heads by the model's config, the largest; None where it names none."""
    config = widest_layer(model)
    size, hidden, heads = (getattr(config, key, None) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(size, int):
        return size
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None


def beside_the_layers(model: nn.Module) -> set[str]:
    """Names of the linears that ``all-linear`` leaves out: heads, poolers, `left_whole`, and what images go through.

    Of a language model this is all outside of its decoder: also a vision tower, which text never reaches. Of another
    model it is all outside of transformers' base model, such as a classifier.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    backbone: Any = getattr(model, "base_model", model) if head is None else decoder_of(model)
    config: Any = getattr(backbone, "config", None)
    if head is None and hasattr(config, "get_text_config") and config.get_text_config() is not config:
        backbone = backbone.get_decoder()  # a classifier of texts, over a model that takes images too
    inside, found = set(map(id, backbone.modules())), left_whole(model)
    for name, module in model.named_modules():
        of_text = id(module) in inside and (head is None or not _OTHER_INPUTS.search(name))
        if not of_text or module is head or "pooler" in name.split("."):
            found.add(name)
    return found


def routers(model: nn.Module) -> set[str]:
    """Names of the linears that choose a token's experts, or weigh them, or choose the keys that it sees."""
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


def left_whole(model: nn.Module) -> set[str]:
    """Names of the linears that are never adapted, and never quantized.

    These are `routers`, linears that are not called, those that transformers wants in fp32, and those that read an
    image's patches, which cast pixels to the dtype of their weight.
    """
    in_fp32, found = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()), routers(model)
    for path, owner in model.named_modules():
        found |= {f"{path}.{name}" for name, beside in _READ.items() if hasattr(owner, name) and hasattr(owner, beside)}
        if isinstance(owner, nn.Linear) and (path.endswith(in_fp32) or "patch_embed" in path):
            found.add(path)
    return found


def returns_more(module: nn.Module) -> bool:
    """Whether this subclass of a linear returns more than a product (Llama 4's router), or many (DeepSeek V4)."""
    return isinstance(module, nn.Linear) and ("Router" in (kind := type(module).__name__) or "Grouped" in kind)


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
        is_table = name.rpartition(".")[2] in _TABLES and not _OTHER_INPUTS.search(name)
        if is_table and isinstance(module, nn.Embedding):
            # OPT begins at its offset, RoBERTa behind the padding's position
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - int(getattr(module, "offset", unused))
    return None


def context_limit(model: PreTrainedModel | PeftModel) -> int:
    """The most tokens of a prompt and its answer together: what the config says, and the table of positions holds.

    2**31 where neither limits them (Mamba).
    """
    return min(context_tokens(causal_model(model).config), position_limit(model) or 2**31)


def context_tokens(config: PretrainedConfig) -> int:
    """The tokens of a base's context by its config alone; 2**31 where that names none."""
    said = getattr(config.get_text_config(), "max_position_embeddings", None)
    return said if said and said > 0 else 2**31  # XLNet says -1


def rope_limit(config: PretrainedConfig) -> int:
    """The most tokens of a row that leaves the rotary embeddings of a pass as they are; 2**31: any row does.

    Beside a longer row all rows of the pass get other frequencies: those of long contexts with ``longrope`` (Phi-3),
    those of the longest row with ``dynamic``. Keys in a cache keep the frequencies of their own pass.
    """
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or {}
    ropes = [found] if "rope_type" in found else [each for each in found.values() if isinstance(each, dict)]
    limits = {"longrope": "original_max_position_embeddings", "dynamic": "max_position_embeddings"}
    names = [(rope, limits[rope["rope_type"]]) for rope in ropes if rope.get("rope_type") in limits]
    return min((rope.get(name) or getattr(text, name, None) or 2**31 for rope, name in names), default=2**31)


def engine_limit(model: PreTrainedModel | PeftModel) -> int:
    """The most tokens of a prompt and its answer in a server, where requests of all lengths share passes."""
    return min(context_limit(model), rope_limit(causal_model(model).config))


def mixed_rope_note(config: PretrainedConfig, lengths: np.ndarray) -> str | None:
    """Return a warning where some rows change the rotary embeddings of others in their pass (`rope_limit`)."""
    limit = rope_limit(config)
    if not len(lengths) or not lengths.min() <= limit < lengths.max():
        return None
    return (
        f"{int((lengths > limit).sum()):,} of {len(lengths):,} rows have more than {limit:,} tokens, where this base's "
        "rotary embeddings change, and so they do for shorter rows of the same pass. Set data.max_length to "
        f"{limit} or less, or training.per_device_train_batch_size to 1 (without data.packing)."
    )


def context_note(config: PretrainedConfig, longest_tokens: int) -> str | None:
    """Return a warning where the longest row, cut by ``data.max_length``, is beyond the base's context."""
    context = context_tokens(config)
    if longest_tokens <= context:
        return None
    return (
        f"data.max_length: the longest row has {longest_tokens:,} tokens, and the base's context ends at {context:,} "
        "(max_position_embeddings in its config.json). A base knows no positions beyond, and generate and serve take "
        f"no prompt of that length. Set data.max_length to {context} or less, or take a base with a longer context."
    )


def require_positions(model: nn.Module, lengths: np.ndarray) -> None:
    """Raise InputError if a row is longer than `position_limit`. ``lengths``: tokens of each row."""
    limit = position_limit(model)
    if limit is not None and len(lengths) and lengths.max() > limit:
        raise InputError(
            f"data.max_length: a row has {lengths.max():,} tokens, and the model has positions for {limit:,}. Set it "
            f"to {limit} or less."
        )
