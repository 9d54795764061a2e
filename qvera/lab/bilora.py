"""BiLoRA (arXiv 2403.13037): ΔW = s P Λ Q in AdaLoRA's form; P [m, r], Q [r, n] and the diagonal Λ are trained.

With ``training.bilevel`` P and Q are the lower level and Λ is the upper one. The penalty for P and Q that are not
orthogonal is γ (‖PᵀP - I‖² + ‖QQᵀ - I‖²), Frobenius, summed over the linears. The start is AdaLoRA's (arXiv
2303.10512): P and Q normal with standard deviation 0.02, Λ = 0. BiLoRA's authors published no code to compare with.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qvera.adapters.factors import Factors
from qvera.adapters.hooks import TrainingHook
from qvera.adapters.methods.base import LinearBytes, LinearSpec, Method, Shapes, Source, Tensors
from qvera.adapters.methods.lora import start_generator
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair
from qvera.adapters.save_load import trained_vectors
from qvera.config.plugins import Schedule
from qvera.config.schema import Recipe
from qvera.data import planned_steps
from qvera.data.sampler import random_order
from qvera.distributed.group import Group
from qvera.lab.keys import Settings
from qvera.lab.tasks import LEVELS, PartBatches
from qvera.utils.errors import InputError


class Bilora(Method):
    """Q is ``qvera_A``, P is ``qvera_B`` and Λ is ``qvera_d``."""

    name = "bilora"
    title = "BiLoRA"
    keys = {"alpha": True, "orthogonal_penalty": False}
    source = Source.TRAINED
    usual = {"adapter.rank": 8, "adapter.alpha": 2048, "training.learning_rate": 2e-3}
    samples_tokens = False  # the gradient of Λ is made of that of Λ Q: it would be a sample too

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        rank = adapter.rank
        return {"qvera_A": (rank, spec.in_features), "qvera_B": (spec.out_features, rank), "qvera_d": (rank,)}

    def start(self, name: str, shape: tuple[int, ...], adapter: Settings, spec: LinearSpec) -> Tensor:
        if name != "qvera_d":
            return torch.randn(shape, generator=start_generator(adapter, f"{spec.name}.{name}")) * 0.02
        return torch.zeros(shape) if getattr(adapter, "init_weights", True) else torch.ones(shape)

    def factors(self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        A, B, d = (at_least_fp32(tensors[name]) for name in ("qvera_A", "qvera_B", "qvera_d"))
        scale = (adapter.rank if adapter.alpha is None else adapter.alpha) / adapter.rank
        return Factors(d.unsqueeze(1) * A, B, scale=scale)

    def memory(
        self, adapter: Settings, spec: LinearSpec, tokens: int, dtype: torch.dtype, on_accelerator: bool
    ) -> LinearBytes:
        taken = super().memory(adapter, spec, tokens, dtype, on_accelerator)  # and Λ Q is made for each linear
        return taken._replace(cast=max(taken.cast, adapter.rank * spec.in_features * dtype.itemsize))

    def step_hook(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int, group: Group
    ) -> TrainingHook | None:
        adapter: Settings = recipe.adapter
        penalty = adapter.orthogonal_penalty
        return OrthogonalPenalty(model, penalty, optimizer) if penalty else None


class OrthogonalPenalty(TrainingHook):
    """Adds γ ‖M - I‖² of every trained P (M = PᵀP) and Q (M = QQᵀ) to what the optimizer minimizes.

    Its gradient 4 γ (M - I) X is added after clipping. The other level's factors, which have no gradient, are left out.
    """

    def __init__(self, model: nn.Module, penalty: float, optimizer: torch.optim.Optimizer) -> None:
        trained = {name.rpartition(".")[0]: p for name, p in model.named_parameters() if p.requires_grad}
        both = ("qvera_A", "qvera_B")
        self.factors = [(p, name.endswith("qvera_B")) for name, p in trained.items() if name.endswith(both)]
        self.penalty = penalty
        optimizer.register_step_pre_hook(self.add_gradients)

    @torch.no_grad()
    def add_gradients(self, *_: Any) -> None:
        for factor, is_P in self.factors:
            if factor.grad is None:
                continue
            X = factor.t() if is_P else factor  # [r, ...]
            excess = X @ X.t()
            excess.diagonal().sub_(1)
            gradient = (excess @ X).mul_(4 * self.penalty)
            factor.grad.add_(gradient.t() if is_P else gradient)


UPPER = "qvera_d"
"""The tensor of the upper level: Λ, or d of methods that have one."""


class Bilevel(Schedule):
    """``training.bilevel``: two groups of parameters, trained on two disjoint parts of the rows in turn."""

    name = "bilevel"
    keys = ("training.bilevel",)

    def check(self, recipe: Any, method: Method) -> None:
        has_upper = "train_d" in method.keys or isinstance(method, Bilora)
        if not (has_upper and method.traits(UPPER, recipe.adapter).is_trained):
            more = "train d as well (adapter.train_d)" if has_upper else "choose adapter.method bilora"
            raise InputError(
                f"training.bilevel: needs two groups of trained parameters, and adapter.method {method.name} has one "
                f"here. Remove it, or {more}."
            )

    def batches(self, recipe: Any, rows: Any, sizes: tuple[Any, ...], common: dict[str, Any]) -> BilevelBatches:
        training = recipe.training
        if len(rows) < 2:
            raise InputError("training.bilevel: cuts the rows into two parts, and there is one row. Remove it.")
        steps = planned_steps(recipe, len(rows))
        retraining = round(steps * training.bilevel_retrain)
        return BilevelBatches(
            *sizes,
            **common,
            upper_share=training.bilevel_share,
            lower_steps=training.bilevel_lower_steps,
            upper_steps=training.bilevel_upper_steps,
            retrain_from=steps - retraining if retraining else None,
        )

    def hook(self, training: Any) -> BilevelHook:
        return BilevelHook(training.batches, trained_vectors(training.model))


@functools.lru_cache(maxsize=1)
def split_levels(n: int, upper_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the rows 0..n-1 in two disjoint sorted parts: the lower level's, and a share for the upper one."""
    count = min(max(round(n * upper_share), 1), n - 1)
    drawn = random_order(n, seed, (LEVELS + 1) * 2**32)
    return np.sort(drawn[count:]), np.sort(drawn[:count])


