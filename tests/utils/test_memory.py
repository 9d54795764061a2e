"""Out of memory is told from other errors, says what was asked for, and leaves nothing behind."""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from qvera.utils.errors import RunFailed
from qvera.utils.memory import Shortage, each_in_halves, is_out_of_memory, or_shortage

CPU = torch.device("cpu")
CUDA = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.03 GiB is free."
)


def too_much() -> torch.Tensor:
    return torch.empty(2**58, dtype=torch.uint8)


def test_out_of_memory_is_known_and_leaves_nothing_behind() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def do() -> None:
        held = torch.ones(10)
        seen.append(weakref.ref(held))
        too_much()

    found = or_shortage(do, CPU)
    assert isinstance(found, Shortage)
    assert found.asked_bytes == 2**58 and 0 < found.free_bytes < 2**58
    assert seen[0]() is None, "the tensors of the failed call are free again"
    assert isinstance(or_shortage(lambda: np.empty(2**58, dtype=np.uint8), CPU), Shortage)
    found = or_shortage(Mock(side_effect=torch.OutOfMemoryError(CUDA)), CPU)
    assert isinstance(found, Shortage) and found.asked_bytes == 1.5 * 2**30
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes"):
        or_shortage(lambda: torch.ones(2) @ torch.ones(3, 4), CPU)


def fits(most: int) -> Any:
    def do(rows: list[int]) -> int:
        if len(rows) > most:
            raise torch.OutOfMemoryError(CUDA)
        return sum(rows)

    return do


def test_batches_are_halved_until_they_fit_and_stay_so() -> None:
    batches = [list(range(9)), list(range(9, 18)), [18]]
    said = r"with 9 prompts at a time \(1\.61 GB were asked for, .* were free\); going on with 4"
    with pytest.warns(UserWarning, match=said):
        found = list(each_in_halves(batches, fits(2), CPU, "prompts", ""))
    halves = [[0, 1], [2, 3], [4, 5], [6, 7], [8], [9, 10], [11, 12], [13, 14], [15, 16], [17], [18]]
    assert found == [(part, sum(part)) for part in halves]
    assert [part for part, _ in each_in_halves(batches, fits(9), CPU, "prompts", "")] == batches
    with pytest.raises(RunFailed, match=r"one of the prompts at a time: 1\.61 GB .* Shorten it\."):
        list(each_in_halves([[1]], fits(0), CPU, "prompts", "Shorten it."))
