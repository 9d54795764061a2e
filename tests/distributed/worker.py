"""One rank: runs the recipes of a plan one after the other in one process group, and writes down what its live objects say.

python -m tests.distributed.worker DIRECTORY        plan.json in, found<rank>.json out
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qvera import quantize, sharded, trainer
from qvera.errors import QveraError
from qvera.model import causal_model
from qvera.optimize import optimizer_bytes
from qvera.ranks import Group, in_group
from qvera.recipe import parse_recipe


class Watch:
    """Wrapped around the loop's own functions for one run: which rows this rank trained on, and its engine and model."""

    def __init__(self, stop_after: int | None) -> None:
        self.engine: Any = None
        self.model: Any = None
        self.rows: list[list[int]] = []
        self.live_bytes = 0
        self.big: list[Any] = []
        self.stop_after = stop_after

    def __enter__(self) -> Watch:
        self.kept = trainer._engine, trainer._step, trainer.rank_passes
        build, step, passes = self.kept

        def watched_build(*args: Any) -> Any:
            self.engine, self.model = build(*args), args[2]
            linears = [m for m in causal_model(self.model).modules() if isinstance(m, quantize.Linear4bit)]
            # the weights themselves: asking a module for its weight in the middle of a forward pass makes DeepSpeed gather it
            self.big = [linear.weight for linear in linears]
            for linear in linears:
                linear.register_forward_hook(self.look)
            return self.engine

        def watched_step(*args: Any) -> Any:
            record = step(*args)
            if record["step"] == self.stop_after and args[-1].rank == args[-1].world_size - 1:
                os.kill(os.getpid(), 15)
            return record

        def watched_passes(*args: Any) -> Any:
            found = passes(*args)
            self.rows.append([row for one in found for row in one])
            return found

        trainer._engine, trainer._step, trainer.rank_passes = watched_build, watched_step, watched_passes  # type: ignore
        return self

    def look(self, *_: Any) -> None:
        """Bytes of the base's big weights that are whole in this process right now."""
        live = sum(p.numel() * p.element_size() for p in self.big)
        self.live_bytes = max(self.live_bytes, live)

    def __exit__(self, *_: Any) -> None:
        trainer._engine, trainer._step, trainer.rank_passes = self.kept

    def found(self) -> dict[str, Any]:
        engine = self.engine
        deepspeed = getattr(engine, "deepspeed", None)
        return {
            "engine": type(engine).__name__,
            "stage": None if deepspeed is None else int(deepspeed.zero_optimization_stage()),
            "zero_optimizer": None if deepspeed is None else type(deepspeed.optimizer).__name__,
            "optimizer_bytes": optimizer_bytes(engine.optimizer),
            "packed_held_bytes": sum(sharded.held_bytes(p) for p in self.big),
            "packed_whole_bytes": sum(sharded.whole_numel(p) * p.element_size() for p in self.big),
            "largest_packed_bytes": max(sharded.whole_numel(p) * p.element_size() for p in self.big),
            "packed_live_bytes": self.live_bytes,
            "packed_modules": len(self.big),
            "states_kept": sum(p.quant_state is not None for p in self.big),
            "rows": self.rows,
        }


def run(task: dict[str, Any], group: Group) -> dict[str, Any]:
    began = time.perf_counter()
    outcome: dict[str, Any] = {"error": None}
    with Watch(task.get("stop_after")) as watch:
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
    print(f"{task['name']}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return outcome


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    tasks = json.loads((directory / "plan.json").read_text())
    with in_group() as group:
        found = {task["name"]: run(task, group) for task in tasks}
        (directory / f"found{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
