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

from qvera.serve.api import access
from qvera.serve.api.access import Access, KeyFile, new_key
from qvera.utils.errors import InputError
from tests.helpers import wait_until
from tests.serve.api.conftest import Served, Start

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}


def raw_call(body: dict[str, Any]) -> bytes:
    text = json.dumps(body)
    kind = f"Content-Type: application/json\r\nContent-Length: {len(text)}"
    return f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n{text}".encode()


def calling(served: Served, call: bytes) -> socket.socket:
    """A client that has sent this."""
    client = served.connect()
    client.settimeout(20)
    client.sendall(call)
    return client


def slow_reader(served: Served, call: bytes) -> socket.socket:
    """A client that has sent this and takes little of an answer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    client.connect(("127.0.0.1", served.port))
    client.sendall(call)
    return client


def rest_of(client: socket.socket) -> bytes:
    """All that is still to come on a connection that the server ends, in whatever way."""
    client.settimeout(20)
    got = b""
    with client, contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            got += part
    return got


def open_connections(served: Served) -> list[Any]:
    return list(served.server.server_state.connections)


def calls_in_progress(served: Served) -> int:
    return int(served.app.state.service.running)


# Keys


KEYS = {"all": ("*", "use load"), "anna": ("anna", "use"), "loads": ("anna", "load")}


def test_a_key_opens_what_it_names_and_nothing_else(start: Start) -> None:
    served = start(keys=KEYS)
    headers = served.headers

    def statuses(who: str, *models: str) -> list[int]:
        return [served.chat(model=model, headers=headers[who]).status_code for model in models]

    assert statuses("all", "tiny", "anna", "ben", "nobody") == [200, 200, 200, 404]
    assert statuses("anna", "tiny", "hub/tiny", "ben", "nobody", "anna*0.5+ben*0.5", "anna") == [404] * 5 + [200]
    assert statuses("loads", "anna") == [403]
    assert "'ben'" not in served.chat(model="be", headers=headers["anna"]).text  # nor are others' names told
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
    for who, name, status in (("anna", "anna", 403), ("loads", "anna", 200), ("loads", "ben", 404)):
        assert served.post("/v1/load_adapter", {"name": name}, headers=headers[who]).status_code == status


def test_a_key_that_is_taken_out_of_the_file_is_refused_at_once(start: Start) -> None:
    served = start(keys=KEYS)
    headers = served.headers

    def statuses() -> list[int]:
        asked = [served.post("/v1/load_adapter", {"name": "anna"}, headers=headers[who]) for who in ("all", "loads")]
        return [answer.status_code for answer in asked]

    assert statuses() == [200, 200]
    path = served.key_file
    kept = [key for key in json.loads(path.read_text())["keys"] if key["name"] != "all"]
    path.write_text(json.dumps({"keys": kept}))
    assert statuses() == [401, 200]
    path.write_text("{")  # being edited: the keys that were read last stay
    assert statuses() == [401, 200]


BAD_KEYS = [
    ("{", "is not JSON"),
    ('{"keys": 3}', "expected a list"),
    ('{"keys": [3]}', "key 1: expected an object"),
    ('{"keys": [{"name": "a"}]}', "key 1 .a.: sha256: expected 64 hex"),
    ('{"keys": [{"name": "a", "sha256": "HASH", "adapters": ["*"], "may": ["fly"]}]}', "'fly' is none of"),
    ('{"keys": [{"name": "a", "sha256": "HASH", "adapters": "*", "may": []}]}', "adapters: expected a list"),
    ('{"keys": [{"name": "a", "key": "secret"}]}', "unknown 'key'"),
]


def test_the_file_holds_no_key_and_a_bad_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = new_key(path, "anna", ["*"], ["use"])
    assert len(key) > 40
    assert key.partition("-")[2] not in path.read_text()
    assert KeyFile(path).find(key) == Access("anna", None, frozenset({"use"}))
    assert KeyFile(path).find(key + "x") is None
    new_key(path, "ben", ["orders", "shawls"], ["use"])
    assert KeyFile(path).unknown({"orders", "base"}) == ["'shawls' (ben)"]
    for name, message in (("anna", "'anna' already"), (" ", "--new-key: the name is empty")):
        with pytest.raises(InputError, match=message):
            new_key(path, name, ["*"], ["use"])
    for text, message in BAD_KEYS:
        path.write_text(text.replace("HASH", "0" * 64))
        with pytest.raises(InputError, match=message):
            KeyFile(path)
    path.write_text("")  # its advice, with the same FILE, would be refused
    with pytest.raises(
        InputError, match=r"`qvera serve --new-key NAME --keys FILE` makes one, where FILE is not there"
    ):
        KeyFile(path)
    path.unlink()
    key = new_key(path, "anna", ["*"], ["use"])
    assert KeyFile(path).find(key) is not None


def test_a_key_that_is_taken_out_while_the_server_starts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = tmp_path / "keys.json", access._read_keys
    key = new_key(path, "anna", ["*"], ["use"])

    def edited_meanwhile(path: Path) -> list[tuple[str, Access]]:
        found = read(path)
        path.write_text('{"keys": []}')
        return found

    with monkeypatch.context() as patched:
        patched.setattr(access, "_read_keys", edited_meanwhile)
        keys = KeyFile(path)
    assert keys.find(key) is None


def test_without_keys_only_this_machines_own_names_and_pages_are_answered(start: Start) -> None:
    """A page of another site may have its own name point to 127.0.0.1, and then call as from the same origin."""
    served = start()
    own = f"127.0.0.1:{served.port}"
    hosts = dict.fromkeys(("localhost", own, "127.0.0.1:80", "[::1]:8000"), 200)
    hosts |= dict.fromkeys(("evil.example", "localhost.evil.example:8000", "10.0.0.1", ""), 403)
    for host, status in hosts.items():
        assert httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == status, host
    pages = {f"http://{own}": 200, "https://evil.example": 403, "null": 403, "http://127.0.0.1:1": 403}
    for origin, status in pages.items():
        assert served.post("/v1/load_adapter", {"name": "anna"}, headers={"Origin": origin}).status_code == status
    keyed = start(keys=KEYS)
    from_a_page = {"Origin": "https://app.example", **keyed.headers["all"]}
    assert keyed.post("/v1/load_adapter", {"name": "anna"}, headers=from_a_page).status_code == 200


def test_a_browser_may_call_a_server_with_keys_from_any_page_and_one_without_from_none(start: Start) -> None:
    """Before a call of another site's page a browser asks by OPTIONS, without the key; it shows only allowed answers."""
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization, x-stainless-lang"
    keyed = start(keys=KEYS)
    with keyed.client(headers=asked) as page:
        allowed = page.options("/v1/chat/completions")
        assert (allowed.is_success, allowed.headers["access-control-allow-origin"]) == (True, "*")
        assert allowed.headers["access-control-allow-headers"] == asked["Access-Control-Request-Headers"]
        assert "POST" in allowed.headers["access-control-allow-methods"]
        for headers, status in (({}, 401), (keyed.headers["all"], 200)):
            answer = page.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "*")
    with start().client(headers=asked) as page:
        refused = page.options("/v1/chat/completions")
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)


