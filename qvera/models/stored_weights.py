"""A base model's checkpoint: its tensors under the model's names, and a model whose weights are mapped from the files.

A weight in bitsandbytes' 4 bits is a tensor of packed nibbles with statistics beside it
(`quantization.serialized_layout`), which may lie in any order and in other shards.

Packed weights, statistics, embeddings and head of a mapped model stay in the file, in their stored dtype. On a CPU
processes share the pages, and the system drops them when it needs room. On a GPU each tensor is copied to the device,
one at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig

from qvera.models import linear, quantization
from qvera.models.experts import ExpertStack, StackScales, StackSpec, expert_specs, place_stack
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.quantization import STATE_KEY, bnb_functional
from qvera.models.structure import decoder_layers, decoder_of
from qvera.utils.errors import InputError
from qvera.utils.formatting import first_of
from qvera.utils.safetensors_io import TensorEntry, checkpoint_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from qvera.distributed.zero import BaseSharder

_STATE = f".{STATE_KEY}"
_BIG = (nn.Embedding, nn.Linear)
"""Modules with large dense weights: they stay as stored, and ZeRO-3 shards them like the packed ones."""
_TABLE_NUMEL = 2**22
"""Smaller embeddings, such as those of positions, are cast: DeBERTa reads such a weight without a call."""
_IGNORED = (".rotary_emb.inv_freq",)  # old Llama checkpoints carry these; the model computes them


class NotMappable(Exception):
    """This checkpoint's tensors are not this model's parameters one to one; transformers has to load it."""


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A 4-bit weight as it lies in the files."""

    packed: TensorEntry
    """The nibbles, in any dtype."""
    dense: TensorEntry
    """The dense weight that readers see in its place: [m, n], or [E, m, n] of experts, with the bytes of ``packed``."""
    statistics: dict[str, TensorEntry]
    """The tensors of its scales, by the end of their names, such as ``absmax``."""
    quant_type: str
    blocksize: int
    double_quant: bool
    stack: StackSpec | None = None
    """The shape of a stack of experts; None: it is one matrix."""
    offset: torch.Tensor | None = None
    """The offset that double quantization subtracted from the scales of each expert of a stack, fp32 [E]."""

    def absmax(self) -> torch.Tensor:
        """The scale of each block of the whole weight, fp32 [blocks]."""
        tensors = {}
        for key, entry in self.statistics.items():
            with safe_open(entry.file, framework="pt") as file:
                tensors[key] = file.get_tensor(entry.name)
        if self.offset is not None:
            experts = self.dense.shape[0]
            return self.scales({key.rpartition(".")[2]: t for key, t in tensors.items()}).of(0, experts).view(-1)
        state = bnb_functional.QuantState.from_dict(tensors, torch.device("cpu"))
        if not state.nested:
            return state.absmax
        return bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset

    def scales(self, tensors: dict[str, torch.Tensor]) -> StackScales:
        """The scales of a stack of experts, from its statistics by the ends of their names."""
        experts = self.dense.shape[0]
        nested = tensors.get("nested_absmax")
        return StackScales(
            tensors["absmax"].view(experts, -1), tensors["quant_map"], self.quant_type, self.blocksize,
            None if nested is None else nested.view(experts, -1), tensors.get("nested_quant_map"), self.offset,
        )  # fmt: skip

    def dequantized(self, packed: torch.Tensor, absmax: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        """Some rows [k, in_features] of the weight, or experts [k, m, n], in ``dtype``, its compute dtype in training.

        ``packed`` has their bytes (uint8), ``absmax`` is that of the whole weight. ``first`` is the number of the first
        row or expert; a block of scales begins with it.
        """
        sizes = self.dense.shape[1:]
        at, count = first * math.prod(sizes) // self.blocksize, 2 * packed.numel()
        scales = absmax[at : at + -(-count // self.blocksize)].contiguous()
        code = bnb_functional.get_4bit_type(self.quant_type, device="cpu")
        shape = torch.Size((count // sizes[-1], sizes[-1]))
        state = bnb_functional.QuantState(scales, shape, code, self.blocksize, self.quant_type, dtype)
        return quantization.dequantized_packed(packed, state).view(-1, *sizes)


def packed_weights(entries: list[TensorEntry], model: nn.Module) -> dict[str, PackedWeight]:
    """The 4-bit weights of a checkpoint by name. Raises InputError if they are not whole, or not those of the model."""
    stored, modules, found = {entry.name: entry for entry in entries}, dict(model.named_modules()), {}
    specs = expert_specs(model)
    parts: dict[str, dict[str, TensorEntry]] = {name.partition(_STATE)[0]: {} for name in stored if _STATE in name}
    for name, entry in stored.items():
        weight = name.partition(_STATE)[0] if _STATE in name else name.rpartition(".")[0]
        if weight in parts:
            parts[weight][name[len(weight) + 1 :]] = entry
    for name, statistics in parts.items():
        entry = next(one for key, one in statistics.items() if key.startswith(STATE_KEY))
        packed, module = stored.get(name), modules.get(name.removesuffix(".weight"))
        stack = specs.get(name)
        if packed is None or (stack is None and not isinstance(module, nn.Linear)):
            raise InputError(f"{entry.file}: has 4-bit statistics of {name}, which is no packed linear of this model.")
        try:
            with open(entry.file, "rb") as file:
                file.seek(entry.start)
                state = json.loads(file.read(entry.size_bytes))
            if not isinstance(state, dict):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{entry.file}: {entry.name} can't be read ({error}). Copy or quantize it again."
            ) from None
        shape: tuple[int, ...] = () if stack is None else stack.shape
        if isinstance(module, nn.Linear):
            shape = module.out_features, module.in_features
        double_quant = "nested_offset" in state
        needed = {"absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if double_quant else ())}
        blocksize, quant_type = state.get("blocksize"), state.get("quant_type")
        if needed - statistics.keys() or quant_type not in ("nf4", "fp4") or not isinstance(blocksize, int):
            raise InputError(f"{entry.file}: the 4-bit statistics of {name} are not whole. Copy or quantize it again.")
        if tuple(state.get("shape") or ()) != shape or 2 * packed.size_bytes != math.prod(shape):
            raise InputError(
                f"{packed.file}: {name} is stored as {state.get('shape')} in {packed.size_bytes:,} packed bytes; the "
                f"model's config.json says {list(shape)}. One of the two belongs to another model."
            )
        offsets = torch.tensor(state["nested_offset"]) if stack is not None and double_quant else None
        if statistics["absmax"].numel != -(-math.prod(shape) // blocksize) or (
            offsets is not None and len(offsets) != shape[0]
        ):
            raise InputError(f"{entry.file}: {name} has another number of scales (absmax) than blocks of {blocksize}.")
        dense = dataclasses.replace(packed, dtype=torch.float32, shape=shape)
        found[name] = PackedWeight(packed, dense, statistics, quant_type, blocksize, double_quant, stack, offsets)
    return found


def without_statistics(entries: list[TensorEntry], packed: dict[str, PackedWeight]) -> list[TensorEntry]:
    """The tensors of a checkpoint as if it were not quantized: each 4-bit weight whole, and no statistics."""
    hidden = {entry.name for weight in packed.values() for entry in weight.statistics.values()}
    return [packed[e.name].dense if e.name in packed else e for e in entries if e.name not in hidden]


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
    published: Path | None = None,
) -> PreTrainedModel:
    """The model of a checkpoint directory, frozen, in evaluation mode, its big tensors mapped.

    Args:
        dtype: what its layers compute in; small tensors (norms, biases) are cast to it.
        sharder: takes each packed weight, embedding and head when it is read, as private copies. A head that is the
            embedding stays mapped, because its two users would release it under each other.
        layers_in_ram: leave the decoder layers' packed weights in the mapped file (`qvera.models.stream`).
        model_class: a head of its own is fp32. What the checkpoint has not of it, with its labels, is drawn.
        published: where the generation config lies, if ``directory`` is a quantized copy.

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
    new_outputs = () if keeps_head else model_class.outputs(model)
    wanted = model_class.stored_names(entries, model)
    stored = [entry for name, entry in entries.items() if name in wanted and not name.startswith(new_outputs)]
    packed, plain = _sorted_by_kind(model, stored)
    layers = set(decoder_layers(decoder_of(model))) if layers_in_ram or sharder is not None else set()
    prefixes = [f"{name}." for name, module in model.named_modules() if module in layers]
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    sharded: set[str] = set()
    if sharder is not None:
        # big dense weights too, but not an embedding that is also the head, and no head that is trained
        whole = tables if getattr(config, "tie_word_embeddings", False) else []
        big = {f"{n}.weight" for n, m in model.named_modules() if type(m) in _BIG and not any(m is t for t in whole)}
        sharded = {name for name in big.intersection(plain) if not name.startswith(heads)}
        sizes = {name: math.prod(entries[name].shape) for name in (*packed, *sharded)}
        inside = [[size for name, size in sizes.items() if name.startswith(prefix)] for prefix in prefixes]
        sharder.expect(max((numel for layer in inside for numel in layer), default=0), max(map(len, inside)))
    with contextlib.ExitStack() as stack:
        # each tensor keeps the mapping alive, so the handles may close
        paths = dict.fromkeys(entry.file for entry in entries.values())
        files = {path: stack.enter_context(safe_open(path, framework="pt", device="cpu")) for path in paths}
        for name, weight in packed.items():
            data = files[weight.packed.file].get_tensor(name)
            if name.startswith(heads):  # is trained, which packed bytes can't be
                in_fp32 = weight.dequantized(data.view(torch.uint8), weight.absmax(), 0, torch.float32)
                _put_plain(model, weight.dense, in_fp32, torch.float32, device)
                continue
            statistics = {e.name: files[e.file].get_tensor(e.name) for e in weight.statistics.values()}
            if sharder is not None:  # never into the pages of a mapping, which outlive the weight
                data = data.clone()
            home = torch.device("cpu") if layers_in_ram and name.startswith(tuple(prefixes)) else device
            layer: Any
            if weight.stack is not None:
                ends = {key[len(name) + 1 :]: tensor for key, tensor in statistics.items()}
                layer = ExpertStack(weight.stack, data.to(home), weight.scales(ends).to(home), dtype)
                place_stack(model, name, layer)
            else:
                path = name.removesuffix(".weight")
                dense = cast(nn.Linear, model.get_submodule(path))  # `_sorted_by_kind` has looked
                layer = quantization.prequantized_linear(dense, data, statistics, dtype, home)
                model.set_submodule(path, layer)
            del data
            if sharder is not None:
                sharder(layer.weight, table=False)
        for name in plain:
            tensor = files[entries[name].file].get_tensor(name)
            tensor = tensor.clone() if name in sharded else tensor
            # a trained head is never rounded to the compute dtype
            own_dtype = torch.float32 if name.startswith(heads) else dtype
            module = _put_plain(model, entries[name], tensor, own_dtype, device)
            del tensor
            if sharder is not None and name in sharded:
                sharder(cast(nn.Parameter, module.weight), table=any(module is end for end in tables))
    # a tied head gets the embedding here, so only afterwards is a weight on the meta device a missing one
    model.tie_weights()
    drawn = [name for name, p in model.named_parameters() if p.is_meta]
    if missing := [name for name in drawn if keeps_head or not name.startswith(heads)]:
        raise NotMappable(f"{directory} has no {first_of(missing)}")
    for buffer in model.buffers():
        buffer.data = buffer.to(device)
    # a trained head is fp32, and takes its input so
    linear.compute_in(model.base_model if model_class.has_own_head else model, dtype)
    model_class.start_head(model, drawn, device)
    with contextlib.suppress(OSError):  # not every model has one
        model.generation_config = GenerationConfig.from_pretrained(published or directory)
    return model.requires_grad_(False).eval()


def _sorted_by_kind(model: PreTrainedModel, entries: list[TensorEntry]) -> tuple[dict[str, PackedWeight], list[str]]:
    """4-bit weights by name, and the names of all dense tensors."""
    modules, known = dict(model.named_modules()), model.state_dict().keys()
    four_bit = {entry.name.partition(_STATE)[0] for entry in entries if _STATE in entry.name}
    stacks = expert_specs(model)
    unknown = [n for n in four_bit if n not in stacks and type(modules.get(n.removesuffix(".weight"))) is not nn.Linear]
    if not unknown:
        packed = packed_weights(entries, model)
        dense = (entry.name for entry in without_statistics(entries, packed))
        plain = [name for name in dense if name not in packed and not name.endswith(_IGNORED)]
        unknown = [name for name in plain if name not in known]
    if unknown:
        raise NotMappable(f"{type(model).__name__} has no {first_of(unknown)}")
    return packed, plain


def _put_plain(
    model: PreTrainedModel, entry: TensorEntry, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Make a dense tensor a parameter of the model; returns its module."""
    module_name, _, key = entry.name.rpartition(".")
    module = model.get_submodule(module_name)
    expected = tuple(getattr(module, key).shape)
    if tuple(tensor.shape) != expected:
        raise InputError(
            f"{entry.file}: {entry.name} has shape {list(tensor.shape)}; the model's config.json says "
            f"{list(expected)}. One of the two belongs to another model."
        )
    if not tensor.is_floating_point() and key not in module._buffers:
        raise InputError(
            f"{entry.file}: {entry.name} is {tensor.dtype}, expected a floating-point weight. Save the checkpoint "
            "again."
        )
    # On a CPU it stays in the file as it is, and is cast for each product. An accelerator has it in the compute dtype,
    # unless that would take more room than the file's.
    if key in module._buffers:  # such as what corrects a router's scores: the choice of experts depends on its bits
        module._buffers[key] = tensor.to(device)
        return module
    narrower, as_wide = tensor.dtype.itemsize < dtype.itemsize, tensor.dtype.itemsize == dtype.itemsize
    is_table = tensor.numel() >= _TABLE_NUMEL or module is model.get_input_embeddings()
    is_big = type(module) in _BIG and key == "weight" and (isinstance(module, nn.Linear) or is_table)
    stays = is_big and (narrower or (as_wide and device.type == "cpu"))
    value = tensor.to(device=device, dtype=tensor.dtype if stays else dtype)
    setattr(module, key, nn.Parameter(value, requires_grad=False))
    return module
