"""The order in which the adapters of a run are trained: a queue, and the adapters in flight.

The adapters with the most optimizer steps left come first (ties: in the order of the data). So long ones do not trail
at the end in passes that nobody fills. An adapter in flight is trained in every round until it leaves.
"""

import dataclasses
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from qvera.config.schema import Recipe
from qvera.data import Batches, Datasets, batches_of, planned_steps
from qvera.data.dataset import AdapterRows
from qvera.training.checkpoint import TrainState
from qvera.training.failures import has_finite_loss, held_out_not_finite
from qvera.training.optim import lr_lambda
from qvera.utils.adapter_names import directory_names

Purpose = Literal["before", "due", "after"]
Status = Literal["waiting", "in_flight", "done", "stopped_early", "not_finite"]
LEFT: tuple[Status, ...] = ("done", "stopped_early", "not_finite")  # such an adapter is not trained any more


@dataclasses.dataclass(eq=False)
class AdapterRun:
    """The training of one adapter among many.

    Attributes:
        number: the adapter's place in the order of the data.
        directory: its directory's name under ``adapters/``.
        step_rows: rows of an optimizer step; the last step of an epoch may have fewer.
        slot, batches, lr_lambda: set while it is in flight. ``lr_lambda`` gives a step's factor of the learning rate.
        best: fp32 [numbers], the vectors of its best step, where the recipe asks for them.
        after: the scores of the vectors that are saved.
        reason: why the adapter is not saved: something was not finite, or memory ran out.
        sha256: of the file of its vectors, once that is written.
    """

    number: int
    rows: AdapterRows
    directory: str
    steps: int
    step_rows: int
    recipe: Recipe
    datasets: Datasets
    status: Status = "waiting"
    state: TrainState = dataclasses.field(default_factory=TrainState)
    slot: int | None = None
    batches: Batches | None = None
    lr_lambda: Callable[[int], float] | None = None
    best: torch.Tensor | None = None
    after: dict[str, Any] | None = None
    reason: str | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The adapter's name in the data."""
        return self.rows.name

    @property
    def has_left(self) -> bool:
        """Whether the adapter has left, and is not trained any more."""
        return self.status in LEFT

    @property
    def steps_left(self) -> int:
        """The optimizer steps that the adapter still has to take."""
        return 0 if self.has_left else self.steps - self.state.step

    @property
    def takes_no_step(self) -> bool:
        """Whether all steps are taken, or the adapter was stopped. Its last score may still be missing."""
        return self.reason is not None or self.state.stopped_early or not self.steps_left

    @property
    def next_evaluation(self) -> Purpose | None:
        """The reason to score the adapter now: before its first step, due by its recipe, or for the vectors to save."""
        if self.reason is not None or not len(self.rows.eval):
            return None
        if not self.state.step and self.state.before is None:
            return "before"
        if self.state.evaluation_due:
            return "due"
        return "after" if self.takes_no_step and self.after is None else None

    @property
    def owes_score(self) -> bool:
        """Whether its next evaluation gives a held-out loss of a step that none was given of yet."""
        return self.next_evaluation in ("before", "due") or (self.next_evaluation == "after" and self.best is None)

    @property
    def has_ended(self) -> bool:
        """Whether it has nothing left to do; it may still be in flight. It is saved unless it has a ``reason``."""
        return self.takes_no_step and self.next_evaluation is None

    @property
    def held_slot(self) -> int:
        """The slot of an adapter that is in flight."""
        assert self.slot is not None
        return self.slot

    def begin(self) -> None:
        """Make its batches and learning rates, once it has a slot."""
        self.batches = batches_of(self.recipe, self.datasets.train.take(self.rows.train))
        self.lr_lambda = lr_lambda(self.recipe.training, self.steps)

    def next_rows(self) -> list[int]:
        """The numbers of the training rows of its next step, the same as if it were trained alone."""
        assert self.batches is not None
        return [int(self.rows.train[row]) for row in self.batches.rows(self.state.step)]

    @property
    def rate(self) -> float:
        """The learning rate of its next step."""
        assert self.lr_lambda is not None
        return self.recipe.training.learning_rate * self.lr_lambda(self.state.step)

    @property
    def kept_step(self) -> int:
        """The step whose vectors are saved: the last one, or the best one where the recipe keeps those."""
        best = self.state.best_step
        return self.state.step if self.best is None or best is None else best

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the recipe asks for the held-out loss after the step that was taken last."""
        every = self.recipe.training.eval_steps
        return bool(len(self.rows.eval)) and every > 0 and self.state.step % every == 0

    def add_score(self, why: Purpose, result: dict[str, Any], vectors: torch.Tensor) -> bool:
        """Note a held-out loss of ``vectors`` [numbers]. Returns False where it only repeats that of an earlier step.

        Keeps the vectors of the best step where the recipe asks for them, and puts them back after the last step. A
        last loss that is not finite becomes a ``reason`` not to save.
        """
        training, is_new = self.recipe.training, True
        if why == "before":
            self.state.before = result
        elif why == "due":
            self.state.evaluation_due = False
            self.state.add_evaluation(result["loss"], training.early_stopping_patience)
            if training.load_best_model_at_end and self.state.best_step == self.state.step:
                self.best = vectors.to("cpu", copy=True)
            # after the last step this may be the score of the saved vectors, too: they need no pass of their own then
            if self.takes_no_step and not self.put_best_back(vectors):
                self.after = result
        else:
            self.after, is_new = result, self.best is None
        if self.after is not None and not has_finite_loss(self.after):
            self.reason, self.after = held_out_not_finite(f"step {self.state.step}", self.state.before), None
        return is_new

    def put_best_back(self, vectors: torch.Tensor) -> bool:
        """Write the best step's vectors over ``vectors`` [numbers]; False where there is nothing to change."""
        if self.best is None or self.state.best_step == self.state.step:
            return False
        vectors.copy_(self.best)
        return True


