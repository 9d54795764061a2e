"""The kinds of runs, by the name that a recipe's ``task`` has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.tasks.base import Task
from qvera.tasks.causal_lm import CausalLM
from qvera.tasks.classification import SequenceClassification
from qvera.tasks.preference import Preferences

if TYPE_CHECKING:
    from qvera.config.schema import Recipe

__all__ = ["TASKS", "Task", "task_of"]

TASKS: dict[str, Task] = {task.name: task for task in (CausalLM(), SequenceClassification())}


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe."""
    objective = recipe.training.objective
    return TASKS[recipe.task] if objective == "sft" else Preferences(objective)
