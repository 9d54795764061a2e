"""Read a run directory. What is missing or broken becomes a note on the page, not an error."""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qvera.config.schema import parse_recipe
from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256, read_json

Point = tuple[float, float | None]
"""x (a step, say) and y. A y of None is a gap in the curve."""

RUN_FILES = ("recipe.yaml", "metrics.jsonl", "run.json")
"""A directory that holds one of these holds a run."""
_MAX_STEP = 1e12


def get(tree: object, *keys: str) -> object:
    """``tree[key1][key2]...``, or None where a level is missing or not a mapping."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def get_number(tree: object, *keys: str) -> float | None:
    """The number at ``keys``, or None: missing, text, a bool, NaN, or beyond 1e100 (an axis would overflow)."""
    value = get(tree, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e100 else None  # False for NaN


def get_text(tree: object, *keys: str) -> str:
    """The value at ``keys`` as text that can be printed (JSON can hold half a character); "" where there is none."""
    value = get(tree, *keys)
    return "" if value is None or isinstance(value, dict | list) else str(value).encode(errors="replace").decode()


def series(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) of every row that has ``key``; a gap where `get_number` finds none."""
    return [(float(row["step"]), get_number(row, key)) for row in rows if key in row]


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run's answers, as ``qvera eval RUN --json RUN/eval.json`` writes them; "" for what it does not say.

    Scores, labels (for people) and signatures (how each was computed) are by metric, under the keys of the file's
    ``scores``. ``data`` says where the rows are from, ``column`` what was evaluated: Adapter, Export or Model.
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
class Run:
    """The files of a run directory.

    Attributes:
        info: run.json, or an empty mapping.
        recipe_text: recipe.yaml as it is, or "".
        recipe: recipe.yaml parsed, or an empty mapping.
        train: Rows of kind "train" in metrics.jsonl, by rising step, each step once.
        evals: Rows of kind "eval", likewise.
        evaluation: eval.json, where it was asked for and exists.
        notes: What could not be read, in sentences for the reader of the page.
        recorded: Totals of all steps, under the keys of ``totals``, where ``train`` has only some of them.
    """

    name: str
    info: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    adapter_file_bytes: int | None
    evaluation: Evaluation | None
    notes: list[str]
    recorded: dict[str, float | None] | None = None

    def number(self, *keys: str) -> float | None:
        """A number of run.json."""
        return get_number(self.info, *keys)

    def text(self, *keys: str) -> str:
        """A text of run.json."""
        return get_text(self.info, *keys)

    def setting(self, section: str, key: str) -> str:
        """A setting as run.json has it, or else the recipe."""
        return self.text(section, key) or get_text(self.recipe, section, key)

    @property
    def settings(self) -> dict[str, object]:
        """``section.key`` → value; keys that a recipe of an older qvera lacks have their defaults. {} without one."""
        return _defaults() | flat_settings(self.recipe) if self.recipe else {}

    def values(self, key: str) -> list[float]:
        """The finite values of every training step."""
        return [value for _, value in series(self.train, key) if value is not None]

    @functools.cached_property
    def totals(self) -> dict[str, float | None]:
        """Steps, seconds in them, input tokens per second, and peak memory (on a CPU, that private to the process).

        From run.json's result, or from metrics.jsonl where that has none (a killed run).
        """
        seconds, tokens = sum(self.values("step_seconds")), sum(self.values("input_tokens"))
        measured = self.recorded or {
            "steps": float(self.train[-1]["step"]) if self.train else None,
            "seconds": seconds or None,
            "tokens_per_second": tokens / seconds if tokens and seconds else None,
            "peak_bytes": max(self.values("peak_bytes"), default=None),
        }
        results = {key: self.number("result", key) for key in measured}
        return measured | {key: value for key, value in results.items() if value is not None}

    @property
    def mapped_bytes(self) -> float:
        """Memory-mapped weights, which come on top of the peak on a CPU."""
        return self.number("result", "mapped_bytes") or self.number("plan", "measured", "mapped_bytes") or 0.0

    @property
    def adapter_bytes(self) -> float | None:
        """Size of the adapter file."""
        return self.number("adapter", "file_bytes") or self.adapter_file_bytes

    @property
    def held_out_losses(self) -> list[Point]:
        """Held-out loss by step, from metrics.jsonl and, before and after training, from run.json."""
        points = dict(series(self.evals, "loss"))
        before, after = (self.number("result", when, "loss") for when in ("eval_before", "eval_after"))
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
    def best_step(self) -> int | None:
        """The step with the lowest held-out loss: run.json's, else the lowest in metrics.jsonl (of two or more)."""
        best = self.number("result", "best_step")
        if best is not None and 0 <= best < _MAX_STEP:
            return int(best)
        losses = [(loss, step) for step, loss in series(self.evals, "loss") if loss is not None]
        return int(min(losses)[1]) if len(losses) > 1 else None


