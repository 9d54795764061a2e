"""What the benches of `qvera serve` share: the server as a process, requests to it, and adapters to ask for."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx
import psutil

NEW_TOKENS = 32
START_SECONDS = 600


class ServerProcess:
    """A running `qvera serve`; a context that ends it.

    Attributes:
        url: its address, without ``/v1``.
        process: of the operating system.
        start_seconds: from the start of the process until it takes calls.
    """

    def __init__(self, *arguments: str, port: int = 0, log: Path | None = None) -> None:
        """``log``: a file that its messages are added to."""
        line = [sys.executable, "-m", "qvera", "serve", *arguments, "--port", str(port)]
        self._log: IO[bytes] = tempfile.TemporaryFile() if log is None else open(log, "a+b")
        written = self._log.seek(0, os.SEEK_END)
        began = time.perf_counter()
        self.process = subprocess.Popen(line, stdout=self._log, stderr=self._log)
        while (found := re.search(r"at (http://\S+)/v1", self.said[written:])) is None:
            if self.process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                self.process.kill()
                raise RuntimeError(f"the server did not start:\n{self.said}")
            time.sleep(0.05)
        self.url, self.start_seconds = found[1], time.perf_counter() - began

    @property
    def said(self) -> str:
        """All that is in its log."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    @property
    def port(self) -> int:
        """Of its address."""
        return int(self.url.rpartition(":")[2])

    def rss_bytes(self) -> int:
        """Its resident memory now."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def open_files(self) -> int:
        """How many files and sockets it has open."""
        return psutil.Process(self.process.pid).num_fds()

    def metrics(self) -> dict[str, float]:
        """Its numbers without labels, as /metrics has them."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return {name: float(value) for name, value in re.findall(r"^(qvera_\w+) (\S+)$", text, re.M)}

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(60)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()
        self._log.close()


class Answer:
    """When a request was sent, and when each piece of its answer came, in seconds of one clock."""

    def __init__(self) -> None:
        self.sent = time.perf_counter()
        self.pieces: list[float] = []
        self.tokens = 0

    @property
    def first_token_seconds(self) -> float:
        """From the request to the first piece of its answer."""
        return self.pieces[0] - self.sent


async def ask(client: httpx.AsyncClient, model: str, prompt: list[int], new_tokens: int = NEW_TOKENS) -> Answer:
    """Ask for a greedy answer as a stream, and note when it comes.

    Raises:
        RuntimeError: the server refused or failed.
    """
    body = {
        "model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    answer = Answer()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
            if event["choices"]:
                answer.pieces.append(time.perf_counter())
    return answer


def random_prompts(seed: int) -> Iterator[list[int]]:
    """Prompts of 16 to 48 tokens of SmolLM2's vocabulary, one after the other."""
    chooser = random.Random(seed)
    while True:
        yield [chooser.randrange(10, 40_000) for _ in range(chooser.randint(16, 48))]


def requests_of(names: Sequence[str], seed: int) -> Iterator[tuple[str, list[int]]]:
    """Model and prompt of one request after the other; the prompts depend on the seed alone."""
    models = random.Random(f"models {seed}")
    for prompt in random_prompts(seed):
        yield models.choice(names), prompt


def percentiles(values: Sequence[float], *wanted: int) -> dict[str, float]:
    """``{"p50": …}`` for each of ``wanted``, between neighbours where it falls between two; and ``max``."""
    ordered = sorted(values)

    def at(percent: int) -> float:
        place = (len(ordered) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {**{f"p{percent}": at(percent) for percent in wanted}, "max": ordered[-1]}


def model_name(base: str) -> str:
    """What a server calls its base."""
    return Path(base).name


def completion(url: str, body: dict[str, Any], **settings: Any) -> httpx.Response:
    """A call of /v1/completions."""
    return httpx.post(f"{url}/v1/completions", json=body, timeout=600, **settings)
