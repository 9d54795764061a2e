"""The device that tests run on: the CPU, or with ``QVERA_TEST_DEVICE=cuda make test`` the card.

On a card the rooms of `ROOMS` run. Those of `DRAWN_THERE` make their tensors there, and use kernels as compiled where on the
CPU Triton's interpreter runs them; in the others `qvera` itself takes the card. Without the variable CUDA is hidden.
"""

# ruff: noqa: E402 (the environment first)
from __future__ import annotations

import os
from typing import Any

VARIABLE = "QVERA_TEST_DEVICE"
NAME = os.environ.get(VARIABLE, "cpu")
if NAME == "cpu":
    # Both have to be known before anything imports triton, and bitsandbytes does.
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = torch.device(NAME)
DRAWN_THERE = ("kernels", "adapters", "models")
ROOMS = (*DRAWN_THERE, "training", "serve")


class MadeOn(TorchFunctionMode):
    """Tensors that are made without a device are on this one. Numbers of a seeded CPU generator are drawn on the CPU, and moved."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is None or generator.device.type == self.device.type:
            return func(*args, **{**kwargs, "device": self.device})
        return func(*args, **{**kwargs, "device": generator.device}).to(self.device)
