"""The optimizer step that all trainings take: passes → loss → backward → clip and step.

`AloneLoop` trains one adapter; its processes share the rows of each step. `bank_loop.BankLoop` trains many in the slots
of a bank, in forward passes that they share. Steps yield between passes: a server answers there (`online`).
"""

import copy
import dataclasses
import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Self, TypeVar

import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LRScheduler

from qvera.adapters.hooks import TrainingHook, TrainingHooks
from qvera.adapters.methods import method_of
from qvera.adapters.projection import forget_inputs
from qvera.adapters.save_load import rate_factors, trained_vectors
from qvera.config import plugins
from qvera.config.sections import LrRange
from qvera.data import Batches, Datasets, Example, batches_of, planned_steps
from qvera.distributed.group import ALONE, Group
from qvera.models.attention import rows_joined
from qvera.training.checkpoint import TrainState, generator_states, set_generator_states
from qvera.training.engine import LocalEngine
from qvera.training.failures import lone_error, longest_batch_error, not_finite_error, step_error
from qvera.training.optim import build_optimizer, build_range_test, build_schedule, require_all_stepped
from qvera.training.plan import Plan, longest_rows
from qvera.training.session import TrainingSession
from qvera.utils import memory
from qvera.utils.errors import OwnCodeFailed, RunFailed
from qvera.utils.memory import Shortage, or_shortage

Records = list[dict[str, Any]]
Row = TypeVar("Row")
T = TypeVar("T")


@dataclasses.dataclass
class Step(Generic[Row]):
    """An optimizer step that is being taken.

    Attributes:
        number: counted from 1; with a bank, the number of the round.
        rows: the rows of the step, over all processes.
        passes: the forward passes that this process has still to take, each a list of rows.
        examples: the tokenized rows of the latest pass; empty before the first one.
        pass_rows: the rows of each pass taken so far.
        losses: the loss of each pass taken so far: its sum (scalar), or that of each row [B].
    """

    number: int
    rows: list[Row]
    passes: list[list[Row]]
    examples: list[Example] = dataclasses.field(default_factory=list, kw_only=True)
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list, kw_only=True)
    pass_rows: list[list[Row]] = dataclasses.field(default_factory=list, kw_only=True)
    began: float = dataclasses.field(default=0.0, kw_only=True)  # later by the time between passes (`Loop.take_step`)

    @property
    def seconds(self) -> float:
        """The seconds that the step has taken so far, without the time between passes."""
        return time.perf_counter() - self.began


S = TypeVar("S", bound=Step[Any])


