"""One file asks torch about the accelerator, and copes with backends that answer less than CUDA does."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import qvera
from qvera.utils import accelerator, memory

CUDA = torch.device("cuda", 0)
MPS = torch.device("mps", 0)


def with_device(monkeypatch: pytest.MonkeyPatch, device: torch.device, **functions: Any) -> None:
    """Let torch say that it has this accelerator, whose module has these functions and no others."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(**functions))


def test_no_other_file_asks_whether_it_is_cuda() -> None:
    package = Path(qvera.__file__).parent
    asks = re.compile(r"torch\.(cuda|xpu|mps|accelerator)\b|[!=]= *[\"']cuda[\"']|is_cuda\b")
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if asks.search(file.read_text("utf-8"))}
    assert found == {"utils/accelerator.py"}


def test_the_device_is_the_accelerator_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("cpu", "meta", "cuda", "xpu", "mps")
    assert [accelerator.is_accelerator(kind) for kind in kinds] == [False, False, True, True, True]
    assert accelerator.current_device() == torch.device("cpu")
    assert accelerator.device_count() == 0 and accelerator.collective_backend() == "gloo"
    with_device(monkeypatch, torch.device("xpu"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert accelerator.current_device() == torch.device("xpu", 1)
    assert accelerator.device_count() == 2 and accelerator.collective_backend() == "cpu:gloo,xpu:xccl"
    with_device(monkeypatch, torch.device("cuda"))
    assert accelerator.collective_backend() == "cpu:gloo,cuda:nccl"


def test_memory_as_cuda_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []
    with_device(
        monkeypatch,
        CUDA,
        mem_get_info=lambda device: (3, 10),
        memory_allocated=lambda device: 4,
        max_memory_allocated=lambda device: 6,
        memory_reserved=lambda device: 5,
        max_memory_reserved=lambda device: 7,
        reset_peak_memory_stats=calls.append,
        get_device_name=lambda device: "a card",
    )
    assert accelerator.free_and_total_bytes(CUDA) == (3, 10) and memory.available_bytes(CUDA) == 3
    assert [accelerator.counted_bytes(CUDA, "reserved", peak) for peak in (False, True)] == [5, 7]
    assert memory.memory_bytes(CUDA) == 4 and memory.device_name(CUDA) == "cuda: a card"
    with memory.PeakWatch(CUDA) as watch:
        assert (watch.peak_bytes, watch.peak_tensor_bytes) == (7, 6)
    assert calls == [CUDA]


def test_memory_where_no_peak_and_no_free_bytes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MPS, which shares the machine's RAM."""
    held = [5]
    with_device(monkeypatch, MPS, current_allocated_memory=lambda: held[0], driver_allocated_memory=lambda: 8)
    assert accelerator.free_and_total_bytes(MPS) is None
    assert accelerator.counted_bytes(MPS, "allocated", peak=True) is None
    assert memory.available_bytes(MPS) > 10**6  # of the RAM
    assert accelerator.counted_bytes(MPS, "reserved") == 8 and accelerator.card_name(MPS) == "mps"
    with memory.PeakWatch(MPS) as watch:
        held[0] = 9
        assert (watch.peak_bytes, watch.peak_tensor_bytes) == (9, None)


def test_page_locked_memory_is_given_back_where_torch_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: calls.append("emptied"), raising=False)
    accelerator.empty_host_cache()
    assert calls == []  # there is no accelerator here
    monkeypatch.setattr(accelerator, "is_available", lambda: True)
    accelerator.empty_host_cache()
    assert calls == ["emptied"]


def test_workspaces_of_products_are_those_that_torch_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, mebibytes in (((8, 9), 2 * 8.125), ((9, 0), 2 * 32)):
        with_device(monkeypatch, CUDA, get_device_capability=lambda device, found=capability: found)
        assert accelerator.product_workspace_bytes(CUDA) == mebibytes * 2**20
    assert accelerator.product_workspace_bytes(MPS) == 0


def test_groups_are_one_launch_where_torch_has_a_kernel_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        with_device(monkeypatch, CUDA, get_device_capability=lambda device, found=capability: found)
        found[capability] = accelerator.multiplies_groups(CUDA)
    assert [capability for capability, is_one in found.items() if is_one] == [(9, 0), (10, 0)]
    assert not accelerator.multiplies_groups(MPS)


def test_nccls_buffers_follow_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator.collective_buffer_bytes("cpu") == 0
    monkeypatch.setenv("NCCL_MAX_NCHANNELS", "")
    assert accelerator.collective_buffer_bytes("cuda") == pytest.approx(1.06e9, rel=0.06)  # measured on 8 H100s
    monkeypatch.setenv("NCCL_MAX_NCHANNELS", "2")
    monkeypatch.setenv("NCCL_BUFFSIZE", "1048576")
    assert accelerator.collective_buffer_bytes("cuda") == 2 * 3 * 7 * 2**20


def test_bfloat16_must_be_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for hardware in (True, False):
        with_device(
            monkeypatch, CUDA, is_bf16_supported=lambda including_emulation=True, h=hardware: including_emulation or h
        )
        assert accelerator.multiplies_bfloat16(CUDA) is hardware
    with_device(monkeypatch, MPS)
    assert accelerator.multiplies_bfloat16(MPS) is False


def test_random_state_of_cpu_and_accelerator_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.zeros(8, dtype=torch.uint8)
    with_device(monkeypatch, CUDA, get_rng_state=state.clone, set_rng_state=state.copy_)
    before = torch.get_rng_state()
    with accelerator.forked_random_state():
        torch.rand(3)
        state.fill_(7)
    assert torch.equal(torch.get_rng_state(), before) and not state.any()
    accelerator.set_random_state({"xpu": torch.ones(8, dtype=torch.uint8)})  # of a checkpoint made elsewhere
    assert not state.any()
    accelerator.set_random_state({"cpu": before, "cuda": torch.ones(8, dtype=torch.uint8)})
    assert state.all()


def test_arrays_go_to_an_accelerator_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {
        "ids": np.arange(6, dtype=np.int64).reshape(2, 3).T,  # not contiguous
        "sees": np.eye(3, dtype=bool)[None],
        "ends": np.array([0, 5], dtype=np.int32),
        "none": np.zeros(0, dtype=np.int64),
    }
    plain = accelerator.tensors_on("cpu", arrays)
    monkeypatch.setattr(accelerator, "is_accelerator", lambda _: True)
    monkeypatch.setattr(accelerator, "has_own_memory", lambda _: False)  # nothing to pin memory for here
    waits: list[bool] = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda t, source, non_blocking: (waits.append(not non_blocking), copy(t, source))[1]
    )
    sent = accelerator.tensors_on("cpu", arrays)
    assert waits == [True]  # of memory that is not pinned, which is let go of at once
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent.values()}) == 1
    for name, array in arrays.items():
        torch.testing.assert_close(sent[name], plain[name], rtol=0, atol=0)
        assert sent[name].tolist() == array.tolist()
