"""Adapters that are trained together: each gets the gradients and the steps that it would get alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from peft import PeftModel

from qvera.adapters.bank import AdapterBank, MixedForward
from qvera.adapters.save_load import attach, named_vectors
from qvera.config.sections import AdapterSection
from qvera.data import Example
from qvera.models.attention import VARLEN
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.forward import batch_nll, make_batch, row_nll, row_tokens
from qvera.models.structure import causal_model
from qvera.training import optim
from qvera.training.optim import AdamSettings, BankAdamW
from tests.conftest import small_llama

LENGTHS = (7, 4, 9, 1, 5)
SLOTS = (2, 0, 2, 1, 0)


def _rows() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(3, 60, (length + 2,), generator=generator, dtype=torch.int32).numpy()
        trained = (torch.arange(length + 2) > 1).numpy()
        rows.append(Example(ids, trained, f"row {i}", ids[:0], "", None))
    return rows


@contextlib.contextmanager
def _pass(model: PeftModel, bank: AdapterBank, slots: Sequence[int], joined: bool) -> Iterator[dict[str, Any]]:
    """The rows as a batch, padded or as one sequence, within the bank's context."""
    causal_model(model).set_attn_implementation(VARLEN if joined else "sdpa")
    batch = make_batch(model, _rows(), 0, whole_rows=True, prefix_once=False)
    assert len(batch["input_ids"]) == (1 if joined else len(LENGTHS))
    with bank.rows(slots, row_tokens(batch, _rows())):
        yield batch


def _model(**settings: object) -> PeftModel:
    section = AdapterSection.model_validate({"rank": 6, "targets": "all-linear", **settings})
    return attach(small_llama(), section)


def _vectors(model: PeftModel, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in named_vectors(model).items()}


@pytest.mark.parametrize(
    ("settings", "checkpointing", "joined"),
    [({}, False, True), ({}, True, False), ({"train_d": False}, False, False), ({"train_d": False}, True, True),
     ({"b_groups": 2, "input_scale": True}, False, False), ({"b_groups": 2, "input_scale": True}, True, True),
     ({"method": "lora", "rank": 3, "alpha": 5}, False, True), ({"method": "lora", "rank": 1}, True, False)],
    ids=str,
)  # fmt: skip
def test_each_adapter_gets_its_own_gradient(settings: dict[str, object], checkpointing: bool, joined: bool) -> None:
    """As if the rows of the other adapters were not there."""
    model = _model(**settings)
    vectors = [_vectors(model, seed) for seed in range(3)]
    rows = _rows()
    alone: list[dict[str, torch.Tensor]] = []
    losses = torch.zeros(len(rows))
    trained = {k for k, v in named_vectors(model).items() if v.requires_grad}
    for slot in range(3):
        for key, vector in named_vectors(model).items():
            vector.data.copy_(vectors[slot][key])
        mine = [i for i, s in enumerate(SLOTS) if s == slot]
        model.zero_grad()
        nll, tokens = batch_nll(model, make_batch(model, [rows[i] for i in mine], 0, prefix_once=False), 4)
        (nll / tokens).backward()
        alone.append({k: v.grad.clone() for k, v in named_vectors(model).items() if v.grad is not None})
        for i in mine:
            losses[i] = batch_nll(model, make_batch(model, [rows[i]], 0), 4)[0].detach()
    bank = AdapterBank(model, 5)
    places = (1, 2, 3) if joined else (0, 2, 4)  # neighbours, which are a view, and others, which are copied
    for place, own in zip(places, vectors, strict=True):
        bank.put(place, own)
    enable_checkpointing(model, checkpointing)
    model.train()
    counts = [sum(LENGTHS[i] for i, s in enumerate(SLOTS) if s == slot) for slot in range(3)]
    weights = torch.tensor([1 / counts[slot] for slot in SLOTS])
    with _pass(model, bank, [places[slot] for slot in SLOTS], joined) as batch:
        total, nll_of_rows = row_nll(model, batch, 4, weights)
        total.backward()
    torch.testing.assert_close(nll_of_rows, losses, rtol=1e-5, atol=1e-5)
    assert bank.trained_numbers == sum(vectors[0][key].numel() for key in trained)
    assert not bank.gradients[[place for place in range(5) if place not in places]].any()
    for slot in range(3):
        row = bank.gradients[places[slot]]
        for key in trained:
            found, expected = bank.layout.columns[key].of(row), alone[slot][key]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=4e-6 * max(1.0, expected.abs().max().item()))


