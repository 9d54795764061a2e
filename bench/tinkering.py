"""What the bench and the soak test of Tinker's API share: clients in one process, by its wire protocol.

A thousand of Tinker's own clients in a process, each with threads and pools of its own, would measure the clients.
These make the same calls as client 0.38: bodies, order, and repetition. Bodies are written with that client's own
protobuf module.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import json
import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from tinker.proto import tinker_public_pb2 as messages

PROTOBUF = "application/x-protobuf"
_PATIENCE_SECONDS = 3600.0
_HEARTBEAT_SECONDS = 60.0


class Row(NamedTuple):
    """A row of a forward_backward. ``inputs`` has ``target_tokens`` among them, all as long as ``tokens``."""

    tokens: list[int]
    inputs: dict[str, list[float] | list[int]]


class Sample(NamedTuple):
    """A sampled answer."""

    tokens: list[int]
    logprobs: np.ndarray  # fp32


class Refused(RuntimeError):
    """A call that got a 4xx status."""

    def __init__(self, path: str, response: httpx.Response) -> None:
        super().__init__(f"{path}: {response.status_code} {response.text[:500]}")
        self.status = response.status_code


class Failed(RuntimeError):
    """A promise that was not kept. ``category``: user or server."""

    def __init__(self, message: str, category: str) -> None:
        super().__init__(f"{category}: {message}")
        self.message, self.category = message, category


class Link:
    """Calls with one key.

    Attributes:
        statuses: how many answers of each status came, over all links that share it.
    """

    def __init__(
        self, http: httpx.AsyncClient, key: str, statuses: collections.Counter[int] | None = None, is_old: bool = False
    ) -> None:
        """``is_old``: a server that takes and gives JSON where client 0.38 speaks protobuf."""
        self.http, self.is_old = http, is_old
        self.statuses: collections.Counter[int] = collections.Counter() if statuses is None else statuses
        self._headers = {"X-API-Key": f"tml-{key}"}

    async def once(
        self, path: str, body: Mapping[str, Any] | bytes, method: str = "POST", **headers: str
    ) -> httpx.Response:
        """One call, whatever its status. Raises httpx.TransportError without an answer."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = PROTOBUF if isinstance(body, bytes) else "application/json"
        response = await self.http.request(
            method, f"/api/v1/{path}", content=content, headers={**self._headers, "Content-Type": kind, **headers}
        )
        self.statuses[response.status_code] += 1
        return response

    async def call(
        self, path: str, body: Mapping[str, Any] | bytes, method: str = "POST", **headers: str
    ) -> httpx.Response:
        """A call that is sent again while the server is away or busy, as the client does.

        Raises Refused for another status, and TimeoutError after an hour.
        """
        async with asyncio.timeout(_PATIENCE_SECONDS):
            pause = 0.1
            while True:
                try:
                    response = await self.once(path, body, method, **headers)
                except httpx.TransportError:
                    response = None
                if response is not None and response.status_code < 300:
                    return response
                if response is not None and response.status_code < 500 and response.status_code not in (408, 409, 429):
                    raise Refused(path, response)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 2.0)

    async def json(self, path: str, body: Mapping[str, Any] | bytes) -> dict[str, Any]:
        """A call whose answer is JSON."""
        return dict((await self.call(path, body)).json())

    async def result(self, promise: str, is_protobuf: bool = False) -> httpx.Response:
        """Wait for a promise's result. Raises Failed."""
        accept = {"Accept": PROTOBUF if is_protobuf and not self.is_old else "application/json"}
        while True:
            response = await self.call("retrieve_future", {"request_id": promise}, **accept)
            if response.headers["content-type"].startswith(PROTOBUF):
                return response
            document = response.json()
            if "error" in document:
                raise Failed(document["error"], document.get("category", "unknown"))
            if document.get("type") != "try_again":
                return response

    async def session(self) -> str:
        """A new session's id."""
        found = await self.json("create_session", {"tags": [], "sdk_version": "0.38.0", "type": "create_session"})
        return str(found["session_id"])


