"""The record beside a quantized copy, and the cache of such copies. Imports no torch.

A copy in the cache has the name nf4-IDENTITY, of config, shards and settings (`content_identity`). While it is made,
its KEY (`qvera.utils.cache_dir`) is of source path, sizes, times, settings and device.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvera.config.sections import ModelSection
from qvera.utils.cache_dir import DiskCache
from qvera.utils.files import file_sha256, try_read_json

RECORD = "qvera_quantized.json"
_VERSION = 2
"""Raised when other weights of some model are quantized than before, so that a copy from then is not taken."""


def settings_of(section: ModelSection, of_class: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that a quantized copy depends on besides the source. ``of_class``: `ModelClass.settings`."""
    keys = ("quantization", "double_quant", "quant_storage")
    return {key: getattr(section, key) for key in keys} | {"blocksize": 64, "version": _VERSION, **of_class}


def content_identity(config_sha256: str, files: Mapping[Path, str], settings: Mapping[str, Any]) -> str:
    """A hash, in hex, over config, shards (name → SHA-256) and settings. Where the shards lie does not count."""
    shards = sorted((file.name, digest) for file, digest in files.items())
    text = json.dumps([1, config_sha256, shards, sorted(settings.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a finished quantized copy, or None where there is none."""
    if not (directory / "config.json").is_file():
        return None
    record = try_read_json(directory / RECORD)
    whole = record is not None and record.get("format") == 1 and record.get("identity") and record.get("files")
    return record if whole else None


def problem_of(directory: Path, *, verify: bool = False) -> str | None:
    """Say what is wrong with a quantized copy; None: nothing. Shards' lengths are checked, with ``verify`` hashes."""
    record = read_record(directory)
    if record is None:
        return f"{directory / RECORD} is missing or damaged"
    for name, expected in record["files"].items():
        file = directory / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} is {file.stat().st_size} bytes long, expected {expected['bytes']}"
        if verify and file_sha256(file) != expected["sha256"]:
            return f"{file} has another SHA-256 than when it was written"
    return None


BASES = DiskCache("quantized base", "bases", read_record, functools.partial(problem_of, verify=True))
