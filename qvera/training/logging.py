"""What a run writes while it goes: metrics.jsonl, progress on the console, and other trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from qvera.utils.errors import InputError
from qvera.utils.files import disk_errors, flush, plain_json, replace_text
from qvera.utils.formatting import size
from qvera.utils.memory import Shortage


def metrics_path(run_dir: Path, rank: int) -> Path:
    """The file of a process's records, of those that write their own; when a run ends, the first one's has all."""
    return run_dir / (f"metrics.rank-{rank:05d}.jsonl" if rank else "metrics.jsonl")


def join_records(run_dir: Path, processes: int) -> None:
    """Put the records of all processes into metrics.jsonl. RunFailed where the disk is full; nothing is lost."""
    first, *others = [metrics_path(run_dir, rank) for rank in range(processes)]
    with disk_errors(str(first), "Checkpoints are kept; mend that and go on with --resume."):
        for path in [path for path in others if path.exists()]:
            replace_text(first, first.read_text(encoding="utf-8") + path.read_text(encoding="utf-8"))
            path.unlink()


def read_records(path: Path, unit: str = "step") -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl that have their ``unit``; lines that a killed run left half are passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get(unit), int):
            yield record


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each step once per kind, also after interruptions."""

    def __init__(self, path: Path, last_step: int, unit: str = "step", rank: int = 0, again: str | None = None) -> None:
        """Open for appending; records after ``last_step`` are dropped, since those steps are run again.

        ``unit``: numbers the records, ``step`` or ``round``. ``rank``: of this process; records with another rank are
        kept. ``again``: a kind of record of ``last_step`` that is dropped too.
        """
        self.path = path

        def is_kept(record: dict[str, Any]) -> bool:
            is_behind = record[unit] < last_step + (again is None or record.get("kind") != again)
            return is_behind or record.get("rank", 0) != rank

        lines = [json.dumps(record) for record in read_records(path, unit) if is_kept(record)]
        with self._disk_full():
            replace_text(path, "".join(f"{line}\n" for line in lines))

    def write(self, *records: dict[str, Any]) -> None:
        """Append records. RunFailed where the disk is full or read-only."""
        with self._disk_full(), open(self.path, "a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(plain_json(record)) + "\n" for record in records))

    def flush(self) -> None:
        """Before a checkpoint: a power cut may not take records of steps that will not be run again."""
        with self._disk_full():
            flush(self.path)

    def _disk_full(self) -> AbstractContextManager[None]:
        return disk_errors(str(self.path), "Checkpoints are kept; mend that and go on with --resume.")


def repeat_line(record: dict[str, Any]) -> str | None:
    """The console's line about a step that is taken again; None for another record."""
    if record["kind"] == "skipped":
        scale = f"{record['loss_scale']:,.0f}"
        return (
            f"step {record['step']}: the gradient overflowed in float16 at a loss scale of {scale}. It is taken again "
            "with half of it."
        )
    if record["kind"] == "out_of_memory":
        shortage = Shortage(record["asked_bytes"], record["free_bytes"])
        unit = "rows" if "pass_rows" in record else "tokens"
        return (
            f"step {record['step']}: memory ran out ({shortage}). It is taken again with at most "
            f"{record[f'pass_{unit}']:,} {unit} in a pass, and so are later ones."
        )
    return None


def step_facts(record: dict[str, Any]) -> str:
    """What stands behind the count of steps: loss, speed, memory."""
    reward = f"reward {record['reward']:.4f}, " if "reward" in record else ""
    speed = f"{record['tokens_per_second']:,.0f} tokens/s, {size(record['memory_bytes'])}"
    return f"{reward}loss {record['loss']:.4f}, {speed}"


class Trackers:
    """Other trackers, by the names that transformers and accelerate give them; accelerate's do the work."""

    def __init__(self, names: list[str], run_dir: Path, config: dict[str, Any]) -> None:
        """Check the names; nothing is opened yet. InputError where a tracker is not known or not installed."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        auto = ["tensorboard"] if "auto" in names and find_spec("tensorboard") is not None else []
        wanted = [name for name in names if name != "auto"] + auto
        known = {str(kind): cls for kind, cls in LOGGER_TYPE_TO_CLASS.items()}
        for name in wanted:
            if name not in known:
                raise InputError(
                    f"training.report_to: there is no reporter {name!r}; known: {', '.join(sorted(known))}, auto."
                )
            if find_spec(name) is None:
                raise InputError(f"training.report_to: {name} is not installed; install it or remove it from the list.")
        self.run_dir, self.config = run_dir, config
        self.classes = [known[name] for name in wanted]
        self.open: list[Any] = []

    def __enter__(self) -> Self:
        if self.classes:
            from accelerate import PartialState

            os.environ.setdefault("ACCELERATE_USE_CPU", "false")
            PartialState()  # accelerate's trackers ask it which process they are in
        for cls in self.classes:
            directory = {"logging_dir": str(self.run_dir)} if cls.requires_logging_directory else {}
            name = "tensorboard" if cls.name == "tensorboard" else self.run_dir.name
            tracker = cls(name, **directory)
            if hasattr(tracker, "start"):  # accelerate 1.12 and later open a tracker in a step of its own
                tracker.start()
            sections = {s: keys if isinstance(keys, dict) else {"": keys} for s, keys in self.config.items()}
            flat = {f"{s}.{k}".rstrip("."): str(v) for s, keys in sections.items() for k, v in keys.items()}
            tracker.store_init_configuration(flat)
            self.open.append(tracker)
        return self

    def log(self, record: dict[str, Any]) -> None:
        """Hand a record of metrics.jsonl to every tracker."""
        values = {f"{record['kind']}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
        for tracker in self.open:
            tracker.log(values, step=record["step"])

    def __exit__(self, *_: object) -> None:
        for tracker in self.open:
            tracker.finish()