class Trained:
    """A model in training, the only one of its session. The client sends a call when the one before was answered."""

    def __init__(self, link: Link, session: str, model_id: str, base: str) -> None:
        self.link, self.session, self.id, self.base = link, session, model_id, base
        self.seq = 0
        self.samplers = 0

    @classmethod
    async def create(cls, link: Link, base: str, rank: int, seed: int) -> Trained:
        """A model with a session of its own."""
        session = await link.session()
        config = {"rank": rank, "seed": seed, "train_unembed": True, "train_mlp": True, "train_attn": True}
        body = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": base,
            "lora_config": config,
            "type": "create_model",
        }
        promise = (await link.json("create_model", body))["request_id"]
        return cls(link, session, str((await link.result(promise)).json()["model_id"]), base)

    def next_seq(self) -> int:
        """The number of its next call."""
        self.seq += 1
        return self.seq

    async def send(self, path: str, body: Mapping[str, Any] | bytes) -> str:
        """A call, whose seq is in its body already. Returns its promise."""
        return str((await self.link.json(path, body))["request_id"])

    def rows_body(
        self,
        seq: int,
        rows: Sequence[Row],
        loss: str = "cross_entropy",
        settings: Mapping[str, float] | None = None,
        forward_only: bool = False,
    ) -> Mapping[str, Any] | bytes:
        """The body of a forward_backward."""
        if self.link.is_old:
            data = [
                {
                    "model_input": {"chunks": [{"type": "encoded_text", "tokens": row.tokens}]},
                    "loss_fn_inputs": {
                        name: {"data": values, "dtype": _dtype(name), "shape": [len(values)]}
                        for name, values in row.inputs.items()
                    },
                }
                for row in rows
            ]
            asked = {"data": data, "loss_fn": loss, "loss_fn_config": dict(settings or {}) or None}
            return {"model_id": self.id, "seq_id": seq, "forward_backward_input": asked}
        request = messages.ForwardBackwardRequest(
            model_id=self.id, seq_id=seq, loss_fn=loss, loss_fn_config=settings or {}, forward_only=forward_only
        )
        for row in rows:
            datum = request.data.add()
            datum.model_input.add().encoded_text.tokens = np.asarray(row.tokens, "<i4").tobytes()
            for name, values in row.inputs.items():
                tensor = datum.loss_fn_inputs[name]
                is_whole = _dtype(name) == "int64"
                tensor.dense = np.asarray(values, "<i8" if is_whole else "<f4").tobytes()
                tensor.dtype = messages.DTYPE_INT64 if is_whole else messages.DTYPE_FLOAT32
                tensor.shape.append(len(values))
        return request.SerializeToString()

    async def begin_rows(self, rows: Sequence[Row], loss: str = "cross_entropy", forward_only: bool = False) -> str:
        """Send a forward_backward; returns its promise."""
        return await self.send("forward_backward", self.rows_body(self.next_seq(), rows, loss, None, forward_only))

    async def logprobs(self, promise: str) -> list[np.ndarray]:
        """Of each row of a forward_backward. Raises Failed."""
        return logprobs_of(await self.link.result(promise, is_protobuf=True))

    async def begin_step(self, rate: float) -> str:
        """Send an optim_step; returns its promise."""
        adam = {
            "learning_rate": rate, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12, "weight_decay": 0.0, "grad_clip_norm": 0.0,
        }  # fmt: skip
        return await self.send("optim_step", {"model_id": self.id, "seq_id": self.next_seq(), "adam_params": adam})

    async def train(self, rows: Sequence[Row], rate: float = 1e-4) -> list[np.ndarray]:
        """A forward_backward and a step, sent one after the other and then waited for. Returns the log-probabilities."""
        of_rows = await self.begin_rows(rows)
        of_step = await self.begin_step(rate)
        found = await self.logprobs(of_rows)
        await self.link.result(of_step)
        return found

    async def sampler(self) -> str:
        """A sampling session of the weights as they are now."""
        body = {
            "model_id": self.id,
            "seq_id": self.next_seq(),
            "sampling_session_seq_id": self.samplers,
            "kind": "snapshot",
        }
        self.samplers += 1
        promise = await self.send("save_weights_for_sampler", body)
        return str((await self.link.result(promise)).json()["sampling_session_id"])

    async def sample(self, sampler: str, seq: int, prompt: Sequence[int], max_tokens: int, **settings: Any) -> Sample:
        """One answer that no stop token ends."""
        body = {
            "sampling_session_id": sampler, "seq_id": seq, "num_samples": 1, "type": "sample",
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
            "sampling_params": {"max_tokens": max_tokens, "stop": [], "temperature": 1.0, "top_k": -1, "top_p": 1.0, **settings},
        }  # fmt: skip
        promise = str((await self.link.json("asample", body))["request_id"])
        response = await self.link.result(promise, is_protobuf=True)
        if response.headers["content-type"].startswith(PROTOBUF):
            found = messages.SampleResponse.FromString(response.content).sequences[0]
            return Sample(np.frombuffer(found.tokens, "<i4").tolist(), np.frombuffer(found.logprobs, "<f4"))
        plain = response.json()["sequences"][0]
        return Sample(plain["tokens"], np.asarray(plain["logprobs"], np.float32))

    async def finish(self) -> None:
        """End its session."""
        await self.link.call(f"sessions/{self.session}/finish", {"reason": {"type": "success"}, "detail": ""})


