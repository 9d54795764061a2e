"""Models that many tenants train by calls become what each becomes alone, and what the formulas say."""

from __future__ import annotations

import errno
import gc
import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CTRLConfig, CTRLLMHeadModel, GPT2Config, GPT2LMHeadModel

from qvera.adapters import save_load
from qvera.models.token_losses import TOKEN_LOSSES
from qvera.training import tenants
from qvera.training.optim import AdamSettings
from qvera.training.tenants import CallFailed, ModelShape
from qvera.training.token_rows import PassRow, RowResults, TokenRow
from qvera.utils.files import ADAPTER_WEIGHTS
from tests.training.online_jobs import difference
from tests.training.tenant_calls import LORA, STEP, VERA, Calls, Reference, some_rows

DRO = {"beta": 0.05}
SETTINGS: dict[str, dict[str, float]] = {
    name: {
        **{key: usual for key, usual in loss.settings.items() if usual is not None},
        **(DRO if name == "dro" else {}),
    }
    for name, loss in TOKEN_LOSSES.items()
}


def reference_of(calls: Calls, model_id: str, shape: ModelShape) -> Reference:
    """By the model's numbers now."""
    numbers, columns = calls.tensors(model_id)["vectors"], calls.tenants._pools[shape].bank.layout.columns
    return Reference(shape, numbers, {key: one.shape for key, one in columns.items()})


def assert_same_results(found: RowResults, expected: RowResults, tolerance: float) -> None:
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    assert found.loss == pytest.approx(expected.loss, rel=tolerance, abs=10 * tolerance)


@pytest.mark.parametrize("shape", [LORA, VERA], ids=["lora", "vera"])
@pytest.mark.parametrize("loss", TOKEN_LOSSES)
def test_every_loss_is_that_of_dense_weights_in_fp64(loss: str, shape: ModelShape, tmp_path: Path) -> None:
    """The model is moved first, so that no vector is zero. Calls add up; some rows have one token."""
    calls = Calls(tmp_path)
    calls.create("one", shape, seed=3)
    calls.rows("one", some_rows(4, 1))
    calls.step("one")
    reference = reference_of(calls, "one", shape)
    parts = [some_rows(5, 2, loss), some_rows(3, 3, loss, 4 if loss == "cross_entropy" else 1)]
    for rows in parts:
        calls.rows("one", rows, loss, **(DRO if loss == "dro" else {}))
    found = calls.finish()["one"][-2:]
    for results, rows in zip(found, parts, strict=True):
        assert_same_results(results, reference.rows(rows, loss, SETTINGS[loss]), 1e-5)
    pending = calls.tensors("one")["pending"]
    assert difference(pending.double(), reference.gradient()) < 2e-5


KINDS = [
    ("anna", LORA, "cross_entropy", 1, STEP),
    ("anna", LORA, "ppo", 1, AdamSettings(3e-3, 0.8, 0.99, 1e-8, 0.1, 0.5)),
    ("ben", VERA, "cross_entropy", 3, STEP._replace(learning_rate=2e-2)),
    ("ben", VERA, "gspo", 1, STEP._replace(max_norm=1e-3)),
    ("cleo", LORA, "dro", 1, STEP),
    ("cleo", VERA, "importance_sampling", 1, STEP),
]


def train(calls: Calls, models: list[int], steps: int = 2) -> dict[str, Tensor]:
    """Two calls for each step of some of `KINDS`, interleaved; their numbers at the end."""
    for number in models:
        owner, shape, *_ = KINDS[number]
        calls.create(f"m{number}", shape, owner, seed=number)
    for step in range(steps):
        for number in models:
            _, _, loss, each, settings = KINDS[number]
            for part in range(2):
                rows = some_rows(2 + number % 2, 100 * number + 10 * step + part, loss, each)
                calls.rows(f"m{number}", rows, loss, **(DRO if loss == "dro" else {}))
            calls.step(f"m{number}", settings)
    calls.finish()
    return {f"m{number}": calls.tensors(f"m{number}")["vectors"] for number in models}