# Limits


def test_one_key_does_not_fill_the_queue_for_others(start: Start) -> None:
    served = start(keys=KEYS, places=2, queue=20, open_answers=4)
    headers = served.headers
    served.engine.hold.set()
    body = {"model": "anna", "prompt": "say", "stream": True}
    with (
        served.client() as client,
        client.stream("POST", "/v1/completions", json={**body, "n": 4}, headers=headers["all"]) as greedy,
    ):
        refused = served.post("/v1/completions", body, headers=headers["all"])
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        said = "This key has 4 answers open, asks for 1 more, and may have 4."
        assert (refused.json()["error"]["code"], refused.json()["error"]["message"]) == ("too_many_open", said)
        with client.stream("POST", "/v1/completions", json=body, headers=headers["anna"]) as taken:
            assert taken.status_code == 200
            served.engine.hold.clear()
            assert taken.read().endswith(b"data: [DONE]\n\n")
        greedy.read()
    assert served.post("/v1/completions", body, headers=headers["all"]).status_code == 200


def test_a_call_for_more_answers_than_a_key_may_ever_have_open_is_told_so_and_not_to_come_back(start: Start) -> None:
    served = start(keys=KEYS, open_answers=4)
    refused = served.chat(model="anna", n=5, headers=served.headers["anna"])
    assert (refused.status_code, "Retry-After" in refused.headers) == (400, False)
    said = "This call asks for 5 answers, and a key may have 4 open. Ask for fewer at once."
    assert refused.json()["error"]["message"] == said
    assert served.chat(model="anna", n=4, headers=served.headers["anna"]).status_code == 200


