"""The plan of a run of many adapters: how many are in flight, and what they take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qvera.adapters.bank import AdapterBank
from qvera.config.schema import Recipe, parse_recipe
from qvera.data import build_datasets, collate_prefix_once
from qvera.data.rows import Joined, pad_batch
from qvera.models.attention import VARLEN, open_mask
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.forward import row_tokens
from qvera.models.tokenizer import load_tokenizer
from qvera.training.plan import Machine, PlannedRun, make_plan, plan_memory, shape_of
from qvera.training.plan.bank import slot_bytes, wanted_slots
from qvera.training.plan.longest import batch_of
from qvera.training.plan.show import print_plan
from tests.conftest import small_llama
from tests.data.rows import rows_of
from tests.training.plan import live
from tests.training.plan.test_activations import BIG, CASES, batch
from tests.training.plan.test_activations import recipe as planned_recipe


@pytest.fixture
def recipe(tiny_model_dir: Path, tmp_path: Path) -> Recipe:
    rows = [{"customer": f"c{i % 5}", "text": "a few words " * (1 + i % 3)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_recipe(
        {
            "model": {"path": str(tiny_model_dir)},
            "data": {"path": str(tmp_path / "rows.jsonl"), "adapter_column": "customer", "max_length": 64},
            "adapter": {"rank": 8},
            "training": {"global_batch_size": 4, "per_device_train_batch_size": 12, "output_dir": str(tmp_path / "o")},
        },
        "test",
    )


def changed(recipe: Recipe, **training: object) -> Recipe:
    return recipe.replace(training=recipe.training.replace(**training))


def test_as_many_adapters_are_in_flight_as_fill_a_pass(recipe: Recipe) -> None:
    assert wanted_slots(recipe) == 3
    assert wanted_slots(recipe, [50, 50, 50, 50]) == 3
    assert wanted_slots(recipe, [1, 1, 2, 50, 3, 9]) == 5  # 1 + 1 + 2 + 3 + 4 rows
    assert wanted_slots(changed(recipe, per_device_train_batch_size=2), [9, 9]) == 1
    assert wanted_slots(changed(recipe, adapters_at_once=7), [9] * 4) == 4
    assert wanted_slots(planned_recipe(8, "sdpa", False)) == 0


def test_memory_limits_the_adapters_in_flight_only_where_auto_chose_them(recipe: Recipe) -> None:
    def plan(recipe: Recipe, available_bytes: int) -> int:
        return make_plan(recipe, Machine("t", "cuda", torch.float32, False, available_bytes)).slots

    wide = changed(recipe, per_device_train_batch_size=40, gradient_checkpointing=True)
    whole = make_plan(wide, Machine("t", "cuda", torch.float32, False, 10**10))
    assert whole.slots == 10
    assert plan(wide, whole.needed_bytes - 3 * slot_bytes(whole) + 5) == 7
    assert plan(wide, 1000) == 1
    assert plan(changed(wide, adapters_at_once=10), 1000) == 10


@pytest.mark.parametrize("read", [True, False], ids=["rows", "no-rows"])
def test_a_pass_is_planned_with_no_more_rows_than_the_adapters_in_flight_have(recipe: Recipe, read: bool) -> None:
    """Whether the rows are known or not."""
    rows = build_datasets(recipe.data, load_tokenizer(recipe.model)).train if read else None
    machine = Machine("t", "cuda", torch.float32, False, 10**10)

    def rows_of(adapters_at_once: int, pass_rows: int) -> int:
        one = changed(recipe, adapters_at_once=adapters_at_once, per_device_train_batch_size=pass_rows)
        return make_plan(one, machine, rows, adapter_rows=[8] * 5).batch.rows

    assert rows_of(2, 12) == 8
    assert rows_of(2, 7) == 7
    assert rows_of(5, 12) == 12


def test_fewer_rows_a_pass_need_not_divide_a_step_of_many_adapters(recipe: Recipe) -> None:
    """Their rows are cut into passes together."""
    sizes = {"global_batch_size": 8, "per_device_train_batch_size": 8, "adapters_at_once": 4}
    wide = changed(recipe, **sizes, gradient_checkpointing=False)
    whole = make_plan(wide, Machine("t", "cuda", torch.float32, False, 10**10))
    five = make_plan(changed(wide, per_device_train_batch_size=5), whole.machine)
    small = Machine("t", "cuda", torch.float32, False, five.needed_bytes)
    found = [change.settings for change in make_plan(wide, small).changes]
    assert {"training.per_device_train_batch_size": 5} in found


def test_the_plan_counts_16_bytes_a_number_and_adapter(recipe: Recipe) -> None:
    machine = Machine("t", "cuda", torch.float32, False, 10**10)
    full = changed(recipe, per_device_train_batch_size=8)  # so many adapters may be in it
    totals = [make_plan(changed(full, adapters_at_once=n), machine).memory.total_bytes for n in (8, 9)]
    plan = make_plan(full, machine)
    assert totals[1] - totals[0] == 16 * plan.trained_parameters == slot_bytes(plan)
    frozen = make_plan(full.replace(adapter=recipe.adapter.replace(train_d=False)), machine)
    assert slot_bytes(frozen) == 4 * plan.trained_parameters + 12 * frozen.trained_parameters


def test_a_single_slot_is_planned_as_one_adapter(recipe: Recipe) -> None:
    """Every pass is of one adapter then, and takes the path of an adapter alone."""
    single = changed(recipe, per_device_train_batch_size=4)
    one = single.replace(data=single.data.replace(adapter_column=None, prefix_once=False))
    machine = Machine("t", "cuda", torch.float32, False, 10**12)
    many, alone = (make_plan(each, machine) for each in (single, one))
    assert many.holds_weights == alone.holds_weights
    extra = 2 * many.vector_bytes  # the ordinary adapter's, and what each begins with
    answers = [{name: m for name, m in plan.memory.moments.items() if name != "answers"} for plan in (many, alone)]
    assert answers[0] == answers[1]
    assert sum(c.bytes for c in many.memory.standing) - sum(c.bytes for c in alone.memory.standing) == extra


def test_the_plan_says_how_many_are_trained_at_once(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    plan = make_plan(recipe, Machine("t", "cuda", torch.float32, False, 10**10))
    print_plan(plan, Console(width=200))
    assert "At most 3 adapters are trained at the same time" in capsys.readouterr().out
    assert plan.to_dict()["adapters_at_once"] == 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", [0, 7, 8], ids=["small", "fp32", "bf16"])
@pytest.mark.parametrize("more", ["vera", "groups-and-a"])
def test_the_peak_of_a_pass_with_many_adapters_is_the_plan_s(more: str, case: int, checkpointing: bool) -> None:
    rows, tokens, dtype, rank, attention, padded, changes = CASES[case]
    made = planned_recipe(rank, attention, checkpointing, more)
    ids, mask, labels, of = batch(rows, tokens, padded)
    machine = Machine("test", "cpu", dtype, False, 10**12)
    memory = plan_memory(PlannedRun(shape_of(small_llama(**changes)), made, of, machine, slots=2))
    model = live.tiny(made.replace(training=made.training.replace(gradient_checkpointing=False)), dtype, **changes)
    bank = AdapterBank(model, 2)
    enable_checkpointing(model, checkpointing, by_tiles=False)
    with bank.rows([i % 2 for i in range(rows)], [tokens] * rows):
        if not checkpointing:
            (kept,) = [c for c in memory.moments["backward"] if c.kind == "checkpoints"]
            assert kept.bytes - 3 * 8 * rows * tokens == live.kept_bytes(model, ids, mask)
        step = sum(c.bytes for c in memory.moments[memory.peak_moment])
        counted = live.step_peak_bytes(model, ids, mask, labels, made.training.loss_chunk_tokens)
    assert -0.02 < step / counted - 1 < 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", ["vera", "groups-and-a"])
def test_the_peak_of_a_joined_pass_is_the_plan_s(more: str, dtype: torch.dtype, checkpointing: bool) -> None:
    """Some rows are attended to in fp32 and some not; what fills the sequence up is a row too."""
    made = planned_recipe(64, "sdpa", checkpointing, more)
    rows = rows_of(140, 9, 33, 40, 70, 31)
    of = batch_of(rows, Joined.ROWS, rounded=True, whole_rows=True)
    assert (of.rows, of.tokens, of.joined, of.offsets, len(of.groups)) == (1, 352, True, True, 5)
    machine = Machine("test", "cpu", dtype, False, 10**12)
    memory = plan_memory(PlannedRun(shape_of(small_llama(**BIG)), made, of, machine, slots=2))
    plain = made.replace(training=made.training.replace(gradient_checkpointing=False))
    model = live.tiny(plain, dtype, attn_implementation=VARLEN, **BIG)
    bank = AdapterBank(model, 2)
    enable_checkpointing(model, checkpointing, by_tiles=False)
    inputs = collate_prefix_once(rows, packing=True, joined=Joined.ROWS)
    assert inputs is not None
    inputs = pad_batch(inputs, of.tokens, 0)
    ids, labels, trained = (inputs.pop(name) for name in ("input_ids", "labels", "trained"))
    with bank.rows([i % 2 for i in range(len(rows))], row_tokens({"input_ids": ids, **inputs}, rows)):
        if not checkpointing:
            (kept,) = [c for c in memory.moments["backward"] if c.kind == "checkpoints"]
            places = sum(count * length for count, length in of.groups) + of.tokens  # that all layers share
            found = live.kept_bytes(model, ids, open_mask(ids), **inputs)
            assert kept.bytes - 3 * 8 * of.tokens + 8 * places == found
        step = sum(c.bytes for c in memory.moments[memory.peak_moment])
        chunk = made.training.loss_chunk_tokens
        counted = live.step_peak_bytes(model, ids, open_mask(ids), labels, chunk, **inputs)
    assert len(trained) == of.trained_tokens
    assert -0.02 < step / counted - 1 < 0.1
