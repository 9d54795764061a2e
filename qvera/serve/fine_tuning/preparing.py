"""Prepares jobs: makes each one's recipe, and reads and checks its rows in a thread of its own.

A job's recipe is the served run's, or the defaults, with the job's files and hyperparameters.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from qvera.config.schema import DataSection, Recipe, parse_recipe
from qvera.data import build_datasets, data_warnings
from qvera.data.readers import csv_records
from qvera.evaluation.load import template_of
from qvera.serve.fine_tuning.directory import TrainingDirectory, shown
from qvera.serve.fine_tuning.records import BEFORE, TRAINED, Event, Job, UnknownRecord
from qvera.training.run_dir import changed_keys
from qvera.utils.errors import InputError, RunFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qvera.evaluation.load import Artifact
    from qvera.training.online import OnlineTrainer

_logger = logging.getLogger(__name__)
_MOST_JSON_BYTES = 64 * 2**20
"""A .json file is read as a whole, which takes several times its size of memory."""
_MOST_LINE_BYTES = 4 * 2**20
"""A line is a row. All its tokens are in memory at once, at a hundred bytes each."""
_RETRY_SECONDS = 30.0
_JOIN_SECONDS = 5.0  # a closing server does not wait for a file of millions of rows
HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
AUTO = "auto"
_OF_ROWS = (
    *("system", "train_on", "max_length", "too_long", "max_source_length", "max_target_length"),
    *("shuffle", "group_by_length", "seed"),
)
"""Keys of ``data`` that fit any rows. The others name the served run's own files and columns."""
_NOT_OF_A_JOB = (
    *("output_dir", "save_total_limit", "adapters_at_once", "torch_compile", "try_longest_batch", "on_oom"),
    *("report_to", "sample_count", "answer_batch_size", "sample_max_new_tokens", "exact_match_rows"),
)
"""Keys of ``training`` about a run directory, a report, or how a run is computed."""
_EVALUATIONS = ("eval_steps", "load_best_model_at_end", "early_stopping_patience")


class Recipes:
    """Makes the recipes of jobs."""

    def __init__(self, target: Artifact) -> None:
        """Raises InputError if adapters of the served recipe can't be trained beside others."""
        given = target.recipe
        tree: dict[str, Any] = {} if given is None else given.to_dict()
        data, training = tree.get("data", {}), tree.get("training", {})
        self._source = "--training-dir" if target.run is None else f"--training-dir: the recipe of {target.run}"
        self._data = {key: data[key] for key in _OF_ROWS if key in data}
        if given is not None:
            self._data["template"] = template_of(given, target.run)
        self._training = {key: value for key, value in training.items() if key not in _NOT_OF_A_JOB}
        self._common = {"model": target.section.to_dict(), "adapter": tree.get("adapter", {})}
        shared = {key: value for key, value in self._training.items() if key not in _EVALUATIONS}
        # parsed as a recipe of many adapters, which refuses what can't be trained beside others
        rows = {"path": "rows.jsonl", "adapter_column": "adapter", **self._data}
        self.server = self._parse({**self._common, "data": rows, "training": shared})  # what all jobs share

    def of(self, job: Job, training_file: str, validation_file: str | None = None) -> Recipe:
        """The recipe of a job. Raises InputError if its hyperparameters do not fit together.

        Files are named without their directory, so that the recipe survives a move of the training directory.
        """
        data = {**self._data, "path": training_file, "tokenize_processes": 1}
        # the server sets how many rows a pass has
        training = {key: value for key, value in self._training.items() if key != "per_device_train_batch_size"}
        if validation_file is None:
            training = {key: value for key, value in training.items() if key not in _EVALUATIONS}
        else:
            data["eval_path"] = validation_file
        epochs, rows, multiplier = (job.asked.get(name, AUTO) for name in HYPERPARAMETERS)
        if epochs != AUTO:
            training |= {"num_train_epochs": float(epochs), "max_steps": -1}
        if rows != AUTO:
            training["global_batch_size"] = rows
        if multiplier != AUTO:
            training["learning_rate"] = self.server.training.learning_rate * multiplier
        if job.seed is not None:
            data["seed"] = training["seed"] = job.seed
        return self._parse({**self._common, "data": data, "training": training})

    def _parse(self, tree: dict[str, Any]) -> Recipe:
        return parse_recipe(tree, self._source, drop_idle_keys=True)


def section_in(recipe: Recipe, directory: Path) -> DataSection:
    """A job's ``data`` with the full paths of its files, which are in ``directory``."""
    held_out = recipe.data.eval_path
    places = {"path": str(directory / recipe.data.path)}
    return recipe.data.replace(**places, **({} if held_out is None else {"eval_path": str(directory / held_out)}))


def hyperparameters(job: Job) -> dict[str, Any]:
    """The hyperparameters that a job uses, by OpenAI's names."""
    training = job.recipe["training"]
    by_steps = training["max_steps"] >= 0
    epochs = training["num_train_epochs"]
    multiplier = job.asked.get("learning_rate_multiplier", AUTO)
    return {
        "n_epochs": AUTO if by_steps else int(epochs) if float(epochs).is_integer() else epochs,
        "batch_size": training["global_batch_size"],
        "learning_rate_multiplier": 1.0 if multiplier == AUTO else multiplier,
    }


