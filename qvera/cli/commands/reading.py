"""Reading the result: eval, compare, harness."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from qvera.cli.commands.common import console, quiet_libraries, require_new_file
from qvera.config.schema import DataSection, TrainingSection
from qvera.data import Datasets, Example, build_datasets
from qvera.evaluation.evaluate import EvalPrompt, EvalResult, prompts_of, score_model
from qvera.evaluation.lm_eval import find_tasks, run_harness
from qvera.evaluation.load import (
    EvalTarget,
    OpenRun,
    adapter_sha256,
    base_of,
    base_problem,
    find_target,
    open_target,
    require_base,
    template_of,
)
from qvera.evaluation.metrics import TextMetric, text_metrics
from qvera.evaluation.report.answers_page import write_answers
from qvera.evaluation.report.compare import (
    COSTS,
    SCORES,
    Column,
    Comparison,
    compare_runs,
    score_columns,
    score_figures,
    table_cells,
)
from qvera.evaluation.report.compare_page import write_comparison
from qvera.evaluation.report.page import yaml_text
from qvera.evaluation.report.read import inputs_sha256
from qvera.utils import memory
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError


def eval(args: argparse.Namespace) -> None:  # the command's name
    """Qvera eval"""
    quiet_libraries()
    _check_flags(args)
    metrics = [] if args.no_generation else text_metrics(args.metrics.split(","))
    target = find_target(args.run, args.recipe)
    with_base = args.with_base
    if args.base or with_base:
        require_base(target)
    elif args.html is not None:  # which has a column for it, where there is one
        missing = base_problem(target)
        with_base = missing is None
        if missing is not None and target.merged is not None:
            console.print(f"The page will have no base beside the answers. {missing}", style="yellow", markup=False)
    section = _data_section(args, target)
    adapter = None if args.base else adapter_sha256(target)  # now: the run may go on while we score
    with console.status(f"Loading {args.run}"):
        opened = open_target(target, adapter=not args.base)
    datasets = build_datasets(section, opened.base.tokenizer, console)
    rows = (datasets.train if args.data is not None else datasets.eval)[: args.rows]
    inputs = [] if args.no_generation else prompts_of(rows, args.group_prompts)
    found = _score(args, target, opened, opened.model, datasets, rows, inputs, metrics, "")
    base = None
    if with_base:
        if target.adapter is None:  # the base of an export is a model of its own; both need not be held
            opened.model = None
            opened.base.model = None
        with contextlib.ExitStack() as until_scored:
            with console.status("Loading the base"):  # alone: rich before 14.1 shows one thing at a time
                model = until_scored.enter_context(base_of(target, opened))
            base = _score(args, target, opened, model, datasets, rows, inputs, metrics, "Base: ")
    document = _document(args, target, adapter, section, inputs, metrics, found, base)
    if args.predictions is not None:
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in document["answers"])
        replace_text(args.predictions, "".join(lines))
    if args.json is not None:
        replace_text(args.json, json.dumps(document, indent=1, ensure_ascii=False))
    if args.html is not None:
        write_answers(args.html, document)
    _say_scores(document)
    for path, what in (
        (args.predictions, f"{len(inputs)} answers"),
        (args.json, "scores and answers"),
        (args.html, "the page"),
    ):
        if path is not None:
            print(f"{path}: {what}")


def compare(args: argparse.Namespace) -> None:
    """Qvera compare"""
    if args.html is not None:
        require_new_file(args.html)
    found = compare_runs(args.runs)
    if args.html is not None:
        write_comparison(args.html, found)
    if args.json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
        return
    _say_runs(found)
    if args.html is not None:
        print(f"\n{args.html}: the same with the curves")


def _say_runs(found: Comparison) -> None:
    """A row for each run, what qvera eval found of it, the keys in which they differ, and what can't be compared."""
    # a pipe has no width, and its reader can cut columns better than we could
    console_out = Console(width=None if sys.stdout.isatty() else 250, highlight=False, markup=False)
    columns = [column._replace(title=column.title.lower()) for column in (*SCORES, *COSTS)]
    console_out.print(_run_table(found.labels, found.figures, columns))
    scored = [
        column._replace(title=column.key) for column in score_columns(found.evaluations)
    ]  # as qvera eval prints them
    if scored:
        console_out.print("\nScores by qvera eval")
        console_out.print(_run_table(found.labels, score_figures(found.evaluations), scored))
        console_out.print()
    for key, values in found.differing.items():
        who: dict[str, list[str]] = {}
        for label, value in zip(found.labels, values, strict=True):
            who.setdefault(yaml_text(value), []).append(label)
        console_out.print(f"{key}: " + "; ".join(f"{text} ({', '.join(labels)})" for text, labels in who.items()))
    for gap in found.gaps:
        console_out.print(f"! {gap}")


