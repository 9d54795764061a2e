"""What run.json says of a run: what it was made of when it began, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qvera.adapters.files.save_load import adapter_facts
from qvera.utils import accelerator, memory

if TYPE_CHECKING:
    from qvera.training.session import TrainingSession


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
