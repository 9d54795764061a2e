"""Changes of adapters' files on a server under load, for `tests/stress/serve_faults.py`."""

from __future__ import annotations

import asyncio
import collections
import os
from collections.abc import Sequence
from pathlib import Path

from qvera.utils.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.stress.serve_load import CLIENTS, REFUSED, Tally, Truth, for_seconds


async def change_files(
    root: Path, truth: Truth, pairs: Sequence[tuple[str, str]], rounds: int, tally: Tally
) -> dict[str, int]:
    """One change of an adapter's files after the other, and back again.

    Each state lasts until twice as many answers have come as there are clients.

    Args:
        root: the directory of the adapters.
        pairs: names, each with the one whose vectors it gets and gives back.
    """

    async def stands_for(name: str, *adapters: str) -> None:
        truth.becomes(name, *adapters)
        await for_seconds(tally, 0.3, 2 * CLIENTS)

    done: collections.Counter[str] = collections.Counter()
    kinds = ("renamed", "copied", "cut short", "deleted", "moved away", "config broken")
    for number in range(rounds):
        kind, (name, spare) = kinds[number % len(kinds)], pairs[number // len(kinds) % len(pairs)]
        directory, becomes = root / name, truth.becomes
        truth.focus = truth.questions(name, spare)
        weights, config = directory / ADAPTER_WEIGHTS, directory / ADAPTER_CONFIG
        old, new = weights.read_bytes(), (root / spare / ADAPTER_WEIGHTS).read_bytes()
        if kind in ("renamed", "copied"):
            for content, before, after in ((new, name, spare), (old, spare, name)):
                becomes(name, before, after, *([REFUSED] if kind == "copied" else []))
                if kind == "renamed":
                    _replace(weights, content)
                else:
                    await _copy_slowly(weights, content)
                await stands_for(name, after)
        else:
            becomes(name, name, REFUSED)
            if kind == "cut short":
                os.truncate(weights, len(old) // 2)
            elif kind == "deleted":
                weights.unlink()
            elif kind == "moved away":
                directory.rename(root / ".away")
            else:
                kept = config.read_bytes()
                config.write_bytes(kept[: len(kept) // 2])
            await stands_for(name, REFUSED)
            becomes(name, name, REFUSED)
            if kind == "moved away":
                (root / ".away").rename(directory)
            elif kind == "config broken":
                _replace(config, kept)
            else:
                _replace(weights, old)
            await stands_for(name, name)
        done[kind] += 1
    truth.focus = []
    return dict(done)


def _replace(file: Path, content: bytes) -> None:
    beside = file.with_name(f".{file.name}.new")
    beside.write_bytes(content)
    beside.rename(file)


async def _copy_slowly(file: Path, content: bytes) -> None:
    """As `cp` does, on a slow disk."""
    with open(file, "wb", buffering=0) as handle:
        for start in range(0, len(content), len(content) // 4):
            handle.write(content[start : start + len(content) // 4])
            await asyncio.sleep(0.05)
