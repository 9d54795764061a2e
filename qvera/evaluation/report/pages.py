"""The HTML pages: `render` for the templates, and what each page shows (for a run see `run_page`)."""

import base64
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from qvera.data import DataStats, Example
from qvera.data.images import thumbnail_uris
from qvera.evaluation.metrics import exact_match
from qvera.evaluation.report.charts import Chart, Line, length_chart, line_chart, loss_curves
from qvera.evaluation.report.compare import (
    COSTS,
    SCORES,
    Comparison,
    plain_yaml,
    score_columns,
    score_format,
    table,
    tokens_by_step,
)
from qvera.evaluation.report.read import get, get_number, get_text, score_key, series
from qvera.utils.formatting import count, duration, moment, percent, significant, size, text_or_dash

Sample = dict[str, Any]
"""A prompt with its answers and references; answers are cut where they differ from the nearest reference."""

MAX_ROWS = 500  # rows on the page of an evaluation; the predictions file has all

_HERE = Path(__file__).parent
_TOKENS = re.compile(r"\w+|\s+|[^\w\s]")
_MAX_TOKENS = 2_000  # longer answers are shown without marks, because matching is quadratic
_MIN_RATIO = 0.35  # texts with less in common than this are shown without marks, which would cover everything
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@functools.cache
def environment() -> Environment:
    """The templates, with autoescape on."""
    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    templates.globals |= {function.__name__: function for function in (get, get_number, get_text)}
    templates.globals |= {
        "newline": "\n",  # browsers drop the first one of a <pre>, which else would be the text's own
        "style": Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    formats: tuple[Callable[..., str], ...] = (count, duration, percent, significant, size)
    for text in formats:  # "" for a value that is not known
        templates.filters[text.__name__] = lambda value, *more, text=text: "" if value is None else text(value, *more)
    templates.filters |= {"moment": moment, "yaml": plain_yaml}
    templates.filters["code_spans"] = lambda text: Markup(
        re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))  # text between backticks is code
    )
    return templates


def render(template: str | Path, **context: object) -> str:
    """A whole page, from a template here (by name) or a plug-in's own file.

    Control characters and surrogates, which HTML can't hold, become U+FFFD.
    """
    if isinstance(template, Path):
        found = environment().from_string(template.read_text(encoding="utf-8"))
    else:
        found = environment().get_template(template)
    return _UNPRINTABLE.sub("\ufffd", found.render(context))


def answers_page(evaluation: dict[str, Any]) -> str:
    """The page of ``qvera eval``; ``evaluation`` is what ``--json`` writes."""
    metrics, rows = evaluation["metrics"], evaluation["answers"]
    names = {metric["name"]: metric["label"] for metric in metrics}
    unit = " (nats a token)" if "perplexity" in evaluation["scores"] else ""
    labels = {"loss": f"Loss{unit}", "perplexity": "Perplexity"}
    labels |= {"reward": "Reward", "rewards/margins": "Reward margin", "rewards/accuracies": "Reward accuracy"}
    labels |= {score_key(name): label for name, label in names.items()}
    columns = [scores for scores in (evaluation["base_scores"], evaluation["scores"]) if scores is not None]

    def note(scores: dict[str, float]) -> str:
        """The scores of one answer, without exact match, which the verdict says already."""
        return " · ".join(f"{names[name]} {significant(value)}" for name, value in scores.items() if name != "exact")

    samples = []
    for row in rows[:MAX_ROWS]:
        notes = [note(row["scores"])]
        if judged := row.get("judge"):  # its outcome, and its scores beside the other answer's in both orders
            both = ", ".join(f"{mine:g} to {other:g}" for mine, other in filter(None, judged["scores"]))
            notes.append(f"judge: {judged['outcome']}" + (f" ({both})" if both else ""))
        answers = [(evaluation["subject"]["column"], row["answer"], " · ".join(filter(None, notes)))]
        if "base_answer" in row:
            answers.insert(0, ("Base", row["base_answer"], note(row["base_scores"])))
        samples.append(make_sample(row["source"], row["prompt"], answers, row["references"], row.get("images", ())))
    changes = []  # for each metric, how many rows are better than the base's answer, the same, and worse
    pairs = [(row["base_scores"], row["scores"]) for row in rows if row.get("base_scores")]
    for metric in metrics if pairs else ():
        name, sign = metric["name"], -1 if metric["lower_is_better"] else 1
        gains = [sign * (after[name] - before[name]) for before, after in pairs]
        better, worse = sum(gain > 1e-9 for gain in gains), sum(gain < -1e-9 for gain in gains)
        changes.append((metric["label"], [count(number) for number in (better, len(gains) - better - worse, worse)]))
    return render(
        "answers.html",
        evaluation=evaluation,
        name=Path(evaluation["subject"]["path"]).resolve().name,
        scores=[
            (label, [text_or_dash(column.get(key), score_format(key)) for column in columns])
            for key, label in labels.items()
            if key in evaluation["scores"]
        ],
        judge=evaluation.get("judge"),
        signatures=[(metric["label"], metric["signature"]) for metric in metrics],
        changes=changes,
        samples=samples,
    )


