"""The page of ``qvera eval``: scores of what was evaluated beside its base's, and every answer beside base and reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvera.evaluation.report.markup import document, esc, fact_list, section
from qvera.evaluation.report.read import score_key
from qvera.evaluation.report.samples import LEGEND, sample_article
from qvera.utils.atomic import replace_text
from qvera.utils.formatting import count, percent, significant

MOST_ROWS = 500
"""Rows on the page; all of them are in the predictions file."""

_LABELS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("Loss (nats a token)", lambda value: f"{value:.4f}"),
    "perplexity": ("Perplexity", lambda value: significant(value, 4)),
    "exact_match": ("Exact match", percent),
}


def write_answers(path: Path, evaluation: dict[str, Any]) -> None:
    """Write the page of an evaluation, as `answers_page` makes it, in one rename."""
    replace_text(path, answers_page(evaluation))


def answers_page(evaluation: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        evaluation: what ``qvera eval --json`` writes.

            - ``subject``: ``path``, ``what``, ``column``, ``base``, ``data``, ``max_new_tokens``
            - ``scores``, and ``base_scores`` (None where the base was not asked)
            - ``metrics``: for each its ``name``, ``label``, ``signature`` and ``lower_is_better``
            - ``answers``: the rows of the predictions file
            - ``versions``
    """
    subject, rows = evaluation["subject"], evaluation["answers"]
    name = Path(subject["path"]).resolve().name
    head = (
        f'<header>\n<p class="eyebrow">qvera eval <b>{esc(subject["path"])}</b></p>\n<h1>{esc(name)}</h1>\n'
        f'<p class="soft">{esc(subject["what"])} on {esc(subject["base"])}.</p>\n</header>\n'
    )
    facts = fact_list(
        [
            ("Rows from", esc(subject["data"])),
            ("Rows", count(evaluation["scores"]["rows"])),
            ("Tokens scored", count(evaluation["scores"]["trained_tokens"])),
            ("Prompts answered", count(len(rows)) if rows else ""),
            ("Tokens an answer, at most", count(subject["max_new_tokens"]) if rows else ""),
            *((esc(metric["label"]), esc(metric["signature"])) for metric in evaluation["metrics"]),
        ]
    )
    scores = _score_table(evaluation)
    body = (
        head
        + section("Scores", f'<div class="columns"><div>{scores}</div><div>{facts}</div></div>')
        + _rows(evaluation)
    )
    footer = f"Written by qvera {esc(evaluation['versions']['qvera'])}. Answers are greedy."
    return document(f"{name} · eval · qvera", body, footer)


def _score_table(evaluation: dict[str, Any]) -> str:
    scores, base = evaluation["scores"], evaluation["base_scores"]
    body = ""
    for key in ("loss", "perplexity", *(score_key(m["name"]) for m in evaluation["metrics"])):
        if key not in scores:
            continue
        label, say = _LABELS.get(key, ("", lambda value: significant(value, 4)))
        label = label or next(m["label"] for m in evaluation["metrics"] if m["name"] == key)
        first = "" if base is None else f"<td>{_said(base.get(key), say)}</td>"
        body += f'<tr><th scope="row">{esc(label)}</th>{first}<td><b>{_said(scores[key], say)}</b></td></tr>'
    columns = [evaluation["subject"]["column"]] if base is None else ["Base", evaluation["subject"]["column"]]
    titles = "".join(f'<th scope="col">{esc(column)}</th>' for column in columns)
    return f'<table><thead><tr><th scope="col">Held-out rows</th>{titles}</tr></thead><tbody>{body}</tbody></table>'


def _said(value: float | None, say: Callable[[float], str]) -> str:
    return "–" if value is None else esc(say(value))


def _rows(evaluation: dict[str, Any]) -> str:
    rows = evaluation["answers"]
    if not rows:
        return ""
    column = evaluation["subject"]["column"]
    articles = []
    for row in rows[:MOST_ROWS]:
        answers = [(column, row["answer"], _note(row["scores"], evaluation))]
        if "base_answer" in row:
            answers.insert(0, ("Base", row["base_answer"], _note(row["base_scores"], evaluation)))
        articles.append(sample_article(row["source"], row["prompt"], answers, row["references"]))
    more = f" The first {count(MOST_ROWS)} of {count(len(rows))} rows." if len(rows) > MOST_ROWS else ""
    legend = f'<p class="caption">{LEGEND}{esc(more)}</p>'
    return section("Answers", _better_and_worse(evaluation), legend, *articles)


def _note(scores: dict[str, float], evaluation: dict[str, Any]) -> str:
    """The row's own scores; exact match is said by the verdict already."""
    labels = {metric["name"]: metric["label"] for metric in evaluation["metrics"]}
    return " · ".join(f"{labels[name]} {significant(value)}" for name, value in scores.items() if name != "exact")


def _better_and_worse(evaluation: dict[str, Any]) -> str:
    """How many rows each metric finds better than the base's answer, and how many worse."""
    pairs = [(row["base_scores"], row["scores"]) for row in evaluation["answers"] if row.get("base_scores")]
    if not pairs:
        return ""
    body = ""
    for metric in evaluation["metrics"]:
        name, sign = metric["name"], -1 if metric["lower_is_better"] else 1
        moved = [sign * (after[name] - before[name]) for before, after in pairs]
        better, worse = sum(d > 1e-9 for d in moved), sum(d < -1e-9 for d in moved)
        cells = "".join(f"<td>{count(n)}</td>" for n in (better, len(moved) - better - worse, worse))
        body += f'<tr><th scope="row">{esc(metric["label"])}</th>{cells}</tr>'
    titles = "".join(f'<th scope="col">{title}</th>' for title in ("Better than base", "Same", "Worse"))
    return f'<table><thead><tr><th scope="col">Rows, by metric</th>{titles}</tr></thead><tbody>{body}</tbody></table>'
