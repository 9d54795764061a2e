"""SpIEL on two ranks: both move the same values to the same places, those of rank 0's first micro-batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qvera.adapters.config import PREFIX
from tests.conftest import small_llama
from tests.distributed.ranks import Ranks

pytestmark = [pytest.mark.process, pytest.mark.slow]


def test_two_ranks_choose_the_same_places(tmp_path: Path) -> None:
    ranks = Ranks(["-m", "tests.distributed.reselection_worker", str(tmp_path)], 2, tmp_path)
    assert ranks.wait(300) == [0, 0], ranks.text()
    first, second = (json.loads((tmp_path / f"found{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert len({step["digest"] for step in first}) == 6
    changed = [a["places"] != b["places"] for a, b in zip(first, first[1:], strict=False)]
    assert changed == [True, False, False, True, False]  # after steps 2 and 5
    model = small_llama()
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(100))
    model(ids, labels=ids).loss.backward()
    for key, places in first[1]["places"].items():
        grad = model.get_submodule(key.removeprefix(PREFIX).rpartition(".")[0]).weight.grad
        assert isinstance(grad, torch.Tensor)
        assert places == grad.flatten().abs().topk(len(places)).indices.sort().values.tolist(), key
