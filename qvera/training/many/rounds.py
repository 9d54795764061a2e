"""A round: one optimizer step of every adapter in flight, in forward passes that they share.

The rows of all adapters are sorted by length and cut into passes. A row's loss is divided by the trained tokens of its
own adapter's step, so neither the neighbours nor the passes change an adapter's gradient, beyond rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from qvera.adapters.projection import forget_inputs
from qvera.data import Example, microbatches
from qvera.distributed.group import ALONE
from qvera.evaluation import evaluate
from qvera.training.failures import not_finite_text, step_error
from qvera.utils import memory
from qvera.utils.errors import RunFailed
from qvera.utils.out_of_memory import Shortage, each_in_halves, or_shortage

if TYPE_CHECKING:
    from qvera.training.many.roster import AdapterRun
    from qvera.training.many.trainer import ManyTrainer


class RoundRow(NamedTuple):
    """A training row of a round."""

    run: AdapterRun
    row: int  # its number in the training rows


def cut_round(rows: Sequence[RoundRow], lengths: Sequence[int], pass_rows: int) -> list[list[RoundRow]]:
    """The forward passes of a round: rows of like length together, those of one adapter in the order of its step."""
    return list(microbatches(sorted(rows, key=lambda one: lengths[one.row]), pass_rows))


def longest_pass(runs: Sequence[AdapterRun], lengths: np.ndarray, slots: int, pass_rows: int) -> list[int]:
    """The longest rows that a pass may have: of one adapter at most as many as its step has, of at most ``slots``.

    Args:
        runs: the adapters.
        lengths: int [n]; tokens of each training row.
        slots: how many adapters are in flight at most.
        pass_rows: rows of a pass at most.
    """
    rows: list[int] = []
    for run in runs:
        own = run.rows.train
        rows += own[np.argsort(-lengths[own], kind="stable")[: run.step_rows]].tolist()
    most = sum(sorted((run.step_rows for run in runs), reverse=True)[:slots])
    return sorted(rows, key=lambda row: -lengths[row])[: min(pass_rows, most)]


class Round:
    """One round. Within `take` every adapter steps, or leaves because its loss or gradient is not finite."""

    def __init__(self, trainer: ManyTrainer, runs: Sequence[AdapterRun]) -> None:
        """Choose the rows.

        Args:
            runs: the adapters in flight that have steps left, at least one.
        """
        self.trainer, self.runs, self.number = trainer, list(runs), trainer.round + 1
        self.began = time.perf_counter()
        train = trainer.datasets.train
        self.rows = [RoundRow(run, row) for run in self.runs for row in run.next_rows()]
        self.passes = cut_round(self.rows, train.lengths, trainer.pass_rows)
        self.trained_tokens = dict.fromkeys(self.runs, 0)
        self.input_tokens = dict.fromkeys(self.runs, 0)
        for run, row in self.rows:
            self.trained_tokens[run] += int(train.trained_tokens[row])
            self.input_tokens[run] += int(train.lengths[row])
        self.examples: list[Example] = []  # of the pass that is computed, or was last

    def take(self) -> list[dict[str, Any]]:
        """Accumulate the gradients of all passes, clip and step each adapter.

        Returns:
            A record of kind ``train`` for each adapter that took its step, and one of kind ``round``.

        Raises:
            OutOfMemory: memory ran out; no adapter took a step.
        """
        trainer = self.trainer
        sums = or_shortage(self._accumulate, trainer.device)
        if isinstance(sums, Shortage):
            raise self._undone(sums)
        stepping = [run for run in self.runs if math.isfinite(sums[run])]
        rates = [trainer.rate(run) for run in stepping]
        slots = [trainer.slot(run) for run in stepping]
        norms = or_shortage(lambda: trainer.adamw.step(slots, rates), trainer.device)
        if isinstance(norms, Shortage):
            raise RunFailed(f"Memory ran out in the optimizer's step: {norms}. Earlier checkpoints are kept.")
        norm_of = dict(zip(stepping, norms, strict=True))
        seconds = time.perf_counter() - self.began
        records = [
            self._step(run, sums[run], norm_of.get(run, math.nan), rate, seconds)
            for run, rate in zip(self.runs, map(trainer.rate, self.runs), strict=True)
        ]
        inputs = sum(self.input_tokens.values())
        return [
            *(record for record in records if record is not None),
            {
                "kind": "round",
                "round": self.number,
                "adapters": len(self.runs),
                "rows": len(self.rows),
                "passes": len(self.passes),
                "input_tokens": inputs,
                "step_seconds": seconds,
                "tokens_per_second": inputs / seconds,
                "memory_bytes": memory.memory_bytes(trainer.device),
                "peak_bytes": trainer.watch.peak_bytes,
            },
        ]

    def _accumulate(self) -> dict[AdapterRun, float]:
        """Forward and backward of each pass; the summed loss of each adapter's rows."""
        trainer, found = self.trainer, []
        for rows in self.passes:
            self.examples = [trainer.datasets.train[row] for _, row in rows]
            weights = [1 / self.trained_tokens[run] for run, _ in rows]
            found.append(trainer.pass_nll([trainer.slot(run) for run, _ in rows], self.examples, weights))
        sums = dict.fromkeys(self.runs, 0.0)
        for (run, _), nll in zip((one for rows in self.passes for one in rows), torch.cat(found).tolist(), strict=True):
            sums[run] += nll
        return sums

    def _step(self, run: AdapterRun, nll: float, norm: float, rate: float, seconds: float) -> dict[str, Any] | None:
        """Count an adapter's step; None where it could not be taken."""
        loss = nll / self.trained_tokens[run]
        if not math.isfinite(norm):
            train = self.trainer.datasets.train
            rows = [train[row].source for one, row in self.rows if one is run]
            run.reason = not_finite_text(f"step {run.state.step + 1}", [loss], norm, rows)
            return None
        # a share of the round's time, so that the adapters' seconds add up to it
        share = self.input_tokens[run] / sum(self.input_tokens.values())
        run.state.add_step(loss, share * seconds, self.input_tokens[run])
        assert run.batches is not None
        return {
            "kind": "train",
            "adapter": run.name,
            "round": self.number,
            "step": run.state.step,
            "epoch": round(run.state.step / run.batches.per_epoch, 4),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "trained_tokens": self.trained_tokens[run],
            "input_tokens": self.input_tokens[run],
        }

    def _undone(self, shortage: Shortage) -> Exception:
        """The error of a round that memory did not suffice for, which leaves no gradient behind."""
        trainer = self.trainer
        trainer.bank.gradients.zero_()
        forget_inputs(trainer.model)
        train = trainer.datasets.train
        return step_error(f"Round {self.number}", shortage, self.examples, trainer.plan, train, ALONE)


