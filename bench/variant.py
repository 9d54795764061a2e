"""Variants of VeRA as plain modules, written as their formulas are and left to autograd: what bench/variants.py trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.trials import Trial
from qvera.adapters.projection import SharedProjection, vera_scale
from qvera.config.schema import Recipe
from qvera.data import build_datasets
from qvera.models import forward, linear, quantization
from qvera.models.loader import Base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(Trial):
    """A trial of the module below.

    Attributes:
        groups: vectors b a linear, each for its share of the rank: ΔW = Σ_g diag(b_g) B_g diag(d_g) A_g, a sum of
            bases as in RandLoRA (arXiv 2502.00987). 1 is VeRA.
        input_scale (of `Trial`): a third trained vector on the input, diag(a) at A's right, from 1 (RandLoRA's Γ).
        magnitude: ``none``; ``dora``: rows of W + ΔW are normed and have a trained length (DVoRA: DoRA, arXiv
            2402.09353, over VeRA; the norm is not differentiated, as there); ``ia3``: the frozen output is scaled
            (arXiv 2205.05638).
        magnitude_rate, a_rate: times the learning rate.
        redraw: new projections every so many steps, what was trained is kept frozen (Flora, arXiv 2402.03293; UORA).
        scale: times s, which has 1 / sqrt(rank) in it already (Kaiming's bound of B), as rsLoRA asks (arXiv
        2312.03732).
        per_layer: ``none``; ``weight``: s times the layer's RMS weight over the mean of all layers.
        by_spectrum: a rank per layer, a prefix of the shared pair: ``rank`` times the layer's part of the sum of all
            participation ratios (Σ σ²)² / Σ σ⁴ of W. SARA (arXiv 2408.03290) counts the singular values up to a share
            of their sum.
        input_norm: inputs are divided by their RMS over 16 training rows to this power; ``input_unit``: all layers' z
            have one size.
        train_d: whether d is trained.
    """

    groups: int = 1
    magnitude: str = "none"
    magnitude_rate: float = 1.0
    a_rate: float = 1.0
    redraw: int = 0
    scale: float = 1.0
    per_layer: str = "none"
    by_spectrum: bool = False
    input_norm: float = 0.0
    input_unit: bool = False
    train_d: bool = True

    def adapt(self, base: Base, recipe: Recipe) -> Any:
        return adapted(base, self, recipe)

    def rate(self, name: str) -> float:
        times = self.magnitude_rate if "qvera_magnitude" in name else self.a_rate if "qvera_a" in name else 1.0
        return times * super().rate(name)

    def after(self, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        if self.redraw and (step + 1) % self.redraw == 0 and step + 1 < self.steps:
            layers = [layer for layer in model.modules() if isinstance(layer, VariantLinear)]
            pair = SharedProjection(self.seed + 1000 * (step + 1), torch.device("cpu"), layers[0].pair[0].A.dtype)
            for layer in layers:
                layer.draw(pair)
            optimizer.state.clear()


class VariantLinear(nn.Module):
    """One frozen linear with a variant of VeRA beside it, written as the formulas are and left to autograd."""

    def __init__(self, base: Any, pair: SharedProjection, variant: Variant, rank: int) -> None:
        super().__init__()
        self.base, self.variant, self.rank = base, variant, rank
        m, n, r = base.out_features, base.in_features, rank
        self.shape = (m, n)
        self.factor = 1.0
        self.qvera_b = nn.Parameter(torch.zeros(variant.groups, m))
        self.qvera_d = nn.Parameter(torch.full((r,), variant.d_initial or 0.1), requires_grad=variant.train_d)
        self.input_factor: torch.Tensor | None = None
        if variant.input_scale:
            self.qvera_a = nn.Parameter(torch.ones(n))
        if variant.magnitude != "none":
            self.qvera_magnitude = nn.Parameter(torch.zeros(m))
        if variant.magnitude == "dora":
            weight = quantization.dequantized_weight(base, torch.float32)
            self.register_buffer("length", weight.norm(dim=1), persistent=False)
        self.done: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.draw(pair)

    def draw(self, pair: SharedProjection) -> None:
        """Use this pair from now on; what was trained with the one before stays as it is."""
        m, n = self.shape
        r = self.rank
        if hasattr(self, "pair"):
            A, C = self.factors()
            self.done.append((A.detach(), C.detach()))
            with torch.no_grad():
                self.qvera_b.zero_()
                self.qvera_d.fill_(self.variant.d_initial or 0.1)
        pair.ensure(r, n, m)
        self.pair = [pair]

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        m, n = self.shape
        r = self.rank
        A, B = self.pair[0].slices(r, n, m)
        s = vera_scale(r, n) * self.variant.scale * self.factor
        b = self.qvera_b.repeat_interleave(r // self.variant.groups, dim=0).t()
        C = b * B * (self.qvera_d * s)
        return A, C.to(A.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base_out = self.base(x)
        A, C = self.factors()
        inner = x if not self.variant.input_scale else x * self.qvera_a.to(x.dtype)
        if self.input_factor is not None:
            inner = inner * self.input_factor.to(x.dtype)
        delta = (inner @ A.t()) @ C.t()
        for A_done, C_done in self.done:
            delta = delta + (x @ A_done.t()) @ C_done.t()
        if self.variant.magnitude == "ia3":
            base_out = base_out * (1 + self.qvera_magnitude).to(x.dtype)
        out = base_out + delta
        if self.variant.magnitude == "dora":
            with torch.no_grad():
                weight = quantization.dequantized_weight(self.base, x.dtype) + C @ A
                ratio = self.length / weight.float().norm(dim=1)
            out = out * ((1 + self.qvera_magnitude) * ratio).to(x.dtype)
        return out


def see_inputs(
    base: Base, recipe: Recipe, see: Callable[[str, torch.Tensor], None], names: tuple[str, ...] = ("",)
) -> None:
    """``see(name, x)`` for the input x [T, n], fp32, of every linear whose name ends so, over the first 16 training rows."""
    datasets = build_datasets(recipe.data, base.tokenizer)
    model: Any = base.model

    def hook(name: str) -> Any:
        return lambda _, args, __: see(name, args[0].detach().float().flatten(0, -2))

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(names)]
    hooks = [module.register_forward_hook(hook(name)) for name, module in linears]
    with torch.no_grad():
        for example in datasets.train[:16]:  # one by one: no padding
            forward.batch_nll(model, forward.make_batch(model, [example], datasets.pad_id), 512)
    for one in hooks:
        one.remove()


def input_rms(base: Base, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Name of a linear → the RMS of each of its inputs [n]."""
    sums: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}

    def add(name: str, x: torch.Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(x.shape[1])) + x.square().sum(0)
        tokens[name] = tokens.get(name, 0) + len(x)

    see_inputs(base, recipe, add)
    return {name: (total / tokens[name]).sqrt() for name, total in sums.items()}


