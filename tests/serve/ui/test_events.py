"""Server-sent events: new records alone, from where a reader was; and readers that leave are let go."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qvera.serve.ui import app
from tests.evaluation.report.conftest import train_rows
from tests.helpers import wait_until
from tests.serve.ui.conftest import Served, append, begin

Build = Callable[..., Path]
Serve = Callable[..., Served]


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(app, "_END_SECONDS", 0.02)


class Listener:
    """A reader of events in a thread of its own."""

    def __init__(self, url: str, last_event_id: str = "") -> None:
        self.got: list[tuple[str, Any, str]] = []
        self.comments = 0
        self.ended = False
        self._client = httpx.Client(timeout=60)
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self._answer = self._client.send(self._client.build_request("GET", url, headers=headers), stream=True)
        self.status = self._answer.status_code
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        fields: dict[str, str] = {}
        with contextlib.suppress(httpx.HTTPError, OSError):
            for line in self._answer.iter_lines():
                if line.startswith(":"):
                    self.comments += 1
                elif line:
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif "data" in fields:
                    self.got.append((fields["event"], json.loads(fields["data"]), fields.get("id", "")))
                    fields = {}
        self.ended = True

    def steps(self) -> list[int]:
        return [record["step"] for name, data, _ in self.got if name == "records" for record in data["records"]]

    def close(self) -> None:
        self._answer.close()
        self._client.close()


@pytest.fixture
def listen() -> Iterator[Callable[..., Listener]]:
    opened: list[Listener] = []

    def start(url: str, last_event_id: str = "") -> Listener:
        opened.append(Listener(url, last_event_id))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def events_of(served: Served, path: str) -> str:
    """The address that a page listens to."""
    page = served.get(path).text
    return served.url + page.split('data-events="')[1].split('"')[0].replace("&amp;", "&")


def test_a_reader_gets_what_is_new_since_its_page_and_goes_on_where_it_was(
    build_run: Build, serve: Serve, tmp_path: Path, listen: Callable[..., Listener]
) -> None:
    run, rows = begin(build_run(name="a", train=train_rows(5), evals=None), status="running"), train_rows(12)
    served = serve(tmp_path)
    address = events_of(served, "/run/a")
    append(run, rows[5])  # between the page and its stream
    reader = listen(address)
    append(run, rows[6])
    wait_until(lambda: reader.steps() == [6, 7], 10)
    reader.close()
    append(run, *rows[7:9])
    again = listen(address, reader.got[-1][2])  # as a browser does, with the same address
    wait_until(lambda: again.steps() == [8, 9], 10)
    append(run, {"kind": "train", "adapter": "anna", "step": 1, "loss": 1.0}, {**rows[9], "note": "text", "odd": [1]})
    wait_until(lambda: again.steps() == [8, 9, 10], 10)
    assert set(again.got[-1][1]["records"][0]) == {"kind", *rows[9]} - {"note", "odd"}
    assert [name for name, _, _ in again.got if name != "records"] == []


def test_a_change_of_state_a_replaced_file_and_a_deleted_run_are_said(
    build_run: Build, serve: Serve, tmp_path: Path, listen: Callable[..., Listener]
) -> None:
    run = begin(build_run(name="a", train=train_rows(5), evals=None), status="running")
    served = serve(tmp_path)
    reader = listen(events_of(served, "/run/a"))
    wait_until(lambda: served.service.streams == 1, 10)
    (run / "new").write_text("".join(json.dumps(row) + "\n" for row in train_rows(3)))
    os.replace(run / "new", run / "metrics.jsonl")  # a resumed run has dropped two steps
    wait_until(lambda: [name for name, _, _ in reader.got] == ["changed"], 10)
    (run / "run.json").write_text('{"status": "done"}')
    wait_until(lambda: len(reader.got) >= 2, 10)
    shutil.rmtree(run)
    served.service.directories._scanned_at = None
    wait_until(lambda: reader.ended, 10)
    assert reader.got[-1][0] == "gone"
    wait_until(lambda: served.service.streams == 0, 10)


def test_the_list_is_told_of_new_runs_and_steps(
    build_run: Build, serve: Serve, tmp_path: Path, listen: Callable[..., Listener]
) -> None:
    run = build_run(name="a", info=None, evals=None)
    served = serve(tmp_path)
    reader = listen(events_of(served, "/"))
    time.sleep(0.3)
    assert reader.got == []
    append(run, {**train_rows(1)[0], "step": 97})
    wait_until(lambda: len(reader.got) == 1, 10)
    build_run(name="b")
    wait_until(lambda: len(reader.got) == 2, 10)


def test_a_reader_that_leaves_is_let_go_and_a_silent_stream_beats(
    build_run: Build, serve: Serve, tmp_path: Path, listen: Callable[..., Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(app, "MOST_STREAMS", 8)
    build_run(name="a")
    served = serve(tmp_path)
    address = events_of(served, "/run/a")
    readers = [listen(address) for _ in range(8)]
    assert {reader.status for reader in readers} == {200}
    assert listen(address).status == 503
    wait_until(lambda: all(reader.comments >= 3 for reader in readers), 20)
    for reader in readers:
        reader.close()
    wait_until(lambda: served.service.streams == 0, 20)
    wait_until(lambda: served.service.running == 0, 20)


def test_streams_end_when_the_server_is_asked_to_stop(
    build_run: Build, serve: Serve, tmp_path: Path, listen: Callable[..., Listener]
) -> None:
    import signal

    build_run(name="a")
    served = serve(tmp_path)
    readers = [listen(events_of(served, path)) for path in ("/run/a", "/")]
    wait_until(lambda: served.service.streams == 2, 10)
    served.server.handle_exit(signal.SIGINT, None)
    wait_until(lambda: all(reader.ended for reader in readers), 5)


def test_an_unknown_run_has_no_news(build_run: Build, serve: Serve, tmp_path: Path) -> None:
    build_run(name="a")
    answer = serve(tmp_path).get("/events/run/nobody?from=1-2")
    assert answer.text.endswith("event: gone\ndata: {}\n\n")
