"""Read a run directory. What is missing or broken becomes a note on the page, not an error."""

import dataclasses
import functools
import hashlib
import json
import math
import socket
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import yaml

from qvera.config.schema import parse_recipe
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError, did_you_mean
from qvera.utils.files import ADAPTER_WEIGHTS, ADAPTERS, RUN_OWNER, file_sha256, no_directory, read_json, runs_in
from qvera.utils.formatting import first_of, is_number

Point = tuple[float, float | None]  # x (such as a step) and y; None is a gap in the curve

RUN_FILES = ("recipe.yaml", "metrics.jsonl", "run.json", RUN_OWNER)  # a run directory has at least one of these
REPLACED = "another adapter is there now than this run wrote: the run's steps and scores are not of it"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast; a PyYAML built without libyaml has none
_MAX_STEP = 1e12
_CLOCK_SECONDS = 5.0
"""A process begins before it writes down when it did; the two clocks may differ by this much."""


def get(tree: object, *keys: str) -> object:
    """``tree[key1][key2]...``; None where a level is missing or not a mapping."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def get_number(tree: object, *keys: str) -> float | None:
    """None for a missing value, text, a bool, NaN, or more than 1e100 (an axis would overflow)."""
    value = get(tree, *keys)
    return float(value) if is_number(value) and abs(value) < 1e100 else None  # False for NaN


def get_text(tree: object, *keys: str) -> str:
    """Printable text, because JSON can hold half a character; "" where there is none."""
    value = get(tree, *keys)
    return "" if value is None or isinstance(value, dict | list) else str(value).encode(errors="replace").decode()


def process_exists(pid: float | None, host: str, started: str) -> bool:
    """Whether a process that had begun by ``started`` (ISO format) is there. One on another machine counts as there."""
    if host != socket.gethostname():
        return bool(host)
    if pid is None or not 0 < pid < 2**31:
        return False
    try:
        began = psutil.Process(int(pid)).create_time()
        return began < datetime.fromisoformat(started).timestamp() + _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, ValueError, OverflowError):
        return True


def status_of(info: dict[str, Any]) -> str:
    """The status in a run.json; ``interrupted`` where it is ``running`` and its process has ended."""
    status, process = get_text(info, "status"), get(info, "processes")
    owner = get_number(process, "pid"), get_text(process, "host"), get_text(info, "started")
    return "interrupted" if status == "running" and not process_exists(*owner) else status


def is_replaced(sha256: object, weights: Path) -> bool:
    """Whether another adapter is at ``weights`` than the one of run.json's SHA-256; False where either is missing."""
    return isinstance(sha256, str) and weights.is_file() and file_sha256(weights) != sha256


def series(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) of every row that has ``key``; a gap where `get_number` finds none."""
    return [(float(row["step"]), get_number(row, key)) for row in rows if key in row]


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run's answers, from ``qvera eval RUN --json RUN/eval.json``; "" for what the file does not say.

    Scores, labels and signatures (how each was computed) have the keys of the file's ``scores``. ``column`` says what
    was evaluated: Adapter, Export or Model.
    """

    scores: dict[str, float]
    labels: dict[str, str]
    signatures: dict[str, str]
    scored_rows: float | None
    data: str
    inputs_sha256: str
    column: str
    max_new_tokens: float | None