def flat_settings(recipe: dict[str, object]) -> dict[str, object]:
    """``section.key`` → value, in the recipe's order."""
    return {
        f"{name}.{key}" if isinstance(keys, dict) else str(name): value
        for name, keys in recipe.items()
        for key, value in (keys.items() if isinstance(keys, dict) else [("", keys)])
    }


def _defaults() -> dict[str, object]:
    """``section.key`` → default of every setting that has one."""
    tree = parse_recipe({"model": {"path": "-"}, "data": {"path": "-"}}, "the defaults").to_dict()
    return {key: value for key, value in flat_settings(tree).items() if key not in ("model.path", "data.path")}


def changed_settings(recipe: dict[str, object]) -> dict[str, object]:
    """``section.key`` → value of each setting of an effective recipe that is not the default, in the recipe's order.

    A key that this version does not know counts as changed: the recipe may be a later version's.
    """
    defaults = _defaults()
    return {key: value for key, value in flat_settings(recipe).items() if key not in defaults or value != defaults[key]}


def score_key(name: str) -> str:
    """The key of a metric in the ``scores`` of an evaluation."""
    return "exact_match" if name == "exact" else name


def inputs_sha256(answers: Sequence[object]) -> str:
    """Short SHA-256 over prompts and references of an evaluation's rows, in any order."""
    inputs = sorted(json.dumps([get(row, "prompt"), get(row, "references")]) for row in answers)
    return hashlib.sha256("\n".join(inputs).encode()).hexdigest()[:16]


def read_run(run_dir: str | Path, *, evaluation: bool = False, metrics: bool = True) -> Run:
    """Read what ``qvera train`` has written so far; eval.json, which can be large, only where asked for.

    Args:
        metrics: read metrics.jsonl too.

    Raises:
        InputError: There is no such directory, or no run has written to it.
    """
    root = Path(run_dir)
    if not root.is_dir():
        raise InputError(f"{root}: no such directory. Give the directory that `qvera train` wrote its run into.")
    if not any((root / name).is_file() for name in RUN_FILES):
        raise InputError(
            f"{root}: not a run directory: it holds none of {', '.join(RUN_FILES)}. Give the directory that "
            "`qvera train` printed (training.output_dir of the recipe)."
        )
    notes: list[str] = []
    info = _read_object(root / "run.json", "the summary of a run", notes)
    recipe_text, recipe = _read_recipe(root / "recipe.yaml", notes)
    train, evals = _read_metrics(root / "metrics.jsonl", notes) if metrics else ([], [])
    weights = root / "adapter" / "adapter_model.safetensors"
    return Run(
        name=root.resolve().name,
        info=info,
        recipe_text=recipe_text,
        recipe=recipe,
        train=train,
        evals=evals,
        adapter_file_bytes=weights.stat().st_size if weights.is_file() else None,
        evaluation=read_evaluation(root / "eval.json", weights, notes) if evaluation else None,
        notes=notes,
    )


