"""The optimizer step that all trainings take: passes → loss → backward → clip and step.

`AloneLoop` trains one adapter; its processes share the rows of each step. `BankLoop` trains many in the slots of a
bank, in forward passes that they share. Each row names its slot, and its loss is divided by the trained tokens of its
own adapter's step. So an adapter's gradient does not depend on the others, up to rounding.

Steps, and evaluations of a bank, yield between passes: a server answers there (`online`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from qvera.adapters.hooks import TrainingHooks
from qvera.adapters.projection import forget_inputs
from qvera.data import Example, microbatches
from qvera.distributed.group import ALONE
from qvera.evaluation import held_out
from qvera.models import forward
from qvera.training.checkpoint import TrainState, random_state, set_random_state
from qvera.training.failures import lone_error, not_finite_error, not_finite_text, step_error, worst
from qvera.utils import memory
from qvera.utils.errors import OutOfMemory, RunFailed
from qvera.utils.out_of_memory import Shortage, each_in_halves, or_shortage

if TYPE_CHECKING:
    from collections.abc import Generator

    from peft import PeftModel

    from qvera.adapters.bank import AdapterBank
    from qvera.config.schema import Recipe
    from qvera.data import Batches, Datasets
    from qvera.distributed.group import Group
    from qvera.distributed.zero_config import ZeroConfig
    from qvera.tasks import Task
    from qvera.training.engine import LocalEngine
    from qvera.training.optim import BankAdamW
    from qvera.training.plan import Plan
    from qvera.training.roster import AdapterRun

Records = list[dict[str, Any]]


@dataclasses.dataclass
class Step:
    """An optimizer step that is being taken. With a bank, tokens, targets and sums are dicts by adapter.

    Attributes:
        number: from 1; with a bank, that of the round.
        rows: of all processes: numbers of training rows, or `AdapterRow`s.
        passes: those of this process that are left.
        targets: what the loss is divided by.
        examples: of the latest pass; empty before the first one.
        pass_rows, losses: of each pass so far, its rows, and its summed loss (scalar) or that of each row [B].
        sums, total: the losses as numbers: of each pass here (with a bank, by adapter), and of all processes.
    """

    number: int
    rows: list[Any]
    passes: list[list[Any]]
    targets: Any = None
    trained_tokens: Any = 0
    input_tokens: Any = 0
    examples: list[Example] = dataclasses.field(default_factory=list)
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)
    pass_rows: list[list[Any]] = dataclasses.field(default_factory=list)
    sums: Any = None
    total: float = 0.0
    _before: float = 0.0
    _since: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds so far, without the time between passes."""
        return self._before + time.perf_counter() - self._since

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this context does not count."""
        self._before = self.seconds
        try:
            yield
        finally:
            self._since = time.perf_counter()


class Loop(ABC):
    """Takes optimizer steps, one for each `take_step`."""

    recipe: Recipe
    model: PeftModel
    device: torch.device
    hooks: TrainingHooks = TrainingHooks()
    plan: Plan | None = None
    step_group: Group = ALONE  # the processes that take a step together
    step: Step | None = None  # the one that is being taken

    def take_step(self) -> Iterator[Records]:
        """Take one optimizer step: yields [] after each pass, and its records at the end.

        A step that can't be taken is undone and leaves a record that says so, or raises. The next call takes it again.

        Raises:
            NotFinite: the loss or the gradient is not finite; no step was taken.
            OutOfMemory: memory ran out and smaller passes can't help; no step was taken.
            RunFailed: memory ran out in the optimizer.
        """
        random = random_state(self.step_group.rank)
        step = self.step = self.next_step()
        self.hooks.before_step(step.number)
        shortage: Shortage | None = None
        while step.passes and shortage is None:
            shortage = or_shortage(lambda: self.do_pass(step), self.device)  # rows → loss → backward
            if shortage is None:
                with step.paused():
                    yield []
        if self.add_up(step, shortage):  # some process ran out of memory
            self.drop_gradients()
            forget_inputs(self.model)
            set_random_state(random, self.step_group.rank)
            records = self.make_smaller(step, shortage)
        else:
            norms = or_shortage(lambda: self.clip_and_step(step), self.device)
            if isinstance(norms, Shortage):
                raise RunFailed(f"Memory ran out in the optimizer's step: {norms}. Earlier checkpoints are kept.")
            records = self.count_step(step, norms)
        self.step = None
        yield records

    @abstractmethod
    def next_step(self) -> Step:
        """Choose the rows of the next step and cut them into passes."""

    @abstractmethod
    def do_pass(self, step: Step) -> None:
        """Take the first of the passes that are left: forward and backward."""

    @abstractmethod
    def add_up(self, step: Step, shortage: Shortage | None) -> bool:
        """Add up the losses of all passes and processes; True where one of them ran out of memory."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """Undo what the passes of a step have left."""

    @abstractmethod
    def make_smaller(self, step: Step, shortage: Shortage | None) -> Records:
        """Cut later passes smaller, or raise where it can't help; ``shortage`` None: only another process had one."""

    @abstractmethod
    def clip_and_step(self, step: Step) -> Any:
        """Clip and step; returns the norms before clipping, and what else `count_step` needs."""

    @abstractmethod
    def count_step(self, step: Step, norms: Any) -> Records:
        """Count a step that was taken; returns its records for metrics.jsonl."""


