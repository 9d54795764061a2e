"""Optimizers for values that change their places: AdamW with an age for each value, and SM3.

Both can give a value of one parameter a new place (`take_over`): its state starts anew, the other values keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn


class Seeds(NamedTuple):
    """What is known of the gradients at new places, one element for each."""

    mean: torch.Tensor
    mean_square: torch.Tensor
    steps: int
    """How many optimizer steps' gradients these are the means of."""


def _loss_of(closure: Callable[[], float] | None) -> float | None:
    """What an optimizer's ``closure`` gives, as torch's own optimizers call it; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class AgedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) in torch's form, with the bias correction of each value's own age (SpIEL, 2401.16405).

    The state of a parameter is ``age``, ``exp_avg`` and ``exp_avg_sq``, of its shape, in fp32 or wider. The age is the
    number of gradients in the averages. While no value takes a new place, the steps are those of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        loss = _loss_of(closure)
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                state = self._state_of(parameter)
                age, mean, square = state["age"].add_(1), state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(grad, 1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                size = square.div(_weight_sum(beta2, age)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.addcdiv_(mean / _weight_sum(beta1, age), size, value=-rate)
        return loss

    def _state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state.update({key: torch.zeros_like(parameter) for key in ("age", "exp_avg", "exp_avg_sq")})
        return state

    @torch.no_grad()
    def take_over(self, parameter: nn.Parameter, slots: torch.Tensor, order: torch.Tensor, seeds: Seeds) -> None:
        """Start the state of some values anew from their places' gradients so far, then put all into a new order.

        The averages are as if Adam had seen ``seeds.steps`` gradients with these means, so that after bias correction
        they are the means themselves.

        Args:
            parameter: [k].
            slots: which values, [c].
            order: for each value of the new order its slot now, [k].
            seeds: of ``slots``, each [c].
        """
        beta1, beta2 = next(g["betas"] for g in self.param_groups if any(p is parameter for p in g["params"]))
        state, steps = self._state_of(parameter), torch.tensor(float(seeds.steps), dtype=torch.float64)
        state["age"][slots] = float(seeds.steps)
        state["exp_avg"][slots] = (seeds.mean * _weight_sum(beta1, steps).item()).to(parameter.dtype)
        state["exp_avg_sq"][slots] = (seeds.mean_square * _weight_sum(beta2, steps).item()).to(parameter.dtype)
        for key, value in state.items():
            state[key] = value[order]


def _weight_sum(beta: float, age: torch.Tensor) -> torch.Tensor:
    """1 - beta ** age, the sum of the weights in an average of that many gradients; exact where it is small."""
    return torch.expm1(age * math.log(beta)).neg_() if beta else torch.ones_like(age)


class SparseSM3(torch.optim.Optimizer):
    """SM3 (arXiv 1901.11150, algorithm SM3-II) with momentum, over sparse values, with decoupled weight decay.

    The squares of the gradients are remembered as a largest sum for each row [m] and each column [n] of the weight, and
    not for each value. The state of a parameter is ``row``, ``column`` and ``momentum`` [k], fp32 or wider.

    Args:
        params: the values [k] of each weight.
        places: for each of them its flat indices (int32 [k], read at every step) and the weight's shape.
        momentum: the share of the last update in the next.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        places: Sequence[tuple[torch.Tensor, tuple[int, int]]],
        lr: float,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})
        self._places = dict(zip(params, places, strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every parameter that has a gradient."""
        loss = _loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                indices, (_, columns) = self._places[parameter]
                state, i, j = self.state_of(parameter), (indices // columns).long(), (indices % columns).long()
                square = torch.minimum(state["row"][i], state["column"][j]).addcmul_(grad, grad)
                state["row"].scatter_reduce_(0, i, square, "amax")
                state["column"].scatter_reduce_(0, j, square, "amax")
                update = square.add_(group["eps"]).rsqrt_().mul_(grad)
                state["momentum"].lerp_(update, 1 - group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(state["momentum"], alpha=group["lr"])
        return loss

    def state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """The state of a parameter; zeros before its first step."""
        state = self.state[parameter]
        if not state:
            _, (rows, columns) = self._places[parameter]
            state["row"], state["column"] = parameter.new_zeros(rows), parameter.new_zeros(columns)
            state["momentum"] = torch.zeros_like(parameter)
        return state

    @torch.no_grad()
    def take_over(self, parameter: nn.Parameter, slots: torch.Tensor, order: torch.Tensor) -> None:
        """Start the momentum of some values anew, then put all into a new order; see `AgedAdamW.take_over`."""
        momentum = self.state_of(parameter)["momentum"]
        momentum[slots] = 0.0
        self.state[parameter]["momentum"] = momentum[order]
