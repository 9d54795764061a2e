"""What all benches share: the header of a result file, interleaved timing, the models that are compared."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch

from qvera.cli.quickstart import fetch_quickstart_base
from qvera.training.run_dir import plain_json
from qvera.utils import memory
from qvera.utils.files import versions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from qvera.config.schema import Recipe
    from qvera.models.loader import Base

    TrialT = TypeVar("TrialT", bound=DataclassInstance)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def header() -> dict[str, Any]:
    """Command, commit (None: a copy without `.git`), machine and versions: what a figure is worth nothing without."""
    git = lambda *a: subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path("bench") / script.name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    commit = git("rev-parse", "--short", "HEAD") if shutil.which("git") else ""
    return {
        "command": " ".join(["python", str(shown), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit + ("+changes" if git("status", "--porcelain", "qvera") else "") if commit else None,
        "device": memory.device_name(device),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "load_average_before": psutil.getloadavg()[0],
        "versions": versions(),
    }


def write_result(name: str, document: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write one JSON object a line; returns the path as a recipe has it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file; none where it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def do_missing(
    path: Path,
    kind: type[TrialT],
    plan: Callable[[], Iterable[TrialT]],
    do: Callable[[TrialT], dict[str, Any]],
    limit: int | None = None,
) -> None:
    """Do the trials of ``plan`` that have no line in ``path`` yet, and write a line for each.

    Args:
        path: of the lines. A line has the trial's fields, what ``do`` found, and the header; null for a number that
            is not finite.
        kind: the class of the trials.
        plan: is asked anew after each trial, since later trials follow from the lines of earlier ones.
        do: does one trial, and returns what `train_facts` does and ``scores``, which may be None.
        limit: stop after as many trials.
    """
    now = header()
    facts = {key: now[key] for key in ("command", "date", "commit", "device", "threads", "versions")}
    names, done = [field.name for field in dataclasses.fields(kind)], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    while done != limit:
        stands = {tuple(line[name] for name in names) for line in read_lines(path)}
        trial = next((trial for trial in plan() if dataclasses.astuple(trial) not in stands), None)
        if trial is None:
            return
        line = {**dataclasses.asdict(trial), **do(trial), **facts}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain_json(line)) + "\n")
        shown = line["scores"] or {"held-out loss": line["held_out_loss"]}
        print(f"{trial}: {shown}", flush=True)
        done += 1


def best_rate(lines: Iterable[Mapping[str, Any]], rates: int, key: str = "learning_rate") -> float | None:
    """The learning rate with the lowest held-out loss, or None where fewer than ``rates`` were tried or all diverged.

    ``key``: of a line, what tells its rate from others.
    """
    tried = list(lines)
    losses = {float(line[key]): line["held_out_loss"] for line in tried if not diverged(line)}
    return min(losses, key=losses.__getitem__) if losses and len(tried) >= rates else None


def diverged(line: Mapping[str, Any]) -> bool:
    """Whether a trial's loss became NaN or infinite, which a line has as null."""
    return line["held_out_loss"] is None or not math.isfinite(line["held_out_loss"])


def mean_and_range(scores: Sequence[float], digits: int, diverged: int = 0) -> str:
    """The mean of some seeds with the lowest and the highest, as a table shows it, and how many more diverged."""
    if not scores:
        return "diverged" if diverged else ""
    more = [f"{min(scores):.{digits}f} to {max(scores):.{digits}f}"] if len(scores) > 1 else []
    more += [f"{diverged} more diverged"] if diverged else []
    return f"{statistics.mean(scores):.{digits}f}" + (f" ({', '.join(more)})" if more else "")


def train_facts(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Train a recipe in this process, or go on with what ``run_dir`` has of it.

    Returns:
        What a trial's line says of any run: ``trained`` numbers, ``file_bytes``, ``seconds``, ``peak_bytes``, the losses
        ``train_loss`` and ``held_out_loss``, and ``cpu_seconds`` of this process for the run and its evaluations, which
        other work on the machine changes little; None where a part of the run was there already. A run that diverged has
        a ``held_out_loss`` of infinity, and
        ``file_bytes`` None. ``base_fingerprint`` and ``data_sha256`` say what was read.
    """
    from rich.console import Console  # here: benches that measure memory do not train in their process

    from qvera.training.trainer import train
    from qvera.utils.errors import NotFinite

    record = run_dir / "run.json"
    run = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    used, begun = time.process_time(), (run_dir / "recipe.yaml").exists()
    if run.get("status") != "done":
        try:
            train(recipe, run_dir, resume=begun, console=Console(quiet=True))
        except NotFinite as error:
            print(error, file=sys.stderr)
        run = json.loads(record.read_text(encoding="utf-8"))
    after = run["result"]["eval_after"]
    return {
        "base_fingerprint": run["model"]["fingerprint"],
        "data_sha256": run["data"]["sha256"],
        "trained": run["adapter"]["trainable_parameters"],
        "file_bytes": run["adapter"]["file_bytes"],
        "seconds": run["result"]["seconds"],
        "cpu_seconds": None if begun else time.process_time() - used,
        "peak_bytes": run["result"]["peak_bytes"],
        "train_loss": run["result"]["train_loss_last"],
        "held_out_loss": math.inf if after is None or after["loss"] is None else after["loss"],
    }


def load_trained(recipe: Recipe) -> tuple[Base, Any]:
    """The recipe's base, and it with the adapter of the recipe's finished run."""
    from qvera.adapters.save_load import load_adapter
    from qvera.models.loader import load_base

    base = load_base(recipe.model)
    return base, load_adapter(base.model, Path(str(recipe.training.output_dir)) / "adapter", base)


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [" | ".join(titles), "|".join("---" for _ in titles), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def with_table(page: str, name: str, table: str) -> str:
    """A page's text with ``table`` between its marks ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``."""
    before, begin, rest = page.partition(f"<!-- {name}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    return f"{before}{begin}{table}\n{end}{after}"


def train_records(run_dir: Path) -> list[dict[str, Any]]:
    """The optimizer steps of a run, as its metrics.jsonl has them."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def interleaved(cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, dict[str, float]]:
    """Time the cases in turn, round after round, so that a slow moment of the machine hits them all.

    Returns:
        For each case ``median``, ``min`` and ``max`` in seconds over ``rounds``, and ``user_median`` and ``user_min`` of
        this process's user CPU seconds, which other work on the machine lengthens less.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    user: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, run in cases.items():
            began, user_began = time.perf_counter(), os.times().user
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - began)
                user[name].append(os.times().user - user_began)
        print(f"round {turn + 1} of {warmup + rounds}", file=sys.stderr)
    return {
        name: {
            "median": statistics.median(t),
            "min": min(t),
            "max": max(t),
            "user_median": statistics.median(user[name]),
            "user_min": min(user[name]),
        }
        for name, t in times.items()
    }


def smollm2() -> str:
    """Directory of the quickstart's base."""
    return str(fetch_quickstart_base(report=lambda text: print(text, file=sys.stderr)))


def perturb(model: torch.nn.Module, size: float = 0.05) -> None:
    """Move every trained number off its start: zero vectors would make some paths cheaper than they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter.add_(noise.to(parameter))