class AloneLoop(Loop):
    """One adapter. All processes call each method together, each with its share of the rows."""

    datasets: Datasets
    task: Task
    state: TrainState
    batches: Batches
    engine: LocalEngine
    zero: ZeroConfig | None
    watch: memory.PeakWatch

    def next_step(self) -> Step:
        """See `Loop.next_step`."""
        group, rows = self.step_group, self.batches.rows(self.state.step)
        self.task.forget_metrics()
        return Step(self.state.step + 1, rows, self.batches.passes(rows, group.rank, group.world_size))

    def do_pass(self, step: Step) -> None:
        """See `Loop.do_pass`. A process without rows runs a dummy pass, so that collectives stay in sync."""
        train, engine = self.datasets.train, self.engine
        if step.targets is None:
            rows = [train[i] for i in step.rows]
            step.targets, step.trained_tokens = self.task.targets(rows), sum(row.trained_tokens for row in rows)
        rows_here = step.passes[0]
        step.examples = [
            self.task.training_row(train[i], i, step.number, self.recipe) for i in rows_here or step.rows[:1]
        ]
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
        """Summed loss of the rows' targets, and how many there are (`qvera.tasks.Task.loss`)."""
        return self.task.loss(self.model, rows, self.datasets, self.recipe, core, expected_grad)

    def add_up(self, step: Step, shortage: Shortage | None) -> bool:
        """See `Loop.add_up`. Under ZeRO a shortage raises: the other processes wait inside DeepSpeed's passes."""
        group, train = self.step_group, self.datasets.train
        if shortage is not None and self.zero is not None and group.world_size > 1:
            raise lone_error(step.number, shortage, step.examples, self.plan, train, group)
        losses: list[float] = torch.stack(step.losses).tolist() if step.losses and shortage is None else []
        input_tokens = sum(sum(train[i].row_tokens) for rows in step.pass_rows for i in rows) if losses else 0
        step.sums = losses
        step.total, inputs, failed = group.sum([sum(losses), input_tokens, float(shortage is not None)])
        step.input_tokens = int(inputs)
        return bool(failed)

    def drop_gradients(self) -> None:
        """See `Loop.drop_gradients`."""
        self.engine.undo()

    def make_smaller(self, step: Step, shortage: Shortage | None) -> Records:
        """See `Loop.make_smaller`: halves passes. Raises with ``training.on_oom: save``, or a single row in a pass."""
        group, train, packed = self.step_group, self.datasets.train, self.recipe.data.packing
        examples = None if shortage is None else step.examples
        size = sum(len(example.input_ids) for example in step.examples) if packed else len(step.examples)
        half = size // 2 if len(step.examples) > 1 else 0  # 0, too, where no pass had begun
        of_ranks = group.gather(None if shortage is None else [shortage.asked_bytes, shortage.free_bytes, half])
        failed = [sizes for sizes in of_ranks if sizes is not None]
        shortage = worst([Shortage(*sizes[:2]) for sizes in failed])
        most = min(sizes[2] for sizes in failed)
        if self.recipe.training.on_oom == "save" or most == 0:
            raise step_error(f"Step {step.number}", shortage, examples, self.plan, train, group)
        self.batches.limit(most)
        limit = {"pass_tokens" if packed else "pass_rows": most}
        seconds = step.seconds
        self.state.add_halving(step.number, limit, seconds)
        about = {**dataclasses.asdict(shortage), **limit, "step_seconds": seconds}
        return [{"kind": "out_of_memory", "step": step.number, **about}]

    def clip_and_step(self, step: Step) -> Any:
        """See `Loop.clip_and_step`: the gradient's norm and the learning rate."""
        return self.engine.step() if math.isfinite(step.total) else (math.nan, 0.0)

    def count_step(self, step: Step, norms: tuple[float, float]) -> Records:
        """See `Loop.count_step`. With loss scaling, a gradient that overflows takes no step and lowers the scale."""
        (norm, rate), engine, train = norms, self.engine, self.datasets.train
        if math.isfinite(norm):
            self.hooks.after_step(step.number, engine.loss_scale)
        seconds, loss = step.seconds, step.total / step.targets
        scaling = {} if engine.scaler is None else {"loss_scale": engine.loss_scale}
        if not math.isfinite(norm):
            if math.isfinite(step.total) and engine.can_step_again():
                self.state.add_skipped_step(seconds)
                return [{"kind": "skipped", "step": step.number, "loss": loss, "step_seconds": seconds, **scaling}]
            sources = [[train[i].source for i in rows] for rows in step.pass_rows]
            step_rows = [train[i].source for i in step.rows]
            raise not_finite_error(step.number, step.sums, norm, sources, step_rows, self.step_group)
        self.state.add_step(loss, seconds, step.input_tokens)
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
            "peak_bytes": self.watch.peak_bytes,
            **self.task.take_metrics(self.step_group),
            **self.hooks.metrics(),
        }
        return [record]


