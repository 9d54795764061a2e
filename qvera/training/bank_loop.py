"""The loop of many adapters: rounds, in which each adapter takes an optimizer step in passes that all share.

Each row names its slot of the bank, and its loss is divided by the trained tokens of its own adapter's step. So an
adapter's gradient does not depend on the others, up to rounding. Evaluations share passes too, and yield between them.
"""

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel

from qvera.adapters.bank import AdapterBank
from qvera.adapters.projection import forget_inputs
from qvera.adapters.save_load import rate_factors
from qvera.config.schema import Recipe
from qvera.data import Example, microbatches
from qvera.distributed.group import ALONE
from qvera.evaluation import held_out
from qvera.models import forward
from qvera.training.failures import not_finite_text, require_gradients, step_error
from qvera.training.loop import Loop, Records, Step
from qvera.training.optim import AdamSettings, BankAdamW
from qvera.training.plan import Plan
from qvera.training.roster import AdapterRun, Roster
from qvera.utils import accelerator
from qvera.utils.errors import OutOfMemory
from qvera.utils.memory import Shortage, each_in_halves

_logger = logging.getLogger(__name__)


class AdapterRow(NamedTuple):
    """A training row of a step of many adapters."""

    run: AdapterRun
    row: int  # its number in the training rows of the run


@dataclasses.dataclass
class Share:
    """An adapter's share of a round: its tokens, and the summed loss of its rows."""

    trained_tokens: int = 0  # what its loss is divided by
    input_tokens: int = 0
    loss: float = 0.0


@dataclasses.dataclass
class BankStep(Step[AdapterRow]):
    """A round. ``shares`` has an entry for each adapter that takes a step in it."""

    shares: dict[AdapterRun, Share]


def cut_round(rows: Sequence[AdapterRow], lengths: Sequence[int], pass_rows: int) -> list[list[AdapterRow]]:
    """Cut a round into forward passes of rows of like length. ``lengths``: tokens of each of ``rows``."""
    by_length = sorted(range(len(rows)), key=lambda place: lengths[place])
    return list(microbatches([rows[place] for place in by_length], pass_rows))


