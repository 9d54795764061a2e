"""The chat page at /: three files of our own, without a build step. Nothing comes from other hosts."""

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

_DIRECTORY = Path(__file__).parent
_FILES = {"/": "index.html", "/page/page.css": "page.css", "/page/page.js": "page.js"}
PAGE_PATHS = tuple(_FILES)
"""These hold no secret, so they need no key. The page's calls to the server do."""
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # what a model says is shown as text; should markup ever get in, it can load and run nothing
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add the routes of the page and its two files."""
    for path, name in _FILES.items():
        app.get(path, include_in_schema=False)(_answer(_DIRECTORY / name))


def _answer(file: Path) -> Callable[[], FileResponse]:
    def answer() -> FileResponse:
        return FileResponse(file, headers=_HEADERS, media_type=_TYPES[file.suffix])

    return answer
