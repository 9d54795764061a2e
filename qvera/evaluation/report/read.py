"""From a run directory to numbers. Tolerant: what is missing or broken becomes a note on the page, not an error."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qvera.utils.errors import InputError
from qvera.utils.files import file_sha256

_FILES = ("recipe.yaml", "metrics.jsonl", "run.json")


@dataclass(frozen=True)
class Evaluation:
    """How a run's answers were scored: what ``qvera eval RUN --json RUN/eval.json`` left there.

    Attributes:
        scores: score of all answers by metric, under the keys of the file's ``scores``.
        labels: the same metrics for people.
        signatures: what made each score; "" where the file does not say.
        scored_rows: how many answers the scores are of.
        data: where the rows are from.
        inputs_sha256: as `inputs_sha256` gives it; "" where the file has neither that nor its rows.
        column: what was asked: Adapter, Export or Model.
        max_new_tokens: the longest answer.
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
    """What the files of a run directory say.

    Attributes:
        name: the directory's name.
        info: run.json, or an empty mapping.
        recipe_text: recipe.yaml as it is, or "".
        recipe: recipe.yaml parsed, or an empty mapping.
        train: one mapping a step (kind "train" in metrics.jsonl), by rising step, each step once.
        evals: the same for kind "eval".
        adapter_bytes: size of adapter/adapter_model.safetensors, where it is there.
        evaluation: eval.json, where that was asked for and is there.
        notes: sentences about what could not be read, for the reader of the page.
    """

    name: str
    info: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    adapter_bytes: int | None = None
    evaluation: Evaluation | None = None
    notes: list[str] = field(default_factory=list)


def pick(tree: Any, *keys: str) -> Any:
    """``tree[key1][key2]...``, or None where a level is missing or not a mapping."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def number(tree: Any, *keys: str) -> float | None:
    """The finite number at ``keys``, or None (missing, NaN, infinite, text, a bool)."""
    value = pick(tree, *keys)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def words(tree: Any, *keys: str) -> str:
    """The value at ``keys`` as text; "" where there is none."""
    value = pick(tree, *keys)
    return "" if value is None or isinstance(value, dict | list) else str(value)


def score_key(name: str) -> str:
    """The key of a metric in the ``scores`` of an evaluation."""
    return "exact_match" if name == "exact" else name


def inputs_sha256(answers: Sequence[Any]) -> str:
    """Short SHA-256 over prompts and references of an evaluation's rows, whatever their order."""
    asked = sorted(json.dumps([pick(row, "prompt"), pick(row, "references")]) for row in answers)
    return hashlib.sha256("\n".join(asked).encode()).hexdigest()[:16]


def read_run(run_dir: str | Path, *, evaluation: bool = False) -> Run:
    """Read what a run has written so far.

    Args:
        evaluation: read eval.json too, which can be large.

    Raises:
        InputError: no such directory, or one that no run has written to.
    """
    root = Path(run_dir)
    if not root.is_dir():
        raise InputError(f"{root}: no such directory. Give the directory that `qvera train` wrote its run into.")
    if not any((root / name).is_file() for name in _FILES):
        raise InputError(
            f"{root}: not a run directory: it holds none of {', '.join(_FILES)}. Give the directory that `qvera train` "
            "printed (training.output_dir of the recipe)."
        )
    notes: list[str] = []
    without = "the page is made from the run's other files, without scores and sample answers."
    info = _read_json(root / "run.json", notes, without)
    recipe_text, recipe = _read_recipe(root / "recipe.yaml", notes)
    train, evals = _read_metrics(root / "metrics.jsonl", notes)
    weights = root / "adapter" / "adapter_model.safetensors"
    return Run(
        name=root.resolve().name,
        info=info,
        recipe_text=recipe_text,
        recipe=recipe,
        train=train,
        evals=evals,
        adapter_bytes=weights.stat().st_size if weights.is_file() else None,
        evaluation=_read_evaluation(root / "eval.json", weights, notes) if evaluation else None,
        notes=notes,
    )


def _read_bytes(path: Path, notes: list[str], without: str) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        notes.append(f"There is no {path.name}: {without}")
    except OSError as error:
        notes.append(f"{path.name} can't be read ({error.strerror}): {without}")
    return None


