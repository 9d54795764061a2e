"""The order of training is a function of the step alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvera.data import Batches, microbatches, steps_per_epoch
from qvera.data.sampler import grouped_by_length, order

SIZES = {"n": st.integers(1, 60), "size": st.integers(1, 20), "seed": st.integers(0, 2**65), "shuffle": st.booleans()}


def batches(n: int, size: int, seed: int = 1, shuffle: bool = True, **options: Any) -> Batches:
    return Batches(np.array([3 + 7 * i % 11 for i in range(n)]), size, seed=seed, shuffle=shuffle, **options)


@given(**SIZES, epoch=st.integers(0, 3), by_length=st.booleans())
def test_each_row_once_an_epoch(n: int, size: int, seed: int, shuffle: bool, epoch: int, by_length: bool) -> None:
    steps = steps_per_epoch(n, size)
    found = batches(n, size, seed, shuffle, by_length=by_length)
    taken = [found.rows(epoch * steps + i) for i in range(steps)]
    assert sorted(index for batch in taken for index in batch) == list(range(n))
    assert all(len(batch) == size for batch in taken[:-1])
    assert 1 <= len(taken[-1]) <= size


@pytest.mark.parametrize("by_length", [False, True])
def test_step_alone_decides(by_length: bool) -> None:
    forward, backward = (batches(23, 5, by_length=by_length) for _ in range(2))
    taken = [forward.rows(step) for step in range(15)]
    assert taken == [backward.rows(step) for step in reversed(range(15))][::-1]


def test_rows_of_like_length_go_together() -> None:
    lengths = np.random.default_rng(0).integers(5, 400, 1000)
    mixed, it = (Batches(lengths, 8, by_length=by_length) for by_length in (False, True))
    spread, wide = ([np.ptp(lengths[one.rows(i)]) for i in range(2 * one.per_epoch)] for one in (it, mixed))
    assert np.mean(spread) < 0.1 * np.mean(wide)
    means = [np.mean(lengths[it.rows(step)]) for step in range(it.per_epoch)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3, "no epoch goes from long to short"
    assert it.rows(0) != it.rows(it.per_epoch)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), limit=st.integers(30, 90), ranks=st.integers(1, 4)
)
def test_packed_passes_are_full_and_hold_every_row_once(lengths: list[int], limit: int, ranks: int) -> None:
    it = Batches(np.array(lengths), len(lengths), pack_tokens=limit, shuffle=False)
    rows = it.rows(0)
    shares = [it.passes(rows, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    for share in shares:
        full = [one for one in share if one]
        tokens = [sum(lengths[i] for i in one) for one in full]
        assert all(total <= limit for total in tokens)
        # the first row of a pass had no room in the one before
        assert all(total + lengths[one[0]] > limit for total, one in zip(tokens, full[1:], strict=False))
    assert [row for share in shares for one in share for row in one] == rows


def test_order_is_pinned() -> None:
    # A changed order would silently change what `--resume` goes on with.
    assert order(0, 8, 0, True).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert order(0, 8, 0, False).tolist() == order(5, 8, 7, False).tolist() == list(range(8))
    lengths = np.array([3, 9, 4, 8, 5, 7, 6])
    assert grouped_by_length(order(0, 7, 0, True), lengths, 2, 0, 0).tolist() == [1, 3, 5, 6, 4, 2, 0]


def test_epochs_and_seeds_differ() -> None:
    found = [order(epoch, 50, seed, True).tolist() for epoch, seed in ((0, 7), (1, 7), (0, 8))]
    assert len(set(map(tuple, [*found, range(50)]))) == 4


def test_microbatches() -> None:
    assert list(microbatches([4, 1, 3, 0, 2], 2)) == [[4, 1], [3, 0], [2]]
