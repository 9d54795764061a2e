"""`qvera eval`."""

from __future__ import annotations

import contextlib
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvera.cli.common import AdapterName, EvalPath, console, progress, quiet_libraries, require_new_file
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.files import plain_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from transformers import PreTrainedModel

    from qvera.config.schema import DataSection
    from qvera.evaluation.load import Artifact


def evaluate(
    run: EvalPath,
    adapter: AdapterName = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A recipe, or a run, whose rows and settings are used.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows to evaluate on (default: the recipe's held-out rows).")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N rows.")] = None,
    metrics: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="How answers are compared with references.")
    ] = "exact",
    group_prompts: Annotated[
        bool, typer.Option("--group-prompts", help="Rows with the same prompt are one, with all their references.")
    ] = False,
    base: Annotated[bool, typer.Option("--base", help="Evaluate the base model without the adapter.")] = False,
    with_base: Annotated[bool, typer.Option("--with-base", help="Evaluate the base model too.")] = False,
    no_generation: Annotated[bool, typer.Option("--no-generation", help="Loss only: no answers, no metrics.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens per answer (default: the recipe's).")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="Let a model of this server compare answers, in both orders.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of its models (default: its only one).")
    ] = None,
    judge_against: Annotated[
        str | None,
        typer.Option(metavar="base|reference|FILE", help="What answers are compared with (default: base)."),
    ] = None,
    judge_prompt: Annotated[Path | None, typer.Option(metavar="FILE", help="What the judge is asked.")] = None,
    predictions: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a line of JSON a prompt.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page: base, adapter and reference side by side.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write scores and every answer as JSON.")
    ] = None,
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
    from qvera.cli.eval_labels import evaluate_labels, refuse_options
    from qvera.cli.judge import Judge

    for_answers = {
        "--predictions": predictions is not None,
        "--group-prompts": group_prompts,
        "--metrics": metrics != "exact",
        "--max-new-tokens": max_new_tokens is not None,
    }
    _check_options(base, with_base, no_generation, for_answers, json_file, predictions, html)
    judging = Judge.of_options(judge, judge_model, judge_against, judge_prompt, no_generation)
    if judging is not None and judging.against == "base":
        if base:
            raise InputError("--judge: compares with the base, and --base asks for it; add --judge-against.")
        with_base = True

    from qvera.evaluation.metrics import text_metrics

    chosen = [] if no_generation else text_metrics(metrics.split(","))  # a missing package is named at once
    quiet_libraries()

    from qvera.config.schema import TrainingSection
    from qvera.data import build_datasets, lengths_of
    from qvera.evaluation.held_out import prompts_of, score_model
    from qvera.evaluation.load import adapter_sha256, base_of, find_target, open_target, require_base
    from qvera.evaluation.named_adapters import require_held_out_rows
    from qvera.evaluation.report.read import inputs_sha256
    from qvera.models.positions import require_positions
    from qvera.tasks import TASKS, task_of
    from qvera.utils import accelerator, memory

    target = find_target(run, recipe, name=adapter, needs_name=not base)
    if target.model_class.has_own_head:
        text_only = {"metrics": metrics != "exact", "group_prompts": group_prompts, "no_generation": no_generation}
        text_only |= {
            "max_new_tokens": max_new_tokens is not None,
            "html": html is not None,
            "judge": judge is not None,
        }
        refuse_options(target, base=base, with_base=with_base and judging is None, **text_only)
        section = _data_section(run, data, rows, target)
        about = _subject(target, section, base_alone=False, data=data)
        found = evaluate_labels(target, section, data is not None, rows)
        about |= {"inputs_sha256": found.pop("inputs_sha256"), "adapter_sha256": adapter_sha256(target)}
        more = {"base_scores": None, "judge": None, "versions": memory.versions()}
        what = f"{len(found['answers'])} labels"
        _write_and_print({"subject": about, **found, **more}, what, predictions, json_file, None)
        return
    if base or with_base:
        require_base(target)
    elif html is not None:  # the page has a column for the base, if there is one
        try:
            require_base(target)
            with_base = True
        except InputError as error:
            if target.merged is not None:
                console.print(f"The page will have no base beside the answers. {error}", style="yellow", markup=False)
    task = TASKS["causal-lm"] if target.recipe is None else task_of(target.recipe)
    if task.has_reference and (base or target.adapter is None):
        alone = "the base alone (--base)" if base else target.what
        raise InputError(
            f"{run}: rewards are measured against the base with its adapter switched off, so {alone} has none. "
            "Evaluate the run (--with-base adds the base's answers), or ask with `qvera generate`."
        )
    section = _data_section(run, data, rows, target)
    sha256 = None if base else adapter_sha256(target)  # now: the run may go on while we score
    with progress(f"Loading {run}"):
        opened = open_target(target, adapter=not base)
    datasets = build_datasets(section, opened.base.tokenizer, console)
    examples = (datasets.train if data is not None else require_held_out_rows(datasets, target.name))[:rows]
    prompts = [] if no_generation else prompts_of(examples, group_prompts)
    require_positions(opened.model, lengths_of(examples))
    others = None if judging is None else judging.others(prompts)
    settings = target.recipe.training if target.recipe is not None else TrainingSection()
    answer_tokens = max_new_tokens or settings.sample_max_new_tokens
    task.prepare(opened.model, opened.base.tokenizer, datasets, settings)

    def score(
        model: PreTrainedModel | PeftModel, label: str, with_loss: bool = True
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        def held_out(say: Callable[[str], None]) -> dict[str, Any]:
            if not with_loss:
                return {}
            return task.held_out_loss(
                model,
                examples,
                datasets,
                settings,
                progress=lambda done: say(f"held-out loss, {done} of {len(examples)} rows"),
            )

        with progress(f"{label}scoring") as show:
            return score_model(
                model,
                opened.base.tokenizer,
                held_out,
                prompts,
                chosen,
                settings,
                max_new_tokens=answer_tokens,
                progress=lambda text: show(label + text),
            )

    scores, answers = score(opened.model, "")
    base_scores = None
    if with_base:
        if target.adapter is None:  # the base of an export is a model of its own; both need not be held
            opened.model = opened.base.model = None
            if target.recipe is not None:  # a task that was prepared scores the model that it was prepared with
                task = task_of(target.recipe)
            gc.collect()  # TRL's trainer and its model hold each other
            accelerator.empty_cache()
        with contextlib.ExitStack() as until_scored:
            with progress("Loading the base"):  # alone: rich before 14.1 shows one thing at a time
                model = until_scored.enter_context(base_of(opened))
            if target.adapter is None:
                task.prepare(model, opened.base.tokenizer, datasets, settings)
            base_scores, base_rows = score(model, "Base: ", with_loss=not task.has_reference)
        answers = [
            row | {"base_answer": of_base["answer"], "base_scores": of_base["scores"]}
            for row, of_base in zip(answers, base_rows, strict=True)
        ]
    about = _subject(target, section, base_alone=base, data=data)
    about |= {"inputs_sha256": inputs_sha256(answers), "max_new_tokens": answer_tokens, "adapter_sha256": sha256}
    document: dict[str, Any] = {
        "subject": about,
        "scores": scores,
        "base_scores": base_scores,
        "metrics": [
            {"name": m.name, "label": m.label, "signature": m.signature(), "lower_is_better": m.lower_is_better}
            for m in chosen
            if scores.get("scored_rows")
        ],
        "judge": None,
        "versions": memory.versions(),
        "answers": answers,
    }
    failure = None
    if judging is not None:
        decode = opened.base.tokenizer.decode
        questions = [decode(prompt.example.prompt_ids.tolist(), skip_special_tokens=True) for prompt in prompts]
        try:
            document["judge"] = judging.judge(answers, questions, others)
        except (InputError, RunFailed) as error:  # the answers are written all the same
            failure = error
    _write_and_print(document, f"{len(prompts)} answers", predictions, json_file, html)
    if failure is not None:
        raise failure


def _write_and_print(
    document: dict[str, Any], what: str, predictions: Path | None, json_file: Path | None, html: Path | None
) -> None:
    """Write the files that were asked for, and print the scores; ``what``: what the predictions are."""
    from qvera.cli.judge import summary_text
    from qvera.evaluation.report.pages import answers_page

    if predictions is not None:
        lines = (json.dumps(plain_json(answer), ensure_ascii=False) + "\n" for answer in document["answers"])
        replace_text(predictions, "".join(lines))
    if json_file is not None:
        replace_text(json_file, json.dumps(plain_json(document), indent=1, ensure_ascii=False))
    if html is not None:
        replace_text(html, answers_page(document))
    _print_scores(document)
    if document["judge"] is not None:
        print("\n".join(summary_text(document["judge"], document["subject"]["column"].lower())))
    for path, content in ((predictions, what), (json_file, "scores and answers"), (html, "the page")):
        if path is not None:
            print(f"{path}: {content}")


def _check_options(
    base: bool, with_base: bool, no_generation: bool, for_answers: dict[str, bool], *files: Path | None
) -> None:
    """Raise InputError if options contradict each other, or a file (JSON, predictions, page) exists.

    ``for_answers``: options that have no effect without answers, and whether each was given.
    """
    if base and with_base:
        raise InputError("--with-base: compares with the base, and --base asks for the base alone; drop one of them.")
    if no_generation and (given := [name for name, is_given in for_answers.items() if is_given]):
        raise InputError(f"{given[0]}: is for answers, and --no-generation asks for none; drop one of them.")
    written = [path for path in files if path is not None]
    for path in written:
        require_new_file(path)
    if len({path.absolute() for path in written}) < len(written):
        raise InputError(f"{written[0]}: --json, --predictions and --html need a file each.")


def _data_section(run: Path, data: str | None, rows: int | None, target: Artifact) -> DataSection:
    """Where the rows come from: the recipe's held-out rows, or all of a file that is read as the recipe's rows are."""
    from qvera.config.schema import DataSection
    from qvera.evaluation.load import template_of

    recipe = target.recipe
    if data is None:
        if recipe is None:
            raise InputError(
                f"{run}: {target.what} has no recipe that names held-out rows. Name a file with --data FILE, or the "
                "run (or recipe) that it belongs to with --recipe."
            )
        if not recipe.data.has_held_out_rows:
            raise InputError(f"{run}: its recipe holds out no rows; name a file with --data.")
        return recipe.data.replace(template=template_of(recipe, target.run))
    if recipe is None:
        return DataSection(path=data, limit=rows)
    return recipe.data.replace(
        path=data,
        config_name=None,  # of the recipe's own source, like its revision
        revision=None,
        template=template_of(recipe, target.run),
        adapter_column=None,
        adapter_files=False,
        mixture=[],
        sampling="rows",
        task_column=None,
        task_labels=None,
        task_count=None,
        task_steps=1,
        held_out_tasks=0,
        weight=1.0,
        eval_path=None,
        eval_split=None,
        rows_per_label=None,
        eval_fraction=0.0,
        limit=rows,
    )


def _subject(target: Artifact, section: DataSection, *, base_alone: bool, data: str | None) -> dict[str, Any]:
    """What was evaluated on what."""
    what = "the base alone" if base_alone else target.what
    column = "Adapter" if target.adapter is not None else "Export" if target.merged else "Model"
    held_out = section.held_out_path or f"{section.path}, {section.eval_fraction:.1%} held out by its seed"
    if section.eval_split is not None:
        held_out += f", split {section.eval_split}"
    return {
        "path": str(target.path),
        "what": what[0].upper() + what[1:],
        "column": "Base" if base_alone else column,
        "base": target.merged["base"]["path"] if target.merged else target.section.path,
        "data": data or held_out,
    }


def _print_scores(document: dict[str, Any]) -> None:
    """The scores, in two columns if the base was evaluated too."""
    from rich.console import Console
    from rich.table import Column, Table

    sides = {"base": document["base_scores"], document["subject"]["column"].lower(): document["scores"]}
    sides = {title: scores for title, scores in sides.items() if scores is not None}
    columns = [Column(title, justify="right") for title in sides]
    table = Table("", *columns, box=None, pad_edge=False, show_header=len(sides) > 1)
    for name in document["scores"]:
        cells = [scores.get(name, "") for scores in sides.values()]
        table.add_row(name, *(f"{c:.4f}" if isinstance(c, float) else f"{c:,}" if c != "" else c for c in cells))
    Console().print(table)
