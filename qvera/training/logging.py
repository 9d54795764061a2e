"""What a run writes while it goes: metrics.jsonl, the progress bar, and other reporters."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from qvera.utils.atomic import flush, replace_text
from qvera.utils.errors import InputError
from qvera.utils.formatting import size


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each step once per kind, whatever was interrupted and resumed."""

    def __init__(self, path: Path, keep_through_step: int) -> None:
        """Open for appending; records after ``keep_through_step`` (of steps that will be run again) are dropped."""
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed run
                if record["step"] <= keep_through_step:
                    kept.append(json.dumps(record))
        replace_text(path, "".join(f"{line}\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Before a checkpoint: no later power cut may take records of steps that will not be run again."""
        flush(self.path)


class Progress:
    """A bar with loss, tokens/s, memory and time left on a terminal; a line now and then where there is none."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.console, self.steps = console, steps
        self.every = max(1, steps // 20)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, completed=done, facts="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def update(self, record: dict[str, Any]) -> None:
        facts = (
            f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s  {size(record['memory_bytes'])}"
        )
        self.bar.update(self.task, completed=record["step"], facts=facts)
        if not self.console.is_terminal and (record["step"] % self.every == 0 or record["step"] == self.steps):
            self.console.print(f"step {record['step']}/{self.steps}  {facts}")

    def note(self, text: str) -> None:
        self.bar.console.print(text)


class Trackers:
    """Other reporters by the names that transformers and accelerate give them; accelerate's trackers do the work."""

    def __init__(self, names: list[str], run_dir: Path, config: dict[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        wanted = list(names)
        if "auto" in wanted:
            wanted.remove("auto")
            if find_spec("tensorboard") is not None:
                wanted.append("tensorboard")
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

    def __enter__(self) -> Trackers:
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
        values = {f"{record['kind']}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
        for tracker in self.open:
            tracker.log(values, step=record["step"])

    def __exit__(self, *_: Any) -> None:
        for tracker in self.open:
            tracker.finish()