@dataclass(frozen=True)
class RunFiles:
    """The files of a run directory; {} or "" for a missing one."""

    name: str
    info: dict[str, Any]  # run.json
    recipe_text: str  # recipe.yaml as it is
    recipe: dict[str, Any]
    train: list[dict[str, Any]]  # rows of kind "train" in metrics.jsonl, by rising step, each step once
    evals: list[dict[str, Any]]  # rows of kind "eval", likewise
    adapter_file_bytes: int | None
    evaluation: Evaluation | None  # eval.json, where it was asked for and exists
    notes: list[str]  # sentences about what could not be read
    recorded: dict[str, float | None] | None = None  # `totals` of all steps, where ``train`` has only some of them
    has_checkpoint: bool = False

    def number(self, *keys: str) -> float | None:
        """A number of run.json."""
        return get_number(self.info, *keys)

    def text(self, *keys: str) -> str:
        """A text of run.json."""
        return get_text(self.info, *keys)

    def setting(self, section: str, key: str) -> str:
        """From run.json, else from the recipe."""
        return self.text(section, key) or get_text(self.recipe, section, key)

    @property
    def settings(self) -> dict[str, object]:
        """``section.key`` → value, with defaults for what an older recipe lacks; {} without a recipe."""
        return _defaults() | _flat_settings(self.recipe) if self.recipe else {}

    def values(self, key: str) -> list[float]:
        """The finite values of all training steps."""
        return [value for _, value in series(self.train, key) if value is not None]

    @functools.cached_property
    def totals(self) -> dict[str, float | None]:
        """Steps, their seconds, input tokens per second, and peak memory (on a CPU, that private to the process).

        A killed run has no result in run.json; its totals are from metrics.jsonl.
        """
        seconds, tokens = sum(self.values("step_seconds")), sum(self.values("input_tokens"))
        measured = self.recorded or {
            "steps": int(self.train[-1]["step"]) if self.train else None,
            "seconds": seconds or None,
            "tokens_per_second": tokens / seconds if tokens and seconds else None,
            "peak_bytes": max(self.values("peak_bytes"), default=None),
        }
        results = {key: self.number("result", key) for key in measured}
        return measured | {key: value for key, value in results.items() if value is not None}

    @property
    def mapped_bytes(self) -> float:
        """Memory-mapped weights; on a CPU they come on top of the peak."""
        return self.number("result", "mapped_bytes") or self.number("plan", "measured", "mapped_bytes") or 0.0

    @property
    def adapter_bytes(self) -> float | None:
        """Size of the adapter file."""
        return self.number("adapter", "file_bytes") or self.adapter_file_bytes

    def held_out(self, key: str = "loss") -> list[Point]:
        """A held-out score by step, from metrics.jsonl, and from run.json before and after training."""
        points = dict(series(self.evals, key))
        before, after = (self.number("result", when, key) for when in ("eval_before", "eval_after"))
        if before is not None:
            points.setdefault(0.0, before)
        # after training the last vectors are evaluated, or the best ones where the recipe asks for those
        at = self.number("result", "steps")
        if get(self.recipe, "training", "load_best_model_at_end") is True:
            at = self.number("result", "best_step") or at
        if after is not None and at and 0 < at < _MAX_STEP:
            points.setdefault(float(int(at)), after)
        return sorted(points.items())

    @property
    def own_metrics(self) -> list[str]:
        """Names of metrics that the run's caller gave."""
        names = get(self.info, "own", "metrics")
        return list(map(str, names)) if isinstance(names, list) else []

    @property
    def best_by(self) -> str:
        """The score that the best step is chosen by."""
        return get_text(self.recipe, "training", "metric_for_best_model") or "loss"

    @property
    def best_step(self) -> int | None:
        """The step with the best held-out score: from run.json, else from metrics.jsonl (two values or more)."""
        best = self.number("result", "best_step")
        if best is not None and 0 <= best < _MAX_STEP:
            return int(best)
        losses = [(loss, step) for step, loss in series(self.evals, "loss") if loss is not None]
        return int(min(losses)[1]) if len(losses) > 1 and self.best_by == "loss" else None


def _flat_settings(recipe: dict[str, object]) -> dict[str, object]:
    return {
        f"{name}.{key}" if isinstance(keys, dict) else str(name): value
        for name, keys in recipe.items()
        for key, value in (keys.items() if isinstance(keys, dict) else [("", keys)])
    }


def _defaults() -> dict[str, object]:
    tree = parse_recipe({"model": {"path": "-"}, "data": {"path": "-"}}, "the defaults").to_dict()
    return {key: value for key, value in _flat_settings(tree).items() if key not in ("model.path", "data.path")}


