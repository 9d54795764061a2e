"""The jobs of a training directory: what a client may do with them, and the thread that reads their rows."""

import dataclasses
import logging
import queue
import shutil
import threading
from collections.abc import Callable
from typing import Self

from rich.console import Console

from qvera.data import build_datasets, data_warnings, lengths_of
from qvera.data.images import text_only
from qvera.data.source import has_columns
from qvera.models.loader import Base
from qvera.models.structure import context_note, require_positions
from qvera.models.tokenizer import require_embedded
from qvera.serve.api.errors import ApiError, bad_request
from qvera.serve.engine import Engine
from qvera.serve.fine_tuning.database import (
    BEFORE,
    OPEN,
    TRAINED,
    TRAINING,
    Event,
    Job,
    JobAction,
    JobStatus,
    StoredFile,
    not_made,
    now,
)
from qvera.serve.fine_tuning.directory import TrainingDirectory, remove_remains
from qvera.serve.fine_tuning.preparing import Recipes, without_recipe
from qvera.serve.fine_tuning.worker import Worker
from qvera.serve.opening import Served
from qvera.serve.store import AdapterStore
from qvera.training.online import OnlineTrainer
from qvera.training.roster import AdapterRun
from qvera.training.run_dir import changed_keys, require_writable
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import ADAPTER_CONFIG, TRAINING_FACTS, try_read_json

_logger = logging.getLogger(__name__)
_RETRY_SECONDS = 30.0
_DELETED = ".{}.deleted"  # an adapter's directory until its files are gone; no list shows hidden ones
_MOST_JSON_BYTES = 64 * 2**20  # to read one takes several times its size of memory; readers limit rows of other files
_JOIN_SECONDS = 5.0  # a closing server does not wait for a file of millions of rows
_ACTIONS: dict[JobAction, tuple[tuple[JobStatus, ...], JobStatus, str]] = {
    "cancel": ((*BEFORE, "running", "paused"), "cancelled", "Fine-tuning job cancelled"),
    "pause": ((*BEFORE, "running"), "paused", "Fine-tuning job paused"),
    "resume": (("paused",), "validating_files", "Fine-tuning job resumed"),
}
"""Action → the statuses that allow it, the new status, and the message of its event."""