class AdapterRow(NamedTuple):
    """A training row of a step of many adapters."""

    run: AdapterRun
    row: int  # its number in the training rows of the run


def cut_round(rows: Sequence[AdapterRow], lengths: Sequence[int], pass_rows: int) -> list[list[AdapterRow]]:
    """Cut a round into forward passes of rows of like length. ``lengths``: tokens of each of ``rows``."""
    by_length = sorted(range(len(rows)), key=lambda place: lengths[place])
    return list(microbatches([rows[place] for place in by_length], pass_rows))


class BankLoop(Loop):
    """Many adapters: a step is a round, one optimizer step of each in flight that has steps left.

    ``round``: how many rounds were taken. ``pass_rows``: the most rows of a pass.
    """

    bank: AdapterBank
    adamw: BankAdamW
    round: int = 0
    pass_rows: int
    logs_all_scores: ClassVar[bool] = False  # also those before and after training, which no eval_steps asked for

    @property
    @abstractmethod
    def in_flight(self) -> list[AdapterRun]:
        """The adapters that have a slot, in the order in which they began."""

    @property
    def pad_id(self) -> int:
        """The padding token, which all adapters share."""
        return self.in_flight[0].datasets.pad_id

    def take_round(self) -> Iterator[Records]:
        """Make the evaluations that are wanted, take a step, and evaluate where it is due; yields between passes."""
        yield from self.evaluate()
        if any(not run.takes_no_step for run in self.in_flight):
            yield from self.take_step()
        yield from self.evaluate()

    def next_step(self) -> Step:
        """See `Loop.next_step`."""
        runs = [run for run in self.in_flight if not run.takes_no_step]
        rows = [AdapterRow(run, row) for run in runs for row in run.next_rows()]
        tokens, inputs = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0)
        for run, row in rows:
            tokens[run] += int(run.datasets.train.trained_tokens[row])
            inputs[run] += int(run.datasets.train.lengths[row])
        lengths = [int(run.datasets.train.lengths[row]) for run, row in rows]
        passes = cut_round(rows, lengths, self.pass_rows)
        return Step(self.round + 1, rows, passes, tokens, tokens, inputs)

    def drop_run(self, run: AdapterRun) -> None:
        """Take an adapter out of the step under way: it is not stepped, and no later pass has its rows."""
        step = self.step
        if step is not None and run in step.targets:
            step.targets = {other: count for other, count in step.targets.items() if other is not run}
            step.rows = [row for row in step.rows if row.run is not run]
            left = [[row for row in rows if row.run is not run] for rows in step.passes]
            step.passes[:] = [rows for rows in left if rows]

    def do_pass(self, step: Step) -> None:
        """See `Loop.do_pass`."""
        rows = step.passes[0]
        step.examples = [run.datasets.train[row] for run, row in rows]
        weights = [1 / step.targets[run] for run, _ in rows]
        step.losses.append(self.pass_nll([run.held_slot for run, _ in rows], step.examples, weights))
        step.pass_rows.append(step.passes.pop(0))

    def pass_nll(
        self, slots: Sequence[int], examples: Sequence[Example], weights: Sequence[float] | None = None
    ) -> torch.Tensor:
        """Negative log likelihood of each row of a pass [B]; adds the gradient of its weighted sum to the bank.

        ``slots`` and ``weights`` are of each row. Without weights no gradient is computed.
        """
        training = self.recipe.training
        batch = forward.make_batch(self.model, examples, self.pad_id, prefix_once=False, whole_rows=True)
        row_weights = torch.tensor(weights or [1.0] * len(slots), dtype=torch.float32).to(self.device)
        tokens = forward.row_tokens(batch, examples)
        with self.bank.rows(slots, tokens), torch.set_grad_enabled(weights is not None):
            smoothing = 0.0 if weights is None else training.label_smoothing
            total, nll = forward.row_nll(self.model, batch, training.loss_chunk_tokens, row_weights, smoothing)
            if weights is not None:
                total.backward()
        return nll

    def add_up(self, step: Step, shortage: Shortage | None) -> bool:
        """See `Loop.add_up`. Read once, so that a device is not waited for pass by pass."""
        step.sums = dict.fromkeys(step.input_tokens, 0.0)
        if shortage is None and step.losses:
            for (run, _), nll in zip(
                (row for rows in step.pass_rows for row in rows), torch.cat(step.losses).tolist(), strict=True
            ):
                step.sums[run] += nll
        return shortage is not None

    def drop_gradients(self) -> None:
        """See `Loop.drop_gradients`. It drops those of all adapters, since some have a part of the pass."""
        self.bank.gradients.zero_()

    def clip_and_step(self, step: Step) -> Any:
        """See `Loop.clip_and_step`: norm and rate of each adapter; one whose loss is not finite has none."""
        runs = [run for run in step.targets if math.isfinite(step.sums[run])]
        rates = [run.rate for run in runs]
        norms = self.adamw.step([run.held_slot for run in runs], rates)
        return dict(zip(runs, zip(norms, rates, strict=True), strict=True))

    def count_step(self, step: Step, norms: dict[AdapterRun, tuple[float, float]]) -> Records:
        """See `Loop.count_step`: a record of each adapter that took its step. The others get a ``reason``."""
        self.round, seconds, records = step.number, step.seconds, []
        for run in step.targets:
            loss = step.sums[run] / step.targets[run]
            norm, rate = norms.get(run, (math.nan, 0.0))
            if not math.isfinite(norm):
                rows = [run.datasets.train[row].source for other, row in step.rows if other is run]
                run.reason = not_finite_text(f"step {run.state.step + 1}", [loss], norm, rows)
                continue
            # a share of the round's time, so that the adapters' seconds add up to it
            share = step.input_tokens[run] / sum(step.input_tokens.values())
            run.state.add_step(loss, share * seconds, step.input_tokens[run])
            run.state.evaluation_due = run.evaluation_is_due
            assert run.batches is not None
            records.append(
                {
                    "kind": "train",
                    "adapter": run.name,
                    "round": step.number,
                    "step": run.state.step,
                    "epoch": round(run.state.step / run.batches.per_epoch, 4),
                    "loss": loss,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "trained_tokens": step.targets[run],
                    "input_tokens": step.input_tokens[run],
                }
            )
        return records

    def evaluate(self) -> Iterator[Records]:
        """Compute the held-out losses that adapters in flight want, until none does; yields [] between passes."""
        while scored := [(run, why, run.state) for run in self.in_flight if (why := run.next_evaluation) is not None]:

            def is_in_flight(place: int, scored: Sequence[Any] = scored) -> bool:
                run, _, state = scored[place]
                return run.slot is not None and run.state is state  # it may have left and begun again

            for run, why, _ in scored:
                if why == "after":
                    run.put_best_back(self.bank.vectors[run.held_slot])
            wanted = [(run, run.held_slot) for run, *_ in scored]
            try:
                results = yield from self.score(wanted, is_in_flight)
            except OutOfMemory as error:
                self.scores_failed(error, [scored[place][0] for place in self._scoring if is_in_flight(place)])
                continue
            records = []
            for place, ((run, why, _), result) in enumerate(zip(scored, results, strict=True)):
                if result is None or not is_in_flight(place):
                    continue
                is_new = run.add_score(why, result, self.bank.vectors[run.held_slot])
                if why == "due" or (is_new and self.logs_all_scores):
                    about = {"kind": "eval", "round": self.round, "adapter": run.name, "step": run.state.step}
                    records.append({**about, **result})
            yield records

    def scores_failed(self, error: OutOfMemory, runs: Sequence[AdapterRun]) -> None:
        """Called where memory does not suffice for a held-out row of these adapters; here the run ends."""
        raise error

    def score(
        self, wanted: Sequence[tuple[AdapterRun, int]], is_wanted: Callable[[int], bool] = lambda _: True
    ) -> Generator[Records, None, list[dict[str, Any] | None]]:
        """Held-out losses of several adapters, in passes that they share; yields between passes.

        ``wanted``: each adapter, and the slot of the vectors to score. ``is_wanted``: asked before each pass whether
        the adapter at a place of ``wanted`` is still to be scored. Returns for each adapter what
        `held_out.held_out_loss` returns, with the seconds of all; None: it has no rows. OutOfMemory where a single row
        does not fit.
        """
        began, losses = time.perf_counter(), list[tuple[list[tuple[int, int]], torch.Tensor]]()
        rows = [(place, row) for place, (run, _) in enumerate(wanted) for row in run.rows.eval.tolist()]
        rows.sort(key=lambda place_row: wanted[place_row[0]][0].datasets.eval.lengths[place_row[1]])
        self._scoring: set[int] = set()  # the adapters of the pass that was computed last, by their places

        def score_rows(rows: list[tuple[int, int]]) -> None:
            rows = [(place, row) for place, row in rows if is_wanted(place)]
            self._scoring = {place for place, _ in rows}
            if rows:
                examples = [wanted[place][0].datasets.eval[row] for place, row in rows]
                losses.append((rows, self.pass_nll([wanted[place][1] for place, _ in rows], examples)))

        advice = "Lower data.max_length or training.loss_chunk_tokens."
        batches = microbatches(rows, self.recipe.training.per_device_eval_batch_size)
        passes = each_in_halves(batches, score_rows, self.device, "held-out rows", advice)
        is_left = True
        while is_left:
            was_training = self.model.training
            self.model.eval()
            try:
                is_left = next(passes, None) is not None
            finally:
                self.model.train(was_training)
            if is_left:
                yield []
        sums, tokens = [0.0] * len(wanted), [0] * len(wanted)
        values = torch.cat([nll for _, nll in losses]).tolist() if losses else []
        for (place, row), nll in zip((each for rows, _ in losses for each in rows), values, strict=True):
            sums[place] += nll
            tokens[place] += int(wanted[place][0].datasets.eval.trained_tokens[row])
        seconds = time.perf_counter() - began
        return [
            held_out.loss_scores(total, count, len(run.rows.eval), seconds) if len(run.rows.eval) else None
            for total, count, (run, _) in zip(sums, tokens, wanted, strict=True)
        ]
