"""The tensors of a checkpoint as the model has them: renamed, and made of several, by transformers' own rules.

transformers keeps a table of how published checkpoints differ from its classes (``conversion_mapping``). Most rules
rename. Others make one tensor of several: the experts of a layer, a tensor each in the file, are stacked into one.

Some checkpoints store weights in 4 or 8 bits of another kind than bitsandbytes': gpt-oss in MXFP4, others in FP8 with
scales. These are decoded to bfloat16, one expert or block of rows at a time, on their way into bitsandbytes' 4 bits. A
decoded MXFP4 value is exact in bfloat16; one of FP8 is rounded to bfloat16's 8 bits of precision.

MXFP4 (Open Compute Project, Microscaling Formats v1.0): ``NAME_blocks`` uint8 [E, m, n / 32, 16] holds two e2m1 values
a byte, the first in the lower half; ``NAME_scales`` uint8 [E, m, n / 32] an exponent for each 32, biased by 127.

FP8: NAME float8_e4m3fn [m, n] beside ``NAME_scale_inv`` (a factor for each block, DeepSeek-V3) or ``NAME_scale`` (one
factor, or one a row).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    MergeModulelist,
    Split,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
)

from qvera.models.experts import expert_specs
from qvera.models.quantization import STATE_KEY
from qvera.utils.safetensors_io import TensorEntry, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import PreTrainedModel


def as_named(entries: list[TensorEntry], model: PreTrainedModel) -> list[TensorEntry]:
    """Return the tensors of a checkpoint under the model's names, in the same order.

    transformers renames parts of old models (GPT-NeoX's head, ViT's attention), old checkpoints call the vectors of
    norms gamma and beta, and one of the base model alone lacks a prefix such as ``bert.``. A tensor that transformers
    fuses or turns keeps its name, and so do all tensors of a 4-bit checkpoint; one that it splits comes in `in_parts`.
    """
    entries = in_parts(entries, model)
    known = model.state_dict().keys()
    unknown = [entry for entry in entries if entry.name not in known]
    if not unknown or any(f".{STATE_KEY}" in entry.name for entry in entries):
        return entries
    rules, prefix, names = _rules(model), f"{model.base_model_prefix}.", {}
    for entry in unknown:
        name, _, converter = _converted(entry.name, rules)
        for own in (name, prefix + name):
            if converter is None and own in known:
                names[entry.name] = own
    found = [dataclasses.replace(entry, name=names.get(entry.name, entry.name)) for entry in entries]
    # two tensors of one name can't both be meant: then no name is changed
    return found if len({entry.name for entry in found}) == len(found) else entries


def in_parts(entries: list[TensorEntry], model: PreTrainedModel) -> list[TensorEntry]:
    """Return a checkpoint's tensors with each one that transformers splits by rows replaced by its parts.

    A part is a tensor of the model and a run of the file's bytes, so the order stays that of the file.
    """
    parameters, rules = dict(model.named_parameters()), _rules(model)
    found: list[TensorEntry] = []
    for entry in entries:
        target, _, converter = _converted(entry.name, rules)
        parts: list[str] = []
        if converter is not None and all(type(op) in (Chunk, Split) and op.dim == 0 for op in converter.operations):
            first, *_ = converter.target_patterns
            parts = [target.replace(first, each) for each in converter.target_patterns]
        shapes = [tuple(parameters[part].shape) for part in parts if part in parameters]
        if not parts or len(shapes) < len(parts) or sum(shape[0] for shape in shapes) != entry.shape[0]:
            found.append(entry)
            continue
        start = entry.start
        for part, shape in zip(parts, shapes, strict=True):
            stop = start + math.prod(shape) * entry.dtype.itemsize
            found.append(TensorEntry(part, entry.dtype, shape, entry.file, start, stop, entry.name))
            start = stop
    return found


def made_of(name: str, stored: Iterable[str], model: PreTrainedModel) -> str | None:
    """Return which of a checkpoint's ``stored`` tensors transformers changes into the model's ``name``; None: none."""
    rules = _rules(model)
    return next((each for each in stored if _converted(each, rules)[0] == name), None)


_Rules = tuple[list[WeightRenaming], list[WeightConverter]]


def _rules(model: PreTrainedModel) -> _Rules:
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    return renamings, [one for one in transforms if isinstance(one, WeightConverter)]


def _converted(name: str, rules: _Rules) -> tuple[str, str | None, WeightConverter | None]:
    """Return a tensor's name in the model (the first, if it becomes several), and the pattern and rule that change it.

    Pattern and rule are None where it is only renamed.
    """
    renamings, converters = rules
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return target, pattern, converter
    return name, None, None


def as_stacks(entries: list[TensorEntry], model: PreTrainedModel) -> list[TensorEntry]:
    """Give experts that the file has one below the other (DBRX) the shape [E, m, n]. Other tensors stay as they are."""
    specs = expert_specs(model)
    whole = {e.name for e in entries if e.name in specs and e.numel == math.prod(specs[e.name].shape)}
    return [dataclasses.replace(e, shape=specs[e.name].shape) if e.name in whole else e for e in entries]


@dataclasses.dataclass(frozen=True)
class FusedTensor:
    """A tensor of the model that transformers makes of several tensors of the checkpoint."""

    spec: TensorSpec
    """Its name and shape in the model, with the dtype of the sources."""
    sources: dict[str, list[TensorEntry]]
    """The checkpoint's tensors by the pattern of the rule, in the order in which the rule takes them."""
    converter: WeightConverter
    model: PreTrainedModel

    @property
    def is_merged(self) -> bool:
        """Whether the experts are tensors of their own in the checkpoint."""
        return any(isinstance(operation, MergeModulelist) for operation in self.converter.operations)

    def part(self, number: int, read: Callable[[TensorEntry, int | None], torch.Tensor]) -> torch.Tensor:
        """Make element ``number`` of the first dimension, an expert's matrix, by the rule of transformers.

        ``read`` gives a tensor of the checkpoint, or an element of its first dimension.
        """
        # the rule sees a layer with this one expert, so that memory holds one expert and not the stack
        collected = {}
        for pattern, entries in self.sources.items():
            if self.is_merged:
                collected[pattern] = [read(entries[number], None)]
            else:
                collected[pattern] = [read(entries[0], number).unsqueeze(0)]
        return self._converted(collected, (1, *self.spec.shape[1:]))[0].contiguous()

    def whole(self, read: Callable[[TensorEntry, int | None], torch.Tensor]) -> torch.Tensor:
        """Make the whole tensor, from one source for each pattern. ``read`` is that of `part`."""
        collected = {pattern: [read(entries[0], None)] for pattern, entries in self.sources.items()}
        return self._converted(collected, self.spec.shape).contiguous()

    def _converted(self, collected: dict[str, Any], shape: tuple[int, ...]) -> torch.Tensor:
        converter = copy.copy(self.converter)
        converter.collected_tensors = collected
        made = converter.convert(self.spec.name, model=self.model, config=self.model.config)
        ((_, tensor),) = made.items()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"{self.spec.name}: transformers' rule gives {list(tensor.shape)}, not {list(shape)}")
        return tensor

    def split(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """Split an expert's matrix into the checkpoint's tensors, in the order of ``sources``: the reverse of `part`.

        Only where the experts are tensors of their own (`is_merged`).
        """
        made: dict[str, Any] = {self.converter.target_patterns[0]: matrix.unsqueeze(0)}
        for operation in reversed(self.converter.operations):
            made = operation.reverse_op.convert(
                made,
                source_patterns=self.converter.target_patterns,
                target_patterns=self.converter.source_patterns,
                model=self.model,
                config=self.model.config,
                full_layer_name=self.spec.name,
            )
        return [made[pattern.replace("*", "0")].contiguous() for pattern in self.sources]

    def expert_of(self) -> dict[str, tuple[int, int]]:
        """Map each source's name to the number of its expert, and its place in `split`."""
        return {
            entry.name: (number, place)
            for place, entries in enumerate(self.sources.values())
            for number, entry in enumerate(entries)
        }


def fused_tensors(entries: Sequence[TensorEntry], model: PreTrainedModel) -> dict[str, FusedTensor]:
    """Return the tensors of three dimensions that transformers makes of several in a checkpoint, by the model's names.

    These are stacks of experts [E, .., ..], and convolutions over q, k and v.
    """
    parameters = dict(model.named_parameters())
    stored = {entry.name for entry in entries}
    rules = _rules(model)
    # collect the sources of each target, with experts in the order of their numbers (2 before 10)
    found: dict[str, tuple[WeightConverter, dict[str, list[TensorEntry]]]] = {}
    for entry in sorted(entries, key=lambda entry: dot_natural_key(entry.name)):
        target, pattern, converter = _converted(entry.name, rules)
        if converter is None or pattern is None:
            continue
        target = target if target in parameters else f"{model.base_model_prefix}.{target}"
        if target in parameters and target not in stored and parameters[target].dim() == 3:
            found.setdefault(target, (converter, defaultdict(list)))[1][pattern].append(entry)
    # keep those whose sources are all there
    fused = {}
    for target, (converter, sources) in found.items():
        dtype = next(iter(sources.values()))[0].dtype
        tensor = FusedTensor(
            TensorSpec(target, dtype, tuple(parameters[target].shape)), dict(sources), converter, model
        )
        count = tensor.spec.shape[0] if tensor.is_merged else 1
        is_whole = sources.keys() == set(converter.source_patterns)
        if is_whole and all(len(each) == count for each in sources.values()) and len(converter.target_patterns) == 1:
            fused[target] = tensor
    return fused


DECODED = ("mxfp4", "fp8")
"""transformers' ``quant_method`` of the checkpoints that are decoded."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_SCALES = ("_scale", "_scale_inv")  # the last one that is there counts


def is_decoded(stored: Any) -> bool:
    """Whether weights of a config's ``quantization_config`` are decoded here."""
    stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    return (stored or {}).get("quant_method") in DECODED


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks uint8 [m, G, 16] and scales uint8 [m, G] give bfloat16 [m, 32 G]."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.float32)
    pairs = torch.stack([values[(blocks & 15).int()], values[(blocks >> 4).int()]], dim=-1)  # [m, G, 16, 2]
    decoded = torch.ldexp(pairs.flatten(2), scales.int().unsqueeze(-1) - _BIAS)
    return decoded.flatten(1).to(torch.bfloat16)


class Mxfp4Stack:
    """A stack of experts [E, .., ..] in MXFP4, with the part of `FusedTensor` that a reader of experts needs."""

    is_merged = False

    def __init__(self, name: str, shape: tuple[int, ...], blocks: TensorEntry, scales: TensorEntry) -> None:
        self.spec = TensorSpec(name, torch.bfloat16, shape)
        self.sources = {"blocks": [blocks], "scales": [scales]}

    def part(self, number: int, read: Callable[[TensorEntry, int | None], torch.Tensor]) -> torch.Tensor:
        """An expert's matrix, as the model has it: gpt-oss has it turned."""
        blocks, scales = (read(self.sources[kind][0], number) for kind in ("blocks", "scales"))
        matrix = from_mxfp4(blocks, scales)
        return matrix if tuple(matrix.shape) == self.spec.shape[1:] else matrix.t().contiguous()


def mxfp4_stacks(entries: Sequence[TensorEntry], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Mxfp4Stack]:
    """Return the stacks in MXFP4 among a checkpoint's tensors. ``shapes`` has those of the model's stacks by name."""
    stored = {entry.name: entry for entry in entries}
    found = {}
    for name, shape in shapes.items():
        blocks, scales = stored.get(f"{name}_blocks"), stored.get(f"{name}_scales")
        if blocks is not None and scales is not None and 2 * blocks.numel == math.prod(shape):
            found[name] = Mxfp4Stack(name, shape, blocks, scales)
    return found


def fp8_factors(entries: Sequence[TensorEntry]) -> dict[str, TensorEntry]:
    """Map the name of each tensor in FP8 to the tensor of its factors."""
    stored = {entry.name: entry for entry in entries}
    names = [entry.name for entry in entries if entry.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    return {name: stored[key] for end in _SCALES for name in names if (key := f"{name}{end}") in stored}


def from_fp8(rows: torch.Tensor, factors: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Rows [first, first + k) of a weight of ``count`` rows, FP8 [k, n], times their factors: bfloat16 [k, n].

    Of a stack of experts the rows are those of all experts, one after the other, and ``count`` is that of one.
    """
    factors = factors.float()
    if factors.dim() < 2:
        factors = factors.view(-1, 1)
    # a factor for each block of rows and columns; blocks at the end may be short
    blocks = factors.shape[-2]
    high, wide = -(-count // blocks), -(-rows.shape[1] // factors.shape[-1])
    # blocks are taken to be powers of two in size: a short last block hides the exact size
    high, wide = (2 ** math.ceil(math.log2(size)) if size > 1 else 1 for size in (high, wide))
    high = count if blocks == 1 else high
    # the row of factors for each row of weights: those of the experts before it, and its block within its own
    numbers = torch.arange(first, first + len(rows))
    numbers = numbers // count * blocks + numbers % count // high
    spread = factors.flatten(0, -2)[numbers].repeat_interleave(wide, 1)
    return (rows.float() * spread[:, : rows.shape[1]]).to(torch.bfloat16)
