"""What runs of one adapter and of many have in common: directory, lock, signals, metrics and their first files."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.distributed.init import restarted
from qvera.training.logging import MetricsLog, Trackers
from qvera.training.run_dir import check_run_dir, run_lock, write_run_json
from qvera.training.session import TrainingSession
from qvera.utils.atomic import disk_errors, replace_text
from qvera.utils.signals import StopRequests

if TYPE_CHECKING:
    from rich.console import Console

    from qvera.config.schema import Recipe
    from qvera.distributed.group import Group

RESTART_WAIT_SECONDS = 60.0
"""How long a restarted run waits for the lock of the process whose place it takes."""


@dataclasses.dataclass
class RunResult:
    """A finished run: its directory and the contents of its run.json."""

    run_dir: Path
    run: dict[str, Any]


class Run(TrainingSession):
    """A session with a run directory. `Trainer` trains one adapter in it, `many.trainer.ManyTrainer` many."""

    def __init__(self, recipe: Recipe, run_dir: Path, group: Group, console: Console | None = None) -> None:
        """See `TrainingSession`; the recipe's trackers are checked too."""
        super().__init__(recipe, run_dir, group, console)
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.resume = False
        self.signals = StopRequests()
        self.stopped_by: str | None = None
        self.log_file: MetricsLog | None = None
        self.on_step: Callable[[dict[str, Any]], object] | None = None
        self.callback_error: Exception | None = None
        self.run: dict[str, Any] = {}
        names = recipe.training.report_to if group.first else []
        self.trackers = group.agree(lambda: Trackers(names, run_dir, recipe.to_dict()))

    def open_run_dir(self, resume: bool) -> None:
        """Lock the run directory and check that it fits. Of a restarted run, what this launch has begun is resumed."""
        group, run_dir = self.group, self.run_dir
        # on some node; the one that takes the place of a lost node does not know that it is a restart
        again = bool(group.sum([float(restarted())])[0])

        def open_it() -> bool:
            begun = again and group.has_flag(f"begun {run_dir}") and (run_dir / "recipe.yaml").exists()
            wait_seconds = RESTART_WAIT_SECONDS if again else 0.0
            self.resources.enter_context(run_lock(run_dir, group.host, wait_seconds))
            check_run_dir(run_dir, self.recipe, resume or begun)
            return resume or begun

        self.resume = group.on_first(open_it)

    def open_files(self, last: int, unit: str = "step", again: str | None = None) -> None:
        """Open metrics.jsonl without the records after ``last``, which are made again, then write recipe.yaml.

        Args:
            last: step or round of the last records that are kept.
            unit: the key that numbers the records, ``step`` or ``round``.
            again: the kind of record of ``last`` that is made again too.

        Raises:
            RunFailed: the disk is full or read-only.
        """
        with disk_errors(str(self.run_dir), "No step was taken; mend that and start it again."):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.log_file = MetricsLog(self.run_dir / "metrics.jsonl", last, unit, again=again)
            replace_text(self.run_dir / "recipe.yaml", self.recipe.to_yaml())

    def write_records(self, *records: dict[str, Any]) -> None:
        """Write records to metrics.jsonl and, on rank 0, hand them to `on_step`, which may ask the run to stop.

        It stops as for a signal, at the end of a step: whatever the callback does, what is on disk is a run.
        """
        if self.log_file is None:
            return
        self.log_file.write(*records)
        if self.on_step is None or not self.group.first or self.callback_error is not None:
            return
        for record in records:
            try:
                if self.on_step(dict(record)) is not False:
                    continue
            except StopIteration:
                pass
            except Exception as error:  # raised once the step is saved (`trainer.train`)
                self.callback_error = error
            self.signals.asked = self.signals.asked or "on_step"
            return

    def write_begun(self, **known: Any) -> None:
        """Write run.json while the run goes; ``known``: what it has besides `begun_run`. All ranks call this."""
        self.run |= known
        self.group.on_first(lambda: write_run_json(self.run_dir, self.run))
