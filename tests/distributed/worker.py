"""One rank: runs the recipes of a plan one after the other in one process group, and writes down what its live objects say.

python -m tests.distributed.worker DIRECTORY        plan.json in, found<rank>.json out
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from qvera.adapters.hooks import TrainingHook
from qvera.config import plugins
from qvera.config.schema import parse_recipe
from qvera.data import Batches
from qvera.distributed import zero
from qvera.distributed.group import Group
from qvera.distributed.heartbeat import end_if_stuck
from qvera.distributed.init import in_group
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
    """Wrapped around the loop's own functions for one run: which rows this rank trained on, and its engine and model."""

    def __init__(self, stop_after: int | None, out_of_memory: dict[str, int] | None = None) -> None:
        self.engine: Any = None
        self.model: Any = None
        self.rows: list[list[int]] = []
        self.live_bytes = self.longest_batch_tries = 0
        self.big: list[Any] = []
        self.recorder, self.patches = Recorder(), contextlib.ExitStack()
        self.stop_after = stop_after
        self.out_of_memory = out_of_memory  # a rank, a step, and the rows that fit in a pass there

    def __enter__(self) -> Watch:
        recorder = self.recorder

        class Recording(plugins.Schedule):
            name = "recorder"

            def hook(self, training: Any) -> TrainingHook:
                return recorder

        self.patches.enter_context(mock.patch.dict(plugins.registered["qvera.schedules"], recorder=Recording))
        for owner, name, watched in (
            (AloneLoop, "make_engine", self.make_engine), (AloneLoop, "train_step", self.train_step),
            (AloneLoop, "nll", self.nll), (Batches, "passes", self.passes),
            (TrainingSession, "try_longest_batch", self.try_longest_batch),
        ):  # fmt: skip
            real = getattr(owner, name)

            def method(*arguments: Any, watched: Any = watched, real: Any = real) -> Any:
                return watched(real, *arguments)

            self.patches.enter_context(mock.patch.object(owner, name, method))
        return self

    def __exit__(self, *_: Any) -> None:
        self.patches.close()

    def nll(self, real: Any, loop: AloneLoop, rows: Any, *rest: Any) -> Any:
        short = self.out_of_memory
        here = short is not None and (short["rank"], short["step"]) == (loop.group.rank, loop.state.step + 1)
        if short is not None and here and rest and len(rows) > short["rows"]:
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
        if record["step"] == self.stop_after and loop.group.rank == loop.group.world_size - 1:
            os.kill(os.getpid(), 15)
        return record

    def passes(self, real: Any, *arguments: Any) -> Any:
        found = real(*arguments)
        self.rows.append([row for one in found for row in one])
        return found

    def look(self, *_: Any) -> None:
        """Bytes of the base's big weights that are whole in this process right now."""
        live = sum(p.numel() * p.element_size() for p in self.big)
        self.live_bytes = max(self.live_bytes, live)

    def found(self) -> dict[str, Any]:
        engine = self.engine
        deepspeed = getattr(engine, "deepspeed", None)
        return {
            "engine": type(engine).__name__,
            "stage": None if deepspeed is None else int(deepspeed.zero_optimization_stage()),
            "zero_optimizer": None if deepspeed is None else type(deepspeed.optimizer).__name__,
            "optimizer_bytes": optimizer_bytes(engine.optimizer),
            "packed_held_bytes": sum(getattr(p, "ds_tensor", p).nbytes for p in self.big),
            "packed_whole_bytes": sum(zero.whole_numel(p) * p.element_size() for p in self.big),
            "packed_live_bytes": self.live_bytes,
            "packed_modules": len(self.big),
            "states_kept": sum(p.quant_state is not None for p in self.big),
            "longest_batch_tries": self.longest_batch_tries,
            "rows": self.rows,
            "hook_calls": self.recorder.calls,
            "embedding": _embedding(causal_model(self.model)),
        }


def _embedding(model: Any) -> dict[str, bool]:
    weight = model.get_input_embeddings().weight
    output = model.get_output_embeddings()  # a classifier has none
    head = weight if output is None else output.weight
    return {
        "sharded": zero.is_sharded(weight),
        "is_the_head": weight.numel() > 0 and weight.data_ptr() == head.data_ptr(),
        "mapped": weight.numel() > 0 and _in_a_safetensors_file(weight.data_ptr()),
    }


def _in_a_safetensors_file(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.endswith(".safetensors")
    return False


def run(task: dict[str, Any], group: Group) -> dict[str, Any]:
    began, busy = time.perf_counter(), time.process_time()
    outcome: dict[str, Any] = {"error": None}
    with Watch(task.get("stop_after"), task.get("out_of_memory")) as watch:
        try:
            recipe = parse_recipe(task["recipe"], task["name"])
            if group.rank and "other_recipe" in task:
                recipe = parse_recipe(task["other_recipe"], task["name"])
            trainer.train(recipe, Path(task["run_dir"]), resume=task.get("resume", False), console=Console(stderr=True))
        except QveraError as error:
            outcome = {"error": type(error).__name__, "exit_code": error.exit_code, "text": str(error)}
            if not task.get("fails", False) and not error.exit_code == 75:
                raise
        if watch.engine is not None:
            outcome |= watch.found()
    print(
        f"{task['name']}: {time.perf_counter() - began:.1f} s, {time.process_time() - busy:.1f} of them busy",
        file=sys.stderr,
        flush=True,
    )
    return outcome


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    tasks = json.loads((directory / "plan.json").read_text())
    with in_group() as group:
        found = {task["name"]: run(task, group) for task in tasks}
        (directory / f"found{group.rank}.json").write_text(json.dumps(found))
    end_if_stuck(0)  # as a command does


if __name__ == "__main__":
    main(Path(sys.argv[1]))
