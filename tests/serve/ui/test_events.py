"""Server-sent events: new records alone, from where a reader was; and readers that leave are let go."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
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

    def wait_for_steps(self, *steps: int) -> None:
        """Until these are all that came."""
        wait_until(
            lambda: (
                [one["step"] for name, data, _ in self.got if name == "records" for one in data["records"]]
                == list(steps)
            ),
            10,
        )

    def wait_for_events(self, *names: str) -> None:
        """Until these have come first."""
        wait_until(lambda: [name for name, _, _ in self.got][: len(names)] == list(names), 10)

    def close(self) -> None:
        self._answer.close()
        self._client.close()


@pytest.fixture
def served(serve: Callable[..., Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A server over the runs of the test, which looks at them often."""
    monkeypatch.setattr(app, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(app, "_END_SECONDS", 0.02)
    return serve(tmp_path)


@pytest.fixture
def listen(served: Served) -> Iterator[Callable[..., Listener]]:
    """``listen(path)`` is a reader of what the page at the path listens to."""
    with contextlib.ExitStack() as ending:

        def start(path: str, last_event_id: str = "") -> Listener:
            listener = Listener(address_of(served, path), last_event_id)
            ending.callback(listener.close)
            return listener

        yield start


def address_of(served: Served, path: str) -> str:
    """Where a page gets its events; an address stays what it is."""
    if "from=" in path:
        return path
    page = served.get(path).text
    return served.url + page.split('data-events="')[1].split('"')[0].replace("&amp;", "&")


def test_a_reader_gets_what_is_new_since_its_page_and_goes_on_where_it_was(
    build_run: Build, served: Served, listen: Callable[..., Listener]
) -> None:
    run, rows = begin(build_run(name="a", train=train_rows(5), evals=None), status="running"), train_rows(12)
    address = address_of(served, "/run/a")
    append(run, rows[5])  # between the page and its stream
    reader = listen(address)
    append(run, rows[6])
    reader.wait_for_steps(6, 7)
    reader.close()
    append(run, *rows[7:9])
    again = listen(address, reader.got[-1][2])  # as a browser does, with the same address
    again.wait_for_steps(8, 9)
    append(run, {"kind": "train", "adapter": "anna", "step": 1, "loss": 1.0}, {**rows[9], "note": "text", "odd": [1]})
    again.wait_for_steps(8, 9, 10)
    assert set(again.got[-1][1]["records"][0]) == {"kind", *rows[9]} - {"note", "odd"}
    assert {name for name, _, _ in again.got} == {"records"}


def test_a_change_of_state_a_replaced_file_and_a_deleted_run_are_said(
    build_run: Build, served: Served, listen: Callable[..., Listener]
) -> None:
    run = begin(build_run(name="a", train=train_rows(5), evals=None), status="running")
    reader = listen("/run/a")
    wait_until(lambda: served.service.streams == 1, 10)
    (run / "new").write_text("".join(json.dumps(row) + "\n" for row in train_rows(3)))
    os.replace(run / "new", run / "metrics.jsonl")  # a resumed run has dropped two steps
    reader.wait_for_events("changed")
    (run / "run.json").write_text('{"status": "done"}')
    wait_until(lambda: len(reader.got) >= 2, 10)
    shutil.rmtree(run)
    served.look_again()
    wait_until(lambda: reader.ended, 10)
    assert reader.got[-1][0] == "gone"
    wait_until(lambda: served.service.streams == 0, 10)
    assert served.get("/events/run/nobody?from=1-2").text.endswith("event: gone\ndata: {}\n\n")


def test_the_list_is_told_of_new_runs_and_steps(build_run: Build, listen: Callable[..., Listener]) -> None:
    run = build_run(name="a", info=None, evals=None)
    reader = listen("/")
    time.sleep(0.2)
    assert reader.got == []
    append(run, {**train_rows(1)[0], "step": 97})
    wait_until(lambda: len(reader.got) == 1, 10)
    build_run(name="b")
    wait_until(lambda: len(reader.got) == 2, 10)


def test_a_reader_that_leaves_is_let_go_and_a_silent_stream_beats(
    build_run: Build, served: Served, listen: Callable[..., Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(app, "MOST_STREAMS", 4)
    build_run(name="a")
    readers = [listen("/run/a") for _ in range(4)]
    assert {reader.status for reader in readers} == {200}
    assert listen("/run/a").status == 503
    wait_until(lambda: all(reader.comments >= 3 for reader in readers), 20)
    for reader in readers:
        reader.close()
    wait_until(lambda: served.service.streams == served.service.running == 0, 20)


def test_streams_end_when_the_server_is_asked_to_stop(
    build_run: Build, served: Served, listen: Callable[..., Listener]
) -> None:
    build_run(name="a")
    readers = [listen(path) for path in ("/run/a", "/")]
    wait_until(lambda: served.service.streams == 2, 10)
    served.server.handle_exit(signal.SIGINT, None)
    wait_until(lambda: all(reader.ended for reader in readers), 5)
