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
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.adapters import write_adapters
from bench.common import RESULTS, header, smollm2, write_rows
from bench.serving import ServerProcess
from qvera.config.sections import ModelSection
from qvera.utils.files import ADAPTERS, RECIPE_FILE
from tests.disk import fill, mounted
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
        (root / ADAPTERS).mkdir(parents=True)
        section = ModelSection.model_validate(model)
        names = list(write_adapters(root / ADAPTERS, section, 2 * adapters, size=0.3))
        shutil.rmtree(root / ADAPTERS / "first")
        recipe = {
            "model": model,
            "data": {"path": write_rows(root / "rows.jsonl", [{"prompt": "a", "completion": "b"}])},
        }
        (root / RECIPE_FILE).write_text(yaml.safe_dump(recipe))
        self.names, self.spares = names[:adapters], names[adapters:]
        chooser = random.Random(0)
        self.prompts = [[chooser.randrange(20, 250) for _ in range(chooser.randint(4, 24))] for _ in range(4)]
        self.truth, self.faults = Truth(), list[str]()
        self.server = self.start(root)

    def start(self, root: Path, port: int = 0, log: Path | None = None, *more: str) -> ServerProcess:
        return ServerProcess(str(root), "--max-new-tokens", "64", "--running", "16", *more, port=port, log=log)

    @property
    def questions(self) -> list[tuple[str, int]]:
        return [question for name in self.names for question in self.truth.questions(name)]

    def check(self, part: str, tally: Tally) -> dict[str, Any]:
        """The tally for the result file; what was wrong is kept."""
        self.faults += [f"{part}: {fault}" for fault in tally.faults]
        if not tally.right:
            self.faults.append(f"{part}: nothing was answered")
        if tally.broken and part != "kill":
            self.faults.append(f"{part}: {tally.broken} requests without an answer")
        return tally.document()

    def under_load(
        self,
        part: str,
        during: Callable[[Tally], Awaitable[None]],
        questions: Sequence[tuple[str, int]] = (),
        server: ServerProcess | None = None,
    ) -> dict[str, Any]:
        url = (server or self.server).url
        return self.check(part, asyncio.run(load(url, self.truth, questions or self.questions, CLIENTS, during)))

    def under_load_alone(self, part: str, seconds: float) -> dict[str, Any]:
        return self.under_load(part, lambda tally: for_seconds(tally, seconds, 2 * CLIENTS))


def kill(scene: Scene, kills: int, seconds: float) -> dict[str, Any]:
    facts: collections.Counter[str] = collections.Counter(sigkills=kills)
    for _ in range(kills):

        async def later(tally: Tally) -> None:
            await for_seconds(tally, seconds, 2 * CLIENTS)
            await asyncio.to_thread(scene.server.kill)

        under = scene.under_load("kill", later)
        scene.server = scene.start(scene.root, scene.server.port)
        after = asyncio.run(ask_all(scene.server.url, scene.truth, scene.questions))
        after_kill = scene.check("after a kill", after)
        facts.update(broken_by_kills=under["broken"], wrong=under["wrong"] + after_kill["wrong"])
        facts.update(answered_before_kills=under["right"], answered_after=after_kill["right"])
    return dict(facts)


def files(scene: Scene, rounds: int) -> dict[str, Any]:
    pairs = list(zip(scene.names, scene.spares, strict=True))
    questions = [question for name, spare in pairs for question in scene.truth.questions(name, spare)]
    done: dict[str, int] = {}

    async def changes(tally: Tally) -> None:
        done.update(await change_files(scene.root / ADAPTERS, scene.truth, pairs, rounds, tally))

    return {**scene.under_load("files", changes, questions), "changes": done}


def slow(scene: Scene, count: int, seconds: float) -> dict[str, Any]:
    server, (name, number) = scene.server, scene.questions[0]
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

    normal = scene.under_load("slow", be_slow)
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
        "files_left": left, "let_go_after_seconds": time.monotonic() - began, **normal,
    }  # fmt: skip


def bodies(scene: Scene, count: int) -> dict[str, Any]:
    """Send bad bodies, eight at a time."""
    statuses: collections.Counter[str] = collections.Counter()
    good = {**body_of(scene.names[0], scene.prompts[0]), "stream": False, "stop": ["x"], "seed": 1}
    calls = (bad_call(random.Random(f"0 {number}"), good) for number in range(count))

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

    async def send(_: Tally) -> None:
        async with httpx.AsyncClient(base_url=scene.server.url, timeout=120) as client:
            await asyncio.gather(*(one_client(client) for _ in range(8)))

    normal = scene.under_load("bodies", send)
    return {"bodies": count, "statuses_of_bad": dict(sorted(statuses.items())), "normal": normal}