def input_factor(rms: torch.Tensor, variant: Variant) -> torch.Tensor:
    """rms ** -p; without ``input_unit`` the size of the whole input stays as it is."""
    factor = rms.clamp_min(rms.max() * 1e-4) ** -variant.input_norm
    if variant.input_unit:
        return factor / (factor * rms).square().mean().sqrt()
    return factor * (rms.square().sum() / (factor * rms).square().sum()).sqrt()


def spectral_ranks(linears: dict[str, nn.Linear], rank: int) -> dict[str, int]:
    """Ranks whose mean is ``rank``, as the weights' participation ratios."""
    found = {}
    for name, module in linears.items():
        values = torch.linalg.svdvals(quantization.dequantized_weight(module, torch.float32)).double().square()
        found[name] = (values.sum().square() / values.square().sum()).item()
    mean = sum(found.values()) / len(found)
    return {name: max(1, round(rank * ratio / mean)) for name, ratio in found.items()}


def adapted(base: Base, variant: Variant, recipe: Recipe) -> Any:
    """The base with a `VariantLinear` in the place of every linear but the head."""
    torch.manual_seed(variant.seed)
    model: Any = base.model
    model.requires_grad_(False)
    linear.freeze_linears(model)
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]
    pair = SharedProjection(variant.seed, torch.device("cpu"), getattr(torch, base.facts["compute_dtype"]))
    sizes = {
        name: quantization.dequantized_weight(m, torch.float32).square().mean().sqrt().item() for name, m in linears
    }
    rms = input_rms(base, recipe) if variant.input_norm or variant.input_unit else {}
    ranks = spectral_ranks(dict(linears), variant.rank) if variant.by_spectrum else {}
    mean = sum(sizes.values()) / len(sizes)
    for name, module in linears:
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = VariantLinear(module, pair, variant, ranks.get(name, variant.rank))
        if variant.per_layer == "weight":
            layer.factor = sizes[name] / mean
        if rms:
            layer.input_factor = input_factor(rms[name], variant)
        setattr(parent, name.rpartition(".")[2], layer)
    return model
