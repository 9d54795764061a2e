"""Tinker's API under many tenants: tokens a second of training and of sampling, together and one after the other.

    python -m bench.tinker [--tenants 1 16 256 1000] [--seconds 30] [--rounds 3] [--rank 8] [--result tinker]
    python -m bench.tinker --tenants 1 16 --peer http://127.0.0.1:8761 --peer-process PID --result tinker_peer

`qvera serve --tinker` trains LoRA of ``--rank`` on SmolLM2-135M in NF4; with ``--vera`` VeRA of that rank. Each tenant
has a key, a session and a model. A step is a forward_backward of ``--rows`` rows of 16 to 32 tokens and an optim_step,
and the tenant waits for both. An answer has a prompt of 16 to 48 tokens and 32 new ones. Clients speak the wire protocol from one
process (bench/tinkering.py): a thousand clients of Tinker's would be measured instead of the server.

- ``N together``: all N tenants at once, each with one step, or one answer, open.
- ``N in turn``: the same tenants one after the other, each for one step or one answer.

Cases are taken in turn, ``--rounds`` times. ``user`` seconds are CPU seconds of the server's processes, which other
work on the machine changes little. ``together_over_one`` and ``together_over_turn`` are ratios of medians, by both
clocks. ``bytes_of_a_tenant`` is what the server's memory grew by for each tenant after the first.

``--peer`` is another server of Tinker's API with the same base, where N is at most ``--peer-most``; its cases are
interleaved with ours. ``--peer-old``: it speaks JSON where client 0.38 has protobuf.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.common import header, smollm2, write_result
from bench.serving import NEW_TOKENS, ServerProcess, random_prompts
from bench.tinkering import Link, Trained, random_rows, send_heartbeats, write_keys

VOCABULARY = 40_000
_RATE = 1e-4

Work = Callable[["Tenant"], Awaitable[int]]
"""Does one step or one answer of a tenant; returns the tokens that it had."""


@dataclass(eq=False)
class Tenant:
    """A tenant of one server."""

    model: Trained
    chooser: random.Random
    prompts: Iterator[list[int]]
    sampler: str = ""
    answers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    async def train(self, rows: int) -> int:
        """One step."""
        data = random_rows(self.chooser, rows, 16, 32, VOCABULARY)
        await self.model.train(data, _RATE)
        return sum(len(row.tokens) for row in data)

    async def answer(self) -> int:
        """One answer; its tokens are the new ones."""
        sampler = self.sampler or await self.model.sampler()
        self.sampler = sampler
        return len((await self.model.sample(sampler, next(self.answers), next(self.prompts), NEW_TOKENS)).tokens)


class Contender:
    """A server, its tenants, and what was measured of it."""

    def __init__(self, name: str, url: str, process: int, counts: list[int], is_old: bool) -> None:
        self.name, self.url, self.counts, self.is_old = name, url, counts, is_old
        self.process = psutil.Process(process)
        self.tenants: list[Tenant] = []
        self.statuses: collections.Counter[int] = collections.Counter()
        self.facts: dict[str, Any] = {}
        self.cases: dict[str, list[dict[str, float]]] = collections.defaultdict(list)

    def _all(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def rss_bytes(self) -> int:
        """Of the server's processes."""
        return sum(process.memory_info().rss for process in self._all())

    def user_seconds(self) -> float:
        """CPU seconds that the server's processes have had."""
        return sum(process.cpu_times().user for process in self._all())

    async def settle(self, stack: contextlib.AsyncExitStack, base: str, keys: list[str], rank: int, rows: int) -> None:
        """Make all tenants; each trains once, so that it has its moments."""

        async def make(number: int) -> Tenant:
            # a client each: httpx looks through all connections of a client for each call
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=self.url, timeout=600, verify=False))
            link = Link(http, keys[number % len(keys)], self.statuses, self.is_old)
            model = await Trained.create(link, base, rank, number)
            return Tenant(model, random.Random(f"tenant {number}"), random_prompts(number))

        self.tenants.append(await make(0))
        for _ in range(2):
            await self.tenants[0].train(rows)
        before, began = self.rss_bytes(), time.perf_counter()
        for first in range(1, self.counts[-1], 32):
            numbers = range(first, min(first + 32, self.counts[-1]))
            self.tenants += await asyncio.gather(*(make(number) for number in numbers))
        self.facts["seconds_to_make_a_tenant"] = (time.perf_counter() - began) / (len(self.tenants) - 1)
        await self.together(len(self.tenants), 0, lambda tenant: tenant.train(rows))
        self.facts["rss_bytes"] = {"one tenant": before, "all tenants": self.rss_bytes()}
        self.facts["bytes_of_a_tenant"] = (self.rss_bytes() - before) / (len(self.tenants) - 1)

    async def together(self, count: int, seconds: float, work: Work) -> dict[str, float]:
        """Tenants at once, each at least for one piece of work."""

        async def one(tenant: Tenant) -> int:
            tokens = await work(tenant)
            while time.perf_counter() < end:
                tokens += await work(tenant)
            return tokens

        began, used = time.perf_counter(), self.user_seconds()
        end = began + seconds
        tokens = sum(await asyncio.gather(*(one(tenant) for tenant in self.tenants[:count])))
        return self._rates(tokens, time.perf_counter() - began, self.user_seconds() - used)

    async def in_turn(self, turns: Iterator[Tenant], seconds: float, work: Work) -> dict[str, float]:
        """One tenant at a time."""
        began, used, tokens = time.perf_counter(), self.user_seconds(), 0
        while time.perf_counter() - began < seconds:
            tokens += await work(next(turns))
        return self._rates(tokens, time.perf_counter() - began, self.user_seconds() - used)

    @staticmethod
    def _rates(tokens: int, seconds: float, user: float) -> dict[str, float]:
        return {
            "tokens": tokens, "seconds": seconds, "user_seconds": user, "tokens_per_second": tokens / seconds,
            "tokens_per_user_second": tokens / max(user, 1e-9),
        }  # fmt: skip

    def ratios(self) -> dict[str, dict[str, float]]:
        """Medians of each case, and what together gives over one tenant and over one after the other."""
        found: dict[str, dict[str, float]] = {}
        for case, rounds in self.cases.items():
            found[case] = {
                unit: statistics.median(one[unit] for one in rounds)
                for unit in ("tokens_per_second", "tokens_per_user_second")
            }
        for case, own in list(found.items()):
            kind, _, rest = case.partition(", ")
            count, _, how = rest.partition(" ")
            others = {"over_one": f"{kind}, {self.counts[0]} together", "over_turn": f"{kind}, {count} in turn"}
            for name, other in others.items():
                if how == "together" and other in found and other != case:
                    own[f"together_{name}"] = own["tokens_per_second"] / found[other]["tokens_per_second"]
                    own[f"together_{name}_user"] = (
                        own["tokens_per_user_second"] / found[other]["tokens_per_user_second"]
                    )
        return found


