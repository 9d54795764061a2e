"""The tensors of a checkpoint in its files, and its fingerprint. Torch is imported only when a header is read.

File format: 8 bytes little-endian header length, JSON header, tensor bytes back to back
(https://github.com/huggingface/safetensors#format). A sharded checkpoint has an index, ``{"weight_map": {tensor:
file}}``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open

from qvera.utils.errors import InputError
from qvera.utils.files import file_stamp, read_json
from qvera.utils.formatting import first_of

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SOURCE_FILE = "qvera_source.json"
"""In a quantized directory: ``{"fingerprint": ...}`` of the directory that it was made from."""

FACTS = "qvera"
"""The key in a header's ``__metadata__`` for a JSON object of ours, in files of other tools' formats."""

_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors$")
_QUANTIZED, _SAMPLE_BYTES = "quantized:", 4096
T = TypeVar("T")


def torch_dtypes() -> dict[str, torch.dtype]:
    """Map a dtype's name in a safetensors header to the torch dtype."""
    from safetensors.torch import _TYPES

    return {name: dtype for name, dtype in _TYPES.items() if dtype is not None}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor as a safetensors header describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """The number of bytes in a file."""
        return self.numel * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """A tensor in a file, at the bytes ``start`` to ``stop``."""

    file: Path
    start: int
    stop: int
    rows_of: str = ""
    """The tensor of the file that these rows are a part of; empty if they are a whole one."""


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any new file; the library lets only the owner read it."""
    from safetensors.torch import save_file

    file.touch()
    permissions = file.stat().st_mode
    save_file(dict(tensors), file, metadata)
    file.chmod(permissions)


def unreadable_error(file: Path, error: Exception) -> InputError:
    """Make the error to raise for a safetensors file that could not be read."""
    if file.exists() and not os.access(file, os.R_OK):  # the library calls such a file missing
        return InputError(f"{file}: this user may not read it. Have its owner run `chmod a+r` on it.")
    advice = "Copy or download it again."
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(23) == b"version https://git-lfs":
            advice = "It is a pointer of Git LFS: git lfs pull."
    return InputError(
        f"{file}: not a readable safetensors file, or cut short ({type(error).__name__}: {error}). {advice}"
    )


def read_header(file: Path) -> list[TensorEntry]:
    """List the tensors of a safetensors file in byte order; InputError if it is damaged.

    The first tensor starts where the header ends.
    """
    try:
        with safe_open(file, framework="numpy"):
            pass  # the library checks that dtypes, shapes and offsets fit the file
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            document = json.loads(handle.read(length))
        document.pop("__metadata__", None)
        entries = []
        for name, value in document.items():
            start, stop = (8 + length + int(offset) for offset in value["data_offsets"])
            entries.append(TensorEntry(name, torch_dtypes()[value["dtype"]], tuple(value["shape"]), file, start, stop))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise unreadable_error(file, error) from None
    return sorted(entries, key=lambda entry: entry.start)


def own_facts(weights: Path) -> dict[str, Any]:
    """Read what qvera wrote under `FACTS` in a safetensors header, or {}; InputError if it is damaged."""
    try:
        with safe_open(weights, framework="numpy") as file:
            found = json.loads((file.metadata() or {}).get(FACTS, "{}"))
    except (SafetensorError, OSError) as error:
        raise unreadable_error(weights, error) from None
    except ValueError as error:
        raise InputError(f"{weights}: the entry {FACTS!r} of its header is not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise InputError(f"{weights}: the entry {FACTS!r} of its header is no JSON object.")
    return found


def checkpoint_tensors(directory: Path) -> list[TensorEntry]:
    """List all tensors of a checkpoint directory in disk order, by its index if it has one; InputError if damaged."""
    index = directory / INDEX
    wanted = weight_map(index) if index.is_file() else {}
    entries: dict[str, TensorEntry] = {}
    for file in _indexed(wanted, directory) or _unindexed(directory):
        if not file.is_file():
            why = f"this shard is named in {index.name} but is missing."
            if file.is_symlink():  # as in a cache of the hub that was cleared, or copied without its blobs
                why = f"is a link to {os.readlink(file)}, and no file can be reached by it. Fetch it again."
            raise InputError(f"{file}: {why}")
        for entry in read_header(file):
            other = entries.setdefault(entry.name, entry)
            if other is not entry:
                raise InputError(
                    f"{directory}: both {other.file.name} and {file.name} hold {entry.name}. Leave only the files of "
                    "one checkpoint there, or an index."
                )
    missing = sorted(wanted.keys() - entries.keys())
    if missing:
        raise InputError(f"{index}: names {first_of(missing)}, which no shard holds.")
    if not entries:
        raise InputError(f"{directory}: has no *.safetensors weights.")
    return list(entries.values())


def file_stamps(entries: Iterable[TensorEntry]) -> dict[str, list[int]]:
    """Map the file names of a checkpoint to their `file_stamp`."""
    return {file.name: file_stamp(file.stat()) for file in dict.fromkeys(entry.file for entry in entries)}


def weight_map(index: Path) -> dict[str, str]:
    """Map each tensor to its file's name, from an index; InputError if it is damaged or names a file elsewhere.

    An index may come from a stranger, so every file must lie beside it.
    """
    wanted = read_json(index, "a safetensors index", keys=("weight_map",))["weight_map"]
    if not isinstance(wanted, dict):
        raise InputError(f"{index}: not a safetensors index: its weight_map is no object.")
    for name in wanted.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: names {name!r} as a shard. Expected names of *.safetensors files in its own directory, "
                f"without a path."
            )
    return wanted


def _unindexed(directory: Path) -> list[Path]:
    """Find the files of a checkpoint without an index: the single one, else all; a numbered set must be whole."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    files = sorted(directory.glob("*.safetensors"))
    numbered = [m for f in files if (m := _NUMBERED.match(f.name))]
    there = {m[0] for m in numbered}
    for stem, total in {(m[1], m[3]) for m in numbered}:
        for number in range(1, int(total) + 1):
            name = f"{stem}-{number:0{len(total)}d}-of-{total}.safetensors"
            if name not in there:
                raise InputError(
                    f"{directory / name}: this shard of {int(total)} is missing, and there is no {INDEX}. Fetch it."
                )
    return files


