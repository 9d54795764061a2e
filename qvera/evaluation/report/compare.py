"""Compare runs: their figures, the settings in which they differ, and what can't be compared."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qvera.evaluation.report.read import (
    RunFiles,
    get,
    get_number,
    read_adapter_of_run,
    read_run,
    status_of,
    trained_many,
)
from qvera.utils.errors import InputError
from qvera.utils.formatting import count, duration, percent, significant, size, text_or_dash

MAX_RUNS = 8  # a page has colours for this many runs

_IGNORED_SETTINGS = ("training.output_dir", "training.report_to")  # settings that do not change what a run computes

Figures = dict[str, float | None]  # figures of one run by name; None where its files do not say


class Column(NamedTuple):
    """A column of a table of runs: key of the figure, title, and how a value is written."""

    key: str
    title: str
    format: Callable[[float], str]


def score_format(key: str) -> Callable[[float], str]:
    """Exact match is written as a share, losses with four decimals, others with four digits."""
    if key in ("exact_match", "accuracy"):
        return percent
    return "{:.4f}".format if key.startswith("loss") else lambda value: significant(value, 4)


SCORES = (
    Column("loss_before", "Loss before", score_format("loss")),
    Column("loss_after", "Loss after", score_format("loss")),
    Column("loss_lowest", "Lowest", score_format("loss")),
    Column("lowest_step", "at step", count),
    *(
        Column(key, key.capitalize().replace("_", " "), score_format(key))
        for key in ("reward", "perplexity", "exact_match", "accuracy", "f1", "matthews", "pearson", "spearman")
    ),
)
AFTER_TRAINING = [column.key for column in SCORES[4:]]  # scores that were measured after training
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
    """Several runs side by side, by unique short names."""

    runs: dict[str, RunFiles]
    figures: dict[str, Figures]  # for each run the keys of `SCORES` and `COSTS`
    differing: dict[str, list[object]]  # setting → its value in each run; only settings that differ
    gaps: list[str]  # sentences on what is missing or can't be compared

    @property
    def score_figures(self) -> dict[str, Figures]:
        """For each run the values of `score_columns`."""
        return {
            label: {**run.evaluation.scores, "scored_rows": run.evaluation.scored_rows} if run.evaluation else {}
            for label, run in self.runs.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        runs = [
            {"run": label, "status": status_of(run.info) or None, **self.figures[label]}
            | {"evaluation": asdict(run.evaluation) if run.evaluation else None}
            for label, run in self.runs.items()
        ]
        return {"runs": runs, "differing": self.differing, "gaps": self.gaps}


def table(columns: Sequence[Column], figures: dict[str, Figures]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Titles of the columns in which any run has a value, and the label and cells of each run."""
    shown = [column for column in columns if any(row.get(column.key) is not None for row in figures.values())]
    rows = [
        (label, [text_or_dash(row.get(column.key), column.format) for column in shown])
        for label, row in figures.items()
    ]
    return [column.title for column in shown], rows


def require_comparable(number: int) -> None:
    """Raise InputError for too few or too many runs."""
    if number < 2:
        raise InputError(
            f"compare takes two runs or more, got {number}. Of adapters of one run, name each with --adapter NAME."
        )
    if number > MAX_RUNS:
        raise InputError(f"compare takes at most {MAX_RUNS} runs, got {number}. Compare the best of each part.")


