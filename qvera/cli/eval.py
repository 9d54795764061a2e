"""`qvera eval` and `qvera harness`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qvera.cli.common import (
    AdapterName,
    EvalPath,
    HtmlFile,
    check_target,
    console,
    flag,
    number,
    option,
    print_table,
    progress,
    require_new_file,
    say,
)
from qvera.utils.errors import InputError
from qvera.utils.files import plain_json, replace_text

if TYPE_CHECKING:
    from qvera.evaluation.judge import Judge

_MOST_JUDGE_TOKENS = 2048
"""Of a judge's reply; models that think first need many."""


def evaluate(
    run: EvalPath,
    adapter: AdapterName = None,
    recipe: Annotated[Path | None, option("PATH", "A recipe, or a run, whose rows and settings are used.")] = None,
    data: Annotated[str | None, option("FILE", "Rows to evaluate on (default: the recipe's held-out rows).")] = None,
    rows: Annotated[int | None, number("Use only the first N rows.")] = None,
    metrics: Annotated[str, option("NAME,NAME", "How answers are compared with references.")] = "exact",
    group_prompts: Annotated[bool, flag("--group-prompts", "Rows with the same prompt are one row.")] = False,
    base: Annotated[bool, flag("--base", "Evaluate the base model without the adapter.")] = False,
    with_base: Annotated[bool, flag("--with-base", "Evaluate the base model too.")] = False,
    no_generation: Annotated[bool, flag("--no-generation", "Loss only: no answers, no metrics.")] = False,
    max_new_tokens: Annotated[int | None, number("Tokens per answer (default: the recipe's).")] = None,
    judge: Annotated[str | None, option("URL", "Let a model of this server compare answers, in both orders.")] = None,
    judge_model: Annotated[str | None, option("NAME", "Which of its models (default: its only one).")] = None,
    judge_against: Annotated[
        str | None, option("base|reference|FILE", "What answers are compared with (default: base).")
    ] = None,
    judge_prompt: Annotated[Path | None, option("FILE", "What the judge is asked.")] = None,
    predictions: Annotated[Path | None, option("FILE", "Write a line of JSON a prompt.")] = None,
    html: HtmlFile = None,
    json_file: Annotated[Path | None, option("FILE", "Write scores and every answer as JSON.", "--json")] = None,
) -> None:
    """Compute held-out loss, answers and their scores.

    RUN: a run; an adapter directory whose config names its base (QVERA, or what PEFT can load, such as the LoRA of
    `qvera export --to lora`); or a checkpoint that `qvera export --to merged` wrote. A merged export whose run still
    exists is evaluated on that run's held-out rows; otherwise give --recipe or --data.

    Metrics: exact; with `pip install 'qvera[metrics]'` also bleu, bleu-lowercase, chrf, chrf++, ter (sacrebleu) and
    rouge1, rouge2, rougeL (rouge-score). BLEU, chrF and TER go from 0 to 100, the others from 0 to 1.

    A run that trained many adapters is evaluated one adapter at a time (--adapter), on that adapter's held-out rows.

    `--json RUN/eval.json` puts the scores where `qvera compare` finds them.

    Example:
        qvera eval runs/quickstart --with-base --html page.html
    """
    if base and with_base:
        raise InputError("--with-base: compares with the base, and --base asks for the base alone; drop one of them.")
    # options for models that write text, and for their answers: which of them were given
    for_answers = {
        "--metrics": metrics != "exact",
        "--group-prompts": group_prompts,
        "--max-new-tokens": max_new_tokens is not None,
    }
    if no_generation:
        for name, is_given in {**for_answers, "--predictions": predictions is not None}.items():
            if is_given:
                raise InputError(f"{name}: is for answers, and --no-generation asks for none; drop one of them.")
    for path, ending in ((json_file, ".json"), (predictions, ".jsonl"), (html, ".html")):
        require_new_file(path, ending)
    written = [path for path in (json_file, predictions, html) if path is not None]
    if len({path.absolute() for path in written}) < len(written):
        raise InputError(f"{written[0]}: --json, --predictions and --html need a file each.")
    judging = _judge_of(judge, judge_model, judge_against, judge_prompt, no_generation)
    if judging is not None and judging.against == "base":
        if base:
            raise InputError("--judge: compares with the base, and --base asks for it; add --judge-against.")
        with_base = True

    from qvera.evaluation.metrics import text_metrics

    names = metrics.split(",")
    if not no_generation:
        text_metrics(names)  # a missing package is named at once
    check_target(run, adapter)

    from qvera.evaluation.load import find_target, require_comparable
    from qvera.tasks.evaluate import evaluate as evaluate_target

    target = find_target(run, recipe, name=adapter, needs_name=not base)
    if target.model_class.has_own_head:
        for_text = {"--no-generation": no_generation, "--html": html is not None, "--judge": judge is not None}
        for name, is_given in {**for_answers, **for_text}.items():
            if is_given:
                raise InputError(
                    f"{name}: is for models that write text, and {target.path} is a classifier. Leave it out."
                )
    elif html is not None and not (base or with_base):  # the page has a column for the base, if there is one
        try:
            require_comparable(target)
            with_base = True
        except InputError as error:
            if target.merged is not None:
                say(f"The page will have no base beside the answers. {error}", style="yellow")
    document = evaluate_target(
        target,
        data,
        limit=rows,
        base_alone=base,
        with_base=with_base,
        metrics=names,
        group_prompts=group_prompts,
        answers=not no_generation,
        max_new_tokens=max_new_tokens,
        judge=judging,
        console=console,
    )
    failure = document.pop("judge_error", None)
    what = f"{len(document['answers'])} {'labels' if target.model_class.has_own_head else 'answers'}"
    _write_and_print(document, what, predictions, json_file, html)
    if failure is not None:
        raise failure