def shard_files(directory: Path) -> list[Path]:
    """List the weight files of a checkpoint by its index or their names, unread; [] where these are damaged."""
    try:
        index = directory / INDEX
        return _indexed(weight_map(index), directory) if index.is_file() else _unindexed(directory)
    except InputError:
        return []


def _indexed(wanted: dict[str, str], directory: Path) -> list[Path]:
    return [directory / name for name in sorted(set(wanted.values()))]


def grouped_by_bytes(
    units: Iterable[list[T]], size_bytes: Callable[[T], int], max_bytes: int
) -> list[tuple[str, list[T]]]:
    """Divide units among shards: file name and units of each, in order. Only a single unit may exceed ``max_bytes``."""
    groups: list[list[T]] = [[]]
    filled = 0
    for unit in units:
        size = sum(map(size_bytes, unit))
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1] += unit
        filled += size
    if len(groups) == 1:
        return [(SINGLE, groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", g) for i, g in enumerate(groups, start=1)]


def base_fingerprint(directory: Path) -> str:
    """Return a hash that tells base models apart by content, in milliseconds. InputError if a shard is damaged.

    It is SHA-256 over every tensor's name, dtype, shape, and first and last 4 KiB, by name, so shards don't matter. A
    directory that was quantized from another one carries the other's fingerprint (`SOURCE_FILE`). A quantized one of
    unknown origin has ``quantized:...``, which can't be compared with those of 16-bit models (`same_base`).
    """
    source = directory / SOURCE_FILE
    if source.is_file():
        return str(read_json(source, "the source's fingerprint", keys=("fingerprint",))["fingerprint"])
    digest, quantized = hashlib.sha256(), False
    for entry in sorted(checkpoint_tensors(directory), key=lambda e: e.name):
        quantized |= ".quant_state." in entry.name or entry.name.endswith(".SCB")
        digest.update(f"{entry.name}\n{entry.dtype}\n{list(entry.shape)}\n".encode())
        with open(entry.file, "rb") as handle:
            handle.seek(entry.start)
            digest.update(handle.read(min(_SAMPLE_BYTES, entry.size_bytes)))
            last = max(entry.start, entry.stop - _SAMPLE_BYTES)
            handle.seek(last)
            digest.update(handle.read(entry.stop - last))
    return (_QUANTIZED if quantized else "") + digest.hexdigest()


def write_source_fingerprint(directory: Path, fingerprint: str) -> None:
    """Note in a quantized copy what it was made from."""
    (directory / SOURCE_FILE).write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")


def same_base(one: str | None, other: str | None) -> bool:
    """Whether two fingerprints may be of one base: False only where both are known, comparable, and different."""
    if one is None or other is None or one.startswith(_QUANTIZED) != other.startswith(_QUANTIZED):
        return True
    return one == other
