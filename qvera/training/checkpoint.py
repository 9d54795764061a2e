"""A checkpoint: vectors, optimizer, schedule, random state, position. Never the frozen base.

Layout of ``checkpoints/step-00000100/``::

    vectors.safetensors     name → fp32 vector, the names of the adapter file
    optimizer.safetensors   "name/key" → tensor of the optimizer's state for that vector
    state.json              step, recipe, schedule, scalars of the optimizer, early-stopping state, earlier results,
                            loss scale
    random.safetensors      torch's generator states (uint8) by device type: "cpu", "cuda"; of rank k > 0 "cpu.k", ..
    hooks.safetensors       "hook/name" → tensor of a step hook's state; only where a hook has one. Its other values are
                            in state.json
    manifest.json           SHA-256 and size of each file; written last

Everything is written under a temporary name, flushed, and renamed. Nothing is pickled.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from qvera.distributed.group import Group
from qvera.utils import accelerator
from qvera.utils.atomic import disk_errors, flush
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import file_sha256
from qvera.utils.safetensors_io import save_tensors

FORMAT = 1
_FILES = ("vectors.safetensors", "optimizer.safetensors", "random.safetensors")
_STATE = "state.json"
_HOOKS = "hooks.safetensors"
_NAME = re.compile(r"(step|round)-\d{8}")


@dataclasses.dataclass
class TrainState:
    """Everything a later step depends on besides vectors, optimizer and random state."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    evaluation_due: bool = False  # after this step, and not done yet: memory ran out in it
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    train_seconds: float = 0.0
    input_tokens: int = 0
    skipped_steps: int = 0  # whose gradient overflowed in float16, and that were taken again
    halvings: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # out of memory: step, rows or tokens left
    before: dict[str, Any] | None = None
    samples_before: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add_step(self, loss: float, seconds: float, input_tokens: int) -> None:
        """Count an optimizer step that was taken."""
        self.step += 1
        self.train_loss_first = loss if self.train_loss_first is None else self.train_loss_first
        self.train_loss_last = loss
        self.train_seconds += seconds
        self.input_tokens += input_tokens

    def add_halving(self, step: int, limit: dict[str, int], seconds: float) -> None:
        """Note an attempt at a step that ran out of memory, and the limit of a pass since then."""
        self.halvings = [*self.halvings, {"step": step, **limit}]
        self.train_seconds += seconds

    def add_skipped_step(self, seconds: float) -> None:
        """Count an attempt at a step that was not taken."""
        self.skipped_steps += 1
        self.train_seconds += seconds

    def add_evaluation(self, loss: float, patience: int) -> None:
        """Compare a held-out loss with the best so far; ``patience`` without a lower one stop the run (0: never)."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.evaluations_without_gain = loss, self.step, 0
        else:
            self.evaluations_without_gain += 1
            self.stopped_early = 0 < patience <= self.evaluations_without_gain


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint that was read and verified. ``state`` is the JSON object of its state.json."""

    path: Path
    step: int
    state: dict[str, Any]
    vectors: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    hooks: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def hook_state(self) -> dict[str, Any]:
        """What the step hooks saved: tensors and JSON values by ``hook/name``."""
        return {**self.state.get("hooks", {}), **self.hooks}


def save(
    directory: Path,
    step: int,
    vectors: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    random: dict[str, torch.Tensor] | None = None,
    hooks: dict[str, Any] | None = None,
) -> Path:
    """Write ``directory/step-XXXXXXXX``; it appears under this name only when it is complete and on disk.

    ``vectors``: by their names in the adapter file. ``random``: of all ranks (`random_state`), by default of this
    process. ``hooks``: as `TrainingHooks.state_dict` gives it. RunFailed where the disk is full; earlier checkpoints
    are kept.
    """
    tensors, scalars = _optimizer_state(vectors, optimizer)
    values = dict(hooks or {})
    held = {n: values.pop(n).clone() for n in list(values) if isinstance(values[n], torch.Tensor)}
    files = {
        "vectors.safetensors": dict[str, torch.Tensor](vectors),
        "optimizer.safetensors": tensors,
        "random.safetensors": random_state() if random is None else random,
        **({_HOOKS: held} if held else {}),
    }
    return write(directory, "step", step, files, {"optimizer_scalars": scalars, "hooks": values, **state})