def _write_and_print(
    document: dict[str, Any], what: str, predictions: Path | None, json_file: Path | None, html: Path | None
) -> None:
    from qvera.evaluation.judge import summary_text
    from qvera.evaluation.report.pages import answers_page

    _print_scores(document)  # before a full disk may end the command
    if document["judge"] is not None:
        print("\n".join(summary_text(document["judge"], document["subject"]["column"].lower())))
    if predictions is not None:
        lines = (json.dumps(plain_json(answer), ensure_ascii=False) + "\n" for answer in document["answers"])
        replace_text(predictions, "".join(lines))
    if json_file is not None:
        replace_text(json_file, json.dumps(plain_json(document), indent=1, ensure_ascii=False))
    if html is not None:
        replace_text(html, answers_page(document))
    for file, content in ((predictions, what), (json_file, "scores and answers"), (html, "the page")):
        if file is not None:
            print(f"{file}: {content}")


def _judge_of(
    url: str | None, model: str | None, against: str | None, prompt: Path | None, no_generation: bool
) -> Judge | None:
    """None: nobody judges. The server is asked which models it has."""
    if url is None:
        given = {"--judge-model": model, "--judge-against": against, "--judge-prompt": prompt}
        if names := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{names[0]}: goes with --judge URL only.")
        return None
    if no_generation:
        raise InputError("--judge: compares answers, and --no-generation asks for none; drop one of them.")

    from qvera.evaluation.judge import Judge, read_prompt
    from qvera.serve.client import ServerClient, server_url

    if (address := server_url(Path(url))) is None:
        raise InputError(f"--judge {url}: takes the address of a server, such as http://127.0.0.1:8000.")
    against = against or "base"
    if against not in ("base", "reference") and not Path(against).is_file():
        raise InputError(
            f"--judge-against {against}: takes `base`, `reference`, or a file that `qvera eval --predictions` "
            "wrote, and there is no such file."
        )
    text = read_prompt(prompt)
    client = ServerClient.at(address)
    picked = client.pick_judge(model)

    def ask(question: str) -> str:
        message = {"role": "user", "content": question}
        return client.chat(picked, [message], temperature=0.0, max_tokens=_MOST_JUDGE_TOKENS)

    return Judge(ask, client.url, picked, against, text)


def _print_scores(document: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    sides = {"base": document["base_scores"], document["subject"]["column"].lower(): document["scores"]}
    sides = {title: scores for title, scores in sides.items() if scores is not None}
    columns = [Column(title, justify="right") for title in sides]
    table = Table("", *columns, box=None, pad_edge=False, show_header=len(sides) > 1)
    of = {metric["name"]: f" of {metric['of']}" for metric in document["metrics"] if "of" in metric}
    for name in document["scores"]:
        cells = [scores.get(name, "") for scores in sides.values()]
        table.add_row(
            name + of.get(name, ""),
            *(f"{c:.4f}" if isinstance(c, float) else f"{c:,}" if c != "" else c for c in cells),
        )
    Console().print(table)
    if any(scores.get(name) == 0 for name in ("bleu", "bleu-lowercase") for scores in sides.values()):
        say("BLEU is 0 where no answer has four words, or none is right. chrf and exact compare short answers.")


def harness(
    run: EvalPath,
    tasks: Annotated[str, option("NAME,NAME", "lm-eval's names of tasks, groups or tags.")],
    include: Annotated[Path | None, option("DIR", "A directory with your own task files.")] = None,
    recipe: Annotated[Path | None, option("PATH", "A recipe or run that says how an adapter's base is loaded.")] = None,
    adapter: AdapterName = None,
    base: Annotated[bool, flag("--base", "The base model without the adapter.")] = False,
    limit: Annotated[int | None, number("Documents of each task (default: all).")] = None,
    few_shot: Annotated[int | None, number("Examples before each question.", 0)] = None,
    batch_size: Annotated[int, number("Requests at a time.")] = 8,
    chat: Annotated[bool, flag("--chat", "Put prompts through the chat template.")] = False,
    json_file: Annotated[
        Path | None, option("FILE", "Write lm-eval's results and every document as JSON.", "--json")
    ] = None,
) -> None:
    """Run lm-evaluation-harness on a run or export.

    Needs `pip install 'qvera[harness]'` (lm-eval). A run is evaluated on its quantized base, as it was trained.
    --include adds task files (YAML) of your own, which need no network. lm-eval itself can load a merged export:
    `lm_eval run --model hf --model_args pretrained=DIR --tasks ...`.

    Example:
        qvera harness runs/quickstart --tasks arc_easy --limit 100
    """
    require_new_file(json_file, ".json")
    check_target(run, adapter)

    from qvera.evaluation.generate import PromptWriter
    from qvera.evaluation.lm_eval import find_tasks, run_harness
    from qvera.evaluation.load import find_target, open_target, require_answers, require_comparable

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    target = find_target(run, recipe, name=adapter, needs_name=not base)
    require_answers(target, "qvera harness")
    if base:
        require_comparable(target)
    manager = find_tasks(names, include)
    with progress(f"loading {run}"):
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
    """lm-eval names a metric ``metric,filter``."""
    rows = []
    for task, values in found["results"].items():
        documents = (found.get("n-samples") or {}).get(task, {}).get("effective")
        shots = (found.get("n-shot") or {}).get(task)
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, float) and math.isfinite(error) else "–"
            cells = ["–" if shots is None else str(shots), metric if kind == "none" else f"{metric} ({kind})"]
            rows.append((task, [*cells, f"{value:.4f}", shown, "–" if documents is None else f"{documents:,}"]))
    print_table(["task", "shots", "metric", "value", "± stderr", "documents"], rows)