async def measure(contenders: list[Contender], base: str, keys: list[str], args: argparse.Namespace) -> None:
    kinds: dict[str, Work] = {}
    if "train" in args.work:
        kinds["train"] = lambda tenant: tenant.train(args.rows)
    if "sample" in args.work:
        kinds["sample"] = lambda tenant: tenant.answer()
    async with contextlib.AsyncExitStack() as stack:
        for one in contenders:
            name = base if one.name != "qvera" or not args.vera else f"{base}:vera-{args.rank}"
            stack.callback(asyncio.create_task(send_heartbeats(one.tenants)).cancel)
            await one.settle(stack, name, keys if one.name == "qvera" else ["x"], args.rank, args.rows)
            print(one.name, one.facts, flush=True)
        turns = {(one, n): itertools.cycle(one.tenants[:n]) for one in contenders for n in one.counts}
        for number in range(args.rounds + 1):
            for kind, work in kinds.items():
                for one, count in ((one, n) for n in args.tenants for one in contenders if n in one.counts):
                    results = {"together": await one.together(count, args.seconds, work)}
                    if count > 1:
                        results["in turn"] = await one.in_turn(turns[one, count], args.seconds, work)
                    if number == 0:  # the first round compiles and makes samplers
                        continue
                    for how, found in results.items():
                        one.cases[f"{kind}, {count} {how}"].append(found)
                        print(
                            f"{one.name}, {kind}, {count} {how}: {found['tokens_per_second']:.0f} tokens/s, "
                            f"{found['tokens_per_user_second']:.0f} a user second", flush=True
                        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 16, 256, 1000])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--vera", action="store_true")
    parser.add_argument("--work", nargs="+", choices=("train", "sample"), default=["train", "sample"])
    parser.add_argument("--base", help="a checkpoint directory (default: SmolLM2)")
    parser.add_argument("--peer", metavar="URL")
    parser.add_argument("--peer-process", type=int, metavar="PID")
    parser.add_argument("--peer-most", type=int, default=16)
    parser.add_argument("--peer-old", action="store_true")
    parser.add_argument("--peer-name", default="peer")
    parser.add_argument("--result", default="tinker")
    args = parser.parse_args()
    args.tenants.sort()
    base, most = args.base or smollm2(), max(args.tenants)
    document: dict[str, Any] = {**header(), **vars(args)}
    document["versions"]["tinker (protobuf module)"] = version("tinker")
    with tempfile.TemporaryDirectory() as directory:
        keys = write_keys(Path(directory) / "keys.json", most)
        limits = ["--queue", "100000", "--max-seconds", "3600", "--max-connections", "20000"]
        options = ["--tinker", "--training-dir", f"{directory}/training", "--keys", f"{directory}/keys.json"]
        with ServerProcess(base, *options, *limits) as running:
            contenders = [Contender("qvera", running.url, running.process.pid, args.tenants, False)]
            if args.peer:
                counts = [count for count in args.tenants if count <= args.peer_most]
                contenders.append(Contender(args.peer_name, args.peer, args.peer_process, counts, args.peer_old))
            asyncio.run(measure(contenders, base, keys, args))
            for one in contenders:
                document[one.name] = {
                    **one.facts, "statuses": dict(one.statuses), "medians": one.ratios(), "cases": one.cases,
                }  # fmt: skip
                for case, found in document[one.name]["medians"].items():
                    print(one.name, case, {key: round(value, 2) for key, value in found.items()})
    print(write_result(args.result, document))


if __name__ == "__main__":
    main()
