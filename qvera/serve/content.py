"""The content of an adapter directory: its two files, read whole, and the SHA-256 by which an adapter is known."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from qvera.utils.errors import InputError
from qvera.utils.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS


@dataclass(frozen=True)
class Content:
    """The bytes of ``adapter_config.json`` and ``adapter_model.safetensors``."""

    config: bytes
    vectors: bytes

    @property
    def sha256(self) -> str:
        """Of both files, in hex: other vectors, or the same under another config, are another adapter."""
        parts = (hashlib.sha256(part).digest() for part in (self.config, self.vectors))
        return hashlib.sha256(b"".join(parts)).hexdigest()


def read_content(directory: Path) -> Content:
    """Read both files.

    Raises:
        InputError: one is not there, or can't be read.
    """
    return Content(read_file(directory / ADAPTER_CONFIG), read_file(directory / ADAPTER_WEIGHTS))


def read_file(path: Path) -> bytes:
    """The bytes of one of them.

    Raises:
        InputError: it is not there, or can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: can't be read ({error.strerror}); expected an adapter directory with {ADAPTER_CONFIG} and "
            f"{ADAPTER_WEIGHTS}."
        ) from None
