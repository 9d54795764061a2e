"""A 4-bit base larger than the accelerator's memory: its decoder layers stay in RAM, and two are on the device.

Layer i uses buffer i mod 2 of the device: the packed weights and statistics of its linears and experts always point
into it. Each reader calls `LayerStream.use` first (`quantization.bring` does). It waits for the layer's bytes and
starts the copy of the likely next layer into the other buffer. A checkpoint recomputes a layer right before its
backward, so one copy serves both: a training pass over L layers copies 2 L - 4 of them. A copy waits for everything
that the computing stream was given before, which includes the readers of the layer that it overwrites.

The bytes lie in page-locked RAM. If there is too little, they stay in the mapped file, and a thread reads each layer
into page-locked RAM shortly before its copy.

Rules of `CopyStream` and `PinnedChunks`, which `qvera.models.checkpointing` uses too:

- `CopyStream.copy` may be called as soon as the tensor's kernels were launched: the copy waits for them.
- Keep the tensors of a copy alive until `CopyStream.wait` was called on its event. Else the allocator gives their
  memory to the next kernel of the computing stream, which does not wait for the copy.
- A copied tensor may be read after `CopyStream.wait`, by kernels that are launched later.
- Copies of one `CopyStream` run one after the other. So a chunk may be given back, and taken for another copy of the
  same stream, before its last copy has run.

No accelerator has run this. tests/models/test_checkpointing.py runs it with a thread in place of a stream.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from qvera.models import quantization
from qvera.models.experts import ExpertStack
from qvera.models.quantization import Linear4bit
from qvera.models.structure import decoder_layers, decoder_of
from qvera.utils import accelerator, memory

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import PreTrainedModel

PINNED_SHARE = 0.8
"""Page-locked RAM can't be swapped out, so the system keeps at least a fifth of what is free."""
_RESIDENT_SHARE = 0.85
"""A larger share of the free memory leaves too little for activations and answers."""
_ALIGNMENT_BYTES = 512  # where the device's own allocations begin too
CHUNK_BYTES = 2**24
"""16 MB: long enough for the bus's full rate. torch rounds page-locked memory up to a power of two."""


class CopyStream:
    """A side stream of one device; see the module for the rules."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.Stream(device)

    def computing(self) -> Any:
        """The stream that computes; it is the calling thread's."""
        return accelerator.computing_stream(self.device)

    def mark(self) -> Any:
        """Return an event that comes when all kernels launched so far have run."""
        return self.computing().record_event()

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], after: Any = None) -> Any:
        """Copy each (destination, source) after the launched kernels, or ``after`` a `mark`; returns an event."""
        self._stream.wait_event(self.mark() if after is None else after)
        with self._stream:
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Let kernels that are launched from now on run after that event. The program goes on at once."""
        self.computing().wait_event(event)

    def keep(self, tensor: torch.Tensor) -> None:
        """Reuse this tensor's memory, once it is let go of, only after the copies that are running then."""
        tensor.record_stream(self._stream)


class PinnedChunks:
    """Page-locked RAM in chunks of one size, each of them allocated once and used again."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES, pin_memory: bool = True) -> None:
        self.chunk_bytes, self._pin_memory = chunk_bytes, pin_memory
        self.allocated = 0
        self._free: list[torch.Tensor] = []

    def take(self, size_bytes: int) -> list[torch.Tensor]:
        """Chunks (uint8) that together hold this many bytes. The last one may be used in part."""
        count = -(-size_bytes // self.chunk_bytes)
        taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        while len(taken) < count:
            taken.append(torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=self._pin_memory))
            self.allocated += 1
        return taken

    def give(self, chunks: list[torch.Tensor]) -> None:
        """Take chunks back. Copies of the same stream may still wait to use them."""
        self._free.extend(chunks)


def pairs(flat: torch.Tensor, chunks: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces of a contiguous tensor as bytes, each with the part of a chunk that holds it."""
    parts = flat.view(-1).view(torch.uint8).split(len(chunks[0]))
    return [(part, chunk[: len(part)]) for part, chunk in zip(parts, chunks, strict=True)]


def streams_by_itself(base_bytes: int, device: torch.device) -> bool:
    """Whether the base is too large for the device: ``model.stream: auto`` without a plan."""
    return accelerator.has_own_memory(device) and base_bytes > _RESIDENT_SHARE * memory.available_bytes(device)


def stream_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Stream the 4-bit linears of decoder layers from RAM to ``device``, which has all else of the model."""
    packed = (Linear4bit, ExpertStack)
    layers = [[m for m in layer.modules() if isinstance(m, packed)] for layer in decoder_layers(decoder_of(model))]
    LayerStream([layer for layer in layers if layer], device)


def facts_of(model: nn.Module) -> dict[str, Any] | None:
    """``layers``, ``layer_bytes`` (of the largest), ``bytes`` and ``held_in`` for run.json. None: not streamed."""
    found = (getattr(weight, "streamed", None) for weight in model.parameters())
    return next((streamed.stream.facts for streamed in found if streamed is not None), None)


class StreamedLinear(NamedTuple):
    """The attribute ``streamed`` of a streamed linear's weight."""

    stream: LayerStream
    layer: int
    packed: torch.Tensor
    """The packed weight in the file, on the CPU, where ``state`` is too. A stack of experts has no state."""
    state: QuantState | None


