"""The recipes of jobs: the served run's, or the defaults, with the job's files and hyperparameters."""

import re
from typing import Any

from qvera.config.schema import Recipe, parse_recipe
from qvera.config.sections import DataSection, TrainingSection
from qvera.data.detect import UnaskedPreferences
from qvera.evaluation.load import Artifact, template_name
from qvera.serve.fine_tuning.database import Job
from qvera.training.failures import LOWER_RATE
from qvera.utils.errors import InputError

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
_KEYS = re.compile(rf"\b(data|training)\.({'|'.join([*DataSection.model_fields, *TrainingSection.model_fields])})\b")


class Recipes:
    """Makes the recipes of jobs from that of the served run.

    ``columns``: that recipe's ``data.columns``, for files that have them.
    """

    def __init__(self, target: Artifact) -> None:
        """Raises InputError if adapters of the served recipe can't be trained beside others."""
        given = target.recipe
        tree: dict[str, Any] = {} if given is None else given.to_dict()
        data, training = tree.get("data", {}), tree.get("training", {})
        self._source = "--training-dir" if target.run is None else f"--training-dir: the recipe of {target.run}"
        self.columns: dict[str, str] = data.get("columns", {})
        self._data = {key: data[key] for key in _OF_ROWS if key in data}
        if given is not None:
            self._data["template"] = template_name(given, target.run)
        self._training = {key: value for key, value in training.items() if key not in _NOT_OF_A_JOB}
        self._common = {"model": target.section.to_dict(), "adapter": tree.get("adapter", {})}
        shared = {key: value for key, value in self._training.items() if key not in _EVALUATIONS}
        # parsed as a recipe of many adapters, which refuses what can't be trained beside others
        rows = {"path": "rows.jsonl", "adapter_column": "adapter", **self._data}
        try:
            self.server = self._parse(rows, shared)  # what all jobs share
        except InputError as error:  # it names keys that make a run one of many, which the served recipe has not
            raise InputError(f"{error} Or serve the base, with --adapters DIR.") from None

    def of(self, job: Job, training_file: str, validation_file: str | None = None) -> Recipe:
        """The recipe of a job. Raises InputError if its hyperparameters do not fit together.

        Files are named without their directory, so that the recipe survives a move of the training directory.
        """
        data = {**self._data, "path": training_file, "tokenize_processes": 1}
        left_out: tuple[str, ...] = ("per_device_train_batch_size",)  # the server sets how many rows a pass has
        if validation_file is None:
            left_out += _EVALUATIONS
        else:
            data["eval_path"] = validation_file
        training = {key: value for key, value in self._training.items() if key not in left_out}
        if (epochs := job.asked.get("n_epochs", "auto")) != "auto":
            training |= {"num_train_epochs": float(epochs), "max_steps": -1}
        if (rows := job.asked.get("batch_size", "auto")) != "auto":
            training["global_batch_size"] = rows
        if (multiplier := job.asked.get("learning_rate_multiplier", "auto")) != "auto":
            training["learning_rate"] = self.server.training.learning_rate * multiplier
        if job.seed is not None:
            data["seed"] = training["seed"] = job.seed
        return self._parse(data, training)

    def _parse(self, data: dict[str, Any], training: dict[str, Any]) -> Recipe:
        return parse_recipe({**self._common, "data": data, "training": training}, self._source, drop_idle_keys=True)


def without_recipe(said: str | InputError) -> str:
    """Make a message, which may advise to set a key or to begin a run anew, fit a job, which has no recipe."""
    if isinstance(said, UnaskedPreferences):
        return f"{said} No job trains on pairs: `qvera train` does."
    text = str(said).replace(LOWER_RATE, "Create the job anew with a lower learning_rate_multiplier.")
    return f"{text} A job sets no such key: the server's recipe does." if _KEYS.search(text) else text
