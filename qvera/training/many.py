"""The run of many adapters on one base model, in forward passes that they share (`bank_loop.BankLoop`).

Each adapter is trained as if it were alone, by the same recipe over a file of its rows. It shares only the pass through
the frozen base. It leaves when its steps are taken, when it stops early, or when its loss or gradient is not finite;
the next of the queue takes its slot. One whose held-out loss is not finite at its end is not saved.

Several processes share out the adapters. Each has checkpoints of its own, and they meet only at the beginning and at
the end. All of them must see the same run directory.
"""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qvera.adapters.bank import AdapterBank
from qvera.adapters.save_load import save_adapter
from qvera.data import Example
from qvera.distributed.group import ALONE, for_all
from qvera.training import checkpoint
from qvera.training.bank_loop import BankLoop
from qvera.training.checkpoint import Checkpoint, TrainState
from qvera.training.failures import LOWER_RATE, has_finite_loss
from qvera.training.loop import Records
from qvera.training.plan.decisions import wanted_slots
from qvera.training.roster import AdapterRun, Roster, adapter_runs, deal, longest_pass
from qvera.training.run import Run
from qvera.training.run_dir import KEPT, MetricsLog, join_records, metrics_path, step_facts, write_run
from qvera.utils import memory
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError, NotFinite
from qvera.utils.files import ADAPTER_WEIGHTS, ADAPTERS, disk_errors, file_sha256, plain_json, resolve_path
from qvera.utils.formatting import counted

GOT_WORSE = "got worse"  # the held-out loss is higher after training than before
TOO_FEW_ROWS = "too few rows"  # than one optimizer step takes
REPEATED = "held-out rows repeat training rows"  # token for token, of the same adapter
_WAIT_SECONDS = 0.2  # how often a process that is done looks whether the others are
_FRESH = vars(TrainState())  # what is still as at the beginning is left out: there may be a hundred thousand adapters


