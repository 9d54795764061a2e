"""A run: a session and its loop, with lock, signals, metrics.jsonl, checkpoints and run.json in a directory.

A resumed run gives the same bits as an uninterrupted one: the rows of step k depend on k alone, the loss is the mean
over the targets (trained tokens, or rows) of the whole global batch, and a checkpoint holds all else that a step
depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.adapters.save_load import adapter_facts
from qvera.config.schema import load_recipe
from qvera.data import data_sha256, planned_steps
from qvera.distributed.group import for_all
from qvera.training import checkpoint
from qvera.training.callbacks import Callbacks
from qvera.training.run_dir import LENGTH, MetricsLog, Trackers, this_process, write_run_json
from qvera.utils import accelerator, memory
from qvera.utils.errors import InputError, Interrupted, OutOfMemory, OwnCodeFailed, RunFailed
from qvera.utils.files import ADAPTERS, RECIPE_FILE, disk_errors, replace_text, try_read_json, versions
from qvera.utils.formatting import duration

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.training.loop import Loop
    from qvera.training.session import TrainingSession

_MEASURED = 3  # steps, after which the time of all is told


@dataclasses.dataclass
class RunResult:
    """A finished run: its directory and the contents of its run.json."""

    run_dir: Path
    run: dict[str, Any]


class Run(ABC):
    """A training run: call `load_data`, `setup` and `train` in this order. The model is loaded before `setup`.

    ``summary`` becomes run.json.
    """

    unit = "step"  # what is counted, saved and logged: optimizer steps of the adapter, or rounds of all of them
    loop: Loop[Any]

    def __init__(self, session: TrainingSession, callbacks: Callbacks | None = None, resume: bool = False) -> None:
        self.session, self.recipe, self.run_dir = session, session.recipe, session.run_dir
        self.group, self.console, self.say, self.warn = session.group, session.console, session.say, session.warn
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.resume = resume  # the run in the directory is gone on with
        # run.json as it is: what the run took before must not be hidden by a process that takes no step, or a few
        self.before = (try_read_json(self.run_dir / "run.json") or {}) if resume else {}
        self.signals = session.signals
        self.stopped_by: str | None = None
        self.log_file: MetricsLog | None = None
        self.callbacks = callbacks or Callbacks()
        self.summary: dict[str, Any] = {}
        self.saved = 0
        names, config = self.recipe.training.report_to if self.group.first else [], self.recipe.to_dict()
        self.trackers = self.group.agree(lambda: Trackers(names, self.run_dir, config))

    def load_data(self, preview: bool = False) -> None:
        """Load the session's rows (`TrainingSession.load_data`). A run that goes on then checks its length."""
        self.session.load_data(preview)
        training, steps = self.recipe.training, self.planned_steps(self.recipe)
        chooses = training.load_best_model_at_end or training.early_stopping_patience
        of_one = steps > 0 and not self.recipe.data.has_adapters  # which have steps of their own
        if of_one and training.warmup_steps >= steps:
            text = f"with {training.warmup_steps:,} of {steps:,} steps, learning_rate is never reached."
            self.warn(f"training.warmup_steps: {text}")
        if of_one and chooses and training.eval_steps > steps:
            self.warn(
                f"training.eval_steps: with {training.eval_steps:,} of {steps:,} steps nothing is evaluated between, "
                "so no best step is chosen, and the run does not stop early."
            )
        if self.resume:
            ended = (self.run_dir / ADAPTERS).glob("[!.]*")  # of many adapters; maybe before the first checkpoint
            # before the base is loaded, and in a dry run
            if checkpoint.directories(self.run_dir / "checkpoints") or any(ended):
                rows = {"rows": (self.before.get("data") or {}).get("sha256")}
                checkpoint.require_same_inputs(self.run_dir, rows, {"rows": data_sha256(self.session.datasets)})
            self.group.on_first(self.check_length)
            known = (self.before.get("own") or {}).get("metrics") or ()
            if gone := [name for name in known if name not in self.session.task.own_metrics]:
                self.warn(f"metrics: the run goes on without {', '.join(gone)}, which it was begun with.")

    def check_length(self) -> None:
        """Say how a run goes on that has more steps now. InputError where it can't have more, or has fewer.

        It may have fewer where it ends at its newest checkpoint.
        """
        before = self.planned_steps(load_recipe(self.run_dir / RECIPE_FILE, of_a_run=True))
        now, saved = self.planned_steps(self.recipe), checkpoint.directories(self.run_dir / "checkpoints")
        newest = checkpoint.number_of(saved[-1]) if saved and not self.recipe.data.has_adapters else 0
        if now < before and now != newest:
            ends = f" To end it as it was last saved, set training.max_steps={newest}." if 0 < newest < before else ""
            raise InputError(
                f"{self.run_dir}: is a run of {before:,} steps, and now has {now:,}. It can be made longer, not "
                f"shorter: raise {' or '.join(LENGTH)}.{ends}"
            )
        if now > before:
            if (reason := self.no_longer()) is not None:
                directory = self.run_dir / "adapter"
                again = f"from its adapter: adapter.init_from={directory}, with"
                try:
                    self.recipe.replace(adapter={"init_from": str(directory)})
                except InputError:  # as where the reference of an objective is the base without an adapter
                    again = f"of what `qvera export {self.run_dir} OUT` writes, with OUT as model.path and"
                if not directory.exists():
                    again = f"when this one has come to its {before:,} steps, {again}"
                if self.recipe.data.has_adapters:
                    one = f"adapter.init_from={self.run_dir / ADAPTERS}/NAME"
                    again = f"with {' or '.join(LENGTH)} as they are meant, or one on an adapter's own rows ({one}), in"
                raise InputError(
                    f"{self.run_dir}: can't go on to {now:,} steps, since {reason}. Start a new run {again} another "
                    "training.output_dir."
                )
            training = self.recipe.training
            rate = f"warms up again and decays ({training.lr_scheduler_type})"
            if training.lr_scheduler_type == "constant":
                rate = "stays constant"
                if training.warmup_ratio and not training.warmup_steps:
                    rate = "keeps the warm-up that was planned first, and stays constant"
            self.say(f"{before:,} steps become {now:,}: the learning rate {rate} from step {before + 1:,} on.")

    def planned_steps(self, recipe: Recipe) -> int:
        """Return the number of steps of a run of this recipe over the session's rows, of all adapters together."""
        datasets = self.session.datasets
        parts = datasets.adapters if self.recipe.data.has_adapters else [datasets]
        return sum(planned_steps(recipe, len(part.train)) for part in parts)

    @abstractmethod
    def no_longer(self) -> str | None:
        """Return why this run can't be made longer; None: it can."""

    @abstractmethod
    def setup(self) -> None:
        """Make the loop, load the checkpoint to resume from, try the longest batch, and open the run's files."""

    def open_files(self, again: str | None = None) -> None:
        """Open metrics.jsonl without records after the last step, then write recipe.yaml. All ranks call this.

        ``again``: a kind of record of the last step that is dropped too, since it is made again.
        """

        def open_them() -> None:
            # by this a process that is restarted later knows that the run there is its own launch's
            self.group.set_flag(f"begun {self.run_dir}")
            with disk_errors(str(self.run_dir), "No step was taken; mend that and start it again."):
                self.run_dir.mkdir(parents=True, exist_ok=True)
                self.log_file = MetricsLog(self.run_dir / "metrics.jsonl", self.count, self.unit, again=again)
                replace_text(self.run_dir / "recipe.yaml", self.recipe.to_yaml())

        self.group.on_first(open_them)

    def write_begun(self, steps: int, known: dict[str, Any], **facts: Any) -> None:
        """Write run.json when the run begins. All ranks call this.

        ``known``: what a run that goes on has to tell already. ``facts``: more about its adapter.
        """
        session = self.session
        self.summary = {
            "format": 1,
            "status": "running",
            "started": self.started,
            "planned_steps": steps,
            "model": session.base.facts,
            "adapter": {**adapter_facts(session.model), "file_bytes": None, **facts},
            "data": {**session.datasets.stats.to_dict(), "sha256": session.inputs["rows"]},
            "versions": versions(),
            "device": memory.device_name(session.device),
            "plan": None if session.plan is None else session.plan.to_dict(),
            "gradient_checkpointing": session.checkpointing,
            "processes": {"count": self.group.world_size, "deepspeed": self.recipe.deepspeed, **this_process()},
            **({"own": own} if (own := session.task.own | self.callbacks.own) else {}),
            **known,
        }
        then, now = (
            {"compute dtype": (run.get("model") or {}).get("compute_dtype"), **(run.get("versions") or {})}
            for run in (self.before, self.summary)
        )
        if others := [name for name, value in then.items() if value is not None and value != now.get(name)]:
            had, has = (", ".join(f"{name} {facts.get(name)}" for name in others) for facts in (then, now))
            self.warn(
                f"The run had {had} and goes on with {has}: its numbers may not be those of an uninterrupted run."
            )
        self.group.on_first(lambda: write_run_json(self.run_dir, self.summary))

    def measured(self) -> dict[str, Any]:
        """Return the peak memory for run.json's result, and note it in plan and processes. All ranks call this."""
        watch, plan = self.session.watch, self.session.plan
        mapped_bytes = 0 if accelerator.is_accelerator(self.session.device) else memory.mapped_weights_bytes()
        peaks = self.group.gather({"host": self.group.host, "peak_bytes": watch.peak_bytes})
        self.summary["processes"]["ranks"] = peaks
        before = self.before.get("result") or {}
        peak_bytes = max(watch.peak_bytes, before.get("peak_bytes") or 0)
        mapped_bytes = max(mapped_bytes, before.get("mapped_bytes") or 0)
        if plan is not None:
            self.summary["plan"]["measured"] = plan.measured(peak_bytes, mapped_bytes, watch.peak_tensor_bytes)
        return {"peak_bytes": peak_bytes, "mapped_bytes": mapped_bytes}

    def write_records(self, *records: dict[str, Any]) -> None:
        """Write records to metrics.jsonl and, on rank 0, hand them to the functions among the callbacks."""
        if self.log_file is None:
            return
        self.log_file.write(*records)
        for record in records if self.group.first else ():
            self.callbacks.call_functions(record)

    @property
    def asked(self) -> str | None:
        """The name of the signal or callback that asks this process to stop, to be resumed; None: nothing asks."""
        return self.signals.asked or self.callbacks.stopped_by

    def train(self) -> RunResult | None:
        """Take the steps that are left, save what came out, and write run.json. Returns the result on rank 0."""
        waiting, is_alone = self.signals.waiting, self.group.world_size == 1
        # several processes stop together, where they compare what they were asked (`stop_requested`)
        with self.trackers, contextlib.nullcontext() if is_alone else waiting("saving after a step"):
            try:
                self.score_before()
                with waiting("saving after this step"):
                    self.take_steps()
                if is_alone and self.signals.asked and self.stopped_by is None:  # in the last step, which is saved now
                    raise KeyboardInterrupt(self.signals.asked)
                if self.stopped_by is None:
                    self.complete()
            except RunFailed as error:
                raise self.end(error) from None
            with waiting("writing run.json"):
                self.finish("done" if self.stopped_by is None else "interrupted")
            if self.stopped_by is not None:
                of_all = f" of {self.steps}" if self.unit == "step" else ""
                text = f"Stopped by {self.stopped_by} after {self.unit} {self.count}{of_all}, and saved. "
                raise for_all(Interrupted(f"{text}The same command goes on."))
        return RunResult(self.run_dir, self.summary) if self.group.first else None

    def take_steps(self) -> None:
        """Take the steps that are left, or those up to a request to stop, and save after the last one."""
        self.session.model.train()
        begun = self.count
        with self.session.phase("training", self.steps, done=self.steps_behind) as self.progress:
            while self.has_steps_left and not self.stop_requested():
                self.take_turn()
                if self.count == begun + _MEASURED and (left := self.progress.left_seconds) is not None:
                    self.say(
                        f"{self.steps:,} steps in all: about {duration(left)} to go, by the first {_MEASURED} "
                        f"{self.unit}s; evaluations and answers come on top."
                    )
        if self.count != self.saved:
            self.save_checkpoint()
        self.meet()

    def interrupted(self, signal: KeyboardInterrupt) -> Interrupted:
        """Return the error of a run that was stopped at once, and so keeps the last checkpoint only."""
        saved = checkpoint.directories(checkpoint.of_rank(self.run_dir, self.group.rank))
        text = f"No {self.unit} was saved yet: the same command begins again."
        if saved:
            number = checkpoint.number_of(saved[-1])
            text = f"{self.unit.capitalize()} {number} is saved: the same command goes on from it."
        return Interrupted(f"Stopped by {str(signal) or 'Ctrl-C'}. {text}")

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of steps or rounds taken so far."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """The optimizer steps that the whole run takes in this process."""

    @property
    @abstractmethod
    def steps_behind(self) -> int:
        """The number of ``steps`` that are done, for the progress bar."""

    @property
    @abstractmethod
    def has_steps_left(self) -> bool:
        """Whether `take_turn` has anything to do."""

    @property
    def is_whole(self) -> bool:
        """Whether the last step or round was taken as a whole, so that it may be saved."""
        return True

    def end(self, error: RunFailed) -> RunFailed:
        """Save the last whole step, unless its numbers or the disk failed, and write run.json; returns the error."""
        if self.group.world_size > 1 and self.loop.group.world_size == 1:
            # a copy without the mark of `for_all`: the others are elsewhere, and this rank's heartbeat must tell them
            return type(error)(str(error))
        if self.group.world_size > 1 and not error.shared:
            return error  # saving needs all ranks, and the others are elsewhere
        # the step that failed was undone; after other errors vectors or disk can't be trusted
        if isinstance(error, OutOfMemory | OwnCodeFailed):
            if self.is_whole and self.count != self.saved:
                self.save_checkpoint()
            if self.saved:
                said = (
                    f"{self.unit.capitalize()} {self.saved} is saved: the same command with --resume goes on from it."
                )
                if isinstance(error, OutOfMemory):
                    said += " Of keys that save memory it may change training.on_oom, training.gradient_checkpointing, "
                    said += "model.stream and deepspeed."
                error = for_all(type(error)(f"{error}\n{said}"))
        with contextlib.suppress(RunFailed):  # a disk that is full has its own error already
            self.finish("failed")
        return error

    @abstractmethod
    def score_before(self) -> None:
        """Score the held-out rows before the first step, unless that is done."""

    @abstractmethod
    def take_turn(self) -> None:
        """Take one step or round, log it, and evaluate and save where that is due."""

    @abstractmethod
    def stop_requested(self) -> bool:
        """Whether a signal or a callback asks this run to stop."""

    @abstractmethod
    def save_checkpoint(self) -> None:
        """Save everything that a later step depends on, and delete checkpoints beyond the recipe's limit."""

    def meet(self) -> None:  # noqa: B027  # optional
        """Wait until every process has taken its last step, where they take steps apart."""

    def complete(self) -> None:  # noqa: B027
        """Save the adapter that was trained, and score it."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """Write run.json and the report; ``status``: ``done``, ``interrupted`` or ``failed``. All ranks call it.

        The ranks wait for it: a launcher that sees one leave with 75 ends the others.
        """