def changed_settings(recipe: dict[str, object]) -> dict[str, object]:
    """Settings that are not the defaults. Unknown keys count, because a later version may have written the recipe."""
    defaults = _defaults()
    settings = _flat_settings(recipe)
    return {key: value for key, value in settings.items() if key not in defaults or value != defaults[key]}


def score_key(name: str) -> str:
    """The key of a metric in the ``scores`` of an evaluation."""
    return "exact_match" if name == "exact" else name


def inputs_sha256(answers: Sequence[object]) -> str:
    """Short SHA-256 over prompts and references, in any order."""
    inputs = sorted(json.dumps([get(row, "prompt"), get(row, "references")]) for row in answers)
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]


def read_run(run_dir: str | Path, *, evaluation: bool = False, metrics: bool = True) -> RunFiles:
    """Read what ``qvera train`` has written so far; eval.json, which can be large, only where asked for.

    InputError: the directory does not exist, or holds no run.
    """
    root = Path(run_dir)
    if not root.is_dir():
        raise InputError(f"{no_directory(root)} Give the directory that `qvera train` wrote its run into.")
    if not any((root / name).is_file() for name in RUN_FILES):
        if runs := runs_in(root):
            raise InputError(
                f"{root}: is a directory of runs. Name those that are meant: {first_of([*map(str, runs)], 8)}."
            )
        raise InputError(
            f"{root}: not a run directory: it holds none of {', '.join(RUN_FILES)}. Give the directory that "
            "`qvera train` printed (training.output_dir of the recipe)."
        )
    notes: list[str] = []
    info = _read_object(root / "run.json", "the summary of a run", notes)
    recipe_text, recipe = "", None
    try:
        recipe_text = (root / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
        recipe = yaml.load(recipe_text, Loader=_LOADER)
    except OSError as error:
        notes.append(f"recipe.yaml: can't be read ({error.strerror}).")
    except (yaml.YAMLError, RecursionError):
        notes.append("recipe.yaml is not valid YAML: it is shown as it is.")
    # A resumed run may write a step again. The later line is the one that led to the adapter.
    kinds: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}}
    for row in read_metrics(root / "metrics.jsonl", ("step",), notes) if metrics else ():
        if (kind := get_text(row, "kind")) in kinds:
            kinds[kind][int(row["step"])] = row
    train, evals = ([steps[key] for key in sorted(steps)] for steps in kinds.values())
    notes += not_finite_notes(train)
    weights = root / "adapter" / ADAPTER_WEIGHTS
    if is_replaced(get(info, "adapter", "sha256"), weights):
        notes.append(f"{REPLACED}.")
    return RunFiles(
        name=root.resolve().name,
        info=info,
        recipe_text=recipe_text,
        recipe=recipe if isinstance(recipe, dict) else {},
        train=train,
        evals=evals,
        adapter_file_bytes=weights.stat().st_size if weights.is_file() else None,
        evaluation=read_evaluation(root / "eval.json", weights, notes) if evaluation else None,
        notes=notes,
        has_checkpoint=has_checkpoint(root),
    )


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the run has saved a step or a round. Those that are not whole have a name that begins with a dot."""
    return any(path.name.startswith(("step-", "round-")) for path in run_dir.glob("checkpoints/*"))


def _read_object(path: Path, what: str, notes: list[str], keys: Sequence[str] = ()) -> dict[str, Any]:
    try:
        return read_json(path, what, keys, fix="The rest is shown without it.")
    except InputError as error:
        notes.append(str(error).replace(str(path), path.name))
        return {}


def read_evaluation(path: Path, weights: Path, notes: list[str]) -> Evaluation | None:
    """The scores in ``path`` for the adapter file ``weights``; None without any. Problems go into ``notes``."""
    if not path.exists():  # most runs have none, and lack nothing
        return None
    tree = _read_object(path, "what `qvera eval --json` writes", notes, keys=("subject", "metrics"))
    if not tree:
        return None
    about, metrics, rows = tree["subject"], tree["metrics"], tree.get("answers")
    if get_text(about, "column") == "Base":
        notes.append(f"{path.name} is of the base alone (`qvera eval --base`): it is left out.")
        return None
    listed = metrics if isinstance(metrics, list) else []
    by_key = {score_key(get_text(metric, "name")): metric for metric in listed}
    scores = {key: score for key in by_key if (score := get_number(tree, "scores", key)) is not None}
    if not scores:
        notes.append(f"{path.name} has no scores of answers, and nothing else of it is shown.")
        return None
    # the scores may not be those of the run's present adapter
    again = f"Remove it; `qvera eval ... --json {path}` writes it anew."
    try:
        if isinstance(about, dict) and "adapter_sha256" not in about:  # written by an older qvera
            if path.stat().st_mtime < weights.stat().st_mtime:
                notes.append(f"{path.name} is older than the run's adapter: its scores may be another's. {again}")
        elif get(about, "adapter_sha256") != file_sha256(weights):
            notes.append(
                f"{path.name} is of another adapter than the run has now: its scores are not this run's. {again}"
            )
    except OSError as error:
        notes.append(
            f"{path.name} can't be checked against the run's adapter ({error.strerror}): it may be of another one."
        )
    # an older qvera did not write the hash
    sha256 = get_text(about, "inputs_sha256") or (inputs_sha256(rows) if rows and isinstance(rows, list) else "")
    return Evaluation(
        scores=scores,
        labels={key: get_text(by_key[key], "label") or key for key in scores},
        signatures={key: get_text(by_key[key], "signature") for key in scores},
        scored_rows=get_number(tree, "scores", "scored_rows"),
        data=get_text(about, "data"),
        inputs_sha256=sha256,
        column=get_text(about, "column"),
        max_new_tokens=get_number(about, "max_new_tokens"),
    )


def parse_metrics(line: str | bytes, places: Sequence[str]) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is broken, or has no number under any of ``places`` (such as ``step``)."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = any(0 <= place < _MAX_STEP for key in places if (place := get_number(row, key)) is not None)
    return row if known else None


def read_metrics(path: Path, places: Sequence[str], notes: list[str], containing: str = "") -> Iterator[dict[str, Any]]:
    """The readable lines of a metrics.jsonl that contain ``containing``. Then ``notes`` says what was not readable."""
    unreadable: list[int] = []
    number, line = 0, "\n"
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if containing not in line or not line.strip():
                    continue
                row = parse_metrics(line, places)
                if row is not None:
                    yield row
                else:
                    unreadable.append(number)
    except OSError as error:
        notes.append(f"{path.name}: can't be read ({error.strerror}).")
    if unreadable and unreadable[-1] == number and not line.endswith("\n"):
        unreadable.pop()
        notes.append(f"The last line of {path.name} is cut off (the run was killed while writing): ignored.")
    if unreadable:
        shown = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        notes.append(f"{path.name}: {len(unreadable)} lines can't be read and are left out (line {shown}).")


def not_finite_notes(train: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on training steps whose loss is not finite, if there are any."""
    broken = [row["step"] for row in train if "loss" in row and get_number(row, "loss") is None]
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    sentence = "The training loss is not a finite number at step {:,}{}: left out of the curve."
    return [sentence.format(int(broken[0]), more)] if broken else []