def compare_runs(paths: Sequence[Path], adapters: Sequence[str] = ()) -> Comparison:
    """Read runs and compare them, or these ``adapters`` of those that trained many.

    InputError: too few or too many runs, one twice, a directory without a run, or many adapters and no name, or a name
    and no run with many.
    """
    require_comparable(max(2, len(paths)))  # one run may have several adapters
    places = [path.resolve() for path in paths]
    for named in (places, list(adapters)):
        twice = next((one for i, one in enumerate(named) if one in named[:i]), None)
        if twice is not None:
            raise InputError(f"{twice}: is named twice; name each once.")
    parts = 1
    while len({place.parts[-parts:] for place in places}) < len(places):
        parts += 1
    begun = {path: read_run(path, metrics=False) for path in paths}
    many = [path for path, run in begun.items() if trained_many(run.info, run.recipe)]
    if many and not adapters:
        raise InputError(f"{many[0]}: trained many adapters; name those to compare with --adapter NAME.")
    if adapters and not many:
        raise InputError(f"--adapter {adapters[0]}: {paths[0]} did not train many adapters.")
    runs: dict[str, RunFiles] = {}
    for place, path in zip(places, paths, strict=True):
        label = "/".join(place.parts[-parts:])  # the shortest ends of the paths that tell them apart
        if path not in many:
            runs[label] = read_run(path, evaluation=True)
            continue
        for name in adapters:
            both = label if len(adapters) == 1 else f"{label}: {name}"
            runs[name if len(paths) == 1 else both] = read_adapter_of_run(path, name)
    require_comparable(len(runs))
    return compare(runs)


def compare(runs: dict[str, RunFiles]) -> Comparison:
    """Compare runs that are read already; the keys are their names."""
    figures = {label: run_figures(run) for label, run in runs.items()}
    trees = [run.settings for run in runs.values()]
    known = [tree for tree in trees if tree]
    differing = {
        key: [tree.get(key) for tree in trees]
        for key in dict.fromkeys(key for tree in known for key in tree)
        if key not in _IGNORED_SETTINGS and any(tree.get(key) != known[0].get(key) for tree in known)
    }
    shown = {key for each in figures.values() for key, value in each.items() if value is not None}
    gaps = []
    for label, run in runs.items():
        if (status := status_of(run.info)) != "done":
            state = f"its status is {status}" if status else "has not finished"
            gaps.append(f"{label}: {state}; its figures are those so far.")
        gaps += [f"{label}: {note}" for note in run.notes]
        if not run.held_out():
            gaps.append(f"{label}: has no held-out loss, so only its training loss is shown.")
        missing = [each.title for each in COSTS if each.key in shown and figures[label][each.key] is None]
        if missing and run.info:
            gaps.append(f"{label}: its files lack: {', '.join(missing).lower()}.")
    for sentence, ask in _QUESTIONS.items():
        if difference := _differs({label: ask(run) for label, run in runs.items()}):
            gaps.append(sentence.format(difference))
    return Comparison(runs, figures, differing, gaps + _gaps_between_scores(runs))


def run_figures(run: RunFiles) -> Figures:
    """The figures of one run, under the keys of `SCORES` and `COSTS`."""
    curve = [(loss, step) for step, loss in run.held_out() if loss is not None]
    loss_lowest, lowest_step = min(curve, default=(None, None))
    loss_after = run.number("result", "eval_after", "loss")
    if loss_after is None and curve and curve[-1][1] > 0:
        loss_after = curve[-1][0]
    step_seconds, tokens = run.values("step_seconds"), tokens_by_step(run)
    return {
        "loss_before": run.number("result", "eval_before", "loss"),
        "loss_after": loss_after,
        "loss_lowest": loss_lowest,
        "lowest_step": lowest_step,
        **{key: run.number("result", "eval_after", key) for key in AFTER_TRAINING},
        "trainable_parameters": run.number("adapter", "trainable_parameters"),
        "adapter_bytes": run.adapter_bytes,
        "peak_bytes": run.totals["peak_bytes"],
        "seconds_a_step": statistics.median(step_seconds) if step_seconds else None,
        "steps": run.totals["steps"],
        "tokens": tokens[-1][1] if tokens else None,
        "seconds": run.totals["seconds"],
    }


def tokens_by_step(run: RunFiles) -> list[tuple[float, float]]:
    """(step, input tokens up to it) for every step of the curve; none where the files do not say."""
    seen: Iterable[float | None] = accumulate(get_number(row, "input_tokens") or 0.0 for row in run.train)
    if run.recorded is not None:  # the curve has only some of the steps
        seen = [get_number(row, "tokens_seen") for row in run.train]
    found = [(float(row["step"]), tokens) for row, tokens in zip(run.train, seen, strict=True) if tokens is not None]
    return found if found and found[-1][1] and len(found) == len(run.train) else []


