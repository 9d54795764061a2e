"""A trainer without a model, and jobs for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qvera.config.schema import Recipe
from qvera.config.sections import ModelSection
from qvera.data import AdapterRows, Datasets, planned_steps
from qvera.evaluation.load import Artifact
from qvera.models.loader import Base
from qvera.serve.fine_tuning.directory import TrainingDirectory
from qvera.serve.fine_tuning.jobs import Jobs
from qvera.serve.fine_tuning.preparing import Recipes
from qvera.serve.store import AdapterStore
from qvera.training.checkpoint import TrainState
from qvera.utils.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.conftest import small_llama, small_tokenizer


def write_files(directory: Path, content: bytes = b"vectors") -> None:
    """An adapter as far as its files tell."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "QVERA", "rank": 7, "base_model_name_or_path": "/models/tiny"}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config))
    (directory / ADAPTER_WEIGHTS).write_bytes(content)


@dataclass(eq=False)
class ScriptedRun:
    id: str
    recipe: Recipe
    rows: AdapterRows
    steps: int
    state: TrainState = field(default_factory=TrainState)
    after: dict[str, Any] | None = None
    reason: str | None = None

    @property
    def owes_score(self) -> bool:
        return self.state.evaluation_due

    @property
    def kept_step(self) -> int:
        return self.state.best_step or self.state.step

    @property
    def has_ended(self) -> bool:
        return self.reason is not None or self.state.step >= self.steps


class ScriptedTrainer:
    """Every part is one step of all in flight; step k has the loss 1 / k, and takes ten tokens.

    Attributes:
        fails: what `run_slice` raises, once.
        not_finite: ids of jobs that diverge at their next step → what is said of it.
        before: called with the name of each method but `prepare` before it does anything.
        begun: ids of all jobs that began, the first one first.
    """

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self.in_flight: list[ScriptedRun] = []
        self.fails: Exception | None = None
        self.not_finite: dict[str, str] = {}
        self.before: Callable[[str], None] = lambda name: None
        self.begun: list[str] = []

    @property
    def free_slots(self) -> int:
        return self.slots - len(self.in_flight)

    def prepare(self, id: str, recipe: Recipe, datasets: Datasets) -> ScriptedRun:
        rows = AdapterRows(id, np.arange(len(datasets.train)), np.arange(len(datasets.eval)), 0)
        return ScriptedRun(id, recipe, rows, planned_steps(recipe, len(datasets.train)))

    def begin(self, run: ScriptedRun, saved: Path | None = None) -> None:
        self.before("begin")
        assert self.free_slots > 0
        assert run.id not in [one.id for one in self.in_flight]
        run.state = TrainState() if saved is None else TrainState(**json.loads(saved.read_text()))
        self.in_flight.append(run)
        self.begun.append(run.id)

    def run_slice(self) -> list[dict[str, Any]]:
        self.before("run_slice")
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        records = []
        for run in self.in_flight:
            if run.id in self.not_finite:
                run.reason = self.not_finite[run.id]
            elif not run.has_ended:
                run.state.add_step(1 / (run.state.step + 1), 0.1, 10)
                record = {"kind": "train", "adapter": run.id, "step": run.state.step, "loss": run.state.train_loss_last}
                records.append({**record, "learning_rate": run.recipe.training.learning_rate, "input_tokens": 10})
                if run.has_ended and len(run.rows.eval):
                    run.state.before, run.after = {"loss": 2.0}, {"loss": 0.5}
                    records.append({"kind": "eval", "adapter": run.id, "step": run.state.step, "loss": 0.5})
        return records

    def end(self, run: ScriptedRun) -> None:
        self.before("end")
        self.in_flight.remove(run)

    def save(self, run: ScriptedRun, file: Path) -> None:
        self.before("save")
        file.write_text(json.dumps(asdict(run.state)))

    def save_adapter(self, run: ScriptedRun, directory: Path) -> None:
        self.before("save_adapter")
        write_files(directory, f"{run.id} after step {run.state.step}".encode())


def target(**data: Any) -> Artifact:
    """A base that is served as a recipe says, or by the defaults."""
    section = ModelSection(path="tiny")
    recipe = Recipe.model_validate({"model": "tiny", "data": {"path": "x.csv", **data}}) if data else None
    return Artifact(Path("tiny"), "a base", section, recipe=recipe)


def jobs_of(directory: TrainingDirectory, root: Path, trainer: ScriptedTrainer, served: Artifact | None = None) -> Jobs:
    """Jobs whose adapters go into ``root``."""
    store = AdapterStore(root, base_names=["tiny", "hub/tiny"])
    base = Base(small_llama(), small_tokenizer(), {})
    return Jobs(directory, Recipes(served or target()), trainer, store, base, lambda: None)


def chat_rows(count: int = 4, first: int = 0, answer: str = "the word is red") -> bytes:
    """Rows as OpenAI's clients send them."""
    says = [
        [{"role": "user", "content": f"say {k}"}, {"role": "assistant", "content": answer}]
        for k in range(first, first + count)
    ]
    return b"".join(json.dumps({"messages": messages}).encode() + b"\n" for messages in says)
