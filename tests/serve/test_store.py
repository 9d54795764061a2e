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
from qvera.utils.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.many_adapters import NAMES, write_run


@pytest.fixture(scope="module")
def run_dir(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained adapters for customers with names of all kinds."""
    return write_run(tmp_path_factory.mktemp("served") / "run", make_recipe())


def _write(directory: Path, content: bytes = b"vectors") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ADAPTER_CONFIG).write_text('{"peft_type": "QVERA"}')
    (directory / ADAPTER_WEIGHTS).write_bytes(content)


def _age(directory: Path) -> None:
    """As if it was written an hour ago."""
    for path in (directory, *directory.iterdir()):
        facts = path.stat()
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns - 3_600 * 10**9))


def test_names_are_those_of_the_data_whatever_they_are_and_never_paths(run_dir: Path) -> None:
    store = AdapterStore(run_dir, base_names=["tiny"])
    assert store.names() == sorted(NAMES)
    identities = set()
    for name in NAMES:
        adapter = store.resolve(name)
        assert adapter is not None
        assert adapter.name == name
        assert adapter.parts[0].directory.parent == run_dir / "adapters"
        identities.add(adapter.identity)
    assert len(identities) == len(NAMES)
    assert store.resolve("tiny") is None
    for name in ("../adapters/anna", "./anna", str(run_dir / "adapters" / "anna"), "", ".", "..", "anna/", "ann"):
        with pytest.raises(UnknownAdapter):
            store.resolve(name)
    with pytest.raises(UnknownAdapter, match="did you mean 'anna'"):
        store.resolve("ana")


def test_facts_are_those_of_the_files_and_of_the_run(run_dir: Path) -> None:
    facts = AdapterStore(run_dir).facts("Ben & Söhne")
    files = [facts["directory"] / name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    assert facts["size_bytes"] == sum(len(file.read_bytes()) for file in files)
    assert (facts["rank"], facts["rows"], facts["loss_before"], facts["loss"]) == (8, 7, 2.4, 1.5)
    assert facts["base"] is not None
    assert facts["base"].endswith("tiny-llama")
    with pytest.raises(UnknownAdapter):
        AdapterStore(run_dir).facts("nan")  # run.json has it, but it was not saved


def test_facts_of_a_run_of_one_adapter(trained_run: Path) -> None:
    store = AdapterStore(None)
    store.add("mine", trained_run / "adapter")
    facts, run = store.facts("mine"), json.loads((trained_run / "run.json").read_text())
    assert facts["rows"] == run["data"]["train_rows"]
    assert (facts["loss_before"], facts["loss"]) == tuple(
        run["result"][when]["loss"] for when in ("eval_before", "eval_after")
    )


def test_a_new_name_means_neither_the_base_nor_a_sum_of_others(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path, base_names=["tiny"])
    for name in ("a", "b*2"):
        _write(tmp_path / directory_names([name])[name])
    assert store.directory_for("a*x") == tmp_path / "a=2Ax"
    assert store.directory_for("b*2") == tmp_path / "b=2A2"
    for name in ("tiny", "a*0.5", "a*0.5+b*2*1"):
        with pytest.raises(InputError, match="is the name of the base|means a sum of adapters"):
            store.directory_for(name)


def test_an_adapter_that_is_called_like_the_base_is_not_listed_but_told(tmp_path: Path) -> None:
    """Its name means the base, so listed it would be answered for by the base."""
    for name in ("base", "a"):
        _write(tmp_path / name)
    store = AdapterStore(tmp_path, base_names=["base"])
    assert store.names() == ["a"]
    assert store.hidden_names() == ["base"]
    assert store.resolve("base") is None
    with pytest.raises(UnknownAdapter):
        store.parts_of("base*0.5+a*0.5")


def test_what_is_trained_under_a_name_is_not_written_over_an_adapter_that_lies_elsewhere(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "root", base_names=["tiny"])
    for directory in ("root/a", "root/b", "run/adapter"):
        _write(tmp_path / directory)
    store.add("served", tmp_path / "run" / "adapter")
    store.add("a", tmp_path / "root" / "b", replace=True)
    for name in ("served", "a"):
        with pytest.raises(InputError, match="is the name of an adapter in another directory"):
            store.directory_for(name)
    assert store.directory_for("b") == tmp_path / "root" / "b"


def test_one_of_ten_thousand_is_found_by_four_looks_and_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"customer {i}" for i in range(10_000)]
    for name, directory in directory_names(names).items():
        (tmp_path / directory).mkdir()
        if name == names[7_000]:
            _write(tmp_path / directory)
            _age(tmp_path / directory)
    _age_root = tmp_path.stat()
    os.utime(tmp_path, ns=(_age_root.st_atime_ns, _age_root.st_mtime_ns - 3_600 * 10**9))
    looks, opened = [], []
    stat, read_bytes, scandir = Path.stat, Path.read_bytes, os.scandir
    monkeypatch.setattr(Path, "stat", lambda self, **kw: (looks.append(self), stat(self, **kw))[1])
    monkeypatch.setattr(Path, "read_bytes", lambda self: (opened.append(self), read_bytes(self))[1])
    monkeypatch.setattr(os, "scandir", lambda path: (opened.append(path), scandir(path))[1])
    store = AdapterStore(tmp_path)
    first = store.resolve(names[7_000])
    assert len(looks) <= 4
    assert len(opened) == 3  # the directory of all is listed once, and two files read
    again = store.resolve(names[7_000])
    assert again == first
    assert len(looks) <= 8
    assert len(opened) == 3


def test_a_file_changed_in_place_is_another_adapter_even_within_one_tick_and_of_the_same_size(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    _write(tmp_path / "a", b"one")
    first = store.resolve("a")
    file = tmp_path / "a" / ADAPTER_WEIGHTS
    facts = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    second = store.resolve("a")
    assert first is not None
    assert second is not None
    assert first.identity != second.identity
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copied = store.resolve("b")
    assert copied is not None
    assert copied.identity == second.identity


def test_adapters_come_and_go_while_the_store_is_open(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "later", base_names=["base"])
    assert store.names() == []
    _write(tmp_path / "later" / "a")
    _write(tmp_path / "elsewhere")
    assert store.names() == ["a"]
    store.add("guest", tmp_path / "elsewhere")
    assert store.names() == ["a", "guest"]
    store.add("guest", tmp_path / "elsewhere")
    store.remove("guest")
    store.remove("a")
    assert store.names() == []
    with pytest.raises(UnknownAdapter):
        store.remove("a")
    store.add("a", tmp_path / "later" / "a")
    assert store.names() == ["a"]
    for name, directory, message in (
        ("a", tmp_path / "elsewhere", "name of another adapter"),
        ("base", tmp_path / "elsewhere", "name of the base"),
        (" ", tmp_path / "elsewhere", "is empty"),
        ("new", tmp_path / "nowhere", "is missing"),
    ):
        with pytest.raises(InputError, match=message):
            store.add(name, directory)
    shutil.rmtree(tmp_path / "later" / "a")
    with pytest.raises(UnknownAdapter):
        store.resolve("a")


def test_a_name_is_taken_for_a_blend_only_where_no_adapter_has_it(tmp_path: Path) -> None:
    for name, directory in directory_names(["a", "b", "a*0.5+b*0.5"]).items():
        _write(tmp_path / directory, name.encode())
    store = AdapterStore(tmp_path)
    named = store.resolve("a*0.5+b*0.5")
    assert named is not None
    assert len(named.parts) == 1
    assert store.parts_of("a*0.5+b*0.5") == ["a*0.5+b*0.5"]
    blend = store.resolve("a*0.5+b*-1e-1")
    assert blend is not None
    assert [(part.weight, part.directory.name) for part in blend.parts] == [(0.5, "a"), (-0.1, "b")]
    for bad in ("a*", "a*x", "a*nan", "a*1e999", "*1", "a*0.5+", "a*0.5+c*0.5", "a+b"):
        with pytest.raises(UnknownAdapter):
            store.resolve(bad)
        with pytest.raises(UnknownAdapter):
            store.parts_of(bad)
    assert store.parts_of("b*2+a*0.5+b*1") == ["b", "a"]
    with pytest.raises(InputError, match="at most 8"):
        for i in range(9):
            _write(tmp_path / f"n{i}")
        store.resolve("+".join(f"n{i}*0.1" for i in range(9)))
