"""What run.json says of a run, of one adapter or of many: what it was made of when it began, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvera.adapters.files.save_load import adapter_facts
from qvera.training.failures import has_finite_loss
from qvera.utils import accelerator, memory

if TYPE_CHECKING:
    from qvera.config.schema import Recipe
    from qvera.training.many import ManyTrainer
    from qvera.training.roster import AdapterRun
    from qvera.training.session import TrainingSession

GOT_WORSE = "got worse"
"""The held-out loss is higher after training than before."""
TOO_FEW_ROWS = "too few rows"
"""Fewer rows than one optimizer step takes."""
REPEATED = "held-out rows repeat training rows"
"""Some held-out rows are, token for token, also training rows of the same adapter."""


def begun_run(session: TrainingSession, started: str) -> dict[str, Any]:
    """The contents of run.json while the run goes; ``started``: when, in ISO format."""
    return {
        "format": 1,
        "status": "running",
        "started": started,
        "planned_steps": session.steps,
        "model": session.base.facts,
        "adapter": {**adapter_facts(session.model), "file_bytes": None},
        "data": {**session.datasets.stats.to_dict(), "sha256": session.inputs["rows"]},
        "versions": memory.versions(),
        "device": memory.device_name(session.device),
        "plan": None if session.plan is None else session.plan.to_dict(),
        "gradient_checkpointing": session.checkpointing,
        "processes": {"count": session.group.world_size, "deepspeed": session.recipe.deepspeed},
    }


def begun_samples(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of run.json while there are only those from before training."""
    return [{"prompt": one["prompt"], "reference": one["reference"], "before": one["answer"]} for one in answers]


def add_result(
    run: dict[str, Any],
    session: TrainingSession,
    status: str,
    after: dict[str, Any] | None,
    samples: Sequence[dict[str, Any]],
    extra: dict[str, Any],
) -> None:
    """Add what came out of a run to its run.json. All ranks call this together.

    Args:
        run: what `begun_run` returned.
        status: ``done``, ``interrupted`` or ``failed``.
        after: the scores after training, as `Trainer.score` returns them.
        samples: the answers after training.
        extra: what the hooks add to the result.
    """
    state = session.state
    run["status"] = status
    run["result"] = {
        "steps": state.step,
        "planned_steps": session.steps,
        "epochs": state.step / session.batches.per_epoch,
        "train_loss_first": state.train_loss_first,
        "train_loss_last": state.train_loss_last,
        "eval_before": state.before,
        "eval_after": after,
        "best_step": state.best_step,
        "stopped_early": state.stopped_early,
        "skipped_steps": state.skipped_steps,
        "halvings": state.halvings,
        "seconds": state.train_seconds,
        "tokens_per_second": state.input_tokens / state.train_seconds if state.train_seconds else None,
        **measurements(run, session),
        **extra,
    }
    run["samples"] = [
        {**before, "after": after["answer"]}
        for before, after in zip(begun_samples(state.samples_before), samples, strict=False)
    ]


def measurements(run: dict[str, Any], session: TrainingSession) -> dict[str, Any]:
    """Peak memory, for the result in run.json; also added to its plan and processes. All ranks call this together."""
    watch = session.watch
    mapped_bytes = 0 if accelerator.is_accelerator(session.device) else memory.mapped_weights_bytes()
    run["processes"]["ranks"] = session.group.gather({"host": session.group.host, "peak_bytes": watch.peak_bytes})
    if session.plan is not None:
        run["plan"]["measured"] = session.plan.measured(watch.peak_bytes, mapped_bytes, watch.peak_tensor_bytes)
    return {"peak_bytes": watch.peak_bytes, "mapped_bytes": mapped_bytes}


def adapter_result(run: AdapterRun, recipe: Recipe) -> dict[str, Any]:
    """An adapter's entry in run.json. ``unfinished`` is the status of one that is still to be trained."""
    state = run.state
    flags = []
    before, after = state.before, run.after
    if before is not None and after is not None and has_finite_loss(before) and after["loss"] > before["loss"]:
        flags.append(GOT_WORSE)
    if len(run.rows.train) < recipe.training.global_batch_size:
        flags.append(TOO_FEW_ROWS)
    if run.rows.repeated_rows:
        flags.append(REPEATED)
    return {
        "name": run.name,
        "directory": run.directory,
        "status": run.status if run.has_left else "unfinished",
        "rows": len(run.rows.train),
        "eval_rows": len(run.rows.eval),
        "steps": state.step,
        "planned_steps": run.steps,
        "best_step": state.best_step,
        "train_loss_first": state.train_loss_first,
        "train_loss_last": state.train_loss_last,
        "eval_before": state.before,
        "eval_after": run.after,
        "flags": flags,
        **({} if run.reason is None else {"reason": run.reason}),
    }


def without_rows(name: str) -> dict[str, Any]:
    """The entry of an adapter all of whose rows were dropped or cut away."""
    empty = ("best_step", "train_loss_first", "train_loss_last", "eval_before", "eval_after")
    counts = ("rows", "eval_rows", "steps", "planned_steps")
    entry = {"name": name, "directory": None, "status": "no_rows"}
    return {**entry, **dict.fromkeys(counts, 0), **dict.fromkeys(empty), "flags": []}


def add_results(run: dict[str, Any], trainer: ManyTrainer, status: str, entries: Sequence[dict[str, Any]]) -> None:
    """Add what came out of a run to its run.json. All ranks call this together.

    Args:
        run: what `run_json.begun_run` returned.
        status: ``done``, ``interrupted`` or ``failed``.
        entries: of all adapters, in the order of the data.
    """
    rounds, seconds, tokens = zip(
        *trainer.group.gather([trainer.round, trainer.totals.seconds, trainer.totals.input_tokens]), strict=True
    )
    longest = max(seconds)
    run["status"] = status
    run["adapters"] = list(entries)
    run["result"] = {
        "rounds": max(rounds),
        "steps": sum(entry["steps"] for entry in entries),
        "planned_steps": sum(entry["planned_steps"] for entry in entries),
        "seconds": longest,
        "tokens_per_second": sum(tokens) / longest if longest else None,
        **measurements(run, trainer),
    }
    run["samples"] = []
