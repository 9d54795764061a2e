"""Compare runs: their figures, the settings in which they differ, and what of them can't be compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from qvera.evaluation.report.read import Evaluation, Run, get, get_number, read_run
from qvera.evaluation.report.settings import default_settings, flat_settings
from qvera.utils.errors import InputError
from qvera.utils.formatting import count, duration, percent, significant, size, text_or_dash

MAX_RUNS = 8
"""Runs that one page has colours for."""

_IGNORED_SETTINGS = ("training.output_dir", "training.report_to")
"""Settings that do not change what a run computes."""


class Column(NamedTuple):
    """A column of a table of runs: key of the figure, title, and how a value is written."""

    key: str
    title: str
    format: Callable[[float], str]


SCORES = (
    Column("loss_before", "Loss before", "{:.4f}".format),
    Column("loss_after", "Loss after", "{:.4f}".format),
    Column("loss_lowest", "Lowest", "{:.4f}".format),
    Column("lowest_step", "at step", count),
    Column("perplexity", "Perplexity", lambda value: significant(value, 4)),
    Column("exact_match", "Exact match", percent),
)
COSTS = (
    Column("trainable_parameters", "Trainable parameters", count),
    Column("adapter_bytes", "Adapter", size),
    Column("peak_bytes", "Peak memory", size),
    Column("seconds_a_step", "Seconds a step", significant),
    Column("steps", "Steps", count),
    Column("tokens", "Tokens seen", count),
    Column("seconds", "Training time", duration),
)


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        runs: In the order in which they were named.
        labels: A short name for each, all different.
        figures: For each run the keys of `SCORES` and `COSTS`; None where its files do not say.
        differing: Setting → its value in each run (None also where a recipe lacks it); only settings that differ.
        gaps: Sentences on what is missing or can't be compared.
    """

    runs: list[Run]
    labels: list[str]
    figures: list[dict[str, float | None]]
    differing: dict[str, list[object]]
    gaps: list[str] = field(default_factory=list)

    @property
    def evaluations(self) -> list[Evaluation | None]:
        """The eval.json of each run that has one."""
        return [run.evaluation for run in self.runs]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        runs = [
            {"run": label, "status": run.text("status") or None, **figures}
            | {"evaluation": None if run.evaluation is None else asdict(run.evaluation)}
            for run, label, figures in zip(self.runs, self.labels, self.figures, strict=True)
        ]
        return {"runs": runs, "differing": self.differing, "gaps": self.gaps}


def compare_runs(paths: Sequence[Path]) -> Comparison:
    """Read several runs and compare them.

    Raises:
        InputError: Fewer than two, too many, the same one twice, or a directory that holds no run.
    """
    if len(paths) < 2:
        raise InputError(f"compare takes two runs or more, got {len(paths)}.")
    if len(paths) > MAX_RUNS:
        raise InputError(f"compare takes at most {MAX_RUNS} runs, got {len(paths)}. Compare the best of each part.")
    places = [path.resolve() for path in paths]
    twice = next((path for i, path in enumerate(places) if path in places[:i]), None)
    if twice is not None:
        raise InputError(f"{twice}: is named twice; name each run once.")
    runs = [read_run(path, evaluation=True) for path in paths]
    labels = _labels(places)
    figures = [run_figures(run) for run in runs]
    gaps = _gaps_in_files(runs, labels, figures) + _gaps_between_runs(runs, labels) + _gaps_between_scores(runs, labels)
    return Comparison(runs, labels, figures, differing_settings(runs), gaps)


def _labels(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        labels = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(labels)) == len(labels):
            return labels
    return [str(place) for place in places]


def run_figures(run: Run) -> dict[str, float | None]:
    """The figures of one run under the keys of `SCORES` and `COSTS`."""
    curve = [(loss, step) for step, loss in run.held_out_losses if loss is not None]
    loss_lowest, lowest_step = min(curve, default=(None, None))
    loss_after = run.number("result", "eval_after", "loss")
    if loss_after is None and curve and curve[-1][1] > 0:
        loss_after = curve[-1][0]
    step_seconds = run.values("step_seconds")
    return {
        "loss_before": run.number("result", "eval_before", "loss"),
        "loss_after": loss_after,
        "loss_lowest": loss_lowest,
        "lowest_step": lowest_step,
        "perplexity": run.number("result", "eval_after", "perplexity"),
        "exact_match": run.number("result", "eval_after", "exact_match"),
        "trainable_parameters": run.number("adapter", "trainable_parameters"),
        "adapter_bytes": run.adapter_bytes,
        "peak_bytes": run.peak_bytes,
        "seconds_a_step": statistics.median(step_seconds) if step_seconds else None,
        "steps": run.steps,
        "tokens": tokens_by_step(run)[-1][1] if run.train else None,
        "seconds": run.seconds,
    }


def tokens_by_step(run: Run) -> list[tuple[float, float]]:
    """(step, input tokens seen up to it) for every recorded step."""
    seen = accumulate(get_number(row, "input_tokens") or 0.0 for row in run.train)
    return [(float(row["step"]), tokens) for row, tokens in zip(run.train, seen, strict=True)]


def differing_settings(runs: Sequence[Run]) -> dict[str, list[object]]:
    """Setting → each run's value, for the settings in which the recipes differ.

    A recipe of an older qvera that lacks a key ran with what is now its default. A run without a recipe has None
    everywhere.
    """
    defaults = default_settings()
    trees = [defaults | flat_settings(run.recipe) if run.recipe else {} for run in runs]
    known = [tree for tree in trees if tree]
    return {
        key: [tree.get(key) for tree in trees]
        for key in dict.fromkeys(key for tree in known for key in tree)
        if key not in _IGNORED_SETTINGS and any(tree.get(key) != known[0].get(key) for tree in known)
    }


