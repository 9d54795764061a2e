"""Memory-map a base model: weights are used from the pages of their file, not copied.

Packed weights, statistics, embeddings and head stay in the file, in their stored dtype. On a CPU processes share the
pages, and the system drops them when it needs room. On a GPU each tensor is copied to the device, one at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig

from qvera.models import linear, quantization
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.stored_weights import PackedWeight, packed_weights, without_statistics
from qvera.models.structure import decoder_layers, decoder_of
from qvera.utils.errors import InputError
from qvera.utils.formatting import first_of
from qvera.utils.safetensors_io import TensorEntry, checkpoint_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qvera.distributed.zero_params import BaseSharder

_STATE = f".{quantization.STATE_KEY}"
_BIG = (nn.Embedding, nn.Linear)
"""Modules with large dense weights: they stay as stored, and ZeRO-3 shards them like the packed ones."""
_TABLE_NUMEL = 2**22
"""Smaller embeddings, such as those of positions, are cast: DeBERTa reads such a weight without a call."""
_IGNORED = (".rotary_emb.inv_freq",)  # old Llama checkpoints carry these; the model computes them


class NotMappable(Exception):
    """This checkpoint's tensors are not this model's parameters one to one; transformers has to load it."""


def load_mapped(
    directory: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    sharder: BaseSharder | None = None,
    layers_in_ram: bool = False,
    model_class: ModelClass = CAUSAL_LM,
) -> PreTrainedModel:
    """The model of a checkpoint directory, frozen, in evaluation mode, its big tensors mapped.

    Args:
        dtype: what its layers compute in; small tensors (norms, biases) are cast to it.
        sharder: takes each packed weight, embedding and head when it is read, as private copies. A head that is the
            embedding stays mapped, because its two users would release it under each other.
        layers_in_ram: leave the decoder layers' packed weights in the mapped file (`qvera.models.stream`).
        model_class: a head of its own is fp32, and drawn anew if the checkpoint has none of its labels.

    Raises:
        InputError: a shard is missing or cut short, or a tensor has not the shape that the config says.
        NotMappable: the names in the file are not those of the model.
    """
    entries = {entry.name: entry for entry in checkpoint_tensors(directory)}
    keeps_head = model_class.finds_head(config)
    with init_empty_weights(include_buffers=False):
        model = model_class.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation=attn_implementation
        )
    heads = tuple(f"{name}." for name in model_class.head_modules(model))
    wanted = model_class.stored_names(entries, model)
    wanted = wanted if keeps_head else {name for name in wanted if not name.startswith(heads)}
    packed, plain = _sorted_by_kind(model, {name: entry for name, entry in entries.items() if name in wanted})
    dense = set() if sharder is None else _weights_to_shard(model, config, plain)
    kept = _names_in_layers(model, packed) if layers_in_ram else set()
    if sharder is not None:
        _announce(sharder, model, [entries[name] for name in (*packed, *dense)])
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    with contextlib.ExitStack() as stack:
        # each tensor keeps the mapping alive, so the handles may close
        paths = dict.fromkeys(entry.file for entry in entries.values())
        files = {path: stack.enter_context(safe_open(path, framework="pt", device="cpu")) for path in paths}
        for name, weight in packed.items():
            data = files[weight.packed.file].get_tensor(name)
            statistics = {e.name: files[e.file].get_tensor(e.name) for e in weight.statistics.values()}
            if sharder is not None:  # never into the pages of a mapping, which outlive the weight
                data = data.clone()
            home, path = torch.device("cpu") if name in kept else device, name.removesuffix(".weight")
            dense_layer = cast(nn.Linear, model.get_submodule(path))  # `_sorted_by_kind` has looked
            layer = quantization.prequantized_linear(dense_layer, data, statistics, dtype, home)
            model.set_submodule(path, layer)
            del data
            if sharder is not None:
                sharder(layer.weight, table=False)
        for name in plain:
            tensor = files[entries[name].file].get_tensor(name)
            _put_plain(model, name, tensor.clone() if name in dense else tensor, dtype, device, entries[name].file)
            del tensor
            if sharder is not None and name in dense:
                module = model.get_submodule(name.rpartition(".")[0])
                sharder(module.weight, table=any(module is end for end in tables))
    model.tie_weights()
    missing = [n for n, p in model.named_parameters() if p.is_meta and (keeps_head or not n.startswith(heads))]
    if missing:
        raise NotMappable(f"{directory} has no {first_of(missing)}")
    for buffer in model.buffers():
        buffer.data = buffer.to(device)
    linear.compute_in(model, dtype)
    model_class.start_head(model, keeps_head, device)
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.requires_grad_(False).eval()


def _names_in_layers(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    layers = set(decoder_layers(decoder_of(model)))
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if module in layers)
    return {name for name in names if name.startswith(prefixes)}


def _weights_to_shard(model: PreTrainedModel, config: PretrainedConfig, plain: list[str]) -> set[str]:
    """Embedding, head and dense linears. Not an embedding that is also the head."""
    whole: list[nn.Module] = []
    if getattr(config, "tie_word_embeddings", False):
        whole = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {f"{n}.weight" for n, m in model.named_modules() if type(m) in _BIG and not any(m is end for end in whole)}
    return names & set(plain)


def _announce(sharder: BaseSharder, model: PreTrainedModel, weights: list[TensorEntry]) -> None:
    """Tell what is going to be sharded in the layers; the tables at both ends are not in any."""
    names = {module: name for name, module in model.named_modules()}
    layers = [f"{names[layer]}." for layer in decoder_layers(decoder_of(model))]
    inside = [[math.prod(entry.shape) for entry in weights if entry.name.startswith(layer)] for layer in layers]
    sharder.expect(max((numel for layer in inside for numel in layer), default=0), max(map(len, inside)))


def _sorted_by_kind(
    model: PreTrainedModel, entries: dict[str, TensorEntry]
) -> tuple[dict[str, PackedWeight], list[str]]:
    """4-bit weights by name, and the names of all dense tensors."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    four_bit = {name.partition(_STATE)[0] for name in entries if _STATE in name}
    unknown = [name for name in four_bit if type(modules.get(name.removesuffix(".weight"))) is not nn.Linear]
    if not unknown:
        packed = packed_weights(list(entries.values()), model)
        dense = [entry.name for entry in without_statistics(list(entries.values()), packed)]
        plain = [name for name in dense if name not in packed and not name.endswith(_IGNORED)]
        unknown = [name for name in plain if name not in parameters]
    if unknown:
        raise NotMappable(f"{type(model).__name__} has no {first_of(unknown)}")
    return packed, plain


