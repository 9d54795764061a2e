"""A server that is out in the open: keys, limits, clients that are slow or go away, and an end that loses no answer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.serve.api.access import Access, KeyFile, new_key
from qvera.utils.errors import InputError
from tests.helpers import wait_until
from tests.serve.api.conftest import Served, Start
from tests.serve.api.doubles import NamedStore


def raw_call(body: dict[str, Any], path: str = "/v1/chat/completions", host: str = "localhost") -> bytes:
    text = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}


# Keys


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """A key file, and the headers of each of its keys."""
    path = tmp_path / "keys.json"
    made = {
        "all": new_key(path, "all", ["*"], ["use", "load"]),
        "anna": new_key(path, "anna", ["anna"], ["use"]),
        "loads": new_key(path, "loads", ["anna"], ["load"]),
    }
    return path, {name: {"Authorization": f"Bearer {key}"} for name, key in made.items()}


def test_a_key_opens_what_it_names_and_nothing_else(start: Start, keys: Any) -> None:
    path, headers = keys
    served = start(keys=KeyFile(path))
    body = {**CHAT, "stream": False}

    def status(model: str, who: str) -> int:
        return served.post("/v1/chat/completions", {**body, "model": model}, headers=headers[who]).status_code

    assert [status(model, "all") for model in ("tiny", "anna", "ben", "nobody")] == [200, 200, 200, 404]
    asked = ("tiny", "hub/tiny", "anna", "ben", "nobody")
    assert [status(model, "anna") for model in asked] == [404, 404, 200, 404, 404]
    assert status("anna", "loads") == 403
    assert status("anna*0.5+ben*0.5", "anna") == 404
    hidden = served.post("/v1/chat/completions", {**body, "model": "be"}, headers=headers["anna"]).json()
    assert "'ben'" not in hidden["error"]["message"]  # nor are others' names told
    with served.client() as client:
        listed = client.get("/v1/models", headers=headers["anna"]).json()["data"]
        assert [model["id"] for model in listed] == ["anna"]
        assert client.get("/v1/models/ben", headers=headers["anna"]).status_code == 404
        for wrong in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer no"}, {"Authorization": "Basic eA=="}):
            refused = client.get("/v1/models", headers=wrong)
            assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/metrics", headers=wrong).status_code == 401
            assert client.get("/health", headers=wrong).status_code == 200
    load = {"name": "anna"}
    assert served.post("/v1/load_adapter", load, headers=headers["anna"]).status_code == 403
    assert served.post("/v1/load_adapter", load, headers=headers["loads"]).status_code == 200
    assert served.post("/v1/load_adapter", {"name": "ben"}, headers=headers["loads"]).status_code == 404


def test_a_key_that_is_taken_out_of_the_file_is_refused_at_once(start: Start, keys: Any) -> None:
    path, headers = keys
    served = start(keys=KeyFile(path))
    assert served.post("/v1/load_adapter", {"name": "anna"}, headers=headers["all"]).status_code == 200
    document = json.loads(path.read_text())
    document["keys"] = [key for key in document["keys"] if key["name"] != "all"]
    path.write_text(json.dumps(document))
    assert served.post("/v1/load_adapter", {"name": "anna"}, headers=headers["all"]).status_code == 401
    path.write_text("{")  # being edited: the keys that were read last stay
    assert served.post("/v1/load_adapter", {"name": "anna"}, headers=headers["all"]).status_code == 401
    assert served.post("/v1/load_adapter", {"name": "anna"}, headers=headers["loads"]).status_code == 200


def test_a_key_gives_its_names_to_no_other_directory(start: Start, tmp_path: Path) -> None:
    """Nor does it learn which there are."""
    root, path = tmp_path / "adapters", tmp_path / "keys.json"
    for name in ("anna", "ben"):
        (root / name).mkdir(parents=True)
        (root / name / "content").write_text(name)
    headers = {"Authorization": f"Bearer {new_key(path, 'anna', ['anna'], ['use', 'load'])}"}
    served = start(keys=KeyFile(path), store=NamedStore({}, root))
    answers = [
        served.post("/v1/load_lora_adapter", {"lora_name": "anna", "lora_path": other}, headers=headers)
        for other in ("ben", "nobody", "anna")
    ]
    assert [answer.status_code for answer in answers] == [403, 403, 200]
    assert answers[0].json() == answers[1].json()


def test_the_file_holds_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = new_key(path, "anna", ["*"], ["use"])
    assert len(key) > 40
    assert key not in path.read_text()
    assert key.partition("-")[2] not in path.read_text()
    found = KeyFile(path).find(key)
    assert found is not None
    assert found == Access("anna", None, frozenset({"use"}))
    assert KeyFile(path).find(key + "x") is None
    with pytest.raises(InputError, match="'anna' already"):
        new_key(path, "anna", ["*"], ["use"])
    with pytest.raises(InputError, match="--new-key: the name is empty"):
        new_key(path, " ", ["*"], ["use"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"keys": 3}', "expected a list"),
        ('{"keys": [3]}', "key 1: expected an object"),
        ('{"keys": [{"name": "a"}]}', "key 1 .a.: sha256: expected 64 hex"),
        ('{"keys": [{"name": "a", "sha256": "HASH", "adapters": ["*"], "may": ["fly"]}]}', "'fly' is none of"),
        ('{"keys": [{"name": "a", "sha256": "HASH", "adapters": "*", "may": []}]}', "adapters: expected a list"),
        ('{"keys": [{"name": "a", "key": "secret"}]}', "unknown 'key'"),
    ],
)
def test_a_bad_key_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text.replace("HASH", "0" * 64))
    with pytest.raises(InputError, match=message):
        KeyFile(path)


def test_without_keys_only_this_machines_own_names_are_answered(served: Served) -> None:
    """A page of another site may have its own name point to 127.0.0.1, and then call as from the same origin."""
    with served.client() as client:
        for host, status in (
            ("localhost", 200),
            (f"localhost:{served.port}", 200),
            ("127.0.0.1:80", 200),
            ("[::1]:8000", 200),
            ("evil.example", 403),
            ("localhost.evil.example:8000", 403),
            ("10.0.0.1", 403),
            ("", 403),
        ):
            assert client.get("/v1/models", headers={"Host": host}).status_code == status, host


def test_without_keys_pages_of_other_sites_are_refused(start: Start, keys: Any) -> None:
    served = start()
    own = f"http://127.0.0.1:{served.port}"
    for origin, status in ((own, 200), ("https://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403)):
        assert served.post("/v1/load_adapter", {"name": "anna"}, headers={"Origin": origin}).status_code == status
    path, headers = keys
    keyed = start(keys=KeyFile(path))
    from_a_page = {"Origin": "https://app.example", **headers["all"]}
    assert keyed.post("/v1/load_adapter", {"name": "anna"}, headers=from_a_page).status_code == 200


# Limits


def test_one_key_does_not_fill_the_queue_for_others(start: Start, keys: Any) -> None:
    path, headers = keys
    served = start(keys=KeyFile(path), places=2, queue=20, open_answers=4)
    served.engine.hold.set()
    body = {"model": "anna", "prompt": "say", "stream": True}
    with served.client() as client:
        with client.stream("POST", "/v1/completions", json={**body, "n": 4}, headers=headers["all"]) as greedy:
            refused = served.post("/v1/completions", body, headers=headers["all"])
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert refused.json()["error"]["code"] == "too_many_open"
            with (
                served.client() as other,
                other.stream("POST", "/v1/completions", json=body, headers=headers["anna"]) as taken,
            ):
                assert taken.status_code == 200
                served.engine.hold.clear()
                assert taken.read().endswith(b"data: [DONE]\n\n")
            greedy.read()
    assert served.post("/v1/completions", body, headers=headers["all"]).status_code == 200


def test_a_body_is_read_up_to_its_limit(start: Start) -> None:
    served = start(body_bytes=2000, body_seconds=0.5)
    assert served.chat("x" * 1500).status_code != 413
    for chunks in ([b"x" * 5000], [b"x" * 100] * 50):  # with a length, and without one
        with served.client() as client:
            content: Any = chunks[0] if len(chunks) == 1 else iter(chunks)
            response = client.post("/v1/chat/completions", content=content)
            assert response.status_code == 413
            assert "2,000 bytes" in response.json()["error"]["message"]
    with served.connect() as slow:
        slow.sendall(raw_call(CHAT)[:-5])  # the rest never comes
        slow.settimeout(20)
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_an_answer_that_takes_too_long_is_ended(start: Start) -> None:
    served = start(seconds=0.4)
    served.engine.hold.set()
    assert served.chat().status_code == 504
    streamed = served.chat(stream=True)
    assert json.loads(streamed.text.strip().split("\n\n")[-1][6:])["error"]["code"] == "timeout"
    wait_until(lambda: len(served.engine.cancelled) == 2)


# Clients that go away, or are slow


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_places(start: Start, stream: bool) -> None:
    served = start()
    served.engine.step_seconds, served.said["tiny"] = 0.02, "a" * 900
    client = served.connect()
    client.sendall(raw_call({**CHAT, "stream": stream, "n": 3, "max_tokens": 900}))
    wait_until(lambda: served.engine.stats().running == 3)
    if stream:
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    client.close()
    wait_until(lambda: len(served.engine.cancelled) == 3, 10)
    wait_until(lambda: served.engine.stats().running == 0, 10)
    wait_until(lambda: served.app.state.service.running == 0, 10)


def test_a_client_that_goes_away_while_its_requests_are_handed_over_leaves_none(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start()
    served.engine.hold.set()
    entered, go_on = threading.Event(), threading.Event()
    submit = served.engine.submit

    def slow_submit(*arguments: Any) -> None:
        entered.set()
        go_on.wait(20)
        submit(*arguments)

    monkeypatch.setattr(served.engine, "submit", slow_submit)
    client = served.connect()
    client.sendall(raw_call(CHAT))
    assert entered.wait(20)
    client.close()
    wait_until(lambda: served.app.state.service.running == 0)
    go_on.set()
    wait_until(lambda: len(served.engine.requests) == 1)
    wait_until(lambda: served.engine.stats().running + served.engine.stats().waiting == 0)


def test_clients_that_read_nothing_stop_nobody(start: Start) -> None:
    served = start(places=20, send_seconds=1.0, send_buffer_bytes=4096)
    served.said["tiny"] = "word " * 180
    stuck = []
    for _ in range(12):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(("127.0.0.1", served.port))
        # with twenty likely tokens for each token, more than the small buffers take
        client.sendall(raw_call({**CHAT, "n": 1, "logprobs": True, "top_logprobs": 20, "max_tokens": 900}))
        stuck.append(client)
    wait_until(lambda: served.app.state.service.running == 12)
    began = time.monotonic()
    for _ in range(3):
        answer = served.chat(max_tokens=900).json()
        assert answer["choices"][0]["message"]["content"] == served.said["tiny"]
    assert time.monotonic() - began < 30
    wait_until(lambda: served.app.state.service.running == 0, 60)
    assert all(b"[DONE]" not in rest_of(client) for client in stuck)  # what the system's buffers took is all they get


def test_who_asks_on_without_reading_is_let_go(start: Start) -> None:
    """Answers that are no streams wait for their reader too."""
    served = start(send_seconds=1.0, send_buffer_bytes=4096)
    client = served.connect()
    client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
    wait_until(lambda: served.app.state.service.running == 1)
    wait_until(lambda: not open_connections(served), 30)
    assert served.app.state.service.running == 0
    assert rest_of(client).count(b"HTTP/1.1 200") < 1000


def test_a_connection_without_a_request_is_closed(start: Start) -> None:
    served = start(head_seconds=0.5)
    said_before = [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc", raw_call({"model": "nobody"})]
    clients = [served.connect() for _ in said_before]
    for client, text in zip(clients, said_before, strict=True):
        client.sendall(text)

    def drip() -> bool:
        """A byte of a head now and then is no request either."""
        for client in clients[1:]:
            with contextlib.suppress(OSError):
                client.sendall(b"x")
        return not open_connections(served)

    wait_until(drip, 20)
    assert [rest_of(client)[:12] for client in clients] == [b"", b"", b"HTTP/1.1 400"]
    served.engine.hold.set()
    with served.connect() as waits:  # for its answer, and not for a request
        waits.sendall(raw_call(CHAT))
        time.sleep(1.6)  # connections are looked at once a second
        served.engine.hold.clear()
        waits.settimeout(20)
        assert waits.recv(100).startswith(b"HTTP/1.1 200")


def test_peers_that_ask_nothing_take_nobodys_place(start: Start) -> None:
    served = start(connections=4)
    idle = [served.connect() for _ in range(4)]
    wait_until(lambda: len(open_connections(served)) == 4)
    slow = served.connect()
    slow.sendall(raw_call(CHAT)[:-5])  # the rest never comes
    assert rest_of(idle[0]) == b""  # the first has waited longest
    assert [served.chat().status_code for _ in range(4)] == [200] * 4
    served.engine.hold.set()
    busy = [served.connect() for _ in range(4)]
    for client in busy:
        client.sendall(raw_call(CHAT))
    wait_until(lambda: served.engine.stats().running == 4)
    with served.connect() as refused:
        assert refused.makefile("rb").read().startswith(b"HTTP/1.1 503")
    served.engine.hold.clear()
    for client in busy:  # who waits for an answer gets it
        assert b"[DONE]" in read_until(client, b"[DONE]")


def open_connections(served: Served) -> list[Any]:
    return list(served.server.server_state.connections)


def rest_of(client: socket.socket) -> bytes:
    """All that is still to come on a connection that the server has ended, in whatever way."""
    client.settimeout(20)
    got = b""
    with client, contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            got += part
    return got


def read_until(client: socket.socket, end: bytes) -> bytes:
    client.settimeout(20)
    got = b""
    while end not in got and (part := client.recv(65536)):
        got += part
    return got


def test_a_long_prompt_does_not_stop_the_event_loop(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    served = start()
    entered, go_on = threading.Event(), threading.Event()
    real = type(served.prompts).ids

    def slow(self: Any, turns: Any, tools: Any = None) -> list[int]:
        if "long" in turns[-1].content:
            entered.set()
            go_on.wait(20)
        return real(self, turns, tools)

    monkeypatch.setattr(type(served.prompts), "ids", slow)
    waiting = threading.Thread(target=lambda: served.chat("long"))
    waiting.start()
    assert entered.wait(20)
    assert served.chat("short").status_code == 200
    go_on.set()
    waiting.join(20)
    assert not waiting.is_alive()


def test_long_prompts_of_one_key_hold_up_no_other(start: Start, keys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, headers = keys
    served = start(keys=KeyFile(path), open_answers=6)
    go_on, real = threading.Event(), type(served.prompts.encoder).encode_prompt

    def slow(self: Any, prompt: str, *rest: Any) -> list[int]:
        if "long" in prompt:
            go_on.wait(20)
        return real(self, prompt, *rest)

    monkeypatch.setattr(type(served.prompts.encoder), "encode_prompt", slow)
    body, codes = {"model": "anna", "prompt": "long", "max_tokens": 1}, []

    def ask() -> None:
        codes.append(served.post("/v1/completions", body, headers=headers["all"]).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: codes == [429, 429])  # six are open
    assert served.post("/v1/completions", {**body, "prompt": "say"}, headers=headers["anna"]).status_code == 200
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert sorted(codes) == [200] * 6 + [429] * 2


# The end


def test_sigterm_lets_running_answers_finish_and_takes_no_new_ones(start: Start) -> None:
    served = start()
    served.engine.hold.set()
    got: list[httpx.Response] = []
    calls = [
        threading.Thread(target=lambda stream=stream: got.append(served.chat(stream=stream)))
        for stream in (False, True)
    ]
    for call in calls:
        call.start()
    wait_until(lambda: served.engine.stats().running == 2)
    served.server.handle_exit(15, None)
    refused = served.chat()
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    with served.client() as client:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
    served.engine.hold.clear()
    for call in calls:
        call.join(20)
    assert [response.status_code for response in got] == [200, 200]
    assert sorted(response.text.count('"finish_reason":"stop"') for response in got) == [1, 1]
    wait_until(lambda: served.server.should_exit)


def test_a_drain_ends_after_its_time(start: Start) -> None:
    served = start(drain_seconds=0.3)
    served.engine.hold.set()
    client = served.connect()
    client.sendall(raw_call(CHAT))
    wait_until(lambda: served.engine.stats().running == 1)
    served.server.handle_exit(15, None)
    wait_until(lambda: len(served.engine.cancelled) == 1, 20)
    client.close()


def test_no_file_is_left_open(served: Served) -> None:
    served.chat()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        client = served.connect()
        client.sendall(raw_call(CHAT))
        client.close()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, 20)
