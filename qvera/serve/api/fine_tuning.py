"""/v1/fine_tuning/jobs, and the lists and errors that it shares with /v1/files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from qvera.serve.api.access import Access
from qvera.serve.api.errors import ApiError, bad_request, shortened
from qvera.serve.api.schemas import JobBody
from qvera.serve.api.service import Service, require, service_of
from qvera.serve.fine_tuning.records import Event, Job, Refused, TooMany, UnknownRecord
from qvera.utils.errors import RunFailed, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from qvera.serve.api.service import Service
    from qvera.serve.fine_tuning.jobs import Jobs

T = TypeVar("T")
_logger = logging.getLogger("qvera.serve")


def training_of(request: Request) -> tuple[Access, Service, Jobs]:
    """The sender, the service, and its jobs. Raises ApiError 403 if the sender or the server does not train."""
    access, service = require(request, "train"), service_of(request)
    if service.jobs is None:
        raise ApiError(403, "This server trains nothing; it was started without --training-dir.", code="forbidden")
    return access, service, service.jobs


async def answered(service: Service, work: Callable[[], T], unknown: str = "") -> T:
    """Run ``work``, which asks the database, in a thread. ``unknown``: the message where no record has the id.

    Raises:
        ApiError: 404 for an unknown record, 400 for an impossible request, 429 for too many jobs, 507 for a full disk.
    """
    try:
        return await service.in_thread(work, "disk")
    except UnknownRecord as error:
        raise ApiError(404, f"{unknown or 'There is no'} {shortened(str(error.args[0]))!r}.", "id") from None
    except Refused as error:
        raise bad_request(str(error), error.param, error.code) from None
    except TooMany:
        most = service.limits.open_jobs
        text = f"This key has {most} jobs that have not ended, the most that it may have; wait for one, or cancel one."
        raise too_many(text) from None
    except RunFailed as error:
        raise no_room(error) from None


def too_many(text: str) -> ApiError:
    """429: the key is at its limit. A retry within seconds does not help, but one after a minute may."""
    return ApiError(429, text, code="too_many", retry_seconds=60, retried=False)


def no_room(error: RunFailed) -> ApiError:
    """507: the disk is full or read-only."""
    _logger.warning("%s", error)
    text = "The server's disk is full, or can't be written. Nothing was changed."
    return ApiError(507, text, code="disk_full", retried=False)


async def page(
    service: Service, cards: Callable[[int], Sequence[dict[str, Any]]], limit: int, unknown: str
) -> JSONResponse:
    """A page of a list. ``cards`` is asked for ``limit`` + 1 records, to see whether more follow."""
    found = await answered(service, lambda: cards(limit + 1), unknown)
    shown = list(found[:limit])
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": shown, "has_more": len(found) > limit, **ends})


router = APIRouter()
_UNKNOWN = "There is no job"
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("/v1/fine_tuning/jobs", response_model=None)
async def create_job(request: Request, body: JobBody) -> Response:
    """Train an adapter on an uploaded file."""
    access, service, jobs = training_of(request)
    body.require_supported()

    def create() -> Job:
        from qvera.serve.fine_tuning.jobs import Asked

        _require_base(service, body.model)
        asked = Asked(
            base=service.base_name,
            training_file=body.training_file,
            validation_file=body.validation_file,
            suffix=body.suffix,
            seed=body.seed,
            hyperparameters=body.asked(),
            metadata=body.metadata or {},
            replace=body.replace,
        )
        most = None if service.keys is None else service.limits.open_jobs
        return jobs.create(asked, access.name, access.covers, most)

    return JSONResponse(_card(await answered(service, create)))


def _require_base(service: Service, model: str) -> None:
    if model in service.store.base_names:
        return
    hint = did_you_mean(shortened(model), [service.base_name])
    raise bad_request(
        f"model: expected the base, {service.base_name!r}{hint} A job starts with a fresh adapter; going on from one "
        "that was trained before is not supported.",
        "model",
        "model_not_found",
    )


@router.get("/v1/fine_tuning/jobs", response_model=None)
async def list_jobs(request: Request, limit: Limit = 20, after: str | None = None) -> Response:
    """The sender's jobs, the newest first; ``metadata[key]=value`` picks some."""
    access, service, jobs = training_of(request)
    wanted = {
        key.removeprefix("metadata[").removesuffix("]"): value
        for key, value in request.query_params.items()
        if key.startswith("metadata[") and key.endswith("]")
    }
    if len(wanted) > 16:
        raise bad_request("metadata: has at most 16 keys.", "metadata")

    def cards(most: int) -> list[dict[str, Any]]:
        return [_card(job) for job in jobs.database.jobs(access.name, wanted, after, most)]

    return await page(service, cards, limit, _UNKNOWN)


