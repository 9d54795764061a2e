"""What a finished job leaves: facts beside its adapter, and a CSV of its steps."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvera.serve.content import read_content
from qvera.serve.fine_tuning.records import Event, Job
from qvera.utils.atomic import disk_errors, replace_text
from qvera.utils.files import plain_json, try_read_json
from qvera.utils.paths import TRAINING_FACTS

if TYPE_CHECKING:
    from qvera.serve.fine_tuning.trainer import TrainedRun

_COLUMNS = ("step", "train_loss", "valid_loss", "learning_rate")


def metrics_of(record: dict[str, Any], steps: int) -> dict[str, Any]:
    """The numbers of a step by OpenAI's names, from a record of the trainer; one that is not finite is None."""
    found = {"step": record["step"], "total_steps": steps}
    if record["kind"] == "eval":
        found["valid_loss"] = record["loss"]
    else:
        found |= {"train_loss": record["loss"], "learning_rate": record.get("learning_rate")}
    return dict(plain_json(found))


def metrics_event(job_id: str, record: dict[str, Any], steps: int) -> Event:
    """The event of a step, or of its evaluation."""
    what = "validation" if record["kind"] == "eval" else "training"
    message = f"Step {record['step']:,}/{steps:,}: {what} loss={record['loss']:.4f}"
    return Event(job_id, message, data=metrics_of(record, steps), step=record["step"])


def steps_csv(metrics: Sequence[Event]) -> str:
    """A line for each step: its losses and its rate; empty where there is none."""
    lines: dict[int, dict[str, Any]] = {}
    for event in metrics:
        assert event.step is not None
        lines.setdefault(event.step, {}).update(event.data or {})
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines.values())
    return out.getvalue()


def write_facts(directory: Path, job: Job, run: TrainedRun) -> None:
    """Put what is known of a job's adapter beside it, for `qvera.serve.store.AdapterStore.facts`.

    Raises:
        RunFailed: the disk is full.
    """
    facts = {
        "format": 1,
        "adapter_sha256": read_content(directory).sha256,  # they are facts of these vectors only
        "job": job.id,
        "rows": len(run.rows.train),
        "eval_rows": len(run.rows.eval),
        "steps": run.state.step,
        "eval_before": run.state.before,
        "eval_after": run.after,
    }
    with disk_errors(str(directory), "The job goes on when there is room again."):
        replace_text(directory / TRAINING_FACTS, json.dumps(plain_json(facts), indent=1))


def maker_of(directory: Path) -> str | None:
    """The id of the job that made an adapter; None: none did, or nobody knows."""
    job = (try_read_json(directory / TRAINING_FACTS) or {}).get("job")
    return job if isinstance(job, str) else None
