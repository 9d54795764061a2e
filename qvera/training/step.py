"""One optimizer step of a training session: its passes, and undoing it where memory runs out."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import torch

from qvera.adapters.projection import forget_inputs
from qvera.training.checkpoint import random_state, set_random_state
from qvera.training.failures import lone_error, not_finite_error, step_error, worst
from qvera.utils import memory
from qvera.utils.errors import RunFailed
from qvera.utils.out_of_memory import Shortage, or_shortage

if TYPE_CHECKING:
    from qvera.data import Example
    from qvera.training.session import TrainingSession


class StepAttempt:
    """One attempt at the next optimizer step. It may end without one, as `TrainingSession.train_step` says."""

    def __init__(self, session: TrainingSession) -> None:
        """Choose the step's rows, and remember what undoing it needs."""
        self.session, group = session, session.group
        self.began, self.random = time.perf_counter(), random_state(group.rank)
        self.number = session.state.step + 1
        self.rows = session.batches.rows(session.state.step)
        self.passes = session.batches.passes(self.rows, group.rank, group.world_size)
        self.targets = self.trained_tokens = 0  # of all rows, once they are read
        session.task.forget_metrics()
        self.examples: list[Example] = []  # those of the pass that this rank is in or was in last

    def take(self) -> dict[str, Any]:
        """Accumulate gradients, clip, step; returns the record, or raises, as `TrainingSession.train_step` says."""
        session, train, group, engine = (
            self.session,
            self.session.datasets.train,
            self.session.group,
            self.session.engine,
        )
        session.hooks.before_step(self.number)
        sums = or_shortage(self._accumulate, session.device)
        if isinstance(sums, Shortage):
            return self._undo(sums)
        input_tokens = sum(sum(train[i].row_tokens) for micro in self.passes for i in micro)
        total, inputs, failed = group.sum([sum(sums), input_tokens, 0.0])
        if failed:
            return self._undo(None)
        taken = or_shortage(engine.step, session.device) if math.isfinite(total) else (math.nan, 0.0)
        if isinstance(taken, Shortage):
            raise RunFailed(f"Memory ran out in the optimizer's step: {taken}. Earlier checkpoints are kept.")
        norm, rate = taken
        if math.isfinite(norm):
            session.hooks.after_step(self.number, engine.loss_scale)
        seconds, loss = self._seconds(), total / self.targets
        scaling = {} if session.scaler is None else {"loss_scale": engine.loss_scale}
        if not math.isfinite(norm):
            if math.isfinite(total) and engine.can_step_again():
                session.state.add_skipped_step(seconds)
                return {"kind": "skipped", "step": self.number, "loss": loss, "step_seconds": seconds, **scaling}
            sources = [[train[i].source for i in micro] for micro in self.passes if micro]
            step_rows = [train[i].source for i in self.rows]
            raise not_finite_error(self.number, sums, norm, sources, step_rows, group)
        session.state.add_step(loss, seconds, int(inputs))
        return {
            "kind": "train",
            "step": self.number,
            "epoch": round(self.number / session.batches.per_epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            **scaling,
            "trained_tokens": self.trained_tokens,
            "input_tokens": int(inputs),
            "step_seconds": seconds,
            "tokens_per_second": inputs / seconds,
            "memory_bytes": memory.memory_bytes(session.device),
            "peak_bytes": session.watch.peak_bytes,
            **session.task.take_metrics(group),
            **session.hooks.metrics(),
        }

    def _accumulate(self) -> list[float]:
        """Forward and backward of each pass; the summed loss of each."""
        session, engine, losses = self.session, self.session.engine, []
        rows = [session.datasets.train[i] for i in self.rows]
        self.targets, self.trained_tokens = session.task.targets(rows), sum(row.trained_tokens for row in rows)
        expected_grad = None if session.scaler is None else engine.loss_gradient() / self.targets
        for number, micro in enumerate(self.passes, start=1):
            # a rank without rows runs a dummy pass so that collectives stay in sync
            train, chosen = session.datasets.train, micro or self.rows[:1]
            self.examples = [session.task.training_row(train[i], i, self.number, session.recipe) for i in chosen]
            nll, _ = session.nll(self.examples, engine.core, expected_grad)
            # divided by the targets of the whole global batch, so that neither accumulation nor ranks change the mean
            engine.backward(nll / self.targets if micro else nll * 0.0, last=number == len(self.passes))
            if micro:
                losses.append(nll.detach())
                session.task.count_pass()
        return torch.stack(losses).tolist() if losses else []

    def _undo(self, shortage: Shortage | None) -> dict[str, Any]:
        """Undo a step that memory did not suffice for, on every rank, and halve the passes where the recipe says so.

        Args:
            shortage: that of this rank; None: only others ran out of memory.

        Returns:
            The record, where the step can be taken again.

        Raises:
            OutOfMemory: it can't.
        """
        session, group, train = self.session, self.session.group, self.session.datasets.train
        session.engine.undo()
        forget_inputs(session.model)
        set_random_state(self.random, group.rank)
        examples = None if shortage is None else self.examples
        if shortage is not None:
            if session.zero is not None and group.world_size > 1:
                raise lone_error(self.number, shortage, self.examples, session.plan, train, group)
            group.sum([0.0, 0.0, 1.0])  # the others meet this rank where they add up their losses
        packed = session.recipe.data.packing
        size = sum(len(example.input_ids) for example in self.examples) if packed else len(self.examples)
        half = size // 2 if len(self.examples) > 1 else 0  # 0, too, where no pass had begun
        found = group.gather(None if shortage is None else [shortage.asked_bytes, shortage.free_bytes, half])
        failed = [one for one in found if one is not None]
        shortage = worst([Shortage(*one[:2]) for one in failed])
        most = min(one[2] for one in failed)
        if session.recipe.training.on_oom == "save" or most == 0:
            raise step_error(f"Step {self.number}", shortage, examples, session.plan, train, group)
        session.batches.limit(most)
        limit = {"pass_tokens" if packed else "pass_rows": most}
        seconds = self._seconds()
        session.state.add_halving(self.number, limit, seconds)
        return {
            "kind": "out_of_memory",
            "step": self.number,
            **dataclasses.asdict(shortage),
            **limit,
            "step_seconds": seconds,
        }

    def _seconds(self) -> float:
        return time.perf_counter() - self.began