class BankLoop(Loop[BankStep]):
    """The loop of many adapters. A step is a round: one optimizer step of each adapter in flight that has steps left.

    Attributes:
        roster: the adapters in flight.
        round: how many rounds were taken.
        pass_rows: the most rows of a pass.
        pad_id: the padding token, which all adapters share.
        beside_answers: an adapter that memory does not suffice for ends with a reason, and the others go on; else the
            run ends. All scores are logged, also those before and after training, which no eval_steps asked for.
    """

    def __init__(
        self,
        model: PeftModel,
        bank: AdapterBank,
        roster: Roster,
        recipe: Recipe,
        pad_id: int,
        plan: Plan | None = None,
        beside_answers: bool = False,
    ) -> None:
        self.model, self.bank, self.roster, self.pad_id = model, bank, roster, pad_id
        self.plan, self.beside_answers, self.device = plan, beside_answers, bank.device
        self.training = recipe.training
        self.adamw = BankAdamW(bank, rate_factors(model, recipe, bank.adapter))
        self.round, self.pass_rows = 0, recipe.training.per_device_train_batch_size

    @property
    def in_flight(self) -> list[AdapterRun]:
        """The adapters that have a slot, in the order in which they began."""
        return self.roster.in_flight

    def begin(self, run: AdapterRun) -> None:
        """Make an adapter that has got a slot ready for its first step."""
        self.bank.start(run.held_slot)
        self.adamw.reset(run.held_slot)
        run.begin()

    def take_round(self) -> Iterator[Records]:
        """Make the evaluations that are wanted, take a step, and evaluate where it is due. Yields between passes."""
        yield from self.evaluate()
        if any(not run.takes_no_step for run in self.in_flight):
            yield from self.take_step()
        yield from self.evaluate()

    def next_step(self) -> BankStep:
        shares = {run: Share() for run in self.in_flight if not run.takes_no_step}
        rows = [AdapterRow(run, row) for run in shares for row in run.next_rows()]
        lengths = [int(run.datasets.train.lengths[row]) for run, row in rows]
        for (run, row), tokens in zip(rows, lengths, strict=True):
            shares[run].trained_tokens += int(run.datasets.train.trained_tokens[row])
            shares[run].input_tokens += tokens
        return BankStep(self.round + 1, rows, cut_round(rows, lengths, self.pass_rows), shares)

    def drop_run(self, run: AdapterRun) -> None:
        """Take an adapter out of the step under way: it is not stepped, and no later pass has its rows."""
        step = self.step
        # passes that are taken have left a gradient in its slot, which is the caller's to zero
        if step is not None and step.shares.pop(run, None) is not None:
            step.rows = [row for row in step.rows if row.run is not run]
            left = [[row for row in rows if row.run is not run] for rows in step.passes]
            step.passes[:] = [rows for rows in left if rows]

    def do_pass(self, step: BankStep) -> None:
        rows = step.passes[0]
        step.examples = [run.datasets.train[row] for run, row in rows]
        # the tokens of the adapter's whole step: neither how it is cut nor who shares the pass changes its mean
        weights = [1 / step.shares[run].trained_tokens for run, _ in rows]
        step.losses.append(self.pass_nll([run.held_slot for run, _ in rows], step.examples, weights))
        step.pass_rows.append(step.passes.pop(0))

    def pass_nll(
        self, slots: Sequence[int], examples: Sequence[Example], weights: Sequence[float] | None = None
    ) -> torch.Tensor:
        """Return the negative log likelihood of each row of a pass [B]; add the weighted sum's gradient to the bank.

        ``slots`` and ``weights`` have an entry for each row. Without weights no gradient is computed.
        """
        batch = forward.make_batch(self.model, examples, self.pad_id, prefix_once=False, whole_rows=True)
        row_weights = accelerator.tensor_on(self.device, np.array(weights or [1.0] * len(slots), np.float32))
        tokens = forward.row_tokens(batch, examples)
        with self.bank.rows(slots, tokens), torch.set_grad_enabled(weights is not None):
            # a held-out loss is not smoothed
            smoothing = 0.0 if weights is None else self.training.label_smoothing
            total, nll = forward.row_nll(self.model, batch, self.training.loss_chunk_tokens, row_weights, smoothing)
            if weights is not None:
                total.backward()
        return nll

    def add_up(self, step: BankStep, shortage: Shortage | None) -> bool:
        """Add up the losses of each adapter, read after the last pass, so that the device is waited for once."""
        if shortage is None and step.losses:
            rows = [row for rows in step.pass_rows for row in rows]
            for (run, _), nll in zip(rows, torch.cat(step.losses).tolist(), strict=True):
                if run in step.shares:  # it may have left since
                    step.shares[run].loss += nll
        return shortage is not None

    def drop_gradients(self) -> None:
        """Zero the gradients of all adapters: any of them may have a part of the passes so far."""
        self.bank.gradients.zero_()

    def make_smaller(self, step: BankStep, shortage: Shortage | None) -> Records:
        """Halve the passes beside answers; an adapter of which not one row fits ends. In a run raise OutOfMemory."""
        assert shortage is not None
        if not self.beside_answers:
            raise step_error(f"Round {step.number}", shortage, step.examples, self.plan, ALONE)
        runs = [run for run, _ in step.passes[0]]
        if len(runs) > 1:
            self.pass_rows = len(runs) // 2
            text = "Memory ran out with %d rows a pass (%s); going on with %d."
            _logger.warning(text, len(runs), shortage, self.pass_rows)
            return []
        runs[0].reason = (
            f"step {runs[0].state.step + 1}: memory ran out with a single row of {len(step.examples[0].input_ids):,} "
            f"tokens ({step.examples[0].source}): {shortage}. Shorten it, or lower data.max_length."
        )
        self.pass_rows = self.training.per_device_train_batch_size  # it was this row that took the memory
        return []

    def give_up(self, step: BankStep, shortage: Shortage) -> Records:
        """Beside answers, end the step's adapters: their vectors may be half stepped. In a run raise RunFailed."""
        if not self.beside_answers:
            return super().give_up(step, shortage)
        for run in step.shares:
            run.reason = f"Memory ran out in the optimizer's step: {shortage}."
        self.drop_gradients()
        return []

    def clip_and_step(self, step: BankStep) -> dict[AdapterRun, tuple[float, float]]:
        """Clip and step; returns norm and rate of each adapter. Those whose loss is not finite take no step."""
        if self.round == 0 and not self.beside_answers:  # a layer that gets no gradient would never train
            columns = self.bank.layout.columns.items()
            trained = {key: each for key, each in columns if each.start < self.bank.trained_numbers}
            require_gradients({key: each.of(self.bank.gradients) for key, each in trained.items()})
        runs = [run for run, share in step.shares.items() if math.isfinite(share.loss)]
        rates = [run.rate for run in runs]
        settings = [AdamSettings.of(self.training, rate) for rate in rates]
        norms = self.adamw.step([run.held_slot for run in runs], settings)
        return dict(zip(runs, zip(norms, rates, strict=True), strict=True))

    def count_step(self, step: BankStep, norms: dict[AdapterRun, tuple[float, float]]) -> Records:
        """Return a record of each adapter that took its step, and one of the round. The others get a ``reason``."""
        self.round, seconds, records, losses = step.number, step.seconds, Records(), list[float]()
        all_tokens = sum(share.input_tokens for share in step.shares.values())
        for run, share in step.shares.items():
            loss = share.loss / share.trained_tokens
            norm, rate = norms.get(run, (math.nan, 0.0))
            if not math.isfinite(norm):
                rows = [run.datasets.train[row].source for other, row in step.rows if other is run]
                run.reason = not_finite_text(f"step {run.state.step + 1}", [loss], norm, rows)
                continue
            # a part of the round's time, so that the adapters' seconds add up to it
            losses.append(loss)
            run.state.add_step(loss, share.input_tokens / all_tokens * seconds, share.input_tokens)
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
                    "trained_tokens": share.trained_tokens,
                    "input_tokens": share.input_tokens,
                }
            )
        about = {
            "kind": "round",
            "round": step.number,
            "adapters": len(step.shares),
            "loss": statistics.fmean(losses) if losses else math.nan,
            "rows": len(step.rows),
            "passes": len(step.pass_rows),
            "input_tokens": all_tokens,
            "step_seconds": seconds,
            "tokens_per_second": all_tokens / seconds,
        }
        return [*records, about]

    def evaluate(self) -> Iterator[Records]:
        """Compute the held-out losses that adapters in flight want, until none does; yields [] between passes."""
        while scored := [(run, why, run.state) for run in self.in_flight if (why := run.next_evaluation) is not None]:

            def is_in_flight(place: int, scored: Sequence[Any] = scored) -> bool:
                run, _, state = scored[place]
                return run.slot is not None and run.state is state  # it may have left and begun again

            for run, why, _ in scored:
                if why == "after":  # the score is of the vectors that will be saved
                    run.put_best_back(self.bank.vectors[run.held_slot])
            try:
                results = yield from self.score([(run, run.held_slot) for run, *_ in scored], is_in_flight)
            except OutOfMemory as error:
                if not self.beside_answers:
                    raise
                forget_inputs(self.model)
                # the adapters whose rows were in the pass end; the others are scored anew
                for place in filter(is_in_flight, self._scoring):
                    scored[place][0].reason = str(error)
                continue
            records = []
            for place, ((run, why, _), result) in enumerate(zip(scored, results, strict=True)):
                if result is None or not is_in_flight(place):
                    continue
                is_new = run.add_score(why, result, self.bank.vectors[run.held_slot])
                if why == "due" or (is_new and self.beside_answers):
                    about = {"kind": "eval", "round": self.round, "adapter": run.name, "step": run.state.step}
                    records.append({**about, **result})
            yield records

    def score(
        self, wanted: Sequence[tuple[AdapterRun, int]], is_wanted: Callable[[int], bool] = lambda _: True
    ) -> Generator[Records, None, list[dict[str, Any] | None]]:
        """Compute held-out losses of several adapters, in passes that they share; yields between passes.

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
        batches = microbatches(rows, self.training.per_device_eval_batch_size)
        passes = each_in_halves(batches, score_rows, self.device, "held-out rows", advice)
        is_left = True
        while is_left:
            # evaluation mode ends with each pass, since others use the model in between
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
