"""The state of an adapter in training as a safetensors file, which after a kill is whole: the new one or the old one.

Its metadata are ``format``, ``state`` (a JSON object), and ``sha256`` over the state and all tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qvera.utils.atomic import disk_errors, replacing
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import plain_json
from qvera.utils.safetensors_io import save_tensors

_FORMAT = "1"


def write_state(file: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write a state and its tensors. RunFailed where the disk is full; an earlier file stays."""
    text = json.dumps(plain_json(dict(state)))
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "state": text, "sha256": _sha256(text, held)}
    with disk_errors(str(file), "What was saved before is kept."), replacing(file) as partial:
        save_tensors(held, partial, metadata)


def read_state(file: Path, advice: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the state. InputError, which ends with ``advice``, where the file is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no dict
        if metadata["format"] != _FORMAT:
            raise InputError(f"{file}: has the format {metadata['format']}; this qvera reads format {_FORMAT}.")
        if metadata["sha256"] != _sha256(metadata["state"], tensors):
            raise ValueError("its SHA-256 is another one")
        return tensors, json.loads(metadata["state"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{file}: is no saved state, or is damaged ({first_line(error)}) {advice}") from None


def _sha256(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name].numpy().tobytes())
    return digest.hexdigest()
