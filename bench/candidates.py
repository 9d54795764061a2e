"""Methods that are no part of qvera, tried beside it by bench/quality.py: stock PEFT's, and five of a few lines each.

Each has about as many trained numbers as VeRA or LoRA r=1. The five of our own, for a frozen linear W of [m, n]:

- ``two-sided``: (I + diag u) W (I + diag v), u and v trained.
- ``input-basis``: VeRA, but A are the leading eigenvectors of the second moments of each linear's inputs on 48 rows of the
  training part, times the length of a row of VeRA's A.
- ``both-bases``: likewise, and B those of its outputs; with `b_groups` as for qvera.
- ``gradient-bases``: A and B are the leading right and left singular vectors of the mean gradient of W over those rows.
- ``tied``: VeRA with A and B trained (Tied-LoRA, arXiv 2311.09578). Linears of one shape share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import IA3Config, LoKrConfig, MissConfig, UniLoraConfig, get_peft_model
from torch import nn

from qvera.models import forward

BASIS_ROWS = 48
OF_PEFT = ("uni-lora", "miss", "lokr", "ia3")
ON_BASES = ("input-basis", "both-bases", "gradient-bases")
OF_OURS = ("two-sided", *ON_BASES, "tied")
Directions = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name of a linear → the leading directions of its inputs [rank, n] and of its outputs [rank, m], each of length 1."""


def peft_config(method: str, rank: int, kind: Any) -> Any:
    """PEFT's config. ``rank``: of Uni-LoRA the numbers of θ, at rank 4; LoKr's factor is 8."""
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": kind}
    if method == "uni-lora":
        return UniLoraConfig(r=4, theta_d_length=rank, **common)
    if method == "miss":
        return MissConfig(r=rank, **common)
    if method == "lokr":
        return LoKrConfig(r=rank, alpha=rank, decompose_factor=8, **common)
    return IA3Config(feedforward_modules=[], **common)


class Scaled(nn.Module):
    """``two-sided``: [..., n] → [..., m]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.qvera_b = nn.Parameter(torch.zeros(linear.out_features))
        self.qvera_v = nn.Parameter(torch.zeros(linear.in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = nn.functional.linear(x * (1 + self.qvera_v).to(x.dtype), self.linear.weight) * (1 + self.qvera_b).to(
            x.dtype
        )
        return out if self.linear.bias is None else out + self.linear.bias


class Between(nn.Module):
    """VeRA's equation, W x + b ∘ (B (d ∘ (A x))), with any A [r, n] and B [m, r]: [..., n] → [..., m].

    With several groups each has a b of its own and every ``groups``-th direction, and x is scaled by a trained a.
    """

    def __init__(self, linear: nn.Linear, A: torch.Tensor, B: torch.Tensor, groups: int) -> None:
        super().__init__()
        self.linear, self.A, self.B = linear, A, B
        self.qvera_b = nn.Parameter(torch.zeros(groups, len(B)))
        self.qvera_d = nn.Parameter(torch.full((len(A),), 0.1))
        self.qvera_a = nn.Parameter(torch.ones(A.shape[1])) if groups > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x if self.qvera_a is None else x * self.qvera_a.to(x.dtype)
        z = nn.functional.linear(scaled, self.A.to(x.dtype)) * self.qvera_d.to(x.dtype)
        out, groups = self.linear(x), len(self.qvera_b)
        for g, b in enumerate(self.qvera_b.to(x.dtype)):
            out = out + nn.functional.linear(z[..., g::groups], self.B[:, g::groups].to(x.dtype)) * b
        return out


def adapt(
    model: Any, method: str, rank: int, seed: int, has_own_head: bool, rows: Callable[[], Any], groups: int
) -> Any:
    """The model with a fresh adapter of the method, its head trained as it is with LoRA.

    ``rows``: gives the training rows, of which a basis needs some.
    """
    if method in OF_PEFT:
        return get_peft_model(model, peft_config(method, rank, "SEQ_CLS" if has_own_head else None))
    generator = torch.Generator().manual_seed(seed)
    linears = dict(adapted_linears(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(has_own_head and name.split(".")[0] in ("classifier", "score"))
    directions = {}
    if method in ON_BASES:
        made = of_gradients if method == "gradient-bases" else of_activations
        directions = made(model, linears, list(rows())[:BASIS_ROWS], rank)
    pairs: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for name, linear in linears.items():
        n, m = linear.in_features, linear.out_features
        if method == "two-sided":
            model.set_submodule(name, Scaled(linear))
            continue
        if (m, n) not in pairs:
            A, B = (2 * torch.rand(*shape, generator=generator) - 1 for shape in ((rank, n), (m, rank)))
            pairs[m, n] = (math.sqrt(6 / n) * A, math.sqrt(6 / rank) * B)  # VeRA, section 3.2
        A, B = pairs[m, n]
        if method == "tied":
            A, B = (each if isinstance(each, nn.Parameter) else nn.Parameter(each) for each in (A, B))
            pairs[m, n] = (A, B)
        elif directions:
            inputs, outputs = directions[name]
            A = inputs * A.norm(dim=1).mean()
            B = B if method == "input-basis" else outputs.T * B.norm(dim=0).mean()
        model.set_submodule(name, Between(linear, A, B, groups))
    return model


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of the layers: neither a head nor a pooler."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layer" in name:
            yield name, module


def leading(moments: torch.Tensor, rank: int) -> torch.Tensor:
    """Eigenvectors [rank, n] of the largest eigenvalues, each of length 1."""
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :rank].T.float().contiguous()


@torch.no_grad()
def of_activations(model: nn.Module, linears: dict[str, nn.Linear], rows: list[Any], rank: int) -> Directions:
    """Those of the most second moments of each linear's inputs and outputs."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def add(module: nn.Module, given: tuple[torch.Tensor], made: torch.Tensor) -> None:
            both = [x.flatten(0, -2).double() for x in (given[0], made)]
            sums = [x.T @ x for x in both]
            before = found.get(name)
            found[name] = (sums[0], sums[1]) if before is None else (before[0] + sums[0], before[1] + sums[1])

        return add

    hooks = [linear.register_forward_hook(watch(name)) for name, linear in linears.items()]
    for row in rows:
        model(input_ids=torch.tensor([list(row.input_ids)]))
    for hook in hooks:
        hook.remove()
    return {name: (leading(inputs, rank), leading(outputs, rank)) for name, (inputs, outputs) in found.items()}


def of_gradients(model: nn.Module, linears: dict[str, nn.Linear], rows: list[Any], rank: int) -> Directions:
    """The leading right and left singular vectors of the gradient [m, n] of the rows' mean loss."""
    found = {name: torch.zeros_like(linear.weight, dtype=torch.float32) for name, linear in linears.items()}
    weights = [linear.weight.requires_grad_() for linear in linears.values()]
    for row in rows:
        batch = forward.make_batch(model, [row], 0, prefix_once=False)
        loss, _ = forward.row_nll(model, batch, 512, torch.full((1,), 1 / row.trained_tokens / len(rows)))
        for each, gradient in zip(found.values(), torch.autograd.grad(loss, weights), strict=True):
            each += gradient
    for weight in weights:
        weight.requires_grad_(False)
    directions = {}
    for name, gradient in found.items():
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        directions[name] = (right[:rank].clone(), left[:, :rank].T.clone())  # the others are let go
    return directions
