"""Launches of one decoder layer for one new token, on the fake accelerator: ours against stock 4-bit decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

from qvera.evaluation import generate
from qvera.models.structure import causal_model
from tests.gpu.fake_accelerator import FakeAccelerator, Seen, per_layer
from tests.gpu.kernel_counts import CASES, ours
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process


def one_token(fake: FakeAccelerator, model: Any, free_bytes: int) -> Seen:
    """A token after 512 others, of one row."""
    decoder, make = causal_model(model).get_decoder(), torch.tensor

    def tensor(values: Any, **settings: Any) -> torch.Tensor:  # a cache begins with an empty one, which a fake can't be
        return torch.empty(0, **settings) if values == [] else make(values, **settings)

    free = mock.patch.object(generate.memory, "available_bytes", return_value=free_bytes)
    with free, mock.patch.object(torch, "tensor", tensor), generate.generating(model):
        cache = DynamicCache(config=decoder.config)
        for tokens in (512, 1):
            ids = torch.empty(1, tokens, dtype=torch.int64, device=fake.device)
            with fake.record() as seen:
                decoder(input_ids=ids, use_cache=True, **{generate.CACHE_ARGUMENT: cache})
    return seen


def launches(fake: FakeAccelerator, prepare: Callable[[Any], Any], free_bytes: int) -> Counter[str]:
    two, one = (one_token(fake, prepare(fake.model("7b", layers)), free_bytes) for layers in (2, 1))
    return per_layer(two, one)


def frozen(rank: int) -> Callable[[Any], Any]:
    return lambda model: ours(rank)(model).requires_grad_(False)


def all_cases(fake: FakeAccelerator) -> dict[str, dict[str, int]]:
    return {
        "stock": launches(fake, CASES["frozen base, stock"], 0),
        "base": launches(fake, lambda model: model, 0),
        "adapter": launches(fake, frozen(256), 0),
        "adapter, W + ΔW held": launches(fake, frozen(256), 80 * 2**30),
    }


@pytest.fixture(scope="module")
def counts() -> dict[str, Counter[str]]:
    return {name: Counter(found) for name, found in measured(all_cases).items()}


def test_an_adapter_costs_at_most_a_tenth_of_the_launches_of_stock_decoding(counts: dict[str, Counter[str]]) -> None:
    assert counts["base"].total() <= counts["stock"].total()
    assert counts["base"]["bitsandbytes.gemm_4bit"] == 7
    assert counts["adapter"].total() <= counts["stock"].total() / 0.9, counts["adapter"]


def test_where_memory_allows_a_linear_and_its_adapter_are_one_product(counts: dict[str, Counter[str]]) -> None:
    held = counts["adapter, W + ΔW held"]
    assert held["aten.mm"] + held["aten.bmm"] == 7
    assert not held["bitsandbytes.gemm_4bit"]
    assert held.total() < counts["stock"].total() / 2
