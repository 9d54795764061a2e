"""`qvera harness`."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qvera.cli.common import AdapterName, EvalPath, progress, quiet_libraries, require_new_file
from qvera.utils.atomic import replace_text


def harness(
    run: EvalPath,
    tasks: Annotated[str, typer.Option(metavar="NAME,NAME", help="lm-eval's names of tasks, groups or tags.")],
    include: Annotated[Path | None, typer.Option(metavar="DIR", help="A directory with your own task files.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A recipe or run that says how an adapter's base is loaded.")
    ] = None,
    adapter: AdapterName = None,
    base: Annotated[bool, typer.Option("--base", help="The base model without the adapter.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Documents of each task (default: all).")
    ] = None,
    few_shot: Annotated[int | None, typer.Option(metavar="N", help="Examples before each question.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at a time.")] = 8,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write lm-eval's results and every document as JSON.")
    ] = None,
) -> None:
    """Run lm-evaluation-harness on a run or export.

    Needs `pip install 'qvera[harness]'` (lm-eval). A run is evaluated on its quantized base, as it was trained.
    --include adds task files (YAML) of your own, which need no network. lm-eval itself can load a merged export:
    `lm_eval run --model hf --model_args pretrained=DIR --tasks ...`.

    Example:
        qvera harness runs/quickstart --tasks arc_easy --limit 100
    """
    quiet_libraries()
    if json_file is not None:
        require_new_file(json_file)

    from qvera.evaluation.generate import PromptWriter
    from qvera.evaluation.lm_eval import find_tasks, run_harness
    from qvera.evaluation.load import find_target, open_target, require_answers, require_base

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = find_tasks(names, include)
    target = find_target(run, recipe, name=adapter, needs_name=not base)
    require_answers(target, "qvera harness")
    if base:
        require_base(target)
    with progress(f"Loading {run}"):
        opened = open_target(target, adapter=not base)
    system = None
    if chat:  # as the run was trained, not as its tokenizer would have it
        writer = PromptWriter.of(opened)
        opened.base.tokenizer.chat_template, system = writer.template.jinja, writer.system
    found = run_harness(
        opened,
        manager,
        names,
        batch_size,
        limit=limit,
        num_fewshot=few_shot,
        apply_chat_template=chat,
        system_instruction=system,
        log_samples=json_file is not None,
    )
    if json_file is not None:
        replace_text(json_file, json.dumps(found, indent=1, ensure_ascii=False, default=str))
    _print_tasks(found)
    if json_file is not None:
        print(f"{json_file}: all of lm-eval's results, every document with its answers")


def _print_tasks(found: dict[str, Any]) -> None:
    """A line for each metric of each task; lm-eval names them ``metric,filter``."""
    from rich.console import Console
    from rich.table import Table

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
            table.add_row(
                task,
                "–" if shots is None else str(shots),
                metric if kind == "none" else f"{metric} ({kind})",
                f"{value:.4f}",
                f"{error:.4f}" if isinstance(error, float) and math.isfinite(error) else "–",
                "–" if documents is None else f"{documents:,}",
            )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