class ManyTrainer(Run):
    """A run of many adapters."""

    unit = "round"
    loop: BankLoop
    steps = 0

    @property
    def count(self) -> int:
        return self.loop.round

    @property
    def steps_behind(self) -> int:
        return self.loop.roster.steps_behind

    @property
    def has_steps_left(self) -> bool:
        return bool(self.loop.roster.queue or self.loop.in_flight)

    def load_data(self, preview: bool = False) -> None:
        """Load the session's rows (`TrainingSession.load_data`), and make the adapters that this process trains."""
        super().load_data(preview)
        every = self.group.agree(lambda: adapter_runs(self.recipe, self.session.datasets))
        self.runs = [
            every[number] for number in deal([run.steps for run in every], self.group.world_size)[self.group.rank]
        ]
        base = Path(resolve_path(self.recipe.model.path)).name
        if base in (run.name for run in every):
            self.warn(f"{shown_name(base)}: an adapter and the base have this name, and `qvera serve` means the base.")
        self.steps = sum(run.steps for run in self.runs)
        sizes = sorted(len(run.rows.train) for run in every)
        spread = f"{sizes[0]:,} to {sizes[-1]:,} rows (median {sizes[len(sizes) // 2]:,})"
        spread = f"{counted(sizes[0], 'row')} each" if sizes[0] == sizes[-1] else spread
        self.say(f"{len(every):,} adapters of {spread}, {sum(run.steps for run in every):,} optimizer steps together.")

    def no_longer(self) -> str | None:
        return "each of its adapters ends with its own steps, and is not taken up again"

    def setup(self) -> None:
        """Make bank and loop, try the longest pass and open the files. A resumed run has as many slots as at first."""
        session, training = self.session, self.recipe.training
        if session.scaler is not None:
            raise InputError(
                "model.compute_dtype: this device has no bfloat16, so auto is float16, which needs a loss scale that "
                "the adapters would share. Set float32."
            )
        saved = self.group.agree(self._newest_checkpoint) if self.resume else None
        if saved is not None:
            slots = saved.state["slots"]
        else:
            slots = wanted_slots(self.recipe, [len(run.rows.train) for run in self.runs])
            if session.plan is not None:  # which knows what memory there is
                slots = min(slots, session.plan.slots)
        bank = AdapterBank(session.model, slots)
        # auto: adapters are let in while all of their steps' rows fit into one pass
        pass_rows = training.per_device_train_batch_size if training.adapters_at_once == "auto" else None
        self.totals, self.whole_round = {"seconds": 0.0, "input_tokens": 0}, 0  # of all rounds of this process

        def make_loop() -> BankLoop:
            if saved is not None:
                self._restore_runs(saved)
            roster = Roster(self.runs, slots, pass_rows)
            loop = BankLoop(session.model, bank, roster, self.recipe, session.datasets.pad_id, session.plan)
            if saved is not None:
                self._restore(saved, loop)
            elif self.resume:
                self.say(f"No checkpoint is in {self.run_dir}: starting from round 0.")
            return loop

        self.loop = self.group.agree(make_loop)  # others may have no checkpoint, so no rank waits in it
        saved = None  # its tensors take memory
        for run in self.loop.in_flight:
            run.begin()
        session.prepare_model(alone=slots == 1)
        self.group.agree(self._try_longest_pass)
        # A fresh name for this run's flags, which outlive processes that the launcher restarts.
        self.meeting = self.group.broadcast(uuid.uuid4().hex)
        self.open_files()
        self.group.agree(self._open_own_files)  # after rank 0's, among which the others look for its recipe.yaml
        planned = int(self.group.sum([float(self.steps)])[0])  # of all processes
        # each adapter's parameters; the model's are frozen
        known = {"adapters": self._entries()} if self.resume else {}
        self.write_begun(planned, known, trainable_parameters=bank.trained_numbers)
        self.say(
            f"Training {bank.trained_numbers:,} parameters of each adapter in "
            f"{self.summary['adapter']['adapted_modules']} linear layers, at most {slots:,} adapters at a time, on "
            f"{self.summary['device']}"
            + (f" and {self.group.world_size - 1} more." if self.group.world_size > 1 else ".")
        )

    def _newest_checkpoint(self) -> Checkpoint | None:
        """Find the newest checkpoint of this process. InputError where the data or the number of processes differ."""

        def check(saved: Checkpoint) -> None:
            # only to raise KeyError or TypeError for what another version wrote
            state = saved.state
            for entry in state["adapters"]:
                TrainState(**entry["state"])
            state["processes"], state["slots"], state["round"], state["totals"], state["builds_per_pass"]

        saved = checkpoint.newest_of_run(self.run_dir, self.recipe, "round", self.warn, check, self.group.rank)
        if saved is None:
            return None
        checkpoint.require_same_inputs(saved.path, saved.state.get("inputs"), self.session.inputs)
        if (processes := saved.state["processes"]) != self.group.world_size:
            raise InputError(
                f"{saved.path}: was written by one of {processes} processes, which share out the adapters among "
                f"them, and now there are {self.group.world_size}. Go on with as many."
            )
        return saved

    def _restore_runs(self, saved: Checkpoint) -> None:
        best = saved.files.get("best", {})
        for run, entry in zip(self.runs, saved.state["adapters"], strict=True):
            directory = self.run_dir / ADAPTERS / run.directory
            if entry["status"] in ("done", "stopped_early") and not directory.exists():
                self.warn(f"{directory}: is gone, so adapter {shown_name(run.name)} is trained again.")
                continue
            run.status, run.slot, run.after, run.reason = (entry[key] for key in ("status", "slot", "after", "reason"))
            run.sha256 = entry.get("sha256")  # an earlier version did not keep it
            run.state = TrainState(**entry["state"])
            found = best.get(str(run.number))
            run.best = None if found is None else found.clone()  # it is the file, which would stay in use

    def _restore(self, saved: Checkpoint, loop: BankLoop) -> None:
        """Put a checkpoint into the loop and torch's generators. InputError where the vectors have another shape."""
        vectors = saved.files["vectors"]["vectors"]
        if vectors.shape != loop.bank.vectors.shape:
            raise InputError(f"{saved.path}: its vectors are not those of this recipe (other rank, targets or model).")
        loop.bank.vectors.copy_(vectors)
        loop.adamw.load_state_dict(saved.files["optimizer"])
        loop.round = self.saved = self.whole_round = saved.number
        self.totals = dict(saved.state["totals"])
        checkpoint.set_generator_states(saved.files["random"])
        self.session.keep_checkpointing(saved.state["gradient_checkpointing"], ALONE)
        self.session.builds_per_pass = saved.state["builds_per_pass"]
        self.say(f"Going on from round {loop.round} ({saved.path}).")

    def _try_longest_pass(self) -> None:
        """Try a pass of the longest rows that may meet in one, dealt out to the slots in turn. Nothing is kept."""
        loop, bank, train = self.loop, self.loop.bank, self.session.datasets.train

        def try_batch(examples: list[Example]) -> None:
            try:
                loop.pass_nll([row % bank.slots for row in range(len(examples))], examples, [0.0] * len(examples))
            finally:
                bank.gradients.zero_()

        if loop.round == 0 and self.steps and self.recipe.training.try_longest_batch:
            rows = longest_pass(self.runs, train.lengths, bank.slots, loop.pass_rows)
            self.session.try_longest_batch([train[row] for row in rows], try_batch)

    def _open_own_files(self) -> None:
        with disk_errors(str(self.run_dir), "No step was taken; mend that and start it again."):
            if self.group.rank:
                if not (self.run_dir / "recipe.yaml").exists():
                    raise InputError(
                        f"{self.run_dir}: is not the directory that rank 0 writes to. Processes that share out "
                        "adapters write them into one; choose a training.output_dir on a disk that all nodes see."
                    )
                path = metrics_path(self.run_dir, self.group.rank)
                self.log_file = MetricsLog(path, self.loop.round, "round", self.group.rank)
            (self.run_dir / ADAPTERS).mkdir(exist_ok=True)

    @property
    def is_whole(self) -> bool:
        """Whether the last round is whole. Its evaluations, scores and saved adapters belong to it."""
        return self.loop.round == self.whole_round

    def score_before(self) -> None:
        """Score all adapters before training, in one slot, since they all begin with the same vectors."""
        if self.loop.round:
            return
        self.loop.bank.start(0)
        wanted = [(run, 0) for run in self.runs if len(run.rows.eval)]
        rows = sum(len(run.rows.eval) for run, _ in wanted)
        passes = -(-rows // self.recipe.training.per_device_eval_batch_size)

        def score() -> Iterator[Records]:
            results = yield from self.loop.score(wanted)
            for (run, _), result in zip(wanted, results, strict=True):
                run.state.before = result

        with self.session.phase("held-out loss of the base, in passes", passes) as show:
            for done, _ in enumerate(score(), 1):
                show(done)

    def take_turn(self) -> None:
        roster = self.loop.roster
        for run in roster.admit():
            self.loop.begin(run)
        taken = list[dict[str, Any]]()
        for records in self.loop.take_round():
            self.log(records)
            taken += [record for record in records if record["kind"] == "round"]
        self._let_out()
        # only now may the round be saved: its evaluations are made, and the adapters that it finished are written
        self.whole_round = self.loop.round
        for record in taken:
            self.progress(
                roster.steps_behind,
                facts=f"{roster.left:,} of {len(self.runs):,} adapters done, {len(roster.in_flight):,} in flight, "
                f"{step_facts(record)}",
            )
        if self.loop.round % self.recipe.training.save_steps == 0:
            self.save_checkpoint()

    def _let_out(self) -> None:
        """Save the adapters that are finished and scored, and free their slots."""
        loop, roster = self.loop, self.loop.roster
        for run in [run for run in roster.in_flight if run.has_ended]:
            if run.reason is None:
                directory = self.run_dir / ADAPTERS / run.directory
                vectors, template = loop.bank.take(run.held_slot), self.session.chat_template
                save_adapter(loop.model, directory, vectors=vectors, chat_template=template, kept=KEPT)
                run.sha256 = file_sha256(directory / ADAPTER_WEIGHTS)
                roster.leave(run, "stopped_early" if run.state.stopped_early else "done")
            else:
                name = shown_name(run.name)
                self.warn(f"Adapter {name}: {run.reason} It is stopped and not saved; the others go on.")
                roster.leave(run, "not_finite")

    def log(self, records: Records) -> None:
        """Write records to metrics.jsonl. Records of rounds go to the trackers too, with the memory that is held."""
        for record in records:
            if record["kind"] == "round":
                record["memory_bytes"] = memory.memory_bytes(self.session.device)
                record["peak_bytes"] = self.session.watch.peak_bytes
                self.totals["seconds"] += record["step_seconds"]
                self.totals["input_tokens"] += record["input_tokens"]
                self.trackers.log({**record, "step": record["round"]})
        if records:
            rank = {"rank": self.group.rank} if self.group.rank else {}
            self.write_records(*({**record, **rank} for record in records))
        self.loop.roster.steps_behind += sum(record["kind"] == "train" for record in records)

    def stop_requested(self) -> bool:
        """Whether this process or another one was asked to stop. Each of them stops after a round of its own."""
        flag = f"stop {self.meeting}"
        if self.asked is not None:
            self.stopped_by = self.asked
            self.group.set_flag(flag)
        elif self.group.world_size > 1 and self.group.has_flag(flag):
            self.stopped_by = "a signal to another process"
        return self.stopped_by is not None

    def meet(self) -> None:
        """Wait by flags until all processes are here: it may take hours, and a collective would time out."""
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
        if self.log_file is not None:
            self.log_file.flush()
        loop, session = self.loop, self.session
        best = {str(run.number): run.best for run in loop.in_flight if run.best is not None}
        files: dict[str, dict[str, torch.Tensor]] = {
            "vectors": {"vectors": loop.bank.vectors},
            "optimizer": loop.adamw.state_dict(),
            "random": checkpoint.generator_states(),
            **({"best": best} if best else {}),
        }
        adapters = [
            {key: getattr(run, key) for key in ("name", "status", "slot", "after", "reason", "sha256")}
            | {"state": {key: value for key, value in vars(run.state).items() if value != _FRESH[key]}}
            for run in self.runs
        ]
        state = {
            "recipe": self.recipe.to_dict(),
            "inputs": session.inputs,
            "processes": self.group.world_size,
            "slots": loop.bank.slots,
            "gradient_checkpointing": session.checkpointing,
            "builds_per_pass": session.builds_per_pass,
            "totals": self.totals,
            "adapters": adapters,
        }
        directory = checkpoint.of_rank(self.run_dir, self.group.rank)
        checkpoint.write(directory, "round", loop.round, files, plain_json(state))
        checkpoint.prune(directory, loop.round, self.recipe.training.save_total_limit, set())
        self.saved = loop.round

    def finish(self, status: str) -> None:
        """Write run.json with the adapters of all processes. NotFinite where a run that is done has saved none."""
        entries = self._entries()
        rounds, seconds, tokens = zip(
            *self.group.gather([self.loop.round, self.totals["seconds"], self.totals["input_tokens"]]), strict=True
        )
        longest = max(seconds)
        lost = status == "done" and all(entry["status"] in ("not_finite", "no_rows") for entry in entries)
        self.summary |= {"status": "failed" if lost else status, "adapters": entries}
        self.summary["result"] = {
            "rounds": max(rounds),
            "steps": sum(entry["steps"] for entry in entries),
            "planned_steps": sum(entry["planned_steps"] for entry in entries),
            "seconds": longest,
            "tokens_per_second": sum(tokens) / longest if longest else None,
            **self.measured(),
        }
        self.summary["samples"] = []

        def write() -> None:
            if status == "done":
                join_records(self.run_dir, self.group.world_size)
            write_run(self.run_dir, self.summary, self.console)

        self.group.on_first(write)
        if lost:
            raise for_all(NotFinite(f"No adapter's loss stayed finite, so none was saved. {LOWER_RATE}"))

    def _entries(self) -> list[dict[str, Any]]:
        """Return the entries in run.json of the adapters of all processes, in the order of the data."""
        mine = [[run.number, self._result(run)] for run in self.runs]
        entries = [entry for _, entry in sorted(numbered for theirs in self.group.gather(mine) for numbered in theirs)]
        return [*entries, *map(_without_rows, self.session.datasets.adapters_without_rows)]

    def _result(self, run: AdapterRun) -> dict[str, Any]:
        """Return an adapter's entry in run.json. Its status is ``unfinished`` while it is still to be trained."""
        state, before, after = run.state, run.state.before, run.after
        worse = before is not None and after is not None and has_finite_loss(before) and after["loss"] > before["loss"]
        few = len(run.rows.train) < self.recipe.training.global_batch_size
        looks = {GOT_WORSE: worse, TOO_FEW_ROWS: few, REPEATED: run.rows.repeated_rows}
        return {
            "name": run.name,
            "directory": run.directory,
            "sha256": run.sha256,
            "status": run.status if run.has_left else "unfinished",
            "rows": len(run.rows.train),
            "eval_rows": len(run.rows.eval),
            "steps": state.step,
            "planned_steps": run.steps,
            "best_step": state.best_step,
            "train_loss_first": state.train_loss_first,
            "train_loss_last": state.train_loss_last,
            "eval_before": before,
            "eval_after": after,
            "flags": [flag for flag, holds in looks.items() if holds],
            **({} if run.reason is None else {"reason": run.reason}),
        }


def _without_rows(name: str) -> dict[str, Any]:
    """Return the entry in run.json of an adapter whose rows were all dropped or cut away."""
    empty = ("best_step", "train_loss_first", "train_loss_last", "eval_before", "eval_after")
    counts = ("rows", "eval_rows", "steps", "planned_steps")
    entry = {"name": name, "directory": None, "status": "no_rows"}
    return {**entry, **dict.fromkeys(counts, 0), **dict.fromkeys(empty), "flags": []}
