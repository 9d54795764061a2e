"""A server under load: tokens a second and latencies for the base, and for 1 to 1,000 distinct adapters.

    python bench/serve.py [--distinct 1 16 256 1000] [--seconds 60] [--load 0.7] [--lora 8] [--result serve]

`qvera serve` answers SmolLM2-135M in NF4 over the loopback address. Each case has the same requests: prompts of 16 to 48
tokens, 32 new tokens, greedy; only the models that they name differ. They are drawn evenly from the distinct adapters, VeRA r=256 or with ``--lora`` LoRA
of that rank.

- ``saturated``: 32 clients, each of which sends its next request when it has an answer. ``tokens_per_second`` of the new
  tokens; ``ratio`` is that over the case with one adapter.
- ``open``: requests arrive by a Poisson process, whether or not earlier ones are answered, with ``--load`` of the
  requests a second that one adapter had when saturated. Seconds to the first token and between tokens, p50, p95, p99.
- ``first_request``: seconds to the first token of an adapter that nobody has asked for, on a server that is idle, and
  of its second request; the difference is what loading takes.

Cases are taken in turn, ``--rounds`` times, so that a slow moment of the machine hits them all.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.adapters import write_adapters
from bench.common import header, smollm2, write_result
from bench.serving import Answer, ServerProcess, ask, model_name, percentiles, requests_of
from qvera.config.sections import AdapterSection, ModelSection

CLIENTS = 32
BASE = "base"


async def saturate(url: str, names: list[str], seconds: float, seed: int) -> dict[str, float]:
    """Requests and new tokens a second with so many clients that the server is never idle."""
    source, done = requests_of(names, seed), []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        end = time.perf_counter() + seconds

        async def one_client() -> None:
            while time.perf_counter() < end:
                done.append(await ask(client, *next(source)))

        began = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
        took = time.perf_counter() - began
    return {"requests_per_second": len(done) / took, "tokens_per_second": sum(a.tokens for a in done) / took}


async def arrive(url: str, names: list[str], seconds: float, per_second: float, seed: int) -> list[Answer]:
    """Answers to requests that arrive by a Poisson process."""
    source, gaps, waiting = requests_of(names, seed), random.Random(f"gaps {seed}"), []
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=None, max_keepalive_connections=64)
    ) as client:
        at = began = time.perf_counter()
        while at - began < seconds:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            waiting.append(asyncio.create_task(ask(client, *next(source))))
            at += gaps.expovariate(per_second)
        return list(await asyncio.gather(*waiting))


def latencies(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """p50, p95 and p99 of the seconds to the first token, and of those between tokens."""
    first = [answer.first_token_seconds for answer in answers if answer.pieces]
    between = [late - soon for a in answers for soon, late in zip(a.pieces, a.pieces[1:], strict=False)]
    return {
        "first_token_seconds": percentiles(first, 50, 95, 99),
        "between_tokens_seconds": percentiles(between, 50, 95, 99),
    }


def server(base: str, adapters: Path) -> ServerProcess:
    """A `qvera serve` that refuses none of the requests."""
    limits = ["--running", str(CLIENTS), "--queue", "10000", "--max-seconds", "3600", "--max-connections", "20000"]
    return ServerProcess(base, "--adapters", str(adapters), *limits)


def first_requests(url: str, names: list[str]) -> dict[str, float]:
    """Median seconds to the first token of the first and of the second request for each name."""

    async def both() -> list[tuple[float, float]]:
        found = []
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            for name in names:
                first, second = [await ask(client, name, [100, 200, 300]) for _ in range(2)]
                found.append((first.first_token_seconds, second.first_token_seconds))
        return found

    pairs = asyncio.run(both())
    return {
        "first": statistics.median(first for first, _ in pairs),
        "second": statistics.median(second for _, second in pairs),
        "largest_difference": max(first - second for first, second in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distinct", type=int, nargs="+", default=[1, 16, 256, 1000])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lora", type=int, help="LoRA of this rank")
    parser.add_argument("--result", default="serve")
    args = parser.parse_args()
    document: dict[str, Any] = {
        **header(),
        **{key: getattr(args, key) for key in ("seconds", "load", "rounds", "lora")},
    }
    with tempfile.TemporaryDirectory() as directory:
        section, spare = ModelSection(path=smollm2()), 8
        lora = None if args.lora is None else AdapterSection(method="lora", rank=args.lora)
        names = list(write_adapters(Path(directory), section, max(args.distinct) + spare, adapter=lora))
        base_name = model_name(section.path)
        cases = {BASE: [base_name], **{f"{count} adapters": names[:count] for count in args.distinct}}
        with server(section.path, Path(directory)) as running:
            url = running.url
            document["first_request"] = first_requests(url, names[-spare:])
            print(document["first_request"], flush=True)
            saturated: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
            for turn in range(args.rounds):
                for case, models in cases.items():
                    found = asyncio.run(saturate(url, models, args.seconds, turn))
                    saturated[case].append(found)
                    print(f"saturated, {case}: {found['tokens_per_second']:.1f} tokens/s", flush=True)
            document["saturated"] = saturated
            typical = {
                case: statistics.median(one["tokens_per_second"] for one in found) for case, found in saturated.items()
            }
            reference = f"{args.distinct[0]} adapters"
            document["ratio"] = {case: tokens / typical[reference] for case, tokens in typical.items()}
            print(document["ratio"], flush=True)
            rate = args.load * statistics.median(one["requests_per_second"] for one in saturated[reference])
            document["open"] = {"requests_per_second": rate}
            for case, models in cases.items():
                answers: list[Answer] = []
                for turn in range(args.rounds):
                    answers += asyncio.run(arrive(url, models, args.seconds, rate, turn))
                document["open"][case] = latencies(answers)
                print(f"open, {case}: {document['open'][case]}", flush=True)
            found = running.metrics()
            document["metrics"] = {
                name: found[name] for name in found if name.startswith(("qvera_adapter", "qvera_bank"))
            }
    print(write_result(args.result, document))


if __name__ == "__main__":
    main()
