"""What ``qvera eval`` found of several runs, side by side: its part of ``qvera compare``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qvera.evaluation.report.read import Evaluation
from qvera.utils.formatting import count, percent, significant

Column = tuple[str, str, Callable[[float], str]]
"""Key of the facts, title, and how a value is said."""


def score_columns(evaluations: Sequence[Evaluation | None]) -> tuple[Column, ...]:
    """The number of rows and each metric that a run was scored by; none where no run was."""
    labels = {key: label for each in evaluations[::-1] if each is not None for key, label in each.labels.items()}
    keys = dict.fromkeys(key for each in evaluations if each is not None for key in each.scores)
    if not keys:
        return ()
    return ("scored_rows", "Rows", count), *((key, labels[key], _say(key)) for key in keys)


def _say(key: str) -> Callable[[float], str]:
    return percent if key == "exact_match" else lambda value: significant(value, 4)


def score_facts(evaluations: Sequence[Evaluation | None]) -> list[dict[str, float | None]]:
    """For each run the values of `score_columns`; None where it has none."""
    keys = [key for key, _, _ in score_columns(evaluations)]
    told: list[dict[str, float | None]] = [
        {} if each is None else {**each.scores, "scored_rows": each.scored_rows} for each in evaluations
    ]
    return [{key: facts.get(key) for key in keys} for facts in told]


def score_gaps(labels: Sequence[str], evaluations: Sequence[Evaluation | None]) -> list[str]:
    """Sentences on scores that are not of the same inputs, or not made in the same way."""
    known = [(label, each) for label, each in zip(labels, evaluations, strict=True) if each is not None]
    if len(known) < 2:
        return []
    gaps = []
    if len({each.inputs_sha256 or label for label, each in known}) > 1:
        told = "; ".join(f"{label}: {_inputs(each)}" for label, each in known)
        gaps.append(
            f"The runs' eval.json are not of the same inputs ({told}): other rows, another template or other references."
        )
    ways = {
        "did not ask the same kind of model": [(label, each.column) for label, each in known],
        "did not let answers have the same length": [
            (label, f"{each.max_new_tokens or 0:,.0f} tokens") for label, each in known
        ],
    }
    for key, title, _ in score_columns(evaluations)[1:]:
        ways[f"did not measure {title} in the same way"] = [
            (label, each.signatures[key] or "does not say") for label, each in known if key in each.scores
        ]
    for what, found in ways.items():
        if len({way for _, way in found}) > 1:
            gaps.append(f"The runs' eval.json {what} ({'; '.join(f'{label}: {way}' for label, way in found)}).")
    return gaps


def _inputs(evaluation: Evaluation) -> str:
    rows = "" if evaluation.scored_rows is None else f"{evaluation.scored_rows:,.0f} rows of "
    return f"{rows}{evaluation.data or 'unknown data'}, SHA-256 {evaluation.inputs_sha256 or 'unknown'}"
