"""Reading and writing in pieces: the bytes of safetensors itself, whatever the sizes; errors and early ends cross the threads."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvera.models import safetensors_stream
from qvera.models.safetensors_stream import CheckpointReader, in_order, write_shard
from qvera.utils.safetensors_io import TensorSpec, file_stamps, read_header


def mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(7, 33, generator=generator).bfloat16(),
        "b": torch.arange(5, dtype=torch.uint8),
        "c": torch.randn(130, generator=generator),
        "d": torch.tensor(3.0, dtype=torch.float16),
        "e": torch.empty(0, 4),
    }


def test_safetensors_reads_what_was_written_in_parts(tmp_path: Path) -> None:
    tensors = mixed()
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    filled = [tensor for tensor in tensors.values() if tensor.numel()]
    parts = (part for tensor in filled for part in (tensor.split(3) if tensor.dim() else [tensor]))
    digest = write_shard(tmp_path / "x.safetensors", specs, parts)
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    torch.testing.assert_close(load_file(tmp_path / "x.safetensors"), tensors, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("elements", [1, 64, 1 << 20])
def test_a_file_is_read_once_and_hashed_whole(tmp_path: Path, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_stream, "FILE_BLOCK_ELEMENTS", elements)
    tensors = mixed()
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    entries = read_header(file)
    reader = CheckpointReader(entries, file_stamps(entries), {})
    got: dict[str, list[Any]] = {"a": [], "c": []}
    for block in reader.blocks({"b", "d", "e"}):
        assert block.first == sum(len(rows) for rows in got[block.entry.name])
        got[block.entry.name].append(block.rows)
        assert block.last == (sum(len(rows) for rows in got[block.entry.name]) == len(tensors[block.entry.name]))
    assert [len(got[name]) for name in "ac"] == [1, 1 if elements > 64 else 3]  # 64 rows of 33 end with a 4-bit block
    for name, rows in got.items():
        assert torch.equal(torch.cat(rows), tensors[name])
    assert reader.sha256 == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert not list(reader.blocks(tensors))  # all is known


def test_wrong_tensors_leave_nothing_behind(tmp_path: Path) -> None:
    spec = TensorSpec("a", torch.uint8, (4,))
    for wrong in (torch.zeros(4), torch.zeros(5, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="the header has"):
            write_shard(tmp_path / "x", [spec], iter([wrong]))
        assert list(tmp_path.iterdir()) == []


def test_results_come_in_order_few_are_ahead_and_closing_stops_the_threads() -> None:
    drawn, taken, before = list[int](), list[int](), threading.active_count()

    def items() -> Iterator[int]:
        for i in itertools.count():
            drawn.append(i)
            yield i

    def slow_first(i: int) -> int:
        time.sleep(0.01 if i % 3 == 0 else 0)
        return i * i

    results = in_order(items(), slow_first, 4, 6)
    for _ in range(20):
        taken.append(next(results))
        assert len(drawn) <= len(taken) + 7
    assert taken == [i * i for i in range(20)]
    results.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("where", ["items", "compute"])
def test_an_error_comes_where_its_result_would(where: str) -> None:
    def items() -> Iterator[int]:
        for i in range(9):
            if i == 5 and where == "items":
                raise OSError("read")
            yield i

    def compute(i: int) -> int:
        if i == 5 and where == "compute":
            raise OSError("compute")
        return i

    taken = []
    with pytest.raises(OSError, match="read" if where == "items" else "compute"):
        for result in in_order(items(), compute, 2, 4):
            taken.append(result)
    assert taken == [0, 1, 2, 3, 4]
