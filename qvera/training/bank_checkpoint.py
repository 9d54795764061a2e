"""Checkpoints of a bank: of a run of many adapters, and of one job that is trained beside answers.

``checkpoints/round-00000100/`` has the files that `qvera.training.checkpoint.write` writes::

    vectors.safetensors     "vectors": fp32 [slots, numbers], the bank
    optimizer.safetensors   the moments and the counts of steps of each slot
    best.safetensors        adapter's number → fp32 [numbers]; only with training.load_best_model_at_end
    random.safetensors      torch's generator states
    state.json              round, recipe, and of every adapter: status, slot, steps, losses, evaluations

Of several processes each has its own adapters, so each has its own checkpoints: process k > 0 in
``checkpoints/rank-0000k/``.

`save_run` writes one adapter in training to one safetensors file. Tensors, fp32: ``vectors`` [numbers], the moments
``first`` and ``second`` [trained numbers], and ``best`` [numbers] where the recipe keeps the vectors of the best step.
Metadata: ``format``, ``state`` (a JSON object) and ``sha256`` over the state and all tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open

from qvera.training import checkpoint
from qvera.training.checkpoint import TrainState
from qvera.training.run_dir import changed_keys, inputs_of, require_none_saved, require_same_inputs
from qvera.utils.atomic import disk_errors, flush, replace_text
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import plain_json
from qvera.utils.safetensors_io import save_tensors

if TYPE_CHECKING:
    from qvera.adapters.bank import AdapterBank
    from qvera.models.loader import Base
    from qvera.training.many import ManyTrainer
    from qvera.training.optim import BankAdamW
    from qvera.training.roster import AdapterRun

_FILES = ("vectors.safetensors", "optimizer.safetensors", "random.safetensors")
_BEST = "best.safetensors"
_JOB_FORMAT = "1"
_FRESH = vars(TrainState())  # what is still as at the beginning is left out: there may be a hundred thousand adapters


@dataclasses.dataclass
class BankCheckpoint:
    """A checkpoint that was read and verified."""

    path: Path
    state: dict[str, Any]
    files: dict[str, dict[str, torch.Tensor]]


def checkpoint_dir(run_dir: Path, rank: int) -> Path:
    """The directory of a process's checkpoints."""
    return run_dir / "checkpoints" / (f"rank-{rank:05d}" if rank else "")


def metrics_path(run_dir: Path, rank: int) -> Path:
    """The file of a process's records; when a run ends, the first process's has all."""
    return run_dir / (f"metrics.rank-{rank:05d}.jsonl" if rank else "metrics.jsonl")


def join_records(run_dir: Path, processes: int) -> None:
    """Put the records of all processes into metrics.jsonl. RunFailed where the disk is full; nothing is lost."""
    first, *others = [metrics_path(run_dir, rank) for rank in range(processes)]
    with disk_errors(str(first), "Checkpoints are kept; mend that and go on with --resume."):
        for path in [path for path in others if path.exists()]:
            replace_text(first, first.read_text(encoding="utf-8") + path.read_text(encoding="utf-8"))
            path.unlink()


def save(trainer: ManyTrainer) -> None:
    """Write a checkpoint of the latest round, and delete those beyond the recipe's limit."""
    directory = checkpoint_dir(trainer.run_dir, trainer.group.rank)
    best = {str(run.number): run.best for run in trainer.roster.in_flight if run.best is not None}
    files: dict[str, dict[str, torch.Tensor]] = {
        "vectors.safetensors": {"vectors": trainer.bank.vectors},
        "optimizer.safetensors": trainer.adamw.state_dict(),
        "random.safetensors": checkpoint.random_state(),
        **({_BEST: best} if best else {}),
    }
    state = {
        "recipe": trainer.recipe.to_dict(),
        "inputs": trainer.inputs,
        "processes": trainer.group.world_size,
        "slots": trainer.bank.slots,
        "gradient_checkpointing": trainer.checkpointing,
        "builds_per_pass": trainer.builds_per_pass,
        "totals": dataclasses.asdict(trainer.totals),
        "adapters": [_entry(run) for run in trainer.runs],
    }
    checkpoint.write(directory, "round", trainer.round, files, plain_json(state))
    checkpoint.prune(directory, trainer.round, trainer.recipe.training.save_total_limit, set())


def newest(trainer: ManyTrainer, warn: Callable[[str], None]) -> BankCheckpoint | None:
    """The newest checkpoint of this process that verifies; None where the run ended before its first one."""
    run_dir, rank = trainer.run_dir, trainer.group.rank
    directory = checkpoint_dir(run_dir, rank)

    def use(path: Path) -> BankCheckpoint:
        saved = BankCheckpoint(path, *checkpoint.read(path, _FILES, (_BEST,)))
        _check(saved, trainer)
        return saved

    saved: BankCheckpoint | None = checkpoint.newest(directory, warn, use)
    if saved is None:
        require_none_saved(run_dir, directory, metrics_path(run_dir, rank), "round")
    return saved


