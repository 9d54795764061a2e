"""A base model's config, its model without weights, and checks that the stored weights fit it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from qvera.config.schema import ModelSection
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.utils.errors import InputError, first_line
from qvera.utils.formatting import first_of
from qvera.utils.paths import resolve_path
from qvera.utils.safetensors_io import TensorEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGEST = {
    "num_hidden_layers": 10_000, "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16,
    "hidden_size": 2**20, "intermediate_size": 2**24, "vocab_size": 2**24,
}  # fmt: skip
"""Far above any model there is, and far below what would end in a traceback or fill the memory."""
_COMPARED_BYTES = 2**24
_LAYER = re.compile(r"(.*?\b(?:layers|h|blocks)\.)(\d+)\.")


def load_config(section: ModelSection, source: Path | str | None = None) -> PretrainedConfig:
    """The transformers config of the base, or of a directory or hub id ``source``.

    Raises:
        OSError: there is none, or it is not JSON; the message is transformers'.
        InputError: it describes no possible model.
    """
    name = str(source or resolve_path(section.path))
    revision = None if source else section.revision
    raw, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    _require_possible(raw, f"{name}: config.json")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=section.trust_remote_code)
    except StrictDataclassError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{name}: config.json describes no model that can be built: {reason}") from None
    return config


def _require_possible(raw: Mapping[str, object], where: str) -> None:
    for part in (raw, raw.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        for key, largest in _LARGEST.items():
            value = part.get(key)
            if value is None or isinstance(value, list):  # some models have a list, a value a layer
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise InputError(f"{where} has {key} {value!r}, expected a whole number from 1 to {largest:,}.")
        hidden, heads, groups = (part.get(key) for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
            raise InputError(
                f"{where} has num_attention_heads {heads}, not a multiple of num_key_value_heads {groups}."
            )
        has_width = any("head_dim" in key for key in part)  # else a head is hidden_size / num_attention_heads wide
        if not has_width and isinstance(hidden, int) and isinstance(heads, int) and hidden % heads:
            raise InputError(f"{where} has hidden_size {hidden}, not a multiple of num_attention_heads {heads}.")


def empty_model(
    section: ModelSection, source: Path | str | None = None, model_class: ModelClass = CAUSAL_LM
) -> PreTrainedModel:
    """The base without weights, on the meta device. Raises InputError if no model of this class can be made."""
    name = str(source or resolve_path(section.path))
    try:
        config = load_config(section, source)
        with torch.device("meta"):
            return model_class.from_config(config, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(
            f"model.path: no model can be made from the config of {name!r}; it can't be loaded as {model_class.what}: "
            f"{first_line(error)}"
        ) from None


def head_size(model: torch.nn.Module) -> int | None:
    """The size of the attention heads by the model's config; None where it names none."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    size, hidden, heads = (getattr(config, key, None) for key in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(size, int):
        return size
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None


def require_own_weights(
    directory: Path, entries: list[TensorEntry], model: PreTrainedModel, model_class: ModelClass = CAUSAL_LM
) -> None:
    """Compare the tensors of a checkpoint with the model that its config.json describes (`empty_model`).

    Other names than the model's are not compared: transformers may rename them. A head of the class itself may be
    missing. Raises InputError for other layers, heads, shapes or dtypes, or a missing weight.
    """
    stored = {entry.name: entry for entry in entries}
    _require_layers(directory, stored, model)
    _require_head(directory, stored, model)
    if getattr(model.config, "quantization_config", None) is not None:
        return  # packed weights have other shapes and dtypes
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    heads = tuple(f"{name}." for name in model_class.head_modules(model))
    wanted = [n for n, _ in model.named_parameters() if not n.startswith(heads)]
    missing = [n for n in wanted if n not in stored and n not in tied.values()]
    if missing and model_class.stored_names(stored, model) <= model.state_dict().keys():
        raise InputError(
            f"{directory}: the weights hold no {first_of(missing)}, which config.json asks for. Copy config.json and "
            "all weight files of one checkpoint again."
        )
    for name, tensor in model.state_dict().items():
        entry = stored.get(name)
        if entry is None or name.startswith(heads):
            continue
        if entry.shape != tuple(tensor.shape):
            raise InputError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, the model of config.json needs "
                f"{list(tensor.shape)}. Weights and config.json are not of one model."
            )
        if tensor.is_floating_point() and not entry.dtype.is_floating_point:
            raise InputError(
                f"{entry.file}: {name} is {entry.dtype}, expected a floating-point weight. Save the checkpoint again."
            )


def _require_layers(directory: Path, stored: Iterable[str], model: PreTrainedModel) -> None:
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    found = _layers(name for name in stored if not any(pattern.search(name) for pattern in ignored))
    for prefix, expected in _layers(model.state_dict()).items():
        if prefix in found and found[prefix] != expected:
            raise InputError(
                f"{directory}: config.json describes a model of {len(expected)} layers (num_hidden_layers), and the "
                f"weights hold {len(found[prefix])} ({prefix}*). Copy config.json and all weight files of one "
                "checkpoint again."
            )


def _layers(names: Iterable[str]) -> dict[str, set[int]]:
    """Prefix of the layers' names → their numbers."""
    found: dict[str, set[int]] = {}
    for name in names:
        if match := _LAYER.match(name):
            found.setdefault(match[1], set()).add(int(match[2]))
    return found


def _require_head(directory: Path, stored: Mapping[str, TensorEntry], model: PreTrainedModel) -> None:
    names: dict[nn.Module, str] = {module: f"{name}.weight" for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if names.get(embedding) not in stored or head not in names:
        return
    table, output = stored[names[embedding]], stored.get(names[head])
    tied = head.weight is embedding.weight
    if output is None and not tied:
        raise InputError(
            f"{directory}: the weights hold no {names[head]}, and config.json does not tie it to the embedding, so "
            "the model would get a random output head. Copy all weight files again; or, if the model has none of its "
            "own, set tie_word_embeddings: true in config.json."
        )
    if output is not None and tied and not _same_tensor(table, output):
        raise InputError(
            f"{directory}: config.json ties the output head to the embedding, but {names[head]} differs from "
            f"{table.name}. Set tie_word_embeddings: false in config.json, or take the head out of the weights."
        )


def _same_tensor(one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(one.file, "rb", buffering=0) as first, open(other.file, "rb", buffering=0) as second:
        for start in range(0, one.size_bytes, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, one.size_bytes - start)
            if os.pread(first.fileno(), count, one.start + start) != os.pread(
                second.fileno(), count, other.start + start
            ):
                return False
    return True
