"""Compare an adapter with its base's checkpoint, then read the base's rows as training had them.

A 4-bit block is 64 consecutive elements of the flattened weight. Double quantization also quantizes the blocks'
absolute maxima, around their mean over the whole weight (QLoRA, arXiv 2305.14314, section 3.2). So the maxima of a
whole weight are found before its rows are read.
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qvera.adapters.adapter_file import read_adapter, require_base
from qvera.config.sections import ModelSection
from qvera.exporting.deltas import AdapterDeltas, read_deltas
from qvera.models import quantization
from qvera.models.conversion import FusedTensor, as_named, as_stacks, fused_tensors, in_parts, is_decoded
from qvera.models.experts import expert_specs
from qvera.models.hub import base_directory
from qvera.models.loader import pick_compute_dtype
from qvera.models.model_class import CAUSAL_LM, ModelClass, empty_model, require_own_weights
from qvera.models.quantization import BLOCK
from qvera.models.quantize_checkpoint import cached_base
from qvera.models.safetensors_stream import Block, CheckpointReader, read_bytes, require_unchanged, rows_per_block
from qvera.models.stored_weights import PackedWeight, packed_weights, without_statistics
from qvera.models.structure import left_whole
from qvera.utils import accelerator
from qvera.utils.cores import core_ids
from qvera.utils.errors import InputError
from qvera.utils.files import try_read_json
from qvera.utils.formatting import first_of
from qvera.utils.safetensors_io import TensorEntry, base_fingerprint, checkpoint_tensors, file_stamps


def _absolute_maxima(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    found = flat[:whole].view(-1, BLOCK).abs().amax(dim=1).float()
    if whole < flat.numel():  # the last block is short
        found = torch.cat([found, flat[whole:].abs().amax().float().view(1)])
    return found


class TrainedBaseReader(CheckpointReader):
    """Reads a checkpoint (``model`` without weights), quantizes as in ``section``, and dequantizes to ``compute``.

    ``names``: the model's name of a tensor → its name in the files.
    """

    def __init__(
        self,
        entries: list[TensorEntry],
        stamps: dict[str, list[int]],
        known: dict[str, str],
        section: ModelSection,
        compute: torch.dtype,
        model: PreTrainedModel,
        names: Mapping[str, str],
    ) -> None:
        super().__init__(entries, stamps, known)
        self.section, self.compute = section, compute
        self.four_bit = section.quantization in ("nf4", "fp4")
        head, dense = model.get_output_embeddings(), left_whole(model)
        self.transposed = {
            names.get(f"{name}.weight", ""): isinstance(module, Conv1D)
            for name, module in model.named_modules()
            if (type(module) is torch.nn.Linear or isinstance(module, Conv1D))
            and module is not head
            and name not in dense
        }
        """Quantized weight → whether it is a Conv1D's, which is stored [in, out] and quantized as [out, in]."""
        specs = expert_specs(model) if self.four_bit else {}
        self.stacks = {names[name] for name, spec in specs.items() if spec.is_quantizable and name in names}
        """Weights [E, m, n] of experts, each of which is quantized by itself."""

    def blocks_of(self, descriptor: int, entry: TensorEntry) -> Iterator[Block]:
        """Yield a tensor's blocks, with the absolute maxima of the whole tensor where it was quantized to 4 bits."""
        transposed, absmax = self.transposed.get(entry.name), None
        if transposed is not None and self.four_bit:
            # The tensor is read twice: for the maxima, then for the rows. A Conv1D is turned, so it is one block.
            parts = (block.rows for block in self.read(descriptor, entry, whole=transposed))
            # a Conv1D is quantized while loading, from weights in the compute dtype
            absmax = torch.cat(
                [_absolute_maxima(rows.to(self.compute).t().contiguous() if transposed else rows) for rows in parts]
            )
            if self.section.double_quant:
                absmax = quantization.double_quantized_absmax(absmax)
        for block in self.read(descriptor, entry, whole=bool(transposed)):
            yield block._replace(absmax=absmax)

    def as_trained(self, block: Block, rows: torch.Tensor) -> torch.Tensor:
        """Return the ``rows`` of a block as training had them, in ``compute``."""
        if block.entry.name in self.stacks:
            return torch.stack([quantization.quantized_reader(expert, self.section, self.compute)() for expert in rows])
        transposed = self.transposed.get(block.entry.name)
        if transposed is None:
            return rows.to(self.compute)
        weight = rows if self.four_bit and not transposed else rows.to(self.compute)
        weight = weight.t().contiguous() if transposed else weight
        if block.absmax is None:
            found = quantization.quantized_reader(weight, self.section)()
        else:
            # Blocks of 64 elements are counted over the flattened weight, not row by row.
            at = block.first * weight.shape[1] // BLOCK
            absmax = block.absmax[at : at + -(-weight.numel() // BLOCK)]
            found = quantization.quantize_dequantize_blocks(weight, absmax, self.section.quantization, self.compute)
        return found.t() if transposed else found


class PackedBaseReader(CheckpointReader):
    """Reads a checkpoint that is stored in 4 bits, and dequantizes its rows to ``compute``.

    Blocks of a packed weight hold bytes, but their row numbers are those of the dequantized weight.
    """

    def __init__(
        self,
        entries: list[TensorEntry],
        stamps: dict[str, list[int]],
        known: dict[str, str],
        packed: dict[str, PackedWeight],
        compute: torch.dtype,
    ) -> None:
        super().__init__(entries, stamps, known)
        self.packed, self.compute = packed, compute
        self.statistics = {entry.name for weight in packed.values() for entry in weight.statistics.values()}

    def blocks(self, skip: Collection[str]) -> Iterator[Block]:
        """Yield all blocks but those of ``skip`` and of packed weights' statistics, which are only hashed."""
        return super().blocks(self.statistics.union(skip))

    def blocks_of(self, descriptor: int, entry: TensorEntry) -> Iterator[Block]:
        """Yield a tensor's blocks; those of a packed weight have the scales of the whole weight."""
        weight = self.packed.get(entry.name)
        if weight is None:
            yield from self.read(descriptor, entry)
            return
        absmax, (count, *sizes) = weight.absmax(), weight.dense.shape
        each = math.prod(sizes)  # of a row, or of an expert
        step = rows_per_block(each, weight.blocksize)
        for first in range(0, count, step):
            # Two weights are in a byte.
            start, stop = first * each // 2, min(first + step, count) * each // 2
            data = read_bytes(descriptor, entry, start, stop - start)
            yield Block(weight.dense, first, data, first + step >= count, absmax)

    def as_trained(self, block: Block, rows: torch.Tensor) -> torch.Tensor:
        """Return the ``rows`` of a block as training used them, in ``compute``."""
        if block.absmax is None:
            return rows.to(self.compute)
        return self.packed[block.entry.name].dequantized(rows, block.absmax, block.first, self.compute)


@contextlib.contextmanager
def one_thread_each() -> Iterator[int]:
    """Inside the block, torch uses one thread for each thread that calls it. Yields how many threads should call it.

    Independent blocks keep cores busier than one split block, and results then do not depend on the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(len(core_ids()), 16)
    finally:
        torch.set_num_threads(before)


class AdapterOnBase(NamedTuple):
    """An adapter and its base."""

    directory: Path
    config: PretrainedConfig
    model: PreTrainedModel  # without weights
    stored: list[TensorEntry]  # all tensors of the checkpoint
    packed: dict[str, PackedWeight]  # those that are 4-bit weights
    entries: list[TensorEntry]  # of the model: no statistics of 4-bit weights, no head that the adapter has
    stamps: dict[str, list[int]]  # `file_stamp` of each file
    fingerprint: str
    compute: torch.dtype  # of the base's computations
    adapter: AdapterDeltas
    model_class: ModelClass
    fused: dict[str, FusedTensor]  # stacks of experts that lie in the files as several tensors
    names: dict[str, str]  # the model's name of a tensor → its name in the files

    def reader(self, section: ModelSection, known: dict[str, str]) -> TrainedBaseReader | PackedBaseReader:
        """Make a reader of weights as training had them; ``known`` has the SHA-256 of files that are already hashed."""
        if self.packed:
            return PackedBaseReader(self.stored, self.stamps, known, self.packed, self.compute)
        return TrainedBaseReader(self.stored, self.stamps, known, section, self.compute, self.model, self.names)


def open_adapter_on_base(adapter_dir: Path, section: ModelSection) -> AdapterOnBase:
    """Find an adapter's base and compare the two. InputError: they do not fit, or the base can't be read."""
    own, _ = read_adapter(adapter_dir)  # a broken adapter is found before a base is downloaded
    model_class = getattr(own, "model_class", CAUSAL_LM)
    directory = base_directory(section)
    stored_as: Any = (try_read_json(directory / "config.json") or {}).get("quantization_config")
    if is_decoded(stored_as):
        if section.quantization not in ("nf4", "fp4"):
            raise InputError(
                f"{directory}: the weights are in {stored_as['quant_method']}, and are read here for an adapter that "
                f"was trained on them in 4 bits, not with model.quantization: {section.quantization}. `qvera export "
                "--to lora` needs no weights."
            )
        directory = cached_base(section, model_class=model_class)
    compute = pick_compute_dtype(section.compute_dtype, accelerator.current_device())
    config = AutoConfig.from_pretrained(directory, trust_remote_code=section.trust_remote_code)
    model = empty_model(section, directory, model_class)
    stored = in_parts(checkpoint_tensors(directory), model)
    named = as_named(stored, model)
    require_own_weights(directory, named, model, model_class)
    stored = as_stacks(stored, model)
    if model_class.has_own_head:  # whose names other tools do not know; all others keep those of the files
        stored = named
    heads = tuple(f"{name}." for name in model_class.head_modules(model))
    kept = model_class.stored_names((entry.name for entry in stored), model)
    kept = {name for name in kept if not name.startswith(heads)}  # the adapter has its own
    packed = packed_weights([entry for entry in stored if entry.name in kept], model)
    if getattr(config, "quantization_config", None) is not None and not packed:
        raise InputError(
            f"{directory}: the base is stored quantized, and not in bitsandbytes' 4 bits, so its weights can't be read "
            "here. Point model.path at the 16-bit checkpoint it was made from."
        )
    entries = [entry for entry in without_statistics(stored, packed) if entry.name in kept]
    adapter = read_deltas(adapter_dir, model, section)
    fingerprint = base_fingerprint(directory)
    require_base(adapter.config, adapter_dir, section.path, fingerprint)
    # Both lists have the same tensors in the same order.
    names = {own.name: entry.name for own, entry in zip(named, stored, strict=True)}
    buffers = {names.get(name) for name, _ in model.named_buffers()}  # whole numbers, such as experts, are copied
    for entry in entries:
        if not entry.dtype.is_floating_point and entry.name not in buffers:
            raise InputError(f"{entry.file}: {entry.name} is {entry.dtype}, expected a floating-point weight.")
    known = () if packed else expert_specs(model)  # others are not quantized, so that they are copied as they are
    fused = {name: t for name, t in fused_tensors(stored, model).items() if t.is_merged and name in known}
    needed = {name if delta.experts else f"{name}.weight" for name, delta in adapter.layers.items()}
    absent = sorted(needed - fused.keys() - names.keys())
    if absent:
        raise InputError(f"{directory}: has no {first_of(absent)}, which the adapter changes.")
    opened = directory, model_class.configured(config), model, stored, packed, entries, file_stamps(stored)
    return AdapterOnBase(*opened, fingerprint, compute, adapter, model_class, fused, names)


def read_trained_weight(reader: TrainedBaseReader | PackedBaseReader, entry: TensorEntry) -> torch.Tensor:
    """A whole tensor as training had it, in fp32. RunFailed: its file changed or ended while it was read."""
    whole = torch.empty(entry.shape, dtype=torch.float32)
    with open(entry.file, "rb", buffering=0) as handle:
        for block in reader.blocks_of(handle.fileno(), entry):
            rows = reader.as_trained(block, block.rows)
            whole[block.first : block.first + len(rows)] = rows
        require_unchanged(handle, reader.stamps)
    return whole