class Preparer:
    """A thread that prepares jobs one after the other."""

    def __init__(
        self,
        directory: TrainingDirectory,
        recipes: Recipes,
        tokenizer: PreTrainedTokenizerBase,
        trainer: OnlineTrainer,
        on_ready: Callable[[Job, Any], None],
    ) -> None:
        """``on_ready`` is called in this thread with a job and its run."""
        self._directory, self._recipes, self._tokenizer, self._trainer = directory, recipes, tokenizer, trainer
        self._on_ready = on_ready
        self._jobs: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qvera-rows", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def add(self, job_id: str) -> None:
        """Queue a job, from any thread."""
        self._jobs.put(job_id)

    def close(self) -> None:
        """End the thread. The next server reads the unfinished job's rows again."""
        self._closing.set()
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while (job_id := self._jobs.get()) is not None and not self._closing.is_set():
            try:
                self._prepare(job_id)
            except RunFailed as error:  # a full disk: of the database, or of what the rows are mapped from
                _logger.warning("%s: its rows can't be read now; again in %g s: %s", job_id, _RETRY_SECONDS, error)
                again = threading.Timer(_RETRY_SECONDS, self.add, (job_id,))  # others may need less room
                again.daemon = True
                again.start()

    def _prepare(self, job_id: str) -> None:
        database = self._directory.database
        try:
            job = database.job(job_id)
        except UnknownRecord:
            return
        if job.status not in (*BEFORE, *TRAINED):
            return  # cancelled or paused meanwhile
        try:
            self._on_ready(*self._ready(job))
        except InputError as error:
            text, param = self._for_its_owner(job, str(error))
            self._directory.fail(job.id, "invalid_training_file" if param else "invalid_job", text, param)
        except RunFailed:
            raise
        except Exception:  # it ends this job alone: the thread reads the rows of all
            _logger.exception("the rows of %s", job.id)
            self._directory.fail(job.id, "server_error", "The server failed; its log says why.")

    def _ready(self, job: Job) -> tuple[Job, Any]:
        database, directory = self._directory.database, self._directory
        places = self._places(job)
        for place in places:
            if place.suffix == ".json" and place.stat().st_size > _MOST_JSON_BYTES:
                size = f"at most {_MOST_JSON_BYTES >> 20} MiB; send .jsonl"
                raise InputError(f"{place}: a .json file is read as a whole, so it may have {size}.")
            if place.suffix in (".jsonl", ".csv", ".tsv"):
                _require_short_rows(place)
        recipe = self._recipes.of(job, *(place.name for place in places))
        has_begun = directory.state(job.id).exists()
        if has_begun and (changed := changed_keys(job.recipe, recipe)):
            raise InputError(
                f"The server was started again with another recipe ({', '.join(changed)}), by which this job can't go "
                "on. Create the job anew."
            )
        section = section_in(recipe, directory.files)
        datasets = build_datasets(section, self._tokenizer, Console(quiet=True), cached=False)
        run = self._trainer.prepare(job.id, recipe, datasets)
        if job.status == "validating_files":
            rows = f"{len(datasets.train):,} training rows"
            rows += f" and {len(datasets.eval):,} held-out rows" if len(datasets.eval) else ""
            said = [Event(job.id, f"Files validated: {rows}. Moving job to queued state.")]
            warnings = [self._for_its_owner(job, text)[0] for text in data_warnings(datasets.stats)]
            said += [Event(job.id, text, level="warn") for text in warnings]
            database.move(job.id, ("validating_files",), "queued", *said, recipe=recipe.to_dict())
        elif not has_begun:  # its rows were read first by a server with another recipe, maybe
            database.move(job.id, (job.status,), job.status, recipe=recipe.to_dict())
        return database.job(job.id), run

    def _places(self, job: Job) -> list[Path]:
        found = []
        for file_id in filter(None, (job.training_file, job.validation_file)):
            try:
                found.append(self._directory.place(self._directory.database.file(file_id)))
            except UnknownRecord:
                raise InputError(f"The file {file_id} is not there any more.") from None
        return found

    def _for_its_owner(self, job: Job, text: str) -> tuple[str, str | None]:
        """A message with file names in place of paths, and the parameter of the first file in it."""
        param = None
        for key in ("training_file", "validation_file"):
            file_id = getattr(job, key)
            if file_id is None:
                continue
            try:
                file = self._directory.database.file(file_id)
            except UnknownRecord:
                continue
            place = str(self._directory.place(file))
            if place in text:
                param = param or key
                text = text.replace(place, shown(file.name))
        return self._directory.without_places(text), param


def _require_short_rows(file: Path) -> None:
    """Raise InputError for a row that would need much memory. It is not read as a whole for that."""
    if file.suffix in (".csv", ".tsv"):
        _require_short_records(file)
        return
    with file.open("rb") as stream:
        for number in itertools.count(1):
            line = stream.readline(_MOST_LINE_BYTES + 1)
            if len(line) > _MOST_LINE_BYTES:
                raise InputError(
                    f"{file}:{number}: a line may have at most {_MOST_LINE_BYTES:,} bytes; divide the row."
                )
            if not line:
                return


def _require_short_records(file: Path) -> None:
    """`_require_short_rows` for CSV, where a quoted field may span lines. Other faults are left to the reader."""
    bytes_of_record, line_number = 0, 0

    def lines(stream: TextIO) -> Iterator[str]:
        nonlocal bytes_of_record, line_number
        while line := stream.readline(_MOST_LINE_BYTES + 1):
            bytes_of_record, line_number = bytes_of_record + len(line), line_number + 1
            if bytes_of_record > _MOST_LINE_BYTES:
                raise InputError(
                    f"{file}:{line_number}: a row may have at most {_MOST_LINE_BYTES:,} characters; divide it, and "
                    "check the quotes."
                )
            yield line

    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream, contextlib.suppress(csv.Error):
        for _ in csv_records(lines(stream), file):
            bytes_of_record = 0
