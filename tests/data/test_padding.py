"""Rounded batch lengths: the same losses and gradients in fewer shapes, and memory that stops growing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvera.config.schema import parse_recipe
from qvera.data import Example, batches_of, collate, collate_prefix_once
from qvera.data.collate import LENGTHS_PER_OCTAVE, pad_batch, round_up_length, rounds_lengths
from qvera.models import forward
from qvera.models.attention import VARLEN, open_mask
from qvera.models.loss import Head, fused_linear_cross_entropy
from qvera.training.plan.longest import token_counts
from qvera.utils import memory
from tests.conftest import small_llama

BF16 = torch.bfloat16


def rows_of(*lengths: int, prefix: int = 0) -> list[Example]:
    """Rows of these lengths whose last two thirds are trained; ``prefix`` tokens are the same in all."""
    draw = np.random.default_rng(0)
    found = []
    for length in lengths:
        ids = draw.integers(3, 300, length).astype(np.int32)
        ids[:prefix] = np.arange(3, 3 + prefix)
        trained = np.arange(length) >= max(prefix + 1, length // 3)
        found.append(Example(ids, trained, "a test", np.array([], np.int32), "", None))
    return found


def test_eight_lengths_an_octave() -> None:
    lengths = [round_up_length(n) for n in range(1, 4097)]
    assert all(n <= found <= n * (1 + 1 / LENGTHS_PER_OCTAVE) for n, found in enumerate(lengths, start=1))
    assert lengths == sorted(lengths)
    assert all(round_up_length(n) == n for n in lengths)
    for octave in (16, 64, 1024, 2048):
        assert len({n for n in lengths if octave <= n < 2 * octave}) == LENGTHS_PER_OCTAVE


def test_only_16_bit_products_on_a_cpu() -> None:
    cases = [(BF16, "cpu"), (torch.float16, "cpu"), (torch.float32, "cpu"), (BF16, "cuda")]
    assert [rounds_lengths(*case) for case in cases] == [True, True, False, False]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["padded", "equal", "one row", "joined"])
def test_a_padded_batch_has_the_losses_and_gradients_of_the_batch(attention: str, kind: str) -> None:
    model = small_llama(attn_implementation=attention)
    rows = rows_of(
        *{"padded": (11, 19, 7), "equal": (13, 13), "one row": (17,), "joined": (21, 25, 23)}[kind], prefix=5
    )
    batch = collate_prefix_once(rows, packing=True) if kind == "joined" else collate(rows, 2)
    assert batch is not None
    longer = pad_batch(batch, batch["input_ids"].shape[1] + 6, 2)
    for one in (batch, longer):
        if one["attention_mask"].dim() == 4:
            sees = one["attention_mask"]
            one["attention_mask"] = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    assert longer["labels"].shape[1] == batch["labels"].shape[1] + 6
    assert pad_batch(batch, batch["labels"].shape[1], 2) is batch
    found = []
    for one in (batch, longer):
        model.zero_grad()
        nll, count = forward.batch_nll(model, one, 8)
        nll.backward()
        found.append((nll.detach(), count, [p.grad.clone() for p in model.get_decoder().layers.parameters()]))
    (nll, count, gradients), (other_nll, other_count, other_gradients) = found
    assert count == other_count == sum(row.trained_tokens for row in rows)
    torch.testing.assert_close(other_nll, nll, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(other_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "softcap"), [(1, None), (7, 5.0), (16, None), (17, 5.0), (17, None), (23, None), (40, 5.0)]
)
def test_rows_added_to_the_last_chunk_change_no_loss_and_no_gradient(tokens: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(24, 50, bias=False, dtype=BF16).requires_grad_(False)
    hidden = torch.randn(1, tokens + 1, 24, dtype=BF16, requires_grad=True)
    labels = torch.randint(0, 50, (1, tokens + 1))
    nll, count = fused_linear_cross_entropy(hidden, labels, Head(head, softcap, 1.5), 20)
    nll.backward()
    plain = hidden.detach().float().requires_grad_()
    logits = plain[0, :-1] @ head.weight.float().t() * 1.5
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    wanted = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    wanted.backward()
    assert count == tokens
    torch.testing.assert_close(nll.detach(), wanted.detach(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(hidden.grad.float(), plain.grad, rtol=3e-2, atol=2e-2)


def test_lengths_are_rounded_up_in_16_bits_and_never_beyond_the_positions_there_are() -> None:
    rows = rows_of(33, 20)
    lengths = {}
    for dtype, positions in ((torch.float32, 512), (BF16, 512), (BF16, 34)):
        model = small_llama(max_position_embeddings=positions).to(dtype)
        lengths[dtype, positions] = forward.make_batch(model, rows, 2, False)["input_ids"].shape[1]
    assert lengths == {(torch.float32, 512): 33, (BF16, 512): 36, (BF16, 34): 34}
    packed = forward.make_batch(small_llama().to(BF16), rows, 2, packing=True)
    assert packed["input_ids"].shape[1] == 56
    assert packed["attention_mask"].shape == (1, 1, 56, 56)


def test_whole_rows_of_one_sequence_have_the_losses_of_each_alone_and_what_fills_it_up_counts_nowhere() -> None:
    rows, weights = rows_of(21, 9, 17, prefix=5), torch.tensor([0.3, 1.0, 0.7])
    model = small_llama(attn_implementation=VARLEN)
    alone = [forward.batch_nll(model, forward.make_batch(model, [row], 2), 64)[0] for row in rows]
    (torch.stack(alone) * weights).sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(wanted) == 20
    for more in (0, 5):
        model.zero_grad()
        batch = forward.make_batch(model, rows, 2, whole_rows=True)
        batch = pad_batch(batch, 47 + more, 2)
        if more:
            batch["attention_mask"] = open_mask(batch["input_ids"])
        total, nll = forward.row_nll(model, batch, 64, weights)
        total.backward()
        assert forward.row_tokens(batch, rows) == [21, 9, 17 + more]
        torch.testing.assert_close(nll, torch.stack(alone).detach(), rtol=1e-5, atol=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)
    rounded = forward.make_batch(model.to(BF16), rows, 2, whole_rows=True)
    assert rounded["cu_seq_lens_q"].tolist() == [0, 21, 30, 47, 48]
    model.set_attn_implementation("sdpa")  # which has no offsets
    assert forward.make_batch(model.float(), rows, 2, whole_rows=True)["input_ids"].shape == (3, 21)


def test_ever_new_lengths_leave_no_memory_behind() -> None:
    if memory.allocated_bytes() is None:
        pytest.skip("malloc does not say what it holds (no glibc 2.33)")
    # A CPU without 16-bit products keeps next to nothing of a shape; there, Python's own objects set the bound.
    bound_bytes = max(memory.kernel_bytes(BF16), 64_000)
    model = small_llama().to(BF16)

    def step(length: int) -> int:
        batch = forward.make_batch(model, rows_of(length), 2)
        forward.batch_nll(model, batch, 64)[0].backward()
        model.zero_grad(set_to_none=True)
        held = memory.allocated_bytes()
        assert held is not None
        return held

    for length in (66, 72):
        step(length)
    before = step(65)
    assert max(step(length) for length in range(66, 73)) - before < bound_bytes


@pytest.mark.parametrize("packing", [False, True])
def test_the_plan_counts_the_token_counts_of_a_run(packing: bool) -> None:
    rows = rows_of(*range(10, 74))
    tree = {
        "model": "-",
        "data": {"path": "-", "packing": packing, "max_length": 128},
        "training": {"global_batch_size": 8, "per_device_train_batch_size": 4},
    }
    recipe = parse_recipe(tree, "a test")
    model = small_llama().to(BF16)
    batches = batches_of(recipe, rows)
    for steps in (3, 8, 20):
        met = set()
        for step in range(steps):
            for members in batches.passes(batches.rows(step)):
                batch = forward.make_batch(model, [rows[i] for i in members], 2, False, packing)
                met.add(tuple(batch["input_ids"].shape))
        assert token_counts(recipe, rows, steps, True) == len(met)
