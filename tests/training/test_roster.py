"""Who is trained when: the order of the queue, room, slots, and the share of each process."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import pytest

from qvera.data import AdapterRows
from qvera.training.plan.decisions import slots_to_fill
from qvera.training.roster import AdapterRun, Roster, deal, longest_pass


def runs(*steps_and_rows: tuple[int, int]) -> list[AdapterRun]:
    none, unread = np.array([], dtype=np.int64), cast(Any, None)
    return [
        AdapterRun(number, AdapterRows(f"a{number}", none, none, 0), f"a{number}", steps, rows, unread, unread)
        for number, (steps, rows) in enumerate(steps_and_rows)
    ]


def numbers(found: list[AdapterRun]) -> list[int]:
    return [run.number for run in found]


def test_those_with_most_steps_come_first_and_ties_in_the_order_of_the_data() -> None:
    roster = Roster(runs((3, 1), (9, 1), (3, 1), (12, 1), (9, 1)), slots=2, pass_rows=None)
    order = numbers(roster.admit())
    while roster.in_flight:
        roster.leave(roster.in_flight[0], "done")
        order += numbers(roster.admit())
    assert order == [3, 1, 4, 0, 2]
    assert not roster.queue and not roster.in_flight


@pytest.mark.parametrize(
    ("sizes", "pass_rows", "at_once"),
    [([4] * 9, 16, 4), ([4] * 9, 15, 3), ([16, 16], 8, 1), ([1] * 30, 16, 16), ([4, 1, 1, 1, 1], 16, 5)],
)
def test_adapters_join_as_long_as_their_rows_go_into_the_pass(sizes: list[int], pass_rows: int, at_once: int) -> None:
    found = runs(*((10 - number, rows) for number, rows in enumerate(sizes)))
    roster = Roster(found, slots_to_fill([run.step_rows for run in found], pass_rows), pass_rows)
    assert len(roster.admit()) == at_once
    assert len(Roster(runs(*[(5, 4)] * 9), slots=6, pass_rows=None).admit()) == 6  # a number that was asked for


def test_the_trial_takes_the_longest_rows_that_a_pass_can_have() -> None:
    """Of each adapter those of a step, of at most as many adapters as are in flight."""
    found = runs((9, 2), (9, 3), (9, 3))
    lengths = np.array([90, 80, 70, 60, 5, 6, 7, 8, 50, 1, 2, 3])
    for run, rows in zip(found, ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]), strict=True):
        run.rows = dataclasses.replace(run.rows, train=np.array(rows))
    assert longest_pass(found, lengths, slots=3, pass_rows=16) == [0, 1, 8, 7, 6, 5, 11, 10]
    assert longest_pass(found, lengths, slots=1, pass_rows=16) == [0, 1, 8]
    assert longest_pass(found, lengths, slots=3, pass_rows=4) == [0, 1, 8, 7]


def test_processes_share_out_the_steps_evenly_and_all_know_how() -> None:
    steps = [int(steps) for steps in np.random.default_rng(0).integers(1, 60, 1000)]
    shares = deal(steps, 3)
    assert sorted(number for share in shares for number in share) == list(range(1000))
    work = [sum(steps[number] for number in share) for share in shares]
    assert max(work) - min(work) <= max(steps)
    assert all(share == sorted(share) for share in shares)
    assert deal([5], 3) == [[0], [], []]
