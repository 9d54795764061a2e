"""Trains jobs in the engine's thread, slice by slice, between answers.

After any end of the server a job goes on from its last saved state. The state is saved first, and the database marks
the job as done last. A process killed in between repeats the last things, with the same result.
"""

import csv
import dataclasses
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from qvera.serve.fine_tuning.database import TRAINED, Event, Job, now
from qvera.serve.fine_tuning.directory import TrainingDirectory
from qvera.serve.fine_tuning.preparing import without_recipe
from qvera.serve.store import AdapterStore, read_content
from qvera.training.online import OnlineTrainer
from qvera.training.roster import AdapterRun
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError, RunFailed, first_line
from qvera.utils.files import TRAINING_FACTS, disk_errors, plain_json, replace_text

_logger = logging.getLogger(__name__)
_SAVE_SECONDS = 30.0  # a state is saved after this long or this many steps of training, which a killed server repeats
_SAVE_STEPS = 100
_SAVE_PAUSE = 20.0  # but a save of t seconds, in which nothing is trained, is followed by t · 20 of training
_WRITE_SECONDS = 1.0  # events of steps are written together, this often
_PARK_SECONDS = 30.0  # no training for this long after the disk was full
_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate")


@dataclasses.dataclass
class Trained:
    """A job that has a slot of the trainer."""

    job: Job
    run: AdapterRun
    saved_step: int
    saved_at: float  # by the seconds of training, of all jobs
    is_named: bool  # what is under its adapter's name may be its own, and is replaced
    retry_at: float = 0.0  # when to write its adapter again after the disk was full


