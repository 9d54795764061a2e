"""/v1/fine_tuning/jobs, and what it shares with /v1/files."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from qvera.serve.api.access import Action
from qvera.serve.api.errors import ApiError, bad_request, shortened_name
from qvera.serve.api.schemas import JobBody
from qvera.serve.api.service import Sender, sent_by
from qvera.serve.fine_tuning.database import Job, JobAction
from qvera.utils.errors import did_you_mean


class Training(Sender):
    """Who trains, and the jobs of the server."""

    def __init__(self, request: Request, action: Action) -> None:
        """Raises ApiError 403 if the sender or the server does not train."""
        super().__init__(request, action)
        if self.service.jobs is None:
            has_tinker = self.service.tinker is not None
            why = "with --tinker and without --adapters DIR" if has_tinker else "without --training-dir"
            raise ApiError(403, f"This server takes no files or jobs: it was started {why}.", code="forbidden")
        self.jobs, self.database = self.service.jobs, self.service.jobs.database


Trainer = Annotated[Training, sent_by(Training, "train")]


def page(cards: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page of a list. ``cards``: up to ``limit`` + 1, to see whether more follow."""
    shown = cards[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, "has_more": len(cards) > limit, **ends}


router = APIRouter()
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("/v1/fine_tuning/jobs")
def create_job(training: Trainer, body: JobBody) -> dict[str, Any]:
    """Train an adapter on an uploaded file."""
    body.require_supported()
    service = training.service
    if body.model not in service.store.base_names:
        hint = did_you_mean(shortened_name(body.model), [service.base_name])
        raise bad_request(
            f"model: expected the base, {service.base_name!r}{hint} A job starts with a fresh adapter; going on from "
            "one that was trained before is not supported.",
            "model",
            "model_not_found",
        )
    job = Job(
        owner=training.owner,
        model=body.suffix or "",
        base=service.base_name,
        training_file=body.training_file,
        validation_file=body.validation_file,
        seed=body.seed,
        asked=body.asked(),
        replaces=body.replace,
        metadata=body.metadata or {},
    )
    most = None if service.keys is None else service.limits.open_jobs
    return _card(training.jobs.create(job, training.access.covers, most))


@router.get("/v1/fine_tuning/jobs")
def list_jobs(training: Trainer, limit: Limit = 20, after: str | None = None) -> dict[str, Any]:
    """List the sender's jobs, the newest first; ``metadata[key]=value`` picks some."""
    wanted = {
        key.removeprefix("metadata[").removesuffix("]"): value
        for key, value in training.request.query_params.items()
        if key.startswith("metadata[") and key.endswith("]")
    }
    if len(wanted) > 16:
        raise bad_request("metadata: has at most 16 keys.", "metadata")
    return page([_card(job) for job in training.database.jobs(training.owner, wanted, after, limit + 1)], limit)


@router.get("/v1/fine_tuning/jobs/{job_id}")
def describe_job(training: Trainer, job_id: str) -> dict[str, Any]:
    """Describe one job."""
    return _card(training.database.job(job_id, training.owner))


@router.post("/v1/fine_tuning/jobs/{job_id}/{how}")
def change_job(training: Trainer, job_id: str, how: JobAction) -> dict[str, Any]:
    """Cancel a job, pause it, which saves it and makes room for others, or go on with a paused one."""
    return _card(training.jobs.change(job_id, training.owner, how))


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
def list_events(training: Trainer, job_id: str, limit: Limit = 20, after: str | None = None) -> dict[str, Any]:
    """List what has happened to a job, the newest first; each step with its loss."""
    training.database.job(job_id, training.owner)
    cards = [
        {
            "id": event.id,
            "object": "fine_tuning.job.event",
            "created_at": event.created,
            "level": event.level,
            "message": event.message,
            "type": "message" if event.step is None else "metrics",
            "data": event.data or {},
        }
        for event in training.database.events(job_id, after, limit + 1)
    ]
    return page(cards, limit)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
def list_checkpoints(training: Trainer, job_id: str, limit: Limit = 10, after: str | None = None) -> dict[str, Any]:
    """List the models that came of a job: one, once it has succeeded. States in between are no models."""
    job = training.database.job(job_id, training.owner)
    card = {
        "id": job.id.replace("ftjob", "ftckpt"),
        "object": "fine_tuning.job.checkpoint",
        "created_at": job.finished,
        "fine_tuned_model_checkpoint": job.model,
        "fine_tuning_job_id": job.id,
        "metrics": {"step": job.step, **training.database.last_losses(job_id, job.step)},
        "step_number": job.step,
    }
    return page([card] if job.status == "succeeded" and after is None else [], limit)


def _card(job: Job) -> dict[str, Any]:
    training = job.recipe["training"]
    epochs, multiplier = training["num_train_epochs"], job.asked.get("learning_rate_multiplier", "auto")
    used = {
        "n_epochs": "auto" if training["max_steps"] >= 0 else int(epochs) if float(epochs).is_integer() else epochs,
        "batch_size": training["global_batch_size"],
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
    }
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created,
        "finished_at": job.finished,
        "model": job.base,
        "fine_tuned_model": job.model if job.status == "succeeded" else None,
        "organization_id": job.owner,
        "status": "running" if job.status == "finishing" else job.status,
        "hyperparameters": used,
        "method": {"type": "supervised", "supervised": {"hyperparameters": used}},
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [] if job.result_file is None else [job.result_file],
        "trained_tokens": job.trained_tokens,
        "error": job.error,
        "seed": job.recipe["data"]["seed"],
        "estimated_finish": None,
        "integrations": [],
        "metadata": job.metadata,
    }
