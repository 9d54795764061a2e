"""What the routes of files and of jobs share: whether this server trains, and the form of lists and refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse

from qvera.serve.api.errors import ApiError, bad_request, shortened
from qvera.serve.api.keys import Access
from qvera.serve.api.service import Service, require, service_of
from qvera.serve.fine_tuning.records import Refused, TooMany, UnknownRecord
from qvera.utils.errors import RunFailed

if TYPE_CHECKING:
    from qvera.serve.fine_tuning.jobs import Jobs

T = TypeVar("T")
_logger = logging.getLogger("qvera.serve")


def training_of(request: Request) -> tuple[Access, Service, Jobs]:
    """The sender, the service, and its jobs.

    Raises:
        ApiError: 403, the sender may not train, or this server does not.
    """
    access, service = require(request, "train"), service_of(request)
    if service.jobs is None:
        raise ApiError(403, "This server trains nothing; it was started without --training-dir.", code="forbidden")
    return access, service, service.jobs


async def answered(service: Service, work: Callable[[], T], unknown: str = "") -> T:
    """The result of what asks the database, in a thread.

    Args:
        unknown: what is said where there is no record of an id, or it is another owner's.

    Raises:
        ApiError: 404 for an unknown record, 400 for what can't be done, 429 for too many jobs, 507 for a full disk.
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
    """429: a key has as much as it may have. Coming back in a second does not help, but in a minute it may."""
    return ApiError(429, text, code="too_many", retry_seconds=60, retried=False)


def no_room(error: RunFailed) -> ApiError:
    """507: the disk is full, or can't be written."""
    _logger.warning("%s", error)
    text = "The server's disk is full, or can't be written. Nothing was changed."
    return ApiError(507, text, code="disk_full", retried=False)


async def page(
    service: Service, cards: Callable[[int], Sequence[dict[str, Any]]], limit: int, unknown: str
) -> JSONResponse:
    """A page of a list.

    Args:
        cards: at most so many records. It is called as `answered` does, for one more than ``limit``, which shows
            whether there are more.
        unknown: see `answered`.
    """
    found = await answered(service, lambda: cards(limit + 1), unknown)
    shown = list(found[:limit])
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return JSONResponse({"object": "list", "data": shown, "has_more": len(found) > limit, **ends})
