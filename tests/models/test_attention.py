"""Attention without masks has the losses and gradients of attention with them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from qvera.models import attention, forward
from qvera.models.attention import CAUSAL, VARLEN, attend_in_groups, implementation_on, needs_padding_mask
from qvera.models.checkpointing import enable_checkpointing
from tests.adapters.helpers import relative
from tests.data.rows import rows_of

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 304, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
OTHER_NAMES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def model_of(kind: str, implementation: str | None, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **OTHER_NAMES.get(kind, {}), **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32).train()


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    nll, _ = forward.batch_nll(model, batch, 64)
    nll.backward()
    return {"loss": nll.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **tolerance: float) -> None:
    """To the bit, unless a tolerance says otherwise."""
    torch.testing.assert_close(found, wanted, **(tolerance or {"rtol": 0, "atol": 0}))


CASES: list[tuple[str, str | None, int | None]] = [(kind, None, None) for kind in attention._CAUSAL_TYPES]
CASES += [("mistral", None, 8), ("gemma3_text", None, 8), ("gemma2", "eager", None), ("gpt2", "eager", None)]


@pytest.mark.parametrize(("kind", "implementation", "window"), CASES)
def test_right_padding_needs_no_mask(kind: str, implementation: str | None, window: int | None) -> None:
    model = model_of(kind, implementation, **({} if window is None else {"sliding_window": window}))
    rows = rows_of(31, 7, 19, 2)
    batch = forward.make_batch(model, rows, 0, prefix_once=False)
    assert "attention_mask" not in batch
    mask = torch.tensor([[column < len(row.input_ids) for column in range(31)] for row in rows])
    assert_equal(loss_and_gradients(model, batch), loss_and_gradients(model, {**batch, "attention_mask": mask}))


def test_repeated_keys_give_what_grouped_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card without flash attention for the dtype."""
    model, rows = model_of("llama", CAUSAL), rows_of(31, 7, 19, 2)
    batch = forward.make_batch(model, rows, 0, prefix_once=False)
    grouped = loss_and_gradients(model, batch)
    monkeypatch.setattr(attention, "_lacks_grouped_kernel", lambda q, k: q.shape[1] > k.shape[1])
    assert_equal(loss_and_gradients(model, batch), grouped, rtol=1e-4, atol=1e-5)


def test_a_model_that_sees_later_tokens_keeps_its_mask() -> None:
    model = model_of("gemma3_text", "sdpa", use_bidirectional_attention=True)
    rows = rows_of(31, 7, 19)
    batch = forward.make_batch(model, rows, 0)
    assert batch["attention_mask"].sum() == 31 + 7 + 19
    loss = loss_and_gradients(model, batch)["loss"]
    del batch["attention_mask"]
    assert abs(loss - loss_and_gradients(model, batch)["loss"]) > 1e-2


LENGTHS = (5, 1, 140, 33, 48, 7, 6)  # two are padded to one length, one is beyond what goes to fp32
ENDS = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
BEHIND = (0, 9, 9, 0, 9, 9, 9)  # the keys before each row's own, where some rows have a prefix
ENDS_BEHIND = torch.tensor([0, *itertools.accumulate(map(sum, zip(LENGTHS, BEHIND, strict=True)))], dtype=torch.int32)


def joined_rows(dtype: torch.dtype, ends_k: torch.Tensor = ENDS) -> list[torch.Tensor]:
    """Queries, keys and values of rows one behind the other; two heads share one key."""
    generator, sizes = torch.Generator().manual_seed(0), ((sum(LENGTHS), 4), (int(ends_k[-1]), 2), (int(ends_k[-1]), 2))
    return [torch.randn(*size, 16, generator=generator).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 6e-3), (torch.float16, 8e-4)],
)
@pytest.mark.parametrize("ends_k", [ENDS, ENDS_BEHIND], ids=["whole rows", "rows behind a prefix"])
def test_rows_in_groups_of_like_length_attend_as_row_by_row(
    dtype: torch.dtype, tolerance: float, ends_k: torch.Tensor
) -> None:
    inputs = joined_rows(dtype, ends_k)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = inputs
    found, alone = attend_in_groups(q, k, v, ENDS, ends_k, 0.2), []
    rows = [itertools.starmap(slice, itertools.pairwise(ends.tolist())) for ends in (ENDS, ends_k)]
    for row_q, row_k in zip(*rows, strict=True):
        q, k, v = (x[row].transpose(0, 1) for x, row in zip(exact, (row_q, row_k, row_k), strict=True))
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        alone.append(F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=0.2, enable_gqa=True))
    wanted = torch.cat(alone, 1).transpose(0, 1)
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = found, *torch.autograd.grad(found, inputs, g)
    theirs = wanted, *torch.autograd.grad(wanted, exact, g.double())
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype and relative(one, other) < tolerance


