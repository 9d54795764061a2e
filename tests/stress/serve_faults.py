"""Faults under load against a real `qvera serve`: nothing lost, no wrong answer, no crash; each fault with its count.

    python -m tests.stress.serve_faults                     SmolLM2, about ten minutes
    python -m tests.stress.serve_faults --parts files disk  some parts alone

Adapters with strong random vectors answer greedily in fp32; what each says to each prompt is asked of the idle server
first. From then on every answer under load has to be that of an adapter that the name stood for while it was asked. The parts:

- ``kill``: SIGKILL under load, and a start on the same port. Every adapter then says what it said before.
- ``files``: under load, adapters' files are replaced by a rename, written anew piece by piece, cut short, deleted,
  moved away, and given a broken config. An answer is that of the old or the new vectors; a refusal is right only while
  there is nothing whole; both only until the change is over.
- ``disk``: adapters and log on a disk that is filled under load. (Needs root, for a tmpfs.)
- ``slow``: 200 clients beside the normal ones: a fourth each sends nothing, half a head, half a body, or reads no
  answer; one that is let go comes back. When they come back no longer, the server has to let all of them go.
- ``bodies``: 1,000 bad bodies beside the normal clients: no status of 500 or above, and no connection that just ends.

At the end the server has to be healthy, with no request left in it; memory and open files are in the result. The exit
code is 1 where anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.adapters import write_adapters
from bench.common import RESULTS, header, smollm2
from bench.serving import ServerProcess
from qvera.config.schema import ModelSection
from qvera.utils.paths import ADAPTERS, RECIPE_FILE
from tests.disk import fill
from tests.disk import mounted as small_disk
from tests.stress.bad_bodies import bad_call
from tests.stress.file_changes import change_files
from tests.stress.serve_load import CLIENTS, REFUSED, Tally, Truth, ask_all, body_of, for_seconds, load
from tests.stress.slow_clients import KINDS, SlowClient

PARTS = ("kill", "files", "slow", "bodies", "disk")
MOST_GROWTH_BYTES = 300_000_000
"""Of the server's memory, from its first load to its last."""


