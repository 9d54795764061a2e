"""Cross entropy of rows of logits, and its gradient written over the head's product: the formulas, and their kernels.

    z = c tanh(a x / c)     p = softmax(z)     loss_y = -(1 - ε) log p_y - ε mean(log p)       a: the scale, c: the cap
    ∂x = z'(x) (F (p - ε / V) - (1 - ε) Σ_k w_k onehot(y_k))                   F = Σ_k w_k     w: weights of the targets

Logits are fp32 or wider and rounded once, in the end. A kernel reads x twice and writes it once: 6 bytes a logit in 16
bits. The plain code goes over a logit some ten times, so on a CPU it takes as few rows at a time as its cache holds.
Liger's kernel has neither weights nor several targets; its loss comes in the dtype of x, and the host waits for it.
"""

import torch

from qvera.kernels.choice import register_operator, use_kernels
from qvera.utils import accelerator

CACHED_ELEMENTS = 2**20
"""Logits that each thread of a CPU takes at a time in plain code: 4 MB in fp32."""
_ACCELERATOR_THREADS = 16  # an accelerator without kernels counts as a CPU with this many threads: 67 MB


def _empty_logit_sums(
    x: torch.Tensor, scale: float, cap: float, mean: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    largest, total, means = (x.new_empty(rows, 1, dtype=torch.float32) for rows in (len(x), len(x), mean * len(x)))
    return largest, total, means


def _write_logit_gradient(
    x: torch.Tensor, largest: torch.Tensor, total: torch.Tensor, factor: torch.Tensor, spread: float, scale: float,
    cap: float,
) -> None:  # fmt: skip
    return None


_logit_sums = register_operator("logit_sums", _empty_logit_sums)
_logit_gradient = register_operator("logit_gradient", _write_logit_gradient, mutates="x")


def rows_at_a_time(x: torch.Tensor) -> int:
    """Return how many rows of the product x [n, V] to give `LogitRows` at once."""
    # a kernel takes any number; only plain code has temporaries that should stay in a cache
    if use_kernels(x):
        return len(x)
    threads = _ACCELERATOR_THREADS if accelerator.is_accelerator(x.device.type) else torch.get_num_threads()
    return max(1, CACHED_ELEMENTS * threads // x.shape[1])


class LogitRows:
    """The loss of targets [n, K] by the head's product x [n, V], and the gradient in x, which is written over x.

    Attributes:
        loss: of each target, [n, K] in fp32 or wider, smoothed.
    """

    def __init__(
        self, x: torch.Tensor, targets: torch.Tensor, scale: float, cap: float | None, smoothing: float, gradient: bool
    ) -> None:
        self._x, self._targets, self._scale, self._cap, self._smoothing = x, targets, scale, cap, smoothing
        wide = torch.promote_types(x.dtype, torch.float32)
        self._chosen = capped(x.gather(1, targets).to(wide), scale, cap)
        self._by_kernels = use_kernels(x)
        if self._by_kernels:
            self._largest, self._total, mean = _logit_sums(x, scale, cap or 0.0, smoothing > 0)
        else:
            z = capped(x.to(wide), scale, cap)
            self._slope = None if cap is None or not gradient else 1.0 - (z / cap).square()
            mean = z.mean(1, keepdim=True) if smoothing else z
            self._largest = z.amax(1, keepdim=True)
            self._exponentials = z.sub_(self._largest).exp_()
            self._total = z.sum(1, keepdim=True)
        self._own = self.loss = self._largest - self._chosen + self._total.log()
        if smoothing:
            self.loss = torch.lerp(self._own, self._largest - mean + self._total.log(), smoothing)

    def write_gradient(self, weights: torch.Tensor) -> None:
        """Write Σ_k w_k ∂loss_k / ∂x over x, once; weights [n, K] of any sign."""
        spread, factor, hit = self._smoothing / self._x.shape[1], weights.sum(1, keepdim=True), weights
        # the gradient at a target is written, not added, so equal targets of a row each need the sum of their weights
        if weights.shape[1] > 1:
            same = self._targets.unsqueeze(2) == self._targets.unsqueeze(1)
            hit = torch.where(same, weights.unsqueeze(1), 0.0).sum(2)
        # p - 1 in 16 bits would have lost most of what a well-known target has left
        at_targets = factor * ((-self._own).exp() - spread) - (1.0 - self._smoothing) * hit
        at_targets *= self._scale if self._cap is None else self._scale * (1.0 - (self._chosen / self._cap).square())
        # the gradient of all logits as if none were a target; then the targets' own values over it
        if self._by_kernels:
            _logit_gradient(self._x, self._largest, self._total, factor, spread, self._scale, self._cap or 0.0)
        else:
            grad = self._exponentials.mul_(factor / self._total)
            if spread:
                grad -= factor * spread
            if self._slope is not None:
                grad *= self._slope
            if self._scale != 1.0:
                grad *= self._scale
            if grad is not self._x:
                self._x.copy_(grad)
        self._x.scatter_(1, self._targets, at_targets.to(self._x.dtype))


def capped(x: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """Logits from the product of the head; the same tensor where the model neither scales nor caps them."""
    scaled = x if scale == 1.0 else x * scale
    return scaled if cap is None else torch.tanh(scaled / cap) * cap