def test_a_joined_row_that_is_not_finite_leaves_the_others_as_they_are_to_the_bit() -> None:
    results, others = [], torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[ENDS[4] : ENDS[5]] = False  # in a group with another row
    for value in (None, math.nan, math.inf):
        inputs = q, k, v = joined_rows(torch.float32)
        if value is not None:
            for x in inputs:
                x.data[~others] = value
        out = attend_in_groups(q, k, v, ENDS, ENDS, 0.2)
        assert bool(out[~others].isfinite().all()) == (value is None)
        results.append([x[others] for x in (out, *torch.autograd.grad(out.square().sum(), inputs))])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_rows_that_were_scored_in_inference_mode_can_be_trained_on() -> None:
    q, k, v = joined_rows(torch.float32, ENDS_BEHIND)
    attention.groups_of.cache_clear()
    attention._behind_prefix.cache_clear()
    with torch.inference_mode():
        scored = attend_in_groups(q, k, v, ENDS, ENDS_BEHIND, 0.2)
    out = attend_in_groups(q, k, v, ENDS, ENDS_BEHIND, 0.2)
    assert torch.equal(out, scored)
    out.sum().backward()


class OwnModel(LlamaForCausalLM):
    """As a checkpoint's own code would define it."""


def test_unknown_models_keep_their_mask() -> None:
    model = model_of("llama", "sdpa")
    assert not needs_padding_mask(model)
    assert needs_padding_mask(OwnModel(model.config))
    model.config.model_type = "mixtral"
    assert needs_padding_mask(model)


@pytest.mark.parametrize("prefix", [0, 8])
def test_offsets_go_through_a_checkpoint(prefix: int) -> None:
    rows, found = rows_of(31, 17, 12, prefix=prefix), []
    for checkpointing in (False, True):
        model = model_of("llama", VARLEN)
        if checkpointing:
            enable_checkpointing(model)
            model.enable_input_require_grads()
        batch = forward.make_batch(model, rows, 0, packing=True)
        assert batch.get("prefix_length", 0) == prefix
        found.append(loss_and_gradients(model, batch))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("implementation", [CAUSAL, VARLEN])
def test_padded_batches_and_masks_are_taken_as_sdpa_takes_them(implementation: str, tmp_path: Path) -> None:
    model, rows = model_of("llama", "sdpa"), rows_of(31, 17, 9)
    ids = torch.randint(3, 300, (2, 9))
    left = torch.ones_like(ids)
    left[0, :4] = 0
    wanted = loss_and_gradients(model, forward.make_batch(model, rows, 0, prefix_once=False))
    answers = model.eval().generate(ids, attention_mask=left, max_new_tokens=4, do_sample=False)
    model.train().set_attn_implementation(implementation)
    batch = forward.make_batch(model, rows, 0, prefix_once=False)
    assert batch["attention_mask"].stride() == (0, 0)
    assert_equal(loss_and_gradients(model, batch), wanted)
    found = model.eval().generate(ids, attention_mask=left, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, answers)
    model.save_pretrained(tmp_path)
    assert implementation not in (tmp_path / "config.json").read_text()


def test_which_implementation_stands_in_for_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    card, half = torch.device("cuda", 0), torch.bfloat16
    config = model_of("llama", "sdpa").config
    assert implementation_on(torch.device("cpu"), config, half) == VARLEN
    assert implementation_on(None, config, torch.float32) == CAUSAL
    monkeypatch.setattr(attention, "varlen_kernel", lambda: None)
    assert implementation_on(None, config, half) == CAUSAL
    monkeypatch.setattr(attention, "varlen_kernel", lambda: attention.varlen_attention)
    assert implementation_on(None, config, half) == VARLEN
    for works, name in ((False, CAUSAL), (True, VARLEN)):
        monkeypatch.setattr(attention, "varlen_runs", lambda *_, works=works: works)
        assert implementation_on(card, config, half) == name
    config.attention_dropout = 0.1
    assert implementation_on(torch.device("cpu"), config, half) == implementation_on(card, config, half) == CAUSAL
    config.sliding_window = 8
    assert implementation_on(torch.device("cpu"), config, half) == implementation_on(card, config, half) == "sdpa"


