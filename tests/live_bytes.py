"""Bytes of tensors alive at every moment, as a `TorchDispatchMode` sees tensors come and weak references see them go."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class LiveBytes:
    """Counts the bytes of every storage that it was shown, while that storage lives."""

    def __init__(self) -> None:
        self.now = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None and known() is storage:
            return
        size_bytes = storage.nbytes()
        self.now += size_bytes

        def freed(reference: weakref.ref[torch.UntypedStorage]) -> None:
            self.now -= size_bytes
            if self._storages.get(key) is reference:
                del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)

    def while_running(self, func: Any, args: tuple[Any, ...], out: Any) -> int:
        """The most bytes alive while an operator ran, if ``out`` is what it returned and was shown to `add`."""
        if _accumulates_gradients(func):
            return self.now - out.untyped_storage().nbytes()
        workspace = WORKSPACES.get(str(func.overloadpacket))
        return self.now if workspace is None else self.now + workspace(args)


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once of CPU tensors that operators returned, and the elements of the ``largest`` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.largest = LiveBytes(), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.live.add(tensor)
                self.largest = max(self.largest, tensor.numel())
        self.peak = max(self.peak, self.live.now)
        return out


def _accumulates_gradients(func: Any) -> bool:
    """Whether autograd's engine itself, and no function of a backward pass, adds up two gradients of one tensor.

    It does so in place where it holds the last reference to the first of them (torch/csrc/autograd/input_buffer.cpp,
    ``can_accumulate_inplace``), but never while a `TorchDispatchMode` is on.
    """
    if func is not aten.add.Tensor or torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(1)
    while frame is not None and (frame.f_code.co_name in _OWN_FRAMES or "torch/_" in frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is None or frame.f_code.co_name == "_engine_run_backward"


_OWN_FRAMES = ("__torch_dispatch__", "while_running", "_count")


def _flash_backward(heads: int) -> Callable[[tuple[Any, ...]], int]:
    """∂q in fp32 and a number a row; with grouped keys also ∂k and ∂v of every head, before they are added up.

    ``heads``: which dimension of queries and keys counts heads.
    """

    def workspace(args: tuple[Any, ...]) -> int:
        query, key = args[1], args[2]
        found = 4 * query.numel() + 4 * query.numel() // query.shape[-1]
        grouped = query.shape[heads] != key.shape[heads]
        return found + (2 * query.numel() * query.element_size() if grouped else 0)

    return workspace


WORKSPACES: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "aten._scaled_dot_product_flash_attention_backward": _flash_backward(heads=1),
    "aten._flash_attention_backward": _flash_backward(heads=-2),
    "aten.logsumexp": lambda args: args[0].numel() * args[0].element_size(),
}
"""Bytes that a kernel allocates for itself on CUDA, as read in torch's source (mha_bwd in flash_api.cpp, and
logsumexp_out_impl in ReduceOps.cpp), by the arguments of the operator."""
