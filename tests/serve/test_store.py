"""Names of adapters: what they mean now, found without reading the others."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qvera.serve.requests import UnknownAdapter
from qvera.serve.store import AdapterStore
from qvera.utils.adapter_names import directory_names
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.many_adapters import NAMES, write_run
from tests.serve.helpers import resolved
from tests.serve.scripted_training import write_files


@pytest.fixture(scope="module")
def run_dir(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained adapters for customers with names of all kinds."""
    return write_run(tmp_path_factory.mktemp("served") / "run", make_recipe())


def _age(path: Path) -> None:
    """As if it was written an hour ago."""
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns - 3_600 * 10**9))


def test_names_are_those_of_the_data_whatever_they_are_and_never_paths(run_dir: Path) -> None:
    store = AdapterStore(run_dir, base_names=["tiny"])
    assert store.names() == sorted(NAMES)
    adapters = [resolved(store, name) for name in NAMES]
    assert [adapter.name for adapter in adapters] == list(NAMES)
    assert {adapter.parts[0].directory.parent for adapter in adapters} == {run_dir / "adapters"}
    assert len({adapter.identity for adapter in adapters}) == len(NAMES)
    assert store.resolve("tiny") is None
    for name in ("../adapters/anna", "./anna", str(run_dir / "adapters" / "anna"), "", ".", "..", "anna/", "ann"):
        with pytest.raises(UnknownAdapter):
            store.resolve(name)
    with pytest.raises(UnknownAdapter, match="did you mean 'anna'"):
        store.resolve("ana")


def test_facts_are_those_of_the_files_and_of_the_run(run_dir: Path, trained_run: Path) -> None:
    store = AdapterStore(run_dir)
    facts = store.facts("Ben & Söhne")
    assert facts["size_bytes"] == sum(
        (facts["directory"] / n).stat().st_size for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    )
    assert (facts["rank"], facts["rows"], facts["loss_before"], facts["loss"]) == (8, 7, 2.4, 1.5)
    assert str(facts["base"]).endswith("tiny-llama")
    with pytest.raises(UnknownAdapter):
        store.facts("nan")  # run.json has it, but it was not saved
    store.add("mine", trained_run / "adapter")  # of a run of one
    facts, run = store.facts("mine"), json.loads((trained_run / "run.json").read_text())
    before, after = (run["result"][when]["loss"] for when in ("eval_before", "eval_after"))
    assert (facts["rows"], facts["loss_before"], facts["loss"]) == (run["data"]["train_rows"], before, after)