def test_each_model_among_others_is_what_it_is_alone_and_what_torch_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, passes = Calls(tmp_path / "together"), short_of_memory(monkeypatch, lambda _: True)
    found = train(together, list(range(len(KINDS))))
    rows = sum(
        len(one.logprobs) for results in together.results.values() for one in results if isinstance(one, RowResults)
    )
    assert sum(passes) == rows and len(passes) < rows / 3  # passes are shared
    monkeypatch.undo()
    for number, (_, shape, loss, each, settings) in enumerate(KINDS):
        name = f"m{number}"
        alone = Calls(tmp_path / name)
        alone.create(name, shape, seed=number)
        reference = reference_of(alone, name, shape)
        assert difference(found[name], train(Calls(tmp_path / f"alone {name}"), [number])[name]) < 1e-5
        norms = iter([one for one in together.results[name] if isinstance(one, dict) and "grad_norm:mean" in one])
        results = iter([one for one in together.results[name] if isinstance(one, RowResults)])
        for step in range(2):
            for part in range(2):
                rows_of_call = some_rows(2 + number % 2, 100 * number + 10 * step + part, loss, each)
                assert_same_results(next(results), reference.rows(rows_of_call, loss, SETTINGS[loss]), 2e-4)
            assert next(norms)["grad_norm:mean"] == pytest.approx(reference.step(settings), rel=1e-3)
        assert difference(found[name].double(), reference.flat()) < 1e-3


def equal(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(difference(one[key], other[key]) <= tolerance for key in one)


def test_calls_add_up_to_one_call_of_all_rows_and_a_forward_leaves_nothing(tmp_path: Path) -> None:
    calls, rows = Calls(tmp_path), some_rows(9, 4, each=2)
    for name in ("parts", "whole"):
        calls.create(name, VERA)
    for part in (rows[:2], rows[2:3], rows[3:]):
        calls.rows("parts", part)
    calls.rows("whole", rows)
    parts, whole = (calls.tensors(name) for name in ("parts", "whole"))
    assert equal(parts, whole, 1e-6)
    calls.rows("whole", rows, forward_only=True)
    results = calls.finish()["whole"]
    assert_same_results(results[-1], results[1], 1e-6)
    assert equal(calls.tensors("whole"), whole)
    calls.step("whole")
    assert "pending" not in calls.tensors("whole")
    before = calls.tensors("whole")
    calls.step("whole")  # without a gradient
    after = calls.tensors("whole")
    assert calls.results["whole"][-2] == {"grad_norm:mean": 0.0}
    torch.testing.assert_close(after["first"], 0.9 * before["first"])
    assert not torch.equal(after["vectors"], before["vectors"])


SIZES = {"vocab_size": 304, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": None}


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(GPT2Config(**SIZES, eos_token_id=None)),
        lambda: CTRLLMHeadModel(CTRLConfig(**SIZES, dff=48, resid_pdrop=0.0, embd_pdrop=0.0)),
    ],
    ids=["with dropout", "of layers that can not be recomputed"],
)
def test_another_base_computes_as_it_answers(make: Callable[[], Any], tmp_path: Path) -> None:
    """Its rows are padded. A fresh model changes nothing."""
    torch.manual_seed(0)
    base, rows = make(), some_rows(6, 3)
    calls = Calls(tmp_path, base)
    calls.create("one", LORA)
    calls.rows("one", rows)
    found = calls.finish()["one"][-1]
    for row, logprobs in zip(rows, found.logprobs, strict=True):
        with torch.no_grad():
            logits = base.eval()(torch.from_numpy(row.tokens)[None]).logits[0]
        expected = logits.log_softmax(-1).gather(1, torch.from_numpy(row.targets))
        torch.testing.assert_close(torch.from_numpy(logprobs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [LORA, VERA], ids=["lora", "vera"])
def test_a_call_that_is_not_finite_fails_alone_and_leaves_nothing_behind(shape: ModelShape, tmp_path: Path) -> None:
    """By its weights, and by vectors that a step has made infinite; its rows share passes with those of others."""
    found = []
    for broken in (False, True):
        calls = Calls(tmp_path / str(broken), pass_tokens=200)
        for name in ("good", "bad"):
            calls.create(name, shape, name, seed=1)
            calls.rows(name, some_rows(3, 5))
        calls.rows("good", some_rows(6, 6))
        rows = some_rows(6, 7)
        if broken:
            rows[2].inputs["weights"][0] = 3e38
        calls.rows("bad", rows)
        calls.finish()
        if broken:
            failed = calls.results["bad"][-1]
            assert isinstance(failed, CallFailed) and failed.category == "user" and "not finite" in failed.message
        found.append((calls.tensors("good"), calls))
    (without, _), (beside, calls) = found
    assert equal(beside, without)
    kept, alone = calls.tensors("bad"), Calls(tmp_path / "alone")
    alone.create("bad", shape, seed=1)
    alone.rows("bad", some_rows(3, 5))
    assert equal(kept, alone.tensors("bad"), 1e-6)
    calls.step("bad", STEP._replace(learning_rate=1e30))
    calls.rows("good", some_rows(4, 9))
    calls.rows("bad", some_rows(4, 8))
    calls.finish()
    assert isinstance(calls.results["bad"][-1], CallFailed) and "data[0]" in calls.results["bad"][-1].message
    assert isinstance(calls.results["good"][-1], RowResults)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, fits: Callable[[Sequence[PassRow]], object]) -> list[int]:
    """Let passes fail, after their backward, that do not fit; the rows of the others."""
    sizes, real = list[int](), tenants.run_pass

    def run_pass(lent: Any, bank: Any, rows: Sequence[PassRow], *more: Any) -> Any:
        found = real(lent, bank, rows, *more)
        if not fits(rows):
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        sizes.append(len(rows))
        return found

    monkeypatch.setattr(tenants, "run_pass", run_pass)
    return sizes


