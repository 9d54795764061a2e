"""Files over HTTP: they are kept as they came, under no name of the sender's, or nothing of them is kept."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvera.serve.api.access import KeyFile, new_key
from tests.disk import fill, small_disk
from tests.helpers import wait_until
from tests.serve.api.conftest import Served, Start, send


def stored(served: Served) -> list[str]:
    return sorted(file.name for file in served.trained.directory.files.iterdir())


@pytest.fixture
def training(start: Start, tmp_path: Path) -> Served:
    return start(training_dir=tmp_path / "training", file_bytes=1 << 20)


def test_a_file_comes_back_as_it_was_sent(training: Served, tmp_path: Path) -> None:
    for name in ("rows.jsonl", '../../étc/"pass\\wd".csv', "a/b\n.JSONL", "<script>", "rows.parquet"):
        comes_back(training, name, tmp_path)


def comes_back(training: Served, name: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * 3000  # also what looks like a boundary's beginning
    before = sorted(tmp_path.rglob("*"))
    card = send(training, content, name).json()
    assert card == {
        "id": card["id"],
        "object": "file",
        "bytes": len(content),
        "created_at": card["created_at"],
        "filename": card["filename"],
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }
    assert card["filename"].replace("%0A", "\n").replace("%22", '"') == name  # as httpx writes it
    with training.client() as client:
        assert client.get(f"/v1/files/{card['id']}").json() == card
        got = client.get(f"/v1/files/{card['id']}/content")
        assert got.content == content
        assert got.headers["content-type"] == "application/octet-stream"  # no page, whatever is in it
        assert got.headers["content-disposition"].startswith("attachment")
        assert client.get("/v1/files", params={"purpose": "fine-tune"}).json()["data"] == [card]
        assert client.get("/v1/files", params={"purpose": "vision"}).json()["data"] == []
        assert client.delete(f"/v1/files/{card['id']}").json() == {"id": card["id"], "object": "file", "deleted": True}
        assert client.get(f"/v1/files/{card['id']}").status_code == 404
        assert client.delete(f"/v1/files/{card['id']}").status_code == 404
    assert sorted(tmp_path.rglob("*")) == before


def test_lists_come_in_pages(training: Served) -> None:
    ids = [send(training).json()["id"] for _ in range(5)]
    with training.client() as client:

        def page(**parameters: Any) -> dict[str, Any]:
            return client.get("/v1/files", params={"limit": 2, **parameters}).json()

        first = page()
        assert [file["id"] for file in first["data"]] == [ids[4], ids[3]]
        assert first["has_more"]
        rest = page(after=first["last_id"], limit=3)
        assert [file["id"] for file in rest["data"]] == [ids[2], ids[1], ids[0]]
        assert not rest["has_more"]
        assert [file["id"] for file in page(order="asc", after=ids[3])["data"]] == [ids[4]]
        assert client.get("/v1/files", params={"after": "file-x"}).status_code == 404
        assert client.get("/v1/files", params={"limit": 0}).status_code == 400
        jobs = training.trained.jobs
        jobs.directory.place(jobs.database.file(ids[0], "local")).unlink()  # its bytes are gone
        assert client.get(f"/v1/files/{ids[0]}/content").status_code == 404


def form(*parts: tuple[str, bytes], boundary: str = "x", end: str = "--x--\r\n") -> dict[str, Any]:
    body = b"".join(
        f"--x\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n" for head, content in parts
    )
    return {"content": body + end.encode(), "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}}


PURPOSE, FILE = ('name="purpose"', b"fine-tune"), ('name="file"; filename="a.jsonl"', b"{}")


WRONG_FORMS: list[tuple[dict[str, Any], str]] = [
    ({"content": b"{}", "headers": {"Content-Type": "application/json"}}, "Expected a multipart/form-data body"),
    ({"content": b"{}", "headers": {"Content-Type": "multipart/form-data"}}, "Expected a multipart/form-data body"),
    (form(PURPOSE, FILE, boundary="y"), "no multipart form"),
    (form(PURPOSE, FILE, boundary="y" * 300), "no multipart form"),
    (form(PURPOSE, FILE, end=""), "ends in the middle"),
    (form(PURPOSE), "file: is missing"),
    (form(FILE), "purpose: expected 'fine-tune', got ''"),
    (form(('name="purpose"', b"vision"), FILE), "purpose: expected 'fine-tune', got 'vision'"),
    (form(('name="purpose"', b"x" * 2000), FILE), "purpose: is longer than 1000 bytes"),
    (form(PURPOSE, FILE, FILE), "file: is there twice"),
    (form(PURPOSE, ('name="file"; filename="a.exe"', b"{}")), "a.exe: can't read a file that ends in '.exe'"),
    (form(PURPOSE, ('name="colour"', b"red"), FILE), "Unknown key 'colour'"),
    (form(PURPOSE, ('name="expires_after[seconds]"', b"9"), FILE), "expires_after: is not supported"),
    (form(*[PURPOSE] * 9), "more than 8 parts"),
    (form(PURPOSE, FILE, end="--x--\r\n" + "y" * 300_000), "more than 65,536 bytes beside its file"),
    (form(PURPOSE, (f'name="file"; filename="{"x" * 5000}"', b"{}")), "no multipart form|header of the form"),
]


def test_a_wrong_form_is_refused_and_nothing_is_kept(training: Served) -> None:
    for settings, message in WRONG_FORMS:
        with training.client() as client:
            answer = client.post("/v1/files", **settings)
        assert answer.status_code == 400, message
        assert re.search(message, answer.json()["error"]["message"])
        assert stored(training) == [], message


def test_a_file_beyond_the_limit_is_refused_and_nothing_is_kept(training: Served) -> None:
    assert send(training, b"x" * (1 << 20)).status_code == 200
    before = stored(training)
    assert send(training, b"x" * ((1 << 20) + 1)).status_code == 413
    assert send(training, b"x" * (5 << 20)).status_code == 413

    def endless() -> Iterator[bytes]:
        yield form(PURPOSE, ('name="file"; filename="a.jsonl"', b""), end="")["content"][:-2]
        for _ in range(100):
            yield b"y" * (64 << 10)

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with training.client() as client:
        answer = client.post("/v1/files", content=endless(), headers=kind)
    assert answer.status_code == 413
    assert "1,048,576 bytes" in answer.json()["error"]["message"]
    assert stored(training) == before


def test_a_file_that_does_not_arrive_leaves_nothing_and_holds_up_nobody(start: Start, tmp_path: Path) -> None:
    served = start(training_dir=tmp_path / "training", body_seconds=0.5)
    body = form(PURPOSE, ('name="file"; filename="a.jsonl"', b"z" * 300_000))["content"]
    head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}\r\n\r\n"
    slow, gone = served.connect(), served.connect()
    for client in (slow, gone):
        client.sendall(head.encode() + body[:-5])
    wait_until(lambda: stored(served))
    gone.close()
    assert served.chat().status_code == 200
    slow.settimeout(20)
    assert slow.recv(100).startswith(b"HTTP/1.1 408")
    slow.close()
    wait_until(lambda: served.app.state.service.running == 0)
    assert stored(served) == []


def test_a_full_disk_is_told_and_nothing_is_kept(start: Start, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        served = start(training_dir=disk / "training")
        kept = send(served, b"x" * 100_000).json()
        filler = fill(disk, leave_bytes=400_000)
        answer = send(served, b"x" * 3_000_000)
        assert answer.status_code == 507
        assert "disk is full" in answer.json()["error"]["message"]
        assert stored(served) == [f"{kept['id']}.jsonl"]
        filler.unlink()
        assert send(served, b"x" * 3_000_000).status_code == 200


def test_a_slow_disk_holds_up_no_other_call(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    headers = {"Authorization": f"Bearer {new_key(path, 'anna', ['*'], ['use', 'train'])}"}
    served = start(training_dir=tmp_path / "training", keys=KeyFile(path))
    waiting, go_on, fsync = threading.Semaphore(0), threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        waiting.release()
        go_on.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    got: list[int] = []
    uploads = [threading.Thread(target=lambda: got.append(send(served, headers=headers).status_code)) for _ in range(6)]
    for upload in uploads:
        upload.start()
    try:
        for _ in range(2):
            assert waiting.acquire(timeout=20)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        assert served.post("/v1/chat/completions", body, headers=headers).status_code == 200
    finally:
        go_on.set()
        for upload in uploads:
            upload.join()
    assert got == [200] * 6


def test_a_client_that_reads_nothing_is_let_go(start: Start, tmp_path: Path) -> None:
    served = start(training_dir=tmp_path / "training", send_seconds=0.5, send_buffer_bytes=4096)
    file_id = send(served, b"x" * 4_000_000).json()["id"]
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(("127.0.0.1", served.port))
        client.sendall(f"GET /v1/files/{file_id}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        wait_until(lambda: served.app.state.service.running == 1)
        wait_until(lambda: served.app.state.service.running == 0, 20)


def test_files_are_their_keys_own(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    headers = {
        name: {"Authorization": f"Bearer {new_key(path, name, ['*'], may)}"}
        for name, may in {"anna": ["use", "train"], "ben": ["train"], "reader": ["use", "load"]}.items()
    }
    served = start(training_dir=tmp_path / "training", keys=KeyFile(path), files=2)
    mine = send(served, headers=headers["anna"]).json()["id"]
    assert send(served, headers=headers["reader"]).status_code == 403
    assert send(served).status_code == 401
    with served.client() as client:
        for path_of in (f"/v1/files/{mine}", f"/v1/files/{mine}/content"):
            assert client.get(path_of, headers=headers["ben"]).status_code == 404
            assert client.get(path_of, headers=headers["reader"]).status_code == 403
            assert client.get(path_of, headers=headers["anna"]).status_code == 200
        assert client.delete(f"/v1/files/{mine}", headers=headers["ben"]).status_code == 404
        assert client.get("/v1/files", headers=headers["ben"]).json()["data"] == []
        assert client.get("/v1/files", params={"after": mine}, headers=headers["ben"]).status_code == 404
    got: list[int] = []
    uploads = [
        threading.Thread(target=lambda: got.append(send(served, headers=headers["anna"]).status_code)) for _ in range(4)
    ]
    for upload in uploads:
        upload.start()
    for upload in uploads:
        upload.join()
    assert got.count(200) <= 1
    assert set(got) <= {200, 429}
    assert send(served, headers=headers["ben"]).status_code == 200


def test_a_server_without_a_training_directory_says_so(served: Served) -> None:
    for answer in (send(served), served.post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": "file-1"})):
        assert answer.status_code == 403
        assert "--training-dir" in answer.json()["error"]["message"]
