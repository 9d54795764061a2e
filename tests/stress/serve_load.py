"""Load on a server whose right answers are known, for `tests/stress/serve_faults.py`."""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.serving import completion

CLIENTS = 8
NEW_TOKENS = 12
NEAR = 1e-3
"""Log-probabilities that differ by less may change places when other requests share the batch."""
REFUSED = "refused"
"""Stands among the adapters that may answer where a request may be refused, too."""


def body_of(name: str, prompt: Sequence[int]) -> dict[str, Any]:
    """A greedy request."""
    return {"model": name, "prompt": list(prompt), "max_tokens": NEW_TOKENS, "temperature": 0}


class Truth:
    """What each adapter answers to each prompt, and which adapters a name may stand for at which time."""

    def __init__(self) -> None:
        self.texts: dict[tuple[str, int], str] = {}
        """(adapter, number of the prompt) → its answer; without those in which two tokens are nearly as likely."""
        self.prompts: list[list[int]] = []
        self.focus: list[tuple[str, int]] = []
        """Questions of which half of the load consists, where there are some."""
        self._states: dict[str, list[tuple[float, frozenset[str]]]] = collections.defaultdict(list)

    def learn(self, url: str, names: Sequence[str], prompts: Sequence[list[int]]) -> None:
        """Ask a server that has nothing else to do."""
        self.prompts = list(prompts)
        for name in names:
            self.becomes(name, name)
            for number, prompt in enumerate(prompts):
                response = completion(url, {**body_of(name, prompt), "logprobs": 2}).raise_for_status()
                choice = response.json()["choices"][0]
                top = [sorted(each.values(), reverse=True) for each in choice["logprobs"]["top_logprobs"]]
                if all(len(values) > 1 and values[0] - values[1] > NEAR for values in top):
                    self.texts[name, number] = choice["text"]

    def becomes(self, name: str, *adapters: str) -> None:
        """From now on the name stands for one of these, perhaps `REFUSED`."""
        self._states[name].append((time.monotonic(), frozenset(adapters)))

    def allowed(self, name: str, began: float, ended: float) -> frozenset[str]:
        """All that the name stood for between two times."""
        states = self._states[name]
        spans = zip(states, [at for at, _ in states[1:]] + [float("inf")], strict=True)
        return frozenset().union(*(found for (at, found), until in spans if at <= ended and until >= began))

    def questions(self, name: str, *others: str) -> list[tuple[str, int]]:
        """What the name can be asked: prompts to which it and the others have a certain answer."""
        numbers = range(len(self.prompts))
        return [(name, n) for n in numbers if all((adapter, n) in self.texts for adapter in (name, *others))]

    def distinct(self, names: Sequence[str]) -> int:
        """How many of the adapters differ from all others in some answer."""
        answers = {name: tuple(self.texts.get((name, n)) for n in range(len(self.prompts))) for name in names}
        return len(set(answers.values()))


@dataclass
class Tally:
    """How requests ended: ``right``, ``refused`` where that was due, and what must not be: ``faults``."""

    right: int = 0
    refused: int = 0
    broken: int = 0
    """Connections that ended without an answer."""
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """Requests that have ended, in whatever way."""
        return self.right + self.refused + self.broken + len(self.faults)

    def document(self) -> dict[str, Any]:
        """For the result file."""
        statuses = {str(status): count for status, count in sorted(self.statuses.items())}
        return {"right": self.right, "refused_as_due": self.refused, "broken": self.broken, "wrong": len(self.faults),
                "statuses": statuses}  # fmt: skip


async def ask_known(client: httpx.AsyncClient, truth: Truth, question: tuple[str, int], tally: Tally) -> None:
    """Ask one question and judge the answer."""
    name, number = question
    began = time.monotonic()
    try:
        response = await client.post("/v1/completions", json=body_of(name, truth.prompts[number]))
    except httpx.TransportError:
        tally.broken += 1
        return
    allowed = truth.allowed(name, began, time.monotonic())
    tally.statuses[response.status_code] += 1
    if response.status_code == 200:
        text = response.json()["choices"][0]["text"]
        if any(truth.texts.get((adapter, number)) == text for adapter in allowed):
            tally.right += 1
        else:
            tally.faults.append(f"{name}, prompt {number}: {text!r}, allowed: {sorted(allowed)}")
    elif REFUSED in allowed and response.status_code in (400, 404):
        tally.refused += 1
    else:
        tally.faults.append(f"{name}, prompt {number}: {response.status_code} {response.text[:200]}")


async def load(
    url: str,
    truth: Truth,
    questions: Sequence[tuple[str, int]],
    clients: int,
    during: Callable[[Tally], Awaitable[None]],
    seed: int = 0,
) -> Tally:
    """Clients that ask one question after the other until ``during``, which is given the tally, is done."""
    tally, chooser = Tally(), random.Random(seed)
    task = asyncio.ensure_future(during(tally))
    limits = httpx.Limits(max_connections=None)

    async def one_client(client: httpx.AsyncClient) -> None:
        while not task.done():
            before = tally.broken
            source = truth.focus if truth.focus and chooser.random() < 0.5 else questions
            await ask_known(client, truth, chooser.choice(source), tally)
            if tally.broken > before:
                await asyncio.sleep(0.05)  # the server is gone, and may be killed at leisure

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(one_client(client) for _ in range(clients)))
    await task
    return tally


async def for_seconds(tally: Tally, seconds: float, answers: int) -> None:
    """Let the load go on for some time, and for so many answers at least."""
    end, wanted = time.monotonic() + seconds, tally.ended + answers
    while time.monotonic() < end or tally.ended < wanted:
        await asyncio.sleep(0.02)


async def ask_all(url: str, truth: Truth, questions: Sequence[tuple[str, int]], clients: int = 8) -> Tally:
    """Each question once."""
    tally, source = Tally(), iter(questions)

    async def one_client(client: httpx.AsyncClient) -> None:
        for question in source:
            await ask_known(client, truth, question, tally)

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(one_client(client) for _ in range(clients)))
    return tally
