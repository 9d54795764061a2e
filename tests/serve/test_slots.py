"""Adapter files that are replaced, damaged, foreign or blended while an engine answers from them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvera.adapters import save_load
from qvera.adapters.save_load import attach
from qvera.adapters.shared_model import load_adapters
from qvera.config.sections import AdapterSection, ExportSection, ModelSection
from qvera.exporting.merged import export_merged
from qvera.serve.opening import open_served, warm_up
from qvera.serve.requests import AdapterChanged, EndEvent
from qvera.serve.slots import ServingBank
from qvera.serve.store import AdapterStore
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.adapters.helpers import perturb
from tests.conftest import small_llama, small_tokenizer
from tests.helpers import wait_until
from tests.many_adapters import write_run
from tests.serve.helpers import ENGINES, Alone, assert_same, request, resolved, submit, tiny_base, write_adapters


@pytest.fixture
def root(adapters_dir: Path, tmp_path: Path) -> Path:
    """A directory that a test may change, with the adapter ``a1`` in it."""
    shutil.copytree(adapters_dir / "a1", tmp_path / "root" / "a1")
    return tmp_path / "root"


def _replace(new: Path, old: Path) -> None:
    """As `save_adapter` does it: the new one gets its place by its name."""
    old.rename(old.with_name(".old"))
    shutil.copytree(new, old)


# Replaced


def test_a_replaced_file_answers_new_requests_while_those_that_run_finish_on_the_old_vectors(
    engine_with: Any, adapters_dir: Path, root: Path, alone: Any
) -> None:
    store, prompt = AdapterStore(root), [3, 4, 5]
    stale = resolved(store)
    old, waits = (request(prompt, stale, tokens, top_logprobs=0) for tokens in (60, 5))
    old_vectors = alone(adapters_dir / "a1").answer(old)
    new_vectors = alone(adapters_dir / "a2").answer(request(prompt, None, 5, top_logprobs=0))
    with engine_with(max_running=1) as engine:
        running, waiting = submit(engine, old), submit(engine, waits)
        running.wait_for_token()
        _replace(adapters_dir / "a2", root / "a1")
        assert resolved(store).identity != stale.identity
        after = submit(engine, request(prompt, resolved(store), 5, top_logprobs=0))
        assert_same(running, old_vectors)
        assert_same(waiting, old_vectors[:5])
        assert_same(after, new_vectors)
    with engine_with() as engine:  # which has never seen the old vectors
        with pytest.raises(AdapterChanged, match="ask again"):
            submit(engine, request([3], stale))
        assert submit(engine, request([3], resolved(store))).end() == EndEvent("length")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_adapter_that_is_saved_anew_is_whole_and_never_missing(
    tiny_model_dir: Path, tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tiny_model_dir)
    model = attach(base.model, AdapterSection(rank=8), str(tiny_model_dir), base.facts.get("fingerprint"))
    if not can_exchange:
        monkeypatch.setattr("qvera.utils.files.exchange", lambda *paths: False)
    anna, elsewhere = tmp_path / "anna", tmp_path / "elsewhere"
    save_load.save_adapter(model, elsewhere)
    anna.symlink_to(elsewhere)  # replaced as a name, and what it leads to stays
    store, missing, done = AdapterStore(tmp_path), [0], threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            try:
                store.resolve("anna")
            except InputError:
                missing[0] += 1

    asking = threading.Thread(target=keep_asking)
    asking.start()
    for seed in range(8):
        perturb(model, seed=seed)
        save_load.save_adapter(model, anna)
        saved = load_file(anna / ADAPTER_WEIGHTS)
        assert all(torch.equal(saved[key], vector) for key, vector in save_load.named_vectors(model).items())
    done.set()
    asking.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anna", "elsewhere"]
    assert (elsewhere / ADAPTER_WEIGHTS).is_file()
    assert not missing[0] or not can_exchange or sys.platform != "linux"


# Damaged and foreign


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        file = directory / ADAPTER_CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def _change_first_vector(factor: float | None) -> Callable[[Path], None]:
    """None: it goes."""

    def change(directory: Path) -> None:
        vectors = load_file(directory / ADAPTER_WEIGHTS)
        vector = vectors.pop(key := min(vectors))
        save_file(vectors | ({} if factor is None else {key: vector * factor}), directory / ADAPTER_WEIGHTS)

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda place: os.truncate(place / ADAPTER_WEIGHTS, 1000), "cut short"),
    "garbage": (lambda place: (place / ADAPTER_WEIGHTS).write_bytes(b"\xff" * 4096), "not a readable safetensors file"),
    "nan": (_change_first_vector(float("nan")), "NaN or Inf"),
    "lacks a vector": (_change_first_vector(None), "has the shape None"),
    "another base": (_change_config(base_fingerprint="0" * 64), "another base model"),
    "other projections": (_change_config(projection_sha256="0" * 64), "made by another generator"),
    "another rank": (_change_config(rank=9), "rank is 9"),
    "not ours": (_change_config(peft_type="IA3"), "peft_type is IA3"),
    "config is a list": (lambda place: (place / ADAPTER_CONFIG).write_text("[]"), "holds a list"),
    "no vectors": (lambda place: (place / ADAPTER_WEIGHTS).unlink(), "can't be read"),
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dvora": ({"magnitude": True}, "not served beside other adapters"),
}
"""Adapters whose method is more than vectors of one pair, and no LoRA."""


def test_a_damaged_or_foreign_adapter_is_refused_by_name_and_the_others_go_on(
    engine_with: Any, adapters_dir: Path, root: Path, tiny_model_dir: Path, tmp_path: Path, alone: Any
) -> None:
    refused = {name: message for name, (_, message) in (DAMAGES | OTHERS).items()}
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(adapters_dir / "a2", root / name)
        damage(root / name)
    for name, (settings, _) in OTHERS.items():
        write_adapters(root, tiny_model_dir, {name: 1}, **settings)
    other = tmp_path / "other model"
    small_llama(hidden_size=32).to(torch.bfloat16).save_pretrained(other)
    small_tokenizer().save_pretrained(other)
    write_adapters(root, other, {"other shapes": 1})
    _change_config(base_fingerprint=None)(root / "other shapes")  # nothing but the shapes tells
    refused["other shapes"] = "this base and the adapter's config need"
    store = AdapterStore(root)
    good = request([3, 4], resolved(store), 30)
    expected = alone(adapters_dir / "a1").answer(good)
    with engine_with() as engine:
        answer = submit(engine, good)
        for name, message in refused.items():
            with pytest.raises(InputError, match=message):
                submit(engine, request([3], store.resolve(name)))
            with pytest.raises(InputError, match=message):
                engine.load(resolved(store, name))
        assert_same(answer, expected)
        assert engine.stats().dead is None


def test_one_adapter_that_cannot_be_served_is_refused_before_its_base_is_loaded(
    tiny_model_dir: Path, adapters_dir: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapters(root, tiny_model_dir, {"dvora": 1}, magnitude=True)
    _change_config(added_tokens={"<call>": 300})(root / "a1")
    with pytest.raises(InputError, match=r"has token rows, .* load it alone"):
        load_adapters(small_llama(), {"a1": root / "a1"})
    served = open_served(str(root / "dvora"), adapters_dir)  # it says which base the others have
    assert served.own is None
    assert {"dvora", "a1"} <= set(served.store.names())
    monkeypatch.setattr("qvera.models.loader.load_base", lambda *_, **__: pytest.fail("a base was loaded"))
    with pytest.raises(InputError, match=r"not served beside other adapters.*export --to merged"):
        open_served(str(root / "dvora"))
    with pytest.raises(InputError, match=r"adds the tokens <call>, whose rows are not served.*export --to merged"):
        open_served(str(root / "a1"))
    shutil.copytree(root / "dvora", tmp_path / "others" / "dvora")
    with pytest.raises(InputError, match=rf"has an adapter dvora too.*`qvera serve {tiny_model_dir} --adapters "):
        open_served(str(root / "dvora"), tmp_path / "others")


def test_an_adapter_called_like_its_base_is_refused_with_the_way_to_another_name(
    tiny_model_dir: Path, adapters_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvera.models.loader.load_base", lambda *_, **__: pytest.fail("a base was loaded"))
    adapter = shutil.copytree(adapters_dir / "a1", tmp_path / tiny_model_dir.name)
    advice = rf"cp -r {adapter} adapters/NAME; qvera serve {tiny_model_dir} --adapters adapters"
    with pytest.raises(InputError, match=advice):
        open_served(str(adapter))


def test_a_merged_export_is_loaded_as_it_is_stored_unless_a_recipe_of_the_adapters_says_otherwise(
    tiny_model_dir: Path, adapters_dir: Path, make_recipe: Any, tmp_path: Path
) -> None:
    merged, empty = tmp_path / "merged", tmp_path / "empty"
    empty.mkdir()
    section = ModelSection(path=str(tiny_model_dir), compute_dtype="float32")
    export_merged(adapters_dir / "a1", section, merged, ExportSection(dtype="float32"))
    of_run = write_run(tmp_path / "run", make_recipe())
    for adapters, is_stored in ((None, True), (empty, True), (adapters_dir, True), (of_run, False)):
        model = open_served(str(merged), adapters).opened.base.model
        weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
        assert (weight.dtype == torch.float32) is is_stored, adapters


def test_a_server_that_starts_makes_the_layers_of_the_first_adapter_that_is_whole(
    engine_with: Any, adapters_dir: Path, root: Path
) -> None:
    shutil.copytree(adapters_dir / "a2", root / "a2")
    (root / "a1" / ADAPTER_WEIGHTS).write_bytes(b"cut")
    with engine_with() as engine:
        warm_up(engine, AdapterStore(None))  # there is none: nothing is done
        assert engine.stats().adapters_resident == 0
        warm_up(engine, AdapterStore(root))
        assert engine.stats().adapters_resident == 1
        assert not engine.bank.needs_layers(engine.bank.read(resolved(AdapterStore(adapters_dir), "a3")))


# Blended


def test_a_blend_of_adapters_answers_by_the_weighted_sum_of_their_b_where_all_else_is_one(
    tiny_model_dir: Path, engine_with: Any, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    write_adapters(root, tiny_model_dir, {"legal": 1, "support": 2}, train_d=False)
    write_adapters(root, tiny_model_dir, {"one": 1, "two": 2})
    write_adapters(root, tiny_model_dir, {"seeded": 1}, seed=4)
    first, second = (load_file(root / name / ADAPTER_WEIGHTS) for name in ("legal", "support"))
    fixed = {key: vector for key, vector in first.items() if key.endswith("_d")}
    save_file({**second, **fixed}, root / "support" / ADAPTER_WEIGHTS)
    shutil.copytree(root / "legal", tmp_path / "sum")
    summed = {key: 0.7 * second[key] + 0.25 * vector if key.endswith("_b") else vector for key, vector in first.items()}
    save_file(summed, tmp_path / "sum" / ADAPTER_WEIGHTS)
    store = AdapterStore(root)
    blend = resolved(store, "support*0.7+legal*0.25")
    assert blend.identity == resolved(store, "legal*0.25+support*0.7").identity
    assert blend.identity != resolved(store, "support*0.25+legal*0.7").identity
    assert resolved(store, "legal*1").identity == resolved(store, "legal").identity
    asked = request([7, 8, 9], blend, 12, top_logprobs=2)
    expected = Alone(tiny_model_dir, tmp_path / "sum").answer(asked)
    with engine_with() as engine:
        assert_same(submit(engine, asked), expected)
        for other, reason in {
            "two": "one and two have different vectors d",
            "seeded": "differ in method, seed",
        }.items():
            with pytest.raises(InputError, match=reason):
                submit(engine, request([3], store.resolve(f"one*0.5+{other}*0.5")))


def test_a_blend_of_loras_answers_by_the_weighted_sum_of_their_changes_whatever_their_ranks(
    tiny_model_dir: Path, engine_with: Any, tmp_path: Path
) -> None:
    (tmp_path / "root").mkdir()
    for name, seed, rank in (("legal", 1, 2), ("support", 2, 5)):
        write_adapters(tmp_path / "root", tiny_model_dir, {name: seed}, method="lora", rank=rank, alpha=4)
    legal, support = (load_file(tmp_path / "root" / name / ADAPTER_WEIGHTS) for name in ("legal", "support"))
    shutil.copytree(tmp_path / "root" / "legal", tmp_path / "sum")
    _change_config(r=7, lora_alpha=7)(tmp_path / "sum")
    summed = {
        key: torch.cat([legal[key] * (0.7 * 4 / 2), support[key] * (-0.25 * 4 / 5)], 1)
        if "lora_B" in key
        else torch.cat([legal[key], support[key]])
        for key in legal
    }
    save_file(summed, tmp_path / "sum" / ADAPTER_WEIGHTS)
    blend = resolved(AdapterStore(tmp_path / "root"), "legal*0.7+support*-0.25")
    asked = request([7, 8, 9], blend, 12, top_logprobs=2)
    expected = Alone(tiny_model_dir, tmp_path / "sum").answer(asked)
    with engine_with() as engine:
        assert_same(submit(engine, asked), expected)


# Memory


@pytest.mark.parametrize("kind", ENGINES)
def test_the_last_adapter_of_a_shape_gives_its_memory_back_once_it_was_unloaded_and_comes_back_when_asked_for(
    kind: str, tiny_model_dir: Path, engine_with: Any, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name, rank in (("small", 2), ("other", 2), ("large", 8)):
        write_adapters(root, tiny_model_dir, {name: rank}, method="lora", rank=rank)
    store = AdapterStore(root)
    adapters = {name: resolved(store, name) for name in store.names()}
    asked = {name: request([5, 6, 7], adapter, 30, top_logprobs=0) for name, adapter in adapters.items()}
    expected = {name: Alone(tiny_model_dir, root / name).answer(one) for name, one in asked.items()}
    with engine_with(kind, slots=3) as engine:

        def bank_bytes() -> int:
            return engine.stats().bank_bytes

        for name in ("large", "small", "other"):
            assert_same(submit(engine, asked[name]), expected[name])
        sizes = {shape.rank: slots.bank.vectors.nbytes for shape, slots in engine.bank._slots.items()}
        assert bank_bytes() == sizes[2] + sizes[8] and sizes[8] == 4 * sizes[2]
        bank = weakref.ref(next(slots.bank for shape, slots in engine.bank._slots.items() if shape.rank == 2))
        vectors = weakref.ref(bank().vectors)  # type: ignore[union-attr]  # it is alive
        engine.unload(adapters["other"].identity)
        wait_until(lambda: engine.stats().adapters_resident == 2)
        assert bank_bytes() == sizes[2] + sizes[8]  # another adapter of the shape is loaded
        running = submit(engine, replace(asked["small"], id="running"))
        running.wait_for_token()
        engine.unload(adapters["small"].identity)
        assert_same(running, expected["small"])  # it was in use
        wait_until(lambda: bank_bytes() == sizes[8])
        wait_until(lambda: bank() is None and vectors() is None)
        for name in ("large", "small"):
            assert_same(submit(engine, replace(asked[name], id=f"{name} again")), expected[name])
        assert bank_bytes() == sizes[2] + sizes[8]


def test_a_pass_that_was_recorded_on_a_bank_s_memory_is_not_the_one_on_the_memory_of_the_next_bank(
    tiny_model_dir: Path, adapters_dir: Path
) -> None:
    bank, adapter = ServingBank(tiny_base(tiny_model_dir), 1), resolved(AdapterStore(adapters_dir))
    vectors, found = bank.read(adapter), []
    for _ in range(2):
        slot = bank.acquire(vectors)
        assert slot is not None
        found.append(bank.use([(vectors, slot, 1)], filled_tokens=1))
        bank.unload(adapter.identity)
        bank.release(vectors)
        assert not bank.size_bytes and not bank.needs_layers(vectors)
    first, second = found
    assert first is not None and second is not None
    assert first.key == second.key and first.layers != second.layers