def test_long_prompts_of_one_key_hold_up_no_other(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    served = start(keys=KEYS, open_answers=6)
    headers = served.headers
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


def test_a_body_and_an_answer_have_their_limits(start: Start) -> None:
    served = start(body_bytes=2000, body_seconds=0.3, seconds=0.3)
    assert served.chat("x" * 1500).status_code != 413
    for content in (b"x" * 5000, iter([b"x" * 100] * 50)):  # with a length, and without one
        response = httpx.post(f"{served.url}/v1/chat/completions", content=content)
        assert response.status_code == 413
        assert "2,000 bytes" in response.json()["error"]["message"]
    with calling(served, raw_call(CHAT)[:-5]) as slow:  # the rest never comes
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    served.engine.hold.set()
    late = served.chat()
    assert (late.status_code, late.headers["x-should-retry"]) == (504, "false")
    assert json.loads(served.chat(stream=True).text.strip().split("\n\n")[-1][6:])["error"]["code"] == "timeout"
    wait_until(lambda: len(served.engine.cancelled) == 2)


# Clients that go away, or are slow


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_places(served: Served, stream: bool) -> None:
    served.engine.step_seconds, served.said["tiny"] = 0.02, "a" * 900
    with calling(served, raw_call({**CHAT, "stream": stream, "n": 3, "max_tokens": 900})) as client:
        wait_until(lambda: served.engine.stats().running == 3)
        assert not stream or client.recv(100).startswith(b"HTTP/1.1 200")
    wait_until(lambda: len(served.engine.cancelled) == 3, 10)
    wait_until(lambda: served.engine.stats().running == calls_in_progress(served) == 0, 10)


def test_clients_that_go_away_at_once_leave_no_request_and_no_open_file(served: Served) -> None:
    """Also those that go while their request is handed over to the engine."""
    served.chat()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        calling(served, raw_call(CHAT)).close()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, 20)
    served.engine.hold.set()
    entered, go_on = threading.Event(), threading.Event()
    submit = served.engine.submit

    def slow_submit(*arguments: Any) -> None:
        entered.set()
        go_on.wait(20)
        submit(*arguments)

    served.engine.submit = slow_submit  # type: ignore[assignment,method-assign]
    with calling(served, raw_call(CHAT)):
        assert entered.wait(20)
    wait_until(lambda: calls_in_progress(served) == 0)
    go_on.set()
    wait_until(lambda: served.engine.stats().running + served.engine.stats().waiting == 0)


