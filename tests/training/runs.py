"""What a run left, of one adapter or of many; runs that are killed, stopped or shared; rows and recipes of many adapters."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qvera.cli.main import main
from qvera.config.schema import Recipe
from qvera.training import checkpoint
from qvera.training.loop import AloneLoop
from qvera.training.many import ManyTrainer
from qvera.training.trainer import train
from qvera.utils.errors import Interrupted
from tests.distributed.ranks import free_port
from tests.helpers import start_process

COLUMN = "customer"
MESSAGE = (  # of torch, for a card that is full
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free."
)
TIMES = ("seconds", "step_seconds", "tokens_per_second", "memory_bytes", "peak_bytes")


def row(chooser: random.Random, noise: bool) -> dict[str, str]:
    """A row of one of several lengths; with ``noise`` there is nothing to learn for rows that are held out."""
    word = chooser.choice(["red", "blue", "green", "grey", "gold"]) * chooser.randint(1, 4)
    if noise:
        word = "".join(chooser.choices("abcdefghijklmnopqrstuvwxyz", k=12))
    return {"prompt": f"say {word} {chooser.randint(0, 99)}", "completion": f"{word} {chooser.randint(0, 9)}"}


def write_rows(path: Path, counts: Mapping[str, int], seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """A file with that many rows of each adapter, in mixed order, of those named ``noise`` noise; the rows of each."""
    chooser = random.Random(seed)
    names = [name for name, count in counts.items() for _ in range(count)]
    chooser.shuffle(names)
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in dict.fromkeys(names)}
    with open(path, "w", encoding="utf-8") as handle:
        for name in names:
            rows[name].append(row(chooser, name.startswith("noise")))
            handle.write(json.dumps({COLUMN: name, **rows[name][-1]}) + "\n")
    return rows


def many_recipe(make_recipe: Any, path: Path, training: Mapping[str, Any] | None = None, **data: Any) -> Recipe:
    """A recipe that trains the adapters of a file together: steps of four rows, passes of eight."""
    sizes = {"global_batch_size": 4, "per_device_train_batch_size": 8, "max_steps": 6, "save_steps": 1000}
    keys = {"path": str(path), "adapter_column": COLUMN, "eval_fraction": 0.0, **data}
    return make_recipe(data=keys, training={**sizes, **(training or {})})


def alone(recipe: Recipe, rows: list[dict[str, str]], path: Path) -> Recipe:
    """The same recipe for one adapter, over a file of its rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = recipe.data.replace(path=str(path), adapter_column=None)
    rows_a_pass = min(recipe.training.per_device_train_batch_size, recipe.training.global_batch_size)
    training = recipe.training.replace(per_device_train_batch_size=rows_a_pass, adapters_at_once="auto")
    return recipe.replace(data=data, training=training)


def train_alone(recipe: Recipe, rows: list[dict[str, str]], directory: Path) -> dict[str, Any]:
    """Train one adapter alone; its run.json."""
    directory.mkdir(parents=True)
    result = train(alone(recipe, rows, directory / "rows.jsonl"), directory / "run")
    assert result is not None
    return result.run


def train_many(recipe: Recipe, run_dir: Path, **more: Any) -> dict[str, dict[str, Any]]:
    """Train many; the entries of run.json by name."""
    assert train(recipe, run_dir, **more) is not None
    return entries(run_dir)


def run_json(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return found


def entries(run_dir: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in run_json(run_dir)["adapters"]}


def records(run_dir: Path, kind: str = "train", adapter: str | None = None) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["kind"] == kind]
    return found if adapter is None else [record for record in found if record["adapter"] == adapter]


def vectors(run_dir: Path, adapter: str | None = None) -> dict[str, torch.Tensor]:
    directory = run_dir / "adapter"
    if adapter is not None:
        directory = run_dir / "adapters" / entries(run_dir)[adapter]["directory"]
    return load_file(directory / "adapter_model.safetensors")


def all_files(run_dir: Path) -> dict[str, bytes]:
    """The adapters' files by their path."""
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in (run_dir / "adapters").rglob("*") if p.is_file()}


