"""Promises on disk: repetition, waiting, owners, and what a restart finds."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvera.serve.tinker.database import Database, UnknownPromise


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with contextlib.closing(Database(tmp_path / "tinker.sqlite")) as database:
        yield database


def test_a_repeated_call_gets_the_same_promise(database: Database) -> None:
    promise, is_new = database.begin("anna", "s:train:0", 1, "optim_step", b"{}")
    assert is_new
    assert database.begin("anna", "s:train:0", 1, "optim_step", b"{}") == (promise, False)
    assert database.begin("anna", "s:train:1", 1, "optim_step", b"{}") != (promise, True)


def test_a_waiting_call_wakes_with_the_result_which_another_thread_gives(database: Database) -> None:
    promise, _ = database.begin("anna", "s:train:0", 1, "optim_step", b"{}")
    timer = threading.Timer(0.1, lambda: database.fulfil(promise, "json", b'{"metrics": {}}'))
    timer.start()
    began = time.monotonic()
    found = asyncio.run(database.wait(promise, "anna", 30.0))
    assert (found.state, found.payload) == ("json", b'{"metrics": {}}')
    assert time.monotonic() - began < 10
    again = asyncio.run(database.wait(promise, "anna", 30.0))  # a client whose connection broke asks again
    assert again == found


def test_a_promise_that_takes_longer_stays_pending(database: Database) -> None:
    promise, _ = database.begin("anna", "s:train:0", 1, "optim_step", b"{}")
    assert asyncio.run(database.wait(promise, "anna", 0.05)).state == "pending"


def test_other_owners_and_refused_calls_find_no_promise(database: Database) -> None:
    promise, _ = database.begin("anna", "s:train:0", 1, "optim_step", b"{}")
    refused, _ = database.begin("anna", "s:train:0", 2, "create_custom_loss", None, "refused")
    for name, owner in ((promise, "tom"), (refused, "anna"), ("promise-0", "anna")):
        with pytest.raises(UnknownPromise):
            asyncio.run(database.wait(name, owner, 0.0))


def test_the_first_result_stays(database: Database) -> None:
    promise, _ = database.begin("anna", "s:train:0", 1, "save_weights", b"{}")
    database.fail(promise, "no room", "server")
    database.fulfil(promise, "json", b"{}")
    found = database.promise(promise, "anna")
    assert (found.state, found.payload) == ("server", b"no room")


def test_the_next_server_finds_what_is_to_be_done_again_and_what_was_promised(tmp_path: Path) -> None:
    with contextlib.closing(Database(tmp_path / "tinker.sqlite")) as database:
        names = [database.begin("anna", "m", seq, "forward_backward", b"rows %d" % seq)[0] for seq in (3, 1, 2)]
        database.fulfil(names[1], "proto", b"losses", keep_body=True)
    with contextlib.closing(Database(tmp_path / "tinker.sqlite")) as database:
        assert [(one.seq, one.state, one.body) for one in database.promises("m")] == [
            (1, "proto", b"rows 1"),
            (2, "pending", b"rows 2"),
            (3, "pending", b"rows 3"),
        ]
        assert [one.seq for one in database.promises(pending=True)] == [3, 2]
        assert database.promise(names[1], "anna").payload == b"losses"
        database.forget_results(time.time() + 1)  # its body is still needed
        database.saved("m", 2)
        assert database.promises("m")[0].body is None
        database.forget_results(time.time() + 1)
        assert [one.seq for one in database.promises("m")] == [2, 3]
