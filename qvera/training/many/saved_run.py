"""The state of one adapter in training, in one safetensors file: all that its later steps depend on.

Tensors, fp32: ``vectors`` [numbers], the moments ``first`` and ``second`` [trained numbers], and ``best`` [numbers]
where the recipe keeps the vectors of the best step. Metadata: ``format``, ``state`` (a JSON object) and ``sha256``
over the state and all tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open

from qvera.training.checkpoint import TrainState
from qvera.training.run_dir import changed_keys, inputs_of
from qvera.utils.atomic import disk_errors, flush
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import plain_json
from qvera.utils.safetensors_io import save_tensors

if TYPE_CHECKING:
    from qvera.adapters.bank import AdapterBank
    from qvera.models.loader import Base
    from qvera.training.many.online_job import OnlineJob
    from qvera.training.many.optimizer import BankAdamW

FORMAT = "1"


def save_run(file: Path, run: OnlineJob, bank: AdapterBank, adamw: BankAdamW, base: Base) -> None:
    """Write the state of an adapter in flight; after a kill the file is the new one or the old one.

    Raises:
        RunFailed: the disk is full or read-only; a file that was there before is still there.
    """
    slot = run.held_slot
    tensors = {"vectors": bank.vectors[slot], "first": adamw.first[slot], "second": adamw.second[slot]}
    if run.best is not None:
        tensors["best"] = run.best
    state = {
        "job": run.id,
        **inputs_of(run.datasets, base),
        "recipe": run.recipe.to_dict(),
        "optimizer_steps": adamw.steps[slot],
        "state": dataclasses.asdict(run.state),
        "after": run.after,
        "reason": run.reason,
    }
    text = json.dumps(plain_json(state))
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "state": text, "sha256": _sha256(text, held)}
    partial = file.with_name(f".{file.name}.partial")
    with disk_errors(str(file), "What was saved before is kept."):
        try:
            save_tensors(held, partial, metadata)
            flush(partial)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        flush(file.parent)


@dataclasses.dataclass
class SavedRun:
    """What was read from a file of `save_run`."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]

    @classmethod
    def read(cls, file: Path, run: OnlineJob, base: Base) -> Self:
        """Read and verify the file of a job.

        Raises:
            InputError: it is missing or damaged, or of another job, other rows, another recipe or another base.
        """
        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no dict
            if metadata["format"] != FORMAT:
                raise InputError(f"{file}: has the format {metadata['format']}; this qvera reads format {FORMAT}.")
            if metadata["sha256"] != _sha256(metadata["state"], tensors):
                raise ValueError("its SHA-256 is another one")
            found = cls(tensors, json.loads(metadata["state"]))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(
                f"{file}: is no saved state of a job, or is damaged ({first_line(error)}) Begin the job anew."
            ) from None
        try:
            TrainState(**found.state["state"])
        except TypeError as error:
            raise InputError(
                f"{file}: was written by another version of qvera ({error}). Begin the job anew."
            ) from None
        if changed := changed_keys(found.state["recipe"], run.recipe):
            raise InputError(f"{file}: is of another job; {', '.join(changed)} differ from the recipe of {run.id}.")
        for key, value in {"job": run.id, **inputs_of(run.datasets, base)}.items():
            if found.state.get(key) != value:
                raise InputError(f"{file}: has another {key} than {run.id}. Give the file of this job, or begin anew.")
        return found

    def put_into(self, run: OnlineJob, bank: AdapterBank, adamw: BankAdamW) -> None:
        """Let a job in flight go on from here."""
        slot = run.held_slot
        bank.vectors[slot].copy_(self.tensors["vectors"])
        adamw.first[slot].copy_(self.tensors["first"])
        adamw.second[slot].copy_(self.tensors["second"])
        adamw.steps[slot] = self.state["optimizer_steps"]
        run.best, run.state = self.tensors.get("best"), TrainState(**self.state["state"])
        run.after, run.reason = self.state["after"], self.state["reason"]


def _sha256(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + tensors[name].numpy().tobytes())
    return digest.hexdigest()