class Worker:
    """Trains the jobs, as the engine's `BackgroundWork`."""

    def __init__(
        self, directory: TrainingDirectory, trainer: OnlineTrainer, store: AdapterStore, wake: Callable[[], None]
    ) -> None:
        self._directory, self._database, self._trainer, self._store = directory, directory.database, trainer, store
        self._wake, self._clock = wake, time.monotonic
        self._lock = threading.Lock()
        self._ready: dict[str, tuple[Job, AdapterRun]] = {}
        self._stops: dict[str, Literal["cancel", "pause"]] = {}
        self._trained: dict[str, Trained] = {}
        self._events: list[Event] = []
        self._taken_again: dict[str, tuple[int, int]] = {}
        """Job → the last steps whose loss and held-out loss its state has; below 0: none.

        A server that was killed may have written events of later ones, which now come again. The next write removes
        them first.
        """
        self._wrote_at, self._parked_until = self._clock(), 0.0
        # waits for answers don't count: with a small share of the time each step would be followed by a save
        self._seconds_trained, self._save_from = 0.0, 0.0
        self._timer: threading.Timer | None = None
        self.tokens = 0  # trained on since the server's start

    # Called from any thread

    def add(self, job: Job, run: AdapterRun) -> None:
        """Take on a job whose rows are read."""
        with self._lock:
            self._ready[job.id] = job, run
        self._wake()

    def stop(self, job_id: str, how: Literal["cancel", "pause"]) -> None:
        """Take out a job that the database has as cancelled or paused."""
        with self._lock:
            self._ready.pop(job_id, None)
            self._stops[job_id] = how
        self._wake()

    def has_work(self) -> bool:
        """See `BackgroundWork.has_work`."""
        with self._lock:
            seconds = self._clock()
            trains = any(not one.run.has_ended or seconds >= one.retry_at for one in list(self._trained.values()))
            begins = self._ready and self._trainer.free_slots
            return seconds >= self._parked_until and bool(trains or self._stops or begins)

    # The engine's thread

    def run_slice(self) -> None:
        """See `BackgroundWork.run_slice`. It raises nothing: errors end jobs, or are retried later."""
        try:
            self._take_stops()
            self._begin_ready()
            if (due := self._due()) is not None:
                self._save_or_finish(due)
            elif self._trained:
                self._train()
            self._write_events()
        except (RunFailed, OSError) as error:  # what a full disk refused is written again afterwards
            _logger.warning("training waits %g s: %s", _PARK_SECONDS, error)
            self._parked_until = self._clock() + _PARK_SECONDS
            self._wake_later()

    def _take_stops(self) -> None:
        with self._lock:
            stops = list(self._stops.items())
        for job_id, how in stops:
            trained = self._trained.get(job_id)
            if trained is not None:
                if how == "pause":
                    self._save_paused(trained)
                self._let_go(trained)
            if how == "cancel":  # also of a job that has no slot, but had one before
                # what is not written yet would come after its end
                self._events = [event for event in self._events if event.job != job_id]
                self._directory.state(job_id).unlink(missing_ok=True)
            with self._lock:
                if self._stops.get(job_id) == how:  # and not another stop that came meanwhile
                    del self._stops[job_id]

    def _save_paused(self, trained: Trained) -> None:
        try:
            self._save(trained)
        except RunFailed:
            raise
        except Exception as error:  # it holds up no other job
            _logger.exception("%s can't be saved", trained.job.id)
            text = f"Once resumed, it goes on from its last save, as it can't be saved now: {self._text(error)}"
            self._events.append(Event(trained.job.id, text, level="error"))

    def _begin_ready(self) -> None:
        """Give free slots first to jobs that were running, then to the oldest of the owner with the fewest running."""
        while self._trainer.free_slots:
            owners = [trained.job.owner for trained in self._trained.values()]
            with self._lock:
                # one that was paused and resumed still has a slot until `_take_stops` has saved it
                ready = [job for job, _ in self._ready.values() if job.id not in self._trained]
                if not ready:
                    return
                turns = [(job.status not in TRAINED, owners.count(job.owner), job.created) for job in ready]
                job, run = self._ready.pop(ready[turns.index(min(turns))].id)
            try:
                self._begin(job, run)
            except RunFailed:  # the disk is full: the job waits with the others again
                self.add(job, run)
                raise
            self._write_events(at_once=True)

    def _begin(self, job: Job, run: AdapterRun) -> None:
        """Give a job a slot, and go on from its saved state if it has one. A job that can't begin has failed."""
        state = self._directory.state(job.id)
        saved = state if state.exists() else None
        status: Literal["finishing", "running"] = "finishing" if job.status == "finishing" else "running"
        if not self._database.move(job.id, ("queued", *TRAINED), status, started=job.started or now()):
            return  # cancelled or paused meanwhile
        try:
            self._trainer.begin(run, saved)
        except RunFailed:
            raise
        except Exception as error:
            if not isinstance(error, InputError):
                _logger.exception("%s can't begin", job.id)
            self._directory.fail(job.id, "server_error", f"It can't begin: {self._text(error)}")
            return
        step = run.state.step
        self._trained[job.id] = Trained(job, run, step, self._seconds_trained, is_named=status == "finishing")
        last = -1 if saved is None else step
        self._taken_again[job.id] = last, last - run.owes_score
        text = "Fine-tuning job started" if saved is None else f"Fine-tuning job goes on after step {step:,}"
        self._events.append(Event(job.id, f"{text}: {run.steps:,} steps over {len(run.rows.train):,} rows"))

    def _train(self) -> None:
        # jobs that have ended are still here while a full disk keeps their adapters from being written
        began, training = self._clock(), [one for one in self._trained.values() if not one.run.has_ended]
        try:
            records = self._trainer.run_slice() if training else []
        except Exception as error:
            _logger.exception("training failed; the jobs that were trained together are ended")
            for trained in training:
                self._fail(trained, "server_error", f"Training failed: {self._text(error)}")
            return
        self._seconds_trained += self._clock() - began
        for record in records:
            self.tokens += record.get("input_tokens", 0)
            self._events.append(metrics_event(record, self._trained[record["adapter"]].run.steps))

    def _due(self) -> Trained | None:
        """Return a job to finish, else the one to save that was saved longest ago: one a slice, as answers wait."""
        found: list[Trained] = []
        for trained in self._trained.values():
            steps, seconds = trained.run.state.step - trained.saved_step, self._seconds_trained - trained.saved_at
            if trained.run.has_ended:
                if self._clock() >= trained.retry_at:
                    return trained
            elif steps >= _SAVE_STEPS or (steps > 0 and seconds >= _SAVE_SECONDS):
                found.append(trained)
        if self._seconds_trained < self._save_from:
            return None
        return min(found, key=lambda trained: trained.saved_at, default=None)

    def _save_or_finish(self, trained: Trained) -> None:
        try:
            if trained.run.has_ended:
                self._finish(trained)
            else:
                self._save(trained)
        except RunFailed:
            raise
        except Exception as error:
            _logger.exception("%s can't be saved", trained.job.id)
            self._fail(trained, "server_error", f"It can't be saved: {self._text(error)}")

    def _save(self, trained: Trained) -> None:
        """Save a job's state, from which it goes on after a restart."""
        # events first: those of steps that the state holds never come again
        self._write_events(at_once=True)
        began = self._clock()
        self._trainer.save(trained.run, self._directory.state(trained.job.id))
        trained.saved_step, trained.saved_at = trained.run.state.step, self._seconds_trained
        self._save_from = self._seconds_trained + _SAVE_PAUSE * (self._clock() - began)

    def _finish(self, trained: Trained) -> None:
        """Write a job's adapter and results, and mark it as done; or end it as failed.

        Each step may be done again after a kill. So the last status is written last, and then the state may go.
        """
        job, run = trained.job, trained.run
        if run.reason is not None:
            files = [self._database.file(id) for id in (job.training_file, job.validation_file) if id is not None]
            text = self._directory.for_owner(without_recipe(run.reason), files)
            return self._fail(trained, "training_failed", text)
        self._save(trained)
        # the name was free when the job was created, but others write into the directory of adapters, too
        directory = self._store.directory_for(job.model)
        if directory.exists() and not (job.replaces or trained.is_named):
            text = f"While this job ran, another adapter was given the name {shown_name(job.model)}."
            return self._fail(trained, "name_taken", f"{text} It was not replaced.")
        # from here on it can't be cancelled, and what is under its name is its own
        if not self._database.move(job.id, TRAINED, "finishing"):
            return  # cancelled or paused: `_take_stops` sees to it
        trained.is_named = True
        try:
            self._trainer.save_adapter(run, directory)
            write_facts(directory, job, run)
        except RunFailed as error:  # it holds up no other job
            _logger.warning("%s: its adapter can't be written; again in %g s: %s", job.id, _PARK_SECONDS, error)
            trained.retry_at = self._clock() + _PARK_SECONDS
            return self._wake_later()
        self._store.add(job.model, directory)
        results = steps_csv(self._database.metrics(job.id))
        file = self._directory.write_results(job.owner, f"{job.id}-steps.csv", results)
        texts = (f"New fine-tuned model created: {job.model}", "The job has successfully completed")
        said = [Event(job.id, text) for text in texts]
        changes = {"finished": now(), "trained_tokens": run.state.input_tokens, "step": run.kept_step}
        try:
            self._database.move(job.id, ("finishing",), "succeeded", file, *said, result_file=file.id, **changes)
        except RunFailed:
            self._directory.place(file).unlink(missing_ok=True)
            raise
        self._let_go(trained)
        self._directory.state(job.id).unlink(missing_ok=True)

    def _text(self, error: Exception) -> str:
        """A message for the job's owner, without paths on the server's disk."""
        if isinstance(error, OSError):
            return "the server's log says why."
        return self._directory.without_places(first_line(error))

    def _fail(self, trained: Trained, code: str, message: str) -> None:
        self._write_events(at_once=True)  # of its steps, before that of its end
        self._directory.fail(trained.job.id, code, message)
        self._let_go(trained)

    def _let_go(self, trained: Trained) -> None:
        self._trainer.end(trained.run)
        self._trained.pop(trained.job.id, None)

    def _write_events(self, at_once: bool = False) -> None:
        if self._events and (at_once or not self._trained or self._clock() - self._wrote_at >= _WRITE_SECONDS):
            self._database.add(*self._events, taken_again=self._taken_again)
            self._events, self._taken_again, self._wrote_at = [], {}, self._clock()

    def _wake_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()  # the later one is enough: what was to be done before is done then
        self._timer = threading.Timer(_PARK_SECONDS, self._wake)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Save what is being trained. The engine's thread must have ended."""
        if self._timer is not None:
            self._timer.cancel()
        for trained in list(self._trained.values()):
            try:
                self._save(trained)
            except Exception as error:  # it goes on from the state before, and the others are saved all the same
                _logger.warning("%s: %s", trained.job.id, error)


