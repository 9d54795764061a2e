"""The recipe of each job: that of the run that is served, or the defaults, with the job's files and hyperparameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.config.schema import DataSection, Recipe, parse_recipe
from qvera.evaluation.load import template_of
from qvera.serve.fine_tuning.records import Job

if TYPE_CHECKING:
    from qvera.evaluation.load import Artifact

HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
AUTO = "auto"
_OF_ROWS = (
    *("system", "train_on", "max_length", "too_long", "max_source_length", "max_target_length"),
    *("shuffle", "group_by_length", "seed"),
)
"""Keys of ``data`` that are about any rows; the others name the served run's own files and columns."""
_NOT_OF_A_JOB = (
    *("output_dir", "save_total_limit", "adapters_at_once", "torch_compile", "try_longest_batch", "on_oom"),
    *("report_to", "sample_count", "answer_batch_size", "sample_max_new_tokens", "exact_match_rows"),
)
"""Keys of ``training`` that are about a run directory, a report, or how a run is computed."""
_EVALUATIONS = ("eval_steps", "load_best_model_at_end", "early_stopping_patience")


class Recipes:
    """Makes the recipes of jobs.

    Attributes:
        server: what all jobs share: the adapter's shape, the optimizer, the size of a pass.
    """

    def __init__(self, target: Artifact) -> None:
        """``target``: what is served; its recipe counts, where it has one.

        Raises:
            InputError: adapters of this recipe can't be trained beside others.
        """
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
        # as a recipe of many adapters: what can't be trained beside others is refused
        rows = {"path": "rows.jsonl", "adapter_column": "adapter", **self._data}
        self.server = self._parse({**self._common, "data": rows, "training": shared})

    def of(self, job: Job, training_file: str, validation_file: str | None = None) -> Recipe:
        """The recipe of a job.

        Args:
            job: its hyperparameters and seed are used.
            training_file, validation_file: names of files in the directory of files, without that directory: the recipe
                stays the same where a training directory is moved.

        Raises:
            InputError: the hyperparameters do not go together.
        """
        data = {**self._data, "path": training_file, "tokenize_processes": 1}
        # the rows of a pass are the server's
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
    """A job's ``data`` with its files where they lie: in ``directory``."""
    held_out = recipe.data.eval_path
    places = {"path": str(directory / recipe.data.path)}
    return recipe.data.replace(**places, **({} if held_out is None else {"eval_path": str(directory / held_out)}))


def hyperparameters(job: Job) -> dict[str, Any]:
    """A job's hyperparameters by OpenAI's names, as they are used."""
    training = job.recipe["training"]
    by_steps = training["max_steps"] >= 0
    epochs = training["num_train_epochs"]
    multiplier = job.asked.get("learning_rate_multiplier", AUTO)
    return {
        "n_epochs": AUTO if by_steps else int(epochs) if float(epochs).is_integer() else epochs,
        "batch_size": training["global_batch_size"],
        "learning_rate_multiplier": 1.0 if multiplier == AUTO else multiplier,
    }