def _put_plain(
    model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, file: Path
) -> None:
    module_name, _, key = name.rpartition(".")
    module = model.get_submodule(module_name)
    expected = tuple(getattr(module, key).shape)
    if tuple(tensor.shape) != expected:
        raise InputError(
            f"{file}: {name} has shape {list(tensor.shape)}; the model's config.json says {list(expected)}. One of "
            "the two belongs to another model."
        )
    if not tensor.is_floating_point():
        raise InputError(
            f"{file}: {name} is {tensor.dtype}, expected a floating-point weight. Save the checkpoint again."
        )
    # On a CPU it stays in the file as it is, and is cast for each product. An accelerator has it in the compute dtype,
    # unless that would take more room than the file's.
    narrower, as_wide = tensor.dtype.itemsize < dtype.itemsize, tensor.dtype.itemsize == dtype.itemsize
    is_big = (
        type(module) in _BIG
        and key == "weight"
        and (
            isinstance(module, nn.Linear) or tensor.numel() >= _TABLE_NUMEL or module is model.get_input_embeddings()  # type: ignore[operator]
        )
    )
    stays = is_big and (narrower or (as_wide and device.type == "cpu"))
    value = tensor.to(device=device, dtype=tensor.dtype if stays else dtype)
    setattr(module, key, nn.Parameter(value, requires_grad=False))
