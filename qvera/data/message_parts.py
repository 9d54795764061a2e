"""The content of a message: texts, and images as paths of files, bytes or ``data:`` URLs (decoded in `images`)."""

from __future__ import annotations

import base64
import binascii
import re
from collections import deque
from pathlib import Path
from typing import Any

from qvera.data.readers import describe
from qvera.utils.errors import InputError

PLACE = "<image>"
"""Where a text has this, the next image of the column ``images`` stands."""
_IMAGE_KEYS = ("image", "image_url", "bytes", "base64", "path", "url")
"""Keys of a content part that may hold its image."""


def read_parts(
    value: object, where: str, column: deque[Any], directory: Path
) -> tuple[tuple[dict[str, str], ...], tuple[str | bytes, ...]]:
    """The parts of a message as templates take them, and its images.

    Args:
        value: text, or OpenAI's content parts.
        where: the message, for errors.
        column: the row's images that have no place yet; those that no part holds are taken from it.
        directory: where relative paths start.

    Raises:
        InputError: neither text nor parts, a part of another kind, or an image is missing or none (`read_image`).
    """
    if isinstance(value, str):
        pieces = re.split(f"({PLACE})", value) if column else [value]
        value = [{"type": "image"} if piece == PLACE else {"type": "text", "text": piece} for piece in pieces if piece]
    elif not isinstance(value, list):
        raise InputError(f"{where} must be text, got {describe(value)}. Fix the row.")
    parts: list[dict[str, str]] = []
    images: list[str | bytes] = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else describe(part)
        if kind in ("image", "image_url"):
            held = next((key for key in _IMAGE_KEYS if part.get(key)), None)
            if held is None and not column:
                raise InputError(
                    f"{where}: the image of a part is missing. Expected a path, bytes or a data: URL in its key "
                    "image, or an image for each such part, in order, in a column images."
                )
            shown = column.popleft() if held is None else part[held]
            images.append(read_image(shown, where, directory, is_encoded=held in ("bytes", "base64")))
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise InputError(f"{where}: a part of it is {kind!r}; only texts and images are read. Remove it.")
    return tuple(parts), tuple(images)


def read_image(value: Any, where: str, directory: Path, is_encoded: bool = False) -> str | bytes:
    """An image's bytes, or its file's path, which starts at ``directory`` if it is relative. ``is_encoded``: by base64.

    Raises InputError: neither, an address of the web, or no base64.
    """
    if isinstance(value, dict):  # as `datasets.Image` stores it, or OpenAI's {"url": ...}
        is_encoded = bool(value.get("bytes"))
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, (bytes, bytearray)) and value:
        return bytes(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{where} must be an image: its bytes, the path of a file, or an object with bytes or path; "
            f"got {describe(value)}. Fix the row, or remove it."
        )
    if re.match(r"https?://", value):
        raise InputError(f"{where}: {value[:80]} is an address of the web, from which no image is fetched. Save it.")
    if is_encoded or value.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        except binascii.Error as error:
            raise InputError(f"{where}: the image is no base64 ({error}). Fix the row, or remove it.") from None
    return str((directory / Path(value).expanduser()).absolute())
