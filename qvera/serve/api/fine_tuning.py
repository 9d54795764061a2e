"""/v1/fine_tuning/jobs, and the lists and errors that it shares with /v1/files."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from qvera.serve.api.access import Access
from qvera.serve.api.errors import ApiError, bad_request, shortened_name
from qvera.serve.api.schemas import JobBody
from qvera.serve.api.service import Service, require, service_of
from qvera.serve.fine_tuning.database import Job, Refused, TooMany, UnknownRecord
from qvera.utils.errors import RunFailed, did_you_mean

if TYPE_CHECKING:
    from qvera.serve.fine_tuning.jobs import JobAction, Jobs

T = TypeVar("T")
_logger = logging.getLogger("qvera.serve")


def training_of(request: Request) -> tuple[Access, Service, Jobs]:
    """The sender, the service, and its jobs. Raises ApiError 403 if the sender or the server does not train."""
    access, service = require(request, "train"), service_of(request)
    if service.jobs is None:
        why = "without --training-dir" if service.tinker is None else "with --tinker and without --adapters DIR"
        raise ApiError(403, f"This server takes no files or jobs: it was started {why}.", code="forbidden")
    return access, service, service.jobs


@contextlib.contextmanager
def api_errors(service: Service, unknown: str = "There is no") -> Iterator[None]:
    """Raise ApiError for what the database and the disk raise: 404, 400, 429 or 507.

    ``unknown``: the message where no record has the id.
    """
    try:
        yield
    except UnknownRecord as error:
        raise ApiError(404, f"{unknown} {shortened_name(str(error.args[0]))!r}.", "id") from None
    except Refused as error:
        raise bad_request(str(error), error.param, error.code) from None
    except TooMany:
        most = service.limits.open_jobs
        text = f"This key has {most} jobs that have not ended, the most that it may have; wait for one, or cancel one."
        raise too_many(text) from None
    except RunFailed as error:
        _logger.warning("%s", error)
        text = "The server's disk is full, or can't be written. Nothing was changed."
        raise ApiError(507, text, code="disk_full", retried=False) from None


def too_many(text: str) -> ApiError:
    """429: the key is at its limit. A retry within seconds does not help, but one after a minute may."""
    return ApiError(429, text, code="too_many", retry_seconds=60, retried=False)


async def ask(request: Request, work: Callable[[Jobs, str], T], unknown: str = "There is no") -> T:
    """Run ``work`` on the jobs, for the sender (its key's name), in a thread. Raises ApiError as `api_errors`."""
    access, service, jobs = training_of(request)
    with api_errors(service, unknown):
        return await service.in_thread(lambda: work(jobs, access.name), "disk")


async def page(
    request: Request, limit: int, unknown: str, cards: Callable[[Jobs, str, int], Sequence[dict[str, Any]]]
) -> JSONResponse:
    """Answer with a page of a list. ``cards`` is asked for ``limit`` + 1 records, to see whether more follow."""
    found = await ask(request, lambda jobs, owner: cards(jobs, owner, limit + 1), unknown)
    shown = list(found[:limit])
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": shown, "has_more": len(found) > limit, **ends})


router = APIRouter()
_UNKNOWN = "There is no job"
Limit = Annotated[int, Query(ge=1, le=100)]


@router.post("/v1/fine_tuning/jobs", response_model=None)
async def create_job(request: Request, body: JobBody) -> Response:
    """Train an adapter on an uploaded file."""
    access, service, _ = training_of(request)
    body.require_supported()

    def create(jobs: Jobs, owner: str) -> dict[str, Any]:
        if body.model not in service.store.base_names:
            hint = did_you_mean(shortened_name(body.model), [service.base_name])
            raise bad_request(
                f"model: expected the base, {service.base_name!r}{hint} A job starts with a fresh adapter; going on "
                "from one that was trained before is not supported.",
                "model",
                "model_not_found",
            )
        job = Job(
            owner=owner,
            model=body.suffix or "",
            base=service.base_name,
            training_file=body.training_file,
            validation_file=body.validation_file,
            seed=body.seed,
            asked=body.asked(),
            replaces=body.replace,
            metadata=body.metadata or {},
        )
        return _card(jobs.create(job, access.covers, None if service.keys is None else service.limits.open_jobs))

    return JSONResponse(await ask(request, create))


@router.get("/v1/fine_tuning/jobs", response_model=None)
async def list_jobs(request: Request, limit: Limit = 20, after: str | None = None) -> Response:
    """List the sender's jobs, the newest first; ``metadata[key]=value`` picks some."""
    wanted = {
        key.removeprefix("metadata[").removesuffix("]"): value
        for key, value in request.query_params.items()
        if key.startswith("metadata[") and key.endswith("]")
    }

    def cards(jobs: Jobs, owner: str, most: int) -> list[dict[str, Any]]:
        if len(wanted) > 16:
            raise bad_request("metadata: has at most 16 keys.", "metadata")
        return [_card(job) for job in jobs.database.jobs(owner, wanted, after, most)]

    return await page(request, limit, _UNKNOWN, cards)


@router.get("/v1/fine_tuning/jobs/{job_id}", response_model=None)
async def describe_job(request: Request, job_id: str) -> Response:
    """Describe one job."""
    return JSONResponse(await ask(request, lambda jobs, owner: _card(jobs.database.job(job_id, owner)), _UNKNOWN))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel", response_model=None)
async def cancel_job(request: Request, job_id: str) -> Response:
    """End a job; no model comes of it."""
    return await _change(request, job_id, "cancel")


@router.post("/v1/fine_tuning/jobs/{job_id}/pause", response_model=None)
async def pause_job(request: Request, job_id: str) -> Response:
    """Save a job, and make room for others."""
    return await _change(request, job_id, "pause")


@router.post("/v1/fine_tuning/jobs/{job_id}/resume", response_model=None)
async def resume_job(request: Request, job_id: str) -> Response:
    """Go on with a paused job."""
    return await _change(request, job_id, "resume")


async def _change(request: Request, job_id: str, how: JobAction) -> Response:
    return JSONResponse(await ask(request, lambda jobs, owner: _card(jobs.change(job_id, owner, how)), _UNKNOWN))


@router.get("/v1/fine_tuning/jobs/{job_id}/events", response_model=None)
async def list_events(request: Request, job_id: str, limit: Limit = 20, after: str | None = None) -> Response:
    """List what has happened to a job, the newest first; each step with its loss."""

    def cards(jobs: Jobs, owner: str, most: int) -> list[dict[str, Any]]:
        jobs.database.job(job_id, owner)
        return [
            {
                "id": event.id,
                "object": "fine_tuning.job.event",
                "created_at": event.created,
                "level": event.level,
                "message": event.message,
                "type": "message" if event.step is None else "metrics",
                "data": event.data or {},
            }
            for event in jobs.database.events(job_id, after, most)
        ]

    return await page(request, limit, "There is no", cards)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", response_model=None)
async def list_checkpoints(request: Request, job_id: str, limit: Limit = 10, after: str | None = None) -> Response:
    """List the models that came of a job: one, once it has succeeded. States in between are no models."""

    def cards(jobs: Jobs, owner: str, _: int) -> list[dict[str, Any]]:
        job = jobs.database.job(job_id, owner)
        if job.status != "succeeded" or after is not None:
            return []
        card = {
            "id": job.id.replace("ftjob", "ftckpt"),
            "object": "fine_tuning.job.checkpoint",
            "created_at": job.finished,
            "fine_tuned_model_checkpoint": job.model,
            "fine_tuning_job_id": job.id,
            "metrics": {"step": job.step, **jobs.database.last_losses(job_id)},
            "step_number": job.step,
        }
        return [card]

    return await page(request, limit, _UNKNOWN, cards)


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
