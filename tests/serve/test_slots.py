"""Adapter files that are replaced, damaged, foreign or blended while an engine answers from them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvera.adapters.files import save_load
from qvera.adapters.files.save_load import attach
from qvera.config.schema import AdapterSection
from qvera.serve.opening import open_served, warm_up
from qvera.serve.requests import AdapterChanged, EndEvent, ResolvedAdapter
from qvera.serve.store import AdapterStore
from qvera.utils.errors import InputError
from qvera.utils.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.adapters.helpers import perturb
from tests.conftest import small_llama, small_tokenizer
from tests.serve.helpers import Alone, assert_same, request, submit, tiny_base, write_adapters


def _resolve(store: AdapterStore, name: str) -> ResolvedAdapter:
    adapter = store.resolve(name)
    assert adapter is not None
    return adapter


def _copy(adapters_dir: Path, root: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(adapters_dir / name, root / name)


def _replace(new: Path, old: Path) -> None:
    """As `save_adapter` does it: the new one gets its place by its name."""
    old.rename(old.with_name(".old"))
    shutil.copytree(new, old)


def test_a_replaced_file_answers_new_requests_while_those_that_run_finish_on_the_old_vectors(
    engine_with: Any, adapters_dir: Path, tmp_path: Path, alone: Any
) -> None:
    _copy(adapters_dir, tmp_path, "a1")
    store = AdapterStore(tmp_path)
    old = request([3, 4, 5], _resolve(store, "a1"), 60, top_logprobs=0)
    waits = request([3, 4, 5], _resolve(store, "a1"), 5, top_logprobs=0)
    new_vectors = alone(adapters_dir / "a2").answer(request([3, 4, 5], None, 5, top_logprobs=0))
    old_vectors = alone(adapters_dir / "a1").answer(old)
    with engine_with(max_running=1) as engine:
        running, waiting = submit(engine, old), submit(engine, waits)
        running.wait_for_token()
        _replace(adapters_dir / "a2", tmp_path / "a1")
        new = request([3, 4, 5], _resolve(store, "a1"), 5, top_logprobs=0)
        assert new.adapter is not None
        assert old.adapter is not None
        assert new.adapter.identity != old.adapter.identity
        after = submit(engine, new)
        assert_same(running, old_vectors)
        assert_same(waiting, old_vectors[:5])
        assert_same(after, new_vectors)


def test_a_file_replaced_between_resolve_and_submit_has_to_be_resolved_again(
    engine_with: Any, adapters_dir: Path, tmp_path: Path
) -> None:
    _copy(adapters_dir, tmp_path, "a1")
    store = AdapterStore(tmp_path)
    stale = _resolve(store, "a1")
    _replace(adapters_dir / "a2", tmp_path / "a1")
    with engine_with() as engine:
        with pytest.raises(AdapterChanged, match="ask again"):
            submit(engine, request([3], stale))
        assert submit(engine, request([3], _resolve(store, "a1"))).end() == EndEvent("length")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_adapter_that_is_saved_anew_is_whole_and_never_missing(
    tiny_model_dir: Path, tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(tiny_model_dir)
    model = attach(base.model, AdapterSection(rank=8), str(tiny_model_dir), base.facts.get("fingerprint"))
    if not can_exchange:
        monkeypatch.setattr(save_load, "exchange", lambda *paths: False)
    save_load.save_adapter(model, tmp_path / "anna")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "anna").rename(elsewhere)
    (tmp_path / "anna").symlink_to(elsewhere)  # replaced as a name, and what it leads to stays
    store, missing, done = AdapterStore(tmp_path), [0], threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            try:
                store.resolve("anna")
            except InputError:
                missing[0] += 1

    asking = threading.Thread(target=keep_asking)
    asking.start()
    for seed in range(12):
        perturb(model, seed=seed)
        save_load.save_adapter(model, tmp_path / "anna")
        saved = load_file(tmp_path / "anna" / ADAPTER_WEIGHTS)
        assert all(torch.equal(saved[key], vector) for key, vector in save_load.named_vectors(model).items())
    done.set()
    asking.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anna", "elsewhere"]
    assert (elsewhere / ADAPTER_WEIGHTS).is_file()
    if can_exchange and sys.platform == "linux":
        assert not missing[0]


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
    "cut short": (lambda directory: os.truncate(directory / ADAPTER_WEIGHTS, 1000), "cut short"),
    "garbage": (
        lambda directory: (directory / ADAPTER_WEIGHTS).write_bytes(b"\xff" * 4096),
        "not a readable safetensors file",
    ),
    "nan": (_change_first_vector(float("nan")), "NaN or Inf"),
    "lacks a vector": (_change_first_vector(None), "has the shape None"),
    "another base": (_change_config(base_fingerprint="0" * 64), "another base model"),
    "other projections": (_change_config(projection_sha256="0" * 64), "made by another generator"),
    "another rank": (_change_config(rank=9), "rank is 9"),
    "not ours": (_change_config(peft_type="IA3"), "peft_type is IA3"),
    "config is a list": (lambda directory: (directory / ADAPTER_CONFIG).write_text("[]"), "holds a list"),
    "no vectors": (lambda directory: (directory / ADAPTER_WEIGHTS).unlink(), "can't be read"),
}


def test_a_damaged_or_foreign_adapter_is_refused_by_name_and_the_others_go_on(
    engine_with: Any, adapters_dir: Path, tmp_path: Path, alone: Any
) -> None:
    _copy(adapters_dir, tmp_path, "a1")
    for name, (damage, _) in DAMAGES.items():
        shutil.copytree(adapters_dir / "a2", tmp_path / name)
        damage(tmp_path / name)
    store = AdapterStore(tmp_path)
    good = request([3, 4], _resolve(store, "a1"), 30)
    expected = alone(adapters_dir / "a1").answer(good)
    with engine_with() as engine:
        answer = submit(engine, good)
        for name, (_, message) in DAMAGES.items():
            with pytest.raises(InputError, match=message):
                submit(engine, request([3], store.resolve(name)))
            with pytest.raises(InputError, match=message):
                engine.load(_resolve(store, name))
        assert_same(answer, expected)
        assert engine.stats().dead is None


def test_an_adapter_of_a_model_of_other_shapes_is_refused(engine_with: Any, tmp_path: Path) -> None:
    other = tmp_path / "other model"
    small_llama(hidden_size=32).to(torch.bfloat16).save_pretrained(other)
    small_tokenizer().save_pretrained(other)
    write_adapters(tmp_path / "adapters", other, {"foreign": 1})
    _change_config(base_fingerprint=None)(tmp_path / "adapters" / "foreign")  # nothing but the shapes tells
    store = AdapterStore(tmp_path / "adapters")
    with engine_with() as engine, pytest.raises(InputError, match="this base and the adapter's config need"):
        submit(engine, request([3], store.resolve("foreign")))


def test_methods_that_are_not_vectors_of_one_pair_are_refused(
    tiny_model_dir: Path, engine_with: Any, tmp_path: Path
) -> None:
    for name, settings in {"dvora": {"magnitude": True}, "lora": {"method": "lora", "alpha": 8.0}}.items():
        write_adapters(tmp_path, tiny_model_dir, {name: 1}, **settings)
    store = AdapterStore(tmp_path)
    with engine_with() as engine:
        for name in store.names():
            with pytest.raises(InputError, match="not served beside other adapters"):
                submit(engine, request([3], store.resolve(name)))


def test_one_adapter_that_cannot_be_served_is_refused_before_its_base_is_loaded(
    tiny_model_dir: Path, adapters_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapters(tmp_path, tiny_model_dir, {"dvora": 1}, magnitude=True)
    shutil.copytree(adapters_dir / "a1", tmp_path / "tokens")
    _change_config(added_tokens={"<call>": 300})(tmp_path / "tokens")
    served = open_served(str(tmp_path / "dvora"), adapters_dir)  # it says which base the others have
    assert served.own is None
    assert {"dvora", "a1"} <= set(served.store.names())
    monkeypatch.setattr("qvera.models.loader.load_base", lambda *_, **__: pytest.fail("a base was loaded"))
    with pytest.raises(InputError, match=r"not served beside other adapters.*export --to merged"):
        open_served(str(tmp_path / "dvora"))
    with pytest.raises(InputError, match=r"adds the tokens <call>, whose rows are not served.*export --to merged"):
        open_served(str(tmp_path / "tokens"))


def test_a_blend_of_adapters_with_one_d_answers_by_the_weighted_sum_of_their_b(
    tiny_model_dir: Path, engine_with: Any, tmp_path: Path
) -> None:
    write_adapters(tmp_path, tiny_model_dir, {"legal": 1, "support": 2}, train_d=False)
    first, second = (load_file(tmp_path / name / ADAPTER_WEIGHTS) for name in ("legal", "support"))
    fixed = {key: vector for key, vector in first.items() if key.endswith("_d")}
    save_file({**second, **fixed}, tmp_path / "support" / ADAPTER_WEIGHTS)
    shutil.copytree(tmp_path / "legal", tmp_path.parent / "sum")
    summed = {key: 0.7 * second[key] + 0.25 * vector if key.endswith("_b") else vector for key, vector in first.items()}
    save_file(summed, tmp_path.parent / "sum" / ADAPTER_WEIGHTS)
    store = AdapterStore(tmp_path)
    blend = _resolve(store, "support*0.7+legal*0.25")
    assert blend.identity == _resolve(store, "legal*0.25+support*0.7").identity
    assert blend.identity != _resolve(store, "support*0.25+legal*0.7").identity
    assert _resolve(store, "legal*1").identity == _resolve(store, "legal").identity
    asked = request([7, 8, 9], blend, 12, top_logprobs=2)
    expected = Alone(tiny_model_dir, tmp_path.parent / "sum").answer(asked)
    with engine_with() as engine:
        assert_same(submit(engine, asked), expected)


def test_a_blend_of_adapters_that_differ_in_more_than_b_is_refused_with_the_reason(
    tiny_model_dir: Path, engine_with: Any, tmp_path: Path
) -> None:
    write_adapters(tmp_path, tiny_model_dir, {"one": 1, "two": 2})
    write_adapters(tmp_path, tiny_model_dir, {"seeded": 1}, seed=4)
    store = AdapterStore(tmp_path)
    with engine_with() as engine:
        with pytest.raises(InputError, match="one and two have different vectors d"):
            submit(engine, request([3], store.resolve("one*0.5+two*0.5")))
        with pytest.raises(InputError, match="one and seeded differ in seed"):
            submit(engine, request([3], store.resolve("one*0.5+seeded*0.5")))


def test_a_server_that_starts_makes_the_layers_of_the_first_adapter_that_is_whole(
    engine_with: Any, adapters_dir: Path, tmp_path: Path
) -> None:
    _copy(adapters_dir, tmp_path, "a1", "a2", "a3")
    (tmp_path / "a1" / ADAPTER_WEIGHTS).write_bytes(b"cut")
    store = AdapterStore(tmp_path)
    with engine_with() as engine:
        warm_up(engine, AdapterStore(None))  # there is none: nothing is done
        assert engine.stats().adapters_resident == 0
        warm_up(engine, store)
        assert engine.stats().adapters_resident == 1
        assert not engine.bank.needs_layers(engine.bank.read(_resolve(store, "a3")))
