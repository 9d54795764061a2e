"""Which code runs where, and the switch."""

from __future__ import annotations

import pytest
import torch

from qvera.kernels import choice
from qvera.kernels.choice import use_kernels
from qvera.utils.errors import InputError


@pytest.mark.parametrize(
    ("switch", "device", "dtype", "taken"),
    [
        ("on", "accelerator", torch.bfloat16, True),
        ("on", "accelerator", torch.float64, False),
        ("off", "accelerator", torch.bfloat16, False),
        ("auto", "accelerator", torch.bfloat16, False),  # triton can't run on this one
        ("on", "cpu", torch.bfloat16, False),
    ],
)
def test_kernels_are_for_accelerators_and_obey_the_switch(
    switch: str, device: str, dtype: torch.dtype, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "switch", switch)
    if device == "accelerator":
        monkeypatch.setattr(choice.accelerator, "is_accelerator", lambda device: True)
    assert use_kernels(*(torch.empty(2, dtype=t, device="cpu") for t in (torch.float32, dtype))) is taken


def test_a_machine_without_a_compiler_runs_plain_code_and_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton_utils = pytest.importorskip("torch.utils._triton")
    monkeypatch.setattr(triton_utils, "has_triton", lambda: True)
    monkeypatch.setattr(choice.accelerator, "current_device", lambda: torch.device("cuda", 0))
    with pytest.warns(UserWarning, match="Kernels are off: triton can't build its launcher .*apt install gcc"):
        assert not choice._triton_runs_on("cuda")  # there is no driver here
    monkeypatch.setattr(choice, "triton_problem", lambda: None)
    assert choice._triton_runs_on("cuda")


def test_a_wrong_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.accelerator, "is_accelerator", lambda device: True)
    monkeypatch.setattr(choice, "switch", "0")
    with pytest.raises(InputError, match="QVERA_KERNELS: is '0'; it takes auto, on or off"):
        use_kernels(torch.empty(2))
