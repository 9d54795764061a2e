"""Tinker's API under many tenants for a long time: mixed load, kills, clients that go away, NaN, bad and foreign calls.

    python -m tests.stress.tinker_soak [--tenants 1000] [--minutes 60] [--kill-seconds 120] [--replays 20]

Each tenant has a model, LoRA or VeRA, and does what clients do: forward_backward of three losses, optimizer steps,
samplers and answers, states that are saved and loaded into new models, sessions that end and begin. In between it goes
away in the middle of calls and sends them again, sends calls that must be refused, and asks for what is another's.

For half of the time the server is killed by SIGKILL every ``--kill-seconds``; the clients go on. The other half is one server
process, whose memory, threads and files are watched. Then the server is killed once more, and:

- nothing is lost: each model gives the log-probabilities that it gave before, and ``--replays`` of them are made anew
  and trained alone by the same calls, with which all log-probabilities of all calls must agree to ``--tolerance``;
- nothing is leaked: memory grew by little in the second half, and no thread or file is left over;
- there was no status of 5xx, and no promise is left without a result.

Writes bench/results/tinker_soak.json. Ends with 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import math
import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import zstandard
from rich.console import Console
from transformers import AutoConfig

from bench.common import RESULTS, header, smollm2, write_rows
from bench.serving import ServerProcess, model_name
from bench.tinkering import Failed, Link, Refused, Row, Trained, random_rows, send_heartbeats, write_keys
from qvera.config.schema import parse_recipe
from qvera.training.trainer import train

RATE = 5e-3  # so large that a lost step is seen
MOST_GROWTH = 0.1  # of the memory, in the second half
MOST_NEW_FILES = 8
MOST_NEW_THREADS = 72 + min(32, (os.cpu_count() or 1) + 4)
"""At the end beside the start. The server's pools (three of 10 threads in all, AnyIO's of 40, and asyncio's own) fill when calls
come, and products take a thread a core; a thread that stays for each call or each model would be hundreds."""
MOST_STEPS = 15
"""Of a model. Rounding depends on who shares a pass, and what it changes grows with every step at this rate: after 30
steps of VeRA to 1e-3, among replays without any fault too."""
TENANTS_OF_A_KEY = 4


def make_fp32_run(base: str, to: Path) -> None:
    """A run whose base computes in fp32 when it is served, whatever the device likes best."""
    rows = write_rows(to.with_suffix(".jsonl"), [{"text": "a a a a"}] * 4)
    recipe = {
        "model": {"path": base, "compute_dtype": "float32"}, "data": {"path": rows, "eval_fraction": 0.0}, "adapter": {"rank": 1},
        "training": {"output_dir": str(to), "max_steps": 1, "global_batch_size": 1, "sample_count": 0, "report_to": []},
    }  # fmt: skip
    train(parse_recipe(recipe, "tinker_soak"), to, console=Console(quiet=True))


class Rows(NamedTuple):
    """A forward_backward that was done, and its result."""

    rows: list[Row]
    loss: str
    logprobs: list[np.ndarray]


class Step(NamedTuple):
    """An optimizer step that was done."""

    rate: float


class Scene:
    """The server, its clients, and what went wrong."""

    def __init__(self, base: str, directory: Path, args: argparse.Namespace) -> None:
        self.base, self.directory, self.args = base, directory, args
        make_fp32_run(base, directory / "run")
        self.vocabulary = min(40_000, int(AutoConfig.from_pretrained(base).vocab_size))
        self.keys = write_keys(directory / "keys.json", -(-args.tenants // TENANTS_OF_A_KEY) + 1)
        self.statuses: collections.Counter[int] = collections.Counter()
        self.done: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.is_over = False
        self.bomb = zstandard.ZstdCompressor().compress(bytes(200 << 20))
        self.server = self.start(0)
        self.http = self.client()

    def start(self, port: int) -> ServerProcess:
        """A server over the directory."""
        options = ["--tinker", "--training-dir", str(self.directory / "training")]
        limits = ["--queue", "100000", "--max-connections", "20000", "--keys", str(self.directory / "keys.json")]
        return ServerProcess(str(self.directory / "run"), *options, *limits, port=port, log=self.directory / "log")

    def client(self) -> httpx.AsyncClient:
        """Connections to the server."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.server.url, timeout=120, limits=limits)

    def link(self, key: int) -> Link:
        """Calls by a key."""
        return Link(self.http, self.keys[key], self.statuses)

    async def kill_and_start(self) -> float:
        """SIGKILL, and a new server at the same place. Returns the seconds until that takes calls."""
        port = self.server.port
        self.server.kill()
        self.server = await asyncio.to_thread(self.start, port)
        return self.server.start_seconds

    def fault(self, what: str) -> None:
        """Note it, and show the first ones."""
        self.faults.append(what)
        if len(self.faults) <= 20:
            print("FAULT", what[:600], flush=True)


