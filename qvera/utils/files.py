"""Read files whose content may be wrong: JSON documents, hashes, byte ranges. Imports no torch."""

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from qvera.utils.errors import InputError


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def read_json(path: Path, what: str, keys: Collection[str] = (), fix: str = "") -> dict[str, Any]:
    """Read a JSON file that has to hold an object with these ``keys``; InputError if it does not.

    Messages say ``what`` was expected ("the adapter's config") and end with ``fix``, a sentence on what to do.
    """
    end = f" {fix}" if fix else ""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; expected {what}.{end}") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error}); expected {what}.{end}") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {error.lineno}, column {error.colno} is not JSON ({error.msg}); expected {what}.{end}"
        ) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, thousands of brackets
        raise InputError(f"{path}: can't be read as JSON ({error}); expected {what}.{end}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: holds a {type(document).__name__}; expected {what} as a JSON object.{end}")
    missing = [key for key in keys if key not in document]
    if missing:
        raise InputError(f"{path}: has no key {missing[0]!r}; expected {what}.{end}")
    return document


def try_read_json(path: Path) -> dict[str, Any] | None:
    """`read_json`, but None where it would raise: for records that can be made again."""
    try:
        return read_json(path, "a JSON object")
    except InputError:
        return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_stamp(facts: os.stat_result) -> list[int]:
    """Size, mtime_ns and inode: a cheap way to notice that a file (or a link's target) has changed."""
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def read_at(descriptor: int, into: memoryview, offset: int) -> bool:
    """Fill ``into`` from byte ``offset`` of an open file; False where the file ends too early."""
    done = 0
    while done < len(into):
        got = os.preadv(descriptor, [into[done:]], offset + done)
        if got == 0:
            return False
        done += got
    return True


def plain_json(value: Any) -> Any:
    """A JSON value with null in place of NaN and Inf, which other parsers refuse."""
    return to_jsonable_python(value, inf_nan_mode="null")
