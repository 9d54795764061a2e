"""Several runs side by side: their facts as numbers (`compared`), and the page of ``qvera compare`` (`runs_page`)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from qvera.config.schema import DataSection, ModelSection, Recipe
from qvera.evaluation.report.charts import Line, line_chart
from qvera.evaluation.report.curves import held_out_curve, series
from qvera.evaluation.report.evaluated import Column, score_columns, score_facts, score_gaps
from qvera.evaluation.report.markup import document, esc, section
from qvera.evaluation.report.points import Point, smooth, thin
from qvera.evaluation.report.read import Evaluation, Run, number, pick, read_run, words
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError
from qvera.utils.formatting import count, duration, percent, significant, size

COLOURS = 8
"""Runs that one page can tell apart."""

_UNTOLD = ("training.output_dir", "training.report_to")
"""Keys of a recipe that say nothing about what a run computes."""

SCORES: tuple[Column, ...] = (
    ("loss_before", "Loss before", lambda value: f"{value:.4f}"),
    ("loss_after", "Loss after", lambda value: f"{value:.4f}"),
    ("loss_lowest", "Lowest", lambda value: f"{value:.4f}"),
    ("lowest_step", "at step", count),
    ("perplexity", "Perplexity", lambda value: significant(value, 4)),
    ("exact_match", "Exact match", percent),
)
COSTS: tuple[Column, ...] = (
    ("trainable_parameters", "Trained numbers", count),
    ("adapter_bytes", "Adapter", size),
    ("peak_bytes", "Peak memory", size),
    ("seconds_a_step", "Seconds a step", significant),
    ("steps", "Steps", count),
    ("tokens", "Tokens seen", count),
    ("seconds", "Training time", duration),
)


@dataclass(frozen=True)
class Compared:
    """What several runs have in common and what not.

    Attributes:
        runs: as they were named.
        labels: a short name for each, no two alike.
        facts: for each run the keys of `SCORES` and `COSTS`; None where its files do not say.
        differing: key of the recipe → its value in each run (None also where a recipe lacks it); only keys in which they differ.
        gaps: sentences on what is missing or can't be compared.
    """

    runs: list[Run]
    labels: list[str]
    facts: list[dict[str, float | None]]
    differing: dict[str, list[Any]]
    gaps: list[str] = field(default_factory=list)

    @property
    def evaluations(self) -> list[Evaluation | None]:
        """What `qvera eval` found of each run, where its directory has that as eval.json."""
        return [run.evaluation for run in self.runs]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        runs = [
            {
                "run": label,
                "status": words(run.info, "status") or None,
                **facts,
                "evaluation": None if run.evaluation is None else asdict(run.evaluation),
            }
            for run, label, facts in self._rows()
        ]
        return {"runs": runs, "differing": self.differing, "gaps": self.gaps}

    def _rows(self) -> list[tuple[Run, str, dict[str, float | None]]]:
        return list(zip(self.runs, self.labels, self.facts, strict=True))


def compared(paths: Sequence[Path]) -> Compared:
    """Read the runs and hold them against each other.

    Raises:
        InputError: fewer than two, too many, the same one twice, or a directory that holds no run.
    """
    if len(paths) < 2:
        raise InputError(f"compare takes two runs or more, got {len(paths)}.")
    if len(paths) > COLOURS:
        raise InputError(f"compare takes at most {COLOURS} runs, got {len(paths)}. Compare the best of each part.")
    places = [path.resolve() for path in paths]
    twice = next((path for i, path in enumerate(places) if path in places[:i]), None)
    if twice is not None:
        raise InputError(f"{twice}: is named twice; name each run once.")
    runs = [read_run(path, evaluation=True) for path in paths]
    labels = _labels(places)
    facts = [facts_of(run) for run in runs]
    return Compared(runs, labels, facts, differing_keys(runs), _gaps(runs, labels, facts))


def _labels(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        labels = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(labels)) == len(labels):
            return labels
    return [str(place) for place in places]


def facts_of(run: Run) -> dict[str, float | None]:
    """The numbers of one run: from run.json, and what metrics.jsonl adds up to where that has none (a killed run)."""
    result, adapter = pick(run.info, "result"), pick(run.info, "adapter")
    curve = [(loss, step) for step, loss in held_out_curve(run) if loss is not None]
    lowest = min(curve, default=(None, None))
    seconds = [value for _, value in series(run.train, "step_seconds") if value is not None]
    peaks = [value for _, value in series(run.train, "peak_bytes") if value is not None]
    after = pick(result, "eval_after")
    return {
        "loss_before": number(result, "eval_before", "loss"),
        "loss_after": _first(number(after, "loss"), curve[-1][0] if curve and curve[-1][1] else None),
        "loss_lowest": lowest[0],
        "lowest_step": lowest[1],
        "perplexity": number(after, "perplexity"),
        "exact_match": number(after, "exact_match"),
        "trainable_parameters": number(adapter, "trainable_parameters"),
        "adapter_bytes": _first(number(adapter, "file_bytes"), run.adapter_bytes),
        "peak_bytes": _first(number(result, "peak_bytes"), max(peaks, default=None)),
        "seconds_a_step": statistics.median(seconds) if seconds else None,
        "steps": _first(number(result, "steps"), float(run.train[-1]["step"]) if run.train else None),
        "tokens": tokens_by_step(run)[-1][1] if run.train else None,
        "seconds": _first(number(result, "seconds"), sum(seconds) if seconds else None),
    }


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def tokens_by_step(run: Run) -> list[tuple[float, float]]:
    """(step, input tokens seen up to it) for every recorded step."""
    seen = accumulate(number(row, "input_tokens") or 0.0 for row in run.train)
    return [(float(row["step"]), total) for row, total in zip(run.train, seen, strict=True)]


def differing_keys(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """``section.key`` → each run's value, for the keys in which the recipes differ. A run without a recipe has None everywhere."""
    flat = [_with_defaults(_flat(run.recipe)) for run in runs]
    told = [tree for tree in flat if tree]
    keys = dict.fromkeys(key for tree in told for key in tree)
    found = {}
    for key in keys:
        values = [tree.get(key) for tree in told]
        if key not in _UNTOLD and any(value != values[0] for value in values[1:]):
            found[key] = [tree.get(key) for tree in flat]
    return found


