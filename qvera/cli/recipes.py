"""`qvera init`, `qvera schema`, `qvera preview` and `qvera plan`: a recipe before it is trained."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvera.cli.common import (
    HtmlFile,
    Json,
    Overrides,
    RecipePath,
    argument,
    console,
    flag,
    number,
    option,
    print_json,
    progress,
    require_new_file,
)
from qvera.utils.adapter_names import similar_names
from qvera.utils.errors import InputError
from qvera.utils.files import cache_root, replace_text, resolve_path
from qvera.utils.formatting import counted, shortened

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.config.sections import DataSection
    from qvera.data import Datasets, DataStats
    from qvera.data.source import Processor

COLUMN_OPTIONS = "--prompt-column NAME --answer-column NAME"
_COLUMNS = {"classification": ("text", "label"), "image": ("image", "label"), "preference": ("prompt", "chosen")}
"""Format → the fields for the two options, where they are not prompt and completion."""
LONGEST_TOKENS = 2048
"""The largest ``max_length`` of a new recipe, however long the rows are."""
LEAST_STEPS, MOST_EPOCHS = 150, 10
"""A new recipe passes over few rows again until there are so many steps; more epochs than that repeat what is known."""
CHECKPOINTS = 10
"""A new recipe saves about so many times, and no less often than the default: a checkpoint is a few MB."""
MANY_ROWS = 2000  # from here on a step has the default number of rows, below it half as many
FEW_ROWS, FEW_ROWS_OF_A_LABEL = 100, 10  # below these the command says that more would help
SMALL_HIDDEN_SIZE, SMALL_RANK = 384, 64
"""Up to this hidden size a new recipe has this rank: the default of 256 learns no better there, and takes 1.6 times as
long (docs/methods/table.md)."""
TWO_B_HIDDEN_SIZE = 1024
"""Up to this hidden size a new recipe for longer answers has two b and an a at rank 96. Measured at 576: nearer to LoRA
r=16 on instruction rows than plain VeRA, with a tenth of its numbers (docs/methods/table.md)."""
ANSWER_MARGIN_TOKENS = 8
SHORT_ANSWER_TOKENS = 32  # on average: answers that can be compared with their references word by word
MOST_LABELS, LONGEST_LABEL = 20, 40
"""So few and short answers (in characters), each in `FEW_ROWS_OF_A_LABEL` rows on average, are labels: a system prompt
names them."""


def init(
    out: Annotated[Path, argument("OUT", "The recipe to write; must not exist.")] = Path("recipe.yaml"),
    model: Annotated[str | None, option("PATH", "A model directory or a hub id.")] = None,
    data: Annotated[str | None, option("PATH", "A file or directory of rows, or a hub id.")] = None,
    eval_data: Annotated[str | None, option("PATH", "Held-out rows (default: some of --data).")] = None,
    task: Annotated[str | None, option("NAME", "sequence-classification or image-classification.")] = None,
    objective: Annotated[str | None, option("NAME", "dpo, orpo or kto, for preferences.")] = None,
    prompt_column: Annotated[str | None, option("NAME", "The prompt; of a classifier the text or image.")] = None,
    answer_column: Annotated[str | None, option("NAME", "The answer; of a classifier the label.")] = None,
    adapter_column: Annotated[str | None, option("NAME", "Train an adapter for each value of this column.")] = None,
    system: Annotated[str | None, option("TEXT", "A system prompt for all rows.")] = None,
    config_name: Annotated[str | None, option("NAME", "The configuration of a hub dataset.")] = None,
    split: Annotated[str | None, option("NAME", "The split of a hub dataset (default: train).")] = None,
) -> None:
    """Write a commented recipe for your model and data.

    Reads the data and the model's tokenizer first, and fills in format, columns, lengths and held-out rows. On a
    terminal it asks for what is not given.

    Example:
        qvera init recipe.yaml --model meta-llama/Llama-2-7b-hf --data rows.csv
    """
    if out.suffix not in (".yaml", ".yml"):
        hint = f" Rows go to --data {out}." if out.exists() else ""
        raise InputError(f"{out}: is the name of the recipe to write; expected one that ends in .yaml.{hint}")
    require_new_file(out)
    if objective == "grpo":
        raise InputError(
            "--objective: init writes recipes of dpo, orpo and kto. One of grpo names a function that scores answers: "
            "docs/rewards.md has such a recipe."
        )
    model = model or _ask("--model", "Base model (a directory or a hub id)")
    data = data or _ask("--data", "Training rows (a file, a directory or a hub id)")

    from qvera.config.schema import json_schema, parse_recipe, read_yaml
    from qvera.training.trainer import check_early

    about_rows = _given(eval_path=eval_data, system=system, adapter_column=adapter_column)
    about_rows |= _given(config_name=config_name, split=split)
    tree = {"model": model, "data": {"path": data, **about_rows}, "training": _given(objective=objective)}
    tree |= _given(task=task)
    recipe = parse_recipe(tree, "the options")
    # Rows come before the base: most mistakes are in them, and to read them takes no library of the hub.
    recipe = _with_found_columns(_with_columns(recipe, prompt_column, answer_column))
    check_early(recipe)

    with progress(f"looking at {model}"):
        from qvera.data import build_datasets
        from qvera.data.dataset import label_warnings
        from qvera.models.model_class import empty_model
        from qvera.models.structure import context_limit
        from qvera.models.tokenizer import load_processor
        from qvera.tasks import task_of

        model_class = task_of(recipe).exported_class
        empty = empty_model(recipe.model, model_class=model_class)
        processor = load_processor(recipe.model, model_class)
    if recipe.data.format != "image":
        recipe = recipe.replace(data=recipe.data.replace(max_length=1 << 20))
    datasets = build_datasets(recipe.data, processor, console)
    if system is None and (own := _common_system(recipe.data)) is not None:
        recipe = recipe.replace(data=recipe.data.replace(system=own))  # for prompts that come without it
    elif system is None:
        recipe, datasets = _with_labels_named(recipe, datasets, processor)
    stats = datasets.stats
    for line in label_warnings(stats):
        print(f"labels            {line}")
    hidden_size = getattr(empty.config.get_text_config(), "hidden_size", None)
    context = context_limit(empty)
    text = recipe_text(recipe, stats, hidden_size, context)
    parse_recipe(read_yaml(text, str(out))[0], str(out))
    with contextlib.suppress(OSError):  # a cache that can't be written: editors don't complete the recipe's keys
        _schema_file().parent.mkdir(parents=True, exist_ok=True)
        replace_text(_schema_file(), json.dumps(json_schema(), indent=1))
    replace_text(out, text)
    classes = f", {stats.targets_text}" if stats.labels is not None else ""
    longest = "" if stats.format == "image" else f", the longest has {stats.longest_tokens:,} tokens"
    named = shlex.quote(str(out))
    if system is None and recipe.data.system is not None:
        print(f"system prompt     {shortened(' '.join(recipe.data.system.split()), 100)} (data.system in {named})")
    print(f"{out}: {stats.train_rows:,} rows, format {stats.format}{longest}{classes}")
    if longest and stats.longest_tokens > context:
        print(f"longer rows       are cut at {context:,} tokens, where the base's context ends (data.too_long)")
    if stats.unused_columns:
        unused = ", ".join(stats.unused_columns)
        print(f"not read          {unused}. To train on other columns, delete {named}, and give {COLUMN_OPTIONS}")
        if stats.unused_labels and stats.format == "text":  # whose column a classifier reads
            print("                  To train a classifier of these labels, give --task sequence-classification")
        elif stats.unused_labels:
            print("                  A classifier of these labels: --task sequence-classification --prompt-column NAME")
            print("                  Answers that they call good or bad: --objective kto")
    if stats.label_rows and (rarest := min(stats.label_rows)) < FEW_ROWS_OF_A_LABEL:
        print(f"few rows          a label has {rarest} of them; some dozens of each are better")
    elif stats.adapters is not None:
        print(f"adapters          {stats.adapters.counts}")
    elif stats.train_rows < FEW_ROWS:
        print(f"few rows          a model learns little from {stats.train_rows}; some hundreds are better")
    print(f"look at the rows  qvera preview {named}\nfind a rate       qvera train {named} --find-lr")
    print(f"train             qvera train {named}")


def _given(**options: str | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _with_columns(recipe: Recipe, prompt: str | None, answer: str | None) -> Recipe:
    fields = _COLUMNS.get(recipe.data.format, ("prompt", "completion"))
    columns = _given(**dict(zip(fields, (prompt, answer), strict=True)))
    return recipe.replace(data=recipe.data.replace(columns=columns))


def _with_found_columns(recipe: Recipe) -> Recipe:
    """Read all rows once, before torch is imported; on a terminal, ask for columns that match no format."""
    from qvera.data.conversations import PREFERENCES
    from qvera.data.detect import MissingColumn, UnaskedPreferences, UnknownFormat
    from qvera.data.source import survey

    try:
        parts = (False, True) if recipe.data.held_out_path is not None else (False,)
        formats = {survey(recipe.data, held_out).format.name for held_out in parts}
        # held-out rows may have another format than those that are trained
        return recipe.replace(data=recipe.data.replace(format=formats.pop() if len(formats) == 1 else "auto"))
    except UnaskedPreferences as error:
        raise InputError(f"{error} Here: --objective dpo.") from None
    except MissingColumn as error:
        here = COLUMN_OPTIONS
        if recipe.data.format in PREFERENCES:  # no option names the column of rejected answers, or that of verdicts
            here += " (the chosen one); rename others in the file; dpo and orpo take pairs, kto judged answers"
        raise InputError(f"{error} Here: {here}.") from None
    except UnknownFormat as error:
        if not sys.stdin.isatty():
            given = recipe.data.columns.keys() & {"prompt", "completion"}
            here = f"{COLUMN_OPTIONS}, or --task for rows with labels"
            if len(given) == 1:
                here = f"{'--answer-column' if given == {'prompt'} else '--prompt-column'} NAME too"
            raise InputError(f"{error} Here: {here}.") from None
        console.print(str(error), markup=False, highlight=False)
    prompt = _ask("--prompt-column", "Column with the prompt")
    answer = _ask("--answer-column", "Column with the answer")
    return _with_found_columns(_with_columns(recipe, prompt, answer))


def _common_system(section: DataSection) -> str | None:
    """The system prompt that each row begins with; None if there is none, or more than one."""
    from qvera.data.conversations import Conversation, parse_row
    from qvera.data.detect import detect_format
    from qvera.data.source import raw_rows

    found: set[str] = set()
    format = None
    for row in raw_rows(section):
        format = format or detect_format(row, section.format, section.columns)
        parsed = parse_row(row, format)
        if not isinstance(parsed, Conversation) or parsed.turns[0].role != "system":
            return None
        found.add(parsed.turns[0].content)
        if len(found) > 1:
            return None
    return found.pop()


def _ask(option: str, question: str) -> str:
    if not sys.stdin.isatty():
        raise InputError(f"{option}: is missing, and there is no terminal to ask on. Give {option}.")
    return str(typer.prompt(question, err=True)).strip()


def _with_labels_named(recipe: Recipe, datasets: Datasets, processor: Processor) -> tuple[Recipe, Datasets]:
    """With a system prompt that names the answers, where all rows have one of a few short ones."""
    from qvera.data import build_datasets
    from qvera.data.labelled import rows_by_label

    most = min(MOST_LABELS, len(datasets.train) // FEW_ROWS_OF_A_LABEL)
    found = rows_by_label(datasets.train, most) if datasets.stats.format == "prompt-completion" else {}
    if not 2 <= len(found) <= most or not all(name and len(name) <= LONGEST_LABEL for name in found):
        return recipe, datasets
    for alike in similar_names(sorted(found)):
        counts = " and ".join(f"{name!r} ({counted(found[name], 'row')})" for name in alike)
        print(f"labels alike      {counts} differ only by case or spaces; is that meant?")
    prompt = f"Answer with one of these: {', '.join(sorted(found))}."
    named = recipe.replace(data=recipe.data.replace(system=prompt))
    try:
        shown = build_datasets(named.data, processor, console)
    except InputError:  # the template has no system turn
        return recipe, datasets
    if list(shown.train[0].input_ids) == list(datasets.train[0].input_ids):  # the rows have their own
        return recipe, datasets
    return named, shown


def recipe_text(recipe: Recipe, stats: DataStats, hidden_size: int | None, context: int) -> str:
    """The recipe with the schema's defaults as comments.

    Args:
        stats: of all its rows, none held out.
        hidden_size: the base's; None: it has none, and the rate is the schema's default.
        context: the most tokens that the base takes.
    """
    from qvera.adapters.methods import HEAD_RATE, measured_rate
    from qvera.config import schema
    from qvera.config.schema import yaml_text

    adapter, training, data = schema.AdapterSection(), schema.TrainingSection(), recipe.data
    longest = -(-stats.longest_tokens // 64) * 64  # rounded up, so that a few longer rows fit later
    divides = data.eval_path is None and stats.train_rows >= 10
    held_out = min(0.1, 200 / max(1, stats.train_rows)) if divides else 0.0
    held_out_rows = stats.eval_rows or round(stats.train_rows * held_out)
    lengths = f"tokens; the longest of {stats.train_rows:,} rows has {stats.longest_tokens:,}"
    rows = f"  path: {yaml_text(data.path)}\n  format: {data.format}"
    for key in ("config_name", "split", "eval_path", "columns", "adapter_column", "system"):
        if (value := getattr(data, key)) and not (key == "split" and value == "train"):
            rows += f"\n  {key}: {yaml_text(value)}"
    if data.format != "image":  # whose tokens are those of its patches
        cut = f"; the base's context ends at {context:,}" if stats.longest_tokens > context else ""
        rows += f"\n  max_length: {min(context, max(64, min(longest, LONGEST_TOKENS)))}             # {lengths}{cut}"
    if data.eval_path is None:
        rows += f"\n  eval_fraction: {held_out:.3g}         # held out: the run reports their loss before and after"
    task = "" if stats.labels is None else f"task: {recipe.task}\n"

    adapters, of_each = (1, "") if stats.adapters is None else (len(stats.adapters.trained), " of each adapter")
    trained_rows = max(1, round(stats.train_rows / adapters * (1 - held_out)))
    step_rows = training.global_batch_size // (1 if trained_rows >= MANY_ROWS else 2)
    step_rows = min(step_rows, trained_rows)
    if recipe.training.objective == "kto":  # whose passes have two rows or more
        step_rows = max(2, step_rows - step_rows % 2)
    epoch_steps = -(-trained_rows // step_rows)
    epochs = min(MOST_EPOCHS, -(-LEAST_STEPS // epoch_steps))
    save_steps = max(1, epochs * epoch_steps // CHECKPOINTS)
    rate = (measured_rate(adapter.method, hidden_size) if hidden_size else None) or training.learning_rate
    source = f"for a hidden size of {hidden_size} (docs/evaluation.md)" if hidden_size else "the default"
    keys = [
        f"num_train_epochs: {epochs}         # {epochs * epoch_steps:,} steps{of_each} of {step_rows} rows",
        f"global_batch_size: {step_rows}",
        f"learning_rate: {rate:g}         # {source}; --find-lr measures it on these rows",
    ]
    is_short = stats.trained_tokens < SHORT_ANSWER_TOKENS * stats.train_rows
    if stats.labels is not None:
        keys.append(f"head_learning_rate: {HEAD_RATE:g}")
    elif held_out_rows and is_short and data.format not in ("preference", "text") and stats.adapters is None:
        keys.append(f"exact_match_rows: {min(50, held_out_rows)}         # held-out answers compared")
        # twice the longest: an answer that goes on behind the right one is not cut into it
        answer_tokens = min(training.sample_max_new_tokens, 2 * stats.most_trained_tokens + ANSWER_MARGIN_TOKENS)
        keys.append(
            f"sample_max_new_tokens: {answer_tokens}         # the longest answer has {stats.most_trained_tokens}"
        )
    if save_steps < training.save_steps:
        keys.append(f"save_steps: {save_steps}              # a killed run loses the steps since its last checkpoint")
    else:
        keys.append(f"# save_steps: {training.save_steps}")
    if (objective := recipe.training.objective) != training.objective:
        keys.insert(0, f"objective: {objective}")
    vectors, is_answered = f"rank: {adapter.rank}", stats.labels is None and data.format not in ("preference", "text")
    if hidden_size is not None and hidden_size <= SMALL_HIDDEN_SIZE:
        vectors = f"rank: {SMALL_RANK}                     # for a hidden size of {hidden_size}"
    elif hidden_size is not None and hidden_size <= TWO_B_HIDDEN_SIZE and is_answered and not is_short:
        vectors = "rank: 96                     # with these two keys nearer to LoRA on longer answers\n  "
        vectors += "b_groups: 2\n  input_scale: true"
    written = "\n  ".join(keys)
    return f"""\
