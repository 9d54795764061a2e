"""The kinds of runs, by the name that a recipe's ``task`` has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.tasks.base import Task
from qvera.tasks.causal_lm import CausalLM
from qvera.tasks.classification import Classification, ImageClassification, SequenceClassification
from qvera.tasks.preference import Preferences

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.models.model_class import ModelClass

__all__ = ["CausalLM", "Task", "classification_of", "task_of"]

_TASKS: dict[str, type[Task]] = {task.name: task for task in (CausalLM, SequenceClassification, ImageClassification)}


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe."""
    return (_TASKS[recipe.task] if recipe.training.objective == "sft" else Preferences)(recipe)


def classification_of(model_class: ModelClass) -> Classification:
    """The task whose models are of this class, which has a head of its own; without a recipe."""
    kinds = (SequenceClassification, ImageClassification)
    return next(kind() for kind in kinds if kind.exported_class.auto == model_class.auto)