class Loop(ABC, Generic[S]):
    """Takes optimizer steps, one for each `take_step`."""

    model: PeftModel
    device: torch.device
    hooks: TrainingHooks = TrainingHooks()
    plan: Plan | None = None
    group: Group = ALONE  # the processes that take a step together
    step: S | None = None  # the one that is being taken

    def take_step(self) -> Iterator[Records]:
        """Take one optimizer step: yields [] after each pass, and its records at the end.

        A step that can't be taken is undone and leaves a record that says so, or raises. The next call takes it again.

        Raises:
            NotFinite: the loss or the gradient is not finite; no step was taken.
            OutOfMemory: memory ran out and smaller passes can't help; no step was taken.
            RunFailed: memory ran out in the optimizer.
        """
        # a step that is undone goes back to this state, so that its next attempt drops out the same elements
        random, began = generator_states(self.group.rank), time.perf_counter()
        step = self.step = self.next_step()
        step.began = began  # before its rows were chosen: a task may let the model answer for them
        self.hooks.before_step(step.number)
        shortage: Shortage | None = None
        while step.passes and shortage is None:
            try:
                shortage = or_shortage(lambda: self.do_pass(step), self.device)  # rows → loss → backward
            except OwnCodeFailed:
                self.undo(random)  # the run ends, and saves the state after the last whole step (`Run.end`)
                raise
            if shortage is None:
                left = time.perf_counter()
                yield []
                step.began += time.perf_counter() - left
        if self.add_up(step, shortage):  # some process ran out of memory
            self.undo(random)
            records = self.make_smaller(step, shortage)
        else:
            norms = or_shortage(lambda: self.clip_and_step(step), self.device)
            half_stepped = isinstance(norms, Shortage)
            records = self.give_up(step, norms) if half_stepped else self.count_step(step, norms)
        # before the last yield: who runs there may let adapters leave, and must not find a step under way
        self.step = None
        yield records

    @abstractmethod
    def next_step(self) -> S:
        """Choose the rows of the next step and cut them into forward passes."""

    @abstractmethod
    def do_pass(self, step: S) -> None:
        """Take forward and backward of the first pass that is left, and remove it from ``step.passes``."""

    @abstractmethod
    def add_up(self, step: S, shortage: Shortage | None) -> bool:
        """Add up the losses of all passes and processes; return True where a process ran out of memory."""

    def undo(self, random: dict[str, torch.Tensor]) -> None:
        """Leave no trace of the passes that were taken. ``random``: the generators' states before the step."""
        self.drop_gradients()
        forget_inputs(self.model)  # a pass that failed has left projections in the layers
        set_generator_states(random, self.group.rank)

    @abstractmethod
    def drop_gradients(self) -> None:
        """Drop the gradients that the passes of a step have left."""

    @abstractmethod
    def make_smaller(self, step: S, shortage: Shortage | None) -> Records:
        """Cut later passes smaller, or raise where that can't help. ``shortage``: None if only others had one."""

    @abstractmethod
    def clip_and_step(self, step: S) -> Any:
        """Clip the gradients and step. Returns the norms before clipping, and what else `count_step` needs."""

    def give_up(self, step: S, shortage: Shortage) -> Records:
        """Raise where memory ran out in the optimizer: some vectors are stepped and some not, so no undo helps."""
        raise RunFailed(f"Memory ran out in the optimizer's step: {shortage}. Earlier checkpoints are kept.")

    @abstractmethod
    def count_step(self, step: S, norms: Any) -> Records:
        """Count a step that was taken; returns its records for metrics.jsonl."""


@dataclasses.dataclass
class AloneStep(Step[int]):
    """A step of one adapter. A row is its number in ``source``.

    Attributes:
        source: the training rows, or what the task makes of some of them (`qvera.tasks.Task.step_rows`).
        targets: the number that the loss is divided by; 0 until the first pass.
        trained_tokens: those of all rows; as ``targets``.
        sums: the summed loss of each pass of this process, as numbers.
        total: the summed loss of all passes of all processes.
    """

    source: Sequence[Example]
    targets: int = 0
    trained_tokens: int = 0
    input_tokens: int = 0
    sums: list[float] = dataclasses.field(default_factory=list)
    total: float = 0.0


