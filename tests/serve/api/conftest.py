"""A real server on the loopback address, over a scripted engine."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.data import Encoder, resolve_template
from qvera.data.chat_template import ChatTemplate
from qvera.evaluation.generate import PromptWriter
from qvera.serve.api.access import DEFAULTS, KeyFile, new_key
from qvera.serve.api.app import create_app
from qvera.serve.api.server import Server
from qvera.serve.api.service import Service
from qvera.serve.fine_tuning.directory import TrainingDirectory
from qvera.serve.requests import GenerationRequest
from qvera.serve.store import AdapterStore
from tests.conftest import small_tokenizer
from tests.serve.api.doubles import ScriptedEngine
from tests.serve.command import running
from tests.serve.scripted_training import ScriptedTrainer, chat_rows, jobs_of, write_files

TOKENIZER = small_tokenizer()


@dataclasses.dataclass
class Served:
    """A running server and its parts."""

    url: str
    port: int
    engine: ScriptedEngine
    store: AdapterStore
    prompts: PromptWriter
    app: Any
    server: Server
    said: dict[str, str]
    """What each model answers; a test may change it."""
    root: Path
    """The directory of adapters."""
    trainer: ScriptedTrainer
    jobs: Any
    """`Jobs` over that trainer, of a server that trains."""
    key_file: Path
    headers: dict[str, dict[str, str]]
    """Of each key."""

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **settings)

    def chat(self, text: str = "hi", model: str = "tiny", headers: Any = None, **keys: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"model": model, "messages": messages, **keys}, headers=headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))


Start = Callable[..., Served]


def send(served: Served, content: bytes | None = None, name: str = "rows.jsonl", headers: Any = None) -> httpx.Response:
    """Upload a file."""
    files = {"file": (name, chat_rows() if content is None else content)}
    return httpx.post(f"{served.url}/v1/files", data={"purpose": "fine-tune"}, files=files, headers=headers, timeout=30)


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start servers; keyword arguments are limits.

    Without a ``root``, they have the adapters of Anna and Ben. ``keys``: name → models and actions, ``("*", "use load")``.
    """
    ending = contextlib.ExitStack()

    def begin(
        *,
        keys: dict[str, tuple[str, str]] | None = None,
        root: Path | None = None,
        places: int = 8,
        queue: int = 4,
        system: str | None = None,
        send_buffer_bytes: int | None = None,
        training_dir: Path | None = None,
        training_slots: int = 2,
        template: str | None = None,
        **limits: Any,
    ) -> Served:
        own = resolve_template("auto", TOKENIZER)
        prompts = PromptWriter(
            ChatTemplate("own", template, TOKENIZER) if template else own, Encoder(TOKENIZER), system
        )
        said = {"tiny": "the word is red", "anna": "anna says blue", "ben": "ben says green"}

        def script(request: GenerationRequest) -> Iterator[int]:
            name = request.adapter.name if request.adapter is not None else "tiny"
            yield from TOKENIZER(said.get(name, "the word is blue"))["input_ids"]
            yield TOKENIZER.eos_token_id

        here = tmp_path_factory.mktemp("served")
        made = {
            name: new_key(here / "keys.json", name, models.split(), may.split())
            for name, (models, may) in (keys or {}).items()
        }
        headers = {name: {"Authorization": f"Bearer {key}"} for name, key in made.items()}
        key_file = KeyFile(here / "keys.json") if keys else None
        engine, trainer, jobs = ScriptedEngine(script, places, queue), ScriptedTrainer(training_slots), None
        if root is None:
            root = here / "adapters"
            root.mkdir()
            for name in () if training_dir else ("anna", "ben"):
                write_files(root / name, name.encode())
        if training_dir is not None:
            directory = ending.enter_context(TrainingDirectory.open(training_dir))
            jobs = ending.enter_context(jobs_of(directory, root, trainer))
            engine.background = jobs.worker
        ending.callback(engine.close)
        store, ends = AdapterStore(root, base_names=["tiny", "hub/tiny"]), frozenset({TOKENIZER.eos_token_id})
        limit = dataclasses.replace(DEFAULTS, **limits)
        app = create_app(Service(engine, store, prompts, ends, "tiny", limit, key_file, jobs))
        server, url, port = ending.enter_context(running(app, send_buffer_bytes))
        ending.callback(engine.hold.clear)
        return Served(
            url, port, engine, store, prompts, app, server, said, root, trainer, jobs, here / "keys.json", headers
        )

    with ending:
        yield begin


@pytest.fixture
def served(start: Start) -> Served:
    return start()