def metrics_event(record: dict[str, Any], steps: int) -> Event:
    """Return the event of a step or evaluation, with OpenAI's names for numbers. Infinite and NaN ones become None."""
    step, loss, is_eval = record["step"], record["loss"], record["kind"] == "eval"
    numbers = {"valid_loss": loss} if is_eval else {"train_loss": loss, "learning_rate": record.get("learning_rate")}
    message = f"Step {step:,}/{steps:,}: {'validation' if is_eval else 'training'} loss={loss:.4f}"
    data = dict(plain_json({"step": step, "total_steps": steps, **numbers}))
    return Event(record["adapter"], message, data=data, step=step)


def steps_csv(metrics: Sequence[Event]) -> str:
    """Return CSV with a line for each step: its losses and learning rate. Missing values are empty."""
    lines: dict[int | None, dict[str, Any]] = {}
    for event in metrics:
        lines.setdefault(event.step, {}).update(event.data or {})
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines.values())
    return out.getvalue()


def write_facts(directory: Path, job: Job, run: AdapterRun) -> None:
    """Write a job's facts beside its adapter, for `AdapterStore.facts`. Raises RunFailed if the disk is full."""
    facts = {
        "format": 1,
        "adapter_sha256": read_content(directory).sha256,  # they are facts of these vectors only
        "job": job.id,
        "rows": len(run.rows.train),
        "eval_rows": len(run.rows.eval),
        "steps": run.kept_step,
        "eval_before": run.state.before,
        "eval_after": run.after,
    }
    with disk_errors(str(directory), "The job goes on when there is room again."):
        replace_text(directory / TRAINING_FACTS, json.dumps(plain_json(facts), indent=1))
