"""Pieces come out in order, few are in memory, errors arrive, and nothing keeps running afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from qvera.export.pipeline import in_order, one_thread_each


def test_order_and_bound() -> None:
    drawn: list[int] = []

    def pieces() -> Iterator[int]:
        for i in range(50):
            drawn.append(i)
            yield i

    def slow_first(i: int) -> int:
        time.sleep(0.01 if i % 3 == 0 else 0)
        return i * i

    taken = []
    for result in in_order(pieces(), slow_first, 4, 6):
        time.sleep(0.002)
        assert len(drawn) <= len(taken) + 7
        taken.append(result)
    assert taken == [i * i for i in range(50)]


@pytest.mark.parametrize("where", ["pieces", "compute"])
def test_an_error_comes_where_its_result_would(where: str) -> None:
    def pieces() -> Iterator[int]:
        for i in range(9):
            if i == 5 and where == "pieces":
                raise OSError("read")
            yield i

    def compute(i: int) -> int:
        if i == 5 and where == "compute":
            raise OSError("compute")
        return i

    taken = []
    with pytest.raises(OSError, match="read" if where == "pieces" else "compute"):
        for result in in_order(pieces(), compute, 2, 4):
            taken.append(result)
    assert taken == [0, 1, 2, 3, 4]


def test_closing_stops_the_threads_and_torchs_threads_come_back() -> None:
    before = threading.active_count(), torch.get_num_threads()
    with one_thread_each() as workers:
        assert workers >= 1
        assert torch.get_num_threads() == 1
        results = in_order(iter(range(10**9)), lambda i: i, workers, 4)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        results.close()
    assert (threading.active_count(), torch.get_num_threads()) == before
