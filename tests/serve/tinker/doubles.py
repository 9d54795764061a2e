"""A double of `Tenants`: a model is one number, its gradient the sum of the tokens that came."""

from __future__ import annotations

import json
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qvera.training.optim import AdamSettings
from qvera.training.tenants import CallFailed, Done, ModelShape
from qvera.training.token_rows import RowResults, TokenRow


@dataclass
class Numbers:
    """A model."""

    value: float = 0.0
    gradient: float = 0.0
    steps: int = 0


class ScriptedTenants:
    """Does calls in a thread of its own, in order, while ``runs`` is set. ``done_calls``: what was done."""

    def __init__(self) -> None:
        self.models: dict[str, Numbers] = {}
        self._removals = Counter[str]()
        self.done_calls: list[tuple[str, str]] = []
        self.runs = threading.Event()
        self.runs.set()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.runs.set()
        self._calls.put(None)
        self._thread.join(20)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            self.runs.wait()
            call()

    def _add(self, model_id: str, kind: str, work: Callable[[], Any], done: Done) -> None:
        removals = self._removals[model_id]

        def call() -> None:
            try:
                result = work() if self._removals[model_id] == removals else CallFailed("was removed")
            except KeyError:
                result = CallFailed("no such model", "server")
            except CallFailed as failure:
                result = failure
            self.done_calls.append((model_id, kind))
            done(result)

        self._calls.put(call)

    def create(self, model_id: str, owner: str, shape: ModelShape, seed: int, done: Done) -> None:
        self._add(model_id, "create", lambda: self.models.update({model_id: Numbers(float(seed))}), done)

    def load(self, model_id: str, owner: str, file: Path, with_optimizer: bool, done: Done) -> None:
        def load() -> None:
            try:
                numbers = Numbers(**json.loads(file.read_text()))
            except ValueError:
                raise CallFailed(f"{file}: is damaged") from None
            self.models[model_id] = numbers if with_optimizer else Numbers(numbers.value)

        self._add(model_id, "load", load, done)

    def forward_backward(
        self,
        model_id: str,
        rows: Sequence[TokenRow],
        loss: str,
        settings: Mapping[str, float],
        forward_only: bool,
        done: Done,
    ) -> None:
        def run() -> RowResults:
            model, total = self.models[model_id], float(sum(row.tokens.sum() for row in rows))
            if any(np.isnan(row.inputs["weights"]).any() for row in rows):
                raise CallFailed("the loss is not finite", "user")
            if not forward_only:
                model.gradient += total
            logprobs = [np.full(row.targets.shape, -model.value, np.float32) for row in rows]
            return RowResults(logprobs, total)

        self._add(model_id, f"{'forward' if forward_only else loss} {len(rows)}", run, done)

    def optim_step(self, model_id: str, settings: AdamSettings, done: Done) -> None:
        def run() -> dict[str, float]:
            model = self.models[model_id]
            norm, model.gradient = model.gradient, 0.0
            model.value, model.steps = model.value - settings.learning_rate * norm, model.steps + 1
            return {"grad_norm:mean": norm}

        self._add(model_id, "step", run, done)

    def save_state(self, model_id: str, file: Path, done: Done) -> None:
        def run() -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(asdict(self.models[model_id])))

        self._add(model_id, "save", run, done)

    def save_adapter(self, model_id: str, directory: Path, done: Done) -> None:
        def run() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "adapter.json").write_text(json.dumps(self.models[model_id].value))

        self._add(model_id, "save_adapter", run, done)

    def remove(self, model_ids: Sequence[str], done: Done = lambda _: None) -> None:
        """At once, before calls that came earlier."""
        self._removals.update(model_ids)
        for model_id in model_ids:
            self.models.pop(model_id, None)
        self._calls.put(lambda: done(None))

    def has_work(self) -> bool:
        return False

    def run_slice(self) -> None:
        raise AssertionError("it has a thread of its own")