def score_columns(evaluations: Sequence[Evaluation | None]) -> tuple[Column, ...]:
    """The number of rows and each metric by which ``qvera eval`` scored any run; () where it scored none."""
    known = [evaluation for evaluation in evaluations if evaluation is not None]
    labels = {key: label for each in known[::-1] for key, label in each.labels.items()}
    keys = dict.fromkeys(key for each in known for key in each.scores)
    metrics = [Column(key, labels[key], percent if key == "exact_match" else _four_digits) for key in keys]
    return (Column("scored_rows", "Rows", count), *metrics) if metrics else ()


def _four_digits(value: float) -> str:
    return significant(value, 4)


def score_figures(evaluations: Sequence[Evaluation | None]) -> list[dict[str, float | None]]:
    """For each run the values of `score_columns`; None where it has none."""
    found: list[dict[str, float | None]] = [
        {} if each is None else {**each.scores, "scored_rows": each.scored_rows} for each in evaluations
    ]
    return [{column.key: figures.get(column.key) for column in score_columns(evaluations)} for figures in found]


def table_cells(
    figures: Sequence[dict[str, float | None]], columns: Sequence[Column]
) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns in which any run has a value, and a row of texts for each run."""
    shown = [column for column in columns if any(row[column.key] is not None for row in figures)]
    rows = [[text_or_dash(row[column.key], column.format) for column in shown] for row in figures]
    return [column.title for column in shown], rows


def _gaps_in_files(runs: Sequence[Run], labels: Sequence[str], figures: Sequence[dict[str, float | None]]) -> list[str]:
    """What the files of a run lack."""
    gaps = []
    for run, label, found in zip(runs, labels, figures, strict=True):
        status = run.text("status")
        if status != "done":
            state = f"its status is {status}" if status else "has not finished"
            gaps.append(f"{label}: {state}; its figures are those so far.")
        gaps += [f"{label}: {note}" for note in run.notes]
        if not run.held_out_losses:
            gaps.append(f"{label}: has no held-out loss, so only its training loss is shown.")
        missing = [column.title for column in COSTS if found[column.key] is None]
        if missing and run.info:
            gaps.append(f"{label}: its files lack: {', '.join(missing).lower()}.")
    return gaps


def _gaps_between_runs(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """In what the runs differ so that their figures can't be compared."""
    questions: tuple[tuple[Callable[[Run], str], str], ...] = (
        (_base, "The runs are not on the same base model ({}): their losses are not of one model."),
        (
            lambda run: _last_evaluation(run, "rows"),
            "The runs are not scored on the same held-out rows ({}): their scores are not of one set.",
        ),
        (
            lambda run: _last_evaluation(run, "trained_tokens"),
            "The runs' held-out losses are not over the same tokens ({}): other rows, another template or another "
            "length.",
        ),
        (
            lambda run: run.text("device"),
            "The runs ran on different machines ({}): seconds and memory are not comparable.",
        ),
        (
            lambda run: count(run.number("processes", "count") or 0).strip("0"),
            "The runs had different numbers of processes ({}): memory is that of the first one.",
        ),
    )
    gaps = []
    for question, sentence in questions:
        known = [(label, question(run)) for run, label in zip(runs, labels, strict=True)]
        known = [(label, answer) for label, answer in known if answer]
        if len({answer for _, answer in known}) > 1:
            gaps.append(sentence.format("; ".join(f"{label}: {answer}" for label, answer in known)))
    return gaps


def _base(run: Run) -> str:
    name, quantization = run.setting("model", "path"), run.setting("model", "quantization")
    return f"{name} in {quantization}" if name else ""


def _last_evaluation(run: Run, key: str) -> str:
    """How many rows or tokens were evaluated, from run.json or else from metrics.jsonl."""
    last = get(run.info, "result", "eval_after") or get(run.info, "result", "eval_before")
    last = last if isinstance(last, dict) else (run.evals[-1] if run.evals else None)
    found = get_number(last, key)
    return f"{found:,.0f} {key.removeprefix('trained_')}" if found else ""


def _gaps_between_scores(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """Where the runs' eval.json are not of the same inputs, or not made in the same way."""
    known = [(label, run.evaluation) for label, run in zip(labels, runs, strict=True) if run.evaluation is not None]
    if len(known) < 2:
        return []
    gaps = []
    if len({each.inputs_sha256 or label for label, each in known}) > 1:
        inputs = "; ".join(f"{label}: {_inputs(each)}" for label, each in known)
        gaps.append(
            f"The runs' eval.json are not of the same inputs ({inputs}): other rows, another template or other "
            f"references."
        )
    ways = {
        "did not ask the same kind of model": [(label, each.column) for label, each in known],
        "did not let answers have the same length": [
            (label, f"{each.max_new_tokens or 0:,.0f} tokens") for label, each in known
        ],
    }
    for column in score_columns([each for _, each in known])[1:]:
        ways[f"did not measure {column.title} in the same way"] = [
            (label, each.signatures[column.key] or "does not say") for label, each in known if column.key in each.scores
        ]
    for what, found in ways.items():
        if len({way for _, way in found}) > 1:
            gaps.append(f"The runs' eval.json {what} ({'; '.join(f'{label}: {way}' for label, way in found)}).")
    return gaps


def _inputs(evaluation: Evaluation) -> str:
    rows = "" if evaluation.scored_rows is None else f"{evaluation.scored_rows:,.0f} rows of "
    return f"{rows}{evaluation.data or 'unknown data'}, SHA-256 {evaluation.inputs_sha256 or 'unknown'}"
