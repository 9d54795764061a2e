"""Backward, clip, step: torch alone, on one process or on several that add up their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from qvera.distributed.group import Group


class LocalEngine:
    """Plain torch. The vectors are whole on every rank, and their gradients travel as one bucket of a few MB a step.

    `zero.ZeroEngine` takes its place where the recipe has a ``deepspeed`` key.
    """

    decoder: Any = None
    """What to call in place of the model's decoder; None: that itself."""

    def __init__(
        self,
        vectors: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        max_grad_norm: float,
        group: Group,
    ) -> None:
        self.vectors, self.optimizer, self.schedule = vectors, optimizer, schedule
        self.max_grad_norm, self.group = max_grad_norm, group

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of this rank's part of the loss; ``last``: of this step's passes."""
        loss.backward()
        if last and self.group.world_size > 1:
            for vector in self.vectors.values():
                if vector.grad is None:
                    vector.grad = torch.zeros_like(vector)
            self.group.add_up([vector.grad for vector in self.vectors.values() if vector.grad is not None])

    def step(self) -> tuple[float, float]:
        """Clip and step: the norm before clipping, and the learning rate. With a norm that is not finite no step is taken."""
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.vectors.values()), limit))
        rate = self.schedule.get_last_lr()[0]
        if math.isfinite(norm):
            self.optimizer.step()
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, rate

    def unsharded(self) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        """The trained vectors and their optimizer, as they are."""
        return self.vectors, self.optimizer

    def gather_vectors(self) -> None:
        """Make the model's vectors whole, which they always are here."""