@router.get("/v1/fine_tuning/jobs/{job_id}", response_model=None)
async def describe_job(request: Request, job_id: str) -> Response:
    """One job."""
    access, service, jobs = training_of(request)
    return JSONResponse(_card(await answered(service, lambda: jobs.database.job(job_id, access.name), _UNKNOWN)))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel", response_model=None)
async def cancel_job(request: Request, job_id: str) -> Response:
    """End it; no model comes of it."""
    return await _change(request, lambda jobs, owner: jobs.cancel(job_id, owner))


@router.post("/v1/fine_tuning/jobs/{job_id}/pause", response_model=None)
async def pause_job(request: Request, job_id: str) -> Response:
    """Save it, and make room for others."""
    return await _change(request, lambda jobs, owner: jobs.pause(job_id, owner))


@router.post("/v1/fine_tuning/jobs/{job_id}/resume", response_model=None)
async def resume_job(request: Request, job_id: str) -> Response:
    """Go on with a paused job."""
    return await _change(request, lambda jobs, owner: jobs.resume(job_id, owner))


async def _change(request: Request, change: Callable[[Any, str], Job]) -> Response:
    access, service, jobs = training_of(request)
    return JSONResponse(_card(await answered(service, lambda: change(jobs, access.name), _UNKNOWN)))


@router.get("/v1/fine_tuning/jobs/{job_id}/events", response_model=None)
async def list_events(request: Request, job_id: str, limit: Limit = 20, after: str | None = None) -> Response:
    """What has happened to it, the newest first; each step with its loss."""
    access, service, jobs = training_of(request)

    def cards(most: int) -> list[dict[str, Any]]:
        jobs.database.job(job_id, access.name)
        return [_event_card(event) for event in jobs.database.events(job_id, after, most)]

    return await page(service, cards, limit, "There is no")


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", response_model=None)
async def list_checkpoints(request: Request, job_id: str, limit: Limit = 10, after: str | None = None) -> Response:
    """The models that came of it: one, once it has succeeded. States in between are no models."""
    access, service, jobs = training_of(request)

    def cards(_: int) -> list[dict[str, Any]]:
        job = jobs.database.job(job_id, access.name)
        if job.status != "succeeded" or after is not None:
            return []
        return [_checkpoint_card(job, jobs.database.last_losses(job_id))]

    return await page(service, cards, limit, _UNKNOWN)


def _card(job: Job) -> dict[str, Any]:
    from qvera.serve.fine_tuning.preparing import hyperparameters

    used = hyperparameters(job)
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


def _event_card(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created,
        "level": event.level,
        "message": event.message,
        "type": "message" if event.step is None else "metrics",
        "data": event.data or {},
    }


def _checkpoint_card(job: Job, losses: dict[str, float]) -> dict[str, Any]:
    return {
        "id": job.id.replace("ftjob", "ftckpt"),
        "object": "fine_tuning.job.checkpoint",
        "created_at": job.finished,
        "fine_tuned_model_checkpoint": job.model,
        "fine_tuning_job_id": job.id,
        "metrics": {"step": job.step, **losses},
        "step_number": job.step,
    }
