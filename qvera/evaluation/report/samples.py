"""A prompt with answers side by side, each marked where it differs from its reference."""

from __future__ import annotations

from collections.abc import Sequence

from qvera.evaluation.report.markup import esc
from qvera.evaluation.report.word_diff import mark, same_answer
from qvera.utils.formatting import count

LEGEND = (
    "<mark>Marked</mark>: not in the reference; "
    '<mark class="gap"><span>▲</span></mark>: words of the reference are missing there.'
)
_LONG_PROMPT = 600
"""Characters; a longer prompt is folded."""


def sample_article(
    title: str, prompt: str, answers: Sequence[tuple[str, str, str]], references: Sequence[str], caption: str = ""
) -> str:
    """One prompt as HTML: its answers in columns, the references after them.

    Args:
        answers: (who gave it, the answer, what stands below it as text), in order.
        references: an answer is marked against the one that it has most in common with; without any, against the first answer.
        caption: beside the title, as text.
    """
    cells = []
    for number, (name, answer, note) in enumerate(answers):
        equal = [reference for reference in references if same_answer(answer, reference)]
        against = _nearest(answer, references) if references else (answers[0][1] if number else "")
        kind = "right" if equal else "wrong"
        verdict = f'<span class="{kind}">{_verdict(answer, references, equal)}</span>'
        shown = _marked(answer, against) if against and not equal else esc(answer)
        below = f'<p class="caption num">{esc(note)}</p>' if note else ""
        cells.append(f'<div><h3>{esc(name)} {verdict}</h3><pre dir="auto">{shown}</pre>{below}</div>')
    if references:
        texts = "".join(f'<pre dir="auto">{esc(reference)}</pre>' for reference in references)
        cells.append(f"<div><h3>Reference{'s' if len(references) > 1 else ''}</h3>{texts}</div>")
    shown = f'<pre class="prompt" dir="auto">{esc(prompt)}</pre>'
    if len(prompt) > _LONG_PROMPT:
        # the end of a prompt is what differs from row to row
        shown = (
            f'<pre class="prompt" dir="auto">… {esc(prompt[-_LONG_PROMPT // 2 :])}</pre>'
            f"<details><summary>The whole prompt, {count(len(prompt))} characters</summary>{shown}</details>"
        )
    beside = f' <span class="caption">{esc(caption)}</span>' if caption else ""
    head = f"<h3>{esc(title)}{beside}</h3>"
    return f'<article class="sample">{head}{shown}<div class="answers">{"".join(cells)}</div></article>\n'


def _nearest(answer: str, references: Sequence[str]) -> str:
    """The reference that shares the most words with an answer."""
    if len(references) == 1:
        return references[0]
    said = set(answer.split())
    return max(references, key=lambda text: len(said & set(text.split())) / (len(said | set(text.split())) or 1))


def _verdict(answer: str, references: Sequence[str], equal: Sequence[str]) -> str:
    if not answer.strip():
        return "· empty"
    if not references:
        return ""
    if not equal:
        return "· differs"
    which = "the reference" if len(references) == 1 else "a reference"
    same = any(answer.strip() == reference.strip() for reference in equal)
    return f"· equals {which}" if same else f"· same JSON as {which}"


def _marked(answer: str, other: str) -> str:
    html = []
    for piece in mark(answer, other):
        if piece.missing and not piece.text:
            lacks = esc(piece.missing.strip())
            if lacks:
                html.append(
                    f'<mark class="gap" title="missing: {lacks}"><span aria-hidden="true">▲</span>'
                    f'<span class="aloud">(missing: {lacks})</span></mark>'
                )
        elif piece.differs and piece.text.strip():
            html.append(f"<mark>{esc(piece.text)}</mark>")
        else:
            html.append(esc(piece.text))
    return "".join(html)
