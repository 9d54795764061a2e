"""`qvera init` and `qvera schema`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvera.cli.common import console, quiet_libraries, require_new_file
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.data import DataStats


COLUMN_OPTIONS = "--prompt-column NAME --answer-column NAME"
_COLUMNS = {
    "classification": ("text", "label"),
    "image": ("image", "label"),
    "preference": ("prompt", "chosen"),
}
"""Format → the fields for the two options, where they are not prompt and completion."""
LONGEST_TOKENS = 2048
"""The largest ``max_length`` of a new recipe, however long the rows are."""


def init(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The recipe to write; must not exist.")] = Path(
        "recipe.yaml"
    ),
    model: Annotated[str | None, typer.Option(metavar="PATH", help="A model directory or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="A file or directory of rows, or a hub id.")] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="sequence-classification or image-classification.")
    ] = None,
    objective: Annotated[str | None, typer.Option(metavar="NAME", help="dpo, orpo or kto, for preferences.")] = None,
    prompt_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column with the prompt; of a classifier the text or image.")
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column with the answer; of a classifier the label.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt for all rows.")] = None,
) -> None:
    """Write a commented recipe for your model and data.

    Reads the data and the model's tokenizer first, and fills in format, columns, lengths and held-out rows. On a
    terminal it asks for what is not given.

    Example:
        qvera init recipe.yaml --model meta-llama/Llama-2-7b-hf --data rows.csv
    """
    require_new_file(out)
    model = model or _ask("--model", "Base model (a directory or a hub id)")
    data = data or _ask("--data", "Training rows (a file, a directory or a hub id)")

    from qvera.config.load import read_yaml
    from qvera.config.schema import parse_recipe

    quiet_libraries()
    kind = {"task": task, "training": {"objective": objective} if objective else None}
    rows = {"path": data, **_given({"system": system})}
    recipe = parse_recipe({"model": model, "data": rows, **_given(kind)}, "the options")
    if recipe.data.format != "image":
        recipe = recipe.replace(data=recipe.data.replace(max_length=1 << 20))
    recipe, stats = _inspect(_with_columns(recipe, prompt_column, answer_column))
    text = recipe_text(recipe, stats)
    parse_recipe(read_yaml(text, str(out))[0], str(out))
    replace_text(out, text)
    classes = f", {stats.targets_text}" if stats.labels is not None else ""
    longest = "" if stats.format == "image" else f", the longest has {stats.longest_tokens:,} tokens"
    named = shlex.quote(str(out))
    print(f"{out}: {stats.train_rows:,} rows, format {stats.format}{longest}{classes}")
    if stats.unused_columns:
        unused = ", ".join(stats.unused_columns)
        print(f"not read          {unused}. To train on other columns, name them: {COLUMN_OPTIONS}")
        if {"label", "labels"} & set(stats.unused_columns):
            print("                  To train a classifier of these labels: --task sequence-classification")
    print(f"look at the rows  qvera preview {named}\nfind a rate       qvera train {named} --find-lr")
    print(f"train             qvera train {named}")


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _with_columns(recipe: Recipe, prompt: str | None, answer: str | None) -> Recipe:
    fields = _COLUMNS.get(recipe.data.format, ("prompt", "completion"))
    columns = _given(dict(zip(fields, (prompt, answer), strict=True)))
    return recipe.replace(data=recipe.data.replace(columns=columns))


def _ask(option: str, question: str) -> str:
    if not sys.stdin.isatty():
        raise InputError(f"{option}: is missing, and there is no terminal to ask on. Give {option}.")
    return str(typer.prompt(question, err=True)).strip()


def _inspect(recipe: Recipe) -> tuple[Recipe, DataStats]:
    from qvera.data import build_datasets
    from qvera.data.conversations import MissingColumn, UnaskedPreferences, UnknownFormat
    from qvera.models.tokenizer import load_processor
    from qvera.tasks import task_of

    processor = load_processor(recipe.model, task_of(recipe).exported_class)
    try:
        return recipe, build_datasets(recipe.data, processor, console).stats
    except UnaskedPreferences as error:
        raise InputError(f"{error} Here: --objective dpo.") from None
    except MissingColumn as error:
        raise InputError(f"{error} Here: {COLUMN_OPTIONS}.") from None
    except UnknownFormat as error:
        if not sys.stdin.isatty():
            raise InputError(f"{error} Here: {COLUMN_OPTIONS}, or --task for rows with labels.") from None
        console.print(str(error), markup=False, highlight=False)
    prompt = _ask("--prompt-column", "Column with the prompt")
    answer = _ask("--answer-column", "Column with the answer")
    recipe = _with_columns(recipe, prompt, answer)
    return recipe, build_datasets(recipe.data, processor, console).stats


def recipe_text(recipe: Recipe, stats: DataStats) -> str:
    """The recipe with the schema's defaults as comments; ``stats`` are of all its rows, none held out."""
    from qvera import config
    from qvera.config import schema
    from qvera.config.load import yaml_text

    adapter, training, data = schema.AdapterSection(), schema.TrainingSection(), recipe.data
    longest = -(-stats.longest_tokens // 64) * 64  # rounded up, so that a few longer rows fit later
    held_out = min(0.1, 200 / max(1, stats.train_rows)) if stats.train_rows >= 10 else 0.0
    lengths = f"tokens; the longest of {stats.train_rows:,} rows has {stats.longest_tokens:,}"
    rows = f"  path: {yaml_text(data.path)}\n  format: {stats.format}"
    for key in ("columns", "system"):
        if value := getattr(data, key):
            rows += f"\n  {key}: {yaml_text(value)}"
    if data.format != "image":  # whose tokens are those of its patches
        rows += f"\n  max_length: {max(64, min(longest, LONGEST_TOKENS))}             # {lengths}"
    task = "" if stats.labels is None else f"task: {recipe.task}\n"
    step_rows = min(training.global_batch_size, max(1, stats.train_rows))
    if recipe.training.objective == "kto":  # whose passes have two rows or more
        step_rows = max(2, step_rows - step_rows % 2)
    rates = (
        f"learning_rate: {training.learning_rate:g}       # models under 1B parameters need more: --find-lr finds it"
    )
    if stats.labels is not None:
        rates += "\n  # head_learning_rate:       # default: learning_rate"
    if (objective := recipe.training.objective) != training.objective:
        rates = f"objective: {objective}\n  {rates}"
    return f"""\
# yaml-language-server: $schema={Path(config.__file__).with_name("recipe.schema.json")}
# Written by `qvera init`. docs/recipe.md describes every key. Relative paths start in the directory
# where you run qvera. A line that begins with # shows a default.

{task}model:
  path: {yaml_text(recipe.model.path)}
  quantization: {recipe.model.quantization}            # the frozen base in 4 bits

data:
{rows}
  eval_fraction: {held_out:.3g}         # held out: the run reports the loss on these rows before and after

adapter:
  rank: {adapter.rank}
  targets: {yaml_text(adapter.targets)}

training:
  # output_dir: runs/NAME      # default: the name of this file
  num_train_epochs: {training.num_train_epochs:g}
  global_batch_size: {step_rows}
  {rates}
  # lr_scheduler_type: {training.lr_scheduler_type}
  # save_steps: {training.save_steps}
"""


def schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    Editors that know yaml-language-server complete and check a recipe whose first line names the schema: `#
    yaml-language-server: $schema=FILE`.

    Example:
        qvera schema > recipe.schema.json
    """
    from qvera.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