async def send_heartbeats(tenants: Collection[Any]) -> None:
    """Keep the sessions of all tenants' ``model`` alive, without end. A call may wait longer than a session lives."""

    async def send(model: Trained) -> None:
        with contextlib.suppress(httpx.TransportError, TimeoutError):
            async with asyncio.timeout(_HEARTBEAT_SECONDS):  # one that waits must not hold up those of the others
                await model.link.once("session_heartbeat", {"session_id": model.session})

    while True:
        await asyncio.sleep(_HEARTBEAT_SECONDS)
        await asyncio.gather(*(send(tenant.model) for tenant in tenants))


def logprobs_of(response: httpx.Response) -> list[np.ndarray]:
    """The log-probabilities of each row in a result of forward_backward."""
    if not response.headers["content-type"].startswith(PROTOBUF):
        return [np.asarray(row["logprobs"]["data"], np.float32) for row in response.json()["loss_fn_outputs"]]
    found = []
    for record in messages.ForwardBackwardOutput.FromString(response.content).loss_fn_outputs:
        tensor = record.fields["logprobs"]
        ends = np.frombuffer(tensor.offsets, "<i8")
        found += [np.frombuffer(tensor.data[a:b], "<f4") for a, b in zip(ends, ends[1:], strict=False)]
    return found


def random_rows(chooser: random.Random, count: int, least: int, most: int, vocabulary: int) -> list[Row]:
    """Rows of cross_entropy whose targets are their next tokens."""
    rows = []
    for _ in range(count):
        tokens = [chooser.randrange(10, vocabulary) for _ in range(chooser.randint(least, most) + 1)]
        rows.append(Row(tokens[:-1], {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}))
    return rows


def write_keys(path: Path, count: int) -> list[str]:
    """A key file of a server with so many keys, which may do everything; returns the keys."""
    keys = [f"qvera-of-a-test-{number:04}" for number in range(count)]
    entries = [
        {
            "name": f"tenant {number}",
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "adapters": ["*"],
            "may": ["use", "train"],
        }
        for number, key in enumerate(keys)
    ]
    path.write_text(json.dumps({"keys": entries}), encoding="utf-8")
    return keys


def _dtype(name: str) -> str:
    return "int64" if name == "target_tokens" else "float32"
