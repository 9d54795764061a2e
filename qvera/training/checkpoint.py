"""Checkpoints: vectors, optimizer, random state, position. Never the frozen base.

``checkpoints/step-00000100/`` of one adapter, and ``checkpoints/round-00000100/`` of many::

    vectors.safetensors     one: name → fp32 vector, the names of the adapter file. many: "vectors": fp32 [slots,
                            numbers], the bank
    optimizer.safetensors   one: "name/key" → tensor of the optimizer's state for that vector. many: the moments and the
                            counts of steps of each slot
    state.json              step or round, recipe, what else goes on (`alone`, `many`), earlier results
    random.safetensors      torch's generator states (uint8) by device type: "cpu", "cuda"; of rank k > 0 "cpu.k", ..
    hooks.safetensors       one: "hook/name" → tensor of a step hook's state; only where a hook has one. Its other
                            values are in state.json
    best.safetensors        many: adapter's number → fp32 [numbers]; only with training.load_best_model_at_end
    manifest.json           SHA-256 and size of each file; written last

Of several processes that train many adapters, each has its own adapters, so each has its own checkpoints: process k > 0
in ``checkpoints/rank-0000k/``. Everything is written under a temporary name, flushed, and renamed. Nothing is pickled.

A state file (`write_state`) is one adapter in training as a safetensors file. Its metadata are ``format``, ``state`` (a
JSON object), and ``sha256`` over the state and all tensors.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from qvera.config.schema import Recipe, load_recipe
from qvera.distributed.group import Group
from qvera.training.run_dir import LENGTH, changed_keys, metrics_path, read_records
from qvera.utils import accelerator
from qvera.utils.errors import InputError, first_line
from qvera.utils.files import disk_errors, file_sha256, flush, other_writer, plain_json, replacing, take_place
from qvera.utils.safetensors_io import save_tensors

FORMAT = 1
# a checkpoint's safetensors files, by name without ending
_FILES, _OPTIONAL = ("vectors", "optimizer", "random"), ("hooks", "best")
_STATE = "state.json"
_NAME = re.compile(r"(step|round)-\d{8}")


class OtherVersion(InputError):
    """Another version of qvera wrote a checkpoint. A run that went on without it would delete it."""


@dataclasses.dataclass
class TrainState:
    """The numbers that a later step depends on, besides vectors, optimizer and random state."""

    step: int = 0
    best_loss: float | None = None  # or score that the best step is chosen by, negative where a greater one is better
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    evaluation_due: bool = False  # after this step, and not done yet: memory ran out in it, or a signal came
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    grad_norm_last: float | None = None
    train_seconds: float = 0.0
    input_tokens: int = 0
    skipped_steps: int = 0  # whose gradient overflowed in float16, and that were taken again
    halvings: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # out of memory: step, rows or tokens left
    before: dict[str, Any] | None = None
    samples_before: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)  # steps planned before, each time it was made longer

    def add_step(self, loss: float, seconds: float, input_tokens: int) -> None:
        """Count an optimizer step that was taken."""
        self.step += 1
        self.train_loss_first = loss if self.train_loss_first is None else self.train_loss_first
        self.train_loss_last = loss
        self.train_seconds += seconds
        self.input_tokens += input_tokens

    def add_evaluation(self, loss: float, patience: int) -> None:
        """Compare a held-out loss with the best so far; ``patience`` without a lower one stop the run (0: never)."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self.best_step, self.evaluations_without_gain = loss, self.step, 0
        else:
            self.evaluations_without_gain += 1
            self.stopped_early = 0 < patience <= self.evaluations_without_gain


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint that was read and verified.

    ``state``: the JSON object of its state.json. ``files``: tensors by name, of each file by its name without ending.
    """

    path: Path
    state: dict[str, Any]
    files: dict[str, dict[str, torch.Tensor]]

    @property
    def number(self) -> int:
        """The number of the step or round after which it was saved."""
        return number_of(self.path)

    @property
    def hook_state(self) -> dict[str, Any]:
        """The state of the step hooks: tensors and JSON values by ``hook/name``."""
        return {**self.state.get("hooks", {}), **self.files.get("hooks", {})}


def save(
    directory: Path,
    step: int,
    vectors: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    random: dict[str, torch.Tensor] | None = None,
    hooks: dict[str, Any] | None = None,
) -> Path:
    """Write ``directory/step-XXXXXXXX`` of one adapter, as `write` does.

    ``vectors``: by their names in the adapter file. ``random``: of all ranks (`generator_states`), by default of this
    process. ``hooks``: as `TrainingHooks.state_dict` gives it.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in vectors.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{key}"] = value.detach().clone()  # those of a file may not share memory
            else:
                scalars.setdefault(name, {})[key] = value
    held = {name: value.clone() for name, value in (hooks or {}).items() if isinstance(value, torch.Tensor)}
    values = {name: value for name, value in (hooks or {}).items() if name not in held}
    files = {
        "vectors": dict[str, torch.Tensor](vectors),
        "optimizer": tensors,
        "random": generator_states() if random is None else random,
        **({"hooks": held} if held else {}),
    }
    return write(directory, "step", step, files, {"optimizer_scalars": scalars, "hooks": values, **state})