def write(
    directory: Path, unit: str, number: int, files: Mapping[str, Mapping[str, torch.Tensor]], state: dict[str, Any]
) -> Path:
    """Write ``directory/UNIT-XXXXXXXX`` as `save` does. ``unit``: ``step`` or ``round``. ``files``: name → tensors."""
    final = directory / f"{unit}-{number:08d}"
    partial = directory / f".partial-{final.name}"
    kept = "Earlier checkpoints are kept; mend that and go on with --resume."
    with disk_errors(f"the checkpoint of {unit} {number} in {directory}", kept), contextlib.ExitStack() as on_error:
        on_error.callback(shutil.rmtree, partial, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, tensors in files.items():
            save_tensors({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, partial / name)
        document = {"format": FORMAT, unit: number, **state}
        (partial / _STATE).write_text(json.dumps(document, indent=1))
        manifest = {}
        for file in sorted(partial.iterdir()):
            manifest[file.name] = {"sha256": file_sha256(file), "bytes": file.stat().st_size}
            flush(file)
        document = {"format": FORMAT, unit: number, "files": manifest}
        (partial / "manifest.json").write_text(json.dumps(document, indent=1))
        flush(partial / "manifest.json")
        if final.exists():
            shutil.rmtree(final)  # the same number, saved by a run that was then resumed from before it
        partial.rename(final)
        flush(directory)
        on_error.pop_all()
    return final


def directories(directory: Path) -> list[Path]:
    """The checkpoint directories there, whole or damaged, oldest first."""
    return sorted(p for p in directory.iterdir() if _NAME.fullmatch(p.name)) if directory.is_dir() else []


def newest(
    directory: Path, warn: Callable[[str], None] = lambda _: None, use: Callable[[Path], Any] | None = None
) -> Any:
    """The newest checkpoint in ``directory`` that can be used, or None.

    ``warn`` gets a sentence about each one passed over. ``use`` (default: `load`) reads one, or raises InputError.
    """
    for path in reversed(directories(directory)):
        try:
            return (use or load)(path)
        except InputError as error:
            warn(f"{error} It is passed over.")
    return None


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; InputError as in `read`."""
    state, files = read(path, _FILES, (_HOOKS,))
    return Checkpoint(path, state["step"], state, *files.values())


def read(
    path: Path, names: Sequence[str], optional: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """Read and verify what `write` wrote: state.json, and file name → its tensors.

    ``names``: the files that it must have; ``optional``: those that it may have. InputError where a file is missing,
    cut short or changed, or the format is another one.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version = manifest["format"]
        wanted = [*names, *(name for name in optional if version == FORMAT and name in manifest["files"])]
        files = {} if version != FORMAT else {n: manifest["files"][n] for n in (*wanted, _STATE)}
        expected = {name: (facts["bytes"], facts["sha256"]) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: has no complete manifest.json ({type(error).__name__}), so it was not finished or is damaged."
        ) from None
    if version != FORMAT:
        raise InputError(f"{path}: has checkpoint format {version}; this qvera reads format {FORMAT}.")
    for name, (size_bytes, digest) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size_bytes or file_sha256(file) != digest:
            raise InputError(
                f"{file}: is missing or not what the manifest says (SHA-256), so this checkpoint is damaged."
            )
    # a manifest that fits proves no more than that one hand wrote all files
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        unit = path.name[:-9]
        if state[unit] != int(path.name[-8:]):
            raise ValueError(f"it is of {unit} {state[unit]}")
        return state, {name: load_file(path / name) for name in wanted}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{path}: is no checkpoint of qvera's, though its manifest fits ({first_line(error)})"
        ) from None


def shared(saved: Checkpoint | None, group: Group) -> Checkpoint | None:
    """Rank 0's checkpoint on every rank: nodes need not share a disk."""
    head = group.broadcast(
        None if saved is None else {"path": str(saved.path), "step": saved.step, "state": saved.state}
    )
    if head is None or group.world_size == 1:
        return saved
    names = ("vectors", "optimizer", "random", "hooks")
    parts = [group.broadcast_tensors(getattr(saved, name, None)) for name in names]
    return Checkpoint(Path(head["path"]), head["step"], head["state"], *parts)


def restore(
    checkpoint: Checkpoint, vectors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, rank: int = 0
) -> None:
    """Put a checkpoint's vectors, optimizer state and the random state of ``rank`` into a run.

    A rank that the saved run did not have keeps its own. InputError where names or shapes are not those of this run.
    """
    if {name: t.shape for name, t in checkpoint.vectors.items()} != {name: p.shape for name, p in vectors.items()}:
        raise InputError(f"{checkpoint.path}: its vectors are not those of this recipe (other rank, targets or model).")
    with torch.no_grad():
        for name, parameter in vectors.items():
            parameter.copy_(checkpoint.vectors[name])
    states: dict[str, dict[str, Any]] = {n: dict(s) for n, s in checkpoint.state["optimizer_scalars"].items()}
    for key, tensor in checkpoint.optimizer.items():
        name, _, part = key.rpartition("/")
        device = "cpu" if part == "step" or name not in vectors else vectors[name].device  # AdamW counts on the CPU
        states.setdefault(name, {})[part] = _placed(tensor, device, optimizer, vectors.get(name))
    for name in states.keys() & vectors.keys():
        optimizer.state[vectors[name]] = states[name]
    set_random_state(checkpoint.random, rank)


def _placed(
    tensor: torch.Tensor, device: torch.device | str, optimizer: torch.optim.Optimizer, parameter: nn.Parameter | None
) -> torch.Tensor:
    """Optimizer state on the device; a paged optimizer's in its own buffer, since only that is paged."""
    if not getattr(optimizer, "is_paged", False) or parameter is None or tensor.shape != parameter.shape:
        return tensor.to(device)
    # a method of bitsandbytes' Optimizer8bit, which torch's class does not have
    buffer: torch.Tensor = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)  # type: ignore[attr-defined]
    return buffer.copy_(tensor)