def test_where_memory_runs_out_passes_are_halved_and_models_become_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(Calls(tmp_path / "plenty"), [0, 2])
    sizes = short_of_memory(monkeypatch, lambda rows: len(rows) <= 2)
    found = train(Calls(tmp_path / "short"), [0, 2])
    assert max(sizes) == 2
    assert equal(found, expected, 1e-5)


def test_a_row_that_does_not_fit_ends_its_call_alone_and_pending_gradients_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(tmp_path)
    for name in ("good", "bad"):
        calls.create(name, LORA, name)
        calls.rows(name, some_rows(3, 5))
    before = calls.tensors("bad")
    rows = some_rows(6, 7)
    sizes = short_of_memory(monkeypatch, lambda given: all(one.row is not rows[4] for one in given))
    calls.rows("bad", rows)
    calls.rows("good", some_rows(6, 7))
    calls.rows("bad", some_rows(2, 8))
    calls.finish()
    failed, after = calls.results["bad"][-2:]
    assert isinstance(failed, CallFailed) and failed.category == "server"
    assert failed.message.startswith("data[4], a row of") and "2.15 GB were asked for" in failed.message
    assert isinstance(calls.results["good"][-1], RowResults) and isinstance(after, RowResults)
    assert max(sizes[1:]) > 1  # passes are large again
    monkeypatch.undo()
    alone = Calls(tmp_path / "alone")
    alone.create("bad", LORA)
    alone.rows("bad", some_rows(3, 5))
    assert equal(alone.tensors("bad"), before, 1e-6)
    alone.rows("bad", some_rows(2, 8))
    assert equal(calls.tensors("bad"), alone.tensors("bad"), 1e-5)


def test_a_fault_in_a_pass_is_the_servers_and_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(tmp_path)
    calls.create("one", LORA)
    calls.rows("one", some_rows(3, 5))
    before = calls.tensors("one")
    monkeypatch.setattr(tenants, "run_pass", lambda *_: 1 / 0)
    calls.rows("one", some_rows(4, 6))
    failed = calls.finish()["one"][-1]
    assert failed.category == "server" and "division by zero" in failed.message
    monkeypatch.undo()
    assert equal(calls.tensors("one"), before)


