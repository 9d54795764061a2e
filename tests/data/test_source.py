"""Which rows of a source are held out, and its rows by one process or several: the same to the bit, errors too."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qvera.config.sections import DataSection
from qvera.data import Datasets, build_datasets, source
from qvera.data.source import hold_out
from qvera.utils.errors import InputError
from tests.data.rows import byte_tokenizer, same, write_rows

pytestmark = pytest.mark.process


@pytest.fixture
def section(tmp_path: Path) -> DataSection:
    """Three chunks of rows, for as many threads."""
    chats, _ = write_rows(tmp_path, 60)
    return DataSection(path=chats, template="chatml", eval_fraction=0.1, max_length=256, too_long="split")


@given(n=st.integers(2, 200), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**64))
def test_hold_out_leaves_rows_of_both_kinds_and_follows_the_seed(n: int, fraction: float, seed: int) -> None:
    held = hold_out(n, fraction, seed)
    assert len(held) == n and held.any() and not held.all()
    assert np.array_equal(held, hold_out(n, fraction, seed))
    assert abs(int(held.sum()) - n * fraction) <= 1
    assert not np.array_equal(hold_out(100, 0.1, 0), hold_out(100, 0.1, 1))
    assert not hold_out(100, 0.0, 0).any()
    # A changed choice would silently change what `--resume` goes on with.
    assert np.flatnonzero(hold_out(20, 0.3, 5)).tolist() == [2, 4, 6, 11, 13, 14]


class ThreadInPlaceOfAProcess:
    """Does the work of one of the processes in a thread, which starts at once."""

    started = 0

    def __init__(self, command: list[str], **options: Any) -> None:
        ThreadInPlaceOfAProcess.started += 1
        reader, writer = os.pipe()
        self.stdout, self._out = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
        self._thread = threading.Thread(target=self._run, args=(command[-2], int(command[-1])))
        self._thread.start()

    def _run(self, job: str, number: int) -> None:
        with contextlib.suppress(OSError), self._out:
            source.work(job, number, self._out)

    def kill(self) -> None:
        self.stdout.close()  # it can't write any more

    def __enter__(self) -> ThreadInPlaceOfAProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CHUNK_ROWS", 20)
    monkeypatch.setattr(source.subprocess, "Popen", ThreadInPlaceOfAProcess)


def made(section: DataSection, tokenizer: Any, by_one: bool = False) -> Datasets:
    """Rows that were really made by several processes, or by one because the others failed."""
    out = io.StringIO()
    data = build_datasets(section, tokenizer, Console(file=out, width=500), cached=False)
    assert ("One process tokenizes all rows: others could not be started" in out.getvalue()) == by_one
    return data


def own_special_tokens() -> PreTrainedTokenizerFast:
    """A tokenizer whose template writes special tokens that have names of their own."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"sep_token": "<sep>", "cls_token": "<cls>", "mask_token": "<mask>"})
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        extra_special_tokens={"image_token": "<image>", "end_of_call": "<|im_end|>"},
        **tokenizer.special_tokens_map,
    )
    turn = "sep_token + m.role + image_token + m.content + end_of_call"
    own.chat_template = "{{ cls_token + mask_token }}{% for m in messages %}{{ " + turn + " }}{% endfor %}"
    return own


def test_several_processes_make_the_same_rows_and_end(tmp_path: Path) -> None:
    section = DataSection(path=write_rows(tmp_path, source.CHUNK_ROWS + 10)[0], eval_fraction=0.1)
    one = made(section, own_special_tokens())
    assert own_special_tokens().decode(one.train[0].input_ids).startswith("<cls><mask><sep>")
    assert same(one, made(section.replace(tokenize_processes=2), own_special_tokens()))
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True).stdout
    assert "qvera.data.source" not in children


@pytest.mark.parametrize(("tokenizer", "limit"), [(byte_tokenizer, 60), (ByT5Tokenizer, 42)])
def test_three_processes_make_the_same_rows(section: DataSection, tokenizer: Any, limit: int, threads: None) -> None:
    section = section.replace(template="zephyr", limit=limit)
    assert same(made(section, tokenizer()), made(section.replace(tokenize_processes=3), tokenizer()))


def test_processes_take_over_where_one_has_begun(
    section: DataSection, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    one = made(section, byte_tokenizer())
    monkeypatch.setattr(source, "MEASURED_SECONDS", 0.0)
    monkeypatch.setattr(source, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(source.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(ThreadInPlaceOfAProcess, "started", 0)
    assert same(one, made(section, byte_tokenizer()))
    assert ThreadInPlaceOfAProcess.started == 2


@pytest.mark.parametrize("fails", ["at the start", "at the second chunk", "by a banner"])
def test_one_process_goes_on_where_others_fail(
    fails: str, section: DataSection, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    one = made(section, byte_tokenizer())
    real = source.work

    def work(job: str, number: int, out: Any) -> None:
        if fails == "by a banner":
            out.write(b"I am printed by a sitecustomize\n")
        elif fails == "at the start" or number == 1:
            raise OSError("killed")
        real(job, number, out)

    monkeypatch.setattr(source, "work", work)
    assert same(one, made(section.replace(tokenize_processes=2), byte_tokenizer(), by_one=True))


WIZARD = {"messages": [{"role": "wizard", "content": "x"}]}
NO_ANSWER = {"messages": [{"role": "user", "content": "x"}]}
REFUSED = {"messages": [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({50: WIZARD, 26: WIZARD, 27: WIZARD}, ":27: messages.* unknown role 'wizard'"),
        ({50: NO_ANSWER, 26: NO_ANSWER, 27: NO_ANSWER}, ":27, .*:28, .*:51: 3 rows with no token to train on"),
        ({50: REFUSED, 26: REFUSED, 27: REFUSED}, ":27: the chat template .* refuses the row"),
        ({10: NO_ANSWER, 26: REFUSED, 50: NO_ANSWER}, ":27: the chat template .* refuses the row"),
        ({10: NO_ANSWER, 50: WIZARD}, ":51: messages.* unknown role 'wizard'"),
    ],
    ids=["malformed", "hollow", "refused", "refused after hollow", "malformed after hollow"],
)
def test_several_processes_give_the_error_that_one_would(
    bad: dict[int, Any], message: str, section: DataSection, threads: None
) -> None:
    lines = Path(section.path).read_text(encoding="utf-8").splitlines()
    for place, row in bad.items():
        lines[place] = json.dumps(row)
    Path(section.path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    section = section.replace(template="llama-2", eval_fraction=0.0)
    errors = []
    for processes in (1, 2):
        section = section.replace(tokenize_processes=processes)
        with pytest.raises(InputError, match=message) as failure:
            made(section, byte_tokenizer())
        errors.append(str(failure.value))
    assert errors[0] == errors[1]


def test_held_out_rows_of_another_format_get_the_training_rows_template(tmp_path: Path, threads: None) -> None:
    paths = [str(tmp_path / name) for name in ("train.jsonl", "eval.jsonl")]
    rows = {"instruction": "do", "output": "ok"}, {"prompt": "do", "completion": "ok"}
    for path, row in zip(paths, rows, strict=True):
        Path(path).write_text(f"{json.dumps(row)}\n" * 30, encoding="utf-8")
    section = DataSection(path=paths[0], eval_path=paths[1])
    one = made(section, byte_tokenizer())
    assert same(one, made(section.replace(tokenize_processes=2), byte_tokenizer()))
    assert one.template.name == "alpaca"
    assert "### Instruction" in one.eval[0].prompt_text
