"""Backward, clip and step with plain torch, on one process or on several that sum their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from qvera.adapters.save_load import named_vectors
from qvera.distributed.group import Group

if TYPE_CHECKING:
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler


def trained_vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's vectors that need a gradient, by their keys in its file."""
    return {name: vector for name, vector in named_vectors(model).items() if vector.requires_grad}


class LocalEngine:
    """Takes an optimizer step with plain torch; `zero_engine.ZeroEngine` does it with DeepSpeed.

    Every rank holds whole vectors; their gradients are summed as one bucket of a few MB a step. All ranks call each
    method together.
    """

    decoder: Callable[..., torch.Tensor] | None = None
    """What to call in place of the model's decoder; None: the decoder itself."""

    def __init__(
        self,
        vectors: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        max_grad_norm: float,
        group: Group,
    ) -> None:
        self.vectors, self.optimizer, self.schedule = vectors, optimizer, schedule
        self.max_grad_norm, self.group = max_grad_norm, group

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of this rank's part of the loss; ``last``: this is the step's last pass."""
        loss.backward()
        if last and self.group.world_size > 1:
            for vector in self.vectors.values():
                if vector.grad is None:
                    vector.grad = torch.zeros_like(vector)
            self.group.all_reduce([vector.grad for vector in self.vectors.values() if vector.grad is not None])

    def step(self) -> tuple[float, float]:
        """Clip and step. A gradient that is not finite takes no step.

        Returns:
            The gradient norm before clipping, and the learning rate.
        """
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.vectors.values()), limit))
        rate = float(self.schedule.get_last_lr()[0])
        if math.isfinite(norm):
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, rate

    def unsharded(self) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        """Trained vectors and optimizer as one process holds them, for a checkpoint."""
        return self.vectors, self.optimizer

    def gather_vectors(self) -> None:
        """Make the model's vectors whole on every rank, before they are written as an adapter."""
