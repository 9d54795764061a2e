"""Files over HTTP: they are kept as they came, under no name of the sender's, or nothing of them is kept."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.disk import fill, small_disk
from tests.helpers import wait_until
from tests.serve.api.conftest import Served, Start, send


def stored(served: Served) -> list[str]:
    return sorted(file.name for file in served.jobs.directory.files.iterdir())


@pytest.fixture
def training(start: Start, tmp_path: Path) -> Served:
    return start(training_dir=tmp_path / "training", file_bytes=1 << 20)


def send_at_once(served: Served, count: int, headers: dict[str, str]) -> tuple[list[threading.Thread], list[int]]:
    """Uploads that have begun, and the statuses of those that have ended."""
    got: list[int] = []
    uploads = [
        threading.Thread(target=lambda: got.append(send(served, headers=headers).status_code)) for _ in range(count)
    ]
    for upload in uploads:
        upload.start()
    return uploads, got


NAMES = ("rows.jsonl", '../../étc/"pass\\wd".csv', "a/b\n.JSONL", "<script>", "rows.parquet")


def test_a_file_comes_back_as_it_was_sent(training: Served, tmp_path: Path) -> None:
    content = bytes(range(256)) * 3000  # also what looks like a boundary's beginning
    before = sorted(tmp_path.rglob("*"))
    with training.client() as client:
        for name in NAMES:
            card = send(training, content, name).json()
            facts = {"object": "file", "bytes": len(content), "purpose": "fine-tune", "status": "processed"}
            unset = {"status_details": None, "expires_at": None}
            assert card == {**{key: card[key] for key in ("id", "created_at", "filename")}, **facts, **unset}
            assert card["filename"].replace("%0A", "\n").replace("%22", '"') == name  # as httpx writes it
            path = f"/v1/files/{card['id']}"
            assert client.get(path).json() == card
            got = client.get(f"{path}/content")
            assert got.content == content
            assert got.headers["content-type"] == "application/octet-stream"  # no page, whatever is in it
            assert got.headers["content-disposition"].startswith("attachment")
            for purpose, found in (("fine-tune", [card]), ("vision", [])):
                assert client.get("/v1/files", params={"purpose": purpose}).json()["data"] == found
            assert client.delete(path).json() == {"id": card["id"], "object": "file", "deleted": True}
            assert client.get(path).status_code == client.delete(path).status_code == 404
            assert sorted(tmp_path.rglob("*")) == before


def test_lists_come_in_pages(training: Served) -> None:
    ids = [send(training).json()["id"] for _ in range(5)]
    with training.client() as client:

        def page(**parameters: Any) -> tuple[list[str], bool]:
            found = client.get("/v1/files", params={"limit": 2, **parameters}).json()
            assert found["last_id"] == found["data"][-1]["id"]
            return [file["id"] for file in found["data"]], found["has_more"]

        assert page() == ([ids[4], ids[3]], True)
        assert page(after=ids[3], limit=3) == ([ids[2], ids[1], ids[0]], False)
        assert page(order="asc", after=ids[3]) == ([ids[4]], False)
        assert client.get("/v1/files", params={"after": "file-x"}).status_code == 404
        assert client.get("/v1/files", params={"limit": 0}).status_code == 400
        jobs = training.jobs
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
    (form(PURPOSE, (FILE[0], b"")), "file: is empty"),
    (form(FILE), "purpose: expected 'fine-tune', got ''"),
    (form(('name="purpose"', b"vision"), FILE), "purpose: expected 'fine-tune', got 'vision'"),
    (form(('name="purpose"', b"x" * 2000), FILE), "purpose: expected 'fine-tune', got 'xxx"),
    (form(PURPOSE, FILE, FILE), "file: is there twice"),
    (form(PURPOSE, ('name="file"; filename="a.exe"', b"{}")), "a.exe: can't read a file that ends in '.exe'"),
    (form(PURPOSE, ('name="file"', b"rows.jsonl")), "with curl: -F file=@rows.jsonl"),
    (form(PURPOSE, ('name="colour"', b"red"), FILE), "Unknown key 'colour'."),
    (form(PURPOSE, ('name="files"', b"red"), FILE), "Unknown key 'files'; did you mean 'file'?"),
    (form(PURPOSE, ('name="expires_after[seconds]"', b"9"), FILE), "expires_after: is not supported"),
    (form(*[PURPOSE] * 999), "more than 65,536 bytes beside its file"),
    (form(PURPOSE, FILE, end="--x--\r\n" + "y" * 300_000), "more than 65,536 bytes beside its file"),
    (form(PURPOSE, (f'name="file"; filename="{"x" * 5000}"', b"{}")), "no multipart form|header of the form"),
]


def test_a_wrong_form_is_refused_and_nothing_is_kept(training: Served) -> None:
    for settings, message in WRONG_FORMS:
        answer = httpx.post(f"{training.url}/v1/files", **settings)
        assert answer.status_code == 400, message
        assert re.search(message, answer.json()["error"]["message"])
        assert stored(training) == [], message


def test_a_file_beyond_the_limit_is_refused_and_nothing_is_kept(training: Served) -> None:
    assert send(training, b"x" * (1 << 20)).status_code == 200
    before = stored(training)
    assert send(training, b"x" * ((1 << 20) + 1)).status_code == 413

    def endless() -> Iterator[bytes]:
        yield form(PURPOSE, ('name="file"; filename="a.jsonl"', b""), end="")["content"][:-2]
        for _ in range(100):
            yield b"y" * (64 << 10)

    answer = httpx.post(f"{training.url}/v1/files", content=endless(), headers=form()["headers"])
    assert answer.status_code == 413
    assert "1,048,576 bytes" in answer.json()["error"]["message"]
    assert stored(training) == before


def test_a_file_that_does_not_arrive_leaves_nothing_and_holds_up_nobody(start: Start, tmp_path: Path) -> None:
    served = start(training_dir=tmp_path / "training", body_seconds=0.3)
    sent = form(PURPOSE, ('name="file"; filename="a.jsonl"', b"z" * 300_000))
    headers = {"Host": "localhost", "Content-Length": len(sent["content"]), **sent["headers"]}
    head = "POST /v1/files HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    slow, gone = served.connect(), served.connect()
    for client in (slow, gone):
        client.sendall(head.encode() + sent["content"][:-5])
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
    served = start(training_dir=tmp_path / "training", keys={"anna": ("*", "use train")})
    headers = served.headers["anna"]
    waiting, go_on, fsync = threading.Semaphore(0), threading.Event(), os.fsync

    def slow(descriptor: int) -> None:
        waiting.release()
        go_on.wait(60)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    uploads, got = send_at_once(served, 6, headers)
    try:
        for _ in range(2):
            assert waiting.acquire(timeout=20)
        assert served.chat(headers=headers).status_code == 200
    finally:
        go_on.set()
        for upload in uploads:
            upload.join()
    assert got == [200] * 6


def test_files_are_their_keys_own(start: Start, tmp_path: Path) -> None:
    keys = {"anna": ("*", "use train"), "ben": ("*", "train"), "reader": ("*", "use load")}
    served = start(training_dir=tmp_path / "training", keys=keys, files=2)
    headers = served.headers
    mine = send(served, headers=headers["anna"]).json()["id"]
    assert send(served, headers=headers["reader"]).status_code == 403
    assert send(served).status_code == 401
    with served.client() as client:
        for name, status in (("ben", 404), ("reader", 403), ("anna", 200)):
            for part in ("", "/content"):
                assert client.get(f"/v1/files/{mine}{part}", headers=headers[name]).status_code == status
        assert client.delete(f"/v1/files/{mine}", headers=headers["ben"]).status_code == 404
        assert client.get("/v1/files", headers=headers["ben"]).json()["data"] == []
        assert client.get("/v1/files", params={"after": mine}, headers=headers["ben"]).status_code == 404
    uploads, got = send_at_once(served, 4, headers["anna"])
    for upload in uploads:
        upload.join()
    assert got.count(200) <= 1
    assert set(got) <= {200, 429}
    assert send(served, headers=headers["ben"]).status_code == 200


def test_a_server_without_a_training_directory_says_so(served: Served) -> None:
    for answer in (send(served), served.post("/v1/fine_tuning/jobs", {"model": "tiny", "training_file": "file-1"})):
        assert answer.status_code == 403
        assert "it was started without --training-dir" in answer.json()["error"]["message"]
