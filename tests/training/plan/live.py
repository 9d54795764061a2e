"""Live counts to hold the plan's formulas against: what autograd keeps, and the most tensor bytes that exist at one time."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qvera.adapters.save_load import attach
from qvera.config.schema import Recipe
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.loss import Head
from tests.conftest import small_llama
from tests.live_bytes import LiveBytes
from tests.models.helpers import summed_loss


def tiny(recipe: Recipe, dtype: torch.dtype, **changes: Any) -> Any:
    """A small Llama of those changes with the recipe's adapter, ready to train."""
    model = small_llama(**changes).to(dtype)
    model.requires_grad_(False)
    adapted = attach(model, recipe.adapter)
    if recipe.training.gradient_checkpointing:
        enable_checkpointing(adapted)
    return adapted.train()


def fixed_storages(model: Any) -> set[int]:
    """Addresses of what is there throughout: parameters, buffers, the shared pair."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors}


def kept_bytes(model: Any, ids: torch.Tensor, mask: torch.Tensor, **others: Any) -> int:
    """Bytes of the different storages that a forward pass through the decoder keeps for backward."""
    fixed, kept = fixed_storages(model), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_base_model().get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False, **others)
    return sum(kept.values())


class _Peak(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._alive = 0, LiveBytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in inputs:
                self._alive.add(tensor)
        self.peak = max(self.peak, self._alive.while_running(func, args, out))
        return out


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def step_peak_bytes(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, chunk: int, **others: Any
) -> int:
    """The most bytes of tensors that one forward and backward makes and holds at a time, gradients of vectors left out."""
    base = model.get_base_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    with _Peak() as live:
        hidden = base.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False, **others).last_hidden_state
        nll, _ = summed_loss(hidden, labels, Head.of(base), chunk)
        del hidden
        nll.backward()
    return live.peak
