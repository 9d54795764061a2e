"""A batch is exact; with its common prefix computed once, or packed, it has the losses and gradients of rows apart.

Lengths are rounded up without a change of losses and gradients, and memory stops growing. What is held of mapped rows
does not depend on their length.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from qvera.adapters import QveraConfig
from qvera.data import Batches, Example, Rows, collate, collate_prefix_once
from qvera.data.rows import (
    LENGTHS_PER_OCTAVE,
    SCHEMA,
    Joined,
    common_prefix,
    pad_batch,
    round_up_length,
    rounds_lengths,
    write_table,
)
from qvera.models import forward
from qvera.models.attention import CAUSAL, JOINABLE_TYPES, VARLEN, open_mask, rows_joined
from qvera.models.loss import Head
from qvera.utils import memory
from tests.conftest import small_llama
from tests.data.rows import rows_of
from tests.families import FAMILIES
from tests.helpers import start_process
from tests.models.helpers import summed_loss

BF16 = torch.bfloat16


def example(ids: list[int], prompt: int) -> Example:
    trained = np.arange(len(ids)) >= prompt
    return Example(np.array(ids, dtype=np.int32), trained, "row", np.array([], dtype=np.int32), "", None)


def rows_with_a_prefix() -> list[Example]:
    """Five rows that begin with the same 24 tokens and differ in everything after, lengths included."""
    return rows_of(31, 34, 37, 40, 43, prefix=24)


def small(kind: str) -> Any:
    if kind == "llama":
        return small_llama()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[kind].config())


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


@pytest.mark.parametrize(
    ("kind", "attention"), [pytest.param(*pair, marks=() if pair in _FAST else pytest.mark.slow) for pair in _GRID]
)
def test_rows_of_one_sequence_have_the_losses_and_gradients_of_rows_apart(kind: str, attention: str) -> None:
    base = small(kind)
    base.set_attn_implementation(attention)
    model = get_peft_model(base, QveraConfig(rank=8))
    generator = torch.Generator().manual_seed(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    for rows, packing in ((rows_with_a_prefix(), False), (rows_of(31, 7, 19, 4), True)):
        together = forward.make_batch(model, rows, 0, packing=packing)
        assert together["input_ids"].shape[0] == 1
        if packing:
            assert together["input_ids"].shape[1] == sum(len(r.input_ids) for r in rows)
        nll, count = forward.batch_nll(model, together, 512)
        apart = [forward.batch_nll(model, forward.make_batch(model, [row], 0), 512)[0] for row in rows]
        assert count == sum(r.trained_tokens for r in rows)
        torch.testing.assert_close(nll, sum(apart), rtol=1e-5, atol=0)
        wanted = torch.autograd.grad(sum(apart), parameters)
        for mine, theirs in zip(torch.autograd.grad(nll, parameters), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_flash_attn_takes_whole_rows_and_where_each_ends() -> None:
    rows = rows_with_a_prefix()
    batch = collate_prefix_once(rows, packing=True, joined=Joined.ROWS)
    assert batch is not None and "attention_mask" not in batch
    assert batch["input_ids"][0].tolist() == [token for r in rows for token in r.input_ids.tolist()]
    assert batch["position_ids"][0].tolist() == [i for r in rows for i in range(len(r.input_ids))]
    ends = np.cumsum([0, *(len(r.input_ids) for r in rows)]).tolist()
    assert batch["cu_seq_lens_q"].tolist() == ends and batch["cu_seq_lens_k"] is batch["cu_seq_lens_q"]
    assert batch["max_length_q"] == batch["max_length_k"] == max(len(r.input_ids) for r in rows)
    assert batch["cu_seq_lens_q"].dtype == torch.int32


def test_each_row_has_the_prefix_s_keys_in_front_of_its_own() -> None:
    rows = [example([1, 2, 3, 4, 5], 3), example([1, 2, 9], 2), example([1, 2, 6, 7], 3)]
    batch = collate_prefix_once(rows, packing=True, joined=Joined.OFFSETS)
    assert batch is not None and batch["prefix_length"] == 1
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


def test_the_prefix_ends_before_the_first_trained_token_and_the_one_before_it() -> None:
    same = list(range(3, 23))
    assert common_prefix([example(same, 12), example(same, 15)]) == 11
    assert common_prefix([example([1, 2, 3, 4, 5], 4), example([1, 2, 9, 4, 5], 4)]) == 2
    assert common_prefix([example([1, 2, 3], 1), example([1, 2, 3], 1)]) == 0


def test_the_prefix_is_computed_once_where_that_pays_and_no_window_slides() -> None:
    rows = rows_with_a_prefix()
    assert collate_prefix_once(rows[:1]) is None
    assert collate_prefix_once([example([i + 3, *range(3, 40)], 20) for i in range(4)]) is None  # all different
    once = collate_prefix_once(rows)
    assert once is not None
    assert once["input_ids"].shape[1] == 24 + sum(len(r.input_ids) - 24 for r in rows)
    assert collate(rows, 0)["input_ids"].numel() > once["input_ids"].numel()
    model = small("mistral")
    assert rows_joined(model, prefix_once=True, packing=False)
    model.config.sliding_window = 8
    assert not rows_joined(model, prefix_once=True, packing=False)


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


@pytest.mark.parametrize(
    ("attention", "kind"),
    [
        ("sdpa", "padded"),
        ("eager", "padded"),
        ("sdpa", "equal"),
        ("eager", "one row"),
        ("sdpa", "joined"),
        (VARLEN, "joined by offsets"),
    ],
)
def test_a_padded_batch_has_the_losses_and_gradients_of_the_batch(attention: str, kind: str) -> None:
    model = small_llama(attn_implementation=attention)
    lengths = {"padded": (11, 19, 7), "equal": (13, 13), "one row": (17,)}
    rows = rows_of(*lengths.get(kind, (21, 25, 23)), prefix=5)
    how = {"joined": Joined.MASK, "joined by offsets": Joined.OFFSETS}.get(kind)
    batch = collate_prefix_once(rows, packing=True, joined=how) if how else collate(rows, 2)
    assert batch is not None
    longer = pad_batch(batch, batch["input_ids"].shape[1] + 6, 2)
    assert longer["labels"].shape[1] == batch["labels"].shape[1] + 6
    assert pad_batch(batch, batch["labels"].shape[1], 2) is batch
    found = []
    for one in (batch, longer):
        if how is Joined.OFFSETS:
            one |= {"attention_mask": open_mask(VARLEN, one["input_ids"])}
        elif (sees := one["attention_mask"]).dim() == 4:
            one["attention_mask"] = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        model.zero_grad()
        nll, count = forward.batch_nll(model, one, 8)
        nll.backward()
        assert count == sum(row.trained_tokens for row in rows)
        found.append([nll.detach(), *(p.grad.clone() for p in model.get_decoder().layers.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "softcap"), [(1, None), (16, 5.0), (17, None), (23, None), (40, 5.0)])
def test_rows_added_to_the_last_chunk_change_no_loss_and_no_gradient(tokens: int, softcap: float | None) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(24, 50, bias=False, dtype=BF16).requires_grad_(False)
    hidden = torch.randn(1, tokens + 1, 24, dtype=BF16, requires_grad=True)
    labels = torch.randint(0, 50, (1, tokens + 1))
    nll, count = summed_loss(hidden, labels, Head(head, softcap, 1.5), 20)
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
    for dtype, positions, length in ((torch.float32, 512, 33), (BF16, 512, 36), (BF16, 34, 34)):
        model = small_llama(max_position_embeddings=positions).to(dtype)
        assert forward.make_batch(model, rows, 2, False)["input_ids"].shape[1] == length
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
        batch = pad_batch(forward.make_batch(model, rows, 2, whole_rows=True), 47 + more, 2)
        if more:
            batch["attention_mask"] = open_mask(VARLEN, batch["input_ids"])
        total, nll = forward.row_nll(model, batch, 64, weights)
        total.backward()
        assert forward.row_tokens(batch, rows) == [21, 9, 17 + more]
        torch.testing.assert_close(nll, torch.stack(alone).detach(), rtol=1e-5, atol=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)
    rounded = forward.make_batch(model.to(BF16), rows, 2, whole_rows=True)
    assert rounded["cu_seq_lens_q"].tolist() == [0, 21, 30, 47, 48]
    assert rounded["cu_seq_lens_k"] is rounded["cu_seq_lens_q"]
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


def mapped_rows(count: int, tokens: int = 200) -> pa.RecordBatch:
    """Rows that need no tokenizer: their number, more tokens, some of them trained, a prompt, a source."""
    numbers = np.arange(count)
    ids = np.arange(count * tokens, dtype=np.int32).reshape(count, tokens) % 50_000
    ids[:, 0] = numbers
    offsets = pa.array(np.arange(count + 1, dtype=np.int32) * tokens)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(v.ravel())) for v in (ids, (ids % 2).astype(np.uint8), ids)]
    text, trained = pa.array([f"rows.jsonl:{i}" for i in numbers]), pa.array((ids % 2).sum(1).astype(np.int32))
    columns = [*lists, *[text] * 3, trained, *[pa.array(numbers.astype(np.uint64))] * 2]
    columns += [pa.nulls(count, field.type) for field in list(SCHEMA)[len(columns) :]]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def train_on_mapped_rows(file: Path, count: int) -> None:
    """An epoch over mapped rows, in a process whose private memory is this and nothing else; writes its bytes."""

    def private_bytes() -> int:
        return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    before = private_bytes()
    rows = Rows.open(file)
    batches = Batches(rows.lengths, 64, 8, seed=1)
    seen, highest = np.zeros(count, dtype=np.uint8), 0
    for step in range(batches.per_epoch):
        for part in batches.passes(batches.rows(step)):
            batch = collate([rows[i] for i in part], 0)
            assert batch["input_ids"][:, 0].tolist() == part  # each row is the one that was asked for
            seen[part] += 1
        highest = max(highest, private_bytes() - before) if step % 32 == 0 else highest
    assert (seen == 1).all()
    before = private_bytes()
    copies = [(row.input_ids.copy(), row.trained.copy(), row.prompt_ids.copy()) for row in rows]
    file.with_suffix(".json").write_text(json.dumps([highest, private_bytes() - before, len(copies)]))


@pytest.mark.process
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    found = {}
    for count in (2_000, 12_000):
        file = tmp_path / f"{count}.arrow"
        write_table(iter([mapped_rows(count)]), file)
        process = start_process(train_on_mapped_rows, file, count)
        process.join(120)
        assert process.exitcode == 0
        found[count] = json.loads(file.with_suffix(".json").read_text())
    # A row's length, counts and hashes take 24 bytes; an epoch's order takes 8, and some more while it is drawn.
    assert found[12_000][0] - found[2_000][0] < 200 * 10_000
    # As arrays of their own the same rows would be too much for that: the measure can fail.
    assert found[12_000][1] > 1_000 * 12_000
