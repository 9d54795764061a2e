"""The one file that asks torch which device there is, what it can do, and how much memory it has.

A device is a CPU or an accelerator (CUDA, ROCm, XPU, MPS, or a backend that registered itself). What a backend does not
count (MPS has no peak) is None here. CUDA-only parts are marked.

Run so far on a CPU and on the tests' fake accelerator (tests/gpu), and on no real one.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from qvera.utils.errors import InputError

T = TypeVar("T")
NVIDIA_CARD = "/dev/nvidia0"
"""The device file of the first NVIDIA card, which the driver makes."""
_NOTHING = contextlib.nullcontext()
_ALIGNED_BYTES = 16
"""`HeldTensors` begin at multiples of this."""


def is_available() -> bool:
    """Whether torch can use an accelerator here."""
    return torch.accelerator.is_available()


def unusable_card() -> str | None:
    """Return a sentence about an NVIDIA card that is here and that torch can't use; None if there is no such card."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    if first in ("", "-1") or not os.path.exists(NVIDIA_CARD) or is_available():
        return None
    if first.isdigit() and not os.path.exists(named := NVIDIA_CARD[:-1] + first):
        return f"CUDA_VISIBLE_DEVICES begins with {first}, and there is no {named}. Name a card of `nvidia-smi -L`."
    built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    return (
        f"There is an NVIDIA card ({NVIDIA_CARD}), and torch can't use it: this torch was built {built}. Update the "
        "driver, or install a torch for the one that is here: https://pytorch.org/get-started/locally/"
    )


def device_count() -> int:
    """Return the number of accelerators that this process sees."""
    return torch.accelerator.device_count() if is_available() else 0


def launcher_number(name: str) -> int:
    """Return a whole number that a launcher put into the environment, such as RANK. InputError for what is none."""
    text = os.environ[name]
    if not text.isdecimal():
        raise InputError(f"{name}: is {text!r} in the environment; a launcher sets it to a whole number.")
    return int(text)


def current_device() -> torch.device:
    """Return the accelerator of this process, else the CPU. Under a launcher it is the one of its LOCAL_RANK."""
    found = torch.accelerator.current_accelerator() if is_available() else None
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, launcher_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0)


def use_device(index: int) -> None:
    """Make this accelerator the default one; nothing on a CPU."""
    if is_available():
        torch.accelerator.set_device_index(index)


