"""A round: one optimizer step of every adapter in flight, in forward passes that they share.

The rows of all adapters are sorted by length and cut into passes. A row's loss is divided by the trained tokens of its
own adapter's step. So an adapter's gradient does not depend on the other adapters or on the passes, up to rounding.
Rounds and evaluations are computed pass by pass, so that a server can answer between two passes (`live`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from qvera.adapters.projection import forget_inputs
from qvera.data import Example, microbatches
from qvera.evaluation import held_out
from qvera.models import forward
from qvera.training.failures import not_finite_text
from qvera.utils.errors import RunFailed
from qvera.utils.out_of_memory import Shortage, each_in_halves, or_shortage

if TYPE_CHECKING:
    from peft import PeftModel

    from qvera.adapters.bank import AdapterBank
    from qvera.config.schema import TrainingSection
    from qvera.data import Rows
    from qvera.training.many.optimizer import BankAdamW
    from qvera.training.many.roster import AdapterRun


class Passes(Protocol):
    """What rounds and evaluations need of whoever trains the adapters of a bank."""

    model: PeftModel
    device: torch.device
    bank: AdapterBank
    adamw: BankAdamW

    def pass_nll(
        self, slots: Sequence[int], examples: Sequence[Example], weights: Sequence[float] | None = None
    ) -> torch.Tensor:
        """See `bank_nll`."""


def bank_nll(
    passes: Passes,
    training: TrainingSection,
    pad_id: int,
    slots: Sequence[int],
    examples: Sequence[Example],
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """Negative log likelihood of each row of a pass [B], and its weighted sum's gradient into the bank.

    Args:
        passes: whose model and bank.
        training: says how many tokens' logits are in memory at a time.
        pad_id: see `forward.make_batch`.
        slots: of each row's adapter.
        examples: the rows.
        weights: of each row; None: no gradient is computed.
    """
    batch = forward.make_batch(passes.model, examples, pad_id, prefix_once=False, whole_rows=True)
    row_weights = torch.tensor(weights or [1.0] * len(slots), dtype=torch.float32).to(passes.device)
    with passes.bank.rows(slots, forward.row_tokens(batch, examples)), torch.set_grad_enabled(weights is not None):
        smoothing = 0.0 if weights is None else training.label_smoothing
        total, nll = forward.row_nll(passes.model, batch, training.loss_chunk_tokens, row_weights, smoothing)
        if weights is not None:
            total.backward()
    return nll


class RoundRow(NamedTuple):
    """A training row of a round."""

    run: AdapterRun
    row: int  # its number in the training rows of the run


def cut_round(rows: Sequence[RoundRow], lengths: Sequence[int], pass_rows: int) -> list[list[RoundRow]]:
    """The forward passes of a round: rows of like length together, those of one adapter in the order of its step.

    ``lengths``: tokens of each of ``rows``.
    """
    by_length = sorted(range(len(rows)), key=lambda place: lengths[place])
    return list(microbatches([rows[place] for place in by_length], pass_rows))


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
    """One round: `do_pass` until it `is_accumulated`, then `step`. Nothing is stepped before.

    Attributes:
        runs: those that take part; a run that is dropped takes no step.
        rows: of the step of each of them.
        passes: how these are cut.
        examples: of the pass that is computed, or was last.
        input_tokens: of each run's step.
        seconds: what the passes and the step took.
    """

    def __init__(self, trainer: Passes, runs: Sequence[AdapterRun], number: int, pass_rows: int) -> None:
        """Choose the rows.

        Args:
            trainer: whose bank and model.
            runs: adapters in flight that have steps left, at least one.
            number: of the round, for records.
            pass_rows: rows of a pass at most.
        """
        self.trainer, self.runs, self.number, self.seconds = trainer, list(runs), number, 0.0
        with self._timed():
            self.rows = [RoundRow(run, row) for run in self.runs for row in run.next_rows()]
            self.trained_tokens = dict.fromkeys(self.runs, 0)
            self.input_tokens = dict.fromkeys(self.runs, 0)
            for run, row in self.rows:
                self.trained_tokens[run] += int(run.datasets.train.trained_tokens[row])
                self.input_tokens[run] += int(run.datasets.train.lengths[row])
            self.examples: list[Example] = []
            self._cut(pass_rows)

    def _cut(self, pass_rows: int) -> None:
        lengths = [int(run.datasets.train.lengths[row]) for run, row in self.rows]
        self.passes = cut_round(self.rows, lengths, pass_rows)
        self._found: list[tuple[list[AdapterRun], torch.Tensor]] = []
        self._next = 0

    @property
    def is_accumulated(self) -> bool:
        """Whether all passes have been computed."""
        return self._next == len(self.passes)

    @property
    def current_runs(self) -> list[AdapterRun]:
        """Whose rows the pass has that comes next, or in which memory ran out."""
        return [run for run, _ in self.passes[self._next]]

    def do_pass(self) -> Shortage | None:
        """Forward and backward of the next pass.

        Returns:
            The shortage of memory that it ran into. Then the gradients of all runs are dropped, since some of them have
            a part of the pass, and `restart` has to follow, or nothing.
        """
        with self._timed():
            rows = self.passes[self._next]
            self.examples = [run.datasets.train[row] for run, row in rows]
            slots = [run.held_slot for run, _ in rows]
            weights = [1 / self.trained_tokens[run] for run, _ in rows]
            nll = or_shortage(lambda: self.trainer.pass_nll(slots, self.examples, weights), self.trainer.device)
            if isinstance(nll, Shortage):
                self.trainer.bank.gradients.zero_()
                forget_inputs(self.trainer.model)
                return nll
            self._found.append(([run for run, _ in rows], nll))
            self._next += 1
        return None

    def restart(self, pass_rows: int) -> None:
        """Begin again after a shortage, with at most so many rows in a pass."""
        self._cut(pass_rows)

    def drop(self, run: AdapterRun) -> None:
        """Go on without a run: the passes that are left have none of its rows, and it takes no step."""
        if run in self.runs:
            self.runs.remove(run)
            self.rows = [one for one in self.rows if one.run is not run]
            left = [[one for one in rows if one.run is not run] for rows in self.passes[self._next :]]
            self.passes[self._next :] = [rows for rows in left if rows]

    def step(self) -> list[dict[str, Any]]:
        """Clip and step each adapter; one whose loss or gradient is not finite gets a reason instead.

        Returns:
            A record of kind ``train`` for each adapter that took its step.

        Raises:
            RunFailed: memory ran out.
        """
        trainer = self.trainer
        with self._timed():
            sums = self._sums()
            stepping = [run for run in self.runs if math.isfinite(sums[run])]
            rates = {run: run.rate for run in self.runs}
            slots = [run.held_slot for run in stepping]
            norms = or_shortage(lambda: trainer.adamw.step(slots, [rates[run] for run in stepping]), trainer.device)
            if isinstance(norms, Shortage):
                raise RunFailed(f"Memory ran out in the optimizer's step: {norms}. Earlier checkpoints are kept.")
        norm_of = dict(zip(stepping, norms, strict=True))
        records = [self._count_step(run, sums[run], norm_of.get(run, math.nan), rates[run]) for run in self.runs]
        return [record for record in records if record is not None]

    def _sums(self) -> dict[AdapterRun, float]:
        """The summed loss of each adapter's rows. Read once, so that a device is not waited for pass by pass."""
        sums = dict.fromkeys(self.trained_tokens, 0.0)
        values = torch.cat([nll for _, nll in self._found]).tolist() if self._found else []
        for run, nll in zip((run for runs, _ in self._found for run in runs), values, strict=True):
            sums[run] += nll
        return sums

    def _count_step(self, run: AdapterRun, nll: float, norm: float, rate: float) -> dict[str, Any] | None:
        """Count an adapter's step; None where it could not be taken."""
        loss = nll / self.trained_tokens[run]
        if not math.isfinite(norm):
            rows = [run.datasets.train[row].source for one, row in self.rows if one is run]
            run.reason = not_finite_text(f"step {run.state.step + 1}", [loss], norm, rows)
            return None
        # a share of the round's time, so that the adapters' seconds add up to it
        share = self.input_tokens[run] / sum(self.input_tokens.values())
        run.state.add_step(loss, share * self.seconds, self.input_tokens[run])
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

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


