"""Promises on disk: repetition, waiting, owners, and what a restart finds."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvera.serve.tinker.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with contextlib.closing(Database(tmp_path / "tinker.sqlite")) as database:
        yield database


def wait(database: Database, key: str, promise: str, seconds: float) -> Any:
    """A promise that has ended, as whoever waits for ``key`` finds it."""

    def look() -> Any:
        found = database.promise(promise, "anna")
        return None if found is None or found["state"] == "pending" else found

    return asyncio.run(database.wait(key, look, seconds))


@pytest.mark.parametrize("key", ["promise", "target"])
def test_who_waits_for_a_promise_or_its_target_wakes_with_the_result(database: Database, key: str) -> None:
    promise, _ = database.begin("anna", "s:sample:0", 1, "asample", b"{}")
    timer = threading.Timer(0.1, lambda: database.end(promise, "json", b'{"metrics": {}}'))
    timer.start()
    began, key = time.monotonic(), promise if key == "promise" else "s:sample:0"
    found = wait(database, key, promise, 30.0)
    assert found is not None and (found["state"], found["payload"]) == ("json", b'{"metrics": {}}')
    assert time.monotonic() - began < 10
    assert wait(database, key, promise, 30.0) == found  # a client whose connection broke asks again


def test_who_waits_looks_only_when_something_has_ended(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvera.serve.tinker.database._ASK_SECONDS", 0.01)
    promise, _ = database.begin("anna", "s:train:0", 1, "optim_step", b"{}")
    looks: list[float] = []
    assert asyncio.run(database.wait(promise, lambda: looks.append(time.monotonic()), 0.5)) is None
    assert len(looks) == 2  # at the beginning and at the end
    is_over = iter([False, False, True, True])
    assert asyncio.run(database.wait(promise, lambda: looks.append(0.0), 60.0, lambda: next(is_over))) is None
    assert len(looks) == 4


def test_an_event_loop_goes_on_while_a_transaction_waits_for_the_disk(database: Database) -> None:
    promise, _ = database.begin("anna", "s:train:0", 1, "optim_step", b"{}")
    begun, written = threading.Event(), threading.Event()

    def write() -> None:
        with database.transaction():
            begun.set()
            written.wait(20)

    async def poll() -> None:
        waits = asyncio.create_task(database.wait(promise, lambda: None, 0.01))
        while not waits.done():
            await asyncio.sleep(0.01)

    writer, poller = threading.Thread(target=write), threading.Thread(target=lambda: asyncio.run(poll()))
    writer.start()
    assert begun.wait(20)
    poller.start()
    poller.join(10)
    assert not poller.is_alive()
    written.set()
    writer.join()


def test_other_owners_and_refused_calls_find_no_promise(database: Database) -> None:
    promise, _ = database.begin("anna", "s:train:0", 1, "optim_step", b"{}")
    refused, _ = database.begin("anna", "s:train:0", 2, "create_custom_loss", None)
    for name, owner in ((promise, "tom"), (refused, "anna"), ("promise-0", "anna")):
        assert database.promise(name, owner) is None


def test_the_first_result_stays(database: Database) -> None:
    promise, _ = database.begin("anna", "s:train:0", 1, "save_weights", b"{}")
    database.fail(promise, "no room", "server")
    database.end(promise, "json", b"{}")
    found = database.promise(promise, "anna")
    assert found is not None and (found["state"], found["payload"]) == ("server", b"no room")


def test_later_results_have_later_times_also_where_the_clock_goes_back(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (database.begin("anna", "s:sample:0", seq, "asample", b"{}", size=3)[0] for seq in (1, 2))
    assert database.open_of("anna", samples=True) == (2, 6) and database.open_of("anna", samples=False) == (0, 0)
    database.end(second, "proto", b"four")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    database.end(first, "user", b"no")
    assert [row[0] for row in database.rows("SELECT id FROM promises ORDER BY done_at")] == [second, first]


def test_the_next_server_finds_what_is_to_be_done_again_and_what_was_promised(tmp_path: Path) -> None:
    with contextlib.closing(Database(tmp_path / "tinker.sqlite")) as database:
        names = [database.begin("anna", "m", seq, "forward_backward", b"rows %d" % seq)[0] for seq in (3, 1, 2)]
        database.end(names[1], "proto", b"losses", keep_body=True)
    with contextlib.closing(Database(tmp_path / "tinker.sqlite")) as database:
        assert [tuple(row) for row in database.rows("SELECT seq, state, body FROM promises ORDER BY seq")] == [
            (1, "proto", b"rows 1"),
            (2, "pending", b"rows 2"),
            (3, "pending", b"rows 3"),
        ]
        assert (found := database.promise(names[1], "anna")) is not None and found["payload"] == b"losses"
        database.forget(time.time() + 1)  # its body is still needed
        database.saved("m", 2)
        assert database.rows("SELECT body FROM promises WHERE seq = 1")[0][0] is None
        database.forget(time.time() + 1)
        assert [row[0] for row in database.rows("SELECT seq FROM promises ORDER BY seq")] == [2, 3]
