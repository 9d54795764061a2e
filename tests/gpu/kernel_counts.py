"""Kernels that one layer launches, forward and backward, by name: ours, stock PEFT's adapters, and the frozen base alone.

`python bench/kernel_counts.py` makes the table of docs/benchmarks.md of it; a test holds ours to a ceiling.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.adapters.bank import AdapterBank
from qvera.adapters.files.save_load import attach
from qvera.config.schema import AdapterSection
from qvera.models.attention import VARLEN, open_mask
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.linear import FrozenLinear4bit
from tests.gpu.fake_accelerator import FakeAccelerator, Seen, per_layer

GEMM_4BIT_LAUNCHES = 4
"""What stands behind ``bitsandbytes.gemm_4bit`` on CUDA above 1,536 tokens: two dequantizations, a sum, a product
(`_dequant_linear_fallback` in bitsandbytes/backends/cuda/ops.py, 0.50). Below it may be one kernel."""

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _stock(model: Any) -> Any:
    """The base as transformers and bitsandbytes run it."""
    for module in model.modules():
        if type(module) is FrozenLinear4bit:
            module.__class__ = bnb.nn.Linear4bit
    return model


def ours(rank: int, method: str = "vera") -> Callable[[Any], Any]:
    """Put qvera's adapter on a model."""
    return lambda model: attach(model, AdapterSection(rank=rank, method=method))


def _peft(config: Any) -> Callable[[Any], Any]:
    def prepare(model: Any) -> Any:
        # PEFT makes its adapters on the CPU; a module of fake tensors can't be moved, but its tensors can
        with mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module):
            model = get_peft_model(_stock(model), config)
        device = model.get_input_embeddings().weight.device
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.device != device:
                    moved = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                    module.register_parameter(name, moved)
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.device != device:
                    module.register_buffer(name, buffer.to(device))
        return model

    return prepare


CASES: dict[str, Callable[[Any], Any]] = {
    "frozen base, stock": _stock,
    "PEFT LoRA, r=16": _peft(LoraConfig(r=16, target_modules=LINEARS)),
    "PEFT VeRA, r=256": _peft(VeraConfig(r=256, target_modules=LINEARS)),
    "qvera, r=256": ours(256),
    "qvera, r=1024": ours(1024),
    "qvera LoRA, r=16": ours(16, "lora"),
    "qvera, r=256, 32 adapters": ours(256),
}

ADAPTERS = {"qvera, r=256, 32 adapters": 32}
"""How many adapters share the pass; 1 in the other cases."""


def layer_kernels(
    fake: FakeAccelerator, prepare: Callable[[Any], Any], *, shape: str = "7b", tokens: int = 2048,
    checkpointing: bool, adapters: int = 1,
) -> Counter[str]:  # fmt: skip
    """Name → launches of one decoder layer, forward and backward, on a batch of one row of ``tokens`` (above 1,536).

    With ``checkpointing`` the layer's recomputation is counted too. With several ``adapters`` the tokens are those of
    as many rows in one sequence, each of an adapter of its own (`AdapterBank`).
    """
    passes = [_one_pass(fake, prepare(fake.model(shape, layers)), tokens, checkpointing, adapters) for layers in (1, 2)]
    counts = per_layer(passes[1], passes[0])
    if "bitsandbytes.gemm_4bit" in counts:
        counts["bitsandbytes.gemm_4bit"] *= GEMM_4BIT_LAUNCHES
    return counts


@contextlib.contextmanager
def _inputs(model: Any, tokens: int, adapters: int) -> Iterator[dict[str, Any]]:
    """What the decoder is called with, in the context in which rows use their adapters."""
    ids = torch.empty(1, tokens, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    if adapters == 1:
        yield {"input_ids": ids}
        return
    ends = torch.empty(adapters + 1, dtype=torch.int32, device=ids.device)
    lengths = [tokens // adapters] * adapters
    with AdapterBank(model, adapters).rows(range(adapters), lengths):
        yield {
            "input_ids": ids,
            "position_ids": ids,
            "attention_mask": open_mask(VARLEN, ids),
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
            **dict.fromkeys(("max_length_q", "max_length_k"), lengths[0]),
        }


def _one_pass(fake: FakeAccelerator, model: Any, tokens: int, checkpointing: bool, adapters: int = 1) -> Seen:
    decoder = model.get_decoder()
    # else nothing needs a gradient in the frozen base
    decoder.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
    if checkpointing:
        enable_checkpointing(model, by_tiles=adapters == 1)
    model.train()
    with _inputs(model, tokens, adapters) as inputs, fake.record() as seen:
        hidden = decoder(**inputs, use_cache=False).last_hidden_state
        hidden.backward(torch.empty_like(hidden))
    return seen


def layer_kept_bytes(
    fake: FakeAccelerator, prepare: Callable[[Any], Any], *, shape: str = "7b", tokens: int = 2048, adapters: int = 1
) -> int:
    """What autograd keeps of one decoder layer from forward to backward, but for parameters; shared memory once."""
    one, two = (_kept(prepare(fake.model(shape, layers)), tokens, adapters) for layers in (1, 2))
    return two - one


def _kept(model: Any, tokens: int, adapters: int) -> int:
    decoder, kept = model.get_decoder(), {}
    decoder.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
    fixed = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed:
            kept[storage._cdata] = storage
        return tensor

    with _inputs(model, tokens, adapters) as inputs:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = decoder(**inputs, use_cache=False).last_hidden_state
    del hidden
    return sum(storage.nbytes() for storage in kept.values())


class _DequantizedWeights(TorchDispatchMode):
    """How many dequantized weights are in memory at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[weakref.ref[torch.UntypedStorage]] = []
        self.most = self.launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.qvera.dequantize_4bit.default:
            alive = [storage for storage in self.storages if storage() is not None]
            self.storages = [*alive, weakref.ref(out.untyped_storage())]
            self.most, self.launched = max(self.most, len(self.storages)), self.launched + 1
        return out


def dequantized_weights(fake: FakeAccelerator) -> tuple[int, int]:
    """The most dequantized weights in memory at one time in forward and backward of a 7B layer, and how many in all."""
    model = CASES["qvera, r=256"](fake.model("7b", 1))
    with _DequantizedWeights() as weights:
        _one_pass(fake, model, 2048, checkpointing=True)
    return weights.most, weights.launched
