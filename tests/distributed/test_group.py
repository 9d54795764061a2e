"""Collectives of the processes of a run."""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.distributed.group import Group, in_group
from qvera.distributed.processes import Heartbeat, Processes, agreed_attempt, end_if_stuck
from qvera.utils.errors import EXIT_FAILED, InputError, RunFailed
from tests.distributed.ranks import free_port
from tests.helpers import start_process

_VIEWS = ("view", "split", "unsafe_split", "_reshape_alias", "reshape", "alias")


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy; a view launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += name.partition("_with_sizes")[0] not in _VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 448])
def test_gradients_of_all_layers_are_summed_by_one_message_and_as_few_launches_as_those_of_one(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []

    def all_reduce(tensor: torch.Tensor) -> None:  # with a second process that has the same gradients
        sent.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    given = [torch.randn(1 + number % 7, 3) for number in range(count)]
    tensors = [tensor.clone() for tensor in given]
    with Launches() as launches:
        Processes(world_size=2).all_reduce(tensors)
    assert all(torch.equal(tensor, 2 * before) for tensor, before in zip(tensors, given, strict=True))
    assert sent == [sum(tensor.numel() for tensor in given)]
    assert launches.counts.total() == 3, launches.counts  # join, sum, copy back


pytestmark = pytest.mark.process

SILENT_SECONDS = 0.4


class Store:
    """The launcher's store, in this process. Where it is ``broken``, it can't be reached."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.broken = False

    def set(self, key: str, value: str) -> None:
        self.reach()
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self.reach()
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def reach(self) -> None:
        if self.broken:
            raise RuntimeError("Broken pipe")


class SlowStore(Store):
    """A call of it returns when ``answers`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answers = threading.Event(), threading.Event()

    def check(self, keys: list[str]) -> bool:
        self.asked.set()
        self.answers.wait(60)
        return super().check(keys)


class Told:
    """What was given up on, and an event for it."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.happened = threading.Event()

    def __call__(self, message: str, exit_code: int) -> None:
        self.said.append((message, exit_code))
        self.happened.set()

    def wait(self) -> tuple[str, int]:
        assert self.happened.wait(5)
        return self.said[0]


def beat(store: Store, rank: int, told: Told | None = None, **more: Any) -> Heartbeat:
    settings = {"beat_seconds": 0.05, "silent_seconds": SILENT_SECONDS, **more}
    return Heartbeat(Group(rank, 2, rank, f"node{rank}"), store, told or Told(), **settings)


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvera.distributed.processes.GRACE_SECONDS", 0.1)


def test_ranks_that_beat_and_leave_are_not_mistaken_for_dead_ones() -> None:
    store, told = Store(), Told()
    with beat(store, 0, told, launcher=os.getppid()), beat(store, 1, told):
        time.sleep(2 * SILENT_SECONDS)
    with beat(store, 0, told):  # the other has left in good order, and stays silent
        time.sleep(2 * SILENT_SECONDS)
    assert not told.said


def test_a_silent_rank_is_named_with_its_node() -> None:
    store, told = Store(), Told()
    store.set("qvera/alive/1", '{"host": "node1", "count": 3}')  # it beats no more, and has not left
    with beat(store, 0, told):
        message, code = told.wait()
    assert "rank 1 on node1 has been silent" in message and "--resume" in message
    assert code == EXIT_FAILED


def test_a_rank_that_never_came_is_named_too() -> None:
    told = Told()
    with beat(Store(), 0, told):
        assert "rank 1 on an unknown node has been silent" in told.wait()[0]


def test_an_error_of_one_rank_ends_the_others_with_its_words_and_code() -> None:
    store, told = Store(), Told()
    with beat(store, 0, told):
        with pytest.raises(InputError), beat(store, 1):
            raise InputError("rows.jsonl: line 3 is no JSON.")
        assert told.wait() == ("rank 1 on node1 failed: InputError: rows.jsonl: line 3 is no JSON.", 2)


def test_an_error_that_all_share_is_not_passed_on() -> None:
    store, told = Store(), Told()
    error = InputError("the same on all")
    error.shared = True
    with beat(store, 0, told):
        with pytest.raises(InputError), beat(store, 1):
            raise error
        time.sleep(0.3)
    assert not told.said


def test_a_store_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node0")
    store, told = Store(), Told()
    with beat(store, 0), beat(store, 1, told):
        store.broken = True
        message, _ = told.wait()
        store.broken = False
    assert "rank 1 on node1 has not reached the run's key-value store at node0:" in message


def test_a_rank_whose_launcher_was_killed_ends_and_tells_the_others() -> None:
    store, orphan, other = Store(), Told(), Told()
    with beat(store, 0, other), beat(store, 1, orphan, launcher=os.getppid() + 1):  # as if another had taken its place
        mine, theirs = orphan.wait()[0], other.wait()[0]
    assert mine.startswith("rank 1 on node1 ends: the launcher that had started it was killed")
    assert theirs.startswith("rank 1 on node1 failed: the launcher that had started it was killed")


def test_a_process_that_leaves_waits_for_a_slow_call_of_the_store() -> None:
    store = SlowStore()
    with beat(store, 0, silent_seconds=30):
        assert store.asked.wait(5)
        threading.Timer(0.5, store.answers.set).start()  # many beats later
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qvera-heartbeat")]


def test_a_process_whose_heartbeat_hangs_ends_at_once_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store = SlowStore()
    end_if_stuck(3)
    with beat(store, 0):
        assert store.asked.wait(5)
    end_if_stuck(3)  # Python would abort it, if the call returned while the interpreter ends
    store.answers.set()
    assert ended == [3]


def agreed(store: Any, *ranks: int, limit_seconds: float = 10) -> dict[int, str]:
    """What these of two ranks, each in a thread, agree on; those that gave up are missing."""
    found: dict[int, str] = {}

    def one(rank: int) -> None:
        with contextlib.suppress(TimeoutError):
            found[rank] = agreed_attempt(store, rank, 2, limit_seconds)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_restarted_processes_agree_on_keys_that_no_dead_one_had() -> None:
    """With all that dead ones left in the store, nobody goes ahead alone, or takes their word for a peer's."""
    store, seen = torch.distributed.HashStore(), set()
    for _ in range(3):
        found = agreed(store, 0, 1)
        assert sorted(found) == [0, 1]
        assert found[0] == found[1] and found[0] not in seen
        seen.add(found[0])
    assert agreed(store, 0, limit_seconds=0.3) == agreed(store, 1, limit_seconds=0.3) == {}
    late: dict[int, str] = {}
    timer = threading.Timer(0.3, lambda: late.update(agreed(store, 1)))
    timer.start()
    found = agreed(store, 0)
    timer.join()
    assert found[0] == late[1] and found[0] not in seen


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of rank 0 of two; to change it further."""
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**places, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def refused(words: str, error: type[Exception] = InputError) -> None:
    with pytest.raises(error, match=words), in_group():
        raise AssertionError("joined")


def test_a_process_without_an_accelerator_of_its_own_is_refused(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("LOCAL_RANK", "1")
    launched.setattr("qvera.utils.accelerator.device_count", lambda: 1)
    refused("LOCAL_RANK is 1, and this process sees 1 accelerator, numbered")


def test_a_group_of_the_program_that_takes_no_cpu_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `init_process_group("nccl")`, which qvera's numbers and texts can't be sent by."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: "cuda:nccl")
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    refused("set up with cuda:nccl, which takes no CPU tensors")


def test_a_process_that_is_never_started_is_not_waited_for_without_end(launched: pytest.MonkeyPatch) -> None:
    launched.setattr("qvera.distributed.processes.JOIN_TIMEOUT", datetime.timedelta(seconds=1))
    began = time.monotonic()
    refused("rank 0 on .* did not meet all 2 processes at 127.0.0.1:", RunFailed)
    assert time.monotonic() - began < 20


def test_half_a_launchers_environment_is_refused(launched: pytest.MonkeyPatch) -> None:
    launched.delenv("MASTER_PORT")
    refused("MASTER_PORT is not set. Start several processes with `qvera launch`")
    for count in ("two", "0"):
        launched.setenv("WORLD_SIZE", count)
        refused(f"WORLD_SIZE: is '?{count}'? in the environment")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"])
def test_a_launchers_number_that_is_none_is_named(name: str, launched: pytest.MonkeyPatch) -> None:
    for value in ("x", "-1", "²"):
        launched.setenv(name, value)
        refused(f"{name}: is '{value}' in the environment; a launcher sets it to a whole number")


def test_processes_of_mpirun_and_srun_that_know_nothing_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.setenv(name, "2")
        refused(f"{name} is 2 in the environment, but WORLD_SIZE is not set.* Start them with `qvera launch`")
        monkeypatch.delenv(name)
    # the usual case: nothing has imported torch yet
    code = "from qvera.distributed.group import in_group\nwith in_group(): pass"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PMI_SIZE": "2"}, capture_output=True, text=True, check=False
    )
    assert "PMI_SIZE is 2 in the environment" in found.stderr


def _two_runs_in_the_programs_group(rank: int, port: int) -> None:
    place = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    for _ in range(2):  # the second one knows nothing of the first one's flags
        with in_group() as group:
            assert not group.has_flag("stop")
            group.sum([0.0])
            if rank == 1:
                group.set_flag("stop")
            group.sum([0.0])
            assert group.has_flag("stop")
            group.sum([0.0])  # rank 0 has the store: it may not end before the others have looked


def test_the_ranks_of_a_programs_own_group_see_each_others_flags() -> None:
    """By which those that train many adapters stop together."""
    port = free_port()
    ranks = [start_process(_two_runs_in_the_programs_group, rank, port) for rank in range(2)]
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]


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