def test_owners_have_their_turns_by_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One has a long call, one many models with small calls, and one comes later; nobody waits for the long call."""
    calls, taken = Calls(tmp_path, pass_tokens=40), dict.fromkeys(("long", "many", "late"), 0)
    owners = {"long": "long", "late": "late", **{f"many {i}": "many" for i in range(8)}}
    for name, owner in owners.items():
        calls.create(name, LORA, owner)
    real = tenants.run_pass

    def counted(lent: Any, bank: Any, rows: Sequence[PassRow], *more: Any) -> Any:
        residents = calls.tenants._pools[LORA].residents
        for one in rows:
            model = residents[one.slot]
            assert model is not None
            taken[owners[model.id]] += len(one.row.tokens)
        return real(lent, bank, rows, *more)

    monkeypatch.setattr(tenants, "run_pass", counted)

    def rows_of(count: int, length: int) -> list[TokenRow]:
        return [TokenRow(np.full(length, 5), np.full((length, 1), 7), {"weights": np.ones((length, 1), np.float32)})
                for _ in range(count)]  # fmt: skip

    calls.rows("long", rows_of(40, 8))
    for name, owner in owners.items():
        if owner == "many":
            calls.rows(name, rows_of(8, 4))
    while taken["long"] < 120:
        calls.tenants.run_slice()
        assert abs(taken["long"] - taken["many"]) <= 40
    calls.rows("late", rows_of(4, 16))
    before = dict(taken)
    while len(calls.results["late"]) < 2:
        calls.tenants.run_slice()
    gained = {owner: taken[owner] - before[owner] for owner in taken}
    assert gained["late"] == 64 and abs(gained["long"] - 64) <= 40 and abs(gained["many"] - 64) <= 40
    calls.finish()
    assert taken == {"long": 320, "many": 256, "late": 64}
    assert calls.order.index("late", 12) < [i for i, name in enumerate(calls.order) if name == "long"][-1]


def test_an_owner_of_long_rows_who_waits_for_each_result_gets_no_more_tokens(tmp_path: Path) -> None:
    """Its rows are taken one call after the other, and it waits for nobody in between."""
    calls, taken = Calls(tmp_path, pass_tokens=60), 0
    for name in ("long", "short"):
        calls.create(name, LORA, name)

    def rows_of(count: int, length: int) -> list[TokenRow]:
        ids, ones = np.full(length, 5), np.ones((length, 1), np.float32)
        return [TokenRow(ids, ids[:, None], {"weights": ones})] * count

    def again(result: object) -> None:
        nonlocal taken
        taken += 60
        calls.tenants.forward_backward("long", rows_of(1, 60), "cross_entropy", {}, False, again)

    calls.rows("short", rows_of(60, 5))
    calls.tenants.forward_backward("long", rows_of(1, 60), "cross_entropy", {}, False, again)
    while len(calls.results["short"]) < 2:
        calls.tenants.run_slice()
    assert 240 <= taken <= 360  # of 300 tokens of short rows


def test_models_that_are_paged_out_amid_their_calls_become_the_same(tmp_path: Path) -> None:
    """One slot for all models of a shape, two shapes, of which one has room, and no model fits host memory."""
    expected = train(Calls(tmp_path / "roomy"), list(range(len(KINDS))))
    tight = Calls(tmp_path / "tight", device_bytes=1, host_bytes=1)
    found = train(tight, list(range(len(KINDS))))
    assert equal(found, expected, 1e-5)
    in_slots = [model for pool in tight.tenants._pools.values() for model in pool.residents if model is not None]
    files = list((tmp_path / "tight" / "paged").iterdir())
    assert len(in_slots) + len(files) == len(KINDS) and len(in_slots) <= 1
    tight.tenants.remove([f"m{number}" for number in range(len(KINDS))])
    tight.finish()
    assert not list((tmp_path / "tight" / "paged").iterdir())


def test_a_shape_holds_no_memory_after_its_last_model_and_comes_back_the_same(tmp_path: Path) -> None:
    calls, found = Calls(tmp_path), list[dict[str, Tensor]]()

    def held_bytes() -> int:
        parameters = list(calls.tenants._base.model.parameters())
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in parameters}.values())

    calls.create("other", VERA)
    before = held_bytes()
    for name in ("first", "second"):
        calls.create(name, LORA)
        calls.create(f"{name} of the shape", LORA)
        calls.rows(name, some_rows(5, 3))
        calls.step(name)
        found.append(calls.tensors(name))
        bank = weakref.ref(calls.tenants._pools[LORA].bank)
        calls.tenants.remove([name])
        calls.rows(f"{name} of the shape", some_rows(2, 4))
        assert isinstance(calls.finish()[f"{name} of the shape"][-1], RowResults) and bank() is not None
        calls.tenants.remove([f"{name} of the shape"])
        calls.finish()
        gc.collect()
        assert bank() is None and list(calls.tenants._pools) == [VERA]
        assert held_bytes() < before + 1024
    assert equal(*found)


def test_a_model_that_can_not_be_made_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(tmp_path)
    calls.create("one", LORA)
    monkeypatch.setattr(tenants._Pool, "start", lambda *_: 1 / 0)
    calls.create("two", LORA)
    calls.rows("two", some_rows(2, 3))
    made, trained = calls.finish()["two"]
    assert "division by zero" in made.message and "is not there" in trained.message


def test_a_saved_model_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    """With a gradient that no step has used yet, in tenants of another process; and its vectors alone."""
    calls, file = Calls(tmp_path / "first"), tmp_path / "state.safetensors"
    calls.create("one", VERA)

    def go_on(calls: Calls, name: str) -> list[RowResults]:
        calls.rows(name, some_rows(4, 11))
        calls.step(name)
        calls.rows(name, some_rows(4, 12))
        return [one for one in calls.finish()[name] if isinstance(one, RowResults)][-2:]

    for seed in (1, 2):
        calls.rows("one", some_rows(4, seed))
        calls.step("one")
    calls.rows("one", some_rows(4, 3))
    calls.tenants.save_state("one", file, calls.done("one"))
    expected = go_on(calls, "one")
    again = Calls(tmp_path / "again")
    again.tenants.load("whole", "anna", file, True, again.done("whole"))
    again.tenants.load("vectors", "anna", file, False, again.done("vectors"))
    for found, results in zip(go_on(again, "whole"), expected, strict=True):
        assert found.loss == results.loss
    without = go_on(again, "vectors")
    assert without[0].loss == expected[0].loss and without[1].loss != expected[1].loss
    assert equal({"vectors": again.tensors("whole")["vectors"]}, {"vectors": calls.tensors("one")["vectors"]})


def test_a_load_takes_the_place_of_a_model_in_its_turn(tmp_path: Path) -> None:
    """Of one that is being made, in the same slice, and of one that has a slot. If it fails, no call goes on."""
    calls, file, rows = Calls(tmp_path), tmp_path / "state.safetensors", some_rows(3, 5)
    calls.create("saved", LORA, seed=1)
    calls.rows("saved", rows)
    calls.step("saved")
    calls.tenants.save_state("saved", file, calls.done("saved"))
    calls.finish()
    calls.tenants.create("new", "anna", LORA, 2, calls.done("new"))
    calls.tenants.load("new", "anna", file, True, calls.done("new"))
    calls.create("trained", LORA, seed=3)
    calls.rows("trained", rows)
    calls.tenants.load("trained", "anna", file, True, calls.done("trained"))
    calls.finish()
    assert calls.results["new"] == [None, None] and calls.results["trained"][-1] is None
    expected = calls.tensors("saved")
    assert equal(calls.tensors("new"), expected) and equal(calls.tensors("trained"), expected)
    calls.rows("trained", rows)
    calls.tenants.load("trained", "anna", tmp_path / "nowhere", True, calls.done("trained"))
    calls.rows("trained", rows)
    *_, missing, ended = calls.finish()["trained"]
    assert "nowhere" in missing.message and "could not be made" in ended.message
    (pool,) = calls.tenants._pools.values()
    assert "trained" not in {model.id for model in pool.residents if model is not None}


def test_a_lora_starts_as_tinkers_do_and_is_saved_as_pefts(tmp_path: Path) -> None:
    calls = Calls(tmp_path)
    for name, shape, seed in (("a", LORA, 1), ("b", LORA, 1), ("c", LORA, 2), ("mlp", ModelShape("lora", 2, "mlp"), 1)):
        calls.create(name, shape, seed=seed)
    one, same, other = (calls.tensors(name)["vectors"] for name in "abc")
    assert torch.equal(one, same) and not torch.equal(one, other)
    for name in ("a", "mlp"):
        calls.tenants.save_adapter(name, tmp_path / name, calls.done(name))
    calls.finish()
    saved = load_file(tmp_path / "a" / ADAPTER_WEIGHTS)
    for key, tensor in saved.items():
        if "lora_A" in key:
            assert 0.9 < tensor.abs().max() * tensor.shape[1] ** 0.5 <= 1
        else:
            assert not tensor.any()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["lora_alpha"], config["r"]) == ("LORA", 32, 3)
    assert len(saved) == 28
    names = {key.split(".")[-3] for key in load_file(tmp_path / "mlp" / ADAPTER_WEIGHTS)}
    assert names == {"gate_proj", "up_proj", "down_proj"}


def test_what_can_not_be_done_is_said_in_its_turn_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, rows = Calls(tmp_path), some_rows(3, 5)
    calls.create("one", LORA)
    calls.rows("one", rows)
    before = calls.tensors("one")
    calls.create("one", LORA)
    calls.rows("two", rows)
    (tmp_path / "damaged").write_bytes((tmp_path / "one.safetensors").read_bytes()[:-1])
    calls.tenants.load("damaged", "anna", tmp_path / "damaged", True, calls.done("damaged"))
    calls.rows("damaged", rows)
    results = calls.finish()
    messages = [one.message for one in [results["one"][-1], *results["two"], *results["damaged"]]]
    expected = ["is there already", "is not there", "damaged", "could not be made"]
    assert all(part in message for part, message in zip(expected, messages, strict=True)), messages
    assert equal(calls.tensors("one"), before)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_load, "_write_files", full)
    calls.tenants.save_adapter("one", tmp_path / "saved", calls.done("saved"))
    (failed,) = calls.finish()["saved"]
    assert failed.message.endswith("the disk is full. What was there before is kept; make room, and save it again.")
    calls.rows("one", rows)
    calls.tenants.remove(["one"], calls.done("removed"))
    calls.finish()
    assert "was removed" in calls.results["one"][-1].message and calls.results["removed"] == [None]
