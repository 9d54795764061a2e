"""Evaluate a run, an adapter or an export on rows: held-out loss, answers and their scores, or labels."""

import contextlib
import gc
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel

from qvera.config import plugins
from qvera.config.sections import DataSection
from qvera.data import Datasets, Rows, build_datasets, lengths_of
from qvera.data.conversations import FORMATS, LABELLED
from qvera.data.detect import MissingColumn, UnknownFormat
from qvera.data.images import thumbnail_uris
from qvera.data.readers import local_files
from qvera.data.source import hub_datasets, raw_rows, survey
from qvera.evaluation.held_out import longer_references, prompts_of, score_model, scoring
from qvera.evaluation.judge import Judge
from qvera.evaluation.load import (
    Artifact,
    OpenRun,
    adapter_sha256,
    base_of,
    open_target,
    require_comparable,
    template_name,
    warn_of_other_rows,
)
from qvera.evaluation.metrics import require_scorers, text_metrics
from qvera.evaluation.named_adapters import require_held_out_rows, rows_of
from qvera.evaluation.report.pages import MAX_ROWS
from qvera.evaluation.report.read import inputs_sha256
from qvera.models.structure import require_positions
from qvera.tasks import CausalLM, classification_of, task_of
from qvera.tasks.classification import label_scores, predictions
from qvera.utils import accelerator
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError, QveraError
from qvera.utils.files import RECIPE_FILE, versions
from qvera.utils.progress import Phase, warn