def _with_defaults(flat: dict[str, Any]) -> dict[str, Any]:
    """A run of an older qvera has no line for a key that came later: it ran with what is now the default."""
    if not flat:
        return flat
    required = ModelSection(path="-"), DataSection(path="-")
    defaults = _flat(Recipe(model=required[0], data=required[1]).to_dict())
    return {key: value for key, value in defaults.items() if key not in ("model.path", "data.path")} | flat


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}.{key}" if isinstance(keys, dict) else name: value
        for name, keys in recipe.items()
        for key, value in (keys.items() if isinstance(keys, dict) else [("", keys)])
    }


def _gaps(runs: Sequence[Run], labels: Sequence[str], facts: Sequence[dict[str, float | None]]) -> list[str]:
    gaps = []
    for run, label, found in zip(runs, labels, facts, strict=True):
        status = words(run.info, "status")
        if status != "done":
            gaps.append(
                f"{label}: {f'its status is {status}' if status else 'has not finished'}; its figures are those so far."
            )
        gaps += [f"{label}: {note}" for note in run.notes]
        if not held_out_curve(run):
            gaps.append(f"{label}: has no held-out loss, so only its training loss is shown.")
        missing = [title for key, title, _ in COSTS if found[key] is None]
        if missing and run.info:
            gaps.append(f"{label}: its files do not say: {', '.join(missing).lower()}.")
    questions: tuple[tuple[Callable[[Run], Any], str], ...] = (
        (_base, "The runs are not on the same base model ({}): their losses are not of one model."),
        (
            lambda run: _scored(run, "rows"),
            "The runs are not scored on the same held-out rows ({}): their scores are not of one set.",
        ),
        (
            lambda run: _scored(run, "trained_tokens"),
            "The runs' held-out losses are not over the same tokens ({}): other rows, another template or another length.",
        ),
        (
            lambda run: words(run.info, "device"),
            "The runs ran on different machines ({}): seconds and memory are not comparable.",
        ),
        (_processes, "The runs had different numbers of processes ({}): memory is that of the first one."),
    )
    for ask, sentence in questions:
        answers = [(label, ask(run)) for run, label in zip(runs, labels, strict=True)]
        known = [(label, str(answer)) for label, answer in answers if answer]
        if len({answer for _, answer in known}) > 1:
            gaps.append(sentence.format("; ".join(f"{label}: {answer}" for label, answer in known)))
    return gaps + score_gaps(labels, [run.evaluation for run in runs])


def _base(run: Run) -> str:
    name = words(run.info, "model", "path") or words(run.recipe, "model", "path")
    how = words(run.info, "model", "quantization") or words(run.recipe, "model", "quantization")
    return f"{name} in {how}" if name else ""


def _scored(run: Run, key: str) -> str:
    """How many rows or tokens were scored; where run.json does not say, the last evaluation's."""
    last = pick(run.info, "result", "eval_after") or pick(run.info, "result", "eval_before")
    last = last if isinstance(last, dict) else (run.evals[-1] if run.evals else None)
    found = number(last, key)
    return f"{found:,.0f} {key.removeprefix('trained_')}" if found else ""


def _processes(run: Run) -> str:
    processes = number(run.info, "processes", "count")
    return f"{processes:,.0f}" if processes else ""


def write_runs(path: Path, found: Compared) -> None:
    """Write the page of a comparison in one rename."""
    replace_text(path, runs_page(found))


