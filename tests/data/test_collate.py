"""A batch is exact; with its common prefix computed once it has the losses and gradients of the padded batch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qvera.adapters import QveraConfig
from qvera.data import Example, collate, collate_prefix_once
from qvera.data.collate import Joined, common_prefix
from qvera.models import forward
from qvera.models.attention import CAUSAL, JOINABLE_TYPES, VARLEN
from qvera.models.loader import causal_model, takes_prefix_once
from qvera.models.loss import Head, fused_linear_cross_entropy
from tests.conftest import small_llama
from tests.families import FAMILIES


def example(ids: list[int], prompt: int) -> Example:
    trained = np.zeros(len(ids), dtype=bool)
    trained[prompt:] = True
    return Example(np.array(ids, dtype=np.int32), trained, "row", np.array([], dtype=np.int32), "", None)


@pytest.fixture
def rows() -> list[Example]:
    """Five rows that begin with the same 24 tokens and differ in everything after, lengths included."""
    chooser = np.random.default_rng(0)
    shared = chooser.integers(3, 300, 24).tolist()
    return [
        example(
            shared + chooser.integers(3, 300, 4 + i).tolist() + chooser.integers(3, 300, 3 + 2 * i).tolist(), 28 + i
        )
        for i in range(5)
    ]


def small(kind: str) -> Any:
    if kind == "llama":
        return small_llama()
    torch.manual_seed(0)
    family = next(family for family in FAMILIES.values() if family.model_type == kind)
    return AutoModelForCausalLM.from_config(family.config())


def test_collate_is_exact() -> None:
    batch = collate([example([5, 6, 7], 1), example([9, 2], 1)], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 2, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


# Each kind of model, and each kind of attention with some; the rest of the grid is slow.
_FAST = {("mistral", "eager"), ("qwen2", VARLEN), ("qwen3", "eager"), ("llama", VARLEN), ("mixtral", VARLEN)}
_FAST |= {(kind, "sdpa") for kind in JOINABLE_TYPES} - {(kind, "sdpa") for kind, _ in _FAST - {("llama", VARLEN)}}
_GRID = [*itertools.product(JOINABLE_TYPES, ("sdpa", "eager", VARLEN)), ("llama", CAUSAL)]
MODELS = pytest.mark.parametrize(
    ("kind", "attention"), [pytest.param(*pair, marks=() if pair in _FAST else pytest.mark.slow) for pair in _GRID]
)


@MODELS
def test_same_loss_and_gradients(rows: list[Example], kind: str, attention: str) -> None:
    from peft import get_peft_model

    base = small(kind)
    base.set_attn_implementation(attention)
    model = get_peft_model(base, QveraConfig(rank=8))
    generator = torch.Generator().manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    found = []
    for once in (False, True):
        batch = forward.make_batch(model, rows, 0, once)
        assert (batch["input_ids"].shape[0] == 1) == once
        nll, count = forward.batch_nll(model, batch, 512)
        found.append((nll, count, torch.autograd.grad(nll / count, parameters)))
    assert found[0][1] == found[1][1] == sum(r.trained_tokens for r in rows)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    for once_grad, padded_grad in zip(found[1][2], found[0][2], strict=True):
        torch.testing.assert_close(once_grad, padded_grad, rtol=1e-3, atol=1e-6)


@MODELS
def test_packed_rows_give_the_loss_of_each_alone_and_its_gradients(kind: str, attention: str) -> None:
    from peft import get_peft_model

    base = small(kind)
    base.set_attn_implementation(attention)
    model = get_peft_model(base, QveraConfig(rank=8))
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    chooser = np.random.default_rng(1)
    rows = [example(chooser.integers(3, 300, n).tolist(), n // 2) for n in (31, 7, 19, 4)]
    batch = forward.make_batch(model, rows, 0, packing=True)
    assert batch["input_ids"].shape == (1, sum(len(r.input_ids) for r in rows))
    hidden = forward.hidden_states(model, batch)
    nll, count = forward.batch_nll(model, batch, 512)
    packed = torch.autograd.grad(nll, parameters)
    alone = [torch.zeros_like(p) for p in parameters]
    start, losses = 0, []
    for row in rows:
        one = forward.make_batch(model, [row], 0)
        end = start + len(row.input_ids)
        torch.testing.assert_close(hidden[0, start:end], forward.hidden_states(model, one)[0], rtol=1e-4, atol=1e-5)
        own, _ = forward.batch_nll(model, one, 512)
        within, _ = fused_linear_cross_entropy(
            hidden[:, start:end], batch["labels"][:, start:end], Head.of(causal_model(model)), 512
        )
        torch.testing.assert_close(within, own, rtol=1e-5, atol=0)
        losses.append(own)
        for total, gradient in zip(alone, torch.autograd.grad(own, parameters), strict=True):
            total += gradient
        start = end
    assert count == sum(r.trained_tokens for r in rows)
    torch.testing.assert_close(nll, torch.stack(losses).sum(), rtol=1e-5, atol=0)
    for together, apart in zip(packed, alone, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-5)


def test_flash_attn_takes_whole_rows_and_where_each_ends(rows: list[Example]) -> None:
    batch = collate_prefix_once(rows, packing=True, joined=Joined.ROWS)
    assert batch is not None
    assert "attention_mask" not in batch
    assert batch["input_ids"][0].tolist() == [token for r in rows for token in r.input_ids.tolist()]
    assert batch["position_ids"][0].tolist() == [i for r in rows for i in range(len(r.input_ids))]
    ends = np.cumsum([0, *(len(r.input_ids) for r in rows)]).tolist()
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == ends
    assert batch["max_length_q"] == batch["max_length_k"] == max(len(r.input_ids) for r in rows)
    assert batch["cu_seq_lens_q"].dtype == torch.int32


def test_each_row_has_the_prefix_s_keys_in_front_of_its_own() -> None:
    rows = [example([1, 2, 3, 4, 5], 3), example([1, 2, 9], 2), example([1, 2, 6, 7], 3)]
    batch = collate_prefix_once(rows, packing=True, joined=Joined.OFFSETS)
    assert batch is not None
    assert batch["prefix_length"] == 1
    ids = batch["input_ids"][0]
    assert ids.tolist() == [1, 2, 3, 4, 5, 2, 9, 2, 6, 7]
    assert ids[batch["key_index"]].tolist() == [1, 1, 2, 3, 4, 5, 1, 2, 9, 1, 2, 6, 7]
    assert batch["cu_seq_lens_q"].tolist() == [0, 1, 5, 7, 10]
    assert batch["cu_seq_lens_k"].tolist() == [0, 1, 6, 9, 13]
    assert (batch["max_length_q"], batch["max_length_k"]) == (4, 5)
    assert batch["key_order"].tolist() == [0, 1, 6, 9, 2, 3, 4, 5, 7, 8, 10, 11, 12]


def test_packed_one_token_rows_and_rows_trained_from_the_start_count_what_padded_ones_do() -> None:
    rows = [example([5], 0), example([7, 8, 9], 0), example([4], 0), example([6, 3], 1)]
    for implementation in ("sdpa", VARLEN):
        model = small_llama(attn_implementation=implementation)
        packed, padded = (forward.make_batch(model, rows, 0, packing=packing) for packing in (True, False))
        assert packed["input_ids"].shape == (1, 7)
        nll, count = forward.batch_nll(model, packed, 8)
        wanted, wanted_count = forward.batch_nll(model, padded, 8)
        assert count == wanted_count == 3
        torch.testing.assert_close(nll, wanted, rtol=1e-5, atol=0)


def test_rows_do_not_see_each_other(rows: list[Example]) -> None:
    model = small("llama")
    before = forward.hidden_states(model, forward.make_batch(model, rows, 0))
    ids = rows[0].input_ids.copy()
    ids[-1] = 299 if ids[-1] != 299 else 298
    changed = [example(ids.tolist(), int(np.argmax(rows[0].trained))), *rows[1:]]
    after = forward.hidden_states(model, forward.make_batch(model, changed, 0))
    end = len(rows[0].input_ids)
    assert not torch.equal(before[0, end - 1], after[0, end - 1])
    torch.testing.assert_close(before[0, end:], after[0, end:], rtol=0, atol=0)


def test_the_prefix_ends_before_the_first_trained_token_and_the_one_before_it() -> None:
    same = list(range(3, 23))
    assert common_prefix([example(same, 12), example(same, 15)]) == 11
    assert common_prefix([example([1, 2, 3, 4, 5], 4), example([1, 2, 9, 4, 5], 4)]) == 2
    assert common_prefix([example([1, 2, 3], 1), example([1, 2, 3], 1)]) == 0


def test_not_used_where_it_does_not_pay(rows: list[Example]) -> None:
    assert collate_prefix_once(rows[:1]) is None
    different = [example([i + 3, *range(3, 40)], 20) for i in range(4)]
    assert collate_prefix_once(different) is None
    once = collate_prefix_once(rows)
    assert once is not None
    assert once["input_ids"].shape[1] == 24 + sum(len(r.input_ids) - 24 for r in rows)
    assert collate(rows, 0)["input_ids"].numel() > once["input_ids"].numel()


def test_a_sliding_window_is_left_alone(rows: list[Example]) -> None:
    model = small("mistral")
    assert takes_prefix_once(model)
    model.config.sliding_window = 8
    assert not takes_prefix_once(model)