def score_columns(runs: dict[str, RunFiles]) -> list[Column]:
    """The number of rows, and each metric by which ``qvera eval`` scored any of the runs."""
    labels: dict[str, str] = {}
    for run in runs.values():
        labels |= run.evaluation.labels if run.evaluation else {}
    metrics = [Column(key, label, score_format(key)) for key, label in labels.items()]
    return [Column("scored_rows", "Rows", count), *metrics] if metrics else []


def plain_yaml(value: object) -> str:
    """A value as YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _base(run: RunFiles) -> str:
    name, quantization = run.setting("model", "path"), run.setting("model", "quantization")
    return f"{name} in {quantization}" if name else ""


def _last_evaluation(run: RunFiles, key: str) -> str:
    """How many rows or tokens were evaluated, from run.json, else from metrics.jsonl."""
    last = get(run.info, "result", "eval_after") or get(run.info, "result", "eval_before")
    last = last if isinstance(last, dict) else (run.evals[-1] if run.evals else None)
    found = get_number(last, key)
    return f"{found:,.0f} {key.removeprefix('trained_')}" if found else ""


_QUESTIONS: dict[str, Callable[[RunFiles], str]] = {
    "The runs are of different tasks ({}): their losses are not of one kind.": (
        lambda run: str(run.settings.get("task", ""))
    ),
    "The runs are not on the same base model ({}): their losses are not of one model.": _base,
    "The runs are not scored on the same held-out rows ({}): their scores are not of one set.": (
        lambda run: _last_evaluation(run, "rows")
    ),
    "The runs' held-out losses are not over the same tokens ({}): other rows, another template or another length.": (
        lambda run: _last_evaluation(run, "trained_tokens")
    ),
    "The runs ran on different machines ({}): seconds and memory are not comparable.": lambda run: run.text("device"),
    "The runs had different numbers of processes ({}): memory is that of the first one.": (
        lambda run: count(number) if (number := run.number("processes", "count")) else ""
    ),
}
"""If the runs answer one of these differently, their figures can't be compared, and this is said."""


def _differs(answers: dict[str, str]) -> str:
    """Each run's answer in words, "" where they agree; runs without an answer are left out."""
    known = {label: answer for label, answer in answers.items() if answer}
    return "; ".join(f"{label}: {answer}" for label, answer in known.items()) if len(set(known.values())) > 1 else ""


def _gaps_between_scores(runs: dict[str, RunFiles]) -> list[str]:
    """Says where the eval.json files are of other inputs, or made in other ways."""
    known = {label: run.evaluation for label, run in runs.items() if run.evaluation is not None}
    gaps = []
    if len({each.inputs_sha256 or label for label, each in known.items()}) > 1:
        inputs = []
        for label, each in known.items():
            rows = "" if each.scored_rows is None else f"{each.scored_rows:,.0f} rows of "
            inputs.append(f"{label}: {rows}{each.data or 'unknown data'}, SHA-256 {each.inputs_sha256 or 'unknown'}")
        gaps.append(
            f"The runs' eval.json are not of the same inputs ({'; '.join(inputs)}): other rows, another template or "
            "other references."
        )
    lengths = {label: f"{each.max_new_tokens or 0:,.0f} tokens" for label, each in known.items()}
    ways = {
        "did not ask the same kind of model": {label: each.column for label, each in known.items()},
        "did not let answers have the same length": lengths,
    }
    for column in score_columns(runs)[1:]:
        ways[f"did not measure {column.title} in the same way"] = {
            label: each.signatures[column.key] or "does not say"
            for label, each in known.items()
            if column.key in each.scores
        }
    found = {what: _differs(way) for what, way in ways.items()}
    return gaps + [f"The runs' eval.json {what} ({difference})." for what, difference in found.items() if difference]
