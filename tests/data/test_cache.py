"""Tokenized rows: cached by everything that they depend on, made by one process or several, the same to the bit."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qvera.cli.main import main
from qvera.config.schema import DataSection, DataSource
from qvera.data import Datasets, Rows, build_datasets, cache, print_preflight
from qvera.training.trainer import train
from qvera.utils.errors import InputError, RunFailed
from tests.data.rows import byte_tokenizer, same, write_rows
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


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that are tokenized from now on."""
    made: list[str] = []
    real = cache.tokenize_source

    def spy(section: DataSection, *rest: Any) -> Any:
        made.append(section.path)
        return real(section, *rest)

    monkeypatch.setattr(cache, "tokenize_source", spy)
    return made


def test_a_second_run_finds_the_rows_and_says_so(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    made = counting(monkeypatch)
    first = build_datasets(section, byte_tokenizer())
    assert first.stats.cache_entries == []
    second = build_datasets(section, byte_tokenizer())
    assert made == [section.path]
    assert second.stats.cache_entries == entries()
    assert len(entries()) == 1
    assert same(first, second)
    out = io.StringIO()
    print_preflight(second, byte_tokenizer(), Console(file=out, width=200))
    assert f"found in the cache ({entries()[0]})" in out.getvalue()


def test_without_a_place_for_the_cache_the_rows_are_the_same(
    section: DataSection, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = build_datasets(section, byte_tokenizer())
    assert entries()
    blocked = root.parent.parent / "file"
    blocked.write_text("")
    monkeypatch.setenv("QVERA_CACHE", str(blocked))
    out = io.StringIO()
    temporary = root.parent.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    unkept = build_datasets(section, byte_tokenizer(), Console(file=out, width=500))
    assert "can't be cached there" in out.getvalue()
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


def _other_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["question"])
    return tokenizer


def _other_template() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    return tokenizer


CHANGES: dict[str, Any] = {
    "template": "zephyr", "max_length": 200, "too_long": "cut-end", "train_on": "last", "eval_fraction": 0.2,
    "eval_limit": 3, "seed": 1, "limit": 30, "system": "Answer in rhyme.", "max_source_length": 50,
    "max_target_length": 20,
}  # fmt: skip


def test_whatever_the_rows_depend_on_makes_another_entry(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    before, auto = build_datasets(section, byte_tokenizer()), section.replace(template="auto")

    def made_anew(what: str, changed: DataSection = section, tokenizer: Any = None) -> Datasets:
        tokenizer, count = tokenizer or byte_tokenizer(), len(entries())
        after = build_datasets(changed, tokenizer)
        assert not after.stats.cache_entries and len(entries()) == count + 1, what
        assert same(after, build_datasets(changed, tokenizer, cached=False)), what
        return after

    for key, value in CHANGES.items():
        assert not same(before, made_anew(key, section.replace(**{key: value}))), key
    assert not same(before, made_anew("tokenizer", section, _other_tokenizer()))
    assert not same(made_anew("auto", auto), made_anew("chat template", auto, _other_template()))
    with monkeypatch.context() as patched:
        patched.setattr(cache, "code_sha256", lambda: "another")
        made_anew("code")
    with monkeypatch.context() as patched:
        patched.setattr(cache.metadata, "version", lambda name: "99.0")
        made_anew("a library")
    path = Path(section.path)
    size, text = path.stat().st_size, path.read_text(encoding="utf-8")
    path.write_text(text.replace("answer", "ANSWER", 1), encoding="utf-8")
    assert path.stat().st_size == size
    assert not same(before, made_anew("content"))


def _short(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.model_max_length = 6


def _without_types(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.model_input_names = ["input_ids", "attention_mask"]


@pytest.mark.parametrize("change", [_short, _without_types])
def test_settings_of_a_tokenizer_that_labelled_rows_depend_on_make_another_entry(
    change: Callable[[PreTrainedTokenizerFast], None], tmp_path: Path
) -> None:
    rows = [{"text": "say red again", "text_pair": f"say {n}", "label": "ab"[n % 2]} for n in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(path=str(tmp_path / "pairs.jsonl"), format="classification")
    build_datasets(section, word_tokenizer())
    assert len(entries()) == 1
    tokenizer = word_tokenizer()
    change(tokenizer)
    found = build_datasets(section, tokenizer)
    assert found.stats.cache_entries == []
    assert len(found.train[0].input_ids) == (6 if change is _short else 8)
    assert (found.train[0].pair_start is None) == (change is _without_types)


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


def _dated() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    )
    return tokenizer


def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(section: DataSection) -> None:
    section = section.replace(template="auto")
    build_datasets(section, _dated())
    found = build_datasets(section, _dated())
    assert found.stats.cache_entries
    assert "26 Jul 2024" in _dated().decode(found.train[0].input_ids.tolist())


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


@pytest.mark.parametrize("damage", ["a byte", "cut short", "missing", "record", "an empty record", "no record"])
def test_a_damaged_entry_is_made_again(damage: str, section: DataSection, root: Path) -> None:
    first = build_datasets(section, byte_tokenizer())
    whole = [row.input_ids.tolist() for row in first.train]
    (name,) = entries()
    table, record = root / name / "train.arrow", root / name / "record.json"
    data = bytearray(table.read_bytes())
    replaced = root / name / "new"
    if damage == "a byte":
        data[len(data) // 2] ^= 1
        replaced.write_bytes(data)
        replaced.rename(table)
    elif damage == "cut short":
        replaced.write_bytes(data[: len(data) // 2])
        replaced.rename(table)
    elif damage == "missing":
        table.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:-40])
    elif damage == "an empty record":
        record.write_text("{}")
    else:
        record.unlink()
    assert main(["cache", "verify"]) == (0 if damage in ("record", "no record") else 1)
    out = io.StringIO()
    again = build_datasets(section, byte_tokenizer(), Console(file=out, width=500))
    assert "The rows are tokenized again." in out.getvalue()
    assert again.stats.cache_entries == []
    assert [row.input_ids.tolist() for row in again.train] == whole
    assert build_datasets(section, byte_tokenizer()).stats.cache_entries == [name]


def test_rows_that_are_mapped_outlive_their_entry(section: DataSection, root: Path) -> None:
    build_datasets(section, byte_tokenizer())
    data = build_datasets(section, byte_tokenizer())
    ids = [row.input_ids.tolist() for row in data.train]
    assert main(["cache", "rm", "--all"]) == 0
    assert entries() == []
    assert [row.input_ids.tolist() for row in data.train] == ids


def test_ls_verify_and_rm(section: DataSection, capsys: pytest.CaptureFixture[str]) -> None:
    build_datasets(section, byte_tokenizer())
    (name,) = entries()
    assert main(["cache", "ls"]) == 0
    assert name in (shown := capsys.readouterr().out)
    assert section.path in shown
    assert main(["cache", "ls", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["finished"]
    assert row["rows"]["train"] >= 36
    assert row["size_bytes"] > 20_000
    assert main(["cache", "verify", name[:10]]) == 0
    assert main(["cache", "verify", name[:10], "other"]) == 2
    assert "as written" in capsys.readouterr().out
    assert main(["cache", "rm", name[:10]]) == 0
    assert entries() == []
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


def test_a_killed_maker_leaves_nothing_in_the_way(section: DataSection, root: Path) -> None:
    script = (
        "import os, sys\n"
        "from tests.data.rows import byte_tokenizer\n"
        "from qvera.data import build_datasets\nfrom qvera.data import cache\n"
        "from qvera.config.schema import DataSection\n"
        "def hang(*a): print('made', flush=True); import time; time.sleep(600)\n"
        "cache.replace_text = hang\n"
        "cache.WORTH_BYTES = 10_000\n"
        f"section = DataSection(path={section.path!r}, template='chatml', eval_fraction=0.1, max_length=256, "
        f"too_long='split')\n"
        "build_datasets(section, byte_tokenizer())\n"
    )
    maker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert maker.stdout is not None
    assert maker.stdout.readline().strip() == "made"
    (unfinished,) = entries()
    assert unfinished.startswith(".unfinished-")
    assert main(["cache", "rm", unfinished]) == 2
    maker.send_signal(signal.SIGKILL)
    maker.wait()
    assert build_datasets(section, byte_tokenizer()).stats.cache_entries == []
    assert entries() == [unfinished.replace(".unfinished-", "rows-")]


def test_a_source_that_changes_meanwhile_is_not_kept(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cache.tokenize_source

    def make(*arguments: Any) -> Any:
        made = real(*arguments)
        with open(section.path, "a", encoding="utf-8") as handle:
            handle.write(Path(section.path).read_text(encoding="utf-8").splitlines()[0] + "\n")
        return made

    monkeypatch.setattr(cache, "tokenize_source", make)
    with pytest.raises(InputError, match="was changed while it was read"):
        build_datasets(section, byte_tokenizer())
    assert entries() == []


def test_a_full_disk_is_said(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "replace_text", full)
    with pytest.raises(RunFailed, match="set QVERA_CACHE to a directory on another disk"):
        build_datasets(section, byte_tokenizer())
    assert entries() == []


# --- several runs at once


class Said(io.StringIO):
    """What a console shows, and when it first says that it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    def write(self, text: str) -> int:
        if "another process tokenizes these rows" in text:
            self.waits.set()
        return super().write(text)


def both_ends(section: DataSection, monkeypatch: pytest.MonkeyPatch, fails: Exception | None = None) -> tuple[Any, Any]:
    """The data or the error of two processes' worth of work, the second of which comes while the first tokenizes.

    Args:
        fails: what the first meets in place of its rows.
    """
    said, begun, real = Said(), threading.Event(), cache.tokenize_source

    def make(*arguments: Any) -> Any:
        if begun.is_set():
            return real(*arguments)
        begun.set()
        assert said.waits.wait(60)
        if fails is not None:
            raise fails
        return real(*arguments)

    monkeypatch.setattr(cache, "tokenize_source", make)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(build_datasets, section, byte_tokenizer())
        assert begun.wait(60)
        second = threads.submit(build_datasets, section, byte_tokenizer(), Console(file=said, width=500))
    return first.exception() or first.result(), second.exception() or second.result()


def spoil(section: DataSection) -> None:
    with open(section.path, "a", encoding="utf-8") as handle:
        handle.write(json.dumps({"messages": [{"role": "wizard", "content": "x"}]}) + "\n")


def test_who_waits_for_the_same_rows_says_so_and_finds_them(
    section: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = both_ends(section, monkeypatch)
    assert not first.stats.cache_entries
    assert second.stats.cache_entries == entries()
    assert same(first, second)


def test_wrong_rows_are_read_once_for_all_who_wait_and_again_by_who_comes_later(
    section: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = section.replace(eval_fraction=0.0)
    good = Path(section.path).read_text(encoding="utf-8")
    spoil(section)
    made = counting(monkeypatch)
    first, second = both_ends(section, monkeypatch)
    assert isinstance(first, InputError)
    assert isinstance(second, InputError)
    assert str(first) == str(second)
    assert f"{section.path}:41" in str(first)
    assert made == [section.path]
    with pytest.raises(InputError, match="wizard"):
        build_datasets(section, byte_tokenizer())
    assert made == [section.path] * 2
    Path(section.path).write_text(good, encoding="utf-8")
    assert len(build_datasets(section, byte_tokenizer()).train) >= 36


def test_a_full_disk_of_the_first_is_not_an_error_of_the_second(
    section: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = both_ends(section, monkeypatch, OSError(28, "No space left on device"))
    assert isinstance(first, RunFailed)
    assert isinstance(second, Datasets)
    assert len(second.train) >= 36


# --- rows as a sequence


def test_rows_are_a_sequence(section: DataSection) -> None:
    data = build_datasets(section, byte_tokenizer())
    rows = data.train
    assert isinstance(rows, Rows)
    assert rows[-1].source == rows[len(rows) - 1].source
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert [row.source for row in rows[5:20:3]] == [rows[i].source for i in range(5, 20, 3)]
    assert not rows[:0]
    assert len(rows[:0].lengths) == 0
    picked = rows.take(np.array([9, 9, 2]))
    assert [row.source for row in picked] == [rows[9].source, rows[9].source, rows[2].source]
    assert picked.lengths.tolist() == [len(row.input_ids) for row in picked]
    assert picked.trained_tokens.tolist() == [row.trained_tokens for row in picked]


def test_a_hub_set_is_known_by_its_fingerprint(section: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(40)]
    one, other = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:-1])
    here = one
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **kwargs: here)
    section = DataSection(path="someone/questions", template="plain")
    first = build_datasets(section, byte_tokenizer())
    second = build_datasets(section, byte_tokenizer())
    assert not first.stats.cache_entries
    assert second.stats.cache_entries == entries()
    assert same(first, second)
    assert first.train[3].source == "someone/questions[train] row 4"
    here = other
    third = build_datasets(section, byte_tokenizer())
    assert not third.stats.cache_entries
    assert len(third.train) == 39


def test_a_run_on_found_rows_is_the_run_and_resumes(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WORTH_BYTES", 0)
    recipe = make_recipe(data={"packing": True}, training={"max_steps": 4, "save_steps": 2})
    first, second = (train(recipe, tmp_path / name) for name in ("first", "second"))
    assert first is not None
    assert second is not None
    assert first.run["data"] == second.run["data"]
    vectors = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert vectors[0] == vectors[1]
    assert len(entries()) == 1
    shutil.rmtree(tmp_path / "second" / "checkpoints" / "step-00000004")
    shutil.rmtree(tmp_path / "second" / "adapter")
    recipe = recipe.replace(data=recipe.data.replace(tokenize_processes=2))  # another machine may have other cores
    train(recipe, tmp_path / "second", resume=True)
    assert (tmp_path / "second" / "adapter" / "adapter_model.safetensors").read_bytes() == vectors[0]
