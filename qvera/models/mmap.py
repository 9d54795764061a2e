"""Memory-map a base model: weights are used from the pages of their file, not copied.

A checkpoint in bitsandbytes' serialized 4-bit format (or a 16-bit one) is opened with a private mapping. Packed
weights, their statistics, embeddings and head stay in the file, in the dtype they are stored in. On a CPU they take no
memory of their own: the pages belong to the page cache, which all processes share and the system drops when it needs
room. On a GPU each tensor is copied to the device, one at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig

from qvera.models import linear, quantization
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.structure import decoder_layers, decoder_of
from qvera.utils.errors import InputError
from qvera.utils.formatting import first_of
from qvera.utils.safetensors_io import TensorEntry, checkpoint_tensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_STATE = ".quant_state.bitsandbytes__"
_BIG = (nn.Embedding, nn.Linear)
"""Modules whose dense weights are large: they stay as stored, and ZeRO-3 shards them like the packed ones."""
_TABLE_NUMEL = 2**22
"""Embeddings of fewer weights, such as those of positions, are cast: DeBERTa reads such a weight without a call."""
_IGNORED = (".rotary_emb.inv_freq",)  # old Llama checkpoints carry these; the model computes them


class WeightSharder(Protocol):
    """Takes weights as they are read and keeps this rank's shard (`qvera.distributed.zero_params.BaseSharder`)."""

    def expect(self, weight_numel: int, weights: int) -> None:
        """Called first: elements of the largest weight in a layer, and the number of weights in a layer."""

    def __call__(self, weight: nn.Parameter, table: bool) -> None:
        """Replace a weight's data by this rank's share; ``table``: it is the embedding or the head."""


class NotMappable(Exception):
    """This checkpoint's tensors are not this model's parameters one to one; transformers has to load it."""


def load_mapped(
    directory: Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    sharder: WeightSharder | None = None,
    layers_in_ram: bool = False,
    model_class: ModelClass = CAUSAL_LM,
) -> PreTrainedModel:
    """The model of a checkpoint directory, frozen, in evaluation mode, its big tensors mapped.

    Args:
        directory: the checkpoint.
        config: its config.
        dtype: what its layers compute in; small tensors (norms, biases) are cast to it.
        device: on anything but a CPU the tensors are copied there.
        attn_implementation: None for transformers' own choice.
        trust_remote_code: whether code in the checkpoint may run.
        sharder: takes each packed weight, embedding and head when it is read. These are then private copies, one at a
            time. A head that is the embedding stays whole and mapped: its two users would release it under each other.
        layers_in_ram: leave the packed weights of the decoder layers in the mapped file, whatever the device is
            (`qvera.models.stream`).
        model_class: which model. A head of its own is fp32, and drawn anew where the checkpoint has none of its labels.

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
    packed, plain = _sorted_by_kind({name: entry for name, entry in entries.items() if name in wanted})
    _check_names(model, packed, plain)
    dense = set() if sharder is None else _weights_to_shard(model, config, plain)
    kept = _names_in_layers(model, packed) if layers_in_ram else set()
    if sharder is not None:
        _announce(sharder, model, [entries[name] for name in (*(f"{name}.weight" for name in packed), *dense)])
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    with contextlib.ExitStack() as stack:
        # each tensor keeps the mapping alive, so the handles may close
        paths = dict.fromkeys(entry.file for entry in entries.values())
        files = {path: stack.enter_context(safe_open(path, framework="pt", device="cpu")) for path in paths}
        for name, statistics in packed.items():
            tensors = {entry.name: files[entry.file].get_tensor(entry.name) for entry in statistics}
            if sharder is not None:  # never into the pages of a mapping, which outlive the weight
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"].clone()
            home = torch.device("cpu") if name in kept else device
            _put_four_bit(model, name, tensors, dtype, home, entries[f"{name}.weight"].file)
            if sharder is not None:
                del tensors
                sharder(model.get_submodule(name).weight, table=False)
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
    """Those of the modules that lie in a decoder layer."""
    layers = set(decoder_layers(decoder_of(model)))
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if module in layers)
    return {name for name in names if name.startswith(prefixes)}


def _weights_to_shard(model: PreTrainedModel, config: PretrainedConfig, plain: list[str]) -> set[str]:
    """The dense weights that are sharded: embedding, head, dense linears; not an embedding that is also the head."""
    whole: list[nn.Module] = []
    if getattr(config, "tie_word_embeddings", False):
        whole = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {f"{n}.weight" for n, m in model.named_modules() if type(m) in _BIG and not any(m is end for end in whole)}
    return names & set(plain)


def _announce(sharder: WeightSharder, model: PreTrainedModel, weights: list[TensorEntry]) -> None:
    """Tell what is going to be sharded in the layers; the tables at both ends are not in any."""
    names = {module: name for name, module in model.named_modules()}
    layers = [f"{names[layer]}." for layer in decoder_layers(decoder_of(model))]
    inside = [[math.prod(entry.shape) for entry in weights if entry.name.startswith(layer)] for layer in layers]
    sharder.expect(max((numel for layer in inside for numel in layer), default=0), max(map(len, inside)))


def _sorted_by_kind(entries: dict[str, TensorEntry]) -> tuple[dict[str, list[TensorEntry]], list[str]]:
    """4-bit layers (module name → its tensors in the file), and the names of all other tensors."""
    packed: dict[str, list[TensorEntry]] = {}
    for name in entries:
        if _STATE in name:
            packed[name.split(f".weight{_STATE}")[0]] = []
    plain = []
    for name, entry in entries.items():
        module = name.rpartition(".weight")[0]
        if module in packed and name != f"{module}.bias":
            packed[module].append(entry)
        elif not name.endswith(_IGNORED):
            plain.append(name)
    return packed, plain


def _check_names(model: nn.Module, packed: dict[str, list[TensorEntry]], plain: list[str]) -> None:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in packed if type(modules.get(name)) is not nn.Linear]
    unknown += [name for name in plain if name not in parameters]
    if unknown:
        raise NotMappable(f"{type(model).__name__} has no {first_of(unknown)}")


def _put_four_bit(
    model: nn.Module, name: str, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: torch.device, file: Path
) -> None:
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    dense = parent.get_submodule(child)
    assert isinstance(dense, nn.Linear)  # _check_names has looked
    data = tensors.pop(f"{name}.weight")
    layer = quantization.prequantized_linear(dense, data, tensors, dtype, device)
    found = tuple(layer.weight.quant_state.shape)
    expected = dense.out_features, dense.in_features
    if found != expected or data.numel() * data.element_size() * 2 != expected[0] * expected[1]:
        raise InputError(
            f"{file}: {name}.weight is stored as {list(found)} in {data.numel() * data.element_size():,} packed "
            f"bytes; the model's config.json says {list(expected)}. One of the two belongs to another model."
        )
    setattr(parent, child, layer)


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
