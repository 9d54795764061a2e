"""/v1/files: rows to train on, and results of jobs. Each key sees its own files only.

An upload goes to the disk piece by piece, so it is never in memory as a whole.
"""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from qvera.serve.api.errors import ApiError, bad_request, shortened_name, too_many, unknown_id
from qvera.serve.api.fine_tuning import Trainer, Training, page
from qvera.serve.api.server import announces_more, read_body
from qvera.serve.fine_tuning.database import TRAINING, StoredFile
from qvera.serve.fine_tuning.directory import TrainingDirectory, Upload
from qvera.utils.errors import did_you_mean

router = APIRouter()
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


@router.post("/v1/files", openapi_extra=_FORM)
async def upload(training: Trainer) -> dict[str, Any]:
    """Store a file of rows: a form with ``purpose`` (fine-tune) and ``file``."""
    service, most = training.service, training.service.limits.files
    with service.uploading(training.access) as open_uploads:
        if service.keys is not None:
            held = await run_in_threadpool(training.database.files, training.owner, TRAINING, None, most, True)
            if len(held) + open_uploads > most:  # files that are still coming have no record yet
                raise too_many(f"This key has {len(held)} files, and may have {most}; delete one.")
        return _card(await receive_file(training))


@router.get("/v1/files")
def list_files(
    training: Trainer,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """List the sender's files."""
    found = training.database.files(training.owner, purpose, after, limit + 1, order == "desc")
    return page(list(map(_card, found)), limit)


@router.get("/v1/files/{file_id}")
def describe_file(training: Trainer, file_id: str) -> dict[str, Any]:
    """Describe one file."""
    return _card(training.database.file(file_id, training.owner))


@router.get("/v1/files/{file_id}/content")
def file_content(training: Trainer, file_id: str) -> FileResponse:
    """Send a file's bytes, to be saved.

    They are never shown as a page: what somebody has uploaded may hold a script, and the server's own page holds a key.
    """
    place = training.jobs.directory.place(training.database.file(file_id, training.owner))
    if not place.is_file():  # deleted since it was looked up
        raise unknown_id("file", file_id)
    no_page = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(place, headers=no_page, media_type="application/octet-stream", filename=place.name)


@router.delete("/v1/files/{file_id}")
def delete_file(training: Trainer, file_id: str) -> dict[str, Any]:
    """Delete a file, unless an unfinished job needs it."""
    file = training.database.file(file_id, training.owner)
    if (job := training.database.remove_file(file_id)) is not None:
        text = f"The job {job} needs this file; wait for it, or cancel it."
        raise ApiError(409, text, code="file_in_use", retried=False)
    training.jobs.directory.place(file).unlink(missing_ok=True)
    return {"id": file_id, "object": "file", "deleted": True}


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
_NAME_CHARACTERS = 1000  # of a file


async def receive_file(training: Training) -> StoredFile:
    """Store the file of a form. After an error nothing of it is left.

    Raises:
        ApiError: 400 for a malformed or wrong form; 408 if it is too slow, 413 if it is too large.
        InputError: no reader takes such a file.
        RunFailed: the disk is full.
        ClientGone: the client disconnected.
    """
    request, limits = training.request, training.service.limits
    if announces_more(request.headers, limits.file_bytes + _FORM_BYTES):
        raise _too_large(limits.file_bytes)
    content_type = request.headers.get("content-type", "")
    form = _Form(content_type, training.jobs.directory, training.owner, limits.file_bytes)
    try:
        more = True
        while more:
            try:
                block, more = await read_body(request.receive, _BLOCK_BYTES, limits.body_seconds)
            except TimeoutError:
                text = f"{_BLOCK_BYTES >> 10} KiB of the file did not arrive within {limits.body_seconds:g} s."
                raise ApiError(408, text) from None
            await run_in_threadpool(form.feed, block)
        return await run_in_threadpool(form.finish)
    finally:
        if form.upload is not None:
            form.upload.discard()


class _Form:
    """Parses a form with the parts ``purpose`` and ``file``; the file goes into an `Upload`."""

    def __init__(self, content_type: str, directory: TrainingDirectory, owner: str, most_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise bad_request("Expected a multipart/form-data body with the parts 'purpose' and 'file'.")
        self._directory, self._owner, self._most_bytes = directory, owner, most_bytes
        self.upload: Upload | None = None
        self._purpose, self._is_file = b"", False  # whether the part is the file
        self._header, self._disposition = (bytearray(), bytearray()), b""
        self._size, self._ended = 0, False
        calls: Any = {
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
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
        except FormParserError as error:
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

    def _end_header(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = bytearray(), bytearray()

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._disposition = b""  # the next part has its own
        name = options.get(b"name", b"").decode("utf-8", "replace")
        self._is_file = name == "file"
        if name == "file":
            if self.upload is not None:
                raise bad_request("file: is there twice; send one file.", "file")
            file_name = options.get(b"filename", b"").decode("utf-8", "replace")[:_NAME_CHARACTERS]
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
            return
        assert self.upload is not None
        if self.upload.size_bytes + len(data) > self._most_bytes:
            raise _too_large(self._most_bytes)
        self.upload.write(data)


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(413, f"The file is larger than {most_bytes:,} bytes, the most that is taken.", "file")