def _read_text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path.name}: can't be read ({error.strerror}).")
        return ""


def _read_object(path: Path, what: str, notes: list[str], keys: Sequence[str] = ()) -> dict[str, Any]:
    try:
        return read_json(path, what, keys, fix="The rest is shown without it.")
    except InputError as error:
        notes.append(str(error).replace(str(path), path.name))
        return {}


def read_evaluation(path: Path, weights: Path, notes: list[str]) -> Evaluation | None:
    """The scores in ``path``, of the adapter file ``weights``; None where it has none. ``notes`` gets what is wrong."""
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
    found = {key: get_number(tree, "scores", key) for key in by_key}
    scores = {key: value for key, value in found.items() if value is not None}
    if not scores:
        notes.append(f"{path.name} has no scores of answers, and nothing else of it is shown.")
        return None
    notes += _adapter_doubts(about, path, weights)
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


def _adapter_doubts(about: object, path: Path, weights: Path) -> list[str]:
    """Why the scores may not be those of the run's present adapter."""
    again = f"Remove {path.name} and run `qvera eval` again."
    try:
        if isinstance(about, dict) and "adapter_sha256" not in about:  # written by an older qvera
            older = path.stat().st_mtime < weights.stat().st_mtime
            return [f"{path.name} is older than the run's adapter: its scores may be another's. {again}"] * older
        if get(about, "adapter_sha256") == file_sha256(weights):
            return []
    except OSError as error:
        return [f"{path.name} can't be checked against the run's adapter ({error.strerror}): it may be of another one."]
    return [f"{path.name} is of another adapter than the run has now: its scores are not this run's. {again}"]


def _read_recipe(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    text = _read_text(path, notes)
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        notes.append(f"{path.name} is not valid YAML: it is shown as it is.")
        tree = None
    return text, tree if isinstance(tree, dict) else {}


def parse_row(line: str | bytes, places: Sequence[str]) -> dict[str, Any] | None:
    """A line of metrics.jsonl that says in one of ``places`` (``step``, say) where it belongs; None for another."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = any(0 <= place < _MAX_STEP for key in places if (place := get_number(row, key)) is not None)
    return row if known else None


def read_rows(path: Path, places: Sequence[str], notes: list[str], containing: str = "") -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that `parse_row` can read, one after the other.

    Then ``notes`` says what could not be read. Lines without the text ``containing`` are passed over.
    """
    unreadable: list[int] = []
    number, line = 0, "\n"
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if containing not in line or not line.strip():
                    continue
                row = parse_row(line, places)
                if row is not None:
                    yield row
                else:
                    unreadable.append(number)
    except OSError as error:
        notes.append(f"{path.name}: can't be read ({error.strerror}).")
    if unreadable and unreadable[-1] == number and not line.endswith("\n"):
        unreadable.pop()
        notes.append("The last line of metrics.jsonl is cut off (the run was killed while writing): ignored.")
    if unreadable:
        shown = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        notes.append(f"metrics.jsonl: {len(unreadable)} lines can't be read and are left out (line {shown}).")


def _read_metrics(path: Path, notes: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    # A resumed run may write a step again. The later line is the one that led to the adapter.
    kinds: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}}
    for row in read_rows(path, ("step",), notes):
        if get_text(row, "kind") in kinds:
            kinds[get_text(row, "kind")][int(row["step"])] = row
    train, evals = ([steps[key] for key in sorted(steps)] for steps in kinds.values())
    notes += not_finite_notes(train)
    return train, evals


def not_finite_notes(train: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on training steps whose loss is not finite, if there are any."""
    broken = [row["step"] for row in train if "loss" in row and get_number(row, "loss") is None]
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    sentence = "The training loss is not a finite number at step {:,}{}: left out of the curve."
    return [sentence.format(int(broken[0]), more)] if broken else []
