"""Kernels that one layer launches, forward and backward, by name: ours, stock PEFT's adapters, and the frozen base alone.

`python bench/kernel_counts.py` makes the table of docs/benchmarks.md of it; a test holds ours to a ceiling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn

from qvera.adapters.bank import AdapterBank
from qvera.adapters.save_load import attach
from qvera.config.sections import AdapterSection
from qvera.models.attention import VARLEN, open_mask
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.linear import FrozenLinear4bit
from tests.gpu.fake_accelerator import FakeAccelerator, per_layer

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


def layer_costs(
    fake: FakeAccelerator, prepare: Callable[[Any], Any], *, shape: str = "7b", tokens: int = 2048, adapters: int = 1
) -> dict[str, Any]:
    """What one decoder layer takes, forward and backward, on a batch of one row of ``tokens`` (above 1,536).

    ``plain`` and ``checkpointed`` are launches by name, the latter with the recomputation; ``kept_bytes`` is what
    autograd keeps from forward to backward, but for parameters, shared memory once. With several ``adapters`` the
    tokens are those of as many rows in one sequence, each of an adapter of its own (`AdapterBank`).
    """
    one, two = (_passes(fake, prepare(fake.model(shape, layers)), tokens, adapters) for layers in (1, 2))
    costs: dict[str, Any] = {name: per_layer(two[name], one[name]) for name in ("plain", "checkpointed")}
    for counts in costs.values():
        if "bitsandbytes.gemm_4bit" in counts:
            counts["bitsandbytes.gemm_4bit"] *= GEMM_4BIT_LAUNCHES
    return costs | {"kept_bytes": two["kept_bytes"] - one["kept_bytes"]}


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


def _passes(fake: FakeAccelerator, model: Any, tokens: int, adapters: int) -> dict[str, Any]:
    decoder, kept = model.get_decoder(), {}
    # else nothing needs a gradient in the frozen base
    decoder.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
    fixed = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed:
            kept[storage._cdata] = storage
        return tensor

    found: dict[str, Any] = {}
    model.train()
    with _inputs(model, tokens, adapters) as inputs:
        for name in ("plain", "checkpointed"):
            model.zero_grad()
            if name == "checkpointed":
                enable_checkpointing(model, by_tiles=adapters == 1)
            keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with fake.record() as found[name]:
                with keeping if name == "plain" else contextlib.nullcontext():
                    hidden = decoder(**inputs, use_cache=False).last_hidden_state
                hidden.backward(torch.empty_like(hidden))
            found.setdefault("kept_bytes", sum(storage.nbytes() for storage in kept.values()))
            kept.clear()
    return found
