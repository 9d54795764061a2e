"""A server of Tinker's API over doubles of the engine and of training, and calls to it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from qvera.data import Encoder, resolve_template
from qvera.evaluation.generate import PromptWriter
from qvera.serve.api.access import DEFAULTS, KeyFile, new_key
from qvera.serve.api.app import create_app
from qvera.serve.api.service import Service
from qvera.serve.engine import Engine
from qvera.serve.requests import EngineSettings
from qvera.serve.store import AdapterStore
from qvera.serve.tinker.database import Database
from qvera.serve.tinker.messages import MESSAGES
from qvera.serve.tinker.sampling import Samples
from qvera.serve.tinker.tenancy import BaseFacts, Tinker, TinkerSettings
from qvera.training.tenants import Tenants, TenantSettings
from tests.conftest import small_tokenizer
from tests.serve.api.doubles import ScriptedEngine
from tests.serve.command import running
from tests.serve.helpers import tiny_base
from tests.serve.tinker.doubles import ScriptedTenants

VOCABULARY = 64


@dataclasses.dataclass
class TinkerServer:
    """A running server and its parts."""

    url: str
    tinker: Tinker
    tenants: ScriptedTenants
    engine: ScriptedEngine
    """Every answer is 7, 7, 7, …"""
    samples: Samples
    directory: Path
    keys: dict[str, str]

    def call(self, path: str, body: Any = None, key: str = "", method: str = "POST") -> httpx.Response:
        headers = {"X-API-Key": f"tml-{self.keys.get(key, 'anything')}"}
        content = {"content": body} if isinstance(body, bytes) else {"json": {} if body is None else body}
        return httpx.request(method, f"{self.url}/api/v1/{path}", headers=headers, timeout=30, **content)

    def session(self, key: str = "") -> str:
        return self.call("create_session", {"tags": [], "sdk_version": "0.38.0"}, key).json()["session_id"]

    def result(self, accepted: httpx.Response, key: str = "") -> Any:
        """A promise's result: JSON, or the message of a forward_backward."""
        assert accepted.status_code == 200, accepted.text
        while True:
            answer = self.call("retrieve_future", {"request_id": accepted.json()["request_id"]}, key)
            assert answer.status_code == 200, answer.text
            if answer.headers["content-type"] == "application/x-protobuf":
                return MESSAGES["ForwardBackwardOutput"].FromString(answer.content)
            if answer.json().get("type") != "try_again":
                return answer.json()

    def model(self, session: str | None = None, number: int = 0, base: str = "tiny", key: str = "", **lora: Any) -> str:
        body = {
            "session_id": session or self.session(key),
            "model_seq_id": number,
            "base_model": base,
            "lora_config": {"rank": 8, "seed": 0, **lora},
        }
        return self.result(self.call("create_model", body, key), key)["model_id"]

    def train(self, model: str, seq: int, tokens: Any = (1, 2, 3), key: str = "", **about: Any) -> httpx.Response:
        return self.call("forward_backward", rows_body(model, seq, [tokens], **about), key)

    def step(self, model: str, seq: int, key: str = "", **adam: Any) -> httpx.Response:
        body = {"model_id": model, "seq_id": seq, "adam_params": {"learning_rate": 0.5, **adam}}
        return self.call("optim_step", body, key)


def rows_body(model: str, seq: int, rows: Any, loss: str = "cross_entropy", forward_only: bool = False) -> bytes:
    """A body of forward_backward."""
    request = MESSAGES["ForwardBackwardRequest"](model_id=model, seq_id=seq, loss_fn=loss, forward_only=forward_only)
    for tokens in rows:
        datum, shape = request.data.add(), [len(tokens)]
        datum.model_input.add().encoded_text.tokens = np.asarray(tokens, "<i4").tobytes()
        targets, weights = datum.loss_fn_inputs["target_tokens"], datum.loss_fn_inputs["weights"]
        targets.dense, targets.dtype = np.asarray(tokens, "<i8").tobytes(), 2
        weights.dense, weights.dtype = np.ones(len(tokens), "<f4").tobytes(), 1
        targets.shape.extend(shape)
        weights.shape.extend(shape)
    return request.SerializeToString()


StartTinker = Callable[..., TinkerServer]


@pytest.fixture
def start_tinker(tmp_path: Path) -> Iterator[StartTinker]:
    """Start servers over ``tmp_path``; keyword arguments are `TinkerSettings`. ``names``: of keys that are asked for."""
    ending = contextlib.ExitStack()

    def begin(names: tuple[str, ...] = (), body_bytes: int = 1 << 20, **settings: Any) -> TinkerServer:
        directory = tmp_path / "tinker"
        directory.mkdir(exist_ok=True)
        file = tmp_path / "keys.json"
        keys = {name: new_key(file, name, ["*"], ["use", "train"]) for name in names}
        engine, tenants = ScriptedEngine(lambda _: itertools.repeat(7)), ScriptedTenants()
        database = ending.enter_context(contextlib.closing(Database(directory / "tinker.sqlite")))
        ending.callback(tenants.close)
        facts = BaseFacts("tiny", frozenset({"tiny", "hub/tiny"}), "tiny", "LlamaForCausalLM", VOCABULARY, 128)
        tinker = Tinker(directory, database, tenants, facts, TinkerSettings(**settings))
        ending.enter_context(tinker)
        ending.callback(engine.close)
        tokenizer = small_tokenizer()
        prompts = PromptWriter(resolve_template("auto", tokenizer), Encoder(tokenizer), None)
        limits = dataclasses.replace(DEFAULTS, tinker_body_bytes=body_bytes)
        store, key_file = AdapterStore(None, {"tiny"}), KeyFile(file) if keys else None
        service = Service(engine, store, prompts, frozenset(), "tiny", limits, key_file, None, tinker)
        app = create_app(service)
        _, url, _ = ending.enter_context(running(app))
        return TinkerServer(url, tinker, tenants, engine, app.state.samples, directory, keys)

    with ending:
        yield begin


@pytest.fixture
def server(start_tinker: StartTinker) -> TinkerServer:
    return start_tinker(gap_seconds=0.5)


@contextlib.contextmanager
def serving(model_dir: Path, directory: Path) -> Iterator[tuple[str, Service]]:
    """A server with a real engine and real training, in this process; its URL."""
    base = tiny_base(model_dir)
    engine = Engine(base, EngineSettings(cache_tokens=2048, step_tokens=64, max_running=8, training_share=0.5))
    tenants = Tenants(base, TenantSettings(directory / "paged"), engine.wake)
    facts = BaseFacts("tiny", frozenset({"tiny", str(model_dir)}), str(model_dir), "LlamaForCausalLM", 304, 256)
    prompts = PromptWriter(resolve_template("auto", base.tokenizer), Encoder(base.tokenizer), None)
    with contextlib.ExitStack() as ending:
        database = ending.enter_context(contextlib.closing(Database(directory / "tinker.sqlite")))
        tinker = ending.enter_context(Tinker(directory, database, tenants, facts, TinkerSettings()))
        engine.set_background(tenants)
        engine.start()
        ending.callback(engine.close)
        store = AdapterStore(None, {"tiny"})
        service = Service(engine, store, prompts, frozenset({2}), "tiny", tinker=tinker)
        yield ending.enter_context(running(create_app(service)))[1], service


def soon(holds: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