def write(
    directory: Path, unit: str, number: int, files: Mapping[str, Mapping[str, torch.Tensor]], state: dict[str, Any]
) -> Path:
    """Write ``directory/UNIT-XXXXXXXX``; it appears under this name only when it is complete and on disk.

    ``unit``: ``step`` or ``round``. ``files``: as `Checkpoint` has them. RunFailed where the disk is full; earlier
    checkpoints are kept.
    """
    final = directory / f"{unit}-{number:08d}"
    partial = directory / f".partial-{final.name}"
    kept = "Earlier checkpoints are kept; mend that and go on with --resume."
    with disk_errors(f"the checkpoint of {unit} {number} in {directory}", kept), contextlib.ExitStack() as on_error:
        on_error.callback(shutil.rmtree, partial, ignore_errors=True)  # a full disk gets back what was written
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, tensors in files.items():
            held = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            save_tensors(held, partial / f"{name}.safetensors")
        document = {"format": FORMAT, unit: number, **state}
        (partial / _STATE).write_text(json.dumps(document, indent=1))
        manifest = {}
        for file in sorted(partial.iterdir()):
            manifest[file.name] = {"sha256": file_sha256(file), "bytes": file.stat().st_size}
            flush(file)
        # last, and after all others are on the disk: a checkpoint with a manifest is whole, even after a power cut
        document = {"format": FORMAT, unit: number, "files": manifest}
        (partial / "manifest.json").write_text(json.dumps(document, indent=1))
        flush(partial / "manifest.json")
        take_place(partial, final)  # one of the same number may be the only one that there is
        on_error.pop_all()
    return final


def directories(directory: Path) -> list[Path]:
    """Return the checkpoint directories in a directory, whole or damaged, oldest first."""
    return sorted(p for p in directory.iterdir() if _NAME.fullmatch(p.name)) if directory.is_dir() else []


def number_of(path: Path) -> int:
    """Return the number of the step or round after which a checkpoint directory was saved."""
    return int(path.name[-8:])


def newest(
    directory: Path, warn: Callable[[str], None] = lambda _: None, check: Callable[[Checkpoint], None] = lambda _: None
) -> Checkpoint | None:
    """Return the newest checkpoint in ``directory`` that can be used, or None.

    ``warn`` gets a sentence about each one passed over: damaged ones, and those that ``check`` raises InputError for.
    OtherVersion is raised.
    """
    for path in reversed(directories(directory)):
        try:
            saved = load(path)
            check(saved)
            return saved
        except OtherVersion:
            raise
        except InputError as error:
            warn(f"{error} It is passed over.")
    return None


_PLACES = {"model.path": "base", "model.tokenizer": "rows", "data.path": "rows", "data.eval_path": "rows"}
"""Key of a recipe that names a place → which of a checkpoint's ``inputs`` is there."""