def in_use(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a context that launches kernels on this accelerator; nothing on a CPU, or if it is the current one."""
    if device.index is None or device.index == torch.accelerator.current_device_index():
        return _NOTHING
    return torch.accelerator.device_index(device.index)


def is_accelerator(device: torch.device | str) -> bool:
    """Whether a device, or a type such as ``cuda``, is neither a CPU nor ``meta``."""
    return (device if isinstance(device, str) else device.type).partition(":")[0] not in ("cpu", "meta")


def has_own_memory(device: torch.device | str) -> bool:
    """Whether moving a tensor to RAM frees device memory; not on a CPU and MPS."""
    return is_accelerator(device) and str(device).partition(":")[0] != "mps"


def computing_stream(device: torch.device) -> torch.Stream:
    """The stream in which this thread launches kernels."""
    return torch.accelerator.current_stream(device)


def synchronize() -> None:
    """Wait until the accelerator has finished its work; nothing on a CPU."""
    if is_available():
        torch.accelerator.synchronize()


def empty_cache() -> None:
    """Give unused memory of the accelerator's allocator back to the system."""
    if is_available() and (empty := _function(current_device(), "empty_cache")) is not None:
        empty()


def empty_host_cache() -> None:
    """Give unused page-locked RAM back to the system, where this torch can."""
    empty = getattr(torch.accelerator, "empty_host_cache", None)
    if is_available() and empty is not None:
        empty()


def free_and_total_bytes(device: torch.device) -> tuple[int, int] | None:
    """Return the free bytes and all bytes of an accelerator; None where they are not known (MPS)."""
    ask = _function(device, "mem_get_info")
    return None if ask is None else ask(device)


def counted_bytes(device: torch.device, what: Literal["allocated", "reserved"], peak: bool = False) -> int | None:
    """Return the bytes of tensors on an accelerator, or all that this process's allocator holds: now, or the ``peak``.

    The peak is that since `reset_peak`. None where the device does not count it (MPS has no peak).
    """
    if (ask := _function(device, f"{'max_' * peak}memory_{what}")) is not None:
        return ask(device)
    of_mps = {"allocated": "current_allocated_memory", "reserved": "driver_allocated_memory"}[what]
    ask = None if peak else _function(device, of_mps)
    return None if ask is None else ask()


def reset_peak(device: torch.device) -> bool:
    """Start the peaks anew; False where none are kept."""
    reset = _function(device, "reset_peak_memory_stats")
    if reset is not None:
        reset(device)
    return reset is not None


def card_name(device: torch.device) -> str:
    """Return a device's name, such as ``cuda: NVIDIA H100``, or its type alone."""
    ask = _function(device, "get_device_name")
    return device.type if ask is None else f"{device.type}: {ask(device)}"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether an accelerator has bfloat16 products in hardware."""
    ask = _function(device, "is_bf16_supported")
    if ask is None:  # a backend that registered itself names the dtypes that autocast may take
        dtypes = _function(device, "get_amp_supported_dtype")
        return dtypes is not None and torch.bfloat16 in dtypes()
    # CUDA only: cards before Ampere emulate these products, which takes longer than fp32
    return ask(including_emulation=False) if device.type == "cuda" else ask()


def multiplies_groups(device: torch.device) -> bool:
    """Whether torch multiplies groups of rows, each with a matrix of its own, in one launch.

    That is on Hopper and data centre Blackwell. On other cards torch reads the ends of the groups on the host, and
    launches a product for each (its GroupedMMUtils.h).
    """
    ask = _function(device, "get_device_capability")
    if device.type != "cuda" or ask is None or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    return ask(device)[0] in (9, 10)


def pages_optimizer_state() -> bool:
    """Whether bitsandbytes' paged optimizers work: they need CUDA's `cudaMallocManaged`."""
    return torch.cuda.is_available()


def product_workspace_bytes(device: torch.device) -> int:
    """cuBLAS' two workspaces, 8.1 MiB each or 32 on Hopper and later (torch's CublasHandlePool.cpp); 0 without CUDA."""
    if device.type != "cuda" or (ask := _function(device, "get_device_capability")) is None:
        return 0
    return 2 * (32 * 2**20 if ask(device)[0] >= 9 else (2 * 4096 + 8 * 16) * 2**10)


def collective_buffer_bytes(device_type: str) -> int:
    """The most that NCCL takes of a GPU for one communicator, outside of torch's allocator; 0 without CUDA.

    Each channel has buffers of 10 MiB (4 of them ``NCCL_BUFFSIZE``) for each of its connections: one of a ring, two of
    a tree. NCCL opens 32 channels on the fastest NVLink, which took 1.06 GB on eight H100s (NVIDIA/nccl issue 1685),
    and as few as 2 on PCIe; ``NCCL_MAX_NCHANNELS`` sets the limit.
    """
    if device_type != "cuda":
        return 0
    asked = {name: os.environ.get(name, "") for name in ("NCCL_MAX_NCHANNELS", "NCCL_BUFFSIZE")}
    channels, buffer = (int(text) if text.isdigit() and int(text) else None for text in asked.values())
    return min(channels or 32, 32) * 3 * (6 * 2**20 + (buffer or 4 * 2**20))


class HeldTensors:
    """Tensors on a device, from numpy arrays, that stay where they are when they get other numbers.

    So a graph can read them. An accelerator gets one copy from pinned memory, for which the host does not wait.
    """

    def __init__(self, device: torch.device | str, arrays: dict[str, np.ndarray]) -> None:
        """Make room for these arrays, and for those of the same shapes that `fill` gets."""
        self._apart = has_own_memory(device)  # elsewhere nothing keeps the host's tensor alive until it is copied
        sizes = [-(-array.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES for array in arrays.values()]
        self._starts = np.cumsum([0, *sizes]).tolist()
        self._sent = torch.empty(self._starts[-1], dtype=torch.uint8, device=device)
        self.tensors = dict[str, torch.Tensor]()
        for start, (name, array) in zip(self._starts, arrays.items(), strict=False):
            dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
            self.tensors[name] = self._sent[start : start + array.nbytes].view(dtype).view(array.shape)

    def fill(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Copy arrays of the same names, shapes and dtypes into the tensors, and return these."""
        # All arrays lie in one buffer, so an accelerator gets one copy instead of one for each.
        packed = np.zeros(self._starts[-1], dtype=np.uint8)
        for start, array in zip(self._starts, arrays.values(), strict=False):
            packed[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        host = torch.from_numpy(packed)
        self._sent.copy_(host.pin_memory() if self._apart else host, non_blocking=self._apart)
        return self.tensors


def tensors_on(device: torch.device | str, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Turn numpy arrays into tensors on a device.

    A CPU shares the arrays' memory. An accelerator gets one copy from pinned memory, for which the host does not wait.
    """
    if not is_accelerator(device):
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return HeldTensors(device, arrays).fill(arrays)


def tensor_on(device: torch.device | str, array: np.ndarray) -> torch.Tensor:
    """Turn one numpy array into a tensor on a device, as `tensors_on` does."""
    return tensors_on(device, {"array": array})["array"]


def records_graphs(device: torch.device) -> bool:
    """Whether `GraphRecorder` works here: CUDA, with torch 2.13 or newer."""
    return device.type == "cuda" and hasattr(torch.accelerator, "Graph")


class GraphRecorder:
    """Records the kernels of a function as a graph, which launches them at once. Only one graph may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.Stream | None = None  # one, because cuBLAS keeps memory for each
        self._pool: tuple[int, int] | None = None  # all graphs share their memory

    def record(self, run: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record the kernels of ``run``, none of which runs yet.

        Returns a function that launches them, and the output of ``run``, which every launch fills anew. RuntimeError:
        the host would wait for the device.
        """
        self._stream = self._stream or torch.Stream(self._device)  # the default one can't be recorded
        graph = torch.accelerator.Graph(pool=self._pool, capture_error_mode="thread_local")
        with self._stream, graph:
            output = run()
        self._pool = graph.pool()
        return graph.replay, output


@contextlib.contextmanager
def refusing_waits(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError where the host would wait for the device within the block. CUDA only; others are not asked."""
    set_mode, mode = _function(device, "set_sync_debug_mode"), _function(device, "get_sync_debug_mode")
    if set_mode is None or mode is None:
        yield
        return
    before = mode()
    set_mode("error")
    try:
        yield
    finally:
        set_mode(before)


def collective_backend() -> str:
    """Name the backend for `init_process_group`: gloo for control, the accelerator's own for its tensors."""
    if not is_available():
        return "gloo"
    kind = current_device().type
    try:
        return f"cpu:gloo,{kind}:{torch.distributed.get_default_backend_for_device(kind)}"
    except ValueError:  # torch knows none for it
        return "gloo"


def random_state() -> dict[str, torch.Tensor]:
    """Return the accelerator's generator state (uint8) by its type, such as ``cuda``; {} where there is none."""
    device = current_device()
    ask = _function(device, "get_rng_state")
    return {} if ask is None else {device.type: ask()}


def set_random_state(states: dict[str, torch.Tensor]) -> None:
    """Restore what `random_state` gave. The state of another type of device is left alone."""
    device = current_device()
    give = _function(device, "set_rng_state")
    if give is not None and device.type in states:
        give(states[device.type])


@contextlib.contextmanager
def forked_random_state() -> Iterator[None]:
    """Restore the generators of CPU and accelerator after the block."""
    with torch.random.fork_rng(devices=[]):  # it can't fork MPS, whose functions take no device
        before = random_state()
        try:
            yield
        finally:
            set_random_state(before)


def _function(device: torch.device, name: str) -> Callable[..., Any] | None:
    """Look up a function of the accelerator's torch module; None where it lacks it, and on a CPU."""
    return getattr(torch.get_device_module(device), name, None) if is_accelerator(device) else None
