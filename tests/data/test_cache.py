"""Tokenized rows: cached by everything that they depend on, made by one process or several, the same to the bit."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console
from transformers import ByT5Tokenizer

from qvera.cli.main import main
from qvera.config.sections import DataSection, DataSource
from qvera.data import Datasets, Rows, build_datasets, cache, print_preflight
from qvera.training.trainer import train
from qvera.utils.errors import InputError, RunFailed
from tests.data.rows import byte_tokenizer, same, write_rows
from tests.helpers import start_process, wait_until
from tests.tasks.encoders import word_tokenizer

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "WORTH_BYTES", 10_000)  # so that small sets, quickly tokenized, are kept
    return tmp_path / "cache" / "rows"


@pytest.fixture
def section(tmp_path: Path) -> DataSection:
    chats, _ = write_rows(tmp_path, 40)
    return DataSection(path=chats, template="chatml", eval_fraction=0.1, max_length=256, too_long="split")


def entries() -> list[str]:
    return [entry.name for entry in cache.ROWS.listed()]


def said_of(section: DataSection) -> tuple[Datasets, str]:
    out = io.StringIO()
    return build_datasets(section, byte_tokenizer(), Console(file=out, width=500)), out.getvalue()


def test_a_second_run_finds_the_rows_and_says_so(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Mock(wraps=cache.tokenize_source)
    monkeypatch.setattr(cache, "tokenize_source", made)
    first, second = (build_datasets(section, byte_tokenizer()) for _ in range(2))
    made.assert_called_once()
    assert first.stats.cache_entries == [] and second.stats.cache_entries == entries()
    assert len(entries()) == 1 and same(first, second)
    out = io.StringIO()
    print_preflight(second, byte_tokenizer(), Console(file=out, width=200))
    assert f"found in the cache ({entries()[0]})" in out.getvalue()


def test_without_a_place_for_the_cache_the_rows_are_the_same(
    section: DataSection, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = build_datasets(section, byte_tokenizer())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QVERA_CACHE", str(tmp_path / "file"))
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    unkept, said = said_of(section)
    assert "can't be cached there" in said
    assert same(mapped, unkept)
    assert not list(temporary.iterdir()), "the file has no name any more"
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text().splitlines()
        found = [line for line in maps if str(temporary) in line and "train.arrow" in line]
        assert found and all(line.endswith("(deleted)") for line in found), "and yet is mapped, not held"


def test_rows_that_are_somebody_else_s_leave_no_copy(
    section: DataSection, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    unkept = build_datasets(section, byte_tokenizer(), cached=False)
    assert not root.exists() or not entries()
    assert sorted(tmp_path.rglob("*")) == before
    assert same(unkept, build_datasets(section, byte_tokenizer()))


CHANGES: dict[str, Any] = {
    "template": "zephyr", "max_length": 200, "too_long": "cut-end", "train_on": "last", "eval_fraction": 0.2,
    "eval_limit": 3, "seed": 1, "limit": 30, "system": "Answer in rhyme.", "max_source_length": 50,
    "max_target_length": 20,
}  # fmt: skip


def test_whatever_the_rows_depend_on_makes_another_entry(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    before, auto = build_datasets(section, byte_tokenizer()), section.replace(template="auto")

    def made_anew(what: str, changed: DataSection = section, tokenizer: Any = None) -> Datasets:
        count = len(entries())
        after = build_datasets(changed, tokenizer or byte_tokenizer())
        assert not after.stats.cache_entries and len(entries()) == count + 1, what
        return after

    for key, value in CHANGES.items():
        assert not same(before, made_anew(key, section.replace(**{key: value}))), key
    other = byte_tokenizer()
    other.add_tokens(["question"])
    assert not same(before, made_anew("tokenizer", section, other))
    templated = byte_tokenizer()
    templated.chat_template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    assert not same(made_anew("auto", auto), made_anew("chat template", auto, templated))
    for owner, name, value in ((cache, "code_sha256", "another"), (cache.metadata, "version", "99.0")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, Mock(return_value=value))
            made_anew(name)
    path = Path(section.path)
    size, text = path.stat().st_size, path.read_text(encoding="utf-8")
    path.write_text(text.replace("answer", "ANSWER", 1), encoding="utf-8")
    assert path.stat().st_size == size
    assert not same(before, made_anew("content"))


def test_settings_of_a_tokenizer_that_labelled_rows_depend_on_make_another_entry(tmp_path: Path) -> None:
    rows = [{"text": "say red again", "text_pair": f"say {n}", "label": "ab"[n % 2]} for n in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(path=str(tmp_path / "pairs.jsonl"), format="classification")
    changes = {"model_max_length": (6, 6, False), "model_input_names": (["input_ids", "attention_mask"], 8, True)}
    build_datasets(section, word_tokenizer())
    for name, (value, length, one_type) in changes.items():
        tokenizer = word_tokenizer()
        setattr(tokenizer, name, value)
        found = build_datasets(section, tokenizer)
        assert found.stats.cache_entries == []
        assert len(found.train[0].input_ids) == length
        assert (found.train[0].pair_start is None) == one_type


def test_what_only_arranges_the_rows_makes_none(section: DataSection, tmp_path: Path) -> None:
    _, alpaca = write_rows(tmp_path, 40)
    build_datasets(section, byte_tokenizer())
    section = section.replace(shuffle=False, packing=True, group_by_length=True, prefix_once=False)
    section = section.replace(mixture=[DataSource(path=alpaca, template="alpaca")], weight=0.5, tokenize_processes=2)
    mixed = build_datasets(section, byte_tokenizer())
    assert len(mixed.stats.cache_entries) == 1 == len(entries())
    section = section.replace(eval_fraction=0.0)
    build_datasets(section, byte_tokenizer())
    section = section.replace(seed=7)  # which has nothing to choose then
    assert len(build_datasets(section, byte_tokenizer()).stats.cache_entries) == 1


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(section: DataSection) -> None:
    tokenizer, section = byte_tokenizer(), section.replace(template="auto")
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    build_datasets(section, tokenizer)
    found = build_datasets(section, tokenizer)
    assert found.stats.cache_entries
    assert "26 Jul 2024" in tokenizer.decode(found.train[0].input_ids.tolist())


def test_an_entry_is_on_disk_before_it_has_its_name(
    section: DataSection, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    record, rename = cache.replace_text, Path.rename
    monkeypatch.setattr(cache, "flush", lambda path: order.append(path.name))
    monkeypatch.setattr(cache, "replace_text", lambda path, text: order.append(path.name) or record(path, text))
    monkeypatch.setattr(Path, "rename", lambda self, target: order.append(target.name) or rename(self, target))
    build_datasets(section, byte_tokenizer())
    assert order == ["eval.arrow", "train.arrow", "record.json", *entries(), root.name]


# what becomes of a file's bytes; None: it is gone; and whether `cache verify` sees it
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None], int]] = {
    "a byte": ("train.arrow", lambda data: data[: len(data) // 2] + b"?" + data[len(data) // 2 + 1 :], 1),
    "cut short": ("train.arrow", lambda data: data[: len(data) // 2], 1),
    "missing": ("train.arrow", lambda data: None, 1),
    "record": ("record.json", lambda data: data[:-40], 0),
    "an empty record": ("record.json", lambda data: b"{}", 1),
    "no record": ("record.json", lambda data: None, 0),
}


@pytest.mark.parametrize(("name", "becomes", "code"), DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_entry_is_made_again(
    name: str, becomes: Callable[[bytes], bytes | None], code: int, section: DataSection, root: Path
) -> None:
    first = build_datasets(section, byte_tokenizer())
    (entry,) = entries()
    file = root / entry / name
    data = becomes(file.read_bytes())
    file.unlink()  # the rows of `first` are mapped from it
    if data is not None:
        file.write_bytes(data)
    assert main(["cache", "verify"]) == code
    again, said = said_of(section)
    assert "The rows are tokenized again." in said
    assert again.stats.cache_entries == [] and same(first, again)
    assert build_datasets(section, byte_tokenizer()).stats.cache_entries == [entry]


def test_ls_verify_and_rm(section: DataSection, capsys: pytest.CaptureFixture[str]) -> None:
    data = build_datasets(section, byte_tokenizer())
    (name,) = entries()
    assert main(["cache", "ls"]) == 0
    assert name in (shown := capsys.readouterr().out)
    assert section.path in shown
    assert main(["cache", "ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["finished"] and row["rows"]["train"] >= 36 and row["size_bytes"] > 20_000
    assert main(["cache", "verify", name[:10]]) == 0
    assert main(["cache", "verify", name[:10], "other"]) == 2
    assert "as written" in capsys.readouterr().out
    mapped, unkept = build_datasets(section, byte_tokenizer()), build_datasets(section, byte_tokenizer(), cached=False)
    assert main(["cache", "rm", name[:10]]) == 0
    assert entries() == [] and same(mapped, unkept) and same(data, unkept)  # what is mapped outlives its entry
    assert main(["cache", "rm", name]) == 2


def test_what_a_process_is_opening_stays_and_a_removal_that_was_killed_is_finished(section: DataSection) -> None:
    build_datasets(section, byte_tokenizer())
    (name,) = entries()
    root = cache.ROWS.root
    left = root / ".removed-rows-of-a-killed-rm"
    left.mkdir()
    with FileLock(root / f".{name.removeprefix('rows-')}.lock"):
        assert main(["cache", "rm", name]) == 2
        assert entries() == [name]
        assert not left.exists()
    left.mkdir()
    assert main(["cache", "rm", name]) == 0
    assert name not in entries()
    left.mkdir(exist_ok=True)
    build_datasets(section, byte_tokenizer())
    assert not left.exists()
    assert name in entries()


def test_small_files_and_tokenizers_in_python_are_not_kept(tmp_path: Path, section: DataSection) -> None:
    _, alpaca = write_rows(tmp_path, 40)
    build_datasets(DataSection(path=alpaca, template="plain", format="alpaca"), byte_tokenizer())
    build_datasets(DataSection(path=section.path, template="zephyr", limit=20), ByT5Tokenizer())
    assert entries() == []


def make_and_hang(section: DataSection, mark: Path) -> None:
    def hang(*_: object) -> None:
        mark.touch()
        time.sleep(600)

    cache.replace_text, cache.WORTH_BYTES = hang, 10_000  # type: ignore[assignment]
    build_datasets(section, byte_tokenizer())


def test_a_killed_maker_leaves_nothing_in_the_way(section: DataSection, tmp_path: Path) -> None:
    maker = start_process(make_and_hang, section, tmp_path / "mark")
    wait_until((tmp_path / "mark").exists)
    (unfinished,) = entries()
    assert unfinished.startswith(".unfinished-")
    assert main(["cache", "rm", unfinished]) == 2
    maker.kill()
    maker.join()
    assert build_datasets(section, byte_tokenizer()).stats.cache_entries == []
    assert entries() == [unfinished.replace(".unfinished-", "rows-")]


def test_what_goes_wrong_while_an_entry_is_made(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = cache.tokenize_source, Path(section.path)

    def changing(*arguments: Any) -> Any:
        made = real(*arguments)
        path.write_text(path.read_text(encoding="utf-8") * 2, encoding="utf-8")
        return made

    with monkeypatch.context() as patched:
        patched.setattr(cache, "tokenize_source", changing)
        with pytest.raises(InputError, match="was changed while it was read"):
            build_datasets(section, byte_tokenizer())
    monkeypatch.setattr(cache, "replace_text", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(RunFailed, match="set QVERA_CACHE to a directory on another disk"):
        build_datasets(section, byte_tokenizer())
    assert entries() == []


# --- several runs at once


def both_ends(section: DataSection, monkeypatch: pytest.MonkeyPatch, fails: Exception | None = None) -> tuple[Any, Any]:
    """The data or the error of two processes' worth of work, the second of which comes while the first tokenizes.

    Args:
        fails: what the first meets in place of its rows.
    """
    waits, begun, real = threading.Event(), threading.Event(), cache.tokenize_source
    console = Console(file=io.StringIO(), width=500)
    console.print = lambda text, **_: waits.set() if "another process tokenizes these rows" in text else None  # type: ignore[method-assign]

    def make(*arguments: Any) -> Any:
        if not begun.is_set():
            begun.set()
            assert waits.wait(60)
            if fails is not None:
                raise fails
        return real(*arguments)

    monkeypatch.setattr(cache, "tokenize_source", make)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(build_datasets, section, byte_tokenizer())
        assert begun.wait(60)
        second = threads.submit(build_datasets, section, byte_tokenizer(), console)
    return first.exception() or first.result(), second.exception() or second.result()


def test_who_waits_finds_the_rows_or_makes_them_where_the_first_had_no_disk(
    section: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        first, second = both_ends(section, patched, OSError(28, "No space left on device"))
    assert isinstance(first, RunFailed)
    assert isinstance(second, Datasets) and not second.stats.cache_entries
    assert main(["cache", "rm", "--all"]) == 0
    first, third = both_ends(section, monkeypatch)
    assert not first.stats.cache_entries and third.stats.cache_entries == entries()
    assert same(first, second) and same(first, third)


def test_wrong_rows_are_read_once_for_all_who_wait_and_again_by_who_comes_later(
    section: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, path = section.replace(eval_fraction=0.0), Path(section.path)
    good = path.read_text(encoding="utf-8")
    path.write_text(good + json.dumps({"messages": [{"role": "wizard", "content": "x"}]}), encoding="utf-8")
    made = Mock(wraps=cache.tokenize_source)
    monkeypatch.setattr(cache, "tokenize_source", made)
    first, second = both_ends(section, monkeypatch)
    assert isinstance(first, InputError) and isinstance(second, InputError)
    assert str(first) == str(second) and f"{path}:41" in str(first)
    assert made.call_count == 1
    with pytest.raises(InputError, match="wizard"):
        build_datasets(section, byte_tokenizer())
    assert made.call_count == 2
    path.write_text(good, encoding="utf-8")
    assert len(build_datasets(section, byte_tokenizer()).train) >= 36


# --- rows as a sequence


def test_rows_are_a_sequence(section: DataSection) -> None:
    rows = build_datasets(section, byte_tokenizer()).train
    sources = [row.source for row in rows]
    assert isinstance(rows, Rows)
    assert rows[-1].source == sources[-1]
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert [row.source for row in rows[5:20:3]] == sources[5:20:3]
    assert not rows[:0] and len(rows[:0].lengths) == 0
    picked = rows.take(np.array([9, 9, 2]))
    assert [row.source for row in picked] == [sources[9], sources[9], sources[2]]
    assert picked.lengths.tolist() == [len(row.input_ids) for row in picked]
    assert picked.trained_tokens.tolist() == [row.trained_tokens for row in picked]


def test_a_hub_set_is_known_by_its_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    one, other = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:-1])
    found = []
    for here in (one, one, other):
        monkeypatch.setattr(datasets, "load_dataset", Mock(return_value=here))
        found.append(build_datasets(DataSection(path="someone/questions", template="plain"), byte_tokenizer()))
    assert [len(data.stats.cache_entries) for data in found] == [0, 1, 0]
    assert same(*found[:2]) and len(found[2].train) == 39
    assert found[0].train[3].source == "someone/questions[train] row 4"


def test_a_run_on_found_rows_is_the_run_and_resumes(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WORTH_BYTES", 0)
    recipe = make_recipe(data={"packing": True}, training={"max_steps": 2, "save_steps": 1})
    first, second = (train(recipe, tmp_path / name) for name in ("first", "second"))
    assert first is not None and second is not None
    assert first.run["data"] == second.run["data"] and len(entries()) == 1
    made, found = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("first", "second"))
    assert found.read_bytes() == made.read_bytes()
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "step-00000002")
    shutil.rmtree(found.parent)
    recipe = recipe.replace(data=recipe.data.replace(tokenize_processes=2))  # another machine may have other cores
    train(recipe, tmp_path / "second", resume=True)
    assert found.read_bytes() == made.read_bytes()