def _without_places(recipe: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """Return what must stay the same of keys that name places, since what is there may have moved.

    `require_same_inputs` knows base and rows by what is in them. The vectors of a start are in the checkpoint. Rewards
    are known by name and weight.
    """
    rewards, mixture = recipe.get("training", {}).get("reward") or {}, recipe.get("data", {}).get("mixture", [])
    weights = {rewards: 1.0} if isinstance(rewards, str) else rewards
    return {
        **{key: None for key, what in _PLACES.items() if inputs.get(what) is not None},
        "adapter.init_from": recipe.get("adapter", {}).get("init_from") is not None,
        "training.reward": [(text.rpartition(":")[2], weight) for text, weight in weights.items()],
        "data.mixture": [{**part, "path": None} for part in mixture],
    }


def newest_of_run(
    run_dir: Path,
    recipe: Recipe,
    unit: str,
    warn: Callable[[str], None],
    check: Callable[[Checkpoint], None],
    rank: int = 0,
) -> Checkpoint | None:
    """Return the newest checkpoint of this run that verifies; None where the run ended before its first one.

    ``unit``: the word that checkpoints and records are numbered by, ``step`` or ``round``. ``check`` may raise
    InputError, and KeyError and TypeError for a file of another version. ``rank``: the process that wrote them.
    InputError where there are checkpoints and none can be used: the run must not begin again.
    """

    def use(saved: Checkpoint) -> None:
        inputs = saved.state.get("inputs") or {}
        begun = saved.state.get("recipe") or {}
        theirs, ours = (_without_places(of, inputs) for of in (begun, plain_json(recipe.to_dict())))
        places = [key for key, value in theirs.items() if value == ours[key]]
        if changed := changed_keys(begun, recipe, (*LENGTH, *places)):
            raise InputError(f"{saved.path}: is of another run; {', '.join(changed)} differ from this recipe.")
        try:
            check(saved)
        except (KeyError, TypeError) as error:
            raise OtherVersion(f"{saved.path}: was written by another version of qvera ({error}).") from None

    directory = of_rank(run_dir, rank)
    try:
        saved = newest(directory, warn, use)
    except OtherVersion as error:
        advice = "Go on with that version, or delete this checkpoint and go on from an earlier one."
        raise InputError(f"{error} {advice}{other_writer(run_dir)}") from None
    if saved is not None:
        return saved
    taken = max((record[unit] for record in read_records(metrics_path(run_dir, rank), unit)), default=0)
    # the step that is saved is recorded first, so a run killed in its first save has recorded that many steps
    has_saved = taken > load_recipe(run_dir / "recipe.yaml", of_a_run=True).training.save_steps
    has_saved |= taken > 0 and (run_dir / "adapter").is_dir()  # of a run that came to its end
    if has_saved or directories(directory):
        raise InputError(
            f"{directory}: holds no checkpoint that can be used, and the run has taken {taken} {unit}s. Put a whole "
            f"checkpoint back. To begin again at {unit} 0, delete {run_dir} or choose another training.output_dir; "
            "adapter.init_from begins with a saved adapter."
        )
    return None


def of_rank(run_dir: Path, rank: int) -> Path:
    """Return the directory of the checkpoints of a process that has its own."""
    return run_dir / "checkpoints" / (f"rank-{rank:05d}" if rank else "")


def require_same_inputs(place: Path, theirs: dict[str, Any] | None, inputs: dict[str, Any]) -> None:
    """Raise InputError where the run in ``place`` has other rows or another base than ``inputs``.

    ``inputs``: some of `TrainingSession.inputs`. A run of an earlier version has none to compare.
    """
    what = {
        "rows": "other rows (data.path or data.eval_path)",
        "base": "other weights of the base (model.path)",
        "loss": "another loss",
    }
    known = {key: value for key, value in (theirs or {}).items() if value is not None and inputs.get(key) is not None}
    if changed := [name for key, name in what.items() if key in known and known[key] != inputs[key]]:
        raise InputError(
            f"{place}: was saved with {' and '.join(changed)} than it has now, so the run would "
            "not become what it would have. Put them back, or start a new run in another training.output_dir."
        )


def load(path: Path) -> Checkpoint:
    """Read and verify what `write` wrote.

    InputError where a file is missing, cut short or changed, or the format is another one.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version = manifest["format"]
        if version == FORMAT:
            listed = manifest["files"]
            names = [*_FILES, *(name for name in _OPTIONAL if f"{name}.safetensors" in listed)]
            facts = {name: listed[name] for name in (*(f"{name}.safetensors" for name in names), _STATE)}
            expected = {name: (fact["bytes"], fact["sha256"]) for name, fact in facts.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: has no complete manifest.json ({type(error).__name__}), so it was not finished or is damaged."
        ) from None
    if version != FORMAT:
        kind = OtherVersion if isinstance(version, int) and version > FORMAT else InputError
        raise kind(f"{path}: has checkpoint format {version}; this qvera reads format {FORMAT}.")
    for name, (size_bytes, digest) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size_bytes or file_sha256(file) != digest:
            raise InputError(
                f"{file}: is missing or not what the manifest says (SHA-256), so this checkpoint is damaged."
            )
    # A manifest that fits only proves that one hand wrote all files. They may still be no checkpoint of ours.
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        unit = path.name[:-9]
        if state[unit] != number_of(path):
            raise ValueError(f"it is of {unit} {state[unit]}")
        return Checkpoint(path, state, {name: load_file(path / f"{name}.safetensors") for name in names})
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{path}: is no checkpoint of qvera's, though its manifest fits ({first_line(error)})"
        ) from None


def shared(saved: Checkpoint | None, group: Group) -> Checkpoint | None:
    """Send rank 0's checkpoint to every rank, since nodes need not share a disk. Returns it."""
    head = group.broadcast(
        None if saved is None else {"path": str(saved.path), "state": saved.state, "files": list(saved.files)}
    )
    if head is None or group.world_size == 1:
        return saved
    files = {name: group.broadcast_tensors(None if saved is None else saved.files[name]) for name in head["files"]}
    return Checkpoint(Path(head["path"]), head["state"], files)


def restore(
    checkpoint: Checkpoint, vectors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, rank: int = 0
) -> None:
    """Put a checkpoint's vectors, optimizer state and the random state of ``rank`` into a run.

    A rank that the saved run did not have keeps its own. InputError where names or shapes are not those of this run.
    """
    saved = checkpoint.files["vectors"]
    if {name: t.shape for name, t in saved.items()} != {name: p.shape for name, p in vectors.items()}:
        raise InputError(f"{checkpoint.path}: its vectors are not those of this recipe (other rank, targets or model).")
    with torch.no_grad():
        for name, parameter in vectors.items():
            parameter.copy_(saved[name])
    states: dict[str, dict[str, Any]] = {n: dict(s) for n, s in checkpoint.state["optimizer_scalars"].items()}
    for key, tensor in checkpoint.files["optimizer"].items():
        name, _, part = key.rpartition("/")
        device = "cpu" if part == "step" or name not in vectors else vectors[name].device  # AdamW counts on the CPU
        states.setdefault(name, {})[part] = _placed(tensor, device, optimizer, vectors.get(name))
    for name in states.keys() & vectors.keys():
        optimizer.state[vectors[name]] = states[name]
    set_generator_states(checkpoint.files["random"], rank)


def _placed(
    tensor: torch.Tensor, device: torch.device | str, optimizer: torch.optim.Optimizer, parameter: nn.Parameter | None
) -> torch.Tensor:
    """Move optimizer state to the device. A paged optimizer's goes to a buffer of its own, since only that is paged."""
    if not getattr(optimizer, "is_paged", False) or parameter is None or tensor.shape != parameter.shape:
        return tensor.to(device, copy=True)  # a loaded one is the file, which would be in use for the whole run
    # a method of bitsandbytes' Optimizer8bit, which torch's class does not have
    buffer: torch.Tensor = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)  # type: ignore[attr-defined]
    return buffer.copy_(tensor)


