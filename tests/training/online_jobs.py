"""Jobs for a `OnlineTrainer` on the tiny model, with rows and recipes of their own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qvera.config.schema import Recipe
from qvera.data import Datasets, build_datasets
from qvera.models.loader import load_base
from qvera.models.tokenizer import load_tokenizer
from qvera.training.online import OnlineTrainer
from qvera.training.roster import AdapterRun
from tests.training.runs import row

PASS_ROWS = 8


def server_recipe(make_recipe: Any, **sections: Any) -> Recipe:
    """What all jobs share: passes of eight rows."""
    training = {"per_device_train_batch_size": PASS_ROWS, "global_batch_size": 8, **sections.pop("training", {})}
    return make_recipe(training=training, **sections)


def write_job_rows(path: Path, count: int, seed: int, noise: bool = False) -> Path:
    chooser = random.Random(seed)
    path.write_text("".join(json.dumps(row(chooser, noise)) + "\n" for _ in range(count)), encoding="utf-8")
    return path


def job_recipe(make_recipe: Any, rows: Path, data: dict[str, Any] | None = None, **training: Any) -> Recipe:
    """A job's own recipe: steps of four rows, as a run of it alone takes it too."""
    sizes = {"global_batch_size": 4, "per_device_train_batch_size": 4, "max_steps": 5, "save_steps": 1000}
    return make_recipe(data={"path": str(rows), "eval_fraction": 0.0, **(data or {})}, training={**sizes, **training})


def datasets_of(recipe: Recipe) -> Datasets:
    """The rows of a recipe, tokenized."""
    return build_datasets(recipe.data, load_tokenizer(recipe.model), Console(quiet=True))


class Jobs:
    """A trainer and what came out of its parts."""

    def __init__(self, recipe: Recipe, slots: int = 4) -> None:
        self.trainer = OnlineTrainer(load_base(recipe.model), recipe, slots)
        self.records: list[dict[str, Any]] = []

    def begin(self, name: str, recipe: Recipe, saved: Path | None = None) -> AdapterRun:
        """A job, in flight."""
        run = self.trainer.prepare(name, recipe, datasets_of(recipe))
        self.trainer.begin(run, saved)
        return run

    def do_parts(self, until: Callable[[], object]) -> None:
        """Parts until it holds, or nothing is left to do."""
        while self.trainer.has_work and not until():
            self.records += self.trainer.run_slice()

    def finish(self, runs: Iterable[AdapterRun]) -> dict[str, torch.Tensor]:
        """Parts until nothing is left; the vectors of these jobs."""
        self.do_parts(lambda: False)
        return {run.name: self.vectors(run) for run in runs}

    def vectors(self, run: AdapterRun) -> torch.Tensor:
        """A job's vectors now, fp32 [numbers]."""
        return self.trainer.loop.bank.vectors[run.held_slot].clone()

    def of(self, name: str, kind: str) -> list[dict[str, Any]]:
        """The records of a job."""
        return [record for record in self.records if (record["adapter"], record["kind"]) == (name, kind)]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two adapters' vectors, relative to their length."""
    return float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))