class Jobs:
    """What clients may do with jobs.

    Methods may block, so call them in a thread. They raise ApiError: 404 if the owner has no such job.
    """

    def __init__(
        self,
        directory: TrainingDirectory,
        recipes: Recipes,
        trainer: OnlineTrainer,
        store: AdapterStore,
        base: Base,
        wake: Callable[[], None],
    ) -> None:
        """``wake`` tells the engine to ask ``worker.has_work`` again."""
        self.directory, self.database = directory, directory.database
        self._recipes, self._trainer, self._store = recipes, trainer, store
        self._model, self._tokenizer = base.model, text_only(base.tokenizer)
        self.worker = Worker(directory, trainer, store, wake)
        # so that no two jobs take one name, and the worker hears of a pause before a resume
        self._changing = threading.Lock()
        self._unread: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # ids of jobs
        self._closing = False
        self._reader = threading.Thread(target=self._read_rows, name="qvera-rows", daemon=True)

    def __enter__(self) -> Self:
        """Continue what the last server left unfinished: deletions, then jobs, those that ran first."""
        if self._store.root is not None:
            remove_remains(self._store.root.glob(_DELETED.format("*")))
        found = [job for job in self.database.open_jobs() if job.status != "paused"]
        for job in sorted(found, key=lambda job: job.status in BEFORE):
            self._unread.put(job.id)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Save what is being trained. The engine's thread must have ended. The next server reads unread rows."""
        self._closing = True
        self._unread.put(None)
        self._reader.join(_JOIN_SECONDS)
        self.worker.close()

    def create(self, job: Job, covers: Callable[[str], bool], most_open: int | None) -> Job:
        """Queue a new job, whose recipe is made here; without a model it gets a name of its own.

        ``covers``: whether the owner may use the model of a name.

        Raises:
            ApiError: 400 if a file does not exist, or the name can't be used; 429 at ``most_open`` unfinished jobs.
            InputError: the hyperparameters do not fit together.
        """
        files: list[StoredFile] = []
        for param, file_id in {"training_file": job.training_file, "validation_file": job.validation_file}.items():
            if file_id is None:
                continue
            try:
                files.append(self.database.file(file_id, job.owner))
            except ApiError:
                text = f"{param}: there is no file {file_id[:100]!r}; expected an id that POST /v1/files gave."
                raise bad_request(text, param, "invalid_file") from None
            if (purpose := files[-1].purpose) != TRAINING:
                raise bad_request(f"{param}: {file_id} has the purpose {purpose!r}; expected {TRAINING!r}.", param)
        if job.validation_file == job.training_file:
            raise bad_request("validation_file: is the training file; held-out rows are others.", "validation_file")
        model = job.model or f"ft-{job.id.partition('-')[2]}"
        if not covers(model):
            how = "may not use a model of this name" if job.model else "has models of its own: give the name of one"
            raise bad_request(f"suffix: {shown_name(model)} would be the model's name, and this key {how}.", "suffix")
        recipe = self._recipes.of(job, *(self.directory.place(file).name for file in files))
        job = dataclasses.replace(job, model=model, recipe=recipe.to_dict())
        said = [Event(job.id, f"Created fine-tuning job: {job.id}")]
        said += [Event(job.id, f"Validating file: {file.name}") for file in files]
        with self._changing:
            self._require_free(model, job.replaces)
            self.database.add_job(job, said, most_open)
        self._unread.put(job.id)
        return job

    def _require_free(self, model: str, replace: bool) -> None:
        """Raise ApiError 400 unless a job may make a model of this name."""
        name = shown_name(model)
        try:
            directory = self._store.directory_for(model)
        except InputError as error:
            raise bad_request(f"suffix: {error}", "suffix") from None
        if self.database.job_of_model(model, OPEN) is not None:
            raise bad_request(f"suffix: another job makes {name} already; wait for it, or cancel it.", "suffix")
        if directory.exists() and not (directory / ADAPTER_CONFIG).is_file():
            text = f"suffix: what lies in the place of {name} is no adapter. Use another name."
            raise bad_request(text, "suffix", "name_taken")
        if directory.exists() and not replace:
            text = f'suffix: there is a model {name} already. Use another name, or send "replace": true.'
            raise bad_request(text, "suffix", "name_taken")

    def change(self, job_id: str, owner: str, how: JobAction) -> Job:
        """Cancel a job (only its events are kept), save it and free its slot, or let a paused one go on.

        Raises ApiError 400 if its status does not allow it.
        """
        self.database.job(job_id, owner)
        expected, status, text = _ACTIONS[how]
        ended = {"finished": now()} if how == "cancel" else {}
        # first in the database, which holds after a crash: the worker only takes out what is stopped there
        with self._changing:
            if not self.database.move(job_id, expected, status, Event(job_id, text), **ended):
                is_now = self.database.job(job_id).status.replace("_", " ")
                raise bad_request(f"The job {job_id} is {is_now}, so that can't be done.", code="invalid_status")
            if how == "resume":
                self._unread.put(job_id)
            else:
                self.worker.stop(job_id, how)
        return self.database.job(job_id)

    def delete_model(self, model: str, owner: str) -> None:
        """Delete an adapter that a job of this owner made. Raises ApiError: 403 if none did, or it was replaced."""
        job = self.database.job_of_model(model, ("succeeded",))
        directory = self._store.directory_for(model)
        maker = (try_read_json(directory / TRAINING_FACTS) or {}).get("job")
        if job is None or job.owner != owner or maker != job.id:
            raise not_made(model)
        if (other := self.database.job_of_model(model, OPEN)) is not None:
            raise bad_request(f"The job {other.id} makes this model anew; cancel it first.", "model")
        gone = directory.with_name(_DELETED.format(directory.name))
        shutil.rmtree(gone, ignore_errors=True)
        try:
            directory.rename(gone)  # at once: nobody finds half of it
        except FileNotFoundError:  # another call was first
            raise not_made(model) from None
        shutil.rmtree(gone, ignore_errors=True)
        self.database.move(job.id, ("succeeded",), "succeeded", deleted=True)

    # The thread that reads rows

    def _read_rows(self) -> None:
        while (job_id := self._unread.get()) is not None and not self._closing:
            try:
                self._prepare(self.database.job(job_id))
            except RunFailed as error:  # a full disk: of the database, or of what the rows are mapped from
                _logger.warning("%s: its rows can't be read now; again in %g s: %s", job_id, _RETRY_SECONDS, error)
                again = threading.Timer(_RETRY_SECONDS, self._unread.put, (job_id,))  # others may need less room
                again.daemon = True
                again.start()

    def _prepare(self, job: Job) -> None:
        """Read a job's rows and hand it to the worker. Whatever is wrong with it ends the job, but for a full disk."""
        if job.status not in (*BEFORE, *TRAINED):
            return  # cancelled or paused meanwhile
        files: dict[str, StoredFile] = {}
        try:
            for param in ("training_file", "validation_file"):
                if (file_id := getattr(job, param)) is not None:
                    files[param] = self.database.file(file_id)
            run = self._run_of(job, files)
            self.worker.add(self.database.job(job.id), run)
        except ApiError as error:
            self.directory.fail(job.id, "invalid_job", error.message)
        except InputError as error:
            text = str(error)
            named = next((key for key, file in files.items() if str(self.directory.place(file)) in text), None)
            code = "invalid_training_file" if named else "invalid_job"
            text = self.directory.for_owner(without_recipe(error) if named else text, files.values())
            self.directory.fail(job.id, code, text, named)
        except RunFailed:
            raise
        except Exception:  # it ends this job alone: the thread reads the rows of all
            _logger.exception("the rows of %s", job.id)
            self.directory.fail(job.id, "server_error", "The server failed; its log says why.")

    def _run_of(self, job: Job, files: dict[str, StoredFile]) -> AdapterRun:
        places = [self.directory.place(file) for file in files.values()]
        for place in places:
            if place.suffix == ".json" and place.stat().st_size > _MOST_JSON_BYTES:
                size = f"at most {_MOST_JSON_BYTES >> 20} MiB; send .jsonl"
                raise InputError(f"{place}: a .json file is read as a whole, so it may have {size}.")
        recipe = self._recipes.of(job, *(place.name for place in places))  # by the recipe that is served now
        columns = self._recipes.columns
        if columns and all(has_columns(place, columns.values()) for place in places):
            recipe = recipe.replace(data=recipe.data.replace(columns=columns))
        has_begun = self.directory.state(job.id).exists()
        # the base may have moved: `OnlineTrainer.begin` knows it by what is in it
        if has_begun and (changed := changed_keys(job.recipe, recipe, ("model.path",))):
            raise InputError(
                f"The server was started again with another recipe ({', '.join(changed)}), by which this job can't go "
                "on. Create the job anew."
            )
        section = recipe.data.replace(**dict(zip(("path", "eval_path"), map(str, places), strict=False)))
        datasets = build_datasets(section, self._tokenizer, Console(quiet=True), cached=False)
        for part in (datasets.train, datasets.eval):  # a row that the model can't take would end all jobs of its pass
            require_positions(self._model, lengths_of(part))
            require_embedded(self._tokenizer, self._model, part)
        run = self._trainer.prepare(job.id, recipe, datasets)
        if job.status == "validating_files":
            rows = f"{len(datasets.train):,} training rows"
            rows += f" and {len(datasets.eval):,} held-out rows" if len(datasets.eval) else ""
            said = [Event(job.id, f"Files validated: {rows}. Moving job to queued state.")]
            found = [*data_warnings(datasets.stats), context_note(self._model.config, datasets.stats.longest_tokens)]
            warnings = [self.directory.for_owner(without_recipe(text), files.values()) for text in found if text]
            if unread := datasets.stats.unused_columns:  # which `qvera init` and `preview` would have shown
                format = datasets.stats.format
                advice = " To train on labels, call the columns prompt and completion." if format == "text" else ""
                warnings.append(f"Rows are read as {format}. Columns not read: {', '.join(unread)}.{advice}")
            said += [Event(job.id, text, level="warn") for text in warnings]
            self.database.move(job.id, ("validating_files",), "queued", *said, recipe=recipe.to_dict())
        elif not has_begun:  # its rows were read first by a server with another recipe, maybe
            self.database.move(job.id, (job.status,), job.status, recipe=recipe.to_dict())
        return run


def open_jobs(directory: TrainingDirectory, served: Served, engine: Engine, at_once: int) -> Jobs:
    """Open a training directory's jobs, whose worker the engine needs as background work.

    They continue once it is entered (``with``).

    Raises InputError if the directory of adapters can't be written, or the served recipe can't train several at once.
    """
    assert served.store.root is not None
    require_writable(served.store.root / "adapter", "--adapters")
    recipes, base = Recipes(served.opened.target), served.opened.base
    trainer = OnlineTrainer(base, recipes.server, at_once)
    return Jobs(directory, recipes, trainer, served.store, base, engine.wake)
