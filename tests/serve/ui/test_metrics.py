"""A metrics.jsonl that is followed says what it says to one who reads it as a whole."""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from qvera.evaluation.report.read import read_many, read_run
from qvera.serve.ui import metrics
from qvera.serve.ui.metrics import MOST_NEW_BYTES, NOTHING, MetricsFile, Position, news_since
from tests.evaluation.report.conftest import eval_rows, many_info, many_rows, train_rows
from tests.serve.ui.conftest import append


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def add(path: Path, content: bytes) -> None:
    with open(path, "ab") as handle:
        handle.write(content)


def steps_of(found: Any) -> list[int]:
    return [row["step"] for row in found.train.rows()]


def in_pieces(path: Path, content: bytes, seed: int) -> Any:
    """What is read of a file that is written in pieces that end anywhere, and followed from one to the next."""
    chooser, file = random.Random(seed), MetricsFile(path)
    path.unlink(missing_ok=True)
    cuts = sorted(chooser.randrange(len(content)) for _ in range(12))
    for start, end in itertools.pairwise([0, *cuts, len(content)]):
        add(path, content[start:end])
        file.update()
    return file.read


@pytest.mark.parametrize("seed", range(2))
def test_a_file_that_grows_in_any_pieces_is_read_as_a_whole_one(path: Path, seed: int) -> None:
    rows = [*train_rows(60), *eval_rows({20: 0.6, 40: 0.2}), *train_rows(20)[10:]]  # steps 11 to 20 come again
    content = lines(*rows[:30]) + b'{"half": \n\n[[[' + lines(*rows[30:])
    found, whole = in_pieces(path, content, seed), read_run(path.parent)
    assert [row | {"tokens_seen": None} for row in whole.train] == [
        row | {"tokens_seen": None} for row in found.train.rows()
    ]
    assert found.evals.rows() == whole.evals
    assert (found.unreadable, found.position.offset) == (2, len(content))
    # rounds and adapters are those of the report
    (path.parent / "run.json").write_text(json.dumps({**many_info(), "adapters": []}))
    found, many = in_pieces(path, lines(*many_rows()), seed), read_many(path.parent)
    assert [row | {"tokens_seen": 400.0 * number} for number, row in enumerate(many.run.train, 1)] == found.train.rows()
    assert found.adapter_steps == 24
    assert [entry.name for entry in found.entries()] == [entry.name for entry in many.entries]
    for entry in found.entries():
        steps = many.curves[entry.name].rows("train")
        assert (entry.steps, entry.train_loss_first) == (steps[-1]["step"], steps[0]["loss"])


def test_totals_count_steps_that_a_long_curve_no_longer_has(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MOST_ROWS", 50)
    append(path.parent, *train_rows(700))
    found = MetricsFile(path).update()
    kept = steps_of(found)
    assert 25 <= len(kept) <= 51
    assert {later - earlier for earlier, later in itertools.pairwise(kept[:-1])} == {16}  # evenly spread
    assert kept[-1] == 700
    assert "every 16th" in found.notes()[0]
    assert found.recorded() == pytest.approx(read_run(path.parent).totals)


def test_of_a_long_file_pieces_and_the_end_are_read_and_no_totals_are_made_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WHOLE_BYTES": 1 << 20, "_SAMPLES": 40, "_CHUNK_BYTES": 64 << 10}.items():
        monkeypatch.setattr(metrics, name, value)
    append(path.parent, *({**row, "pad": "x" * 300} for row in train_rows(4000)))
    read, pread = list[int](), os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        piece = pread(descriptor, size, offset)
        read.append(len(piece))
        return piece

    monkeypatch.setattr(os, "pread", counted)
    file = MetricsFile(path)
    found = file.update()
    steps = steps_of(found)
    assert sum(read) < 0.3 * path.stat().st_size
    assert steps[-1] == 4000
    assert max(later - earlier for earlier, later in itertools.pairwise(steps)) < 200  # no part is missing
    assert (found.recorded()["steps"], found.recorded()["seconds"]) == (4000, None)
    assert "pieces" in found.notes()[0]
    read.clear()
    append(path.parent, {**train_rows(1)[0], "step": 4001})
    assert steps_of(file.update())[-1] == 4001
    assert sum(read) < 1000  # the new line alone


def test_a_file_that_is_replaced_shortened_or_deleted_is_begun_again(path: Path) -> None:
    file, rows = MetricsFile(path), train_rows(20)
    assert file.update().position == NOTHING
    path.write_bytes(lines(*rows))
    assert len(file.update().train.rows()) == 20
    new = path.with_name("new")
    new.write_bytes(lines(*rows[:10], {**rows[10], "loss": 9.0}))  # as a resumed run does
    os.replace(new, path)
    assert file.update().train.rows()[-1]["loss"] == 9.0
    path.write_bytes(lines(*rows[:3]))
    assert len(file.update().train.rows()) == 3
    path.write_bytes(lines(*({**row, "loss": 7.0} for row in rows)))  # a new run's, longer and with the same inode
    assert {row["loss"] for row in file.update().train.rows()} == {7.0}
    path.unlink()
    assert file.update().train.rows() == []


def test_a_line_without_end_and_a_record_that_is_none_of_ours_take_little_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = {f"key {n}": n for n in range(1000)} | {"long": "x" * 10_000, "list": [1], "x" * 10_000: 1}
    append(path.parent, {**train_rows(1)[0], **odd}, {"kind": "train", "adapter": "x" * 10_000, "step": 1})
    found = MetricsFile(path).update()
    (row,) = found.train.rows()
    assert len(row) <= 65  # with the tokens seen so far
    assert row["loss"] == train_rows(1)[0]["loss"]
    assert all(len(str(value)) < 600 for value in row.values())
    assert not found.adapters
    monkeypatch.setattr(metrics, "_LINE_BYTES", 1000)
    monkeypatch.setattr(metrics, "_CHUNK_BYTES", 500)
    path.write_bytes(lines(train_rows(1)[0]) + b"[" * 20_000)
    file = MetricsFile(path)
    assert steps_of(file.update()) == [1]
    add(path, b"\n" + lines(train_rows(2)[1]))
    assert steps_of(file.update()) == [1, 2]


def test_news_are_the_new_records_alone(path: Path) -> None:
    rows = train_rows(5)
    assert news_since(path, NOTHING).records == []
    append(path.parent, *rows[:2])
    news = news_since(path, NOTHING)
    assert [record["step"] for record in news.records] == [1, 2]
    add(path, lines(rows[2]) + lines(rows[3])[:40])
    news = news_since(path, Position.parse(str(news.position)) or NOTHING)
    assert [record["step"] for record in news.records] == [3]  # the half line is not there yet
    add(path, lines(rows[3])[40:] + lines({"kind": "train", "step": 1, "adapter": "anna", "loss": 1.0}))
    news = news_since(path, news.position)
    assert [record["step"] for record in news.records] == [4]  # an adapter's own steps are not sent
    assert not news.is_other
    add(path, b" " * MOST_NEW_BYTES + b"\n")
    behind = news_since(path, news.position)
    assert (behind.is_other, behind.records) == (True, [])
    path.write_bytes(lines(rows[0]))
    assert news_since(path, behind.position).is_other
    for text in ("", "-", "1-", "-1", "1-2-3", "a-b", "1_0-2", "²-1", "1" * 70 + "-1", "1-2\n"):
        assert Position.parse(text) is None