class LayerStream:
    """Decoder layers in RAM, two of which are on the device or on the way there. For one computing thread."""

    def __init__(
        self,
        layers: Sequence[Sequence[Linear4bit | ExpertStack]],
        device: torch.device,
        pinned: bool | None = None,
        copies: CopyStream | None = None,
    ) -> None:
        """Let the linears of each layer, whose weights are on the CPU, read from buffers on ``device``.

        Args:
            pinned: whether all bytes are copied into page-locked RAM; None: where they fit.
            copies: None for a stream of its own, if the device has memory of its own.
        """
        own_memory = accelerator.has_own_memory(device)
        self._copies = copies or (CopyStream(device) if own_memory else None)
        self._chunks = PinnedChunks(pin_memory=own_memory)
        # (offset in its layer's bytes, a tensor of the file as uint8 [bytes]) of each layer
        self._sources: list[list[tuple[int, torch.Tensor]]] = []
        self._sizes: list[int] = []
        for linears in layers:
            source, at = [], 0
            for tensor in (tensor for linear in linears for tensor in quantization.stored_tensors(linear)):
                part = tensor.reshape(-1).view(torch.uint8)
                source.append((at, part))
                end = at + len(part)
                at = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            self._sources.append(source)
            self._sizes.append(end)
        largest, total = max(self._sizes), sum(self._sizes)
        # two buffers of the largest layer; neighbouring layers never use the same one
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]  # the layer in each buffer
        self._arrived: list[Any] = [None, None]  # the event that the copy into it is through
        self._current: int | None = None
        self._starts_over = False
        if pinned is None:  # without a stream nothing would run beside the computation
            free = PINNED_SHARE * memory.available_bytes(torch.device("cpu"))
            # torchrun's name for the processes of this machine, and that of DeepSpeed's launcher
            ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
            pinned = self._copies is not None and int(ranks) * total <= free
        self._pinned = self._pin() if pinned else None
        if self._copies is not None:
            for buffer in self._buffers:
                self._copies.keep(buffer)
            if self._pinned is None:
                self._staging = [self._chunks.take(largest) for _ in range(2)]
                self._reader = ThreadPoolExecutor(1, "qvera-stream")
        held_in = "mapped file" if self._pinned is None else "pinned RAM"
        self.facts = {"layers": len(layers), "layer_bytes": largest, "bytes": total, "held_in": held_in}
        # the linears point into the buffers for good; `use` sees to it that their bytes are there
        for number, linears in enumerate(layers):
            buffer, places = self._buffers[number % 2], iter(self._sources[number])
            for linear in linears:
                stored, state = quantization.stored_tensors(linear), getattr(linear.weight, "quant_state", None)
                on_device = []
                for tensor in stored:
                    at, part = next(places)
                    on_device.append(buffer[at : at + len(part)].view(tensor.dtype).view(tensor.shape))
                quantization.replace_tensors(linear, on_device, device)
                weight: Any = linear.weight
                weight.streamed = StreamedLinear(self, number, stored[0], state)

    def use(self, layer: int) -> None:
        """Let the computing stream wait for a layer's bytes, and start the copy of the likely next layer."""
        if layer == self._current:
            return
        before, self._current = self._current, None  # an error leaves it so, and the next use looks again
        self._fetch(layer)
        if self._copies is not None:
            slot = layer % 2
            arrived = self._arrived[slot]
            try:
                self._copies.wait(arrived.result() if isinstance(arrived, Future) else arrived)
            except BaseException:  # the reading thread's error
                self._held[slot] = self._arrived[slot] = None  # the next use reads the layer again
                raise
        last = len(self._sources) - 1
        if before == last:
            self._starts_over = layer == 0
        self._current = layer
        if self._copies is None:
            return
        # a wrong guess costs a copy, and nothing else
        if layer == last:  # answers and evaluations begin again at the first layer, training turns round
            following = 0 if self._starts_over and last % 2 else max(last - 1, 0)
        else:
            upwards = layer == 0 or (before is not None and before < layer)
            following = layer + 1 if upwards else layer - 1
        self._fetch(following)

    def _fetch(self, layer: int) -> None:
        slot = layer % 2
        if self._held[slot] == layer:
            return
        self._held[slot] = None  # until all of it is copied
        if self._copies is None:
            for at, part in self._sources[layer]:
                self._buffers[slot][at : at + len(part)].copy_(part)
        elif self._pinned is not None:
            buffer = self._buffers[slot][: self._sizes[layer]]
            self._arrived[slot] = self._copies.copy(pairs(buffer, self._pinned[layer]))
        else:
            read = functools.partial(self._read_and_copy, layer, self._arrived[slot], self._copies.mark(), self._copies)
            self._arrived[slot] = self._reader.submit(read)
        self._held[slot] = layer

    def _read_and_copy(self, layer: int, before: Future[Any] | None, after: Any, copies: CopyStream) -> Any:
        """Read a layer into page-locked RAM, in the reading thread, and start its copy; returns the copy's event."""
        staging, size = self._staging[layer % 2], self._sizes[layer]
        if before is not None:
            before.result().synchronize()  # the copy from the same page-locked RAM
        _fill(staging, self._sources[layer])
        used = -(-size // self._chunks.chunk_bytes)
        return copies.copy(pairs(self._buffers[layer % 2][:size], staging[:used]), after)

    def _pin(self) -> list[list[torch.Tensor]] | None:
        """All layers in page-locked RAM; None where the system does not lock so much."""
        found = []
        try:
            for size, source in zip(self._sizes, self._sources, strict=True):
                found.append(self._chunks.take(size))
                _fill(found[-1], source)
        except RuntimeError:
            found.clear()
            accelerator.empty_host_cache()  # the page cache needs that RAM now
            return None
        return found


def _fill(chunks: Sequence[torch.Tensor], source: list[tuple[int, torch.Tensor]]) -> None:
    start = 0
    for chunk in chunks:
        end = start + len(chunk)
        for at, part in source:
            low, high = max(start, at), min(end, at + len(part))
            if low < high:
                chunk[low - start : high - start].copy_(part[low - at : high - at])
        start = end
