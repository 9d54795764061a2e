"""BiLoRA's ΔW (arXiv 2403.13037): ΔW = s P Λ Q in AdaLoRA's form, with P [m, r], Q [r, n] and a diagonal Λ trained.

With ``training.bilevel`` P and Q are the lower level and Λ is the upper one. P and Q pay for not being orthogonal:
γ (‖PᵀP - I‖² + ‖QQᵀ - I‖²) in Frobenius norms, summed over the linears. They start as in AdaLoRA (arXiv 2303.10512):
normal with standard deviation 0.02, Λ at 0. There is no code of BiLoRA's authors to compare with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qvera.adapters.factors import Factors
from qvera.adapters.hooks import TrainingHook
from qvera.adapters.methods.trained_pair import TrainedPair, start_generator
from qvera.adapters.products.functional import at_least_fp32
from qvera.lab.keys import Settings
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.adapters.config import QveraConfig
    from qvera.adapters.methods.base import LinearSpec
    from qvera.adapters.projection import Pair
    from qvera.config.schema import Recipe
    from qvera.distributed.group import Group

_START_STD = 0.02


class Bilora(TrainedPair):
    """Q is ``qvera_A``, P is ``qvera_B`` and Λ is ``qvera_d``."""

    name = "bilora"
    title = "BiLoRA"
    keys = frozenset({"alpha", "orthogonal_penalty"})
    usual = {"adapter.rank": 8, "adapter.alpha": 2048, "training.learning_rate": 2e-3}
    upper_kinds = frozenset({"qvera_d"})
    samples_tokens = False  # the gradient of Λ is made of that of Λ Q: it would be a sample too

    def tensors(self, adapter: Settings, spec: LinearSpec) -> dict[str, tuple[int, ...]]:
        rank = adapter.rank
        return {"qvera_A": (rank, spec.in_features), "qvera_B": (spec.out_features, rank), "qvera_d": (rank,)}

    def start(self, name: str, shape: tuple[int, ...], adapter: Settings, spec: LinearSpec) -> torch.Tensor:
        if name != "qvera_d":
            return torch.randn(shape, generator=start_generator(adapter, f"{spec.name}.{name}")) * _START_STD
        return torch.zeros(shape) if getattr(adapter, "init_weights", True) else torch.ones(shape)

    def factors(
        self, adapter: Settings, spec: LinearSpec, tensors: Mapping[str, torch.Tensor], pair: Pair | None
    ) -> Factors:
        A, B, d = (at_least_fp32(tensors[name]) for name in ("qvera_A", "qvera_B", "qvera_d"))
        scale = (adapter.rank if adapter.alpha is None else adapter.alpha) / adapter.rank
        return Factors(d.unsqueeze(1) * A, B, scale=scale)

    def conditions(self, config: QveraConfig) -> dict[str, object]:
        return {"alpha": config.rank if config.alpha is None else config.alpha}

    def cast_bytes(self, adapter: Settings, spec: LinearSpec, dtype: torch.dtype) -> int:
        """Λ Q, which is made for each linear."""
        return max(super().cast_bytes(adapter, spec, dtype), adapter.rank * spec.in_features * dtype.itemsize)

    def check(self, recipe: Recipe) -> None:
        adapter: Settings = recipe.adapter
        if adapter.orthogonal_penalty and recipe.deepspeed is not None:
            raise InputError(
                "adapter.orthogonal_penalty: is added to gradients of which DeepSpeed has its own copies. Set it to 0, "
                "or remove the deepspeed key."
            )

    def step_hook(
        self, model: nn.Module, recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int, group: Group
    ) -> TrainingHook | None:
        adapter: Settings = recipe.adapter
        penalty = adapter.orthogonal_penalty
        return OrthogonalPenalty(model, penalty, optimizer) if penalty else None


class OrthogonalPenalty(TrainingHook):
    """Adds γ ‖M - I‖² of every trained P (M = PᵀP) and Q (M = QQᵀ) to what the optimizer minimizes.

    Its gradient, 4 γ (M - I) X, joins that of the loss after clipping, on every rank the same. A factor without a
    gradient is one that the step does not train, as those of the other level of ``training.bilevel``.
    """

    def __init__(self, model: nn.Module, penalty: float, optimizer: torch.optim.Optimizer) -> None:
        trained = {name.rpartition(".")[0]: p for name, p in model.named_parameters() if p.requires_grad}
        self.rows = [p for name, p in trained.items() if name.endswith("qvera_A")]
        self.columns = [p for name, p in trained.items() if name.endswith("qvera_B")]
        self.penalty = penalty
        optimizer.register_step_pre_hook(self.add_gradients)

    @torch.no_grad()
    def add_gradients(self, *_: Any) -> None:
        """Add the penalty's gradients; called by the optimizer before each step."""
        for Q in self.rows:
            if Q.grad is not None:
                Q.grad.add_(self._gradient(Q))
        for P in self.columns:
            if P.grad is not None:
                P.grad.add_(self._gradient(P.t()).t())

    def _gradient(self, X: torch.Tensor) -> torch.Tensor:
        """That of γ ‖X Xᵀ - I‖² in X [r, ...]."""
        excess = X @ X.t()
        excess.diagonal().sub_(1)
        return (excess @ X).mul_(4 * self.penalty)
