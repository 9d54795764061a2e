"""What a client may do with jobs. These methods may block, so call them in a thread, not on the event loop."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from qvera.serve.fine_tuning.directory import TrainingDirectory
from qvera.serve.fine_tuning.preparing import Preparer, Recipes
from qvera.serve.fine_tuning.records import (
    BEFORE,
    OPEN,
    TRAINING,
    Event,
    Job,
    NotMade,
    Refused,
    Status,
    StoredFile,
    TooMany,
    UnknownRecord,
    new_id,
    now,
)
from qvera.serve.fine_tuning.worker import Worker, maker_of
from qvera.training.online import OnlineTrainer
from qvera.training.run_dir import require_writable
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError
from qvera.utils.paths import ADAPTER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qvera.serve.engine import Engine
    from qvera.serve.opening import Served
    from qvera.serve.store import AdapterStore

_RUNS: tuple[Status, ...] = (*BEFORE, "running")
"""These may be paused. These and paused ones may be cancelled."""


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A client's request for a job, by OpenAI's names."""

    base: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int | None
    hyperparameters: dict[str, Any]
    metadata: dict[str, str]
    replace: bool


class Jobs:
    """The jobs of a training directory. Methods raise UnknownRecord if the owner has no such job."""

    def __init__(
        self,
        directory: TrainingDirectory,
        recipes: Recipes,
        trainer: OnlineTrainer,
        store: AdapterStore,
        tokenizer: PreTrainedTokenizerBase,
        wake: Callable[[], None],
    ) -> None:
        """``wake`` tells the engine to ask ``worker.has_work`` again."""
        self.directory, self.database = directory, directory.database
        self._recipes, self._store = recipes, store
        self._naming = threading.Lock()  # so that no two jobs take one name
        self._changing = threading.Lock()  # so that the worker hears of a pause before a resume
        self.worker = Worker(directory, trainer, store, wake)
        self._preparer = Preparer(directory, recipes, tokenizer, trainer, self.worker.add)

    def __enter__(self) -> Self:
        """Continue the jobs that the last server left unfinished; those that were running come first."""
        found = [job for job in self.database.open_jobs() if job.status != "paused"]
        for job in sorted(found, key=lambda job: job.status in BEFORE):
            self._preparer.add(job.id)
        self._preparer.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Save what is being trained. The engine's thread must have ended."""
        self._preparer.close()
        self.worker.close()

    def create(self, asked: Asked, owner: str, covers: Callable[[str], bool], most_open: int | None) -> Job:
        """Queue a job. ``covers``: whether the owner may use the model of a name.

        Raises:
            Refused: a file does not exist, or the name can't be used.
            InputError: the hyperparameters do not fit together.
            TooMany: the owner has ``most_open`` unfinished jobs.
        """
        files = [self._file(asked.training_file, owner, "training_file")]
        if asked.validation_file is not None:
            files.append(self._file(asked.validation_file, owner, "validation_file"))
            if asked.validation_file == asked.training_file:
                raise Refused("validation_file: is the training file; held-out rows are others.", "validation_file")
        job_id = new_id("ftjob")
        model = asked.suffix if asked.suffix is not None else f"ft-{job_id.partition('-')[2]}"
        if not covers(model):
            how = "may not use a model of this name" if asked.suffix else "has models of its own: give the name of one"
            raise Refused(f"suffix: {shown_name(model)} would be the model's name, and this key {how}.", "suffix")
        job = Job(
            id=job_id,
            owner=owner,
            model=model,
            base=asked.base,
            training_file=asked.training_file,
            validation_file=asked.validation_file,
            seed=asked.seed,
            asked=asked.hyperparameters,
            replaces=asked.replace,
            metadata=asked.metadata,
            recipe={},
        )
        recipe = self._recipes.of(job, *(self.directory.place(file).name for file in files))
        job = dataclasses.replace(job, recipe=recipe.to_dict())
        said = [Event(job.id, f"Created fine-tuning job: {job.id}")]
        said += [Event(job.id, f"Validating file: {file.name}") for file in files]
        with self._naming:
            self._require_free(model, asked.replace)
            if not self.database.add_job(job, said, most_open):
                raise TooMany
        self._preparer.add(job.id)
        return job

    def _file(self, file_id: str, owner: str, param: str) -> StoredFile:
        try:
            file = self.database.file(file_id, owner)
        except UnknownRecord:
            raise Refused(f"{param}: there is no file {file_id[:100]!r}.", param, "invalid_file") from None
        if file.purpose != TRAINING:
            raise Refused(f"{param}: {file_id} has the purpose {file.purpose!r}; expected {TRAINING!r}.", param)
        return file

    def _require_free(self, model: str, replace: bool) -> None:
        try:
            directory = self._store.directory_for(model)
        except InputError as error:
            raise Refused(f"suffix: {error}", "suffix") from None
        if self.database.job_of_model(model, OPEN) is not None:
            raise Refused(
                f"suffix: another job makes {shown_name(model)} already; wait for it, or cancel it.", "suffix"
            )
        if directory.exists() and not (directory / ADAPTER_CONFIG).is_file():
            text = f"suffix: what lies in the place of {shown_name(model)} is no adapter. Use another name."
            raise Refused(text, "suffix", "name_taken")
        if directory.exists() and not replace:
            raise Refused(
                f'suffix: there is a model {shown_name(model)} already. Use another name, or send "replace": true.',
                "suffix",
                "name_taken",
            )

    def cancel(self, job_id: str, owner: str) -> Job:
        """End a job; only its events are kept. Raises Refused if it has ended."""
        event = Event(job_id, "Fine-tuning job cancelled")
        return self._stop(job_id, owner, (*_RUNS, "paused"), "cancelled", event)

    def pause(self, job_id: str, owner: str) -> Job:
        """Save a job and free its slot. Raises Refused if it has ended or is paused."""
        return self._stop(job_id, owner, _RUNS, "paused", Event(job_id, "Fine-tuning job paused"))

    def _stop(self, job_id: str, owner: str, expected: tuple[Status, ...], status: Status, event: Event) -> Job:
        job = self.database.job(job_id, owner)
        ended = {"finished": now()} if status == "cancelled" else {}
        with self._changing:
            if not self.database.move(job_id, expected, status, event, **ended):
                raise self._too_late(job)
            self.worker.stop(job_id, "cancel" if status == "cancelled" else "pause")
        return self.database.job(job_id)

    def resume(self, job_id: str, owner: str) -> Job:
        """Queue a paused job again, to go on where it was. Raises Refused if it is not paused."""
        job = self.database.job(job_id, owner)
        event = Event(job_id, "Fine-tuning job resumed")
        with self._changing:
            if not self.database.move(job_id, ("paused",), "validating_files", event):
                raise self._too_late(job)
        self._preparer.add(job_id)
        return self.database.job(job_id)

    def _too_late(self, job: Job) -> Refused:
        status = self.database.job(job.id).status
        return Refused(f"The job {job.id} is {status.replace('_', ' ')}, so that can't be done.", code="invalid_status")

    def delete_model(self, model: str, owner: str) -> None:
        """Delete an adapter that a job of this owner made. Raises NotMade if none did, or it was replaced."""
        job = self.database.job_of_model(model, ("succeeded",))
        directory = self._store.directory_for(model)
        if job is None or job.owner != owner or maker_of(directory) != job.id:
            raise NotMade
        if (other := self.database.job_of_model(model, OPEN)) is not None:
            raise Refused(f"The job {other.id} makes this model anew; cancel it first.", "model")
        gone = directory.with_name(f".{directory.name}.deleted")
        shutil.rmtree(gone, ignore_errors=True)
        try:
            directory.rename(gone)  # at once: nobody finds half of it
        except FileNotFoundError:  # another call was first
            raise NotMade from None
        shutil.rmtree(gone, ignore_errors=True)
        self.database.forget_model(job.id)


def open_jobs(directory: TrainingDirectory, served: Served, engine: Engine, at_once: int) -> Jobs:
    """Open a training directory's jobs as the engine's background work. They continue once it is entered (``with``).

    Raises InputError if there is no directory for adapters, or the served recipe can't train several at once.
    """
    if served.store.root is None:
        raise InputError(
            "--training-dir: what is trained becomes a model of the directory of adapters, and there is none. Name one "
            "with --adapters DIR; it may be empty."
        )
    require_writable(served.store.root / "adapter", "--adapters")
    recipes = Recipes(served.opened.target)
    trainer = OnlineTrainer(served.opened.base, recipes.server, at_once)
    jobs = Jobs(directory, recipes, trainer, served.store, served.opened.base.tokenizer, engine.wake)
    engine.set_background(jobs.worker)
    return jobs
