"""Chunks of an answer as server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from qvera.serve.api.errors import ApiError


async def chunk_events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """An event for each chunk, ended by ``data: [DONE]``, or by an event with an error."""
    last = b"data: [DONE]\n\n"
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except ApiError as error:
        last = _event(error.body())
    yield last


def _event(chunk: dict[str, Any]) -> bytes:
    # one line whatever a text holds: JSON escapes line breaks, and ASCII has no other ones
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