def losses(run_dir: Path, kind: str = "train") -> list[float]:
    return [record["loss"] for record in records(run_dir, kind)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """Of one adapter: the losses and the vectors, to the bit."""
    assert losses(run_dir) == losses(whole)
    assert same(vectors(run_dir), vectors(whole))


def assert_close_run(run_dir: Path, whole: Path) -> None:
    """Of one adapter: the losses and the vectors, to what other passes round differently."""
    assert losses(run_dir) == pytest.approx(losses(whole), rel=1e-5)
    found, expected = vectors(run_dir), vectors(whole)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)


def cut_off(run_dir: Path, copy: Path, *, after: int) -> Path:
    """A copy of a finished run as a process would leave it that is killed some steps after its checkpoint of step ``after``.

    Of many adapters: of round ``after``.
    """
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "adapter", ignore_errors=True)
    (copy / "run.json").unlink()
    for path in checkpoint.directories(copy / "checkpoints"):
        if int(path.name[-8:]) > after:
            shutil.rmtree(path)
    return copy


def stop_after(recipe: Recipe, run_dir: Path, step: int, resume: bool = False) -> None:
    """Run until SIGTERM arrives during ``step``; the run saves and says so."""
    original = AloneLoop.train_step

    def interrupted(loop: AloneLoop) -> dict[str, Any]:
        record = original(loop)
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    AloneLoop.train_step = interrupted  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(Interrupted, match=rf"SIGTERM after step {step} of .*, and saved. The same command goes on"):
            train(recipe, run_dir, resume=resume)
    finally:
        AloneLoop.train_step = original  # type: ignore[method-assign]
    assert (run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()


def _rank(places: dict[str, str], log: Path, arguments: list[str]) -> None:
    os.environ.update(places)
    with open(log, "w") as handle:
        for stream in (1, 2):
            os.dup2(handle.fileno(), stream)
        sys.exit(main(arguments))


def on_two_ranks(arguments: list[str], directory: Path) -> str:
    """Let two processes run a command as a launcher starts them; what both said."""
    directory.mkdir()
    logs = [directory / f"rank{rank}.log" for rank in range(2)]
    places = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start_process(_rank, {**places, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log, arguments)
        for rank, log in enumerate(logs)
    ]
    try:
        for rank in ranks:
            rank.join(240)
    finally:
        for rank in ranks:
            rank.kill()
    said = "\n".join(log.read_text() for log in logs)
    assert [rank.exitcode for rank in ranks] == [0, 0], said
    return said


def vouch_for(path: Path) -> None:
    """Write the manifest that fits what is there, as someone would who makes a checkpoint up."""
    facts = {
        f.name: {"sha256": hashlib.sha256(f.read_bytes()).hexdigest(), "bytes": f.stat().st_size}
        for f in path.iterdir()
        if f.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 7, "files": facts}))


def poison(monkeypatch: pytest.MonkeyPatch, name: str, step: int) -> None:
    """Give an adapter a vector that is not finite before its step ``step`` (from 1)."""
    real = ManyTrainer.take_turn

    def take_turn(self: ManyTrainer) -> None:
        for run in self.loop.in_flight:
            if run.name == name and run.state.step == step - 1:
                self.loop.bank.vectors[run.held_slot, 0] = float("nan")
        real(self)

    monkeypatch.setattr(ManyTrainer, "take_turn", take_turn)


def untimed(tree: Any) -> Any:
    """Records or results without what a clock or the machine says."""
    if isinstance(tree, dict):
        return {key: untimed(value) for key, value in tree.items() if key not in TIMES}
    return [untimed(value) for value in tree] if isinstance(tree, list) else tree


def metrics(run_dir: Path) -> list[Any]:
    return [untimed(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_same(run_dir: Path, whole: Path) -> None:
    assert all_files(run_dir) == all_files(whole)
    assert metrics(run_dir) == metrics(whole)
    assert untimed(entries(run_dir)) == untimed(entries(whole))
