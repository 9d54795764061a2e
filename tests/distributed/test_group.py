"""Collectives of the processes of a run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.distributed.group import Group

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
        Group(world_size=2).all_reduce(tensors)
    assert all(torch.equal(tensor, 2 * before) for tensor, before in zip(tensors, given, strict=True))
    assert sent == [sum(tensor.numel() for tensor in given)]
    assert launches.counts.total() == 3, launches.counts  # join, sum, copy back
