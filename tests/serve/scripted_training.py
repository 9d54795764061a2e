"""A trainer without a model, and the thread that an engine would be."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qvera.config.schema import ModelSection, Recipe
from qvera.data import AdapterRows, Datasets, planned_steps
from qvera.evaluation.load import Artifact
from qvera.serve.fine_tuning.directory import TrainingDirectory
from qvera.serve.fine_tuning.jobs import Jobs
from qvera.serve.fine_tuning.preparing import Recipes
from qvera.serve.store import AdapterStore
from qvera.training.checkpoint import TrainState
from qvera.utils.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.conftest import small_tokenizer


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
    def has_ended(self) -> bool:
        return self.reason is not None or self.state.step >= self.steps


class ScriptedTrainer:
    """Every part is one step of all in flight; step k has the loss 1 / k, and takes ten tokens.

    Attributes:
        fails: what `run_slice` raises, once.
        not_finite: ids of jobs that diverge at their next step.
        before: called with the name of each method but `prepare` before it does anything.
    """

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self.in_flight: list[ScriptedRun] = []
        self.fails: Exception | None = None
        self.not_finite: set[str] = set()
        self.before: Callable[[str], None] = lambda name: None

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

    def run_slice(self) -> list[dict[str, Any]]:
        self.before("run_slice")
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        records = []
        for run in self.in_flight:
            if run.id in self.not_finite:
                run.reason = f"step {run.state.step + 1}: its loss is not finite."
            elif not run.has_ended:
                run.state.add_step(1 / (run.state.step + 1), 0.1, 10)
                records.append(
                    {
                        "kind": "train",
                        "adapter": run.id,
                        "step": run.state.step,
                        "loss": run.state.train_loss_last,
                        "learning_rate": run.recipe.training.learning_rate,
                        "input_tokens": 10,
                    }
                )
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
        directory.mkdir(exist_ok=True)
        (directory / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "QVERA", "rank": run.recipe.adapter.rank}))
        (directory / ADAPTER_WEIGHTS).write_bytes(f"{run.id} after step {run.state.step}".encode())


class Driver:
    """Does the parts of jobs in a thread.

    Attributes:
        hold: while it is set, no part is done; `parts` more may be allowed.
    """

    def __init__(self) -> None:
        self.jobs: Jobs | None = None
        self.hold = threading.Event()
        self._woken = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def wake(self) -> None:
        self._woken.set()

    def go_on(self) -> None:
        self.hold.clear()
        self.wake()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self.wake()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closing:
            self._woken.wait()
            self._woken.clear()
            assert self.jobs is not None
            while not self._closing and not self.hold.is_set() and self.jobs.worker.has_work():
                self.jobs.worker.run_slice()


def target(**data: Any) -> Artifact:
    """A base that is served as a recipe says, or by the defaults."""
    section = ModelSection(path="tiny")
    recipe = Recipe.model_validate({"model": "tiny", "data": {"path": "x.csv", **data}}) if data else None
    return Artifact(Path("tiny"), "a base", section, recipe=recipe)


def jobs_of(
    directory: TrainingDirectory,
    root: Path,
    trainer: ScriptedTrainer,
    wake: Callable[[], None] = lambda: None,
    served: Artifact | None = None,
) -> Jobs:
    """Jobs whose adapters go into ``root``."""
    store = AdapterStore(root, base_names=["tiny", "hub/tiny"])
    return Jobs(directory, Recipes(served or target()), trainer, store, small_tokenizer(), wake)


def chat_rows(count: int = 4, first: int = 0) -> bytes:
    """Rows as OpenAI's clients send them."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {k}"}, {"role": "assistant", "content": "the word is red"}]}
        for k in range(first, first + count)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
