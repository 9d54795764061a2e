"""/v1/files: rows to train on, and results of jobs. Each key sees its own files only.

An upload goes to the disk piece by piece, so it is never in memory as a whole.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from qvera.serve.api.errors import ApiError, bad_request, shortened_name
from qvera.serve.api.fine_tuning import api_errors, ask, page, too_many, training_of
from qvera.serve.api.server import announces_more, read_body
from qvera.serve.fine_tuning.database import TRAINING, StoredFile, UnknownRecord
from qvera.serve.fine_tuning.directory import TrainingDirectory, Upload
from qvera.utils.errors import did_you_mean

if TYPE_CHECKING:
    from qvera.serve.api.service import Service
    from qvera.serve.fine_tuning.jobs import Jobs

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
            most = service.limits.files
            count = len(await ask(request, lambda jobs, owner: jobs.database.files(owner, TRAINING, None, most, True)))
            if count + open_uploads > most:  # files that are still coming have no record yet
                raise too_many(f"This key has {count} files, and may have {most}; delete one.")
        with api_errors(service):
            file = await receive_file(request, service, jobs.directory, access.name)
    return JSONResponse(_card(file))


@router.get("/v1/files", response_model=None)
async def list_files(
    request: Request,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """List the sender's files."""

    def cards(jobs: Jobs, owner: str, most: int) -> list[dict[str, Any]]:
        return [_card(file) for file in jobs.database.files(owner, purpose, after, most, order == "desc")]

    return await page(request, limit, _UNKNOWN, cards)


@router.get("/v1/files/{file_id}", response_model=None)
async def describe_file(request: Request, file_id: str) -> Response:
    """Describe one file."""
    return JSONResponse(await ask(request, lambda jobs, owner: _card(jobs.database.file(file_id, owner)), _UNKNOWN))


@router.get("/v1/files/{file_id}/content", response_model=None)
async def file_content(request: Request, file_id: str) -> Response:
    """Send a file's bytes, to be saved.

    They are never shown as a page: what somebody has uploaded may hold a script, and the server's own page holds a key.
    """

    def find(jobs: Jobs, owner: str) -> Path:
        place = jobs.directory.place(jobs.database.file(file_id, owner))
        if not place.is_file():  # deleted since it was looked up
            raise UnknownRecord(file_id)
        return place

    place = await ask(request, find, _UNKNOWN)
    no_page = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(place, headers=no_page, media_type="application/octet-stream", filename=place.name)


@router.delete("/v1/files/{file_id}", response_model=None)
async def delete_file(request: Request, file_id: str) -> Response:
    """Delete a file, unless an unfinished job needs it."""

    def delete(jobs: Jobs, owner: str) -> None:
        file = jobs.database.file(file_id, owner)
        if (job := jobs.database.remove_file(file_id)) is not None:
            text = f"The job {job} needs this file; wait for it, or cancel it."
            raise ApiError(409, text, code="file_in_use", retried=False)
        jobs.directory.place(file).unlink(missing_ok=True)

    await ask(request, delete, _UNKNOWN)
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


_BLOCK_BYTES = 256 << 10
_FORM_BYTES = 64 << 10  # of all that is in a form beside its file
_PARTS = 8  # of a form; a right one has two
_FIELD_BYTES = 1000
_HEADER_BYTES = 4096


async def receive_file(request: Request, service: Service, directory: TrainingDirectory, owner: str) -> StoredFile:
    """Store the file of a form. After an error nothing of it is left.

    Raises:
        ApiError: 400 for a malformed or wrong form; 408 if it is too slow, 413 if it is too large.
        InputError: no reader takes such a file.
        RunFailed: the disk is full.
        ClientGone: the client disconnected.
    """
    limits = service.limits
    if announces_more(request.headers, limits.file_bytes + _FORM_BYTES):
        raise _too_large(limits.file_bytes)
    form = _Form(request.headers.get("content-type", ""), directory, owner, limits.file_bytes)
    try:
        more = True
        while more:
            try:
                block, more = await read_body(request.receive, _BLOCK_BYTES, limits.body_seconds)
            except TimeoutError:
                text = f"{_BLOCK_BYTES >> 10} KiB of the file did not arrive within {limits.body_seconds:g} s."
                raise ApiError(408, text) from None
            await service.in_thread(functools.partial(form.feed, block), "disk")
        return await service.in_thread(form.finish, "disk")
    finally:
        if form.upload is not None:
            form.upload.discard()


