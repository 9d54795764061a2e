"""The tensors of a checkpoint directory, and how many of them make a shard."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from safetensors import SafetensorError, safe_open

from qvera.utils.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors$")
T = TypeVar("T")


class TensorEntry(NamedTuple):
    """One tensor of a checkpoint: its name, shape, and the file that holds it."""

    name: str
    shape: tuple[int, ...]
    file: Path


def checkpoint_tensors(directory: Path) -> list[TensorEntry]:
    """All tensors of a checkpoint directory in the order they lie on disk; an index is used where there is one.

    Raises:
        InputError: a shard is missing, cut short or not safetensors, or the index names a tensor that is not there.
    """
    index = directory / INDEX
    wanted: dict[str, str]
    if index.is_file():
        wanted = weight_map(index)
        files = [directory / name for name in sorted(set(wanted.values()))]
    else:
        wanted, files = {}, _unindexed(directory)
    entries: list[TensorEntry] = []
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: this shard is named in {index.name} but is missing.")
        try:
            with safe_open(file, framework="pt") as reader:
                entries += [TensorEntry(k, tuple(reader.get_slice(k).get_shape()), file) for k in reader.offset_keys()]
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: not a readable safetensors file, or cut short ({error}). Fetch this file again."
            ) from None
    if wanted:
        missing = sorted(wanted.keys() - {e.name for e in entries})
        if missing:
            raise InputError(f"{index}: names {missing[0]} (and {len(missing) - 1} more), which no shard holds.")
    if not entries:
        raise InputError(f"{directory}: has no *.safetensors weights.")
    holders: dict[str, Path] = {}
    for entry in entries:
        if holders.setdefault(entry.name, entry.file) != entry.file:
            raise InputError(
                f"{directory}: both {holders[entry.name].name} and {entry.file.name} hold {entry.name}. Leave only the files of "
                "one checkpoint there, or an index."
            )
    return entries


def weight_map(index: Path) -> dict[str, str]:
    """Tensor → file name, as an index says. Every file has to lie beside it: an index may come from a stranger.

    Raises:
        InputError: it is no index, or names a file elsewhere or one that is not safetensors.
    """
    try:
        wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(wanted.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a safetensors index ({type(error).__name__}: {error}).") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{index}: names {name!r} as a shard. Expected names of *.safetensors files in its own directory, without a path."
            )
    return wanted


def _unindexed(directory: Path) -> list[Path]:
    """Weight files where no index names them: the single file, else all, of which a numbered set must be whole."""
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


def grouped_by_bytes(units: Iterable[list[T]], size_bytes: Callable[[T], int], most: int) -> list[tuple[str, list[T]]]:
    """File name and contents of each shard of a checkpoint, in the order given, none above ``most`` unless one unit alone is.

    Args:
        units: what has to lie in one file together.
    """
    groups: list[list[T]] = [[]]
    filled = 0
    for unit in units:
        size = sum(map(size_bytes, unit))
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1] += unit
        filled += size
    if len(groups) == 1:
        return [(SINGLE, groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", g) for i, g in enumerate(groups, start=1)]