def prune(directory: Path, saved: int, keep: int, also: set[int]) -> None:
    """Delete leftovers of killed writes, and checkpoints other than the newest ``keep`` and the steps ``also``.

    ``saved``: the newest step. Later checkpoints are damaged, since the run went on from an earlier one.
    """
    numbers = {int(path.name[-8:]): path for path in directories(directory)}
    kept = sorted(number for number in numbers if number <= saved)[-keep:]
    for number, path in numbers.items():
        if number not in kept and (number > saved or number not in also):
            shutil.rmtree(path)
    for path in directory.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def _optimizer_state(
    vectors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in vectors.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.detach().cpu().contiguous().clone()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def random_state(rank: int = 0) -> dict[str, torch.Tensor]:
    """This process's generator states under the names that a checkpoint gives those of ``rank``."""
    suffix = f".{rank}" if rank else ""
    states = {"cpu": torch.get_rng_state(), **accelerator.random_state()}
    return {f"{name}{suffix}": state for name, state in states.items()}


def set_random_state(states: dict[str, torch.Tensor], rank: int = 0) -> None:
    """Take over the generator states of ``rank`` from what `random_state` gave, of one rank or of all."""
    suffix = f".{rank}" if rank else ""
    mine = {name.removesuffix(suffix): state for name, state in states.items() if name.endswith(suffix)}
    if "cpu" in mine:
        torch.set_rng_state(mine["cpu"])
    accelerator.set_random_state(mine)
