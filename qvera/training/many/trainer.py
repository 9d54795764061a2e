"""The loop that trains many adapters on one base model, in forward passes that they share.

An adapter is trained as if it were alone: rows, order, steps, learning rate, clipping, evaluations and early stopping
are those of the same recipe over a file of its rows. What it shares is the pass through the frozen base. It leaves when
its steps are taken, when it stops early, or when its loss or gradient is not finite, and the next of the queue takes
its slot. One whose held-out loss is not finite at its end is not saved.

Several processes share out the adapters. Each trains its own, with checkpoints of its own, and they meet only at the
beginning and at the end; the run directory has to be one that all of them see.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qvera.adapters import hold_training_weights
from qvera.adapters.bank import AdapterBank
from qvera.adapters.files.save_load import save_adapter
from qvera.data import Example
from qvera.distributed.group import ALONE, for_all
from qvera.models.checkpointing import enable_checkpointing
from qvera.training.failures import step_error
from qvera.training.logging import MetricsLog, ProgressBar
from qvera.training.many import checkpoints
from qvera.training.many.optimizer import BankAdamW
from qvera.training.many.results import adapter_result, add_results, without_rows
from qvera.training.many.roster import AdapterRun, Roster, adapter_runs, deal
from qvera.training.many.rounds import HeldOutRows, Round, bank_nll, held_out_losses, longest_pass
from qvera.training.optim import lr_lambda
from qvera.training.plan.bank import wanted_slots
from qvera.training.run import Run, RunResult
from qvera.training.run_dir import write_run
from qvera.training.run_json import begun_run
from qvera.utils import memory
from qvera.utils.adapter_names import shown_name
from qvera.utils.atomic import disk_errors
from qvera.utils.errors import InputError, Interrupted, NotFinite, OutOfMemory, RunFailed
from qvera.utils.formatting import size
from qvera.utils.paths import ADAPTERS
from qvera.utils.status_line import status_line

if TYPE_CHECKING:
    from qvera.training.many.checkpoints import ManyCheckpoint

_WAIT_SECONDS = 0.2
"""How often a process that is done looks whether the others are."""


@dataclasses.dataclass
class Totals:
    """What all rounds of a process took together."""

    seconds: float = 0.0
    input_tokens: int = 0


class ManyTrainer(Run):
    """A run of many adapters; its methods are called in the order of `Trainer`'s."""

    def load_data(self, preview: bool = False) -> None:
        """See `TrainingSession.load_data`; then the adapters of this process, as they begin."""
        super().load_data(preview)
        every = self.group.agree(lambda: adapter_runs(self.recipe, self.datasets))
        self.runs = [
            every[number] for number in deal([run.steps for run in every], self.group.world_size)[self.group.rank]
        ]
        sizes = sorted(len(run.rows.train) for run in every)
        self.console.print(
            f"{len(every):,} adapters of {sizes[0]:,} to {sizes[-1]:,} rows (median {sizes[len(sizes) // 2]:,}), "
            f"{sum(run.steps for run in every):,} optimizer steps together.",
            highlight=False,
            soft_wrap=True,
        )

    def make_optimizer(self) -> None:
        """Make the bank with its slots and optimizer; a run that goes on has as many slots as it began with."""
        if self.scaler is not None:
            raise InputError(
                "model.compute_dtype: this device has no bfloat16, so auto is float16, which needs a loss scale that "
                "the adapters would share. Set float32."
            )
        self.round, self.totals, self.saved_round, self.whole_round = 0, Totals(), 0, 0
        self.pass_rows = self.recipe.training.per_device_train_batch_size
        self.found: ManyCheckpoint | None = None
        if self.resume:
            self.found = self.group.agree(lambda: checkpoints.newest(self, self.warn))
        if self.found is None:
            rows = [len(run.rows.train) for run in self.runs]
            slots = wanted_slots(self.recipe, rows)
            if self.plan is not None:  # which knows what memory there is
                slots = min(slots, self.plan.slots)
        else:
            slots = self.found.state["slots"]
        self.bank = AdapterBank(self.model, slots)
        self.adamw = BankAdamW(self.bank, self.recipe.training)

    def setup(self) -> None:
        """Go on from the checkpoint, if there is one; try the longest pass, and open the run's files."""
        self.steps = sum(run.steps for run in self.runs)
        self.group.agree(self._go_on)
        if self.found is not None:
            self.console.print(f"Going on from round {self.round} ({self.found.path}).", soft_wrap=True)
            self.found = None  # its tensors take memory
        elif self.resume:
            self.console.print(f"No checkpoint was saved in {self.run_dir} yet: starting from round 0.", soft_wrap=True)
        asked = self.recipe.training.adapters_at_once
        self.roster = Roster(self.runs, self.bank.slots, self.pass_rows if asked == "auto" else None)
        for run in self.roster.in_flight:
            self._begin(run)
        self.prepare_model()
        self.group.agree(lambda: self._try_longest_batch() if self.round == 0 else None)
        # names a meeting of this launch's processes
        self.meeting = self.group.broadcast(uuid.uuid4().hex)
        if self.group.first:
            self.group.set_flag(f"begun {self.run_dir}")
        self.group.on_first(lambda: self.open_files(self.round, "round"))
        self.group.agree(self._open_own_files)
        self.run = begun_run(self, self.started)
        facts = self.run["adapter"]
        facts["trainable_parameters"] = self.bank.trained_numbers  # of each adapter; the model's are frozen
        self.write_begun(planned_steps=int(self.group.sum([float(self.steps)])[0]))  # of all processes
        self.console.print(
            f"Training {self.bank.trained_numbers:,} parameters of each adapter in {facts['adapted_modules']} linear "
            f"layers, at most {self.bank.slots:,} adapters at a time, on {self.run['device']}"
            + (f" and {self.group.world_size - 1} more." if self.group.world_size > 1 else "."),
            soft_wrap=True,
        )

    def _go_on(self) -> None:
        """Take over the checkpoint of this process, where it has one: others may have none, so no rank waits here."""
        if self.found is not None:
            checkpoints.restore(self, self.found)
            self.keep_checkpointing(self.found.state["gradient_checkpointing"], ALONE)
            self.builds_per_pass = self.found.state["builds_per_pass"]
            self.saved_round, self.whole_round = self.round, self.round

    def prepare_model(self) -> None:
        """Gradient checkpointing; and where every pass is of one adapter, what `TrainingSession` does for one.

        No W + ΔW can be held, and no MLP be taken by tiles, where the rows of a pass are of different adapters.
        """
        alone = self.bank.slots == 1
        enable_checkpointing(self.model, self.checkpointing, by_tiles=alone)
        holds = alone and self.plan is not None and self.plan.holds_weights
        hold_training_weights(self.model, holds, self.builds_per_pass)

    def longest_batch(self) -> list[Example]:
        """The longest rows that a pass may have."""
        train = self.datasets.train
        rows = longest_pass(self.runs, train.lengths, self.bank.slots, self.pass_rows)
        return [train[row] for row in rows]

    def try_batch(self, examples: list[Example]) -> None:
        """Forward and backward over the rows, for all slots in turn; nothing is kept."""
        slots = [row % self.bank.slots for row in range(len(examples))]
        try:
            self.pass_nll(slots, examples, [0.0] * len(examples))
        finally:
            self.bank.gradients.zero_()

    def _open_own_files(self) -> None:
        with disk_errors(str(self.run_dir), "No step was taken; mend that and start it again."):
            if self.group.rank:
                if not (self.run_dir / "recipe.yaml").exists():
                    raise InputError(
                        f"{self.run_dir}: is not the directory that rank 0 writes to. Processes that share out "
                        "adapters write them into one; choose a training.output_dir on a disk that all nodes see."
                    )
                path = checkpoints.metrics_path(self.run_dir, self.group.rank)
                self.log_file = MetricsLog(path, self.round, "round", self.group.rank)
            (self.run_dir / ADAPTERS).mkdir(exist_ok=True)

    def _begin(self, run: AdapterRun) -> None:
        """Make what an adapter in flight needs besides its slot."""
        run.begin(self._shares(run.steps))

    @functools.cached_property
    def _shares(self) -> Callable[[int], Callable[[int], float]]:
        """The schedule of a number of steps; adapters with equally many steps share it."""
        return functools.cache(functools.partial(lr_lambda, self.recipe.training))

    def pass_nll(
        self, slots: Sequence[int], examples: Sequence[Example], weights: Sequence[float] | None = None
    ) -> torch.Tensor:
        """See `bank_nll`."""
        return bank_nll(self, self.recipe.training, self.datasets.pad_id, slots, examples, weights)

    def train(self) -> RunResult | None:
        """Train all adapters that are left, then write run.json.

        Returns:
            The result on rank 0, None on the others.
        """
        with self.signals, self.trackers:
            if self.round == 0:
                self._score_before()
            self.model.train()
            with ProgressBar(self.console, self.steps, self.roster.steps_behind) as self.progress:
                while not self.roster.is_done and not self.stop_requested():
                    try:
                        self.take_round()
                    except OutOfMemory as error:
                        raise self._end(error) from None
                    if self.round % self.recipe.training.save_steps == 0:
                        self.save_checkpoint()
            if self.round != self.saved_round:
                self.save_checkpoint()
            self._meet()
            if self.stopped_by is not None:
                self._finish("interrupted")
                text = f"Stopped by {self.stopped_by} after round {self.round}, and saved. "
                raise for_all(Interrupted(f"{text}The same command with --resume goes on."))
        self._finish("done")
        if all(entry["status"] in ("not_finite", "no_rows") for entry in self.run["adapters"]):
            text = "No adapter's loss stayed finite, so none was saved. Lower training.learning_rate."
            raise for_all(NotFinite(text))
        return RunResult(self.run_dir, self.run) if self.group.first else None

    def take_round(self) -> None:
        """Let adapters in, take a step of each, evaluate those that are due, and let out those that are finished.

        Raises:
            OutOfMemory: memory ran out; no adapter took a step.
            RunFailed: the disk is full.
        """
        for run in self.roster.admit():
            self.bank.start(run.held_slot)
            self.adamw.reset(run.held_slot)
            self._begin(run)
        stepping = [run for run in self.roster.in_flight if run.steps_left]
        records = self._take_steps(stepping) if stepping else []
        if stepping:
            self.round += 1
            self.totals.seconds += records[-1]["step_seconds"]
            self.totals.input_tokens += records[-1]["input_tokens"]
            self.roster.steps_behind += len(records) - 1
        self.log(records)
        evaluated = self._evaluate([run for run in stepping if run.reason is None])
        self._let_out(evaluated)
        self.whole_round = self.round  # evaluations and scores too: it may be saved
        if records:
            self._show(records[-1])

    def _take_steps(self, runs: Sequence[AdapterRun]) -> list[dict[str, Any]]:
        """A record of kind ``train`` for each adapter that took its step, and one of kind ``round``."""
        taken = Round(self, runs, self.round + 1, self.pass_rows)
        while not taken.is_accumulated:
            if (shortage := taken.do_pass()) is not None:
                rows = self.datasets.train
                raise step_error(f"Round {taken.number}", shortage, taken.examples, self.plan, rows, ALONE)
        records, inputs = taken.step(), sum(taken.input_tokens.values())
        about = {
            "kind": "round",
            "round": taken.number,
            "adapters": len(runs),
            "rows": len(taken.rows),
            "passes": len(taken.passes),
            "input_tokens": inputs,
            "step_seconds": taken.seconds,
            "tokens_per_second": inputs / taken.seconds,
            "memory_bytes": memory.memory_bytes(self.device),
            "peak_bytes": self.watch.peak_bytes,
        }
        return [*records, about]

    def _evaluate(self, runs: Sequence[AdapterRun]) -> dict[AdapterRun, dict[str, Any]]:
        """Held-out loss of the adapters whose step says so; returns the results."""
        due = [run for run in runs if run.evaluation_is_due]
        found = {run: one for run, one in zip(due, self._held_out(due), strict=True) if one is not None}
        for run, result in found.items():
            run.add_evaluation(result["loss"], self.bank.vectors[run.held_slot])
        kind = {"kind": "eval", "round": self.round}
        self.log([{**kind, "adapter": run.name, "step": run.state.step, **one} for run, one in found.items()])
        return found

    def _held_out(self, runs: Sequence[AdapterRun], slot: int | None = None) -> list[dict[str, Any] | None]:
        """Held-out losses; ``slot``: of the vectors there, in place of each adapter's own."""
        wanted = [
            HeldOutRows(run.held_slot if slot is None else slot, self.datasets.eval, run.rows.eval.tolist())
            for run in runs
        ]
        return held_out_losses(self, wanted, self.recipe.training.per_device_eval_batch_size)

    def _let_out(self, evaluated: dict[AdapterRun, dict[str, Any]]) -> None:
        """Score and save the adapters that are finished, and free their slots."""
        leaving = [run for run in self.roster.in_flight if run.has_ended]
        finished = [run for run in leaving if run.reason is None]
        for run in finished:
            if not run.put_best_back(self.bank.vectors[run.held_slot]) and run in evaluated:
                run.after = evaluated[run]  # of the very vectors that are saved
        scored = [run for run in finished if run.after is None]
        for run, result in zip(scored, self._held_out(scored), strict=True):
            run.after = result
        for run in leaving:
            run.refuse_bad_score()
            if run.reason is None:
                self._save_adapter(run)
                self.roster.leave(run, "stopped_early" if run.state.stopped_early else "done")
            else:
                name = shown_name(run.name)
                self.warn(f"Adapter {name}: {run.reason} It is stopped and not saved; the others go on.")
                self.roster.leave(run, "not_finite")

    def _save_adapter(self, run: AdapterRun) -> None:
        directory = self.run_dir / ADAPTERS / run.directory
        save_adapter(self.model, directory, vectors=self.bank.take(run.held_slot))

    def _score_before(self) -> None:
        """The held-out loss of every adapter before training: all begin with the same vectors, so with full passes."""
        runs = [run for run in self.runs if len(run.rows.eval)]
        self.bank.start(0)
        with status_line(self.console, "Before training: held-out loss"):
            found = self._held_out(runs, slot=0)
        for run, result in zip(runs, found, strict=True):
            run.state.before = result

    def log(self, records: Sequence[dict[str, Any]]) -> None:  # type: ignore[override]
        """Write records to metrics.jsonl; those of rounds go to the trackers too."""
        if records:
            rank = {"rank": self.group.rank} if self.group.rank else {}
            self.write_records(*({**record, **rank} for record in records))
        for record in records:
            if record["kind"] == "round":
                self.trackers.log({**record, "step": record["round"]})

    def _show(self, record: dict[str, Any]) -> None:
        self.progress.move(
            self.roster.steps_behind,
            f"{self.roster.left:,} of {len(self.runs):,} adapters done, {len(self.roster.in_flight):,} in flight  "
            f"{record['adapters'] / record['step_seconds']:,.1f} steps/s  {record['tokens_per_second']:,.0f} tokens/s  "
            f"{size(record['memory_bytes'])}",
        )

    def stop_requested(self) -> bool:
        """Whether a signal asks this run to stop; the processes look at each other's, and each stops at its round."""
        flag = f"stop {self.meeting}"
        if self.signals.asked is not None:
            self.stopped_by = self.signals.asked
            self.group.set_flag(flag)
        elif self.group.world_size > 1 and self.group.has_flag(flag):
            self.stopped_by = "a signal to another process"
        return self.stopped_by is not None

    def _meet(self) -> None:
        """Wait until every process is here. It may take hours, which no collective may."""
        if self.group.world_size == 1 or self.group.store is None:
            return
        self.group.set_flag(f"here {self.meeting} {self.group.rank}")
        missing = set(range(self.group.world_size))
        while missing := {rank for rank in missing if not self.group.has_flag(f"here {self.meeting} {rank}")}:
            self.stop_requested()
            time.sleep(_WAIT_SECONDS)
        found = [stopped for stopped in self.group.gather(self.stopped_by) if stopped is not None]
        self.stopped_by = found[0] if found else None

    def save_checkpoint(self) -> None:
        """Save everything that a later round depends on."""
        if self.log_file is not None:
            self.log_file.flush()
        checkpoints.save(self)
        self.saved_round = self.round

    def _end(self, error: OutOfMemory) -> RunFailed:
        """Save the round before one that memory did not suffice for, and write run.json; returns the error to raise."""
        if self.group.world_size > 1:
            return OutOfMemory(str(error))  # this rank's own: the others are elsewhere, and must hear of it
        if self.round == self.whole_round != self.saved_round:
            self.save_checkpoint()
        if self.saved_round:
            error = OutOfMemory(
                f"{error}\nRound {self.saved_round} is saved: the same command with --resume goes on from it."
            )
        self._finish("failed")
        return error

    def _finish(self, status: str) -> None:
        """Write run.json and the report, with the adapters of all processes; the ranks wait for it."""
        mine = [[run.number, adapter_result(run, self.recipe)] for run in self.runs]
        entries = [entry for _, entry in sorted(one for found in self.group.gather(mine) for one in found)]
        lacking = self.datasets.adapters_without_rows
        add_results(self.run, self, status, [*entries, *map(without_rows, lacking)])

        def write() -> None:
            if status == "done":
                checkpoints.join_records(self.run_dir, self.group.world_size)
            write_run(self.run_dir, self.run, self.console)

        self.group.on_first(write)
