"""The recipe: one YAML file with five sections and two keys. Every default is written here and nowhere else.

Each section has a module of its own. The text below each field is its description in the JSON schema (`json_schema`)
and in docs/recipe.md.
"""

from qvera.config.schema.adapter import AdapterSection
from qvera.config.schema.data import DataSection, DataSource
from qvera.config.schema.model import ExportSection, ModelSection
from qvera.config.schema.recipe import Recipe, json_schema, parse_recipe
from qvera.config.schema.training import TrainingSection

__all__ = [
    "AdapterSection",
    "DataSection",
    "DataSource",
    "ExportSection",
    "ModelSection",
    "Recipe",
    "TrainingSection",
    "json_schema",
    "parse_recipe",
]