def runs_page(found: Compared) -> str:
    """The page as HTML."""
    names = " · ".join(found.labels)
    evaluations = found.evaluations
    notices = "".join(f"<p>{esc(gap)}</p>" for gap in found.gaps)
    head = f'<header>\n<p class="eyebrow">qvera compare</p>\n<h1>{esc(names)}</h1>\n</header>\n' + (
        f'<div class="notice">{notices}</div>\n' if notices else ""
    )
    curves = [
        _figure(found, "Held-out loss", "step", _held_out_lines),
        _figure(found, "Training loss", "step", _train_lines),
        _figure(found, "Held-out loss", "token", _held_out_lines),
        _figure(found, "Training loss", "token", _train_lines),
    ]
    grid = f'<div class="grid2">{"".join(curves)}</div>' if any(curves) else ""
    body = (
        head
        + section("Scores on held-out rows", _table(found.labels, found.facts, SCORES))
        + section("Scores by qvera eval", _table(found.labels, score_facts(evaluations), score_columns(evaluations)))
        + section("Cost", _table(found.labels, found.facts, COSTS))
        + section("Curves", _legend(found), grid)
        + section("Where the recipes differ", _differing(found))
    )
    footer = "Written by qvera compare from recipe.yaml, metrics.jsonl, run.json and eval.json of each run. Sizes are decimal."
    return document(f"{names} · compare · qvera", body, footer)


def _swatch(index: int) -> str:
    return f'<i class="swatch c{index + 1}"></i>'


def _legend(found: Compared) -> str:
    keys = "".join(f'<span class="legend">{_swatch(i)}{esc(label)}</span> ' for i, label in enumerate(found.labels))
    return f'<p class="caption keys">{keys}</p>'


def cells_of(rows: Sequence[dict[str, float | None]], columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Titles of the columns in which any row has a value, and the rows in words."""
    shown = [column for column in columns if any(facts[column[0]] is not None for facts in rows)]
    told = [[(facts[key], say) for key, _, say in shown] for facts in rows]
    return [title for _, title, _ in shown], [["–" if v is None else say(v) for v, say in row] for row in told]


def _table(labels: Sequence[str], rows: Sequence[dict[str, float | None]], columns: Sequence[Column]) -> str:
    shown, told = cells_of(rows, columns)
    if not shown:
        return ""
    body = ""
    for index, (label, row) in enumerate(zip(labels, told, strict=True)):
        cells = "".join(f"<td>{esc(cell)}</td>" for cell in row)
        body += f'<tr><th scope="row">{_swatch(index)}{esc(label)}</th>{cells}</tr>'
    titles = "".join(f'<th scope="col">{esc(title)}</th>' for title in shown)
    return f'<div class="scroll"><table><thead><tr><th scope="col">Run</th>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _differing(found: Compared) -> str:
    if not any(run.recipe for run in found.runs):
        return ""
    if not found.differing:
        return '<p class="caption">In no key.</p>'
    body = ""
    for key, values in found.differing.items():
        cells = "".join(f"<td><code>{esc(key_text(value))}</code></td>" for value in values)
        body += f'<tr><th scope="row"><code>{esc(key)}</code></th>{cells}</tr>'
    titles = "".join(f'<th scope="col">{_swatch(i)}{esc(label)}</th>' for i, label in enumerate(found.labels))
    return f'<div class="scroll"><table><thead><tr><th scope="col">Key</th>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def key_text(value: Any) -> str:
    """A value of a recipe as YAML would have it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _train_lines(run: Run) -> tuple[list[Point], bool]:
    raw = thin(series(run.train, "loss"))
    return smooth(raw, width=min(len(raw) / 30, 8) if len(raw) >= 10 else 0), False


def _held_out_lines(run: Run) -> tuple[list[Point], bool]:
    return held_out_curve(run), True


def _figure(found: Compared, title: str, unit: str, take: Callable[[Run], tuple[list[Point], bool]]) -> str:
    """One chart of all runs over steps, or over the tokens that each had seen by then; "" where no run has a value."""
    lines, said = [], []
    for index, (run, label) in enumerate(zip(found.runs, found.labels, strict=True)):
        points, dots = take(run)
        points = points if unit == "step" else _over_tokens(points, run)
        known = [y for _, y in points if y is not None]
        if not known:
            continue
        texts = [significant(y) if y is not None else "not a finite number" for _, y in points]
        lines.append(Line(label, points, "held-out" if dots else "main", texts, colour=index + 1))
        said.append(f"{label} from {significant(known[0])} to {significant(known[-1])}")
    chart = line_chart(
        lines, description=f"{title} by {unit}. {'; '.join(said)}.", height=200, may_be_log=True, x_name=unit
    )
    if not chart:
        return ""
    log = ' <span class="caption">(log scale)</span>' if 'data-log="1"' in chart else ""
    smoothed = "" if "Held" in title else ", smoothed"
    caption = f'<span class="caption">nats a token, by {"step" if unit == "step" else "tokens seen"}{smoothed}</span>'
    return f"<figure><figcaption><h3>{title}</h3>{caption}{log}</figcaption>{chart}</figure>"


def _over_tokens(points: Sequence[Point], run: Run) -> list[Point]:
    """The same values at the tokens seen by their steps; steps that metrics.jsonl does not know are left out."""
    seen = {0.0: 0.0, **dict(tokens_by_step(run))}
    return [(seen[step], value) for step, value in points if step in seen]
