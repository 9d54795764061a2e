"""The 16-bit checkpoint that a 4-bit one is made from: its config and headers are checked before a weight is read."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from qvera.config.schema import ModelSection
from qvera.models import quantization
from qvera.models.model_config import empty_model, require_own_weights
from qvera.utils.errors import InputError
from qvera.utils.files import file_stamp, read_json
from qvera.utils.safetensors_io import TensorEntry, checkpoint_tensors

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class NotPlain(InputError):
    """A checkpoint that transformers renames or fuses while loading: it can be quantized then, but not by itself."""


@dataclasses.dataclass
class SourceCheckpoint:
    """A 16-bit checkpoint, checked against its config: what is quantized, and what goes along as it is."""

    directory: Path
    config: dict[str, Any]
    config_sha256: str
    files: list[Path]
    tensors: list[TensorEntry]
    """In the order of ``files`` and of the bytes in them; what the model does not have is left out."""
    quantized: set[str]
    """Names of the weights that become 4-bit."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.stat().st_size for file in self.files)

    def file_identity(self) -> dict[str, list[int]]:
        """File name → bytes, mtime_ns, inode: by which content that was hashed once is known again."""
        return {file.name: file_stamp(file.stat()) for file in self.files}


def read_source(section: ModelSection, directory: Path) -> SourceCheckpoint:
    """Config and headers of a 16-bit checkpoint, checked; no weights are read.

    Raises:
        InputError: a shard is missing, cut short or damaged, a tensor's shape is not the config's, or the checkpoint is
            already quantized.
        NotPlain: the tensors are not the model's parameters by name.
    """
    config = read_json(directory / "config.json", "the config of a model")
    if config.get("quantization_config") is not None:
        raise InputError(
            f"{directory}: is already quantized (config.json has a quantization_config). Use it as model.path as it "
            "is, or name the 16-bit checkpoint that it was made from."
        )
    tensors = checkpoint_tensors(directory)
    files = list(dict.fromkeys(entry.file for entry in tensors))
    stored = {entry.name for entry in tensors}
    model = empty_model(section, directory)
    names = model.state_dict().keys()
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    require_own_weights(directory, tensors, model)
    _require_names(directory, names, tied, stored)
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    linears = quantization.four_bit_linears(model, section)
    if transposed & linears:
        raise NotPlain(
            f"{directory}: stores {min(transposed & linears)} transposed (a Conv1D), and transformers turns it while "
            "loading. Such a checkpoint can't be quantized ahead; it is quantized each time it is loaded."
        )
    quantized = {f"{name}.weight" for name in linears}
    tensors = [entry for entry in tensors if entry.name in names]
    for entry in tensors:
        _require_dtype(entry, section, entry.name in quantized)
    digest = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    return SourceCheckpoint(directory, config, digest, files, tensors, quantized & stored)


def _require_names(directory: Path, expected: Collection[str], tied: Mapping[str, str], found: Collection[str]) -> None:
    absent = [n for n in expected if n not in found and tied.get(n) not in found and n not in tied.values()]
    if absent:
        others = sorted(set(found) - set(expected))
        raise NotPlain(
            f"{directory}: has no tensor {min(absent)}, which the model of its config.json has"
            + (f"; it has {others[0]} instead, which transformers renames or fuses while loading" if others else "")
            + ". Such a checkpoint can't be quantized ahead; it is quantized each time it is loaded."
        )


def _require_dtype(entry: TensorEntry, section: ModelSection, quantized: bool) -> None:
    if quantized and entry.dtype not in _FLOATS:
        raise InputError(
            f"{entry.file}: {entry.name} is {entry.dtype}, expected a bfloat16, float16 or float32 weight."
        )
    if quantized and entry.numel % (2 * getattr(torch, section.quant_storage).itemsize):
        raise NotPlain(
            f"{entry.file}: {entry.name} has {entry.numel} weights, which do not fill whole elements of "
            f"{section.quant_storage}. Set model.quant_storage: uint8."
        )
