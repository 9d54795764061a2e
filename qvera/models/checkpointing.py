"""Two ways in which a training pass may run each decoder layer: recomputed in backward, or compiled.

A recomputed layer keeps only its input: on the device, or in RAM (``offload``). An offloaded input is copied out while
its layer computes, and leaves the device before the next layer runs. In backward the input of layer i - 1 comes back
while layer i is recomputed. So two inputs are on the device at a time, and the rest in page-locked RAM. No accelerator
has run this yet; the tests run it with a thread in place of the stream.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qvera.models import stream
from qvera.models.attention import compilable
from qvera.models.lean_layers import tile_mlps
from qvera.models.stream import CopyStream, PinnedChunks
from qvera.models.structure import causal_model, decoder_layers, decoder_of
from qvera.utils import accelerator
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Mode = bool | Literal["offload"]

INPUTS_ON_DEVICE = 2
"""With offloading: the layer input in use, and one under way."""


class _KeptInput:
    """The input of a checkpointed layer, on the device or in RAM. Autograd holds it in place of the tensor."""

    def __init__(self, tensor: torch.Tensor, streams: CopyStream, pool: PinnedChunks, before: _KeptInput | None):
        self._streams, self._pool = streams, pool
        self._event: Any = None
        self._chunks: list[torch.Tensor] = []
        self._tensor: torch.Tensor | None = None  # what `__del__` needs is there before memory can run out
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self.before = None if before is None else weakref.ref(before)
        self.used = False
        self._tensor = tensor.detach().contiguous()
        self._chunks = pool.take(tensor.numel() * tensor.element_size())
        self._event = streams.copy((chunk, part) for part, chunk in stream.pairs(self._tensor, self._chunks))

    def fetch(self) -> None:
        """Start to copy the input back, unless it is on the device."""
        if self._tensor is None:
            self._tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._event = self._streams.copy(stream.pairs(self._tensor, self._chunks))

    def let_go(self) -> torch.Tensor | None:
        """Give up the tensor on the device. The computing stream waits first for a copy that uses it."""
        if self._event is not None:
            self._streams.wait(self._event)
        tensor, self._tensor, self._event = self._tensor, None, None
        return tensor

    def __del__(self) -> None:
        # autograd may drop a graph while its copies run: the tensor's memory may be used again only after them
        self.let_go()
        self._pool.give(self._chunks)


class _OffloadedInputs:
    """Packs the inputs that checkpoints save into RAM. Unpacks each one ahead of its use."""

    def __init__(self, streams: CopyStream, pool: PinnedChunks) -> None:
        self._streams, self._pool = streams, pool
        self._leaving: _KeptInput | None = None  # its tensor is still on the device
        self._last: weakref.ref[_KeptInput] | None = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _KeptInput:
        """Start to copy a layer's input out. The input before it leaves the device now."""
        if tensor.device != self._streams.device or not tensor.numel():
            return tensor
        # the layer that reads it was launched already, so in the stream the wait for the copy comes behind that layer
        if self._leaving is not None:
            self._leaving.let_go()
        kept = _KeptInput(tensor, self._streams, self._pool, None if self._last is None else self._last())
        self._leaving, self._last = kept, weakref.ref(kept)
        return kept

    def unpack(self, kept: torch.Tensor | _KeptInput) -> torch.Tensor:
        """Return the input on the device, and start the copy of the one before it."""
        if isinstance(kept, torch.Tensor):
            return kept
        self._leaving = None
        kept.fetch()
        tensor = kept.let_go()
        # backward goes down the layers, so the one before is needed next; one that was used already is not copied again
        kept.used = True
        before = None if kept.before is None else kept.before()
        if before is not None and not before.used:
            before.fetch()
        assert tensor is not None
        return tensor