def held_out_losses(
    trainer: ManyTrainer, slots: Sequence[int], rows: Sequence[Sequence[int]]
) -> list[dict[str, Any] | None]:
    """Held-out loss of several adapters in shared passes.

    Args:
        slots: of the adapters.
        rows: for each of them, the numbers of its rows in the held-out rows.

    Returns:
        For each adapter what `evaluate.held_out_loss` returns, the seconds those of all together; None without rows.
    """
    began, training, held_out = time.perf_counter(), trainer.recipe.training, trainer.datasets.eval
    wanted = [(place, row) for place, own in enumerate(rows) for row in own]
    wanted.sort(key=lambda one: held_out.lengths[one[1]])

    def nll_of(part: list[tuple[int, int]]) -> torch.Tensor:
        examples = [held_out[row] for _, row in part]
        return trainer.pass_nll([slots[place] for place, _ in part], examples)

    sums, tokens, was_training = [0.0] * len(slots), [0] * len(slots), trainer.model.training
    trainer.model.eval()
    try:
        batches = microbatches(wanted, training.per_device_eval_batch_size)
        advice = "Lower data.max_length or training.loss_chunk_tokens."
        found = [nll for _, nll in each_in_halves(batches, nll_of, trainer.device, "held-out rows", advice)]
    finally:
        trainer.model.train(was_training)
    for (place, row), nll in zip(wanted, torch.cat(found).tolist() if found else [], strict=True):
        sums[place] += nll
        tokens[place] += int(held_out.trained_tokens[row])
    seconds = time.perf_counter() - began
    return [
        evaluate.loss_scores(total, count, len(own), seconds) if len(own) else None
        for total, count, own in zip(sums, tokens, rows, strict=True)
    ]
