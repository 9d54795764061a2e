"""The chat page at /. Three files of our own: no build step, and nothing from other hosts."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

_DIRECTORY = Path(__file__).parent
_HEADERS = {
    # what a model says is shown as text; should markup ever get in, it can load and run nothing
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TYPES = {"page.css": "text/css", "page.js": "text/javascript"}


def add_page(app: FastAPI) -> None:
    """Serve the page and its two files. They hold no secret, so they need no key; what they ask the server does."""

    def page() -> FileResponse:
        return FileResponse(_DIRECTORY / "index.html", headers=_HEADERS, media_type="text/html")

    app.get("/", include_in_schema=False)(page)
    for name, kind in _TYPES.items():
        app.get(f"/page/{name}", include_in_schema=False)(_file(name, kind))


def _file(name: str, kind: str):  # type: ignore[no-untyped-def]
    def file() -> FileResponse:
        return FileResponse(_DIRECTORY / name, headers=_HEADERS, media_type=kind)

    return file