@dataclass(slots=True)
class BilevelBatches(PartBatches):
    """Steps on two disjoint parts of the rows in turn: ``lower_steps`` on the first, ``upper_steps`` on the second.

    From step ``retrain_from`` (from 0) on, all rows are the lower level's (BiLoRA, arXiv 2403.13037).
    """

    _: KW_ONLY
    upper_share: float = 0.2
    lower_steps: int = 1
    upper_steps: int = 1
    retrain_from: int | None = None

    def is_upper(self, step: int) -> bool:
        if self.retrain_from is not None and step >= self.retrain_from:
            return False
        return step % (self.lower_steps + self.upper_steps) >= self.lower_steps

    def rows(self, step: int) -> list[int]:
        if self.retrain_from is not None and step >= self.retrain_from:
            return self.part_rows(2, np.arange(len(self.lengths)), step - self.retrain_from)
        cycle, place = divmod(step, self.lower_steps + self.upper_steps)
        upper = self.is_upper(step)
        # The number of this batch among those of its level.
        batch = cycle * self.upper_steps + place - self.lower_steps if upper else cycle * self.lower_steps + place
        levels = split_levels(len(self.lengths), self.upper_share, self.seed)
        return self.part_rows(int(upper), levels[upper], batch)


class BilevelHook(TrainingHook):
    """Only the vectors of the step's level get gradients; optimizers skip the others.

    First order: the other level's vectors count as constants, so a step costs no more than any other.
    """

    def __init__(self, batches: BilevelBatches, vectors: dict[str, nn.Parameter]) -> None:
        self.batches = batches
        self.upper = [v for name, v in vectors.items() if name.rpartition(".")[2] == UPPER]
        self.lower = [v for name, v in vectors.items() if name.rpartition(".")[2] != UPPER]

    def before_step(self, step: int) -> None:
        upper = self.batches.is_upper(step - 1)
        for vectors, is_trained in ((self.upper, upper), (self.lower, not upper)):
            for vector in vectors:
                vector.requires_grad_(is_trained)

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        for vector in (*self.upper, *self.lower):
            vector.requires_grad_(True)