TITLES = {
    "accuracy": "Accuracy",
    "top5": "Top 5",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
"""A classifier's score → its name for people."""


def evaluate(
    target: Artifact,
    rows: str | None = None,
    *,
    called: str | None = None,
    limit: int | None = None,
    base_alone: bool = False,
    with_base: bool = False,
    metrics: Sequence[str] = ("exact",),
    group_prompts: bool = False,
    answers: bool = True,
    max_new_tokens: int | None = None,
    judge: Judge | None = None,
    opened: Callable[[], OpenRun] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate a model and return the document of ``qvera eval --json``: ``subject``, ``scores``, ``answers``, ..

    Args:
        rows: a file of rows, read as the recipe's are. None: the held-out rows of its recipe.
        called: what messages and the document call it; None: by its name.
        base_alone: evaluate the base without the adapter.
        with_base: evaluate the base too.
        metrics: compare answers with references (`qvera.evaluation.metrics`).
        group_prompts: join rows with the same prompt into one with all their references.
        answers: whether to answer prompts; False: only the loss is computed.
        max_new_tokens: the limit of an answer; None: the recipe's.
        judge: compares answers. Where it fails or is stopped, ``judge_error`` has its error, so that no answers are
            lost.
        opened: returns the model, which may be loaded already.

    Raises:
        InputError: there are no rows, there is no base to compare with, or a package that a metric needs is missing.
    """
    console, called = console or Console(stderr=True), called or rows
    is_classifier = target.model_class.has_own_head
    if target.recipe is not None and is_classifier == (target.recipe.task == CausalLM.name):
        what = "a classifier" if is_classifier else "a model that writes text"
        raise InputError(
            f"{target.path}: is {what}, and the recipe's task is {target.recipe.task}. Name one of its task."
        )
    if is_classifier:
        for option, is_given in (("--base", base_alone), ("--with-base", with_base)):
            if is_given:
                raise InputError(
                    f"{option}: {target.path} is a classifier, and its base has no head that was trained for these "
                    "labels. Leave it out; run.json has the scores from before training."
                )
        return _evaluate_labels(target, rows, called, limit, opened, console)
    chosen = text_metrics(metrics) if answers else []
    if base_alone or with_base:
        require_comparable(target)
    task = CausalLM() if target.recipe is None else task_of(target.recipe)
    if task.has_reference and (base_alone or target.adapter is None):
        alone = "the base alone (--base)" if base_alone else target.what
        raise InputError(
            f"{target.path}: rewards are measured against the base with its adapter switched off, so {alone} has none. "
            "Evaluate the run (--with-base adds the base's answers), or ask with `qvera generate`."
        )
    section = _data_section(target, rows, limit, {})
    sha256 = None if base_alone else adapter_sha256(target)  # now: the run may go on while we score
    model = _open(target, opened, console, adapter=not base_alone)
    datasets = build_datasets(section, model.base.tokenizer, console)
    examples = _rows_to_score(target, called, datasets, model, console)[:limit]
    prompts = prompts_of(examples, group_prompts) if answers else []
    require_positions(model.model, lengths_of(examples))
    others = None if judge is None else judge.others(prompts)
    answer_tokens = max_new_tokens or task.training.sample_max_new_tokens
    asked = (prompt.example for prompt in prompts if prompt.references)
    if (note := longer_references(asked, answer_tokens, "--max-new-tokens")) is not None:
        warn(console, note)
    task.prepare(model.model, model.base.tokenizer, datasets)

    def score(
        scored: PreTrainedModel | PeftModel, label: str, with_loss: bool = True
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        def held_out() -> dict[str, Any]:
            return task.held_out_loss(scored, examples, progress=show) if with_loss else {}

        with Phase(console, f"held-out loss of {label}", len(examples)) as show:
            return score_model(
                scored,
                model.base.tokenizer,
                held_out,
                prompts,
                chosen,
                task.training,
                max_new_tokens=answer_tokens,
                progress=lambda done: show(done, len(prompts), f"answering {len(prompts)} prompts with {label}"),
            )

    scores, answered = score(model.model, "the base" if base_alone else str(target.path))
    for row, (example, _) in zip(answered[:MAX_ROWS], prompts, strict=False):
        if example.images:
            row["images"] = thumbnail_uris(example.images)
    base_scores = None
    if with_base:
        if target.adapter is None:  # the base of an export is a model of its own: let the export go before it comes
            model.model = model.base.model = None
            if target.recipe is not None:  # a task that was prepared scores the model that it was prepared with
                task = task_of(target.recipe)
            gc.collect()  # TRL's trainer and its model hold each other
            accelerator.empty_cache()
        with contextlib.ExitStack() as until_scored:
            with Phase(console, "loading the base"):
                base = until_scored.enter_context(base_of(model))
            if target.adapter is None:
                task.prepare(base, model.base.tokenizer, datasets)
            base_scores, base_rows = score(base, "the base", with_loss=not task.has_reference)
        answered = [
            row | {"base_answer": of_base["answer"], "base_scores": of_base["scores"]}
            for row, of_base in zip(answered, base_rows, strict=True)
        ]
    about = _subject(target, section, base_alone, called)
    about |= {"inputs_sha256": inputs_sha256(answered), "max_new_tokens": answer_tokens, "adapter_sha256": sha256}
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
        "versions": versions(),
        "answers": answered,
    }
    if judge is not None:  # after all else is in the document, which an error of the judge's must not lose
        decode = model.base.tokenizer.decode
        questions = [decode(prompt.example.prompt_ids.tolist(), skip_special_tokens=True) for prompt in prompts]
        try:
            with Phase(console, "judging") as show:
                document["judge"] = judge.judge(answered, questions, others, show)
        except (QveraError, KeyboardInterrupt) as error:
            document["judge_error"] = error
    return document


def _open(target: Artifact, opened: Callable[[], OpenRun] | None, console: Console, *, adapter: bool = True) -> OpenRun:
    if opened is not None:
        return opened()
    with Phase(console, f"loading {target.path}"):
        return open_target(target, adapter=adapter)


def _rows_to_score(target: Artifact, rows: str | None, datasets: Datasets, model: OpenRun, console: Console) -> Rows:
    """Return the rows of a file (``rows``), or the recipe's held-out rows; warn of those that the run was trained on.

    Of a file that names adapters in the recipe's column, those of ``target`` alone.
    """
    if rows is None:
        warn_of_other_rows(target, datasets, console)
        return require_held_out_rows(datasets, target.name)
    found = datasets.train
    if datasets.adapters:
        (found, _), name = rows_of(datasets, target.name), shown_name(str(target.name))
        if not found:
            raise InputError(f"{rows}: none of its rows names adapter {name}.")
        if len(found) < len(datasets.train):
            warn(console, f"{rows}: {len(found):,} of its {len(datasets.train):,} rows are of adapter {name}.")
    is_trained = target.merged is not None or model.model is not model.base.model
    if is_trained and target.recipe is not None and target.run is not None:
        with contextlib.suppress(QveraError):  # rows that are gone can't be compared
            if not hub_datasets(target.recipe.data):
                labels = model.labels if target.model_class.has_own_head else None
                data = build_datasets(target.recipe.data, model.base.tokenizer, console, labels=labels)
                trained, _ = rows_of(data, target.name or "")  # an adapter without a name is none of the data's
                if count := int(np.isin(found.ids_hash, trained.ids_hash, kind="sort").sum()):
                    text = f"the run was trained on {count:,} of these {len(found):,} rows. Scores will flatter."
                    warn(console, f"{rows}: {text}")
    return found


def _evaluate_labels(
    target: Artifact,
    rows: str | None,
    called: str | None,
    limit: int | None,
    opened: Callable[[], OpenRun] | None,
    console: Console,
) -> dict[str, Any]:
    """Score a classifier. The document's ``answers`` are its predictions."""
    task = classification_of(target.model_class, target.recipe)
    require_scorers(task.name)
    section = _data_section(target, rows, limit, {"format": task.row_format})
    has_labels = section.columns.get("label") != ""
    about = _subject(target, section, False, called)
    sha256 = adapter_sha256(target)
    model = _open(target, opened, console)
    labels = model.labels
    datasets = build_datasets(section, model.base.tokenizer, console, labels=labels)
    examples = _rows_to_score(target, called, datasets, model, console)[:limit]
    require_positions(model.model, lengths_of(examples))
    task.prepare(model.model, model.base.tokenizer, datasets)
    with Phase(console, "scoring", len(examples)) as show, scoring(model.model):
        logits = task.held_out_logits(model.model, examples, progress=show)
    scores: dict[str, Any] = {"rows": len(examples)}
    if has_labels:
        scores = {**label_scores(logits, examples, labels), "scored_rows": len(examples)}
        del scores["trained_tokens"]
    else:
        text = (
            f"{called}: has no labels, so its rows are labelled, and not scored. --predictions FILE writes the labels."
        )
        warn(console, text)
    package = "scipy" if labels.is_regression else "scikit-learn"
    signature = f"{package} {metadata.version(package)}"
    inputs = [{"prompt": row.prompt_text, "references": [row.reference]} for row in examples]
    return {
        "subject": {**about, "inputs_sha256": inputs_sha256(inputs), "adapter_sha256": sha256},
        "scores": scores,
        "metrics": [
            {"name": name, "label": title, "signature": signature, "lower_is_better": False}
            | ({"of": labels.names[1]} if name == "f1" and len(labels.names) == 2 else {})
            for name, title in TITLES.items()
            if name in scores
        ],
        "answers": predictions(logits, examples, labels),
        "base_scores": None,
        "judge": None,
        "versions": versions(),
    }


def _data_section(target: Artifact, data: str | None, rows: int | None, without_recipe: dict[str, Any]) -> DataSection:
    """Return the section that reads the recipe's held-out rows, or all rows of a file in the same way.

    ``without_recipe``: the keys for an adapter alone, which has no recipe. A file is read here, so that wrong columns
    are an error before weights are loaded.
    """
    recipe = target.recipe
    if data is None:
        if recipe is None:
            gone = ""
            if target.merged is not None:
                place = target.merged["adapter"]["path"]
                gone = (
                    f" Its adapter is no longer that of a run at {place}: moved, or trained further since, or its "
                    "recipe can't be read."
                )
            raise InputError(
                f"{target.path}: {target.what} has no recipe that names held-out rows.{gone} Name a file with "
                "--data FILE, or the run (or recipe) that it belongs to with --recipe."
            )
        if not recipe.data.has_held_out_rows:
            raise InputError(f"{target.path}: its recipe holds out no rows; name a file with --data.")
        try:
            hub_datasets(recipe.data)  # before the model is loaded
        except InputError as error:
            where = "" if target.run is None else f"data of {target.run / RECIPE_FILE}: "
            raise InputError(f"{where}{error} Or name other rows with --data FILE.") from None
        return recipe.data.replace(template=template_name(recipe, target.run))
    if recipe is None:
        section = DataSection(path=data, limit=rows, **without_recipe)
    else:
        section = recipe.data.replace(
            path=data,
            config_name=None,  # of the recipe's own source, like its revision and its split
            revision=None,
            split=recipe.data.split if local_files(data) is None else DataSection.model_fields["split"].default,
            template=template_name(recipe, target.run),
            adapter_column=None,
            adapter_files=False,
            mixture=[],
            **plugins.added_keys(recipe.data),
            weight=1.0,
            eval_path=None,
            eval_split=None,
            rows_per_label=None,
            eval_fraction=0.0,
            limit=rows,
        )
    if section.format in LABELLED and _lacks_labels(section):
        section = section.replace(columns={**section.columns, "label": ""})
    column = None if recipe is None or target.name is None else recipe.data.adapter_column
    if column is not None and column in next(raw_rows(section)).fields:
        section = section.replace(adapter_column=column, limit=None)  # rows of other adapters don't count
    try:
        try:
            survey(section)
        except MissingColumn:  # the file may have other columns, or another format, than the rows that trained
            found = next(raw_rows(section)).fields
            section = section.replace(
                columns={name: own for name, own in section.columns.items() if own in ("", *found)}
            )
            if section.format == "auto" or FORMATS[section.format].trains in ("answers", "texts"):
                section = section.replace(format="auto")
            survey(section)
    except (MissingColumn, UnknownFormat) as error:
        raise InputError(
            f"{error} Rename them in the rows, or name them in a copy of the recipe: --recipe FILE."
        ) from None
    return section


def _lacks_labels(section: DataSection) -> bool:
    """Return whether the first row has no column of labels. Readers refuse what holds no rows."""
    names = [section.columns["label"]] if "label" in section.columns else ["label", "labels"]
    return next(raw_rows(section)).fields.keys().isdisjoint(names)


def _subject(target: Artifact, section: DataSection, base_alone: bool, data: str | None) -> dict[str, Any]:
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