def test_a_new_adapter_gets_a_name_that_means_nothing_else_and_a_place_where_nothing_else_lies(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name, directory in directory_names(["a", "b", "b*2", "tiny"]).items():
        write_files(root / directory, name.encode())
    write_files(tmp_path / "run" / "adapter")
    store = AdapterStore(root, base_names=["tiny"])
    # listed, it would be answered for by the base
    assert (store.names(), store.hidden_names(), store.resolve("tiny")) == (["a", "b", "b*2"], ["tiny"], None)
    with pytest.raises(UnknownAdapter):
        store.parts_of("tiny*0.5+a*0.5")
    assert [store.directory_for(name).name for name in ("a*x", "b*2", "b")] == ["a=2Ax", "b=2A2", "b"]
    store.add("served", tmp_path / "run" / "adapter")
    store.add("a", root / "b", replace=True)
    for names, message in (
        (("tiny",), "is the name of the base"),
        (("a*0.5", "a*0.5+b*2*1"), "means a sum of adapters"),
        (("served", "a"), "is the name of an adapter in another directory"),
    ):
        for name in names:
            with pytest.raises(InputError, match=message):
                store.directory_for(name)


def test_one_of_thousands_is_found_without_reading_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "customer 7000"
    for i in range(3_000):
        (tmp_path / f"other-{i}").mkdir()
    directory = tmp_path / directory_names([name])[name]
    write_files(directory)
    for path in (*directory.iterdir(), directory, tmp_path):
        _age(path)
    opened, read_bytes, scandir = list[object](), Path.read_bytes, os.scandir
    monkeypatch.setattr(Path, "read_bytes", lambda self: (opened.append(self), read_bytes(self))[1])
    monkeypatch.setattr(os, "scandir", lambda path: (opened.append(path), scandir(path))[1])
    store = AdapterStore(tmp_path)
    assert store.resolve(name) == store.resolve(name)
    assert len(opened) == 3  # the directory of all is listed once, and two files read


def test_a_file_changed_in_place_is_another_adapter_even_within_one_tick_and_of_the_same_size(tmp_path: Path) -> None:
    store, file = AdapterStore(tmp_path), tmp_path / "a" / ADAPTER_WEIGHTS
    write_files(tmp_path / "a", b"one")
    first, facts = resolved(store, "a"), file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    second = resolved(store, "a")
    assert first.identity != second.identity
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert resolved(store, "b").identity == second.identity


def test_a_name_that_was_given_to_another_directory_can_be_given_back_and_be_forgotten(tmp_path: Path) -> None:
    write_files(own := tmp_path / "a", b"a")
    write_files(other := tmp_path / "b", b"b")
    store = AdapterStore(tmp_path)
    store.remove("a")
    for directory in (other, own, other):
        assert store.add("a", directory, replace=True) != directory
        assert resolved(store, "a").parts[0].directory == directory
    store.remove("a")
    assert store.names() == ["b"]


def test_adapters_come_and_go_while_the_store_is_open(tmp_path: Path) -> None:
    later, elsewhere = tmp_path / "later", tmp_path / "elsewhere"
    store = AdapterStore(later, base_names=["base"])
    assert store.names() == []
    write_files(later / "a")
    write_files(elsewhere)
    assert store.names() == ["a"]
    (later / "run").mkdir()
    (later / "run" / "recipe.yaml").touch()
    with pytest.raises(InputError, match="later/run: is a run, not an adapter"):
        store.resolve("run")
    shutil.rmtree(later / "run")
    for _ in range(2):
        store.add("guest", elsewhere)
        assert store.names() == ["a", "guest"]
    for name in ("guest", "a"):
        store.remove(name)
    assert store.names() == []
    with pytest.raises(UnknownAdapter):
        store.remove("a")
    store.add("a", later / "a")
    assert store.names() == ["a"]
    for name, directory, message in (
        ("a", elsewhere, "name of another adapter"),
        ("base", elsewhere, "name of the base"),
        (" ", elsewhere, "is empty"),
        ("new", tmp_path / "nowhere", "is missing"),
    ):
        with pytest.raises(InputError, match=message):
            store.add(name, directory)
    shutil.rmtree(later / "a")
    with pytest.raises(UnknownAdapter):
        store.resolve("a")


def test_a_directory_that_is_called_by_no_text_is_listed_with_the_others(tmp_path: Path) -> None:
    write_files(tmp_path / "a")
    write_files(tmp_path / os.fsdecode(b"b\xff"))
    store = AdapterStore(tmp_path)
    assert store.names() == ["a", "b?"]
    assert resolved(store, "b?").parts[0].sha256 == resolved(store, "a").parts[0].sha256


def test_a_name_is_taken_for_a_blend_only_where_no_adapter_has_it(tmp_path: Path) -> None:
    named = "a*0.5+b*0.5"
    for name, directory in directory_names(["a", "b", named, *(f"n{i}" for i in range(9))]).items():
        write_files(tmp_path / directory, name.encode())
    store = AdapterStore(tmp_path)
    assert len(resolved(store, named).parts) == 1
    assert store.parts_of(named) == [named]
    blend = resolved(store, "a*0.5+b*-1e-1")
    assert [(part.weight, part.directory.name) for part in blend.parts] == [(0.5, "a"), (-0.1, "b")]
    assert store.parts_of("b*2+a*0.5+b*1") == ["b", "a"]
    for bad in ("a*", "a*x", "a*nan", "a*1e999", "*1", "a*0.5+", "a*0.5+c*0.5", "a+b"):
        for ask in (store.resolve, store.parts_of):
            with pytest.raises(UnknownAdapter):
                ask(bad)
    with pytest.raises(InputError, match="at most 8"):
        store.resolve("+".join(f"n{i}*0.1" for i in range(9)))
