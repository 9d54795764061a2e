"""Names of adapters ↔ names of their directories: reversible, and good on Linux, macOS and Windows."""

import re
import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

from qvera.utils.errors import InputError

MOST_BYTES = 200
"""The most bytes of a directory's name. File systems take 255; ``.html`` and a mark of unfinished files need room."""
_GOOD = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(\..*)?", re.IGNORECASE | re.DOTALL)
"""Windows opens these as devices, with any suffix."""
_ESCAPED = re.compile(r"(?:=[0-9A-F]{2})+")


def escape_name(name: str) -> str:
    """Make a directory's name from an adapter's name; `unescape_name` reverses it.

    Letters and digits of any alphabet, ``-``, ``_`` and dots stay. Other characters become their UTF-8 bytes as
    ``=XX``, which needs no quotes in a shell and none in a URL. So do: a dot or ``-`` at the beginning, a dot at the
    end, the first letter of a name that Windows reserves, and what file systems of macOS would compose.

    Raises:
        InputError: the name is empty or blank, holds half a character, or would be longer than `MOST_BYTES`.
    """
    return _directory(name, ascii_only=False, lower_only=False)


def unescape_name(directory: str) -> str:
    """Return the adapter's name for a directory. A directory that was named by hand gives its own name.

    What is no UTF-8 in that becomes ``?``: no terminal and no JSON takes it.
    """
    whole = directory.encode(errors="replace").decode()
    composed = unicodedata.normalize("NFC", whole)  # a copy by way of an older macOS has decomposed names
    try:
        name = _ESCAPED.sub(lambda found: unquote_to_bytes(found[0].replace("=", "%")).decode(), composed)
        return name if composed in (escape_name(name), _directory(name, True, True)) else composed
    except (UnicodeDecodeError, InputError):
        return composed


def directory_names(names: Iterable[str]) -> dict[str, str]:
    """Map each name to a directory; InputError as in `escape_name`. The directories differ on every file system.

    For this, names that `similar_names` finds have capitals and other alphabets escaped too.
    """
    listed = list(names)
    similar = {name for group in similar_names(listed) for name in group}
    return {name: _directory(name, *[name in similar] * 2) for name in listed}


def shown_name(name: str) -> str:
    """Write a name for a line of a terminal: in quotes where it has line breaks or the like, or spaces at its ends."""
    return name if name.isprintable() and name == name.strip() else repr(name)


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Group names that differ only by case, by spaces, or by how their characters are composed."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
        groups.setdefault("".join(folded.split()), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _directory(name: str, ascii_only: bool, lower_only: bool) -> str:
    if not name.strip():
        raise InputError(f"an adapter's name is {'blank' if name else 'empty'}; expected a text to call it by.")
    reserved = _RESERVED.fullmatch(name)
    if _GOOD.fullmatch(name) and not reserved and not (lower_only and name != name.lower()):
        directory = name
    else:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the adapter's name {name!a} holds half a character, {name[error.start]!a}.") from None
        stays = [
            (c.isalnum() or c in "-_." if c.isascii() else not ascii_only and c.isalnum() and _is_composed(c))
            and not (lower_only and c != c.lower())
            for c in name
        ]
        stays[0] &= name[0] not in ".-" and not reserved
        stays[-1] &= name[-1] != "."
        escaped = ("".join(f"={byte:02X}" for byte in c.encode()) for c in name)
        directory = "".join(c if stay else other for c, other, stay in zip(name, escaped, stays, strict=True))
        # Two neighbours may compose where each alone does not, so the whole is looked at again.
        if not _is_composed(directory):
            return _directory(name, ascii_only=True, lower_only=lower_only)
    if (size := len(directory.encode())) > MOST_BYTES:
        shown = f"{name[:40]}…"
        raise InputError(
            f"the adapter's name {shown!r} is too long: as a directory it has {size} bytes, and {MOST_BYTES} are "
            "allowed. Use a shorter one."
        )
    return directory


def _is_composed(text: str) -> bool:
    return unicodedata.is_normalized("NFC", text)
