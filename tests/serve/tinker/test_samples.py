"""Samples of many keys wait in a fair order, are promised for good, and are told to those who poll for them."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from typing import Any

import pytest

from qvera.serve.api.access import Access
from qvera.serve.api.errors import ApiError
from qvera.serve.requests import AdapterChanged
from qvera.serve.tinker.messages import MESSAGES
from qvera.serve.tinker.sampling import NewSampler
from qvera.serve.tinker.tenancy import TinkerSettings
from qvera.utils.errors import RunFailed
from tests.helpers import wait_until
from tests.serve.scripted_training import write_files
from tests.serve.tinker.conftest import StartTinker, TinkerServer

PLACES = 8  # of the scripted engine
THREAD = "qvera-tinker"  # waits for the disk


class Server:
    """Calls for samples, without HTTP."""

    def __init__(self, server: TinkerServer) -> None:
        self.tinker, self.database = server.tinker, server.tinker.database
        self.engine, self.samples = server.engine, server.samples
        self.numbers = itertools.count()

    def sampler(self, owner: str) -> str:
        found = self.database.rows("SELECT id FROM sessions WHERE owner = ? AND ended IS NULL", (owner,))
        session = found[0]["id"] if found else self.tinker.create_session(owner, {})[0]
        asked = NewSampler(session_id=session, sampling_session_seq_id=0, base_model="tiny")
        return self.samples.create(Access(owner, None, frozenset({"use"})), asked)

    def ask(
        self, owner: str, count: int = 1, seq: int | None = None, prompt: int = 3, sampler: str = "", **params: Any
    ) -> str:
        body = {
            "sampling_session_id": sampler or self.sampler(owner),
            "seq_id": next(self.numbers) if seq is None else seq,
            "num_samples": count,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5] * prompt}]},
            "sampling_params": {"max_tokens": 10, **params},
        }
        return self.samples.call(owner, json.dumps(body).encode())[0]

    def state(self, owner: str, promise: str) -> Any:
        return self.database.rows("SELECT state FROM promises WHERE id = ?", (promise,))[0]["state"]

    def wait(self, owner: str, promise: str) -> Any:
        wait_until(lambda: self.state(owner, promise) != "pending")
        found: Any = self.database.promise(promise, owner)
        is_result, payload = found["state"] == "proto", found["payload"]
        return MESSAGES["SampleResponse"].FromString(payload) if is_result else payload

    def poll(self, owner: str, cursor: int = 0, seconds: float = 0.0, clone: int = 0) -> Any:
        sampler = self.sampler(owner)
        look = lambda: self.samples.ended(owner, sampler, clone, cursor)  # noqa: E731
        return asyncio.run(self.database.wait(sampler, look, seconds)) or {"completions": [], "cursor": cursor}


@pytest.fixture
def server(start_tinker: StartTinker) -> Server:
    return Server(start_tinker())


def test_a_key_with_few_tokens_does_not_wait_behind_one_with_many(server: Server) -> None:
    server.engine.hold.set()
    many = [server.ask("many", 4) for _ in range(20)]
    long = [server.ask("long", prompt=400) for _ in range(20)]
    wait_until(lambda: len(server.engine.requests) > PLACES)
    few = server.ask("few")
    server.engine.hold.clear()
    server.wait("few", few)
    handed = [one.id.split(":")[0] for one in server.engine.requests]
    assert handed.index(few) <= 2 * PLACES  # those that the engine had before, and one or two
    for owner, promises in (("many", many), ("long", long)):
        for promise in promises:
            server.wait(owner, promise)
    order = [one.id.split(":")[0] for one in server.engine.requests]
    half = order[: order.index(many[10])]
    assert sum(promise in long for promise in half) < 3  # an equal share of tokens, not of calls


def test_a_call_that_is_sent_again_gets_the_same_promise_and_is_done_once(server: Server) -> None:
    promises = {server.ask("anna", 3, seq=4, seed=1) for _ in range(3)}
    [promise] = promises
    found = server.wait("anna", promise)
    assert [(one.stop_reason, len(one.tokens) // 4) for one in found.sequences] == [(1, 10)] * 3
    assert len(server.engine.requests) == 3 and len({one.sampling.seed for one in server.engine.requests}) == 3
    server.wait("anna", server.ask("anna", 1, seed=1))
    assert server.engine.requests[3].sampling.seed == server.engine.requests[0].sampling.seed


def test_beyond_its_quota_a_key_is_told_to_wait_and_another_is_not(server: Server) -> None:
    server.engine.hold.set()
    promises = [server.ask("anna", 1024) for _ in range(4)]
    with pytest.raises(ApiError, match="4,096 samples open") as refused:
        server.ask("anna")
    assert refused.value.status == 429
    other = server.ask("ben")
    server.samples.cancel("ben", promises[0])  # it is not his
    for promise in promises:
        server.samples.cancel("anna", promise)
    server.engine.hold.clear()
    for promise in promises:
        assert b"given the sample up" in server.wait("anna", promise)
    server.wait("ben", other)
    server.wait("anna", server.ask("anna"))


def test_a_call_for_more_samples_than_a_key_may_ever_have_open_is_told_so(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.tinker, "settings", TinkerSettings(open_samples=8))
    with pytest.raises(ApiError, match="asks for 9 samples, and a key may have 8 open") as refused:
        server.ask("anna", 9)
    assert (refused.value.status, refused.value.headers) == (400, {})


def test_long_bodies_count_as_more_samples(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.tinker, "settings", TinkerSettings(open_samples=8))
    server.engine.hold.set()
    promises = [server.ask("anna", 2, unread="x" * (6 << 17)), server.ask("anna")]  # 128 KiB each count as a sample
    with pytest.raises(ApiError, match="8 samples open"):
        server.ask("anna")
    server.engine.hold.clear()
    assert [len(server.wait("anna", promise).sequences) for promise in promises] == [2, 1]
    server.wait("anna", server.ask("anna", 8))


def test_samples_that_were_given_up_count_with_the_tokens_that_they_had(server: Server) -> None:
    server.engine.hold.set()
    promise = server.ask("anna", PLACES, prompt=3, max_tokens=900)
    wait_until(lambda: len(server.engine.requests) == PLACES)
    server.samples.cancel("anna", promise)
    assert b"given the sample up" in server.wait("anna", promise)
    assert server.samples._given["anna"] == PLACES * 3


def test_the_end_of_a_session_and_a_failing_engine_end_its_samples(server: Server) -> None:
    server.engine.hold.set()
    ended, other = server.ask("anna", 20), server.ask("ben", 2)
    wait_until(lambda: len(server.engine.requests) > PLACES)
    server.tinker.end_session(server.sampler("anna").partition(":")[0], "anna")
    assert b"session has ended" in server.wait("anna", ended)
    server.engine.fails = "the card fell off"
    server.engine.hold.clear()
    assert server.wait("ben", other) == b"the card fell off"
    assert server.state("ben", other) == "server"
    server.engine.fails, server.engine.refuses = None, "the adapter is damaged"
    refused = server.ask("ben")
    assert server.wait("ben", refused) == b"the adapter is damaged" and server.state("ben", refused) == "user"
    server.engine.refuses = None
    server.wait("ben", server.ask("ben"))


def test_the_end_of_a_session_unloads_the_adapters_that_it_was_asked_for(server: Server) -> None:
    sampler = server.sampler("anna").replace(":0", ":1")
    session = sampler.partition(":")[0]
    write_files(server.tinker.directory / "sessions" / session / "0-snapshot-1")
    about = {"session": session, "owner": "anna", "base": "tiny", "created": time.time()}
    server.database.insert("samplers", id=sampler, directory=f"sessions/{session}/0-snapshot-1", **about)
    for _ in range(2):
        server.wait("anna", server.ask("anna", 2, sampler=sampler))
    server.wait("anna", server.ask("anna"))  # of the base
    adapter = server.engine.requests[0].adapter
    assert adapter is not None and not server.engine.unloaded
    server.tinker.end_session(session, "anna")
    wait_until(lambda: server.engine.unloaded == [adapter.identity])


def test_the_end_of_a_session_is_written_down_once_the_disk_takes_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = server.sampler("anna").partition(":")[0]
    rows, refusals = server.tinker.database.rows, iter(range(2))

    def refusing(query: str, values: Any = ()) -> Any:
        if query.startswith("UPDATE sessions") and next(refusals, None) is not None:
            raise RunFailed("the disk is full")
        return rows(query, values)

    monkeypatch.setattr(server.tinker.database, "rows", refusing)
    monkeypatch.setattr("qvera.serve.tinker.tenancy._RETRY_SECONDS", 0.01)
    server.tinker.end_session(session, "anna")
    wait_until(lambda: rows("SELECT ended FROM sessions WHERE id = ?", (session,))[0]["ended"] is not None)
    assert next(refusals, None) is None  # it was refused twice


def test_a_database_that_can_not_be_read_for_a_while_ends_no_call(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, refusals = server.tinker.database.rows, iter(range(3))

    def refusing(query: str, values: Any = ()) -> Any:
        is_read = query.startswith(("SELECT body", "SELECT * FROM samplers"))
        if is_read and threading.current_thread().name == THREAD and next(refusals, None) is not None:
            raise RunFailed("the database is locked")
        return rows(query, values)

    monkeypatch.setattr(server.tinker.database, "rows", refusing)
    monkeypatch.setattr("qvera.serve.tinker.tenancy._RETRY_SECONDS", 0.01)
    promises = [server.ask("anna", 2) for _ in range(3)]
    for promise in promises:
        assert len(server.wait("anna", promise).sequences) == 2
    assert next(refusals, None) is None
    assert len(server.engine.requests) == 6  # and none of them twice


def test_weights_that_are_saved_anew_while_they_are_read_are_looked_up_again(server: Server) -> None:
    submit, left = server.engine.submit, [AdapterChanged("was replaced while it was read; ask again.")] * 2

    def changing(*arguments: Any) -> None:
        if left:
            raise left.pop()
        submit(*arguments)

    server.engine.submit = changing  # type: ignore[assignment]
    assert len(server.wait("anna", server.ask("anna", 2)).sequences) == 2
    assert not left


def test_what_has_no_result_when_a_server_ends_is_done_by_the_next_one(start_tinker: StartTinker) -> None:
    first = Server(start_tinker())
    done = first.ask("anna")
    first.wait("anna", done)
    first.engine.hold.set()
    promises = [first.ask("anna", 2) for _ in range(9)]
    second = Server(start_tinker())
    for promise in promises:
        assert len(second.wait("anna", promise).sequences) == 2
    told = second.poll("anna")
    assert {one["request_id"] for one in told["completions"]} == {done, *promises}


def test_polls_tell_each_result_once_and_wait_for_the_next(server: Server) -> None:
    assert server.poll("anna") == {"completions": [], "cursor": 0}
    first = server.ask("anna")
    server.wait("anna", first)
    told = server.poll("anna", 0, 20.0)
    [one] = told["completions"]
    assert (one["state"], one["request_id"]) == ("finished", first) and one["response_payload_uncompressed_size"] > 40
    assert server.poll("anna", told["cursor"])["completions"] == []
    server.engine.fails = "the card fell off"
    second, cloned = server.ask("anna"), server.ask("anna", seq=5 * 10**9 + 1)
    later = server.poll("anna", told["cursor"], 20.0)
    assert later["completions"] == [{"state": "failed", "request_id": second}] and later["cursor"] > told["cursor"]
    assert [one["request_id"] for one in server.poll("anna", 0, 20.0, clone=5)["completions"]] == [cloned]
    with pytest.raises(ApiError, match="no sampler"):
        server.samples.ended("ben", server.sampler("anna"), 0, 0)