def test_clients_that_read_nothing_stop_nobody_and_are_let_go(start: Start) -> None:
    served = start(places=20, send_seconds=0.5, send_buffer_bytes=4096)
    served.said["tiny"] = "word " * 180
    # with twenty likely tokens for each token, more than the small buffers take
    body = {**CHAT, "n": 1, "logprobs": True, "top_logprobs": 20, "max_tokens": 900}
    stuck = [slow_reader(served, raw_call(body)) for _ in range(6)]
    wait_until(lambda: calls_in_progress(served) == 6)
    began = time.monotonic()
    for _ in range(2):
        assert served.chat(max_tokens=900).json()["choices"][0]["message"]["content"] == served.said["tiny"]
    assert time.monotonic() - began < 30
    wait_until(lambda: calls_in_progress(served) == 0, 60)
    assert all(b"[DONE]" not in rest_of(client) for client in stuck)  # what the system's buffers took is all they get
    # answers that are no streams wait for their reader too
    asks_on = calling(served, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
    wait_until(lambda: calls_in_progress(served) == 1)
    wait_until(lambda: not open_connections(served) and calls_in_progress(served) == 0, 30)
    assert rest_of(asks_on).count(b"HTTP/1.1 200") < 1000


def test_a_connection_without_a_request_is_closed(start: Start) -> None:
    served = start(head_seconds=0.3)
    said_before = [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc", raw_call({"model": "nobody"})]
    clients = [calling(served, text) for text in said_before]

    def drip() -> bool:
        """A byte of a head now and then is no request either."""
        for client in clients[1:]:
            with contextlib.suppress(OSError):
                client.sendall(b"x")
        return not open_connections(served)

    wait_until(drip, 20)
    assert [rest_of(client)[:12] for client in clients] == [b"", b"", b"HTTP/1.1 400"]
    served.engine.hold.set()
    with calling(served, raw_call(CHAT)) as waits:  # for its answer, and not for a request
        time.sleep(1.3)  # connections are looked at once a second
        served.engine.hold.clear()
        assert waits.recv(100).startswith(b"HTTP/1.1 200")


def test_peers_that_ask_nothing_take_nobodys_place(start: Start) -> None:
    served = start(connections=4)
    idle = [served.connect() for _ in range(4)]
    wait_until(lambda: len(open_connections(served)) == 4)
    slow = calling(served, raw_call(CHAT)[:-5])  # the rest never comes
    assert rest_of(idle[0]) == b""  # the first has waited longest
    assert [served.chat().status_code for _ in range(4)] == [200] * 4
    served.engine.hold.set()
    busy = [calling(served, raw_call({**CHAT, "stream": False})) for _ in range(4)]
    wait_until(lambda: served.engine.stats().running == 4)
    with served.connect() as refused:
        assert refused.makefile("rb").read().startswith(b"HTTP/1.1 503")
    served.engine.hold.clear()
    assert all(client.recv(100).startswith(b"HTTP/1.1 200") for client in busy)  # who waits for an answer gets it
    for client in (*idle[1:], slow, *busy):
        client.close()


# The end


def test_sigterm_lets_running_answers_finish_for_a_while_and_takes_no_new_ones(start: Start) -> None:
    served, got = start(), list[httpx.Response]()
    served.engine.hold.set()
    calls = [threading.Thread(target=lambda is_=is_: got.append(served.chat(stream=is_))) for is_ in (False, True)]
    for call in calls:
        call.start()
    wait_until(lambda: served.engine.stats().running == 2)
    served.server.handle_exit(15, None)
    refused, health = served.chat(), httpx.get(f"{served.url}/health")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert (health.status_code, health.json()) == (503, {"status": "draining"})
    served.engine.hold.clear()
    for call in calls:
        call.join(20)
    assert [response.status_code for response in got] == [200, 200]
    assert sorted(response.text.count('"finish_reason":"stop"') for response in got) == [1, 1]
    wait_until(lambda: served.server.should_exit)
    impatient = start(drain_seconds=0.2)
    impatient.engine.hold.set()
    calls = [threading.Thread(target=lambda is_=is_: got.append(impatient.chat(stream=is_))) for is_ in (False, True)]
    for call in calls:
        call.start()
    wait_until(lambda: impatient.engine.stats().running == 2)
    impatient.server.handle_exit(15, None)
    for call in calls:
        call.join(20)
    assert sorted(response.status_code for response in got[2:]) == [200, 503]
    assert all("The server is stopping." in response.text for response in got[2:])
