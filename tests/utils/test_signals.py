"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from qvera.utils.signals import StopRequests, in_threads


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_remembered_and_handlers_are_put_back(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with StopRequests() as requests:
            assert requests.asked is None
            os.kill(os.getpid(), number)
            assert requests.asked == name
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_stops_at_once() -> None:
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert requests.asked == "SIGINT"


_LONG_OPERATION = """
import hashlib
from qvera.utils.signals import StopRequests
with StopRequests({first!r}):
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 5_000_000)  # one operation of C code: no handler runs before it ends
"""


@pytest.mark.parametrize(("first", "said"), [("saving", "saving; press Ctrl-C again"), (None, "stopping now")])
def test_ctrl_c_is_answered_before_the_operation_ends(first: str | None, said: str) -> None:
    script = [sys.executable, "-u", "-c", _LONG_OPERATION.format(first=first)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.3)  # it is within the operation
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert process.stdout.readline() == "\n"
        assert f"SIGINT: {said}" in process.stdout.readline()
        answered_seconds = time.monotonic() - sent
        process.wait()
        assert answered_seconds < (time.monotonic() - sent) / 2


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)


_WAITS_FOR_A_SERVER = """
import time
from qvera.utils.signals import in_threads
for number, _ in in_threads(time.sleep, [0.0, 60.0, 60.0], 2):
    print(number, flush=True)
"""


def test_ctrl_c_does_not_wait_for_what_a_server_has_not_answered() -> None:
    script = [sys.executable, "-u", "-c", _WAITS_FOR_A_SERVER]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert process.returncode not in (0, None)


def test_results_come_with_their_numbers_and_an_error_ends_all() -> None:
    assert dict(in_threads(lambda item: item * 2, [3, 4, 5], 2)) == {0: 6, 1: 8, 2: 10}
    asked = []

    def ask(item: int) -> float:
        asked.append(item)
        return 1 / item

    with pytest.raises(ZeroDivisionError):
        list(in_threads(ask, [1, 0, 1, 1], 1))
    assert asked == [1, 0]
