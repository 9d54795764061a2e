"""A job of a server that trains beside answers, and what the server's recipe has to be for that."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from qvera.adapters.methods import check_recipe, method_of
from qvera.data import AdapterRows, planned_steps
from qvera.models import linear
from qvera.training.many.roster import AdapterRun
from qvera.training.run_dir import changed_keys
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.data import Datasets
    from qvera.models.loader import Base

_NEEDS = "training beside answers"
_HARMLESS = ("training.on_oom", "training.exact_match_rows")  # keys of a recipe that nothing here reads
_SHARED = ("weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "loss_chunk_tokens")
"""Keys of ``training`` that all jobs share, besides ``adapter``."""

Purpose = Literal["before", "due", "after"]


@dataclasses.dataclass(eq=False)
class OnlineJob(AdapterRun):
    """The training of one adapter; made by `qvera.training.many.online.OnlineTrainer.prepare`."""

    @property
    def id(self) -> str:
        """What its records call it."""
        return self.name

    @property
    def takes_no_step(self) -> bool:
        """Whether its steps are taken, or it stopped early. Its score may still be missing."""
        return self.state.stopped_early or not self.steps_left

    @property
    def next_evaluation(self) -> Purpose | None:
        """Why its held-out loss is wanted now: before its first step, by its recipe, or of the vectors to be saved."""
        if self.reason is not None or not len(self.rows.eval):
            return None
        if not self.state.step and self.state.before is None:
            return "before"
        if self.state.evaluation_due:
            return "due"
        return "after" if self.takes_no_step and self.after is None else None

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do: it may be saved, or has a ``reason`` why not."""
        return self.reason is not None or (self.takes_no_step and self.next_evaluation is None)


def prepared_run(number: int, id: str, recipe: Recipe, datasets: Datasets, server: Recipe) -> OnlineJob:
    """A job over all rows of ``datasets``.

    Args:
        number: unlike that of other jobs.
        id: for records.
        recipe: of the job.
        datasets: its rows.
        server: the server's recipe.

    Raises:
        InputError: there are no rows, or the recipe differs from the server's in what all jobs share.
    """
    shared = {f"training.{key}" for key in _SHARED}
    changed = changed_keys(server.to_dict(), recipe)
    if other := [key for key in changed if key.startswith("adapter.") or key in shared]:
        raise InputError(f"{id}: {', '.join(other)} differ from the server's recipe, which all jobs share.")
    if datasets.adapters or datasets.train.task_of is not None:
        raise InputError(f"{id}: its rows are of several adapters or tasks; a job trains one adapter on all rows.")
    rows, held_out = len(datasets.train), len(datasets.eval)
    if not rows:
        raise InputError(f"{id}: no row is left to train on. Raise data.max_length, or give other rows.")
    own = AdapterRows(id, np.arange(rows), np.arange(held_out), datasets.stats.repeated_rows)
    step_rows = min(recipe.training.global_batch_size, rows)
    return OnlineJob(number, own, id, planned_steps(recipe, rows), step_rows, recipe, datasets)


def require_trainable(base: Base, recipe: Recipe) -> None:
    """Refuse a recipe whose adapters can't share passes, and a base that can't be trained on.

    Raises:
        InputError: names the key.
    """
    problems = [p for p in recipe.many_adapters_contradictions(_NEEDS) if p[0] not in _HARMLESS]
    if problems:
        raise InputError("\n".join(f"{key}: {text}" for key, text in problems))
    check_recipe(recipe)
    if not method_of(recipe.adapter).is_banked:
        raise InputError(
            f"adapter.method: {recipe.adapter.method} with these options can't be trained beside answers. Use vera "
            "without magnitude."
        )
    if linear.embedding_dtype(base.model.get_input_embeddings()) == torch.float16:
        raise InputError(
            "model.compute_dtype: this base computes in float16, which needs a loss scale that the jobs would share. "
            "Serve it with bfloat16 or float32."
        )
    if base.facts.get("added_tokens"):
        raise InputError("model.added_tokens: this base has tokens of its own, whose rows no job could train.")