def adapter_runs(recipe: Recipe, datasets: Datasets) -> list[AdapterRun]:
    """Make all adapters of a run in the order of the data. InputError where a name can't be a directory's."""
    directories = directory_names([*(rows.name for rows in datasets.adapters), *datasets.adapters_without_rows])
    size = recipe.training.global_batch_size
    return [
        AdapterRun(
            number,
            rows,
            directories[rows.name],
            planned_steps(recipe, len(rows.train)),
            min(size, len(rows.train)),
            recipe,
            datasets,
        )
        for number, rows in enumerate(datasets.adapters)
    ]


def deal(steps: Sequence[int], ranks: int) -> list[list[int]]:
    """Share out the adapters by number, those with most steps first, each to the rank with least work so far."""
    load = [(0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for number in sorted(range(len(steps)), key=lambda number: -steps[number]):
        work, rank = heapq.heappop(load)
        dealt[rank].append(number)
        heapq.heappush(load, (work + steps[number], rank))
    return [sorted(numbers) for numbers in dealt]


class Roster:
    """The adapters of one process: the queue, and those in flight with their slots.

    ``left``: how many adapters are not trained any more. ``steps_behind``: the steps that were taken, and those that
    adapters gave up by leaving early.
    """

    def __init__(self, runs: Sequence[AdapterRun], slots: int, pass_rows: int | None) -> None:
        """Queue the ``runs`` (in the order of the data) that have not left. Those in flight keep their slots.

        ``pass_rows``: the most rows that a step of all in flight may have (one adapter may have more); None: no limit.
        """
        self.runs, self.slots, self.pass_rows = list(runs), slots, pass_rows
        waiting = [run for run in self.runs if run.status == "waiting"]
        self.queue = deque(sorted(waiting, key=lambda run: -run.steps))
        begun = [run for run in self.runs if run.status == "in_flight"]
        self.in_flight = sorted(begun, key=lambda run: (-run.steps, run.number))
        taken = {run.slot for run in begun}
        self._free = [slot for slot in range(slots) if slot not in taken]
        # counted as they come, since there may be a hundred thousand adapters
        self.left = sum(run.has_left for run in self.runs)
        self.steps_behind = sum(run.steps - run.steps_left for run in self.runs)

    @property
    def free_slots(self) -> int:
        """The number of adapters that may begin."""
        return len(self._free)

    def admit(self) -> list[AdapterRun]:
        """Let the next of the queue in while there is room; each gets a slot."""
        admitted: list[AdapterRun] = []
        while self.queue and self._free:
            # the head of the queue alone decides: a later one that fits may not overtake it
            rows = sum(run.step_rows for run in (*self.in_flight, self.queue[0]))
            if self.pass_rows is not None and self.in_flight and rows > self.pass_rows:
                break
            admitted.append(self.queue.popleft())
            self.enter(admitted[-1])
        return admitted

    def enter(self, run: AdapterRun) -> None:
        """Give an adapter the lowest free slot."""
        run.slot, run.status = heapq.heappop(self._free), "in_flight"
        self.in_flight.append(run)

    def leave(self, run: AdapterRun, status: Status) -> None:
        """Take an adapter out of the flight, and free its slot."""
        assert run.slot is not None
        self.in_flight.remove(run)
        heapq.heappush(self._free, run.slot)
        self.left += 1
        self.steps_behind += run.steps_left
        run.slot, run.status, run.batches, run.lr_lambda, run.best = None, status, None, None, None


def longest_pass(runs: Sequence[AdapterRun], lengths: np.ndarray, slots: int, pass_rows: int) -> list[int]:
    """Return the longest rows that may meet in a pass: a step's rows of each adapter, of ``slots`` adapters at most.

    ``lengths``: int [n], tokens of each training row.
    """
    rows: list[int] = []
    for run in runs:
        mine = run.rows.train
        rows += mine[np.argsort(-lengths[mine], kind="stable")[: run.step_rows]].tolist()
    most = sum(sorted((run.step_rows for run in runs), reverse=True)[:slots])
    return sorted(rows, key=lambda row: -lengths[row])[: min(pass_rows, most)]
