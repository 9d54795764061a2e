"""A peer that is silent, one that left with an error, and a store that is gone are each noticed and named; others are not."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from typing import Any

import pytest
import torch

from qvera.distributed.group import Group
from qvera.distributed.heartbeat import Heartbeat, end_if_stuck
from qvera.distributed.init import agreed_attempt, in_group
from qvera.utils.errors import EXIT_FAILED, InputError, RunFailed
from tests.distributed.ranks import free_port

pytestmark = pytest.mark.process


class Store:
    """The launcher's store, in this process; ``broken``: it can't be reached."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.broken = False

    def set(self, key: str, value: str) -> None:
        if self.broken:
            raise RuntimeError("Broken pipe")
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        if self.broken:
            raise RuntimeError("Broken pipe")
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


class Told:
    """What was given up on, and an event for it."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.happened = threading.Event()

    def __call__(self, message: str, exit_code: int) -> None:
        self.said.append((message, exit_code))
        self.happened.set()


def beat(store: Store, rank: int, told: Told, silent_seconds: float = 0.5, launcher: int | None = None) -> Heartbeat:
    group = Group(rank, 2, rank, f"node{rank}")
    return Heartbeat(group, store, told, beat_seconds=0.05, silent_seconds=silent_seconds, launcher=launcher)


def test_ranks_that_beat_and_leave_are_not_mistaken_for_dead_ones() -> None:
    store, told = Store(), Told()
    with beat(store, 0, told), beat(store, 1, told):
        time.sleep(1.2)
    with beat(store, 0, told):  # the other has left in good order, and stays silent
        time.sleep(1.0)
    assert not told.said


def test_a_silent_rank_is_named_with_its_node() -> None:
    store, told = Store(), Told()
    with beat(store, 1, Told()) as stopped:
        stopped._done.set()  # it beats no more, and has not left
        with beat(store, 0, told):
            assert told.happened.wait(5)
    message, code = told.said[0]
    assert "rank 1 on node1 has been silent" in message
    assert "--resume" in message
    assert code == EXIT_FAILED


def test_a_rank_that_never_came_is_named_too() -> None:
    told = Told()
    with beat(Store(), 0, told):
        assert told.happened.wait(5)
    assert "rank 1 on an unknown node has been silent" in told.said[0][0]


def test_an_error_of_one_rank_ends_the_others_with_its_words_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvera.distributed.heartbeat.GRACE_SECONDS", 0.1)
    store, told = Store(), Told()
    with beat(store, 0, told):
        with pytest.raises(InputError), beat(store, 1, Told()):
            raise InputError("rows.jsonl: line 3 is no JSON.")
        assert told.happened.wait(5)
    assert told.said[0] == ("rank 1 on node1 failed: InputError: rows.jsonl: line 3 is no JSON.", 2)


def test_an_error_that_all_share_is_not_passed_on() -> None:
    store, told = Store(), Told()
    error = InputError("the same on all")
    error.shared = True
    with beat(store, 0, told):
        with pytest.raises(InputError), beat(store, 1, Told()):
            raise error
        time.sleep(0.3)
    assert not told.said


def test_a_store_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node0")
    store, told, other = Store(), Told(), Told()
    with beat(store, 0, other), beat(store, 1, told):
        store.broken = True
        assert told.happened.wait(5)
        store.broken = False
    assert "has not reached the run's key-value store at node0:" in told.said[0][0]
    assert "rank 1 on node1" in told.said[0][0]


def test_a_rank_whose_launcher_was_killed_ends_and_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvera.distributed.heartbeat.GRACE_SECONDS", 0.1)
    store, orphan, other = Store(), Told(), Told()
    with beat(store, 0, other), beat(store, 1, orphan, launcher=os.getppid() + 1):  # as if another had taken its place
        assert orphan.happened.wait(5)
        assert other.happened.wait(5)
    assert orphan.said[0][0].startswith("rank 1 on node1 ends: the launcher that had started it was killed")
    assert other.said[0][0].startswith("rank 1 on node1 failed: the launcher that had started it was killed")
    told = Told()
    with beat(store, 0, told, launcher=os.getppid()), beat(store, 1, told):
        time.sleep(0.3)
    assert not told.said


def agreed(store: Any, *ranks: int, world_size: int, limit_seconds: float = 10) -> dict[int, str]:
    """What these ranks, each in a thread, agree on; those that gave up are missing."""
    found: dict[int, str] = {}

    def one(rank: int) -> None:
        with contextlib.suppress(TimeoutError):
            found[rank] = agreed_attempt(store, rank, world_size, limit_seconds)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_restarted_processes_agree_on_keys_that_no_dead_one_had(world_size: int) -> None:
    store, everyone = torch.distributed.HashStore(), range(world_size)
    seen: set[str] = set()
    for _ in range(3):
        found = agreed(store, *everyone, world_size=world_size)
        assert sorted(found) == list(everyone)
        assert len(set(found.values())) == 1
        assert not seen & set(found.values())
        seen |= set(found.values())


def test_a_process_does_not_take_the_word_of_a_dead_one_for_its_peers() -> None:
    """All that rank 1 left behind is in the store, and rank 1 itself is not there: nobody goes ahead."""
    store = torch.distributed.HashStore()
    agreed(store, 0, 1, world_size=2)
    assert agreed(store, 0, world_size=2, limit_seconds=0.5) == {}
    assert agreed(store, 1, world_size=2, limit_seconds=0.5) == {}
    late = threading.Timer(0.5, lambda: late_found.update(agreed(store, 1, world_size=2)))
    late_found: dict[int, str] = {}
    late.start()
    found = agreed(store, 0, world_size=2)
    late.join()
    assert found[0] == late_found[1]


def launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**places, "MASTER_PORT": str(free_port()), **variables}.items():
        monkeypatch.setenv(name, value)


def test_a_process_without_an_accelerator_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, RANK="1", LOCAL_RANK="1")
    monkeypatch.setattr("qvera.utils.accelerator.device_count", lambda: 1)
    with pytest.raises(InputError, match="LOCAL_RANK is 1, and this process sees 1 accelerator, numbered"), in_group():
        raise AssertionError("joined without a device")


def test_a_group_of_the_program_that_takes_no_cpu_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `init_process_group("nccl")`, which qvera's numbers and texts can't be sent by."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: "cuda:nccl")
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    with pytest.raises(InputError, match="set up with cuda:nccl, which takes no CPU tensors"), in_group():
        raise AssertionError("joined")


def test_a_process_that_is_never_started_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch)
    monkeypatch.setattr("qvera.distributed.init.JOIN_TIMEOUT", datetime.timedelta(seconds=2))
    began = time.monotonic()
    with pytest.raises(RunFailed, match="rank 0 on .* did not meet all 2 processes at 127.0.0.1:"), in_group():
        raise AssertionError("joined alone")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE: is 'two' in the environment"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: is '0'"),
        ("MASTER_PORT", None, "MASTER_PORT is not set. Start several processes with `qvera launch`"),
    ],
)
def test_half_a_launchers_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, words: str
) -> None:
    launched(monkeypatch)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words), in_group():
        raise AssertionError("joined")


def test_one_process_alone_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with in_group() as group:
        assert (group.rank, group.world_size, group.first) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert group.sum([1, 2.5]) == [1.0, 2.5]
        assert group.gather({"a": 1}) == [{"a": 1}]
        assert group.broadcast("x") == "x"
        with pytest.raises(InputError, match="no"):
            group.agree(lambda: (_ for _ in ()).throw(InputError("no")))


class SlowStore(Store):
    """A call of it returns when ``answers`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answers = threading.Event(), threading.Event()

    def check(self, keys: list[str]) -> bool:
        self.asked.set()
        self.answers.wait(60)
        return super().check(keys)


def _is_beating() -> bool:
    return any(thread.name.startswith("qvera-heartbeat") for thread in threading.enumerate())


def test_a_process_that_leaves_waits_for_a_slow_call_of_the_store() -> None:
    store = SlowStore()
    with beat(store, 0, Told(), silent_seconds=30):
        assert store.asked.wait(5)
        threading.Timer(1.0, store.answers.set).start()  # many beats later
    assert not _is_beating()


def test_a_process_whose_heartbeat_hangs_ends_at_once_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store = SlowStore()
    end_if_stuck(3)
    with beat(store, 0, Told(), silent_seconds=0.2):
        assert store.asked.wait(5)
    end_if_stuck(3)  # Python would abort it, if the call returned while the interpreter ends
    store.answers.set()
    assert ended == [3]