def test_a_pass_of_one_adapter_goes_the_way_of_an_adapter_alone() -> None:
    model = _model()
    vectors = _vectors(model, 1)
    rows = _rows()
    ordinary = named_vectors(model)
    for key, vector in ordinary.items():
        vector.data.copy_(vectors[key])
    nll, tokens = batch_nll(model, make_batch(model, rows, 0, prefix_once=False), 4)
    (nll / tokens).backward()
    expected = {key: vector.grad.clone() for key, vector in ordinary.items() if vector.grad is not None}
    model.zero_grad()
    bank = AdapterBank(model, 2)
    bank.put(1, vectors)
    weights = torch.full((len(rows),), 1 / tokens)
    for times in (1, 2):  # gradients are added up
        with _pass(model, bank, [1] * len(rows), joined=times > 1) as batch:
            total, _ = row_nll(model, batch, 4, weights)
            total.backward()
        for key, columns in bank.layout.columns.items():
            found = columns.of(bank.gradients[1])
            torch.testing.assert_close(found, times * expected[key], rtol=1e-5, atol=1e-7)
    assert not bank.gradients[0].any()
    assert all(not v.requires_grad and v.grad is None for v in named_vectors(model).values())


@pytest.mark.parametrize("places", [(1, 2, 3), (1, 4, 3), (1, 9, 5)], ids=["neighbours", "a gap", "far apart"])
def test_rows_of_loras_in_any_slots_are_answered_as_each_alone(places: tuple[int, ...]) -> None:
    model = _model(method="lora", rank=4).requires_grad_(False).eval()
    vectors = [_vectors(model, seed) for seed in range(3)]
    bank, mixed = AdapterBank(model, 10), MixedForward(torch.device("cpu"))
    for place, own in zip(places, vectors, strict=True):
        bank.put(place, own)
    ids = torch.randint(3, 60, (5, 6), generator=torch.Generator().manual_seed(0))
    users: list[tuple[AdapterBank, int] | None] = [(bank, places[i]) for i in (2, 0, 1, 0)]
    users.append(None)

    @torch.no_grad()
    def logits(rows: slice) -> torch.Tensor:
        mixed.use(users[rows])
        with mixed.installed(bank.layers):
            return model(input_ids=ids[rows]).logits

    together = logits(slice(5))
    for row in range(5):
        torch.testing.assert_close(together[row], logits(slice(row, row + 1))[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[4], logits(slice(0, 1))[0], atol=1e-2)


@pytest.mark.parametrize("joined", [False, True])
def test_an_adapter_that_is_not_finite_leaves_the_others_as_they_are(joined: bool) -> None:
    model = _model()
    vectors = [_vectors(model, seed) for seed in range(3)]
    bank = AdapterBank(model, 3)
    weights = torch.full((len(SLOTS),), 0.1)
    found = []
    for broken in (False, True):
        for slot in range(3):
            bank.put(slot, vectors[slot])
        if broken:
            bank.put(2, {k: torch.full_like(v, math.nan) for k, v in vectors[2].items()})
        with _pass(model, bank, SLOTS, joined) as batch:
            total, nll = row_nll(model, batch, 4, weights)
            total.backward()
        found.append((nll.clone(), bank.gradients.clone()))
    (whole, gradients), (broken_nll, broken_gradients) = found
    assert broken_nll[[0, 2]].isnan().all() and torch.equal(broken_nll[[1, 3, 4]], whole[[1, 3, 4]])
    assert torch.equal(broken_gradients[:2], gradients[:2])


def test_the_optimizer_of_a_bank_is_torchs_adamw_for_each_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters begin at different steps, have settings of their own at each, and one of them is broken once.

    In a step memory runs out for large blocks, which leaves nothing half stepped.
    """
    model = _model()
    bank = AdapterBank(model, 3)
    optimizer = BankAdamW(bank)
    alone = [torch.nn.Parameter(bank.initial.clone()) for _ in range(3)]
    others = [torch.optim.AdamW([v]) for v in alone]
    of_slots = [(0.9, 0.999, 1e-8, 0.03, 0.5), (0.8, 0.95, 1e-12, 0.0, 0.0), (0.0, 0.99, 1e-3, 0.2, 1e-3)]
    generator = torch.Generator().manual_seed(3)
    real, failed = BankAdamW._step_block, list[int]()

    def short(self: BankAdamW, rows: torch.Tensor, block: slice, each: torch.Tensor) -> None:
        if optimizer.steps[2] == 2 and (block.start == 0 or block.stop - block.start > 100):
            failed.append(block.start)
            if len(failed) < 3:
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        real(self, rows, block, each)

    monkeypatch.setattr(BankAdamW, "_step_block", short)
    monkeypatch.setattr(optim, "_LEAST_NUMBERS", 8)
    monkeypatch.setattr(optim, "_BLOCK_NUMBERS", 3 * 256)
    for step in range(6):
        slots = [slot for slot in (2, 0, 1) if step >= slot]
        settings = [AdamSettings(0.01 * (1 + slot + step), *of_slots[slot]) for slot in slots]
        for slot, own in zip(slots, settings, strict=True):
            gradient = torch.randn(bank.numbers, generator=generator) * (1e-9 if slot == 1 else 1.0)
            bank.gradients[slot] = gradient
            if (step, slot) == (3, 1):
                bank.gradients[slot, 5] = math.nan
                continue
            alone[slot].grad = gradient.clone()
            if own.max_norm:
                torch.nn.utils.clip_grad_norm_([alone[slot]], own.max_norm)
            about = {"lr": own.learning_rate, "betas": (own.beta1, own.beta2), "eps": own.epsilon}
            others[slot].param_groups[0].update(about, weight_decay=own.weight_decay)
            others[slot].step()
        norms = optimizer.step(slots, settings)
        assert [math.isfinite(norm) for norm in norms] == [(step, slot) != (3, 1) for slot in slots]
        assert not bank.gradients[slots].any()
    assert failed
    for slot in range(3):
        torch.testing.assert_close(bank.vectors[slot], alone[slot].detach(), rtol=1e-6, atol=1e-7)
    assert optimizer.steps == [6, 4, 4]


def test_a_step_of_the_optimizer_is_taken_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out for all blocks above a width: in the first block nothing is taken, in a later one all is."""
    bank = AdapterBank(_model(), 2)
    settings, gradient = [AdamSettings(0.01, 0.9, 0.999, 1e-8, 0.0, 0.0)] * 2, torch.randn_like(bank.gradients)
    real, widest, short_from = BankAdamW._step_block, 0, 0

    def short(self: BankAdamW, rows: torch.Tensor, block: slice, each: torch.Tensor) -> None:
        if block.start >= short_from and block.stop - block.start > widest:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        real(self, rows, block, each)

    def step() -> torch.Tensor:
        bank.vectors.copy_(bank.initial.expand_as(bank.vectors))
        bank.gradients.copy_(gradient)
        optimizer.step([0, 1], settings)
        return bank.vectors.clone()

    monkeypatch.setattr(optim, "_LEAST_NUMBERS", 64)
    monkeypatch.setattr(optim, "_BLOCK_NUMBERS", 2 * 256)
    optimizer = BankAdamW(bank)
    expected = step()
    monkeypatch.setattr(BankAdamW, "_step_block", short)
    optimizer = BankAdamW(bank)
    with pytest.raises(torch.OutOfMemoryError):
        step()
    assert optimizer.steps == [0, 0] and torch.equal(bank.vectors, bank.initial.expand_as(bank.vectors))
    widest, short_from = 5, 1  # below the width that a step may begin with
    assert torch.equal(step(), expected)
    assert optimizer.steps == [1, 1]


def test_what_is_put_into_a_slot_comes_out_again() -> None:
    model = _model()
    vectors = _vectors(model, 4)
    bank = AdapterBank(model, 2)
    bank.put(1, vectors)
    assert all(torch.equal(tensor, vectors[key]) for key, tensor in bank.take(1).items())
    bank.start(1)
    assert torch.equal(bank.vectors[0], bank.vectors[1])
    with pytest.raises(ValueError, match="not those of an adapter"):
        bank.put(0, {"x": torch.zeros(1)})
