"""An adapter and the checkpoint of its base model, opened and compared before a weight is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from qvera.adapters.adapted_forward import layer_shape
from qvera.adapters.files.adapter_file import read_adapter, require_base
from qvera.config.schema import ModelSection
from qvera.exporting.deltas import AdapterDeltas, read_deltas
from qvera.exporting.stream import PackedBaseReader, TrainedBaseReader
from qvera.models.hub import base_directory
from qvera.models.loader import pick_compute_dtype
from qvera.models.model_class import CAUSAL_LM, ModelClass
from qvera.models.model_config import empty_model, require_own_weights
from qvera.models.stored_weights import PackedWeight, as_named, packed_weights, without_statistics
from qvera.models.structure import beside_the_layers
from qvera.utils import accelerator
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import file_stamp
from qvera.utils.formatting import first_of
from qvera.utils.safetensors_io import TensorEntry, base_fingerprint, checkpoint_tensors, file_stamps


class AdapterOnBase(NamedTuple):
    """An adapter and its base.

    Attributes:
        directory: of the base's checkpoint.
        config: of the base model, as it is stored.
        model: the base model without weights.
        stored: the tensors of the checkpoint as they lie on disk.
        packed: those of them that are 4-bit weights.
        entries: the tensors that the model has, without the statistics of 4-bit weights and without a head that the
            adapter has.
        stamps: `file_stamp` of each file.
        fingerprint: of the base's content.
        compute: the dtype that the base computed in.
        adapter: the factors of ΔW.
        model_class: which model it is.
    """

    directory: Path
    config: PretrainedConfig
    model: PreTrainedModel
    stored: list[TensorEntry]
    packed: dict[str, PackedWeight]
    entries: list[TensorEntry]
    stamps: dict[str, list[int]]
    fingerprint: str
    compute: torch.dtype
    adapter: AdapterDeltas
    model_class: ModelClass

    def reader(self, section: ModelSection, known: dict[str, str]) -> TrainedBaseReader | PackedBaseReader:
        """Reads the weights as they were trained on; ``known`` has the SHA-256 of files that are hashed already."""
        if self.packed:
            return PackedBaseReader(self.stored, self.stamps, known, self.packed, self.compute)
        return TrainedBaseReader(self.stored, self.stamps, known, section, self.compute, self.model)


def open_adapter_on_base(adapter_dir: Path, section: ModelSection) -> AdapterOnBase:
    """Find an adapter's base and compare the two.

    Raises:
        InputError: they do not fit, or the base is stored quantized, and not in bitsandbytes' 4 bits.
    """
    own, _ = read_adapter(adapter_dir)  # a broken adapter is found before a base is downloaded
    model_class = getattr(own, "model_class", CAUSAL_LM)
    directory = base_directory(section)
    compute = pick_compute_dtype(section.compute_dtype, accelerator.current_device())
    stored = checkpoint_tensors(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=section.trust_remote_code)
    model = empty_model(section, directory, model_class)
    named = as_named(stored, model)
    require_own_weights(directory, named, model, model_class)
    if model_class.has_own_head or not _stores_layers(stored, model):
        stored = named  # else the merged files keep the names that other tools know
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
    for entry in entries:  # whole numbers would be rounded
        if not entry.dtype.is_floating_point:
            raise InputError(f"{entry.file}: {entry.name} is {entry.dtype}, expected a floating-point weight.")
    absent = sorted({f"{name}.weight" for name in adapter.layers} - {entry.name for entry in entries})
    if absent:
        raise InputError(f"{directory}: has no {first_of(absent)}, which the adapter changes.")
    stamps = file_stamps(stored)
    opened = directory, model_class.configured(config), model, stored, packed, entries
    return AdapterOnBase(*opened, stamps, fingerprint, compute, adapter, model_class)


def _stores_layers(stored: list[TensorEntry], model: PreTrainedModel) -> bool:
    """Whether the file has the linears of the layers under the model's names, whatever it calls the rest."""
    names = {entry.name for entry in stored}
    skipped = beside_the_layers(model)
    linears = (n for n, module in model.named_modules() if layer_shape(module) is not None and n not in skipped)
    return all(f"{name}.weight" in names for name in linears)


def read_trained_weight(reader: TrainedBaseReader | PackedBaseReader, entry: TensorEntry) -> torch.Tensor:
    """A whole tensor as the trained base had it, in fp32.

    Raises:
        RunFailed: its file changed or ended while it was read.
    """
    whole = torch.empty(entry.shape, dtype=torch.float32)
    with open(entry.file, "rb", buffering=0) as handle:
        for block in reader.blocks_of(handle.fileno(), entry):
            rows = reader.as_trained(block, block.rows)
            whole[block.first : block.first + len(rows)] = rows
        if file_stamp(os.fstat(handle.fileno())) != reader.stamps[entry.file.name]:
            raise RunFailed(f"{entry.file}: changed while it was read. Run again when it is at rest.")
    return whole
