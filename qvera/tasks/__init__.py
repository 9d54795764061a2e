"""The tasks, by the name that a recipe's ``task`` or objective has."""

from qvera.config.schema import Recipe
from qvera.models.model_class import ModelClass
from qvera.tasks.base import Task
from qvera.tasks.causal_lm import CausalLM
from qvera.tasks.classification import Classification, ImageClassification, SequenceClassification
from qvera.tasks.preference import Preferences
from qvera.tasks.rewards import Rewards

__all__ = ["CausalLM", "Task", "classification_of", "task_of"]

_TASKS: dict[str, type[Task]] = {task.name: task for task in (CausalLM, SequenceClassification, ImageClassification)}

_OBJECTIVES: dict[str, type[Task]] = {**dict.fromkeys(("dpo", "orpo", "kto"), Preferences), "grpo": Rewards}


def task_of(recipe: Recipe) -> Task:
    """Return the task of a recipe. An objective other than sft decides before ``task``."""
    return _OBJECTIVES.get(recipe.training.objective, _TASKS[recipe.task])(recipe)


def classification_of(model_class: ModelClass, recipe: Recipe | None) -> Classification:
    """Return the classification whose models are of this class."""
    kinds = (SequenceClassification, ImageClassification)
    return next(kind(recipe) for kind in kinds if kind.exported_class.auto == model_class.auto)
