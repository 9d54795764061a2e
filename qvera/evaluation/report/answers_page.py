"""The page of ``qvera eval``: scores beside those of the base, and every answer beside base and references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvera.evaluation.report.answer_diff import Sample, make_sample
from qvera.evaluation.report.page import render
from qvera.evaluation.report.read import score_key
from qvera.utils.atomic import replace_text
from qvera.utils.formatting import count, percent, significant, text_or_dash

MAX_ROWS = 500
"""Rows on the page; all of them are in the predictions file."""

_LABELS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("Loss (nats a token)", "{:.4f}".format),
    "perplexity": ("Perplexity", lambda value: significant(value, 4)),
    "exact_match": ("Exact match", percent),
}


def write_answers(path: Path, evaluation: dict[str, Any]) -> None:
    """Write the page of an evaluation in one rename."""
    replace_text(path, answers_page(evaluation))


def answers_page(evaluation: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        evaluation: What ``qvera eval --json`` writes.

            - ``subject``: ``path``, ``what``, ``column``, ``base``, ``data``, ``max_new_tokens``
            - ``scores``, and ``base_scores`` (None where the base was not evaluated)
            - ``metrics``: for each its ``name``, ``label``, ``signature`` and ``lower_is_better``
            - ``answers``: the rows of the predictions file
            - ``versions``
    """
    about, rows = evaluation["subject"], evaluation["answers"]
    facts = [
        ("Rows from", about["data"]),
        ("Rows", count(evaluation["scores"]["rows"])),
        ("Tokens scored", count(evaluation["scores"]["trained_tokens"])),
        ("Prompts answered", count(len(rows)) if rows else ""),
        ("Tokens an answer, at most", count(about["max_new_tokens"]) if rows else ""),
        *((metric["label"], metric["signature"]) for metric in evaluation["metrics"]),
    ]
    return render(
        "answers.html",
        about=about,
        name=Path(about["path"]).resolve().name,
        facts=facts,
        scores=_scores(evaluation),
        with_base=evaluation["base_scores"] is not None,
        changes=_changes(evaluation),
        samples=[_sample(row, evaluation) for row in rows[:MAX_ROWS]],
        rows=len(rows),
        version=evaluation["versions"]["qvera"],
    )


def _scores(evaluation: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Rows of the table of scores: the base's, where it was evaluated, before the model's."""
    columns = [scores for scores in (evaluation["base_scores"], evaluation["scores"]) if scores is not None]
    labels = {score_key(metric["name"]): metric["label"] for metric in evaluation["metrics"]}
    table = []
    for key in ("loss", "perplexity", *labels):
        if key in evaluation["scores"]:
            label, text = _LABELS.get(key, (labels.get(key, key), lambda value: significant(value, 4)))
            table.append((label, [text_or_dash(scores.get(key), text) for scores in columns]))
    return table


def _sample(row: dict[str, Any], evaluation: dict[str, Any]) -> Sample:
    answers = [(evaluation["subject"]["column"], row["answer"], _note(row["scores"], evaluation))]
    if "base_answer" in row:
        answers.insert(0, ("Base", row["base_answer"], _note(row["base_scores"], evaluation)))
    return make_sample(row["source"], row["prompt"], answers, row["references"])


def _note(scores: dict[str, float], evaluation: dict[str, Any]) -> str:
    """The scores of one answer, without exact match, which the verdict says already."""
    labels = {metric["name"]: metric["label"] for metric in evaluation["metrics"]}
    return " · ".join(f"{labels[name]} {significant(value)}" for name, value in scores.items() if name != "exact")


def _changes(evaluation: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """How many rows each metric finds better than the base's answer, the same, and worse."""
    pairs = [(row["base_scores"], row["scores"]) for row in evaluation["answers"] if row.get("base_scores")]
    table = []
    for metric in evaluation["metrics"] if pairs else ():
        name, sign = metric["name"], -1 if metric["lower_is_better"] else 1
        gains = [sign * (after[name] - before[name]) for before, after in pairs]
        better, worse = sum(gain > 1e-9 for gain in gains), sum(gain < -1e-9 for gain in gains)
        table.append((metric["label"], [count(number) for number in (better, len(gains) - better - worse, worse)]))
    return table
