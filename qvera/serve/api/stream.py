"""Server-sent events to one client, which may be slow or go away without anyone else noticing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from qvera.serve.api.errors import ApiError
from qvera.serve.api.generation import wait_until_gone

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class EventStream(Response):
    """A response of JSON chunks, ended by ``data: [DONE]``, or by a chunk with an error.

    A client that closes its connection ends it, and so does the end of one that takes nothing (`Limits.send_seconds`).
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], close: Callable[[], None]) -> None:
        """Take over ``chunks``; ``close`` is called at the end, however it comes."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks, self._close = chunks, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all chunks, or as many as the client takes."""
        gone = asyncio.create_task(wait_until_gone(receive))
        writing = asyncio.create_task(self._write(send))
        try:
            await asyncio.wait({gone, writing}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._close()  # first: a server that stops cancels what is awaited here
            gone.cancel()
            writing.cancel()
            await asyncio.gather(gone, writing, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b"data: [DONE]\n\n"
        try:
            async for chunk in self._chunks:
                await write(_event(chunk))
        except ApiError as error:
            last = _event(error.body())
        await write(last)
        await write(b"", more=False)


def _event(chunk: dict[str, Any]) -> bytes:
    # one line whatever a text holds: JSON escapes line breaks, and ASCII has no other ones
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
