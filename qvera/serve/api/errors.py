"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

import difflib
import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from qvera.serve.api.server import ClientGone
from qvera.serve.requests import Busy, EngineDead
from qvera.utils.errors import InputError, RunFailed

_logger = logging.getLogger("qvera.serve")

TINKER = "/api/v1/"
"""Paths of Tinker's API begin with this; its errors are ``{"detail": message}``."""
DOWNLOADS = f"{TINKER}downloads/"
"""Paths that need no key: Tinker's client sends none there. The token in them is one."""
_NAME_CHARACTERS = 200
_PARTS_OF_PYDANTIC = ("function-", "[key]", "constrained-", "literal[", "list[", "ToolBody", "FlatName")
_WORDS = {
    "a valid dictionary or object to extract fields from": "an object",
    " after validation": "",
    "Value error, ": "",
    "Unable to extract tag using discriminator": "Field required:",
}
"""pydantic's words → those for people."""
_FORMS = {"messages": '[{"role": "user", "content": "..."}]', "response_format": '{"type": "json_object"}'}
"""A key whose value has parts → such a value."""
_PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/responses"}
"""The key of a prompt → the path that takes it."""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A refused or failed call.

    Args:
        param: the key of the body that is wrong.
        code: OpenAI's error code, which clients look at.
        retry_seconds: when to ask again; None: asking again does not help.
        retried: False tells OpenAI's clients not to retry by themselves, as they do after 408, 409, 429 and 5xx.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
        retried: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_seconds is None else {"Retry-After": str(retry_seconds)}
        if not retried:
            self.headers["x-should-retry"] = "false"
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """The error object that OpenAI's clients read."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> Response:
        """The HTTP response to a call of a path."""
        body = {"detail": self.message} if path.startswith(TINKER) else self.body()
        text = json.dumps(body)  # ASCII: a message may quote half a character of a name
        return Response(text, self.status, headers=self.headers, media_type="application/json")


def shortened_name(name: str) -> str:
    """A client's name for a model, cut for a message if it is longer than any real one."""
    return name if len(name) <= _NAME_CHARACTERS else f"{name[:_NAME_CHARACTERS]}…"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400: the body can't be served as it is."""
    return ApiError(400, message, param, code)


def unknown_id(what: str, key: str) -> ApiError:
    """404: unknown ids and those of other keys look the same."""
    return ApiError(404, f"There is no {what} {shortened_name(key)!r}.", "id")


def too_many(text: str) -> ApiError:
    """429: the key is at its limit. A retry within seconds does not help, but one after a minute may."""
    return ApiError(429, text, code="too_many", retry_seconds=60, retried=False)


def require_room(what: str, count: int, most: int, more: int = 1) -> None:
    """Raise ApiError if a key with ``count`` may not have ``more``: 429, to be tried again soon, or 400 if never."""
    if more > most:
        text = f"This call asks for {more:,} {what}, and a key may have {most:,} open. Ask for fewer at once."
        raise bad_request(text)
    if count + more > most:
        text = f"This key has {count:,} {what} open, asks for {more:,} more, and may have {most:,}."
        raise ApiError(429, text, code="too_many_open", retry_seconds=1)


def add_handlers(app: FastAPI) -> None:
    """Give every error that a route raises OpenAI's form."""

    async def answer(request: Request, error: Exception) -> Response:
        return _as_api_error(request, error).response(request.url.path)

    own = ApiError, InputError, RunFailed, Busy, EngineDead, ClientGone
    for kind in (*own, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _keys(error: dict[str, Any]) -> list[str]:
    """The keys of a body that lead to an error of pydantic's, which names its functions and branches of unions too."""
    return [shortened_name(part) for part in map(str, error["loc"][1:]) if not part.startswith(_PARTS_OF_PYDANTIC)]


def _as_api_error(request: Request, error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        root = request.app.state.service.store.root
        # others need not know where it is
        return bad_request(str(error) if root is None else str(error).replace(f"{root}/", ""))
    if isinstance(error, RunFailed):
        _logger.warning("%s", error)
        text = "The server's disk is full, or can't be written. Nothing was changed."
        # Tinker's client asks until there is room; OpenAI's gives up after a few seconds, in which nothing changes
        return ApiError(507, text, code="disk_full", retried=request.url.path.startswith(TINKER))
    if isinstance(error, Busy):
        return ApiError(429, "As many requests wait as may wait; ask again later.", None, "queue_full", retry_seconds=1)
    if isinstance(error, EngineDead):
        return ApiError(503, f"The engine has ended: {error}")
    if isinstance(error, RequestValidationError):
        # A wrong value says more than a key that is missing beside it, and of a union the branch that got furthest.
        errors = sorted(error.errors(), key=lambda one: one["type"] == "missing")
        # of an object it says nothing that it is none of some words
        errors = [e for e in errors if e["type"] != "literal_error" or not isinstance(e["input"], dict)] or errors
        first: dict[str, Any] = errors[0]
        if first["type"] == "json_invalid":
            place = f"at character {first['loc'][-1] + 1}"  # FastAPI gives no line
            return bad_request(f"The body is not JSON: {first['ctx']['error'].removesuffix(' at')}, {place}.")
        if first["loc"] == ("body",) and first["type"] == "missing":
            return bad_request("The body is empty. Expected JSON.")
        if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
            return bad_request("The body is only read as JSON with the header Content-Type: application/json; send it.")
        wrong = [_keys(one) for one in errors if one["type"] != "missing"] or [_keys(first)]
        where = max((keys for keys in wrong if keys[:1] == wrong[0][:1]), key=len)
        text = ". Or: ".join(dict.fromkeys(one["msg"] for one in errors if _keys(one) == where))
        for theirs, ours in _WORDS.items():
            text = text.replace(theirs, ours)
        text = f"{'.'.join(where) or 'The body'}: {text}."
        if len(where) == 1 and where[0] in _FORMS and first["type"] != "missing":
            text += f" Such as {_FORMS[where[0]]}."
        text += " GET /v1/models lists the models." if first["type"] == "missing" and where == ["model"] else ""
        if first["type"] == "missing" and where[0] in _PATHS:
            others = [(key, path) for key, path in _PATHS.items() if key in error.body and path != request.url.path]
            text += "".join(f" {key!r} is a key of {path}." for key, path in others)
        return bad_request(text, where[0] if where else None)
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            asked, paths = request.url.path, request.app.openapi()["paths"]
            near = [path for path in paths if path.endswith(asked) or asked.endswith(path)]
            near = near or difflib.get_close_matches(asked, paths, 1, 0.85)
            hint = f" Did you mean {max(near, key=len)}?" if near else ""
            return ApiError(404, f"There is no such path; this server has those of /openapi.json.{hint}")
        detail, headers = str(error.detail), dict(error.headers or {})
        if detail == "There was an error parsing the body":  # FastAPI's words
            detail = "The body can't be read. Expected JSON in UTF-8."
        if error.status_code == 405:  # of several routes with this path, Starlette names the methods of the first
            places = request.app.openapi()["paths"].items()
            takes = [
                how.upper() for path, hows in places if compile_path(path)[0].match(request.url.path) for how in hows
            ]
            headers |= {"Allow": ", ".join(takes)} if takes else {}
            detail = f"{request.method}: this path takes {' and '.join(takes) or headers.get('Allow')}."
        refused = ApiError(error.status_code, detail)
        refused.headers.update(headers)
        return refused
    if isinstance(error, ClientGone):
        return ApiError(499, "The client has gone.")
    return ApiError(500, "The server failed; its log says why.")
