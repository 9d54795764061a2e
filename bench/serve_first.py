"""10,000 adapters in one server: how long the first request for one takes, and what so many cost.

    python bench/serve_first.py [--adapters 10000] [--ask 200] [--directory /tmp] [--result serve_first]

SmolLM2-135M in NF4 with VeRA adapters of r=256 on all linears, 0.9 MB each, whose vectors all differ. They are written to
``--directory``, which needs 9 GB. `qvera serve` answers over the loopback address, and is otherwise idle.

- ``first_ever``: of the first adapter that the process is asked for, which also makes the layers. Reported apart.
- ``cached``, ``uncached``: ``--ask`` adapters at random that nobody has asked for, half with their files in the system's
  page cache and half without (`POSIX_FADV_DONTNEED`; RWF_NOWAIT reads say what is cached). Each is asked twice, one
  after the other: seconds to the first token of the ``first`` request, of the ``second``, and their ``difference``.
  ``first_within_100_ms`` and ``difference_within_100_ms`` are the fractions of the adapters that reach the target in
  either reading.
- ``models``: seconds and bytes of ``/v1/models``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.adapters import write_adapters
from bench.common import header, smollm2, write_result
from bench.serving import ServerProcess, ask, percentiles
from qvera.config.sections import ModelSection
from qvera.utils import formatting
from qvera.utils.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

PROMPT = [100, 200, 300]
TARGET_SECONDS = 0.1
ADAPTER_BYTES = 900_000
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def is_cached(file: Path) -> bool:
    """Whether all of a file can be read without the disk."""
    with open(file, "rb") as opened:
        buffer = bytearray(file.stat().st_size)
        try:
            return os.preadv(opened.fileno(), [buffer], 0, os.RWF_NOWAIT) == len(buffer)
        except BlockingIOError:
            return False


def drop_from_cache(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def twice(client: httpx.AsyncClient, name: str) -> tuple[float, float]:
    """Seconds to the first token of two requests, one after the other."""
    first = await ask(client, name, PROMPT, 2)
    second = await ask(client, name, PROMPT, 2)
    return first.first_token_seconds, second.first_token_seconds


async def ask_each(url: str, directories: Sequence[Path]) -> list[tuple[float, float]]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        return [await twice(client, directory.name) for directory in directories]


def facts(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What the result says of some adapters."""
    differences = [first - second for first, second in pairs]
    return {
        "adapters": len(pairs),
        "first": percentiles([first for first, _ in pairs], 50, 95),
        "second": percentiles([second for _, second in pairs], 50, 95),
        "difference": percentiles(differences, 50, 95),
        "first_within_100_ms": sum(first <= TARGET_SECONDS for first, _ in pairs) / len(pairs),
        "difference_within_100_ms": sum(difference <= TARGET_SECONDS for difference in differences) / len(pairs),
    }


def list_models(url: str) -> dict[str, float]:
    began = time.perf_counter()
    listed = httpx.get(f"{url}/v1/models", timeout=600)
    took = time.perf_counter() - began
    return {"seconds": took, "bytes": len(listed.content), "models": len(listed.json()["data"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--ask", type=int, default=200)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--result", default="serve_first")
    args = parser.parse_args()
    needed, free = round(1.2 * args.adapters * ADAPTER_BYTES), shutil.disk_usage(args.directory).free
    if free < needed:
        raise SystemExit(
            f"{args.directory}: has {formatting.size(free)} free, and this needs {formatting.size(needed)}; give --directory."
        )
    document: dict[str, Any] = {**header(), "adapters": args.adapters}
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        section = ModelSection(path=smollm2())
        directories = list(write_adapters(Path(scratch), section, args.adapters).values())
        print(f"wrote {len(directories):,} adapters", flush=True)
        document["directory_bytes"] = sum((one / file).stat().st_size for one in directories for file in FILES)
        chooser = random.Random(0)
        ever, *chosen = chooser.sample(directories, args.ask + 1)
        uncached = chosen[::2]
        for directory in uncached:
            for file in FILES:
                drop_from_cache(directory / file)
        groups: dict[str, list[Path]] = {"cached": [], "uncached": []}
        for directory in chosen:
            groups["cached" if is_cached(directory / ADAPTER_WEIGHTS) else "uncached"].append(directory)
        with ServerProcess(section.path, "--adapters", scratch) as server:
            document["start_seconds"] = server.start_seconds
            document["rss_bytes"] = {"started": server.rss_bytes()}
            document["models"] = [list_models(server.url) for _ in range(3)]
            document["rss_bytes"]["listed"] = server.rss_bytes()
            document["first_ever"] = dict(
                zip(("first", "second"), asyncio.run(ask_each(server.url, [ever]))[0], strict=True)
            )
            document["rss_bytes"]["first adapter"] = server.rss_bytes()
            order = [(name, directory) for name, group in groups.items() for directory in group]
            chooser.shuffle(order)
            pairs = asyncio.run(ask_each(server.url, [directory for _, directory in order]))
            document["rss_bytes"]["asked"] = server.rss_bytes()
            for name in groups:
                own = [pair for pair, (group, _) in zip(pairs, order, strict=True) if group == name]
                document[name] = facts(own) if own else {"adapters": 0}
                print(f"{name}: {document[name]}", flush=True)
            document["metrics"] = server.metrics()
    print({key: document[key] for key in ("start_seconds", "first_ever", "models", "rss_bytes")})
    print(write_result(args.result, document))


if __name__ == "__main__":
    main()