def restore(trainer: ManyTrainer, saved: BankCheckpoint) -> None:
    """Put a checkpoint into the trainer and torch's generators. InputError where the vectors have another shape."""
    vectors = saved.files["vectors.safetensors"]["vectors"]
    if vectors.shape != trainer.bank.vectors.shape:
        raise InputError(f"{saved.path}: its vectors are not those of this recipe (other rank, targets or model).")
    trainer.bank.vectors.copy_(vectors)
    trainer.adamw.load_state_dict(saved.files["optimizer.safetensors"])
    best = saved.files.get(_BEST, {})
    for run, entry in zip(trainer.runs, saved.state["adapters"], strict=True):
        run.status, run.slot, run.after, run.reason = (entry[key] for key in ("status", "slot", "after", "reason"))
        run.state = TrainState(**entry["state"])
        run.best = best.get(str(run.number))
    trainer.round = saved.state["round"]
    trainer.totals = type(trainer.totals)(**saved.state["totals"])
    checkpoint.set_random_state(saved.files["random.safetensors"])


def _entry(run: AdapterRun) -> dict[str, Any]:
    kept = {key: getattr(run, key) for key in ("name", "status", "slot", "after", "reason")}
    return {**kept, "state": {key: value for key, value in vars(run.state).items() if value != _FRESH[key]}}


def _check(saved: BankCheckpoint, trainer: ManyTrainer) -> None:
    """Raises InputError for a checkpoint of another recipe, other data or another number of processes."""
    state, path = saved.state, saved.path
    if changed := changed_keys(state.get("recipe") or {}, trainer.recipe):
        raise InputError(f"{path}: is of another run; {', '.join(changed)} differ from this recipe.")
    try:
        names = [entry["name"] for entry in state["adapters"]]
        for entry in state["adapters"]:
            TrainState(**entry["state"])
        processes = state["processes"]
        state["slots"], state["round"], state["totals"], state["builds_per_pass"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: was written by another version of qvera ({error}).") from None
    if processes != trainer.group.world_size:
        raise InputError(
            f"{path}: was written by one of {processes} processes, which share out the adapters among them, and now "
            f"there are {trainer.group.world_size}. Go on with as many."
        )
    if names != [run.name for run in trainer.runs]:
        raise InputError(f"{path}: has other adapters than {trainer.recipe.data.path} names now. Put the rows back.")
    require_same_inputs(path, state.get("inputs"), trainer.inputs)


def save_run(file: Path, run: AdapterRun, bank: AdapterBank, adamw: BankAdamW, base: Base) -> None:
    """Write the state of an adapter in flight. After a kill or RunFailed the file is whole: the new or the old one."""
    slot = run.held_slot
    tensors = {"vectors": bank.vectors[slot], "first": adamw.first[slot], "second": adamw.second[slot]}
    if run.best is not None:
        tensors["best"] = run.best
    state = {
        "job": run.name,
        **inputs_of(run.datasets, base),
        "recipe": run.recipe.to_dict(),
        "optimizer_steps": adamw.steps[slot],
        "state": dataclasses.asdict(run.state),
        "after": run.after,
        "reason": run.reason,
    }
    text = json.dumps(plain_json(state))
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _JOB_FORMAT, "state": text, "sha256": _sha256(text, held)}
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
    """What `save_run` wrote."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]

    @classmethod
    def read(cls, file: Path, run: AdapterRun, base: Base) -> Self:
        """Read and verify a job's file. InputError where it is damaged, or of another job, rows, recipe or base."""
        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  # it is no dict
            if metadata["format"] != _JOB_FORMAT:
                raise InputError(f"{file}: has the format {metadata['format']}; this qvera reads format {_JOB_FORMAT}.")
            if metadata["sha256"] != _sha256(metadata["state"], tensors):
                raise ValueError("its SHA-256 is another one")
            saved = cls(tensors, json.loads(metadata["state"]))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(
                f"{file}: is no saved state of a job, or is damaged ({first_line(error)}) Begin the job anew."
            ) from None
        try:
            TrainState(**saved.state["state"])
        except TypeError as error:
            raise InputError(
                f"{file}: was written by another version of qvera ({error}). Begin the job anew."
            ) from None
        if changed := changed_keys(saved.state["recipe"], run.recipe):
            raise InputError(f"{file}: is of another job; {', '.join(changed)} differ from the recipe of {run.name}.")
        for key, value in {"job": run.name, **inputs_of(run.datasets, base)}.items():
            if saved.state.get(key) != value:
                raise InputError(
                    f"{file}: has another {key} than {run.name}. Give the file of this job, or begin anew."
                )
        return saved

    def put_into(self, run: AdapterRun, bank: AdapterBank, adamw: BankAdamW) -> None:
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
