"""The kinds of runs, by the name that a recipe's ``task`` has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.tasks.base import Task
from qvera.tasks.causal_lm import CausalLM
from qvera.tasks.classification import Classification, SequenceClassification
from qvera.tasks.images import ImageClassification
from qvera.tasks.preference import Preferences

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.models.model_class import ModelClass

__all__ = ["TASKS", "Task", "classification_of", "task_of"]

TASKS: dict[str, Task] = {task.name: task for task in (CausalLM(), SequenceClassification(), ImageClassification())}


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe."""
    objective = recipe.training.objective
    return TASKS[recipe.task] if objective == "sft" else Preferences(objective)


def classification_of(model_class: ModelClass) -> Classification:
    """The task whose models are of this class, which has a head of its own."""
    found = (task for task in TASKS.values() if task.exported_class.auto == model_class.auto)
    return next(task for task in found if isinstance(task, Classification))