class Tenant:
    """One tenant, and the log of all that its model has done."""

    def __init__(self, scene: Scene, number: int) -> None:
        self.scene, self.number = scene, number
        self.chooser = random.Random(f"tenant {number}")
        self.link = scene.link(number // TENANTS_OF_A_KEY)
        self.other = scene.link((number // TENANTS_OF_A_KEY + 1) % len(scene.keys))
        self.log: list[Rows | Step] = []
        self.names = 0
        self.answers = 0
        name = model_name(scene.base)
        self.kind = [(name, 1), (f"{name}:vera-16", 8), (name, 4)][number % 3]
        self.probe = random_rows(self.chooser, 1, 8, 8, scene.vocabulary)
        self.last_probe: np.ndarray | None = None
        self.seed = number

    async def begin(self) -> None:
        """Make its model."""
        self.model = await Trained.create(self.link, *self.kind, self.seed)
        self.log.clear()
        self.last_probe = None

    async def go_on(self) -> None:
        """Do one thing after the other until the end."""
        weighted = [
            (10, self.train), (2, self.accumulate), (2, self.learn_from_advantages), (2, self.sample), (2, self.be_wrong),
            (1, self.be_foreign), (0.5, self.save_and_load), (0.2, self.begin_anew), (1, self.repeat),
        ]  # fmt: skip
        parts = [one for one in weighted if one[1].__name__ not in self.scene.args.without]
        weights = [weight for weight, _ in parts]
        while not self.scene.is_over:
            _, part = self.chooser.choices(parts, weights)[0]
            if sum(isinstance(done, Step) for done in self.log) >= MOST_STEPS:
                part = self.begin_anew
            try:
                await part()
                self.scene.done[part.__name__] += 1
            except (Refused, Failed, TimeoutError, KeyError, ValueError, httpx.HTTPError) as error:
                self.scene.fault(f"tenant {self.number}, {part.__name__}: {type(error).__name__} {error}")
                return  # what its model has done is not known any more
        self.last_probe = await self.look()

    async def send(self, path: str, body: Any) -> str:
        """Send a call; sometimes go away in the middle of it and send it again."""
        if self.chooser.random() < 0.1:
            with contextlib.suppress(TimeoutError, httpx.TransportError):
                await asyncio.wait_for(self.link.once(path, body), self.chooser.choice([0.001, 0.01, 0.1]))
        return await self.model.send(path, body)

    async def result(self, promise: str, **settings: Any) -> httpx.Response:
        """Wait for a result; sometimes go away in the middle of it and ask again."""
        if self.chooser.random() < 0.1:
            with contextlib.suppress(TimeoutError, httpx.TransportError):
                await asyncio.wait_for(self.link.once("retrieve_future", {"request_id": promise}), 0.02)
        return await self.link.result(promise, **settings)

    def rows(self) -> list[Row]:
        """Some rows of cross_entropy."""
        return random_rows(self.chooser, self.chooser.randint(1, 4), 2, 24, self.scene.vocabulary)

    async def begin_rows(self, rows: list[Row], loss: str = "cross_entropy", forward_only: bool = False) -> str:
        body = self.model.rows_body(self.model.next_seq(), rows, loss, None, forward_only)
        return await self.send("forward_backward", body)

    async def finish_rows(self, promise: str, rows: list[Row], loss: str = "cross_entropy") -> None:
        found = await self.model.logprobs(promise)
        if not all(
            np.isfinite(one).all() and len(one) == len(row.tokens) for one, row in zip(found, rows, strict=True)
        ):
            self.scene.fault(f"tenant {self.number}: log-probabilities {found}")
        self.log.append(Rows(rows, loss, found))

    async def step(self) -> str:
        self.log.append(Step(RATE))
        return await self.model.begin_step(RATE)

    async def look(self) -> np.ndarray:
        """What its model says of its probe."""
        return (await self.model.logprobs(await self.begin_rows(self.probe, forward_only=True)))[0]

    async def train(self) -> None:
        """A forward_backward and a step, both sent before either is waited for."""
        rows = self.rows()
        first = await self.begin_rows(rows)
        log_at = len(self.log)
        second = await self.step()
        await self.finish_rows(first, rows)
        self.log.insert(log_at, self.log.pop())
        await self.result(second)

    async def accumulate(self) -> None:
        """Two forward_backward, whose gradients are left for a later step."""
        for _ in range(2):
            rows = self.rows()
            await self.finish_rows(await self.begin_rows(rows), rows)

    async def learn_from_advantages(self) -> None:
        """Reinforcement learning, as a client does it."""
        rows = self.rows()
        now = await self.model.logprobs(await self.begin_rows(rows, forward_only=True))
        weighted = []
        for row, own in zip(rows, now, strict=True):
            given = {"logprobs": own.tolist(), "advantages": [self.chooser.uniform(-1, 1)] * len(own)}
            weighted.append(Row(row.tokens, {"target_tokens": row.inputs["target_tokens"], **given}))
        loss = self.chooser.choice(["importance_sampling", "ppo"])
        await self.finish_rows(await self.begin_rows(weighted, loss), weighted, loss)
        await self.result(await self.step())

    async def sample(self) -> None:
        """An answer, whose log-probabilities are those of the model in training."""
        sampler = await self.model.sampler()
        prompt = self.rows()[0].tokens
        self.answers += 1
        answer = await self.model.sample(sampler, self.answers, prompt, 8)
        tokens = [*prompt, *answer.tokens]
        row = Row(tokens[:-1], {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)})
        found = (await self.model.logprobs(await self.begin_rows([row], forward_only=True)))[0][-len(answer.tokens) :]
        if (apart := float(np.abs(found - answer.logprobs).max())) > self.scene.args.sampler_tolerance:
            self.scene.fault(f"tenant {self.number}: sampler and trainer differ by {apart:.2g}")

    async def be_wrong(self) -> None:
        """A call that must be refused and leave no trace."""
        name, path, body, headers = self._wrong()
        try:
            response = await self.link.call(path, body, **headers)
            if path == "retrieve_future":
                raise ValueError(response.text)
            await self.link.result(response.json()["request_id"])
        except Refused:
            return
        except Failed as error:
            if error.category == "user":
                return
            self.scene.fault(f"tenant {self.number}: {name} fails as {error}")
            return
        self.scene.fault(f"tenant {self.number}: {name} was accepted")

    def _wrong(self) -> tuple[str, str, Any, dict[str, str]]:
        """One of each way to be wrong; what else is refused: test_messages.py and test_order.py."""
        model, choose, rows = self.model, self.chooser.choice, self.rows()
        row, seq = rows[0], {"model_id": model.id, "seq_id": model.next_seq()}
        what = choose(["NaN", "a token beyond the vocabulary", "loss", "zstd bomb", "noise", "cut", "call"])
        if what == "call":
            path, fields = choose(
                [
                    ("optim_step", {**seq, "adam_params": {"learning_rate": math.nan}}),
                    ("save_weights", {**seq, "path": "../../etc"}),
                    ("no_such_call", seq),
                    ("load_weights", {**seq, "path": "tinker://x/weights/y", "optimizer": True}),
                    ("create_model", {"session_id": model.session, "model_seq_id": 8, "base_model": "no/such"}),
                    ("retrieve_future", {"request_id": "nonsense"}),
                ]
            )
            return f"{path} {str(fields)[-60:]}", path, fields, {}
        if what == "NaN":
            row.inputs.update(weights=[math.nan] * len(row.tokens))
        if what.startswith("a token"):
            row.tokens[0] = 10**8
        body = model.rows_body(model.seq, rows, "x" if what == "loss" else "cross_entropy")
        assert isinstance(body, bytes)
        if what == "zstd bomb":
            return what, "forward_backward", self.scene.bomb, {"Content-Encoding": "zstd"}
        body = {"noise": self.chooser.randbytes(choose([1, 100, 10_000])), "cut": body[: len(body) // 2]}.get(
            what, body
        )
        return what, "forward_backward", body, {}

    async def be_foreign(self) -> None:
        """Ask for what is another's: none of it is to be had, and it changes nothing."""
        model, stranger = self.model, self.other
        rows = model.rows_body(model.seq + 1, self.rows())
        sampler = await model.sampler()
        promise = await self.begin_rows(self.rows(), forward_only=True)
        asked = {"sampling_session_id": sampler, "seq_id": 10**6, "num_samples": 1, "sampling_params": {"max_tokens": 1},
                 "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "type": "sample"}  # fmt: skip
        calls: list[tuple[str, Any]] = [
            ("get_info", {"model_id": model.id}),
            ("forward_backward", rows),
            ("optim_step", {"model_id": model.id, "seq_id": model.seq + 1, "adam_params": {}}),
            ("retrieve_future", {"request_id": promise}),
            (f"sessions/{model.session}/finish", {"reason": {"type": "success"}}),
            ("asample", asked),
            ("weights_info", {"tinker_path": f"tinker://{model.id}/weights/s1"}),
        ]
        for path, body in self.chooser.sample(calls, 3):
            try:
                response = await stranger.call(path, body)
                self.scene.fault(f"tenant {self.number}: a stranger's {path} gives {response.text[:200]}")
            except Refused as error:
                if error.status not in (403, 404):
                    self.scene.fault(f"tenant {self.number}: a stranger's {error}")
        await self.model.logprobs(promise)

    async def save_and_load(self) -> None:
        """A saved state makes a model that goes on as this one does."""
        self.names += 1
        named = {"path": f"s{self.names}", "overwrite": False}
        body = {"model_id": self.model.id, "seq_id": self.model.next_seq(), **named}
        path = (await self.result(await self.send("save_weights", body))).json()["path"]
        session = await self.link.session()
        asked = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True, "type": "load_weights"}
        await self.link.result((await self.link.json("load_weights", asked))["request_id"])
        copy = Trained(self.link, session, f"{session}:train:0", self.scene.base)
        found = (await copy.logprobs(await copy.begin_rows(self.probe, forward_only=True)))[0]
        if (apart := float(np.abs(found - await self.look()).max())) > self.scene.args.tolerance:
            self.scene.fault(f"tenant {self.number}: a loaded state differs by {apart:.2g}")
        await copy.finish()
        checkpoint = f"training_runs/{self.model.id}/checkpoints/weights/s{self.names}"
        try:
            await self.link.call(checkpoint, {}, "DELETE")
        except Refused as error:
            if error.status != 404:  # a call before it was done, whose answer a kill has taken
                raise

    async def begin_anew(self) -> None:
        """End the session and make another model."""
        await self.model.finish()
        self.seed += 10_000
        await self.begin()

    async def repeat(self) -> None:
        """The same call twice is one call."""
        rows = self.rows()
        body = self.model.rows_body(self.model.next_seq(), rows)
        first, second = await asyncio.gather(*(self.model.send("forward_backward", body) for _ in range(2)))
        if first != second:
            self.scene.fault(f"tenant {self.number}: one call has the promises {first} and {second}")
        await self.finish_rows(first, rows)
        await self.result(await self.step())


async def replay(tenant: Tenant) -> dict[str, float]:
    """Do again alone what a tenant's model did; how far apart log-probabilities are, and how far the last step moved them."""
    model = await Trained.create(tenant.link, *tenant.kind, tenant.seed)
    apart, moved, before = 0.0, 0.0, None
    last_step = max((at for at, done in enumerate(tenant.log) if isinstance(done, Step)), default=-1)
    for at, done in enumerate(tenant.log):
        if isinstance(done, Step):
            if at == last_step:
                before = (await model.logprobs(await model.begin_rows(tenant.probe, forward_only=True)))[0]
            await model.link.result(await model.begin_step(done.rate))
            continue
        found = await model.logprobs(await model.begin_rows(done.rows, done.loss))
        apart = max(apart, *(float(np.abs(a - b).max()) for a, b in zip(found, done.logprobs, strict=True)))
    after = (await model.logprobs(await model.begin_rows(tenant.probe, forward_only=True)))[0]
    if tenant.last_probe is not None:
        apart = max(apart, float(np.abs(after - tenant.last_probe).max()))
    if before is not None:
        moved = float(np.abs(after - before).max())
    await model.finish()
    return {"calls": len(tenant.log), "apart": apart, "moved_by_the_last_step": moved}


async def watch(scene: Scene, kept: list[dict[str, float]], every: float) -> None:
    """Memory, threads and files of the server, without end."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(scene.server.process.pid)
            found = {
                "rss_bytes": process.memory_info().rss,
                "threads": process.num_threads(),
                "files": process.num_fds(),
            }
            kept.append({"seconds": time.monotonic() - began, **found, "steps": sum(scene.done.values())})
        await asyncio.sleep(every)


async def run(scene: Scene) -> dict[str, Any]:
    args = scene.args
    half = args.minutes * 30
    files_before, threads_before = scene.server.open_files(), psutil.Process(scene.server.process.pid).num_threads()
    tenants = [Tenant(scene, number) for number in range(args.tenants)]
    began = time.monotonic()
    for first in range(0, len(tenants), 32):
        await asyncio.gather(*(tenant.begin() for tenant in tenants[first : first + 32]))
    document: dict[str, Any] = {"seconds_to_make_all": time.monotonic() - began, "restart_seconds": []}
    print("all made", document, flush=True)
    beating = asyncio.create_task(send_heartbeats(tenants))
    work = [asyncio.create_task(tenant.go_on()) for tenant in tenants]
    ends_at = time.monotonic() + half
    while time.monotonic() + args.kill_seconds < ends_at:
        await asyncio.sleep(args.kill_seconds * random.uniform(0.5, 1))
        document["restart_seconds"].append(await scene.kill_and_start())
        print(f"killed; {dict(scene.done)}, {len(scene.faults)} faults", flush=True)
    await asyncio.sleep(max(ends_at - time.monotonic(), 0))
    seen: list[dict[str, float]] = []
    watching = asyncio.create_task(watch(scene, seen, half / 60))
    await asyncio.sleep(half)
    watching.cancel()
    scene.is_over = True
    await asyncio.gather(*work)
    beating.cancel()
    document["watched"] = seen
    third = len(seen) // 3  # the first third of it: the bank and caches grow to their sizes
    growth = seen[-1]["rss_bytes"] / seen[third]["rss_bytes"] - 1
    document["memory_growth"] = growth
    if growth > MOST_GROWTH:
        scene.fault(f"the server's memory grew by {growth:.0%} in the end")
    await scene.http.aclose()
    end, process = time.monotonic() + 90, psutil.Process(scene.server.process.pid)
    while (left := scene.server.open_files() - files_before) > MOST_NEW_FILES and time.monotonic() < end:
        await asyncio.sleep(1)
    document["files_left"], document["threads_left"] = left, process.num_threads() - threads_before
    if left > MOST_NEW_FILES or document["threads_left"] > MOST_NEW_THREADS:
        scene.fault(f"{left} files and {document['threads_left']} threads more than at the start")
    document["last_restart_seconds"] = await scene.kill_and_start()
    scene.http = scene.client()
    sound = [tenant for tenant in tenants if tenant.last_probe is not None]
    for tenant in sound:
        tenant.link.http = tenant.other.http = scene.http
        before, tenant.last_probe = tenant.last_probe, await tenant.look()
        if before is None or (apart := float(np.abs(tenant.last_probe - before).max())) > args.tolerance:
            scene.fault(f"tenant {tenant.number}: after the last kill its model differs by {apart:.2g}")
    document["compared_after_the_last_kill"] = len(sound)
    document["replays"] = []
    for tenant in random.Random(0).sample(sound, min(args.replays, len(sound))):
        found = await replay(tenant)
        document["replays"].append({"tenant": tenant.number, **found})
        if found["apart"] > args.tolerance:
            scene.fault(f"tenant {tenant.number}: a replay alone differs: {found}")
    for tenant in tenants:
        tenant.model.link.http = scene.http
        await tenant.model.finish()
    await scene.http.aclose()
    document["exit_code"] = await asyncio.to_thread(scene.server.stop)
    return document


def judge(scene: Scene, document: dict[str, Any]) -> None:
    """What is left once the server has ended."""
    if document["exit_code"]:
        scene.fault(f"exit code {document['exit_code']}")
    if errors := {status: count for status, count in scene.statuses.items() if status >= 500}:
        scene.fault(f"statuses {errors}")
    said = (scene.directory / "log").read_text(errors="replace")
    if "Traceback" in said:
        at = said.index("Traceback")
        scene.fault(f"the log has {said.count('Traceback')} tracebacks, the first: {said[at : at + 3000]}")
    root = scene.directory / "training" / "tinker"
    with contextlib.closing(sqlite3.connect(root / "tinker.sqlite")) as database:
        pending = database.execute(
            "SELECT kind, COUNT(*) FROM promises WHERE state = 'pending' GROUP BY kind"
        ).fetchall()
    if pending:
        scene.fault(f"promises without a result: {pending}")
    left = [
        str(file.relative_to(root)) for name in ("sessions", "models") for file in (root / name).rglob("*.safetensors")
    ]
    if left:
        scene.fault(f"{len(left)} files of ended sessions: {left[:5]}")
    document["disk_bytes"] = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a checkpoint directory (default: SmolLM2)")
    parser.add_argument("--tenants", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kill-seconds", type=float, default=120)
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=5e-4, help="of log-probabilities, in a replay")
    parser.add_argument("--sampler-tolerance", type=float, default=1e-3, help="between a sampler and the model")
    parser.add_argument("--without", nargs="+", default=[], metavar="PART", help="leave a part of the load out")
    parser.add_argument("--directory", type=Path, help="for the server's files (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS / "tinker_soak.json")
    args = parser.parse_args(arguments)
    document = {**header(), "tenants": args.tenants, "minutes": args.minutes, "kill_seconds": args.kill_seconds}
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.directory or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        scene = Scene(args.base or smollm2(), directory, args)
        try:
            document |= asyncio.run(run(scene))
            judge(scene, document)
        finally:
            scene.server.kill()
    document |= {"done": scene.done, "statuses": scene.statuses, "faults": scene.faults}
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(fault[:600] for fault in scene.faults[:20]) or "no fault")
    print(args.out)
    return 1 if scene.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