def disk(scene: Scene, seconds: float) -> dict[str, Any]:
    """A server of its own, whose adapters and log are on a disk that becomes full."""
    facts: dict[str, Any] = {}
    size = sum(file.stat().st_size for file in scene.root.rglob("*") if file.is_file()) + 4_000_000
    with contextlib.ExitStack() as stack:
        try:
            where = stack.enter_context(mounted(scene.root.with_name("disk"), size))
        except OSError as error:
            return {"skipped": str(error)}
        shutil.copytree(scene.root, where / "run")
        server = stack.enter_context(scene.start(where / "run", 0, where / "log", "--log-calls"))
        new, spare = where / "run" / ADAPTERS / "new", scene.spares[0]
        questions = [("new", number) for _, number in scene.truth.questions(spare)]

        async def lines_in(tally: Tally, seconds: float) -> int:
            lines = server.said.count("\n")
            await for_seconds(tally, seconds, 2 * CLIENTS)
            return server.said.count("\n") - lines

        async def fill_and_free(tally: Tally) -> None:
            await for_seconds(tally, seconds / 4, 2 * CLIENTS)
            filler = fill(where)
            scene.truth.becomes("new", REFUSED)
            try:
                shutil.copytree(scene.root / ADAPTERS / spare, new)
                scene.faults.append("disk: the disk is not full")
            except (OSError, shutil.Error):
                facts["files_of_the_half_copied_adapter"] = {file.name: file.stat().st_size for file in new.iterdir()}
            refused = await ask_all(server.url, scene.truth, questions)
            facts["half_copied_adapter_refused"] = refused.refused
            scene.faults += [f"disk: {fault}" for fault in refused.faults]
            facts["log_lines_while_full"] = await lines_in(tally, seconds / 2)
            filler.unlink()
            shutil.copytree(scene.root / ADAPTERS / spare, new, dirs_exist_ok=True)
            scene.truth.becomes("new", spare)
            facts["log_lines_after"] = await lines_in(tally, seconds / 4)
            facts["new_adapter_answers"] = scene.check("disk", await ask_all(server.url, scene.truth, questions))

        facts |= scene.under_load("disk", fill_and_free, server=server)
        if not facts["log_lines_after"]:
            scene.faults.append("disk: the log did not go on")
        facts |= {"exit_code": server.stop()}
    return facts


def healthy(scene: Scene) -> dict[str, Any]:
    """What is left in a server when nobody asks any more."""
    end = time.monotonic() + 30
    while (found := scene.server.metrics())["qvera_requests_running"] + found["qvera_requests_waiting"] > 0:
        if time.monotonic() > end:
            scene.faults.append("end: requests are left in the engine")
            break
        time.sleep(0.1)
    status = httpx.get(f"{scene.server.url}/health", timeout=60).status_code
    if status != 200:
        scene.faults.append(f"end: /health says {status}")
    return {"health": status, "metrics": found}


def run(scene: Scene, args: argparse.Namespace) -> dict[str, Any]:
    document: dict[str, Any] = {"clients": CLIENTS, "adapters": len(scene.names), "rss_bytes": {}, "open_files": {}}
    everything = [*scene.names, *scene.spares]
    scene.truth.learn(scene.server.url, everything, scene.prompts)
    document["questions"] = len(scene.questions)
    document["adapters_with_answers_of_their_own"] = scene.truth.distinct(everything)
    if document["adapters_with_answers_of_their_own"] < len(everything):
        scene.faults.append("the adapters do not all differ, so an answer of the wrong one could pass")
    if "kill" in args.parts:
        document["kill"] = kill(scene, args.kills, args.seconds / 4)
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "load": lambda: scene.under_load_alone("load", args.seconds / 4),
        "files": lambda: files(scene, args.changes),
        "slow": lambda: slow(scene, args.slow, args.seconds),
        "bodies": lambda: bodies(scene, args.bodies),
        "last load": lambda: scene.under_load_alone("last load", args.seconds / 4),
    }
    for part, do in steps.items():
        if part in args.parts or part not in PARTS:
            document[part] = do()
            server = scene.server
            document["rss_bytes"][part], document["open_files"][part] = server.rss_bytes(), server.open_files()
            print(part, json.dumps(document[part]), flush=True)
    document["end"] = healthy(scene)
    document["growth_bytes"] = document["rss_bytes"]["last load"] - document["rss_bytes"]["load"]
    if document["growth_bytes"] > MOST_GROWTH_BYTES:
        scene.faults.append(f"end: the server's memory grew by {document['growth_bytes']:,} bytes")
    document["exit_code"] = scene.server.stop()
    if document["exit_code"]:
        scene.faults.append(f"end: exit code {document['exit_code']}")
    if "Traceback" in scene.server.said:
        scene.faults.append(f"end: the log has a traceback:\n{scene.server.said[-3000:]}")
    if "disk" in args.parts:
        document["disk"] = disk(scene, args.seconds / 2)
    return document | {"faults": scene.faults}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a checkpoint directory (default: SmolLM2)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    load_help = "of load: a quarter before each kill, all of it for slow"
    parser.add_argument("--seconds", type=float, default=60, help=load_help)
    for name, default in (("adapters", 16), ("kills", 5), ("changes", 60), ("slow", 200), ("bodies", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve_faults.json")
    args = parser.parse_args(arguments)
    document = header()
    with tempfile.TemporaryDirectory() as scratch:
        scene = Scene(Path(scratch) / "run", args.base or smollm2(), args.adapters)
        try:
            document |= run(scene, args)
        finally:
            scene.server.kill()
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join(document["faults"][:20]) or "no fault")
    print(args.out)
    return 1 if document["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