class Scene:
    """A directory of adapters on a base, the server that answers with it, and the right answers."""

    def __init__(self, root: Path, base: str, adapters: int) -> None:
        self.root = root
        model = {"path": base, "compute_dtype": "float32"}
        section = ModelSection.model_validate(model)
        (root / ADAPTERS).mkdir(parents=True)
        names = list(write_adapters(root / ADAPTERS, section, 2 * adapters, size=0.3))
        shutil.rmtree(root / ADAPTERS / "first")
        (root / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        recipe = {"model": model, "data": {"path": str(root / "rows.jsonl")}}
        (root / RECIPE_FILE).write_text(yaml.safe_dump(recipe))
        self.names, self.spares = names[:adapters], names[adapters:]
        chooser = random.Random(0)
        self.prompts = [[chooser.randrange(20, 250) for _ in range(chooser.randint(4, 24))] for _ in range(4)]
        self.truth, self.port = Truth(), 0
        self.faults: list[str] = []

    def serve(self, root: Path | None = None, log: Path | None = None, *more: str) -> ServerProcess:
        """Start the server, on the port of the one before."""
        limits = ("--max-new-tokens", "64", "--running", "16")
        server = ServerProcess(str(root or self.root), *limits, *more, port=self.port, log=log)
        self.port = server.port
        return server

    def directory(self, name: str) -> Path:
        return self.root / ADAPTERS / name

    @property
    def questions(self) -> list[tuple[str, int]]:
        return [question for name in self.names for question in self.truth.questions(name)]

    def check(self, part: str, tally: Tally) -> dict[str, Any]:
        """The tally for the result file; what was wrong is kept."""
        self.faults += [f"{part}: {fault}" for fault in tally.faults]
        if not tally.right:
            self.faults.append(f"{part}: nothing was answered")
        return tally.document()


def kill(scene: Scene, server: ServerProcess, kills: int, seconds: float) -> tuple[ServerProcess, dict[str, Any]]:
    """Kill the server ``kills`` times; returns the last one."""
    facts = dict.fromkeys(("sigkills", "broken_by_kills", "answered_before_kills", "answered_after", "wrong"), 0)
    for _ in range(kills):

        async def later(tally: Tally, victim: ServerProcess = server) -> None:
            await for_seconds(tally, seconds, 2 * CLIENTS)
            await asyncio.to_thread(victim.kill)

        under = asyncio.run(load(server.url, scene.truth, scene.questions, CLIENTS, later))
        scene.check("kill", under)
        server = scene.serve()
        after = asyncio.run(ask_all(server.url, scene.truth, scene.questions))
        scene.check("kill", after)
        if after.broken:
            scene.faults.append(f"kill: {after.broken} requests without an answer after the restart")
        facts["sigkills"] += 1
        facts["broken_by_kills"] += under.broken
        facts["answered_before_kills"] += under.right
        facts["answered_after"] += after.right
        facts["wrong"] += len(under.faults) + len(after.faults)
    return server, facts


def files(scene: Scene, server: ServerProcess, rounds: int) -> dict[str, Any]:
    pairs = list(zip(scene.names, scene.spares, strict=True))
    questions = [question for name, spare in pairs for question in scene.truth.questions(name, spare)]
    done: list[dict[str, int]] = []

    async def changes(tally: Tally) -> None:
        done.append(await change_files(scene.root / ADAPTERS, scene.truth, pairs, rounds, tally))

    tally = asyncio.run(load(server.url, scene.truth, questions, CLIENTS, changes))
    if tally.broken:
        scene.faults.append(f"files: {tally.broken} requests without an answer")
    return {"changes": done[0], **scene.check("files", tally)}


def slow(scene: Scene, server: ServerProcess, count: int, seconds: float) -> dict[str, Any]:
    name, number = scene.questions[0]
    body = json.dumps({**body_of(name, scene.prompts[number]), "stream": True}).encode()
    clients = [SlowClient(KINDS[number % len(KINDS)], server.port, body) for number in range(count)]
    files_before, most_files = server.open_files(), 0

    async def be_slow(_: Tally) -> None:
        nonlocal most_files
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for client in clients:
                await asyncio.to_thread(client.go_on)
            most_files = max(most_files, server.open_files())
            await asyncio.sleep(1)

    tally = asyncio.run(load(server.url, scene.truth, scene.questions, CLIENTS, be_slow))
    if tally.broken:
        scene.faults.append(f"slow: {tally.broken} normal requests without an answer")
    began, limit = time.monotonic(), 150.0  # a head has 15 s, a body 30, a reader 60
    while (left := server.open_files() - files_before) > 0 and time.monotonic() - began < limit:
        for client in clients:
            client.go_on(come_back=False)
        time.sleep(1)
    if left > 0:
        scene.faults.append(f"slow: {left} more files open than before, {limit:g} s after the last slow client came")
    opened = {kind: sum(client.opened for client in clients if client.kind == kind) for kind in KINDS}
    return {
        "clients": count, "connections_opened": opened, "most_files_open": most_files, "files_before": files_before,
        "files_left": left, "let_go_after_seconds": time.monotonic() - began, **scene.check("slow", tally),
    }  # fmt: skip


async def send_bad(url: str, scene: Scene, count: int, seed: int) -> dict[str, Any]:
    """Send bad bodies, eight at a time."""
    statuses: collections.Counter[str] = collections.Counter()
    good = {**body_of(scene.names[0], scene.prompts[0]), "stream": False, "stop": ["x"], "seed": 1}
    calls = (bad_call(random.Random(f"{seed} {number}"), good) for number in range(count))

    async def one_client(client: httpx.AsyncClient) -> None:
        for path, headers, content in calls:
            try:
                response = await client.post(path, content=content, headers=headers)
            except httpx.HTTPError as error:
                statuses["broken"] += 1
                scene.faults.append(f"bodies: {type(error).__name__} for {content[:200]!r}")
                continue
            statuses[str(response.status_code)] += 1
            if response.status_code >= 500:
                scene.faults.append(f"bodies: {response.status_code} {response.text[:200]} for {content[:200]!r}")

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(one_client(client) for _ in range(8)))
    return dict(sorted(statuses.items()))


