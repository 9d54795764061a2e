"""The scores on a model card: those of the run, those of `qvera eval`, and those of an export beside its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvera.exporting.compare import rows_name
from qvera.models.hub import is_hub_id
from qvera.utils import formatting
from qvera.utils.files import try_read_json

_NO_SCORES = ("rows", "trained_tokens", "seconds", "scored_rows", "references", "tokens")
_METRICS = {
    "exact_match": "exact_match",
    "bleu": "bleu",
    "accuracy": "accuracy",
    "f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
"""Our name of a score → the hub's name of the metric."""

Scores = Mapping[str, Any]


def read_evaluation(file: Path, adapter_sha256: str | None) -> dict[str, Any]:
    """What ``qvera eval RUN --json`` wrote of this adapter; {} where the file is missing or of anything else."""
    tree = try_read_json(file) or {}
    about = tree.get("subject")
    if not isinstance(about, dict) or not isinstance(tree.get("scores"), dict) or adapter_sha256 is None:
        return {}
    return tree if (about.get("column"), about.get("adapter_sha256")) == ("Adapter", adapter_sha256) else {}


def metrics_of(*measured: Scores) -> list[str]:
    """The hub's names of what was measured."""
    found = {
        _METRICS[key] for scores in measured for key, value in scores.items() if key in _METRICS and is_number(value)
    }
    return sorted(found)


def scores_text(
    before: Scores, after: Scores, evaluation: Mapping[str, Any], difference: Mapping[str, Any], is_export: bool
) -> str:
    """The section of a card; "" where nothing was measured.

    Args:
        before, after: scores of held-out rows before and after training, as run.json has them.
        evaluation: what `read_evaluation` gave.
        difference: of an export's certificate.
        is_export: the card is of an export, and the other scores are of the adapter that it was made from.
    """
    of_run = " They are those of the adapter before it was exported." if is_export else ""
    parts = [_table(f"{_on(after, 'held-out rows')}.{of_run}", {"before training": before, "after": after})]
    if evaluation:
        scores, of_base = evaluation["scores"], evaluation.get("base_scores")
        sides = {"base": of_base, "trained": scores} if isinstance(of_base, dict) else {"trained": scores}
        where = _source(str(evaluation["subject"].get("data") or ""))
        parts.append(_table(f"{_on(scores, 'rows')}{where}, by `qvera eval`.{of_run}", sides))
    trained, exported = difference.get("trained"), difference.get("exported")
    if "loss_trained" in difference:
        trained, exported = ({"loss": difference[f"loss_{side}"]} for side in ("trained", "exported"))
    if isinstance(trained, dict) and isinstance(exported, dict):
        rows = difference if "rows" in difference else exported
        parts.append(
            _table(
                f"{_on(rows, rows_name(difference))}, this export beside its run.", {"run": trained, "export": exported}
            )
        )
    if not any(parts):
        return ""
    return "## Scores\n\n" + "\n".join(filter(None, parts))


def is_number(value: object) -> bool:
    """Whether it is a number, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _on(scores: Scores, what: str) -> str:
    rows = scores.get("rows", scores.get("scored_rows"))
    return f"On {rows:,} {what}" if is_number(rows) else f"On {what}"


def _source(data: str) -> str:
    """Where rows are from, without the directory that they lie in."""
    if not data:
        return ""
    return f" of {data if is_hub_id(data.partition(',')[0]) else Path(data).name}"


def _table(text: str, sides: Mapping[str, Scores]) -> str:
    """A table of the scores that the last side has, under a sentence; "" where it has none."""
    last = list(sides.values())[-1]
    names = [name for name, value in last.items() if name not in _NO_SCORES and is_number(value)]
    if not names:
        return ""
    rows = [
        f"| {name.replace('_', ' ')} | {' | '.join(_cell(scores.get(name)) for scores in sides.values())} |"
        for name in names
    ]
    return "\n".join([f"{text}\n", f"| | {' | '.join(sides)} |", "|---" * (len(sides) + 1) + "|", *rows, ""])


def _cell(value: Any) -> str:
    return formatting.significant(value, 4) if is_number(value) else "–"