def draws_random_numbers(model: nn.Module) -> bool:
    """Whether a training pass drops elements or adds noise, so that recomputing has to draw the same."""
    config: Any = getattr(model, "config", None)
    trees = [] if config is None else [config.to_dict(), config.get_text_config().to_dict()]
    # a model may drop by a function with a number of its config, where no module shows it
    words = ("drop", "jitter", "noise")
    by_config = any(
        isinstance(v, float) and v > 0 and any(word in k for word in words) for tree in trees for k, v in tree.items()
    )
    return by_config or any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())


def enable_checkpointing(model: PreTrainedModel | PeftModel, mode: Mode = True, by_tiles: bool = True) -> None:
    """Recompute each decoder layer in backward instead of keeping its activations (non-reentrant).

    Args:
        mode: False keeps activations, True a layer's input. ``offload`` keeps it in RAM if the device has its own
            memory.
        by_tiles: compute MLPs by tiles of tokens if there are many (`lean_layers`). Not for rows of different adapters:
            a tile does not know the rows of its tokens.

    InputError: transformers has no checkpoints for this class.
    """
    if mode is False:
        return
    base: Any = causal_model(model)
    if not base.supports_gradient_checkpointing:
        raise InputError(
            f"training.gradient_checkpointing: transformers can't recompute the layers of {type(base).__name__}. "
            "Set it to false."
        )
    settings = {"use_reentrant": False, "preserve_rng_state": draws_random_numbers(model)}
    # transformers renamed the method in 5.x and warns about the old name
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable(settings)
    if by_tiles:
        tile_mlps(base)
    device = next(base.parameters()).device
    if mode == "offload" and accelerator.has_own_memory(device):
        offload_inputs(base, CopyStream(device), PinnedChunks(), **settings)


def offload_inputs(base: nn.Module, streams: CopyStream, chunks: PinnedChunks, **settings: Any) -> None:
    """Offload the inputs of all checkpointed layers of ``base``; ``settings`` are those of torch's checkpoint."""
    # transformers makes a leaf of the embeddings, which would stay on the device; only reentrant checkpoints need that
    base.disable_input_require_grads()  # type: ignore[operator]
    inputs = _OffloadedInputs(streams, chunks)

    def offloaded(function: Callable[..., Any], *args: Any) -> Any:
        with saved_tensors_hooks(inputs.pack, inputs.unpack):
            return checkpoint(function, *args, **settings)

    for module in base.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = offloaded  # type: ignore[assignment]  # there is no public way


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the decoder layers for training passes, and return their number. Streamed layers raise InputError.

    A model's layers are alike, so the first one's code serves all. Lengths are symbolic. A threshold on the number of
    tokens would need a version for each side, so compiled layers always take the low-rank path, with C, and whole
    weights. Tested on CPUs only.
    """
    inner = causal_model(model)
    if stream.facts_of(inner) is not None:
        raise InputError(
            "training.torch_compile: the layers of this base are streamed to the device, which compiled code does not "
            "wait for. Leave torch_compile out, or set model.stream: false."
        )

    config, device = inner.config, next(inner.parameters()).device
    if (attention := compilable(config._attn_implementation, device)) != config._attn_implementation:
        inner.set_attn_implementation(attention)

    layers = decoder_layers(decoder_of(inner))
    for layer in layers:
        _compile_in_training(layer, backend)
    return len(layers)


def _compile_in_training(layer: Any, backend: str | Callable[..., Any]) -> None:
    # torch keeps at most 8 versions of a function's code and then runs it plainly; masks, caches and dense weights
    # of evaluations would use them up before the first step
    kind, plain = type(layer), layer.forward
    compiled = torch.compile(plain, backend=backend, dynamic=True)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (compiled if self.training and torch.is_grad_enabled() else plain)(*args, **kwargs)

    # since transformers 5.25 a class checkpoints its own `forward`, and only that of the object's class: in a class of
    # its own the checkpoint stays outside of the compiled code
    layer.__class__ = type(kind.__name__, (kind,), {"forward": forward})
