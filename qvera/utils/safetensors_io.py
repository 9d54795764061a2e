"""Where the tensors of a checkpoint lie in its files, pieces of them, and a fingerprint of the whole.

File format: 8 bytes little-endian header length, JSON header, tensor bytes back to back
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import torch

from qvera.utils.checkpoint_index import checkpoint_tensors
from qvera.utils.errors import InputError

SOURCE_FILE = "qvera_source.json"
"""In a directory quantized from another: ``{"fingerprint": ...}`` of what it was made from."""

_QUANTIZED, _SAMPLE_BYTES = "quantized:", 4096
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""torch dtype → what a safetensors header calls it."""


class Spec(NamedTuple):
    """A tensor as a safetensors header names it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Stored(NamedTuple):
    """A tensor in a file, and where in it its bytes are."""

    spec: Spec
    start: int
    stop: int


def read_header(file: Path) -> list[Stored]:
    """The tensors of a safetensors file in the order of their bytes.

    Raises:
        InputError: the header is not one, names a dtype that is not known here, or does not fit the file's size.
    """
    try:
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            size = os.fstat(handle.fileno()).st_size
            if length > size - 8:
                raise ValueError(f"its header would be {length} bytes long, the file is {size}")
            document = json.loads(handle.read(length))
        document.pop("__metadata__", None)
        found = [
            Stored(
                Spec(name, _DTYPES[value["dtype"]], tuple(value["shape"])), *(8 + length + o for o in value["data_offsets"])
            )
            for name, value in document.items()
        ]  # fmt: skip
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: not a readable safetensors file, or cut short ({type(error).__name__}: {error}). Copy or download it again."
        ) from None
    found.sort(key=lambda stored: stored.start)
    at = 8 + length
    for spec, start, stop in found:
        if start != at or stop - start != spec.size_bytes:
            raise InputError(
                f"{file}: the header does not say where the bytes of {spec.name} are. Copy or download it again."
            )
        at = stop
    if at != size:
        raise InputError(f"{file}: is {size} bytes long, its header says {at}: cut short. Copy or download it again.")
    return found


def stored_tensors(file: Path) -> tuple[int, dict[str, Stored]]:
    """Bytes of the header, and name → `Stored`, in the order they lie in the file (see `read_header`)."""
    found = read_header(file)
    return found[0].start if found else file.stat().st_size, {stored.spec.name: stored for stored in found}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_stamp(facts: os.stat_result) -> list[int]:
    """Size, mtime_ns and inode: what tells cheaply that a file (a link's target) is still the one it was."""
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def read_at(descriptor: int, into: memoryview, offset: int) -> bool:
    """Fill ``into`` from an open file; False where the file ends before."""
    done = 0
    while done < len(into):
        got = os.preadv(descriptor, [into[done:]], offset + done)
        if got == 0:
            return False
        done += got
    return True


def base_fingerprint(directory: Path) -> str:
    """What tells one base from another by its content, in milliseconds and without hashing all of it.

    SHA-256 over every tensor's name, dtype and shape, and its first and last 4 KiB, in the order of the names: how the
    tensors are spread over files, and which files lie beside them, makes no difference. A directory that was quantized from
    another one carries the other's fingerprint (`SOURCE_FILE`); one in a quantized format of unknown origin has a fingerprint
    of its own kind, ``quantized:...``, which says nothing about 16-bit ones (`same_base`).

    Raises:
        InputError: a shard is missing, cut short or not safetensors.
    """
    source = directory / SOURCE_FILE
    if source.is_file():
        try:
            return str(json.loads(source.read_text(encoding="utf-8"))["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{source}: expected {{"fingerprint": ...}} ({type(error).__name__}: {error}).') from None
    digest, quantized = hashlib.sha256(), False
    entries = checkpoint_tensors(directory)
    files = {file: stored_tensors(file)[1] for file in {e.file for e in entries}}
    for entry in sorted(entries, key=lambda e: e.name):
        stored = files[entry.file][entry.name]
        quantized |= ".quant_state." in entry.name or entry.name.endswith(".SCB")
        digest.update(f"{stored.spec.name}\n{stored.spec.dtype}\n{list(stored.spec.shape)}\n".encode())
        with open(entry.file, "rb") as handle:
            handle.seek(stored.start)
            digest.update(handle.read(min(_SAMPLE_BYTES, stored.stop - stored.start)))
            last = max(stored.start, stored.stop - _SAMPLE_BYTES)
            handle.seek(last)
            digest.update(handle.read(stored.stop - last))
    return (_QUANTIZED if quantized else "") + digest.hexdigest()


def write_source_fingerprint(directory: Path, fingerprint: str) -> None:
    """Say in a quantized copy what it was made from."""
    (directory / SOURCE_FILE).write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")


def same_base(one: str | None, other: str | None) -> bool:
    """False only where both are known, can be compared, and differ."""
    if one is None or other is None or one.startswith(_QUANTIZED) != other.startswith(_QUANTIZED):
        return True
    return one == other
