"""Reading and writing in pieces: the bytes of safetensors itself, whatever the sizes; errors and early ends cross the threads."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvera.utils.errors import InputError
from qvera.utils.safetensors_io import TensorSpec, read_header
from qvera.utils.safetensors_stream import prefetch, read_chunks, write_chunks


def mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(7, 33, generator=generator).bfloat16(),
        "b": torch.arange(5, dtype=torch.uint8),
        "c": torch.randn(130, generator=generator),
        "d": torch.tensor(3.0, dtype=torch.float16),
        "e": torch.empty(0, 4),
    }


def raw(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def test_safetensors_reads_what_was_written_in_chunks(tmp_path: Path) -> None:
    tensors = mixed()
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]

    def chunks() -> Iterator[tuple[str, Any]]:
        for name, tensor in tensors.items():
            data = raw(tensor)
            for start in range(0, len(data), 100):
                yield name, data[start : start + 100]

    digest = write_chunks(tmp_path / "x.safetensors", specs, chunks())
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("size", [1, 64, 1 << 20])
def test_a_file_is_read_once_and_hashed_whole(tmp_path: Path, size: int) -> None:
    tensors = mixed()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    digest, got = hashlib.sha256(), {"a": b"", "c": b""}
    for chunk in read_chunks(tmp_path / "x.safetensors", got, digest, size):
        got[chunk.entry.name] += chunk.data.tobytes()
        assert chunk.last == (len(got[chunk.entry.name]) == chunk.entry.size_bytes)
    assert got == {name: raw(tensors[name]).tobytes() for name in got}
    assert digest.hexdigest() == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_headers_that_do_not_fit_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(mixed(), file)
    whole = file.read_bytes()
    for spoilt in (whole[:-1], whole + b"x", whole[:4], b"", whole[:8] + b"[" + whole[9:], whole.replace(b"U8", b"U9")):
        file.write_bytes(spoilt)
        with pytest.raises(InputError, match="x.safetensors: .*Copy or download it again"):
            read_header(file)


def test_wrong_bytes_leave_nothing_behind(tmp_path: Path) -> None:
    spec = TensorSpec("a", torch.uint8, (4,))
    for chunks in ([("b", b"1234")], [("a", b"12345")], [("a", b"12"), ("b", b"34")]):
        with pytest.raises(RuntimeError, match="got bytes of"):
            write_chunks(tmp_path / "x", [spec], iter(chunks))
        assert list(tmp_path.iterdir()) == []


def test_prefetch_keeps_order_and_hands_errors_over() -> None:
    assert list(prefetch(range(50), 3)) == list(range(50))

    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("from the thread")

    items = prefetch(failing(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="from the thread"):
        next(items)


def test_prefetch_stops_its_threads_when_nobody_reads_on() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    before = threading.active_count()
    items = prefetch(prefetch(endless(), 2), 2)
    assert next(items) == 1
    items.close()
    assert closed.wait(5)
    for _ in range(100):
        if threading.active_count() == before:
            return
        time.sleep(0.05)
    raise AssertionError("a thread is left")