# yaml-language-server: $schema={_schema_file()}
# Written by `qvera init`. docs/recipe.md describes every key. Relative paths start in the directory
# where you run qvera. A line that begins with # shows a default.

{task}model:
  path: {yaml_text(recipe.model.path)}
  quantization: {recipe.model.quantization}            # the frozen base in 4 bits

data:
{rows}

adapter:
  {vectors}
  targets: {yaml_text(adapter.targets)}

training:
  # output_dir: runs/NAME      # default: the name of this file
  {written}
  # lr_scheduler_type: {training.lr_scheduler_type}
"""


def _schema_file() -> Path:
    """Where `qvera init` keeps the JSON schema for editors. It has the keys of installed plug-ins too."""
    return cache_root() / "recipe.schema.json"


def schema() -> None:
    """Print the JSON schema of a recipe, for editors.

    Editors that know yaml-language-server complete and check a recipe whose first line names the schema: `#
    yaml-language-server: $schema=FILE`.

    Example:
        qvera schema > recipe.schema.json
    """
    from qvera.config.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


def preview(
    recipe: RecipePath,
    overrides: Overrides,
    rows: Annotated[int, number("Rows shown in full.", 0)] = 4,
    html: HtmlFile = None,
) -> None:
    """Show the rows of a recipe, trained tokens marked.

    Prints counts, lengths and the first rows. Reads the data and the tokenizer, no weights.

    Example:
        qvera preview recipes/quickstart.yaml --rows 2
    """
    from rich.console import Console

    from qvera.config.schema import load_recipe
    from qvera.training.trainer import check_early

    loaded = load_recipe(recipe, overrides)
    require_new_file(html, ".html")
    check_early(loaded)

    from qvera.data import build_datasets, data_warnings, decode, print_preflight
    from qvera.evaluation.report.pages import preview_page
    from qvera.models.model_class import load_config
    from qvera.models.structure import context_note
    from qvera.models.tokenizer import load_processor
    from qvera.tasks import task_of

    tokenizer = load_processor(loaded.model, task_of(loaded).exported_class)
    datasets = build_datasets(loaded.data, tokenizer, console)
    shown = datasets.first_rows(rows)
    print_preflight(datasets, tokenizer, Console(), rows)
    note = None
    if loaded.data.format != "image":
        # what else is wrong with the config, plan and train say
        with contextlib.suppress(OSError, ValueError, KeyError, ImportError):
            note = context_note(load_config(loaded.model), datasets.stats.longest_tokens)
    if note is not None:
        Console().print(note, style="yellow", markup=False)
    if html is not None:
        warnings = data_warnings(datasets.stats)
        show = partial(decode, tokenizer)
        replace_text(html, preview_page(recipe.stem, loaded.data.path, datasets.stats, warnings, shown, show))
        print(f"{html}: the same as a page, all tokens of {len(shown)} rows")


def plan(
    recipe: RecipePath,
    overrides: Overrides,
    gpu: Annotated[str | None, option("SIZE", "Plan for a GPU of that size: 24GB, 24GiB.")] = None,
    nodes: Annotated[int | None, number("Plan for N equal machines.")] = None,
    gpus: Annotated[int | None, number("Plan for N processes on each machine.")] = None,
    as_json: Json = False,
    no_timing: Annotated[bool, flag("--no-timing", "Do not time a step.")] = False,
) -> None:
    """Estimate memory, time and files of a run.

    Reads the model's config, no weights. The longest batch is that of the data if it is local, else data.max_length.
    Without --gpu it plans for this machine and times a step (a few seconds). If the run does not fit, it names the
    nearest changes that make it fit. --nodes and --gpus: one process of many, under each ZeRO stage, and which stage is
    right.

    Example:
        qvera plan recipes/instruct/llama2-7b.yaml --gpu 24GB
    """
    import dataclasses

    from rich.console import Console

    from qvera.config.schema import load_recipe

    loaded = load_recipe(recipe, overrides)

    from qvera.adapters.save_load import check_start
    from qvera.data import build_datasets, planned_steps
    from qvera.data.source import hub_datasets
    from qvera.distributed.zero import zero_config_of
    from qvera.models.tokenizer import load_processor
    from qvera.tasks import task_of
    from qvera.training.plan import Sharing, gpu_machine, make_plan, parse_size, time_step
    from qvera.training.plan.plan import print_plan
    from qvera.utils import accelerator
    from qvera.utils.formatting import duration

    check_start(loaded.adapter, loaded.model)
    device = accelerator.current_device()
    machine = None if gpu is None else gpu_machine(loaded.model, parse_size(gpu))
    several = nodes is not None or gpus is not None
    sharing = Sharing.of(zero_config_of(loaded), nodes or 1, gpus or 1)
    data = None  # the rows, if they and the tokenizer are local: a plan must not wait for a download
    is_here = Path(resolve_path(loaded.data.path)).exists() and Path(resolve_path(loaded.model.path)).is_dir()
    if is_here and not hub_datasets(loaded.data):
        try:
            tokenizer = load_processor(loaded.model, task_of(loaded).exported_class)
        except InputError:  # without one, the longest batch is that of data.max_length
            tokenizer = None
        data = None if tokenizer is None else build_datasets(loaded.data, tokenizer, console)
        if data is not None:
            task_of(loaded).prepare_rows(data)
    rows, adapter_rows = (None, []) if data is None else (data.train, [len(one.train) for one in data.adapters])
    if machine is None and (problem := accelerator.unusable_card()) is not None:
        Console().print(problem, style="yellow", highlight=False, soft_wrap=True)
    made = make_plan(loaded, machine or device, rows, sharing, several, adapter_rows, data)
    if machine is None and not no_timing:
        with progress("timing this machine"):
            made = dataclasses.replace(made, seconds=time_step(made, device))
    counts = adapter_rows or ([] if rows is None else [len(rows)])
    steps = sum(planned_steps(loaded, count) for count in counts) or None
    if as_json:
        print_json({**made.to_dict(), "planned_steps": steps})
        return
    print_plan(made, Console())
    if steps is not None:
        most = ""
        if made.seconds is not None:  # of a step, or of a round in which each slot takes one
            time = duration(steps * sum(made.seconds.values()) / (made.slots or 1))
            most = f", at most about {time} if each were the longest batch"
        print(f"{steps:,} optimizer steps in all{most}. Loading, evaluations and answers are not counted.")