def prune(directory: Path, saved: int, keep: int, also: set[int]) -> None:
    """Delete leftovers of killed writes, and checkpoints other than the newest ``keep`` and the steps ``also``.

    ``saved``: the step that was just saved. Later checkpoints are damaged, since the run went on from an earlier one.
    """
    numbers = {number_of(path): path for path in directories(directory)}
    kept = sorted(number for number in numbers if number <= saved)[-keep:]
    for number, path in numbers.items():
        if number not in kept and (number > saved or number not in also):
            shutil.rmtree(path, ignore_errors=True)  # on NFS a file that is in use stays, and goes the next time
    for path in directory.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def generator_states(rank: int = 0) -> dict[str, torch.Tensor]:
    """Return this process's generator states, under the names that the states of ``rank`` have in a checkpoint."""
    suffix = f".{rank}" if rank else ""
    states = {"cpu": torch.get_rng_state(), **accelerator.random_state()}
    return {f"{name}{suffix}": state for name, state in states.items()}


def set_generator_states(states: dict[str, torch.Tensor], rank: int = 0) -> None:
    """Take over the generator states of ``rank`` from what `generator_states` gave, of one rank or of all."""
    suffix = f".{rank}" if rank else ""
    mine = {name.removesuffix(suffix): state for name, state in states.items() if name.endswith(suffix)}
    if "cpu" in mine:
        torch.set_rng_state(mine["cpu"])
    accelerator.set_random_state(mine)


_FORMAT = "1"


def write_state(file: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write a state and its tensors. RunFailed where the disk is full; an earlier file stays."""
    text = json.dumps(plain_json(dict(state)))
    held = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "state": text, "sha256": _sha256(text, held)}
    with disk_errors(str(file), "What was saved before is kept."), replacing(file) as partial:
        save_tensors(held, partial, metadata)


def read_state(file: Path, advice: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read tensors and state. InputError, which ends with ``advice``, where the file is missing or damaged."""
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
