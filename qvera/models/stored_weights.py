"""A checkpoint's tensors under the model's names, with each 4-bit weight as a whole one.

A weight in bitsandbytes' 4 bits is a tensor of packed nibbles with statistics beside it
(`quantization.serialized_layout`), which may lie in any order and in other shards.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from qvera.models import quantization
from qvera.models.quantization import bnb_functional
from qvera.utils.errors import InputError
from qvera.utils.safetensors_io import TensorEntry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvera.utils.safetensors_io import TensorEntry

_STATE = f".{quantization.STATE_KEY}"


def as_named(entries: list[TensorEntry], model: PreTrainedModel) -> list[TensorEntry]:
    """The tensors of a checkpoint under the model's names, in the same order.

    transformers renames parts of old models (GPT-NeoX's head, ViT's attention), old checkpoints call the vectors of
    norms gamma and beta, and one of the base model alone lacks a prefix such as ``bert.``. A tensor that transformers
    fuses, splits or turns keeps its name, and so do all tensors of a 4-bit checkpoint.
    """
    known = model.state_dict().keys()
    unknown = [entry for entry in entries if entry.name not in known]
    if not unknown or any(_STATE in entry.name for entry in entries):
        return entries
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    others = [one for one in transforms if not isinstance(one, WeightRenaming)]
    prefix, names = f"{model.base_model_prefix}.", {}
    for entry in unknown:
        name = entry.name
        for one in renamings:
            name, _ = one.rename_source_key(name)
        if any(one.rename_source_key(name)[1] is not None for one in others):
            continue
        for own in (name, prefix + name):
            if own in known:
                names[entry.name] = own
    found = [dataclasses.replace(entry, name=names.get(entry.name, entry.name)) for entry in entries]
    return found if len({entry.name for entry in found}) == len(found) else entries


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A 4-bit weight as it lies in the files."""

    packed: TensorEntry
    """The nibbles, in any dtype."""
    dense: TensorEntry
    """What a reader gets in its place: [out_features, in_features], with the bytes of ``packed``."""
    statistics: dict[str, TensorEntry]
    """By the end of their names, such as ``absmax``."""
    quant_type: str
    blocksize: int
    double_quant: bool

    def absmax(self) -> torch.Tensor:
        """The scale of each block of the whole weight, fp32 [blocks]."""
        tensors = {}
        for key, entry in self.statistics.items():
            with safe_open(entry.file, framework="pt") as file:
                tensors[key] = file.get_tensor(entry.name)
        state = bnb_functional.QuantState.from_dict(tensors, torch.device("cpu"))
        if not state.nested:
            return state.absmax
        return bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset

    def dequantized(self, packed: torch.Tensor, absmax: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        """Some rows [k, in_features] of the weight in ``dtype``, its compute dtype in training.

        ``packed`` has their bytes (uint8), ``absmax`` is that of the whole weight. ``first`` is the number of the first
        row; a block of scales begins with it.
        """
        columns = self.dense.shape[1]
        at, count = first * columns // self.blocksize, 2 * packed.numel()
        scales = absmax[at : at + -(-count // self.blocksize)].contiguous()
        code = bnb_functional.get_4bit_type(self.quant_type, device="cpu")
        shape = torch.Size((count // columns, columns))
        state = bnb_functional.QuantState(scales, shape, code, self.blocksize, self.quant_type, dtype)
        return quantization.dequantized_packed(packed.view(-1, 1), state)


def packed_weights(entries: list[TensorEntry], model: nn.Module) -> dict[str, PackedWeight]:
    """The 4-bit weights of a checkpoint by name. Raises InputError if they are not whole, or not those of the model."""
    stored = {entry.name: entry for entry in entries}
    statistics: dict[str, dict[str, TensorEntry]] = {name.partition(_STATE)[0]: {} for name in stored if _STATE in name}
    for name, entry in stored.items():
        weight, _, key = name.rpartition(".")
        if _STATE in name:
            weight, key = name.partition(_STATE)[0], name[name.index(_STATE) + 1 :]
        if weight in statistics:
            statistics[weight][key] = entry
    modules = dict(model.named_modules())
    return {
        name: _packed_weight(name, stored, found, modules.get(name.removesuffix(".weight")))
        for name, found in statistics.items()
    }


def _packed_weight(
    name: str, stored: dict[str, TensorEntry], statistics: dict[str, TensorEntry], module: nn.Module | None
) -> PackedWeight:
    entry = next(one for key, one in statistics.items() if key.startswith(quantization.STATE_KEY))
    packed = stored.get(name)
    if packed is None or not isinstance(module, nn.Linear):
        raise InputError(f"{entry.file}: has 4-bit statistics of {name}, which is no packed linear of this model.")
    state = _json_of(entry)
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
    if statistics["absmax"].numel != -(-math.prod(shape) // blocksize):
        raise InputError(f"{entry.file}: {name} has another number of scales (absmax) than blocks of {blocksize}.")
    dense = dataclasses.replace(packed, dtype=torch.float32, shape=shape)
    return PackedWeight(packed, dense, statistics, quant_type, blocksize, double_quant)


def _json_of(entry: TensorEntry) -> dict[str, Any]:
    try:
        with open(entry.file, "rb") as file:
            file.seek(entry.start)
            found = json.loads(file.read(entry.size_bytes))
    except (OSError, ValueError) as error:
        raise InputError(f"{entry.file}: {entry.name} can't be read ({error}). Copy or quantize it again.") from None
    if not isinstance(found, dict):
        raise InputError(f"{entry.file}: {entry.name} is no JSON object. Copy or quantize it again.")
    return found


def without_statistics(entries: list[TensorEntry], packed: dict[str, PackedWeight]) -> list[TensorEntry]:
    """The tensors of a checkpoint as if it were not quantized: each 4-bit weight whole, and no statistics."""
    hidden = {entry.name for weight in packed.values() for entry in weight.statistics.values()}
    return [packed[e.name].dense if e.name in packed else e for e in entries if e.name not in hidden]