def bodies(scene: Scene, server: ServerProcess, count: int) -> dict[str, Any]:
    found: list[dict[str, Any]] = []

    async def send(_: Tally) -> None:
        found.append(await send_bad(server.url, scene, count, seed=0))

    tally = asyncio.run(load(server.url, scene.truth, scene.questions, CLIENTS // 2, send))
    if tally.broken:
        scene.faults.append(f"bodies: {tally.broken} normal requests without an answer")
    return {"bodies": count, "statuses_of_bad": found[0], "normal": scene.check("bodies", tally)}


def disk(scene: Scene, seconds: float) -> dict[str, Any]:
    """A server of its own, whose adapters and log are on a disk that becomes full."""
    facts: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        size = sum(file.stat().st_size for file in scene.root.rglob("*") if file.is_file()) + 4_000_000
        try:
            where = stack.enter_context(small_disk(scene.root.with_name("disk"), size))
        except OSError as error:
            return {"skipped": str(error)}
        shutil.copytree(scene.root, where / "run")
        server = stack.enter_context(scene.serve(where / "run", where / "log", "--log-calls"))
        new, source = where / "run" / ADAPTERS / "new", scene.directory(scene.spares[0])
        new_questions = [("new", number) for _, number in scene.truth.questions(scene.spares[0])]

        async def fill_and_free(tally: Tally) -> None:
            await for_seconds(tally, seconds / 4, 2 * CLIENTS)
            filler = fill(where)
            lines = server.said.count("\n")
            try:
                scene.truth.becomes("new", REFUSED)
                shutil.copytree(source, new)
                scene.faults.append("disk: the disk is not full")
            except (OSError, shutil.Error):
                facts["files_of_the_half_copied_adapter"] = {file.name: file.stat().st_size for file in new.iterdir()}
            refused = await ask_all(server.url, scene.truth, new_questions)
            facts["half_copied_adapter_refused"] = refused.refused
            scene.faults += [f"disk: {fault}" for fault in refused.faults]
            await for_seconds(tally, seconds / 2, 2 * CLIENTS)
            facts["log_lines_while_full"] = server.said.count("\n") - lines
            filler.unlink()
            shutil.copytree(source, new, dirs_exist_ok=True)
            scene.truth.becomes("new", scene.spares[0])
            lines = server.said.count("\n")
            await for_seconds(tally, seconds / 4, 2 * CLIENTS)
            facts["log_lines_after"] = server.said.count("\n") - lines
            facts["new_adapter_answers"] = scene.check("disk", await ask_all(server.url, scene.truth, new_questions))

        tally = asyncio.run(load(server.url, scene.truth, scene.questions, CLIENTS, fill_and_free))
        if tally.broken:
            scene.faults.append(f"disk: {tally.broken} requests without an answer")
        if not facts["log_lines_after"]:
            scene.faults.append("disk: the log did not go on")
        facts |= scene.check("disk", tally)
        facts |= {"exit_code": server.stop()}
    return facts


def healthy(scene: Scene, server: ServerProcess) -> dict[str, Any]:
    """What is left in a server when nobody asks any more."""
    end = time.monotonic() + 30
    while (found := server.metrics())["qvera_requests_running"] + found["qvera_requests_waiting"] > 0:
        if time.monotonic() > end:
            scene.faults.append("end: requests are left in the engine")
            break
        time.sleep(0.1)
    status = httpx.get(f"{server.url}/health", timeout=60).status_code
    if status != 200:
        scene.faults.append(f"end: /health says {status}")
    return {"health": status, "metrics": found}


def run(scene: Scene, args: argparse.Namespace) -> dict[str, Any]:
    document: dict[str, Any] = {"clients": CLIENTS, "adapters": len(scene.names), "rss_bytes": {}, "open_files": {}}
    server = scene.serve()
    try:
        scene.truth.learn(server.url, [*scene.names, *scene.spares], scene.prompts)
        everything = [*scene.names, *scene.spares]
        document["questions"] = len(scene.questions)
        document["adapters_with_answers_of_their_own"] = scene.truth.distinct(everything)
        if document["adapters_with_answers_of_their_own"] < len(everything):
            scene.faults.append("the adapters do not all differ, so an answer of the wrong one could pass")

        async def some_time(tally: Tally) -> None:
            await for_seconds(tally, args.seconds / 4, 2 * CLIENTS)

        def note(part: str) -> None:
            document["rss_bytes"][part], document["open_files"][part] = server.rss_bytes(), server.open_files()
            print(part, json.dumps(document.get(part)), flush=True)

        if "kill" in args.parts:
            server, document["kill"] = kill(scene, server, args.kills, args.seconds / 4)
        tally = asyncio.run(load(server.url, scene.truth, scene.questions, CLIENTS, some_time))
        document["load"] = scene.check("load", tally)
        note("load")
        for part, do in (
            ("files", lambda: files(scene, server, args.changes)),
            ("slow", lambda: slow(scene, server, args.slow, args.seconds)),
            ("bodies", lambda: bodies(scene, server, args.bodies)),
        ):
            if part in args.parts:
                document[part] = do()
                note(part)
        tally = asyncio.run(load(server.url, scene.truth, scene.questions, CLIENTS, some_time))
        document["last load"] = scene.check("last load", tally)
        document["end"] = healthy(scene, server)
        note("last load")
        growth = document["rss_bytes"]["last load"] - document["rss_bytes"]["load"]
        document["growth_bytes"] = growth
        if growth > MOST_GROWTH_BYTES:
            scene.faults.append(f"end: the server's memory grew by {growth:,} bytes")
        document["exit_code"] = server.stop()
        if document["exit_code"]:
            scene.faults.append(f"end: exit code {document['exit_code']}")
        if "Traceback" in server.said:
            scene.faults.append(f"end: the log has a traceback:\n{server.said[-3000:]}")
        if "disk" in args.parts:
            document["disk"] = disk(scene, args.seconds / 2)
            print("disk", json.dumps(document["disk"]), flush=True)
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGKILL)
    document["faults"] = scene.faults
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a checkpoint directory (default: SmolLM2)")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--seconds", type=float, default=60, help="of load: a quarter before each kill, all of it for slow"
    )
    for name, default in (("kills", 5), ("changes", 60), ("slow", 200), ("bodies", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_faults.json")
    args = parser.parse_args(arguments)
    document = header()
    with tempfile.TemporaryDirectory() as scratch:
        scene = Scene(Path(scratch) / "run", args.base or smollm2(), args.adapters)
        document |= run(scene, args)
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(document["faults"][:20]) or "no fault")
    print(args.out)
    return 1 if document["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
