"""The run of many adapters on one base model, in forward passes that they share (`loop.BankLoop`).

Each adapter is trained as if it were alone, by the same recipe over a file of its rows. It shares only the pass through
the frozen base. It leaves when its steps are taken, when it stops early, or when its loss or gradient is not finite;
the next of the queue takes its slot. One whose held-out loss is not finite at its end is not saved.

Several processes share out the adapters. Each has checkpoints of its own, and they meet only at the beginning and at
the end. All of them must see the same run directory.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qvera.adapters.bank import AdapterBank
from qvera.adapters.files.save_load import save_adapter
from qvera.data import Example
from qvera.distributed.group import ALONE, for_all
from qvera.training import bank_checkpoint
from qvera.training.bank_checkpoint import BankCheckpoint
from qvera.training.failures import step_error
from qvera.training.logging import MetricsLog
from qvera.training.loop import BankLoop, Records, Step
from qvera.training.optim import BankAdamW
from qvera.training.plan.decisions import wanted_slots
from qvera.training.roster import AdapterRun, Roster, adapter_runs, deal, longest_pass
from qvera.training.run import Run
from qvera.training.run_dir import adapter_result, add_results, begun_run, without_rows, write_run
from qvera.utils import memory
from qvera.utils.adapter_names import shown_name
from qvera.utils.atomic import disk_errors
from qvera.utils.errors import InputError, NotFinite, OutOfMemory
from qvera.utils.formatting import size
from qvera.utils.out_of_memory import Shortage
from qvera.utils.paths import ADAPTERS, resolve_path
from qvera.utils.status_line import status_line

T = TypeVar("T")

_WAIT_SECONDS = 0.2  # how often a process that is done looks whether the others are


@dataclasses.dataclass
class Totals:
    """What all rounds of a process took together."""

    seconds: float = 0.0
    input_tokens: int = 0


class ManyTrainer(BankLoop, Run):
    """A run of many adapters."""

    unit = "round"

    @property
    def in_flight(self) -> list[AdapterRun]:
        """See `BankLoop.in_flight`."""
        return self.roster.in_flight

    @property
    def pad_id(self) -> int:
        """See `BankLoop.pad_id`."""
        return self.datasets.pad_id

    @property
    def count(self) -> int:
        """See `Run.count`."""
        return self.round

    @property
    def steps_behind(self) -> int:
        """See `Run.steps_behind`."""
        return self.roster.steps_behind

    @property
    def has_steps_left(self) -> bool:
        """See `Run.has_steps_left`."""
        return not self.roster.is_done

    def load_data(self, preview: bool = False) -> None:
        """See `TrainingSession.load_data`; then the adapters of this process, as they begin."""
        super().load_data(preview)
        every = self.group.agree(lambda: adapter_runs(self.recipe, self.datasets))
        self.runs = [
            every[number] for number in deal([run.steps for run in every], self.group.world_size)[self.group.rank]
        ]
        base = Path(resolve_path(self.recipe.model.path)).name
        if base in (run.name for run in every):
            self.warn(f"{shown_name(base)}: an adapter and the base have this name, and `qvera serve` means the base.")
        sizes = sorted(len(run.rows.train) for run in every)
        self.console.print(
            f"{len(every):,} adapters of {sizes[0]:,} to {sizes[-1]:,} rows (median {sizes[len(sizes) // 2]:,}), "
            f"{sum(run.steps for run in every):,} optimizer steps together.",
            highlight=False,
            soft_wrap=True,
        )

    def make_optimizer(self) -> None:
        """Make the bank and its optimizer. A run that goes on has as many slots as it began with."""
        if self.scaler is not None:
            raise InputError(
                "model.compute_dtype: this device has no bfloat16, so auto is float16, which needs a loss scale that "
                "the adapters would share. Set float32."
            )
        self.step_group, self.totals, self.whole_round = ALONE, Totals(), 0
        self.steps = sum(run.steps for run in self.runs)
        self.pass_rows = self.recipe.training.per_device_train_batch_size
        self.resumed: BankCheckpoint | None = None
        if self.resume:
            self.resumed = self.group.agree(lambda: bank_checkpoint.newest(self, self.warn))
        if self.resumed is None:
            rows = [len(run.rows.train) for run in self.runs]
            slots = wanted_slots(self.recipe, rows)
            if self.plan is not None:  # which knows what memory there is
                slots = min(slots, self.plan.slots)
        else:
            slots = self.resumed.state["slots"]
        self.bank = AdapterBank(self.model, slots)
        self.adamw = BankAdamW(self.bank, self.recipe.training)

    def setup(self) -> None:
        """Go on from the checkpoint, if there is one; try the longest pass; open the run's files."""
        # others may have no checkpoint, so no rank waits in it
        self.group.agree(self._go_on)
        asked = self.recipe.training.adapters_at_once
        self.roster = Roster(self.runs, self.bank.slots, self.pass_rows if asked == "auto" else None)
        for run in self.roster.in_flight:
            run.begin()
        self.prepare_model(alone=self.bank.slots == 1)
        self.group.agree(lambda: self._try_longest_batch() if self.round == 0 else None)
        # names a meeting of this launch's processes
        self.meeting = self.group.broadcast(uuid.uuid4().hex)
        self.open_files()
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
        saved = self.resumed
        if saved is not None:
            bank_checkpoint.restore(self, saved)
            self.keep_checkpointing(saved.state["gradient_checkpointing"], ALONE)
            self.builds_per_pass = saved.state["builds_per_pass"]
            self.saved, self.whole_round = self.round, self.round
            self.console.print(f"Going on from round {self.round} ({saved.path}).", soft_wrap=True)
            self.resumed = None  # its tensors take memory
        elif self.resume:
            self.console.print(f"No checkpoint was saved in {self.run_dir} yet: starting from round 0.", soft_wrap=True)

    def longest_batch(self) -> list[Example]:
        """The longest rows that may meet in a pass."""
        train = self.datasets.train
        rows = longest_pass(self.runs, train.lengths, self.bank.slots, self.pass_rows)
        return [train[row] for row in rows]

    def try_batch(self, examples: list[Example]) -> None:
        """Forward and backward over the rows, dealt out to the slots in turn; nothing is kept."""
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
                path = bank_checkpoint.metrics_path(self.run_dir, self.group.rank)
                self.log_file = MetricsLog(path, self.round, "round", self.group.rank)
            (self.run_dir / ADAPTERS).mkdir(exist_ok=True)

    @property
    def is_whole(self) -> bool:
        """See `Run.is_whole`; evaluations and scores of a round belong to it."""
        return self.round == self.whole_round

    def score_before(self) -> None:
        """See `Run.score_before`. All adapters begin with the same vectors, so they share full passes in one slot."""
        if self.round:
            return
        self.bank.start(0)
        wanted = [(run, 0) for run in self.runs if len(run.rows.eval)]
        with status_line(self.console, "Before training: held-out loss"):
            for (run, _), result in zip(wanted, result_of(self.score(wanted)), strict=True):
                run.state.before = result

    def take_turn(self) -> bool:
        """See `Run.take_turn`."""
        try:
            for run in self.roster.admit():
                self.bank.start(run.held_slot)
                self.adamw.reset(run.held_slot)
                run.begin()
            taken: Records = []
            for records in self.take_round():
                self.log(records)
                taken += [record for record in records if record["kind"] == "round"]
            self._let_out()
        except OutOfMemory as error:
            raise self.end(error) from None
        self.whole_round = self.round
        for record in taken:
            self.progress.move(
                self.roster.steps_behind,
                f"{self.roster.left:,} of {len(self.runs):,} adapters done, {len(self.in_flight):,} in flight  "
                f"{record['adapters'] / record['step_seconds']:,.1f} steps/s  "
                f"{record['tokens_per_second']:,.0f} tokens/s  {size(record['memory_bytes'])}",
            )
        return self.round % self.recipe.training.save_steps == 0

    def count_step(self, step: Step, norms: Any) -> Records:
        """See `BankLoop.count_step`; adds a record of kind ``round``."""
        seconds, records = step.seconds, super().count_step(step, norms)
        inputs = sum(step.input_tokens.values())
        self.totals.seconds += seconds
        self.totals.input_tokens += inputs
        self.roster.steps_behind += len(records)
        about = {
            "kind": "round",
            "round": step.number,
            "adapters": len(step.targets),
            "rows": len(step.rows),
            "passes": len(step.pass_rows),
            "input_tokens": inputs,
            "step_seconds": seconds,
            "tokens_per_second": inputs / seconds,
            "memory_bytes": memory.memory_bytes(self.device),
            "peak_bytes": self.watch.peak_bytes,
        }
        return [*records, about]

    def make_smaller(self, step: Step, shortage: Shortage | None) -> Records:
        """See `Loop.make_smaller`: the run ends, with what would help."""
        assert shortage is not None
        raise step_error(f"Round {step.number}", shortage, step.examples, self.plan, self.datasets.train, ALONE)

    def _let_out(self) -> None:
        """Save the adapters that are finished and scored, and free their slots."""
        for run in [run for run in self.roster.in_flight if run.has_ended]:
            if run.reason is None:
                directory = self.run_dir / ADAPTERS / run.directory
                save_adapter(self.model, directory, vectors=self.bank.take(run.held_slot))
                self.roster.leave(run, "stopped_early" if run.state.stopped_early else "done")
            else:
                name = shown_name(run.name)
                self.warn(f"Adapter {name}: {run.reason} It is stopped and not saved; the others go on.")
                self.roster.leave(run, "not_finite")

    def log(self, records: Sequence[dict[str, Any]]) -> None:  # type: ignore[override]
        """Write records to metrics.jsonl; those of rounds go to the trackers too."""
        if records:
            rank = {"rank": self.group.rank} if self.group.rank else {}
            self.write_records(*({**record, **rank} for record in records))
        for record in records:
            if record["kind"] == "round":
                self.trackers.log({**record, "step": record["round"]})

    def stop_requested(self) -> bool:
        """See `Run.stop_requested`; the processes look at each other's, and each stops at its round."""
        flag = f"stop {self.meeting}"
        if self.signals.asked is not None:
            self.stopped_by = self.signals.asked
            self.group.set_flag(flag)
        elif self.group.world_size > 1 and self.group.has_flag(flag):
            self.stopped_by = "a signal to another process"
        return self.stopped_by is not None

    def meet(self) -> None:
        """See `Run.meet`. It may take hours, which no collective may."""
        if self.group.world_size == 1 or self.group.store is None:
            return
        self.group.set_flag(f"here {self.meeting} {self.group.rank}")
        missing = set(range(self.group.world_size))
        while missing := {rank for rank in missing if not self.group.has_flag(f"here {self.meeting} {rank}")}:
            self.stop_requested()
            time.sleep(_WAIT_SECONDS)
        stops = [stopped for stopped in self.group.gather(self.stopped_by) if stopped is not None]
        self.stopped_by = stops[0] if stops else None

    def save_checkpoint(self) -> None:
        """See `Run.save_checkpoint`."""
        if self.log_file is not None:
            self.log_file.flush()
        bank_checkpoint.save(self)
        self.saved = self.round

    def finish(self, status: str) -> None:
        """See `Run.finish`; with the adapters of all processes. NotFinite where a run that is done saved none."""
        mine = [[run.number, adapter_result(run, self.recipe)] for run in self.runs]
        entries = [entry for _, entry in sorted(numbered for theirs in self.group.gather(mine) for numbered in theirs)]
        lacking = self.datasets.adapters_without_rows
        add_results(self.run, self, status, [*entries, *map(without_rows, lacking)])

        def write() -> None:
            if status == "done":
                bank_checkpoint.join_records(self.run_dir, self.group.world_size)
            write_run(self.run_dir, self.run, self.console)

        self.group.on_first(write)
        if status == "done" and all(entry["status"] in ("not_finite", "no_rows") for entry in entries):
            text = "No adapter's loss stayed finite, so none was saved. Lower training.learning_rate."
            raise for_all(NotFinite(text))


def result_of(work: Generator[Records, None, T]) -> T:
    """Run a generator to its end at once, and give what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
