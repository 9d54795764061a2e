"""One rank: runs the recipes of a plan one after the other in one process group, and writes down what its live objects say.

python -m tests.distributed.worker DIRECTORY        plan.json in, found<rank>.json out
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from qvera.adapters.hooks import TrainingHook
from qvera.adapters.save_load import named_vectors
from qvera.config import plugins
from qvera.config.schema import parse_recipe
from qvera.data import Batches
from qvera.distributed import zero
from qvera.distributed.group import Group, in_group
from qvera.distributed.processes import end_if_stuck
from qvera.models import quantization
from qvera.models.structure import causal_model
from qvera.training import trainer
from qvera.training.loop import AloneLoop
from qvera.training.optim import optimizer_bytes
from qvera.training.session import TrainingSession
from qvera.utils.errors import QveraError


class Recorder(TrainingHook):
    """Notes every call, and in its state, as a number and as a tensor, the last step that was taken."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.step = torch.zeros(1, dtype=torch.int64)

    def before_step(self, step: int) -> None:
        self.calls.append(("before", step))

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        self.calls.append(("after", step))
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.step.item(), "tensor": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:  # else of a run without this hook
            assert state["tensor"].item() == state["number"]
            self.step = state["tensor"].clone()
            self.calls.append(("loaded", state["number"]))


class Watch:
    """Around the loop's own functions for one run: which rows this rank trained on, and its engine and model."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task, self.recorder, self.patches = task, Recorder(), contextlib.ExitStack()
        self.engine: Any = None
        self.model: Any = None
        self.rows: list[list[int]] = []
        self.big: list[Any] = []
        self.live_bytes = self.longest_batch_tries = 0

    def __enter__(self) -> Watch:
        recorder = self.recorder

        class Recording(plugins.Schedule):
            name = "recorder"

            def hook(self, training: Any) -> TrainingHook:
                return recorder

        self.patches.enter_context(mock.patch.dict(plugins.registered["qvera.schedules"], recorder=Recording))
        watched = {AloneLoop: ("make_engine", "train_step", "nll"), Batches: ("passes",)}
        for owner, names in {**watched, TrainingSession: ("try_longest_batch",)}.items():
            for name in names:
                self.patches.enter_context(mock.patch.object(owner, name, self.around(owner, name)))
        return self

    def __exit__(self, *_: Any) -> None:
        self.patches.close()

    def around(self, owner: Any, name: str) -> Any:
        real, watching = getattr(owner, name), getattr(self, name)
        return lambda *arguments: watching(real, *arguments)

    def nll(self, real: Any, loop: AloneLoop, rows: Any, *rest: Any) -> Any:
        short = self.task.get("out_of_memory", {})  # a rank, a step, and the rows that fit in a pass there
        here = (short.get("rank"), short.get("step")) == (loop.group.rank, loop.state.step + 1)
        if here and rest and len(rows) > short["rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(loop, rows, *rest)

    def try_longest_batch(self, real: Any, *parts: Any) -> None:
        self.longest_batch_tries += 1
        real(*parts)

    def make_engine(self, real: Any, loop: AloneLoop) -> Any:
        self.engine, self.model = real(loop), loop.model
        linears = [m for m in causal_model(self.model).modules() if isinstance(m, quantization.Linear4bit)]
        # the weights themselves: asking a module for its weight in the middle of a forward pass makes DeepSpeed gather it
        self.big = [linear.weight for linear in linears]
        for linear in linears:
            linear.register_forward_hook(self.look)
        return self.engine

    def train_step(self, real: Any, loop: AloneLoop) -> Any:
        record = real(loop)
        if record["step"] == self.task.get("stop_after") and loop.group.rank == loop.group.world_size - 1:
            os.kill(os.getpid(), 15)
        return record

    def passes(self, real: Any, *arguments: Any) -> Any:
        found = real(*arguments)
        self.rows.append([row for one in found for row in one])
        return found

    def look(self, *_: Any) -> None:
        """Bytes of the base's big weights that are whole in this process right now."""
        self.live_bytes = max(self.live_bytes, sum(p.nbytes for p in self.big))

    def found(self) -> dict[str, Any]:
        deepspeed = getattr(self.engine, "deepspeed", None)
        vectors = [tensor.detach().float().numpy().tobytes() for tensor in named_vectors(self.model).values()]
        return {
            "digest": hashlib.sha256(b"".join(vectors)).hexdigest(),
            "stage": None if deepspeed is None else int(deepspeed.zero_optimization_stage()),
            "optimizer_bytes": optimizer_bytes(self.engine.optimizer),
            "packed_held_bytes": sum(getattr(p, "ds_tensor", p).nbytes for p in self.big),
            "packed_whole_bytes": sum(zero.whole_numel(p) * p.element_size() for p in self.big),
            "packed_live_bytes": self.live_bytes,
            "longest_batch_tries": self.longest_batch_tries,
            "rows": self.rows,
            "hook_calls": self.recorder.calls,
            "embedding": _embedding(causal_model(self.model)),
        }


def _embedding(model: Any) -> dict[str, bool]:
    weight, output = model.get_input_embeddings().weight, model.get_output_embeddings()  # a classifier has none
    head = weight if output is None else output.weight
    whole, maps = weight.numel() > 0, Path("/proc/self/maps").read_text().splitlines()
    files = [line for line in maps if line.endswith(".safetensors")]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in files]
    return {
        "sharded": zero.is_sharded(weight),
        "is_the_head": whole and weight.data_ptr() == head.data_ptr(),
        "mapped": whole and any(start <= weight.data_ptr() < end for start, end in spans),
    }


def prepare(task: dict[str, Any], run_dir: Path) -> None:
    """Copy the run that this one goes on from; where it is to be damaged, a bit of its newest checkpoint is another."""
    if "copy_of" in task:
        shutil.copytree(run_dir.with_name(task["copy_of"]), run_dir)
    if task.get("damaged"):
        file = max((run_dir / "checkpoints").iterdir()) / "optimizer.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def run(task: dict[str, Any], group: Group) -> dict[str, Any]:
    run_dir = Path(task["run_dir"])
    outcome: dict[str, Any] = {"error": None}
    if group.first:
        prepare(task, run_dir)
    group.broadcast(None)  # the others wait for that
    with Watch(task) as watch:
        try:
            recipe = task["other_recipe"] if group.rank and "other_recipe" in task else task["recipe"]
            resume, console = task.get("resume", False), Console(stderr=True)
            trainer.train(parse_recipe(recipe, task["name"]), run_dir, resume=resume, console=console)
        except QveraError as error:
            if not task.get("fails", False) and error.exit_code != 75:
                raise
            outcome = {"error": type(error).__name__, "exit_code": error.exit_code, "text": str(error)}
        return outcome | watch.found() if watch.engine is not None else outcome


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    tasks = json.loads((directory / "plan.json").read_text())
    with in_group() as group:
        found = {task["name"]: run(task, group) for task in tasks}
        (directory / f"found{group.rank}.json").write_text(json.dumps(found))
    end_if_stuck(0)  # as a command does


if __name__ == "__main__":
    main(Path(sys.argv[1]))