def _run_table(labels: Sequence[str], rows: Sequence[dict[str, float | None]], columns: Sequence[Column]) -> Table:
    """A row for each run; columns in which any has a value."""
    shown, told = table_cells(rows, columns)
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for title in shown:
        table.add_column(title, justify="right")
    for label, cells in zip(labels, told, strict=True):
        table.add_row(label, *cells)
    return table


def harness(args: argparse.Namespace) -> None:
    """Qvera harness"""
    quiet_libraries()
    if args.json is not None:
        require_new_file(args.json)
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: takes a whole number >= 1, got {value}.")
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    manager = find_tasks(names, args.include)
    target = find_target(args.run, args.recipe)
    if args.base:
        require_base(target)
    with console.status(f"Loading {args.run}"):
        opened = open_target(target, adapter=not args.base)
    found = run_harness(
        opened,
        manager,
        names,
        limit=args.limit,
        few_shot=args.few_shot,
        batch_size=args.batch_size,
        chat=args.chat,
        log_samples=args.json is not None,
    )
    if args.json is not None:
        replace_text(args.json, json.dumps(found, indent=1, ensure_ascii=False, default=str))
    _say_tasks(found)
    if args.json is not None:
        print(f"{args.json}: all of lm-eval's results, every document with its answers")


def _say_tasks(found: dict[str, Any]) -> None:
    """A line for each metric of each task; lm-eval names them ``metric,filter``."""
    table = Table(box=None, pad_edge=False)
    for title in ("task", "shots", "metric", "value", "± stderr", "documents"):
        table.add_column(title, justify="left" if title in ("task", "metric") else "right")
    for task, values in found["results"].items():
        documents = (found.get("n-samples") or {}).get(task, {}).get("effective")
        shots = (found.get("n-shot") or {}).get(task)
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, float) and math.isfinite(error) else "–"
            label = metric if kind == "none" else f"{metric} ({kind})"
            table.add_row(
                task,
                "–" if shots is None else str(shots),
                label,
                f"{value:.4f}",
                shown,
                "–" if documents is None else f"{documents:,}",
            )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _check_flags(args: argparse.Namespace) -> None:
    """Raises InputError where flags contradict each other, or a file is there already."""
    if args.base and args.with_base:
        raise InputError("--with-base: compares with the base, and --base asks for the base alone; drop one of them.")
    if args.no_generation and args.predictions is not None:
        raise InputError("--predictions: writes answers, and --no-generation asks for none; drop one of them.")
    if args.no_generation and args.group_prompts:
        raise InputError("--group-prompts: is for answers, and --no-generation asks for none; drop one of them.")
    for name in ("rows", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: takes a whole number >= 1, got {value}.")
    files = [path for path in (args.json, args.predictions, args.html) if path is not None]
    for path in files:
        require_new_file(path)
    if len({path.absolute() for path in files}) < len(files):
        raise InputError(f"{files[0]}: --json, --predictions and --html need a file each.")


def _data_section(args: argparse.Namespace, target: EvalTarget) -> DataSection:
    """Where the rows come from: the recipe's held-out ones, or all of a file that is read the way the recipe's rows are."""
    recipe = target.recipe
    if args.data is None:
        if recipe is None:
            raise InputError(
                f"{args.run}: {target.what} has no recipe that names held-out rows. Name a file with --data FILE, or the run "
                "(or recipe) that it belongs to with --recipe."
            )
        if not (recipe.data.eval_path or recipe.data.eval_fraction):
            raise InputError(f"{args.run}: its recipe holds out no rows; name a file with --data.")
        return recipe.data.replace(template=template_of(recipe, target.run))
    if recipe is None:
        return DataSection(path=args.data, limit=args.rows)
    return recipe.data.replace(
        path=args.data,
        config_name=None,  # of the recipe's own source, like its revision
        revision=None,
        template=template_of(recipe, target.run),
        mixture=[],
        weight=1.0,
        eval_path=None,
        eval_fraction=0.0,
        limit=args.rows,
    )


def _score(
    args: argparse.Namespace,
    target: EvalTarget,
    opened: OpenRun,
    model: Any,
    datasets: Datasets,
    rows: Sequence[Example],
    inputs: list[EvalPrompt],
    metrics: list[TextMetric],
    label: str,
) -> EvalResult:
    settings = target.recipe.training if target.recipe is not None else TrainingSection()
    with console.status(f"{label}scoring") as status:
        return score_model(
            model,
            opened.base.tokenizer,
            rows,
            inputs,
            metrics,
            settings,
            pad_id=datasets.pad_id,
            max_new_tokens=_answer_tokens(args, target),
            progress=lambda text: status.update(label + text),
        )


def _answer_tokens(args: argparse.Namespace, target: EvalTarget) -> int:
    settings = target.recipe.training if target.recipe is not None else TrainingSection()
    return int(args.max_new_tokens or settings.sample_max_new_tokens)


def _document(
    args: argparse.Namespace,
    target: EvalTarget,
    adapter: str | None,
    section: DataSection,
    inputs: list[EvalPrompt],
    metrics: list[TextMetric],
    found: EvalResult,
    base: EvalResult | None,
) -> dict[str, Any]:
    """The whole evaluation, as --json writes it and the page shows it."""
    answers: list[dict[str, Any]] = []
    for number, each in enumerate(inputs):
        row: dict[str, Any] = {
            "source": each.example.source,
            "prompt": each.example.prompt_text,
            "references": each.references,
            "answer": found.answers[number],
            "scores": found.rows[number],
        }
        if base is not None:
            row |= {"base_answer": base.answers[number], "base_scores": base.rows[number]}
        answers.append(row)
    of = target.merged["base"]["path"] if target.merged else target.section.path
    what = "the base alone" if args.base else target.what
    return {
        "subject": {
            "path": str(args.run),
            "what": what[0].upper() + what[1:],
            "column": "Base"
            if args.base
            else {"checkpoint": "Export" if target.merged else "Model"}.get(target.kind, "Adapter"),
            "base": of,
            "data": args.data
            or section.eval_path
            or f"{section.path}, {section.eval_fraction:.1%} held out by its seed",
            "max_new_tokens": _answer_tokens(args, target),
            "adapter_sha256": adapter,
            "inputs_sha256": inputs_sha256(answers),
        },
        "scores": found.scores,
        "base_scores": None if base is None else base.scores,
        "metrics": [
            {"name": m.name, "label": m.label, "signature": m.signature(), "lower_is_better": m.lower_is_better}
            for m in metrics
            if inputs and found.scores.get("scored_rows")
        ],
        "versions": memory.versions(),
        "answers": answers,
    }


def _say_scores(document: dict[str, Any]) -> None:
    """The scores, in two columns where the base was asked too."""
    scores, base = document["scores"], document["base_scores"]
    table = Table(box=None, pad_edge=False, show_header=base is not None)
    table.add_column("")
    for title in ([] if base is None else ["base"]) + [document["subject"]["column"].lower()]:
        table.add_column(title, justify="right")
    for name, value in scores.items():
        cells = ([] if base is None else [base[name]]) + [value]
        table.add_row(name, *(f"{cell:.4f}" if isinstance(cell, float) else f"{cell:,}" for cell in cells))
    Console().print(table)