_STATUS_TEXTS = {"stopped_early": "stopped early", "not_finite": "not finite", "no_rows": "no rows"}
"""Status in run.json → what people read, where that differs."""
_ENTRY_NUMBERS = ("rows", "eval_rows", "steps", "best_step", "train_loss_first", "train_loss_last")


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One adapter of a run that trained several, from run.json; None for a number that is not known."""

    name: str
    directory: str = ""  # in ``adapters/``, and the name of its page; "" where it has none
    status: str = ""  # "" for one that has not finished
    rows: float | None = None
    eval_rows: float | None = None
    steps: float | None = None
    best_step: float | None = None
    train_loss_first: float | None = None
    train_loss_last: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    flags: tuple[str, ...] = ()  # what a person should look at, in words
    tree: dict[str, Any] = field(default_factory=dict, repr=False)  # the whole entry of run.json

    @property
    def status_text(self) -> str:
        """The status as people read it."""
        return _STATUS_TEXTS.get(self.status, self.status or "unfinished")

    @property
    def ended_badly(self) -> bool:
        """Whether nothing of it can be used."""
        return self.status in ("not_finite", "no_rows")

    @property
    def remarks(self) -> list[str]:
        """What a person should look at: a bad end, and its flags."""
        return [*([self.status_text] if self.ended_badly else []), *self.flags]


def entry_of(info: object, name: str) -> dict[str, Any]:
    """The entry of one of several adapters in run.json; {} where there is none."""
    listed = get(info, "adapters")
    return next((entry for entry in listed if get(entry, "name") == name), {}) if isinstance(listed, list) else {}


def entries_of(info: object) -> list[AdapterEntry]:
    """The adapters of a run.json, in its order; broken entries are left out."""
    listed = get(info, "adapters")
    entries = []
    for tree in listed if isinstance(listed, list) else ():
        name, directory, flags = get_text(tree, "name"), get_text(tree, "directory"), get(tree, "flags")
        if not name:
            continue
        # run.json may come from anywhere, so a path that leads elsewhere is dropped
        is_plain = directory == Path(directory).name and not directory.startswith(".")
        entries.append(
            AdapterEntry(
                name=name,
                directory=directory if is_plain else "",
                status=get_text(tree, "status"),
                **{key: get_number(tree, key) for key in _ENTRY_NUMBERS},
                loss_before=get_number(tree, "eval_before", "loss"),
                loss_after=get_number(tree, "eval_after", "loss"),
                flags=tuple(text for flag in flags if (text := str(flag))) if isinstance(flags, list) else (),
                tree=tree,
            )
        )
    return entries


def by_remark(entries: Sequence[AdapterEntry]) -> dict[str, list[AdapterEntry]]:
    """The adapters that a person should look at, by what to look at."""
    found: dict[str, list[AdapterEntry]] = {}
    for entry in entries:
        for remark in entry.remarks:
            found.setdefault(remark, []).append(entry)
    return found


_CURVE_KEYS = {
    "train": ("step", "loss", "learning_rate", "grad_norm", "input_tokens"),
    "eval": ("step", "loss", "perplexity", "rows"),
}


class AdapterCurve:
    """One adapter's numbers in metrics.jsonl, packed because it may have a million lines; NaN: not known."""

    def __init__(self) -> None:
        self._values = {kind: array("d") for kind in _CURVE_KEYS}

    def add(self, row: dict[str, Any]) -> None:
        """Keep the numbers of a line."""
        if (kind := get_text(row, "kind")) in _CURVE_KEYS:
            numbers = (get_number(row, key) for key in _CURVE_KEYS[kind])
            self._values[kind].extend(math.nan if number is None else number for number in numbers)

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Rows of kind "train" or "eval" by rising step; of a repeated step, the last one."""
        values, keys = self._values[kind], _CURVE_KEYS[kind]
        by_step: dict[int, dict[str, Any]] = {}
        for start in range(0, len(values), len(keys)):
            row = dict(zip(keys, values[start : start + len(keys)], strict=True))
            by_step[int(row["step"])] = row | {"step": int(row["step"])}
        return [by_step[step] for step in sorted(by_step)]


@dataclass(frozen=True)
class ManyRun:
    """A run that trained several adapters, with their curves by name."""

    run: RunFiles  # the run as a whole; its steps are the rounds of the first process
    entries: list[AdapterEntry]  # in the order of the data. Of a killed run, the adapters that have begun
    curves: dict[str, AdapterCurve]

    def adapter_run(self, entry: AdapterEntry) -> RunFiles:
        """One adapter as a run of its own, for its page and for comparisons."""
        curve = self.curves.get(entry.name, AdapterCurve())
        info = {key: self.run.info.get(key) for key in ("model", "adapter", "device", "versions", "processes")}
        keys = ("steps", "best_step", "train_loss_first", "train_loss_last", "eval_before", "eval_after")
        status = "done" if entry.status in ("done", "stopped_early") else entry.status
        info |= {"status": status, "result": {key: entry.tree.get(key) for key in keys}}
        return dataclasses.replace(
            self.run, name=entry.name, info=info, train=curve.rows("train"), evals=curve.rows("eval"), notes=[]
        )


def trained_many(info: object, recipe: object) -> bool:
    """Whether a run trained several adapters."""
    named = get_text(recipe, "data", "adapter_column") or get(recipe, "data", "adapter_files") is True
    return bool(named) or isinstance(get(info, "adapters"), list)


def read_many(run_dir: str | Path, only: str | None = None) -> ManyRun:
    """Read a run of several adapters so far. ``only``: read the curve of this adapter alone, and no rounds.

    InputError: the directory does not exist, or holds no run.
    """
    root = Path(run_dir)
    run = read_run(root, metrics=False)
    entries = entries_of(run.info)
    rounds: dict[int, dict[str, Any]] = {}
    curves: dict[str, AdapterCurve] = {}
    written = "" if only is None else json.dumps(only)  # as the trainer writes it
    # a process k > 0 has its own records until the run ends; of a foreign directory, no link is followed
    others = [path for path in sorted(root.glob("metrics.rank-*.jsonl")) if path.is_file() and not path.is_symlink()]
    files = (root / "metrics.jsonl", *others)
    for row in chain.from_iterable(read_metrics(path, ("step", "round"), run.notes, written) for path in files):
        if row.get("kind") == "round":
            if not row.get("rank") and (number := get_number(row, "round")) is not None:
                rounds[int(number)] = row
        elif (name := get_text(row, "adapter")) and only in (None, name) and get_number(row, "step") is not None:
            curves.setdefault(name, AdapterCurve()).add(row)
    known = {entry.name for entry in entries}
    entries += [AdapterEntry(name) for name in curves if name not in known]
    weights = next((root / ADAPTERS / entry.directory / ADAPTER_WEIGHTS for entry in entries if entry.directory), None)
    size = weights.stat().st_size if weights is not None and weights.is_file() else None
    train = [round_as_step(rounds[number]) for number in sorted(rounds)]
    return ManyRun(dataclasses.replace(run, adapter_file_bytes=size, train=train), entries, curves)


def read_adapter_of_run(run_dir: Path, name: str) -> RunFiles:
    """One adapter of a run as a run of its own, with the scores of its eval.json.

    InputError: the run does not exist, or has no adapter of this name.
    """
    many = read_many(run_dir, only=name)
    entry = next((entry for entry in many.entries if entry.name == name), None)
    if entry is None:
        known = [entry.name for entry in many.entries]
        what = "has no adapter of this name" if known else "did not train many adapters"
        raise InputError(f"--adapter {shown_name(name)}: {run_dir} {what}{did_you_mean(name, known)}")
    run = many.adapter_run(entry)
    directory = run_dir / ADAPTERS / entry.directory
    if is_replaced(get(entry.tree, "sha256"), directory / ADAPTER_WEIGHTS):
        run.notes.append(f"{REPLACED}.")
    evaluation = read_evaluation(directory / "eval.json", directory / ADAPTER_WEIGHTS, run.notes)
    return dataclasses.replace(run, evaluation=evaluation)


def round_as_step(row: dict[str, Any]) -> dict[str, Any]:
    """A line of a round, with the keys of a step that `RunFiles.totals` needs."""
    seconds, speed = get_number(row, "step_seconds"), get_number(row, "tokens_per_second")
    tokens = None if seconds is None or speed is None else seconds * speed
    return {**row, "step": row["round"], "input_tokens": tokens}
