"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal

import pytest

from qvera.utils.signals import StopRequests


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


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.asked is None
    finally:
        signal.signal(signal.SIGHUP, before)
