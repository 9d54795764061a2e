"""Several processes of a run: how they join and leave, how one that is gone is noticed, and what they send each other.

Nothing is pickled: torch's object collectives pickle, these send JSON as bytes.

A collective can't tell a slow peer from a dead one. So a thread in each process counts up its own key in the launcher's
key-value store and reads the keys of the others. It ends this process when a peer's key stands still for
`SILENT_SECONDS`, when a peer left with an error, or when the store can't be reached for as long.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist

from qvera.distributed.group import JSON, Group, T, for_all, refuse_other_launchers
from qvera.utils import accelerator
from qvera.utils.errors import EXIT_FAILED, InputError, Interrupted, OwnCodeFailed, QveraError, RunFailed, first_line

_ERRORS: dict[str, type[QveraError]] = {
    cls.__name__: cls for cls in (InputError, Interrupted, OwnCodeFailed, RunFailed, QveraError)
}


class Processes(Group):
    """Several processes, connected by torch.distributed."""

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor([float(value) for value in values], dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: JSON) -> list[JSON]:
        # tensors of an all-gather have equal sizes, so the lengths go first and the texts are padded
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([text.numel()]))
        longest = max(int(length) for length in lengths)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(padded, torch.cat([text, text.new_zeros(longest - text.numel())]))
        return [json.loads(bytes(p[: int(n)].numpy())) for p, n in zip(padded, lengths, strict=True)]

    def gather_bytes(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, str] = {}
        for one in self.gather({name: bytes(tensor.numpy()).hex() for name, tensor in tensors.items()}):
            found |= one
        return {name: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for name, text in found.items()}

    def broadcast(self, value: JSON) -> JSON:
        return self.gather(value if self.first else None)[0]

    def broadcast_tensors(self, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        given = tensors if self.first and tensors is not None else {}
        head = self.broadcast([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in given.items()])
        received = {}
        for name, dtype, shape in head:
            tensor = given[name].contiguous() if self.first else torch.empty(shape, dtype=getattr(torch, dtype))
            if tensor.numel():
                dist.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
            received[name] = tensor
        return received

    def all_reduce(self, tensors: Sequence[torch.Tensor]) -> None:
        if not tensors:
            return
        bucket = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(bucket)
        parts = bucket.split([tensor.numel() for tensor in tensors])
        views = [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)]
        torch._foreach_copy_(list(tensors), views)  # in few launches

    def on_first(self, do: Callable[[], JSON]) -> JSON:
        found = self.broadcast(_outcome(do) if self.first else None)
        if "error" in found:
            raise for_all(_ERRORS[found["error"]](found["text"]))
        return found["value"]

    def agree(self, do: Callable[[], T]) -> T:
        # an error is sent as text, so that a rank that fails still takes part and nobody waits for it
        mine = _outcome(do)
        found = self.gather({"host": self.host, **{k: v for k, v in mine.items() if k != "value"}})
        failed = [i for i, one in enumerate(found) if "error" in one]
        if failed:
            text = found[failed[0]]["text"]
            if len(failed) < self.world_size:
                text = f"rank {failed[0]} on {found[failed[0]]['host']}: {text}"
            raise for_all(_ERRORS[found[failed[0]]["error"]](text))
        return mine["value"]

    def measure_network(self) -> tuple[float, float]:
        """Time all-reduces where gradients lie: seconds for one number, bytes per second for 4 MB. Medians of five."""
        device = accelerator.current_device()

        def seconds(numel: int) -> float:
            taken = []
            for _ in range(5):
                tensor = torch.zeros(numel, device=device)
                dist.barrier()  # else the first rank would measure how late the others come
                began = time.perf_counter()
                dist.all_reduce(tensor)
                accelerator.synchronize()
                taken.append(time.perf_counter() - began)
            return sorted(taken)[2]

        return seconds(1), 4 * 2**20 / seconds(2**20)


def _outcome(do: Callable[[], object]) -> dict[str, Any]:
    try:
        return {"value": do()}
    except QveraError as error:
        kind = next((name for name, cls in _ERRORS.items() if isinstance(error, cls)), "QveraError")
        return {"error": kind, "text": str(error)}


BEAT_SECONDS = 2.0
SILENT_SECONDS = 15.0
"""A peer that has sent no beat for so long counts as gone. With the beat and the grace that is noticed within 30 s."""
GRACE_SECONDS = 3.0
"""The time that a process has to end with its own message, after a peer left with an error."""
_GO_ON = "Checkpoints are kept; go on with --resume."
_THREAD = "qvera-heartbeat"


class Heartbeat:
    """Sends heartbeats during a with-block. An exception that leaves the block is reported to the other ranks.

    Args:
        group: the ranks that are watched.
        store: a connection to the launcher's store that nothing else uses, because its calls block.
        give_up: called from a thread with a message and an exit code when a peer is gone. Default: `end_process`.
        launcher: the process id of the parent. When it is gone, this process ends too. None: not checked.
    """

    def __init__(
        self,
        group: Group,
        store: dist.Store,
        give_up: Callable[[str, int], None] | None = None,
        beat_seconds: float = BEAT_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
        launcher: int | None = None,
    ) -> None:
        self.group, self.store = group, store
        self._give_up, self._launcher = give_up or end_process, launcher
        self._beat_seconds, self._silent_seconds = beat_seconds, silent_seconds
        self._done = threading.Event()
        self._reached = time.monotonic()
        self._me = f"rank {group.rank} on {group.host}"
        self._seen: dict[int, tuple[str, float]] = {}  # rank → its key's last value, and when that was new
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._write(count=0)  # before any collective, so that the others know our node
        # two threads: where the store can't be reached, a call of it hangs, and somebody has to notice that
        for target in (self._beat_on, self._watch_store):
            thread = threading.Thread(target=target, daemon=True, name=f"{_THREAD}{target.__name__}")
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._done.set()
        if isinstance(error, QveraError) and error.shared:
            error = None  # the others have it too
        reason: dict[str, object] = {}
        if error is not None:
            code = getattr(error, "exit_code", EXIT_FAILED)
            reason = {"error": f"{type(error).__name__}: {error}", "exit_code": code}
        for thread in self._threads:  # a call of the store may be slow on a busy machine
            thread.join(timeout=self._silent_seconds)
        if not any(thread.is_alive() for thread in self._threads):  # else the store hangs, and so would we
            with contextlib.suppress(RuntimeError):
                self._write(left=True, **reason)

    def find_the_dead(self) -> None:
        """Wait after a failed collective until the beats show which rank is gone. That ends this process."""
        print(f"qvera: {self._me} lost a peer in the middle of a step; finding out which.", file=sys.stderr, flush=True)
        self._done.wait(self._silent_seconds + GRACE_SECONDS + 2 * self._beat_seconds)

    def _write(self, **state: object) -> None:
        self.store.set(_key(self.group.rank), json.dumps({"host": self.group.host, **state}))
        self._reached = time.monotonic()

    def _beat_on(self) -> None:
        count = 0
        while not self._done.wait(self._beat_seconds):
            count += 1
            try:
                # an orphan gets another parent
                if self._launcher is not None and os.getppid() != self._launcher:
                    self._without_launcher()
                    return
                self._write(count=count)
                for rank in range(self.group.world_size):
                    if rank != self.group.rank and not self._done.is_set() and self._look_at(rank):
                        return
            except (RuntimeError, ConnectionError):  # torch's DistNetworkError, DistStoreError: the watcher decides
                continue

    def _without_launcher(self) -> None:
        reason = f"the launcher that had started it was killed. {_GO_ON}"
        with contextlib.suppress(RuntimeError):  # it may have served the store
            self._write(left=True, error=reason, exit_code=EXIT_FAILED)
        self._give_up(f"{self._me} ends: {reason}", EXIT_FAILED)

    def _look_at(self, rank: int) -> bool:
        """Call ``give_up`` and return True if this rank is gone."""
        key, now = _key(rank), time.monotonic()
        value = self.store.get(key).decode() if self.store.check([key]) else "{}"
        self._reached = now
        # when a value was new here counts, not when it was written: clocks of nodes may differ
        if rank not in self._seen or value != self._seen[rank][0]:
            self._seen[rank] = value, now
        state = json.loads(value)
        host = state.get("host", "an unknown node")
        if "error" in state:
            # this process may be about to end with a message of its own
            if not self._done.wait(GRACE_SECONDS):
                self._give_up(f"rank {rank} on {host} failed: {state['error']}", state["exit_code"])
            return True
        if not state.get("left") and now - self._seen[rank][1] > self._silent_seconds:
            self._give_up(
                f"rank {rank} on {host} has been silent for {self._silent_seconds:.0f} s: its process is stopped, its "
                f"node is down, or the network between it and this node is cut. {_GO_ON}",
                EXIT_FAILED,
            )
            return True
        return False

    def _watch_store(self) -> None:
        while not self._done.wait(self._beat_seconds / 2):
            if time.monotonic() - self._reached > self._silent_seconds:
                where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
                self._give_up(
                    f"{self._me} has not reached the run's key-value store at {where} for {self._silent_seconds:.0f} "
                    f"s: that node is down, or the network to it is cut. {_GO_ON}",
                    EXIT_FAILED,
                )
                return


def _key(rank: int) -> str:
    return f"qvera/alive/{rank}"


def end_process(message: str, exit_code: int) -> None:
    """Print the message and end this process at once: its main thread may hang in a collective."""
    print(f"qvera: {message}", file=sys.stderr, flush=True)
    os._exit(exit_code)


def end_if_stuck(exit_code: int) -> None:
    """End this process at once if a heartbeat's thread still hangs in a call of the store.

    If that call returned while the interpreter ends, Python would unwind the thread in the middle of C++ code. That
    aborts the process ("terminate called without an active exception").
    """
    if any(thread.name.startswith(_THREAD) for thread in threading.enumerate()):
        with contextlib.suppress(OSError):  # nobody reads
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def own_store() -> dist.TCPStore:
    """Return a new connection to the store at MASTER_ADDR:MASTER_PORT, which the launcher or rank 0 serves."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, wait_for_workers=False, timeout=datetime.timedelta(seconds=30))


