"""Backward, clip and step with plain torch."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from qvera.distributed.group import Group
from qvera.training.failures import require_gradients
from qvera.training.optim import current_rate


class LocalEngine:
    """Takes an optimizer step with plain torch. All ranks call each method together.

    Every rank holds whole vectors. Their gradients are summed as one bucket of a few MB a step.
    """

    core: Callable[..., torch.Tensor] | None = None  # called in place of the model's `core_of`, unless None

    def __init__(
        self,
        vectors: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        max_grad_norm: float,
        group: Group,
        scaler: GradScaler | None = None,
    ) -> None:
        self.vectors, self.optimizer, self.schedule = vectors, optimizer, schedule
        self.max_grad_norm, self.group, self.scaler = max_grad_norm, group, scaler
        self.loss_scale = 1.0  # that the latest `step` was taken with
        self._is_first_step = True

    def loss_gradient(self) -> torch.Tensor:
        """Return the factor that `backward` puts before its loss: the loss scale (scalar, fp32)."""
        gradient = torch.ones((), device=next(iter(self.vectors.values())).device)
        return gradient if self.scaler is None else self.scaler.scale(gradient)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of this rank's part of the loss. ``last``: this is the step's last pass."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def forget_module_order(self) -> None:
        """Let an engine that learns the order of modules from the first pass learn it from the next one."""

    def undo(self) -> None:
        """Drop the gradients of a step that could not be taken."""
        self.optimizer.zero_grad(set_to_none=True)

    def _sum_gradients(self) -> None:
        if self.group.world_size > 1:
            # all ranks must send as much, and an expert that got no token on this rank has no gradient
            for vector in self.vectors.values():
                if vector.grad is None and vector.requires_grad:
                    vector.grad = torch.zeros_like(vector)
            self.group.all_reduce([vector.grad for vector in self.vectors.values() if vector.grad is not None])

    def step(self) -> tuple[float, float]:
        """Clip and step; returns the gradient norm before clipping and the learning rate.

        A gradient that is not finite takes no step. With loss scaling, it lowers the scale.
        """
        self._sum_gradients()
        # on sums over the ranks: one rank's rows may miss a layer. A step that trains some vectors alone tells nothing
        if self._is_first_step and all(vector.requires_grad for vector in self.vectors.values()):
            require_gradients({name: vector.grad for name, vector in self.vectors.items()})
            self._is_first_step = False
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        scale = self.loss_gradient()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        total = torch.nn.utils.clip_grad_norm_(list(self.vectors.values()), limit)
        norm, self.loss_scale = torch.stack([total, scale]).tolist()  # one wait for the device
        rate = current_rate(self.schedule)
        if math.isfinite(norm):  # `GradScaler.step` would find it out anew
            self.optimizer.step()
            self.schedule.step()
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, rate

    def can_step_again(self) -> bool:
        """Whether to retry a step whose gradient was not finite: the scale was above 1 and is lower now."""
        return self.scaler is not None and self.loss_scale > 1.0 and self.scaler.get_scale() < self.loss_scale

    def unsharded(self) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        """Return the trained vectors and the optimizer as one process would hold them, for a checkpoint."""
        return self.vectors, self.optimizer

    def gather_vectors(self) -> None:
        """Make the model's vectors whole on every rank, before they are written as an adapter."""
