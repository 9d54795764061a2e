"""`qvera init`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvera.cli.common import console, quiet_libraries, require_new_file
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qvera.config.schema import DataSection
    from qvera.data import DataStats

COLUMN_OPTIONS = "--prompt-column NAME --answer-column NAME"
LONGEST_TOKENS = 2048
"""``max_length`` of a new recipe is at most this, however long the rows are."""


def init(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The recipe to write; must not exist.")] = Path(
        "recipe.yaml"
    ),
    model: Annotated[str | None, typer.Option(metavar="PATH", help="A model directory or a hub id.")] = None,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="A file or directory of rows, or a hub id.")] = None,
    prompt_column: Annotated[str | None, typer.Option(metavar="NAME", help="The column with the prompt.")] = None,
    answer_column: Annotated[str | None, typer.Option(metavar="NAME", help="The column with the answer.")] = None,
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

    from qvera.config.load import load_recipe
    from qvera.config.schema import DataSection, ModelSection
    from qvera.models.tokenizer import load_tokenizer

    quiet_libraries()
    tokenizer = load_tokenizer(ModelSection(path=model))
    columns = {"prompt": prompt_column, "completion": answer_column}
    given = {ours: theirs for ours, theirs in columns.items() if theirs}
    section = DataSection(path=data, columns=given, system=system, max_length=1 << 20)
    section, stats = _inspect(section, tokenizer)
    replace_text(out, recipe_text(model, section, stats))
    load_recipe(out)
    print(f"{out}: {stats.train_rows:,} rows, format {stats.format}, the longest has {stats.longest_tokens:,} tokens")
    if stats.unused_columns:
        unused = ", ".join(stats.unused_columns)
        print(f"not read          {unused}. To train on other columns, name them: {COLUMN_OPTIONS}")
    print(f"look at the rows  qvera preview {out}\nfind a rate       qvera train {out} --find-lr")
    print(f"train             qvera train {out}")


def _ask(option: str, question: str) -> str:
    """Ask on the terminal; InputError where there is none."""
    if not sys.stdin.isatty():
        raise InputError(f"{option}: is missing, and there is no terminal to ask on. Give {option}.")
    return str(typer.prompt(question, err=True)).strip()


def _inspect(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> tuple[DataSection, DataStats]:
    """Read the rows; on a terminal ask for the columns if they are of no known format."""
    from qvera.data import build_datasets

    try:
        return section, build_datasets(section, tokenizer, console).stats
    except InputError as error:
        if "match no known format" not in str(error):
            raise
        if not sys.stdin.isatty():
            raise InputError(f"{error} Here: {COLUMN_OPTIONS}.") from None
        console.print(str(error), markup=False, highlight=False)
    prompt = _ask("--prompt-column", "Column with the prompt")
    answer = _ask("--answer-column", "Column with the answer")
    section = section.replace(columns={"prompt": prompt, "completion": answer})
    return section, build_datasets(section, tokenizer, console).stats


def recipe_text(model: str, data: DataSection, stats: DataStats) -> str:
    """The recipe, with the schema's defaults as comments; ``stats`` are of all rows of ``data``, none held out."""
    from qvera import config
    from qvera.config import schema

    adapter, training = schema.AdapterSection(), schema.TrainingSection()
    quantization = schema.ModelSection(path=model).quantization
    longest = -(-stats.longest_tokens // 64) * 64  # rounded up, so that a few longer rows fit later
    held_out = min(0.1, 200 / max(1, stats.train_rows)) if stats.train_rows >= 10 else 0.0
    lengths = f"tokens; the longest of {stats.train_rows:,} rows has {stats.longest_tokens:,}"
    # a JSON string is a YAML string, whatever is in it
    rows = f"  path: {json.dumps(data.path)}\n  format: {stats.format}"
    for key in ("columns", "system"):
        if value := getattr(data, key):
            rows += f"\n  {key}: {json.dumps(value)}"
    return f"""\
# yaml-language-server: $schema={Path(config.__file__).with_name("recipe.schema.json")}
# Written by `qvera init`. docs/recipe.md describes every key. Relative paths start in the directory
# where you run qvera. A line that begins with # shows a default.

model:
  path: {json.dumps(model)}
  quantization: {quantization}            # the frozen base in 4 bits

data:
{rows}
  max_length: {max(64, min(longest, LONGEST_TOKENS))}             # {lengths}
  eval_fraction: {held_out:.3g}         # held out: the run reports the loss on these rows before and after

adapter:
  rank: {adapter.rank}
  targets: {json.dumps(adapter.targets)}

training:
  # output_dir: runs/NAME      # default: the name of this file
  num_train_epochs: {training.num_train_epochs:g}
  global_batch_size: {min(training.global_batch_size, max(1, stats.train_rows))}
  learning_rate: {training.learning_rate:g}       # models under 1B parameters need more: --find-lr suggests a rate
  # lr_scheduler_type: {training.lr_scheduler_type}
  # save_steps: {training.save_steps}
"""