_LOST = re.compile(r"gloo|NCCL|connection (was )?(closed|reset|refused)|socket|broken pipe", re.IGNORECASE)
"""Messages of torch's collectives when a peer is gone. They do not say which one."""
JOIN_TIMEOUT = datetime.timedelta(minutes=5)
"""The time that processes wait for the last of them to start."""
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
"""The time that ranks may be apart, such as while one writes. `Heartbeat` notices a dead rank much sooner."""


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Yield the group of the processes that a launcher (torchrun, deepspeed) started with this one.

    If the calling program has set up torch.distributed already, its process group is used and left alone.

    Raises:
        InputError: the launcher's environment is wrong, accelerators are too few, or the program's group takes no CPU
            tensors.
        RunFailed: the other processes did not come.
    """
    if dist.is_initialized():
        config = dist.get_backend_config()
        if "cpu" not in config and dist.get_backend() != "gloo":
            raise InputError(
                f"torch.distributed was set up with {config}, which takes no CPU tensors. Set it up with "
                f"init_process_group({accelerator.collective_backend()!r}), or leave it to qvera."
            )
        count = dist.get_world_size()
        kind = Group if count == 1 else Processes
        local_rank = accelerator.launcher_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
        group = kind(dist.get_rank(), count, local_rank)
        if count > 1:  # with flags of its own, since the program may train several times
            prefix = group.broadcast(f"qvera/{uuid.uuid4().hex}")
            store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
            group = dataclasses.replace(group, store=store)
        yield group
        return
    refuse_other_launchers()
    numbers = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT") if name in os.environ]
    given = {name: accelerator.launcher_number(name) for name in numbers}
    count = given.get("WORLD_SIZE", 1)
    if count < 1:
        raise InputError(f"WORLD_SIZE: is {count} in the environment; a launcher sets it to the number of processes.")
    if count == 1:
        # torchrun may restart this process too, which then needs the store's flags
        by_torchrun = all(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))
        yield Group(store=own_store() if by_torchrun else None)
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {count} in the environment, but {', '.join(missing)} is not set. Start several processes "
            "with `qvera launch`, torchrun or deepspeed; for a single one unset WORLD_SIZE."
        )
    local_rank = given["LOCAL_RANK"]
    if 0 < (seen := accelerator.device_count()) <= local_rank:
        raise InputError(
            f"LOCAL_RANK is {local_rank}, and this process sees {seen} accelerator{'s'[: seen != 1]}, numbered from 0. "
            "Start one process for each (`qvera launch --gpus N`), and let each see all of them."
        )
    accelerator.use_device(local_rank)
    # the store first: every later key has the prefix of this attempt, so that none of a dead process is read
    with _clear_errors(count):
        store, rank, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        store.set_timeout(JOIN_TIMEOUT)
        attempt = agreed_attempt(store, rank, count, JOIN_TIMEOUT.total_seconds())
    group = Processes(rank, count, local_rank, store=store)
    # the process id of torchrun or DeepSpeed's launcher, which has to live as long as this process
    launcher = os.getppid() if {"TORCHELASTIC_RUN_ID", "CROSS_RANK"} & os.environ.keys() else None
    try:
        # beats begin before the processes connect, since a peer may die in the middle of that
        with Heartbeat(group, dist.PrefixStore(attempt, own_store()), launcher=launcher) as heartbeat:
            try:
                with _clear_errors(count):  # a peer may go while the processes connect, too
                    backend = accelerator.collective_backend()
                    own = dist.PrefixStore(attempt, store)
                    dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=COLLECTIVE_TIMEOUT)
                yield group
            except RuntimeError as error:
                if _LOST.search(str(error)):
                    heartbeat.find_the_dead()
                raise
            group.sum([0.0])  # rank 0 may serve the store: it must not go before the others are done with it
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _clear_errors(count: int) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, TimeoutError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunFailed(
            f"rank {os.environ['RANK']} on {socket.gethostname()} did not meet all {count} processes at {where} within "
            f"{JOIN_TIMEOUT.seconds // 60} minutes: one was not started, or can't reach that address "
            f"({first_line(error)})"
        ) from None


def agreed_attempt(store: dist.Store, rank: int, world_size: int, limit_seconds: float) -> str:
    """Return a key prefix that all live processes have in common, and that no earlier process used.

    A launcher that restarts processes keeps its store, with the addresses and beats of the dead; its count of restarts
    is no prefix, because each node counts for itself. So each process writes a random word. Rank 0 publishes the list
    of words until every process has confirmed a list with its own word. The prefix is a hash of that list.
    """
    until = time.monotonic() + limit_seconds
    word = uuid.uuid4().hex
    store.set(f"qvera/word/{rank}", word)
    seen = ""
    while time.monotonic() < until:
        if rank == 0:
            keys = [f"qvera/word/{other}" for other in range(world_size)]
            if store.check(keys):
                words = ",".join(store.get(key).decode() for key in keys)
                if words != seen:  # a process was restarted meanwhile: the list is published anew
                    seen = words
                    store.set("qvera/words", words)
        elif store.check(["qvera/words"]):
            words = store.get("qvera/words").decode()
            if word in words.split(",") and words != seen:  # else the list is of an earlier process of this rank
                seen = words
                store.set(f"{_prefix(words)}/confirmed/{rank}", "")
        if seen:
            confirmations = [f"{_prefix(seen)}/confirmed/{other}" for other in range(1, world_size)]
            if rank == 0 and store.check(confirmations):
                store.set(f"{_prefix(seen)}/go", "")
                return _prefix(seen)
            if rank and store.check([f"{_prefix(seen)}/go"]):
                return _prefix(seen)
        time.sleep(0.02)
    raise TimeoutError("the others did not come.")


def _prefix(words: str) -> str:
    return f"qvera/{hashlib.sha256(words.encode()).hexdigest()[:16]}"
