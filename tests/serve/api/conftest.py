"""A real server on the loopback address, over a scripted engine."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.data import Encoder, resolve_template
from qvera.evaluation.generate import PromptWriter
from qvera.serve.api.access import DEFAULTS
from qvera.serve.api.app import create_app
from qvera.serve.api.server import Server, bound
from qvera.serve.api.service import Service
from qvera.serve.fine_tuning.directory import TrainingDirectory
from qvera.serve.fine_tuning.jobs import Jobs
from qvera.serve.requests import GenerationRequest
from qvera.serve.store import AdapterStore
from tests.conftest import small_tokenizer
from tests.helpers import wait_until
from tests.serve.api.doubles import NamedStore, ScriptedEngine
from tests.serve.scripted_training import Driver, ScriptedTrainer, chat_rows, jobs_of


@dataclasses.dataclass
class Training:
    """The fine-tuning of a server, over a scripted trainer."""

    directory: TrainingDirectory
    root: Path
    trainer: ScriptedTrainer
    driver: Driver
    jobs: Jobs


@dataclasses.dataclass
class Served:
    """A running server and its parts."""

    url: str
    port: int
    engine: ScriptedEngine
    store: Any
    prompts: PromptWriter
    app: Any
    server: Server
    said: dict[str, str]
    """What each model answers; `says` changes it."""
    training: Training | None = None

    @property
    def trained(self) -> Training:
        assert self.training is not None
        return self.training

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **settings)

    def chat(self, text: str = "hi", model: str = "tiny", **keys: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"model": model, "messages": messages, **keys})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))


Start = Callable[..., Served]


def send(served: Served, content: Any = None, name: str = "rows.jsonl", **settings: Any) -> httpx.Response:
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": (name, chat_rows() if content is None else content)}}
    with served.client() as client:
        return client.post("/v1/files", **{**form, **settings})


@pytest.fixture
def start() -> Iterator[Start]:
    """Start servers; keyword arguments are limits."""
    open_servers: list[tuple[Served, threading.Thread]] = []
    addresses = contextlib.ExitStack()

    def begin(
        *,
        keys: Any = None,
        store: NamedStore | None = None,
        places: int = 8,
        queue: int = 4,
        system: str | None = None,
        send_buffer_bytes: int | None = None,
        training_dir: Path | None = None,
        training_slots: int = 2,
        **limits: Any,
    ) -> Served:
        tokenizer = small_tokenizer()
        prompts = PromptWriter(resolve_template("auto", tokenizer), Encoder(tokenizer), system)
        said = {"tiny": "the word is red", "anna": "anna says blue", "ben": "ben says green"}

        def script(request: GenerationRequest) -> Iterator[int]:
            name = request.adapter.name if request.adapter is not None else "tiny"
            text = said.get(name, "the word is blue")
            yield from tokenizer(text)["input_ids"]
            yield tokenizer.eos_token_id

        engine = ScriptedEngine(script, places, queue)
        adapters: Any = store or NamedStore({"anna": b"1", "ben": b"2"})
        training = None
        if training_dir is not None:
            training = addresses.enter_context(_training(training_dir, training_slots))
            adapters = AdapterStore(training.root, base_names=["tiny", "hub/tiny"])
        ends, jobs = frozenset({tokenizer.eos_token_id}), None if training is None else training.jobs
        app = create_app(
            Service(engine, adapters, prompts, ends, "tiny", dataclasses.replace(DEFAULTS, **limits), keys, jobs)
        )
        server = Server(app)
        listener, url = addresses.enter_context(bound("127.0.0.1", 0))
        if send_buffer_bytes is not None:  # of every connection
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        served = Served(url, listener.getsockname()[1], engine, adapters, prompts, app, server, said, training)
        open_servers.append((served, thread))
        return served

    yield begin
    for served, thread in open_servers:
        served.engine.hold.clear()
        served.server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        served.engine.close()
    addresses.close()


@contextlib.contextmanager
def _training(path: Path, slots: int) -> Iterator[Training]:
    """Jobs in ``path``, whose adapters go into ``adapters`` beside it."""
    root = path.with_name("adapters")
    root.mkdir(exist_ok=True)
    trainer, driver = ScriptedTrainer(slots), Driver()
    with TrainingDirectory.open(path) as directory:
        driver.jobs = jobs = jobs_of(directory, root, trainer, driver.wake)
        driver.start()
        with jobs:
            yield Training(directory, root, trainer, driver, jobs)
            driver.close()


@pytest.fixture
def served(start: Start) -> Served:
    return start()