class _Flash(torch.autograd.Function):
    """Attention of one row as a flash kernel rounds: products in fp32, and P and ∂S in 16 bits for the next product."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor, scale: float
    ) -> torch.Tensor:
        S = (q.float() @ k.float().transpose(1, 2) * scale).masked_fill(~sees, -math.inf)
        P = S.softmax(-1)
        ctx.save_for_backward(q, k, v, P)
        ctx.scale = scale
        return (P.to(q.dtype).float() @ v.float()).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, P = ctx.saved_tensors
        out = (P.to(q.dtype).float() @ v.float()).to(q.dtype)
        dP = g.float() @ v.float().transpose(1, 2)
        dS = (P * (dP - (g.float() * out.float()).sum(-1, keepdim=True))).to(q.dtype).float()
        dq, dk = dS @ k.float() * ctx.scale, dS.transpose(1, 2) @ q.float() * ctx.scale
        dv = P.to(q.dtype).float().transpose(1, 2) @ g.float()
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None


def _kernel(rounds: bool, wrong: str = "") -> Any:
    """A variable-length kernel in 16 bits, exact but for its output, or rounding as a flash kernel; perhaps wrong."""

    def kernel(
        q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any, longest_q: int, longest_k: int, scale: float
    ) -> torch.Tensor:
        if q.dtype == torch.float32:
            return plain_kernel(q, k, v, ends_q, ends_k, longest_q, longest_k, scale)
        if wrong == "a row's end is off by one":
            ends_k = ends_k - torch.tensor([0, 1, 0, 0], dtype=torch.int32)
        parts = []
        for i in range(3):
            of_q, of_k = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
            own = [x.transpose(0, 1) for x in (q[of_q], k[of_k], v[of_k])]
            own[1:] = [x.expand(own[0].shape[0], -1, -1) for x in own[1:]]
            length, keys = own[0].shape[1], own[1].shape[1]
            sees = torch.ones(length, keys, dtype=torch.bool)
            sees = sees if wrong == "not causal" else sees.tril(keys - length)
            if rounds:
                part = _Flash.apply(*own, sees, scale)
            else:
                a, b, c = (x.float() for x in own)
                part = F.scaled_dot_product_attention(a, b, c, attn_mask=sees, scale=scale).to(q.dtype)
            parts.append(part)
        if wrong == "two rows are swapped":
            parts[1:] = [parts[2][:, : parts[1].shape[1]], torch.cat([parts[1], parts[2][:, parts[1].shape[1] :]], 1)]
        return torch.cat(parts, 1).transpose(0, 1)

    plain_kernel = attention.varlen_attention
    return kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounds", [False, True], ids=["exact", "as flash"])
def test_a_right_kernel_is_taken_in_every_shape_and_a_wrong_one_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: torch.dtype, rounds: bool
) -> None:
    cpu, right = torch.device("cpu"), attention.varlen_attention
    for wrong in ("", "a row's end is off by one", "two rows are swapped", "not causal"):
        monkeypatch.setattr(attention, "varlen_attention", right)
        monkeypatch.setattr(attention, "varlen_attention", _kernel(rounds, wrong))
        for groups in (1, 3, 4, 7, 8):
            attention.varlen_runs.cache_clear()
            assert attention.varlen_runs(cpu, dtype, groups, 128) == (not wrong), (groups, wrong)
        assert ("is off by" in caplog.text) == bool(wrong)


def test_flash_attn_gets_offsets_for_packed_rows_and_for_a_single_row() -> None:
    """Without them transformers looks for packed rows in every layer, which makes the host wait."""
    model = model_of("llama", "sdpa")
    model.config._attn_implementation_internal = "flash_attention_2"  # flash-attn is not installed here
    rows = rows_of(31, 17, 12, prefix=8)
    packed = forward.make_batch(model, rows, 0, packing=True)
    assert packed["cu_seq_lens_q"].tolist() == [0, 31, 48, 60]
    single = forward.make_batch(model, rows[:1], 0)
    assert single["cu_seq_lens_k"].tolist() == [0, 31]
    padded = forward.make_batch(model, rows, 0)
    assert padded["input_ids"].shape == (3, 31)
    assert all("key_index" not in batch and "attention_mask" not in batch for batch in (packed, single, padded))