class _Form:
    """Parses a form with the parts ``purpose`` and ``file``; the file goes into an `Upload`."""

    def __init__(self, content_type: str, directory: TrainingDirectory, owner: str, most_bytes: int) -> None:
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser, parse_options_header

        self._error, self._options_of = FormParserError, parse_options_header
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise bad_request("Expected a multipart/form-data body with the parts 'purpose' and 'file'.")
        self._directory, self._owner, self._most_bytes = directory, owner, most_bytes
        self.upload: Upload | None = None
        self._purpose, self._is_file = b"", False  # whether the part is the file
        self._header, self._disposition = [b"", b""], b""
        self._parts = self._size = 0
        self._ended = False
        calls: Any = {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_content,
            "on_part_data": lambda data, start, end: self._add_content(data[start:end]),
            "on_end": lambda: setattr(self, "_ended", True),
        }
        try:
            self._parser = MultipartParser(options[b"boundary"], calls)
        except FormParserError as error:
            raise bad_request(f"The body is no multipart form: {error}.") from None

    def feed(self, data: bytes) -> None:
        """Parse the next bytes of the body, and write those of the file. Raises ApiError 400 or 413."""
        self._size += len(data)
        if self._size > self._most_bytes + _FORM_BYTES:
            raise _too_large(self._most_bytes)
        try:
            self._parser.write(data)
        except self._error as error:
            raise bad_request(f"The body is no multipart form: {error}.") from None
        if self._size - (self.upload.size_bytes if self.upload else 0) > _FORM_BYTES:
            raise bad_request(f"The form has more than {_FORM_BYTES:,} bytes beside its file.")

    def finish(self) -> StoredFile:
        """The stored file, once the whole body has been fed."""
        if not self._ended:
            raise bad_request("The form ends in the middle.")
        if self.upload is None or not self.upload.size_bytes:
            raise bad_request(f"file: is {'missing' if self.upload is None else 'empty'}.", "file")
        purpose = self._purpose.decode("utf-8", "replace")
        if purpose != TRAINING:
            raise bad_request(f"purpose: expected {TRAINING!r}, got {shortened_name(purpose)!r}.", "purpose")
        return self.upload.finish(purpose)

    def _begin_part(self) -> None:
        self._parts += 1
        self._header, self._disposition = [b"", b""], b""
        if self._parts > _PARTS:
            raise bad_request(f"The form has more than {_PARTS} parts.")

    def _add_header(self, part: int, data: bytes) -> None:
        self._header[part] += data
        if len(self._header[part]) > _HEADER_BYTES:
            raise bad_request(f"A header of the form is longer than {_HEADER_BYTES} bytes.")

    def _end_header(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def _begin_content(self) -> None:
        _, options = self._options_of(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = name == "file"
        if name == "file":
            if self.upload is not None:
                raise bad_request("file: is there twice; send one file.", "file")
            file_name = options.get(b"filename", b"").decode("utf-8", "replace")[:_FIELD_BYTES]
            if not file_name:
                raise bad_request("file: is a text without a file's name; with curl: -F file=@rows.jsonl.", "file")
            self.upload = Upload(self._directory, self._owner, file_name)
        elif name == "purpose":
            self._purpose = b""
        elif name.partition("[")[0] == "expires_after":
            raise bad_request("expires_after: is not supported here; files stay until they are deleted.", name)
        else:
            known = did_you_mean(shortened_name(name), ("file", "purpose"))
            raise bad_request(f"Unknown key {shortened_name(name)!r}{known}", shortened_name(name), "unknown_parameter")

    def _add_content(self, data: bytes) -> None:
        if not self._is_file:
            self._purpose += data
            if len(self._purpose) > _FIELD_BYTES:
                raise bad_request(f"purpose: is longer than {_FIELD_BYTES} bytes.", "purpose")
            return
        assert self.upload is not None
        if self.upload.size_bytes + len(data) > self._most_bytes:
            raise _too_large(self._most_bytes)
        self.upload.write(data)


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(413, f"The file is larger than {most_bytes:,} bytes, the most that is taken.", "file")
