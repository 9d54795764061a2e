"""The order of training is a function of the step alone; a batch is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvera.data import Example, collate, global_batch, microbatches, order, steps_per_epoch

SIZES = {"n": st.integers(1, 60), "size": st.integers(1, 20), "seed": st.integers(0, 2**65), "shuffle": st.booleans()}


@given(**SIZES, epoch=st.integers(0, 3))
def test_each_row_once_an_epoch(n: int, size: int, seed: int, shuffle: bool, epoch: int) -> None:
    steps = steps_per_epoch(n, size)
    batches = [global_batch(epoch * steps + i, n, size, seed, shuffle) for i in range(steps)]
    assert sorted(index for batch in batches for index in batch) == list(range(n))
    assert all(len(batch) == size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= size


def test_step_alone_decides() -> None:
    forward = [global_batch(step, 23, 5, 1, True) for step in range(15)]
    order.cache_clear()
    backward = [global_batch(step, 23, 5, 1, True) for step in reversed(range(15))]
    assert forward == backward[::-1]


def test_order_is_pinned() -> None:
    # A changed order would silently change what `--resume` goes on with.
    assert order(0, 8, 0, True).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert order(0, 8, 0, False).tolist() == list(range(8))


def test_epochs_and_seeds_differ_and_files_keep_their_order() -> None:
    first = order(0, 50, 7, True).tolist()
    assert first != order(1, 50, 7, True).tolist() and first != order(0, 50, 8, True).tolist()
    assert first != list(range(50))
    assert order(5, 50, 7, False).tolist() == list(range(50))


def test_the_cached_order_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        order(0, 5, 0, True)[0] = 3


@pytest.mark.parametrize(("step", "n", "size"), [(-1, 4, 2), (0, 0, 2), (0, 4, 0)])
def test_impossible_batches(step: int, n: int, size: int) -> None:
    with pytest.raises(ValueError, match="no batch"):
        global_batch(step, n, size, 0, True)


def test_microbatches() -> None:
    assert list(microbatches([4, 1, 3, 0, 2], 2)) == [[4, 1], [3, 0], [2]]
    with pytest.raises(ValueError, match="microbatches of 0"):
        list(microbatches([1], 0))


def example(ids: list[int], trained: list[bool]) -> Example:
    empty = np.array([], np.int32)
    return Example(np.array(ids, np.int32), np.array(trained), "f:1", empty, "", None)


def test_collate_is_exact() -> None:
    batch = collate([example([5, 6, 7], [False, True, True]), example([9, 2], [False, True])], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 2, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)
