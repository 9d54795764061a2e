"""/v1/files: the rows that jobs train on, and the results that jobs write. A file is its key's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from qvera.serve.api.errors import ApiError
from qvera.serve.api.training import answered, no_room, page, too_many, training_of
from qvera.serve.api.upload import receive_file
from qvera.serve.fine_tuning.records import UnknownRecord
from qvera.utils.errors import RunFailed

if TYPE_CHECKING:
    from qvera.serve.fine_tuning.records import StoredFile

router = APIRouter()
_UNKNOWN = "There is no file"
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "additionalProperties": False,
                    "properties": {
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                        "file": {"type": "string", "format": "binary"},
                    },
                }
            }
        },
    }
}


@router.post("/v1/files", response_model=None, openapi_extra=_FORM)
async def upload(request: Request) -> Response:
    """Store a file of rows: a form with ``purpose`` (fine-tune) and ``file``."""
    access, service, jobs = training_of(request)
    with service.uploading(access) as open_uploads:
        if service.keys is not None:
            count = await answered(service, lambda: jobs.database.file_count(access.name, "fine-tune"))
            if count + open_uploads > service.limits.files:
                raise too_many(f"This key has {count} files, and may have {service.limits.files}; delete one.")
        try:
            file = await receive_file(request, service, jobs.directory, access.name)
        except RunFailed as error:
            raise no_room(error) from None
    return JSONResponse(_card(file))


@router.get("/v1/files", response_model=None)
async def list_files(
    request: Request,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The sender's files."""
    access, service, jobs = training_of(request)

    def cards(most: int) -> list[dict[str, Any]]:
        return [_card(file) for file in jobs.database.files(access.name, purpose, after, most, order == "desc")]

    return await page(service, cards, limit, _UNKNOWN)


@router.get("/v1/files/{file_id}", response_model=None)
async def describe_file(request: Request, file_id: str) -> Response:
    """One file."""
    access, service, jobs = training_of(request)
    return JSONResponse(_card(await answered(service, lambda: jobs.database.file(file_id, access.name), _UNKNOWN)))


@router.get("/v1/files/{file_id}/content", response_model=None)
async def file_content(request: Request, file_id: str) -> Response:
    """Its bytes, to be saved.

    They are never shown as a page: what somebody has uploaded may hold a script, and the server's own page holds a key.
    """
    access, service, jobs = training_of(request)

    def find() -> Path:
        place = jobs.directory.place(jobs.database.file(file_id, access.name))
        if not place.is_file():  # deleted since it was looked up
            raise UnknownRecord(file_id)
        return place

    place = await answered(service, find, _UNKNOWN)
    no_page = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(place, headers=no_page, media_type="application/octet-stream", filename=place.name)


@router.delete("/v1/files/{file_id}", response_model=None)
async def delete_file(request: Request, file_id: str) -> Response:
    """Delete it."""
    access, service, jobs = training_of(request)

    def delete() -> None:
        file = jobs.database.file(file_id, access.name)
        if (job := jobs.database.remove_file(file_id, access.name)) is not None:
            text = f"The job {job} needs this file; wait for it, or cancel it."
            raise ApiError(409, text, code="file_in_use", retried=False)
        jobs.directory.remove_file(file)

    await answered(service, delete, _UNKNOWN)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def _card(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
