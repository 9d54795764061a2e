"""A metrics.jsonl that is followed says what it says to one who reads it as a whole."""

from __future__ import annotations

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


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def in_pieces(path: Path, content: bytes, seed: int) -> MetricsFile:
    """Written in pieces that end anywhere, and followed from one to the next."""
    chooser, file = random.Random(seed), MetricsFile(path)
    cuts = sorted(chooser.randrange(len(content)) for _ in range(12))
    with open(path, "wb") as handle:
        for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            handle.write(content[start:end])
            handle.flush()
            file.update()
    return file


@pytest.mark.parametrize("seed", range(3))
def test_a_file_that_grows_in_any_pieces_is_read_as_a_whole_one(tmp_path: Path, seed: int) -> None:
    rows = [*train_rows(60), *eval_rows({20: 0.6, 40: 0.2}), *train_rows(20)[10:]]  # steps 11 to 20 come again
    content = lines(*rows[:30]) + b'{"half": \n\n[[[' + lines(*rows[30:])
    found = in_pieces(tmp_path / "metrics.jsonl", content, seed).read
    whole = read_run(tmp_path)
    assert found.train.rows() == whole.train
    assert found.evals.rows() == whole.evals
    assert found.unreadable == 2
    assert found.position.offset == len(content)


@pytest.mark.parametrize("seed", range(2))
def test_rounds_and_adapters_are_those_of_the_report(tmp_path: Path, seed: int) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**many_info(), "adapters": []}))
    found = in_pieces(tmp_path / "metrics.jsonl", lines(*many_rows()), seed).read
    whole = read_many(tmp_path)
    assert found.train.rows() == whole.run.train
    assert found.adapter_steps == 24
    assert [entry.name for entry in found.entries()] == [entry.name for entry in whole.entries]
    for entry in found.entries():
        steps = whole.curves[entry.name].rows("train")
        assert (entry.steps, entry.train_loss_first) == (steps[-1]["step"], steps[0]["loss"])


def test_totals_count_steps_that_a_long_curve_no_longer_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MOST_ROWS", 50)
    rows = train_rows(700)
    (tmp_path / "metrics.jsonl").write_bytes(lines(*rows))
    found, whole = MetricsFile(tmp_path / "metrics.jsonl").update(), read_run(tmp_path)
    kept = [row["step"] for row in found.train.rows()]
    assert 25 <= len(kept) <= 51
    assert {later - earlier for earlier, later in zip(kept, kept[1:-1], strict=False)} == {16}  # evenly spread
    assert kept[-1] == 700
    assert "every 16th" in found.notes()[0]
    assert found.recorded() == pytest.approx(whole.totals)


def test_of_a_long_file_pieces_and_the_end_are_read_and_no_totals_are_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(metrics, "_SAMPLES", 40)
    monkeypatch.setattr(metrics, "_CHUNK_BYTES", 64 << 10)
    rows = [{**row, "pad": "x" * 300} for row in train_rows(4000)]
    (tmp_path / "metrics.jsonl").write_bytes(lines(*rows))
    read_bytes, pread = 0, os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        nonlocal read_bytes
        piece = pread(descriptor, size, offset)
        read_bytes += len(piece)
        return piece

    monkeypatch.setattr(os, "pread", counted)
    file = MetricsFile(tmp_path / "metrics.jsonl")
    found = file.update()
    steps = [row["step"] for row in found.train.rows()]
    assert read_bytes < 0.3 * (tmp_path / "metrics.jsonl").stat().st_size
    assert steps[-1] == 4000
    assert max(later - earlier for earlier, later in zip(steps, steps[1:], strict=False)) < 200  # no part is missing
    assert (found.recorded()["steps"], found.recorded()["seconds"]) == (4000, None)
    assert "pieces" in found.notes()[0]
    read_bytes = 0
    append(tmp_path, {**train_rows(1)[0], "step": 4001})
    assert file.update().train.rows()[-1]["step"] == 4001
    assert read_bytes < 1000  # the new line alone


def test_a_file_that_is_replaced_shortened_or_deleted_is_begun_again(tmp_path: Path) -> None:
    path, rows = tmp_path / "metrics.jsonl", train_rows(20)
    file = MetricsFile(path)
    assert file.update().position == NOTHING
    path.write_bytes(lines(*rows))
    assert len(file.update().train.rows()) == 20
    (tmp_path / "new").write_bytes(lines(*rows[:10], {**rows[10], "loss": 9.0}))  # as a resumed run does
    os.replace(tmp_path / "new", path)
    assert [row["loss"] for row in file.update().train.rows()][-1] == 9.0
    path.write_bytes(lines(*rows[:3]))
    assert len(file.update().train.rows()) == 3
    path.unlink()
    assert file.update().train.rows() == []


def test_a_line_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_LINE_BYTES", 1000)
    monkeypatch.setattr(metrics, "_CHUNK_BYTES", 500)
    path, rows = tmp_path / "metrics.jsonl", train_rows(2)
    path.write_bytes(lines(rows[0]) + b"[" * 20_000)
    file = MetricsFile(path)
    assert len(file.update().train.rows()) == 1
    with open(path, "ab") as handle:
        handle.write(b"\n" + lines(rows[1]))
    assert [row["step"] for row in file.update().train.rows()] == [1, 2]


def test_a_record_that_is_none_of_ours_takes_little_memory(tmp_path: Path) -> None:
    odd = {f"key {n}": n for n in range(1000)} | {"long": "x" * 10_000, "list": [1], "x" * 10_000: 1}
    append(tmp_path, {**train_rows(1)[0], **odd}, {"kind": "train", "adapter": "x" * 10_000, "step": 1})
    found = MetricsFile(tmp_path / "metrics.jsonl").update()
    (row,) = found.train.rows()
    assert len(row) <= 64
    assert row["loss"] == train_rows(1)[0]["loss"]
    assert all(len(str(value)) < 600 for value in row.values())
    assert not found.adapters


def test_news_are_the_new_records_alone(tmp_path: Path) -> None:
    path, rows = tmp_path / "metrics.jsonl", train_rows(5)
    assert news_since(path, NOTHING).records == []
    append(tmp_path, *rows[:2])
    news = news_since(path, NOTHING)
    assert [record["step"] for record in news.records] == [1, 2]
    with open(path, "ab") as handle:
        handle.write(lines(rows[2]) + lines(rows[3])[:40])
    news = news_since(path, Position.parse(str(news.position)) or NOTHING)
    assert [record["step"] for record in news.records] == [3]  # the half line is not there yet
    with open(path, "ab") as handle:
        handle.write(lines(rows[3])[40:] + lines({"kind": "train", "step": 1, "adapter": "anna", "loss": 1.0}))
    news = news_since(path, news.position)
    assert [record["step"] for record in news.records] == [4]  # an adapter's own steps are not sent
    assert not news.is_other
    with open(path, "ab") as handle:
        handle.write(b" " * MOST_NEW_BYTES + b"\n")
    behind = news_since(path, news.position)
    assert (behind.is_other, behind.records) == (True, [])
    path.write_bytes(lines(rows[0]))
    assert news_since(path, behind.position).is_other


@pytest.mark.parametrize("text", ["", "-", "1-", "-1", "1-2-3", "a-b", "1_0-2", "²-1", "1" * 70 + "-1", "1-2\n"])
def test_a_position_that_is_none_is_not_taken(text: str) -> None:
    assert Position.parse(text) is None