class AloneLoop(Loop[AloneStep]):
    """The loop of one adapter. All processes call each method together, each with its share of the rows.

    Hooks of methods and schedules know it as ``training`` (`qvera.adapters.hooks.TrainingHook`).
    """

    engine: LocalEngine

    def __init__(self, session: TrainingSession, ramp: LrRange | None = None) -> None:
        """Make the order of rows, the optimizer, its schedule and the hooks. ``ramp``: the rates of a range test."""
        self.session, self.recipe, self.group = session, session.recipe, session.group
        self.model, self.device, self.plan = session.model, session.device, session.plan
        self.datasets, self.task, self.warn = session.datasets, session.task, session.warn
        recipe, training, method = self.recipe, self.recipe.training, method_of(self.recipe.adapter)
        self.state, self.batches = TrainState(), batches_of(recipe, self.datasets.train)
        vectors, stepper = trained_vectors(self.model), method.optimizer(self.model, recipe)
        if stepper is not None:
            require_all_stepped(stepper, vectors, recipe)
        self.optimizer = stepper or build_optimizer(training, vectors, rate_factors(self.model, recipe))
        self.steps = planned_steps(recipe, len(self.datasets.train))
        # a checkpoint keeps the state of each hook under its name here
        hooks: dict[str, TrainingHook | None] = {
            recipe.adapter.method: method.step_hook(self.model, recipe, self.optimizer, self.steps, self.group)
        }
        for schedule in plugins.schedules_of(data=recipe.data, adapter=recipe.adapter, training=training):
            hooks[schedule.name] = schedule.hook(self)
        hooks[training.objective] = self.task.step_hook()
        self.hooks = TrainingHooks({name: hook for name, hook in hooks.items() if hook is not None})
        if ramp is not None:
            self.steps = ramp.steps
        self.schedule: LRScheduler = (
            build_schedule(training, self.optimizer, self.steps)
            if ramp is None
            else build_range_test(training, self.optimizer, ramp)
        )

    def start(self) -> None:
        """Prepare the model, try the longest batch and build the engine. InputError if the batch does not fit."""
        session, is_new = self.session, self.state.step == 0
        session.prepare_model(start=lambda: self.hooks.start(self) if is_new else None)

        def try_longest() -> None:
            if is_new and self.steps and self.recipe.training.try_longest_batch:
                session.try_longest_batch(self.longest_batch(), self.try_batch)

        if session.sharder is None:
            self.group.agree(try_longest)
        self.engine = self.make_engine()
        if session.sharder is not None:
            # With ZeRO-3 the engine's hooks gather the weights, so the engine comes first. `agree` would be of no use:
            # while a rank fails, the others wait inside the pass, and hear of it from its heartbeat.
            try_longest()
            self.engine.forget_module_order()

    def make_engine(self) -> LocalEngine:
        """Return an engine of plain torch, or of DeepSpeed where the recipe asks for it."""
        session, training, stepped = self.session, self.recipe.training, (self.optimizer, self.schedule)
        if session.zero is None:
            vectors = trained_vectors(self.model)
            return LocalEngine(vectors, *stepped, training.max_grad_norm, self.group, session.scaler)
        from qvera.training.zero_engine import ZeroEngine

        scratch = session.run_dir / "offload"
        return ZeroEngine(session.zero, training, self.model, *stepped, self.group, scratch, session.scaler)

    def longest_batch(self) -> list[Example]:
        """Return the rows of the run's longest forward pass."""
        data, rows = self.recipe.data, self.datasets.train
        joined = rows_joined(self.model, data.prefix_once and self.task.joins_rows, data.packing)
        return [rows[i] for i in longest_rows(self.recipe, rows, joined, self.steps)]

    def try_batch(self, examples: list[Example]) -> None:
        """Take forward and backward over the rows, and drop the gradients."""
        nll, trained = self.nll(examples)
        # not `backward`: that would leave gradients in the vectors, and in the buffers that DeepSpeed hooks to them
        torch.autograd.grad(nll / trained, list(trained_vectors(self.model).values()), allow_unused=True)

    def train_step(self) -> dict[str, Any]:
        """Take an optimizer step on the mean loss over the global batch's targets; returns its metrics.jsonl record.

        Its kind is ``train``, or ``skipped`` or ``out_of_memory`` where no step was taken. ``learning_rate`` and
        ``loss_scale`` are those that the step was taken with.
        """
        *_, [record] = self.take_step()
        return record

    def next_step(self) -> AloneStep:
        group, rows, number = self.group, self.batches.rows(self.state.step), self.state.step + 1
        source: Sequence[Example] = self.datasets.train
        taught = rows
        self.task.forget_metrics()
        if (made := self.task.step_rows(self.model, rows, number, group)) is not None:
            source, rows = made, list(range(len(made)))
            taught = [row for row in rows if self.task.has_gradient(made[row])]
        # a step needs a pass, be it one without rows
        return AloneStep(number, rows, self.batches.passes(taught, group.rank, group.world_size) or [[]], source)

    def do_pass(self, step: AloneStep) -> None:
        """Take a pass; a process that has no rows in it runs a dummy one, so that collectives stay in sync."""
        train, engine = step.source, self.engine
        if not step.targets:  # here, where too little memory for the rows is a shortage too
            rows = [train[i] for i in step.rows]
            step.targets, step.trained_tokens = self.task.targets(rows), sum(row.trained_tokens for row in rows)
        rows_here = step.passes[0]
        step.examples = [self.task.training_row(train[i], i, step.number) for i in rows_here or step.rows[:1]]
        # in float16 small gradients vanish, unless backward's factors are multiplied in before rounding
        expected_grad = None if engine.scaler is None else engine.loss_gradient() / step.targets
        nll, _ = self.nll(step.examples, engine.core, expected_grad)
        # divided by the targets of the whole global batch, so that neither accumulation nor ranks change the mean
        engine.backward(nll / step.targets if rows_here else nll * 0.0, last=len(step.passes) == 1)
        step.passes.pop(0)
        if rows_here:
            step.losses.append(nll.detach())
            step.pass_rows.append(rows_here)
            self.task.count_pass()

    def nll(
        self,
        rows: list[Example],
        core: Callable[..., torch.Tensor] | None = None,
        expected_grad: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int]:
        """Return the summed loss of the rows' targets, and their number (`qvera.tasks.Task.loss`)."""
        return self.task.loss(self.model, rows, core, expected_grad)

    def add_up(self, step: AloneStep, shortage: Shortage | None) -> bool:
        """Add up losses and tokens. Under ZeRO a shortage raises: the others wait inside DeepSpeed's passes."""
        group, train = self.group, step.source
        if shortage is not None and self.session.zero is not None and group.world_size > 1:
            raise lone_error(step.number, shortage, step.examples, self.plan, group)
        # all passes at once, so that the device is waited for once
        step.sums = torch.stack(step.losses).tolist() if step.losses and shortage is None else []
        input_tokens = sum(sum(train[i].row_tokens) for rows in step.pass_rows for i in rows) if step.sums else 0
        step.total, inputs, failed = group.sum([sum(step.sums), input_tokens, float(shortage is not None)])
        step.input_tokens = int(inputs)
        return bool(failed)

    def clip_and_step(self, step: AloneStep) -> tuple[float, float]:
        """Clip and step; returns the gradient's norm and the learning rate. A loss that is not finite takes no step."""
        return self.engine.step() if math.isfinite(step.total) else (math.nan, 0.0)

    def count_step(self, step: AloneStep, norms: tuple[float, float]) -> Records:
        """Count a step. One whose gradient overflowed in float16 was not taken, and is taken again at a lower scale."""
        (norm, rate), engine, train = norms, self.engine, step.source
        if math.isfinite(norm):
            self.hooks.after_step(step.number, engine.loss_scale)
        seconds, loss = step.seconds, step.total / step.targets
        scaling = {} if engine.scaler is None else {"loss_scale": engine.loss_scale}
        if not math.isfinite(norm):
            if math.isfinite(step.total) and engine.can_step_again():
                self.state.skipped_steps += 1
                self.state.train_seconds += seconds
                return [{"kind": "skipped", "step": step.number, "loss": loss, "step_seconds": seconds, **scaling}]
            sources = [[train[i].source for i in rows] for rows in step.pass_rows]
            step_rows = [train[i].source for i in step.rows]
            raise not_finite_error(step.number, step.sums, norm, sources, step_rows, self.group)
        self.state.add_step(loss, seconds, step.input_tokens)
        self.state.grad_norm_last = norm
        record = {
            "kind": "train",
            "step": step.number,
            "epoch": round(step.number / self.batches.per_epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            **scaling,
            "trained_tokens": step.trained_tokens,
            "input_tokens": step.input_tokens,
            "step_seconds": seconds,
            "tokens_per_second": step.input_tokens / seconds,
            "memory_bytes": memory.memory_bytes(self.device),
            "peak_bytes": self.session.watch.peak_bytes,
            **self.task.take_metrics(self.group),
            **self.hooks.metrics(),
        }
        return [record]

    def drop_gradients(self) -> None:
        self.engine.undo()

    def make_smaller(self, step: AloneStep, shortage: Shortage | None) -> Records:
        """Halve the passes. OutOfMemory with ``training.on_oom: save``, or where a pass had a single row."""
        group, packed = self.group, self.recipe.data.packing
        examples = None if shortage is None else step.examples
        size = sum(len(example.input_ids) for example in step.examples) if packed else len(step.examples)
        half = size // 2 if len(step.examples) > 1 else 0  # 0, too, where no pass had begun
        of_ranks = group.gather(None if shortage is None else [shortage.asked_bytes, shortage.free_bytes, half])
        failed = [sizes for sizes in of_ranks if sizes is not None]
        asked, free, halves = zip(*failed, strict=True)
        shortage = Shortage(max((each for each in asked if each is not None), default=None), min(free))
        most = min(halves)  # one limit for all ranks: each cuts the rows of all of them, to have as many passes
        if self.recipe.training.on_oom == "save" or most == 0:
            raise step_error(f"Step {step.number}", shortage, examples, self.plan, group)
        self.batches.limit(most)
        limit, seconds = {"pass_tokens" if packed else "pass_rows": most}, step.seconds
        self.state.halvings = [*self.state.halvings, {"step": step.number, **limit}]
        self.state.train_seconds += seconds
        about = {**dataclasses.asdict(shortage), **limit, "step_seconds": seconds}
        return [{"kind": "out_of_memory", "step": step.number, **about}]

    def held_out_loss(self, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Return loss and scores of all held-out rows, equal on all ranks. ``progress`` gets this rank's rows."""
        result = self.task.held_out_loss(self.model, self.datasets.eval, self.group, progress)
        return self.group.broadcast(result)  # the ranks' own would differ in their seconds

    def over_passes(self, rows: list[int], do: Callable[[list[list[int]]], T], what: str) -> T:
        """Return what ``do`` makes of this rank's passes over training rows; all ranks call it together.

        Where memory runs out on one of them, all begin again with passes of half the size; what ``do`` returned is
        dropped. Later steps keep their passes. InputError with ``training.on_oom: save``, or a single row in a pass.
        ``what`` begins the warning, as ``The gradient of the first rows``.
        """
        group, train, batches = self.group, self.datasets.train, copy.copy(self.batches)
        while True:
            passes = batches.passes(rows, group.rank, group.world_size)
            result = or_shortage(functools.partial(do, passes), self.device)
            forget_inputs(self.model)
            mine = dataclasses.astuple(result) if isinstance(result, Shortage) else None
            short = [Shortage(*sizes) for sizes in group.gather(mine) if sizes]
            if not isinstance(result, Shortage) and not short:
                return result
            # a rank whose own passes did fit begins again too: the ranks may add up their results
            largest = [train[i] for i in max(passes, key=len)]
            sizes = group.gather([len(largest), sum(len(example.input_ids) for example in largest)])
            most, tokens = (max(each) for each in zip(*sizes, strict=True))
            if self.recipe.training.on_oom == "save" or most == 1:
                raise longest_batch_error(short[0], self.plan, self.recipe.data.path, largest)
            self.warn(f"{what} does not fit into memory ({short[0]}): its passes are halved.")
            batches.limit((tokens if self.recipe.data.packing else most) // 2)

    def branch(
        self, datasets: Datasets, batches: Batches, optimizer: torch.optim.Optimizer, schedule: LRScheduler
    ) -> Self:
        """Return a loop that trains the same model on other rows from step 0 without hooks. This one stays as it is."""
        other = copy.copy(self)
        other.datasets, other.batches, other.optimizer, other.schedule = datasets, batches, optimizer, schedule
        other.state, other.hooks = TrainState(), TrainingHooks()
        other.engine = other.make_engine()
        return other
