"""Bytes of layers with a recurrence or a linear attention: Mamba's and Mamba 2's scan, the gated delta rule.

No formula is written down for them: transformers' own code of such a layer runs once on the meta device, forward and
backward, on three lengths, and its live tensors are counted. Bytes are a square function of the tokens (Mamba 2 takes
its chunks of tokens with each other), which the three lengths determine. mamba_ssm's kernels keep less.
"""

from __future__ import annotations

import copy
import re
import weakref
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.training.plan.run import Linear, PlannedRun

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_CHUNK = 64  # of tokens, of the gated delta rule
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


class Recurrence(NamedTuple):
    """The recurrent part of a layer; the bytes are coefficients of tokens², tokens and 1, for one row."""

    layer: int
    path: str
    chunk: int
    kept: tuple[float, ...]
    """By autograd."""
    beside: tuple[float, ...]
    """The most that exists beside it, in forward or backward."""

    def bytes_of(self, run: PlannedRun) -> tuple[int, int]:
        """Kept, and beside it, for the run's batch."""
        tokens = -(-run.batch.tokens // self.chunk) * self.chunk
        kept, beside = (int(np.polyval(each, tokens)) for each in (self.kept, self.beside))
        return run.batch.rows * kept, run.batch.rows * beside


def recurrences(model: nn.Module, hidden: int, dtype: torch.dtype) -> tuple[Recurrence, ...]:
    """Of a model without weights; those of one class and size are counted once. () where the code does not run so."""
    found, counted = [], dict[Any, Any]()
    for path, module in model.named_modules():
        layer: Any = _LAYER.search(f".{path}.")
        if layer is None or not (hasattr(module, "A_log") and hasattr(module, "conv1d")):
            continue
        chunk = getattr(module, "chunk_size", 8 if hasattr(module, "dt_proj") else _CHUNK)  # Mamba goes token by token
        key = type(module), tuple(parameter.shape for parameter in module.parameters())
        try:
            counted[key] = counted.get(key) or _count(module, hidden, dtype, chunk)
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            return ()
        found.append(Recurrence(int(layer[1]), path, chunk, *counted[key]))
    return tuple(found)


def kinds_of_layers(run: PlannedRun) -> list[tuple[PlannedRun, int]]:
    """For each kind of layer: the run as if all its layers were of that kind, and how many of its layers are."""
    shape, by_layer = run.shape, {each.layer: each for each in run.shape.recurrences}
    if not by_layer:
        return [(run, shape.layers)]
    kinds: dict[Any, list[int]] = {}
    for layer in sorted({x.layer for x in shape.linears if x.layer is not None}):
        own, inner = by_layer.get(layer), f"{by_layer[layer].path}." if layer in by_layer else None
        beside = [x for x in shape.linears if x.layer == layer and not (inner and x.name.startswith(inner))]
        attends = any(x.role in _ATTENTION for x in beside)
        has_mlp = any(x.role not in _ATTENTION for x in beside) or any(x.layer == layer for x in shape.experts)
        kinds.setdefault((own and own._replace(layer=0, path=""), attends or own is None, has_mlp), []).append(layer)
    found = []
    for (own, attends, has_mlp), layers in kinds.items():

        def of_kind(x: Linear, layers: list[int] = layers) -> bool:
            return x.layer in layers

        without: dict[str, Any] = {} if attends else {"heads": 0, "kv_heads": 0, "head_norms": False}
        like = replace(
            shape,
            linears=tuple(replace(x, is_target=x.name in run.adapted_names) for x in shape.linears if of_kind(x)),
            experts=tuple(x for x in shape.experts if x.layer in layers),
            ff=shape.ff if has_mlp else 0,
            recurrences=() if own is None else (own,),
            **without,
        )
        found.append((replace(run.changed({"adapter.targets": "all-linear"}), shape=like), len(layers)))
    return found


def _count(module: nn.Module, hidden: int, dtype: torch.dtype, chunk: int) -> tuple[tuple[float, ...], ...]:
    module = copy.deepcopy(module).to(dtype).requires_grad_(False).train()
    lengths, counts = [2 * chunk, 4 * chunk, 8 * chunk], []
    for tokens in lengths:
        x = torch.empty(1, tokens, hidden, dtype=dtype, device="meta", requires_grad=True)
        with _Live() as live:
            y = module(x)
            y = y[0] if isinstance(y, tuple) else y
            kept = live.now - y.nbytes
            y.backward(torch.empty_like(y))
        counts.append((kept, live.peak - kept))
    return tuple(tuple(np.polyfit(lengths, each, 2)) for each in zip(*counts, strict=True))


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, while they live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        # autograd adds up two gradients in place, but not while such a mode is on
        adds_up = func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() != -1
        self.peak = max(self.peak, self.now - (out.nbytes if adds_up else 0))
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed() -> None:
            self._known.discard(key)
            self.now -= size

        self._known.add(key)
        self.now += size
        weakref.finalize(storage, freed)