def compare_page(comparison: Comparison, **more: object) -> str:
    """The page of ``qvera compare``. ``more`` is for the template."""
    tables = {
        "Scores on held-out rows": table(SCORES, comparison.figures),
        "Scores by qvera eval": table(score_columns(comparison.runs), comparison.score_figures),
        "Cost": table(COSTS, comparison.figures),
    }
    charts = [_loss_chart(comparison, held_out, unit) for unit in ("step", "token") for held_out in (True, False)]
    return render("compare.html", comparison=comparison, tables=tables, charts=charts, **more)


def _loss_chart(comparison: Comparison, held_out: bool, unit: str) -> Chart | None:
    """Losses of all runs over steps, or over tokens seen."""
    lines = []
    for colour, (label, run) in enumerate(comparison.runs.items(), start=1):
        points = run.held_out() if held_out else loss_curves(series(run.train, "loss"))[1]
        if unit == "token":  # without steps that metrics.jsonl does not know
            steps, tokens = zip((0.0, 0.0), *tokens_by_step(run), strict=True)
            points = [(float(np.interp(step, steps, tokens)), value) for step, value in points if step <= steps[-1]]
        line = Line(label, points, "held-out" if held_out else "main", colour=colour)
        if line.values:
            lines.append(line)
    title, ending = ("Held-out loss", "") if held_out else ("Training loss", ", smoothed")
    note = f"nats a token, by {'step' if unit == 'step' else 'tokens seen'}{ending}"
    return line_chart(title, lines, note=note, height=200, may_be_log=True, x_name=unit)


def preview_page(
    title: str,
    source: str,
    stats: DataStats,
    warnings: Sequence[str],
    rows: Sequence[Example],
    decode: Callable[[Sequence[int]], str],
) -> str:
    """The page of ``qvera preview``: counts, lengths, and ``rows`` token by token with the trained ones marked.

    ``warnings`` are a sentence each. ``decode`` keeps special tokens.
    """

    def shown(word: str, row: Example) -> tuple[str, int, str, list[tuple[str, bool]], list[str]]:
        source = row.source if word == "trained" else f"{row.source}, {word}"
        targets = f"label: {row.reference}" if row.is_labelled else f"{count(int(row.trained.sum()))} trained"
        stretches = [] if row.images and row.is_labelled else row.stretches()
        text = [(decode(ids), trained) for ids, trained in stretches]
        return source, len(row.input_ids), targets, text, thumbnail_uris(row.images)

    mixture = [
        (each.path, f"{count(each.taken)} ({count(each.rows)} rows, weight {each.weight:g}). {each.layout}")
        for each in stats.sources
    ]
    return render(
        "preview.html",
        title=title,
        source=source,
        stats=stats,
        mixture=mixture if len(mixture) > 1 else [],
        warnings=warnings,
        lengths=length_chart(stats.histogram_edges, stats.histogram_counts),
        rows=[shown(word, row) for one in rows for word, row in one.previewed()],
    )


class DiffSpan(NamedTuple):
    """A part of an answer ("" where words are missing), and what the other text has in its place."""

    text: str
    differs: bool = False
    missing: str = ""


def make_sample(
    title: str,
    prompt: str,
    answers: Sequence[tuple[str, str, str]],
    references: Sequence[str],
    images: Sequence[str] = (),
) -> Sample:
    """Compare the answers (who, answer, note) to one prompt, for the macro `sample` of templates/parts.html.

    Each is compared with the reference that shares the most words with it, or without any with the first answer.
    ``images`` are data URIs.
    """
    shown = []
    for name, answer, note in answers:
        equal = [reference for reference in references if exact_match(answer, reference)]
        nearest = max(references, key=lambda reference: _shared_words(answer, reference), default=answers[0][1])
        spans = [DiffSpan(answer)] if equal else word_diff(answer, nearest)
        verdict = "differs" if references else ""
        if not answer.strip():
            verdict = "empty"
        elif equal:
            which = "the reference" if len(references) == 1 else "a reference"
            same = any(answer.split() == reference.split() for reference in equal)
            verdict = f"equals {which}" if same else f"same JSON as {which}"
        shown.append({"name": name, "spans": spans, "equal": bool(equal), "verdict": verdict, "note": note})
    return {"title": title, "prompt": prompt, "answers": shown, "references": references, "images": images}


def _shared_words(answer: str, reference: str) -> float:
    words, others = set(answer.split()), set(reference.split())
    return len(words & others) / (len(words | others) or 1)


def word_diff(answer: str, other: str) -> list[DiffSpan]:
    """Cut ``answer`` into spans that ``other`` has and has not; one span if the texts have little in common."""
    left, right = _TOKENS.findall(answer), _TOKENS.findall(other)
    plain = [DiffSpan(answer)]
    if not left or not right or max(len(left), len(right)) > _MAX_TOKENS:
        return plain
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    if matcher.ratio() < _MIN_RATIO:
        return plain
    return [
        DiffSpan("".join(left[i:j]), tag in ("replace", "delete"), "" if tag == "equal" else "".join(right[k:m]))
        for tag, i, j, k, m in matcher.get_opcodes()
    ]