def _read_json(path: Path, notes: list[str], without: str) -> dict[str, Any]:
    raw = _read_bytes(path, notes, without)
    if raw is None:
        return {}
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        notes.append(f"{path.name} is not valid JSON: it is left out, and the page is made from the run's other files.")
        return {}
    if not isinstance(tree, dict):
        notes.append(f"{path.name} does not hold a JSON object: it is left out.")
        return {}
    return tree


def _read_evaluation(path: Path, weights: Path, notes: list[str]) -> Evaluation | None:
    if not path.exists():  # most runs have none, and lack nothing
        return None
    noted = len(notes)
    tree = _read_json(path, notes, "its scores can't be shown.")
    if len(notes) > noted:
        return None
    subject = tree.get("subject")
    if not isinstance(subject, dict) or not isinstance(tree.get("metrics"), list):
        notes.append(f"{path.name} is not what `qvera eval --json` writes: it is left out.")
        return None
    if _text(subject, "column") == "Base":
        notes.append(f"{path.name} is of the base alone (`qvera eval --base`): it is left out.")
        return None
    metrics = {score_key(_text(metric, "name")): metric for metric in tree["metrics"]}
    found = {key: number(tree, "scores", key) for key in metrics}
    scores = {key: value for key, value in found.items() if value is not None}
    if not scores:
        notes.append(f"{path.name} has no scores of answers, which alone are shown of it.")
        return None
    doubt = _adapter_doubt(subject, path, weights)
    notes += [doubt] if doubt else []
    return Evaluation(
        scores=scores,
        labels={key: _text(metrics[key], "label") or key for key in scores},
        signatures={key: _text(metrics[key], "signature") for key in scores},
        scored_rows=number(tree, "scores", "scored_rows"),
        data=_text(subject, "data"),
        inputs_sha256=_text(subject, "inputs_sha256") or _inputs_by_rows(tree.get("answers")),
        column=_text(subject, "column"),
        max_new_tokens=number(subject, "max_new_tokens"),
    )


def _inputs_by_rows(rows: Any) -> str:
    """Of a file that an older qvera wrote."""
    try:
        return inputs_sha256(rows) if rows and isinstance(rows, list) else ""
    except RecursionError:
        return ""


def _text(tree: Any, key: str) -> str:
    """`words` that can be printed: JSON can hold halves of characters."""
    return words(tree, key).encode("utf-8", errors="replace").decode()


def _adapter_doubt(subject: dict[str, Any], path: Path, weights: Path) -> str:
    """Why the scores may not be those of the adapter that the run has now; "" where nothing says so."""
    again = f"Remove {path.name} and run `qvera eval` again."
    try:
        if "adapter_sha256" not in subject:  # written by an older qvera
            older = path.stat().st_mtime < weights.stat().st_mtime
            return f"{path.name} is older than the run's adapter: its scores may be another's. {again}" if older else ""
        if subject["adapter_sha256"] == file_sha256(weights):
            return ""
    except OSError as error:
        return f"{path.name} can't be held against the run's adapter ({error.strerror}): its scores may be another's."
    return f"{path.name} is of another adapter than the run has now: its scores are not this run's. {again}"


def _read_recipe(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    raw = _read_bytes(path, notes, "the recipe can't be shown.")
    if raw is None:
        return "", {}
    text = raw.decode("utf-8", errors="replace")
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        notes.append(f"{path.name} is not valid YAML: it is shown as it is.")
        return text, {}
    return text, tree if isinstance(tree, dict) else {}


def _read_metrics(path: Path, notes: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    raw = _read_bytes(path, notes, "there are no curves.")
    if raw is None:
        return [], []
    lines = raw.split(b"\n")
    unreadable: list[int] = []
    # A resumed run may write a step again; the later line is the one that led to the adapter.
    kinds: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}}
    for index, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if index == len(lines):
                notes.append("The last line of metrics.jsonl is cut off (the run was killed while writing): ignored.")
            else:
                unreadable.append(index)
            continue
        step = number(row, "step")
        steps = kinds.get(words(row, "kind"))
        if step is None or not 0 <= step < 1e12:
            unreadable.append(index)
        elif steps is not None:
            steps[int(step)] = row
    if unreadable:
        shown = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        notes.append(f"metrics.jsonl: {len(unreadable)} lines can't be read and are left out (line {shown}).")
    train, evals = ([steps[key] for key in sorted(steps)] for steps in kinds.values())
    broken = [row["step"] for row in train if "loss" in row and number(row, "loss") is None]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        notes.append(
            f"The training loss is not a finite number at step {int(broken[0]):,}{more}: left out of the curve."
        )
    return train, evals
