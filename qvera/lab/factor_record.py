"""The cache of `qvera.lab.lora_xs`, without torch: $QVERA_CACHE/factors/factors-KEY.

KEY is the hash of a base's fingerprint and of the way to decompose. An entry holds record.json and a safetensors file
for each linear and rank; its header has the SHA-256 of its data.
"""

import hashlib
import json
from pathlib import Path

from qvera.utils.cache_dir import DiskCache
from qvera.utils.files import try_read_json

RECORD = "record.json"
PREFIX = "factors-"
SHA256 = "sha256"
"""The key of the hash in a file's metadata."""


def tensors_sha256(content: bytes | memoryview) -> str:
    """Hash what follows the header in a safetensors file."""
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def is_whole(file: Path) -> bool:
    """Whether the data still have the hash in the header."""
    try:
        content = file.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return bool(header["__metadata__"][SHA256] == tensors_sha256(content))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _problem_of(directory: Path) -> str | None:
    if try_read_json(directory / RECORD) is None:
        return f"{directory / RECORD} is missing or damaged"
    broken = [file for file in sorted(directory.glob("*.safetensors")) if not is_whole(file)]
    return f"{broken[0]} has other data than were written" if broken else None


FACTORS = DiskCache(
    "set of decomposed weights", "factors", lambda directory: try_read_json(directory / RECORD), _problem_of, PREFIX
)