class HeldOutRows(NamedTuple):
    """What an adapter is scored on."""

    slot: int
    source: Rows
    numbers: Sequence[int]
    """Of its rows in ``source``."""


class HeldOutScores:
    """Held-out losses of several adapters, in passes that they share: `do_pass` until False, then `results`.

    Attributes:
        current: the adapters, by their places in ``wanted``, that the pass which was computed last has rows of.
    """

    def __init__(self, trainer: Passes, wanted: Sequence[HeldOutRows], pass_rows: int) -> None:
        """``pass_rows``: rows of a pass at most; halved where memory runs out."""
        self._trainer, self._wanted, self._began = trainer, wanted, time.perf_counter()
        self.current: set[int] = set()
        self._dropped: set[int] = set()
        self._found: list[tuple[list[tuple[int, int]], torch.Tensor]] = []
        rows = [(place, row) for place, own in enumerate(wanted) for row in own.numbers]
        rows.sort(key=lambda one: wanted[one[0]].source.lengths[one[1]])
        advice = "Lower data.max_length or training.loss_chunk_tokens."
        batches = microbatches(rows, pass_rows)
        self._passes = each_in_halves(batches, self._score, trainer.device, "held-out rows", advice)

    def do_pass(self) -> bool:
        """Compute the next pass; False: there was none left.

        Raises:
            OutOfMemory: memory ran out with a single row. What was scored is lost.
        """
        was_training = self._trainer.model.training
        self._trainer.model.eval()
        try:
            return next(self._passes, None) is not None
        finally:
            self._trainer.model.train(was_training)

    def drop(self, place: int) -> None:
        """Compute no further rows of the adapter at this place of ``wanted``."""
        self._dropped.add(place)

    def _score(self, rows: list[tuple[int, int]]) -> None:
        rows = [one for one in rows if one[0] not in self._dropped]
        self.current = {place for place, _ in rows}
        if rows:
            examples = [self._wanted[place].source[row] for place, row in rows]
            self._found.append((rows, self._trainer.pass_nll([self._wanted[p].slot for p, _ in rows], examples)))

    def results(self) -> list[dict[str, Any] | None]:
        """For each adapter what `held_out.held_out_loss` returns, the seconds those of all; None: no rows."""
        sums, tokens = [0.0] * len(self._wanted), [0] * len(self._wanted)
        values = torch.cat([nll for _, nll in self._found]).tolist() if self._found else []
        for (place, row), nll in zip((one for rows, _ in self._found for one in rows), values, strict=True):
            sums[place] += nll
            tokens[place] += int(self._wanted[place].source.trained_tokens[row])
        seconds = time.perf_counter() - self._began
        return [
            held_out.loss_scores(total, count, len(own.numbers), seconds) if len(own.numbers) else None
            for total, count, own in zip(sums, tokens, self._wanted, strict=True)
        ]


def held_out_losses(trainer: Passes, wanted: Sequence[HeldOutRows], pass_rows: int) -> list[dict[str, Any] | None]:
    """All of `HeldOutScores` at once."""
    scores = HeldOutScores(trainer, wanted, pass_rows)
    while scores.do_pass():
        pass
    return scores.results()
