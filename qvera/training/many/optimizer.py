"""AdamW for the adapters of a bank: one operation for all of them, with a count of steps and a rate for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qvera.adapters.bank import AdapterBank
    from qvera.config.schema import TrainingSection

_BLOCK_NUMBERS = 2**22
"""How many numbers are stepped at a time: temporary tensors are of this size, not of that of the bank."""


class BankAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) as torch has it, over the rows of a `AdapterBank`.

    Attributes:
        first, second: the moments, fp32 [slots, trained_numbers].
        steps: how many steps each slot's adapter has taken.
    """

    def __init__(self, bank: AdapterBank, section: TrainingSection) -> None:
        self.bank = bank
        self.betas = section.adam_beta1, section.adam_beta2
        self.epsilon, self.weight_decay = section.adam_epsilon, section.weight_decay
        self.max_norm = section.max_grad_norm
        self.first = torch.zeros_like(bank.gradients)
        self.second = torch.zeros_like(bank.gradients)
        self.steps = [0] * bank.slots

    def reset(self, slot: int) -> None:
        """Forget what the slot's last adapter left behind."""
        self.first[slot].zero_()
        self.second[slot].zero_()
        self.steps[slot] = 0

    @torch.no_grad()
    def step(self, slots: Sequence[int], rates: Sequence[float]) -> list[float]:
        """Clip the gradient of each of these adapters, take a step with its own rate, and drop the gradients.

        An adapter whose gradient is not finite takes no step.

        Args:
            slots: of the adapters.
            rates: the learning rate of each.

        Returns:
            The norm of each gradient before it was clipped.
        """
        if not slots:
            return []
        rows = torch.tensor(slots, device=self.bank.device)
        norms: list[float] = torch.linalg.vector_norm(self.bank.gradients, dim=1)[rows].tolist()
        finite = [i for i, norm in enumerate(norms) if math.isfinite(norm)]
        for i in finite:
            self.steps[slots[i]] += 1
        if finite:
            self._step([slots[i] for i in finite], [rates[i] for i in finite], [norms[i] for i in finite])
        self.bank.gradients.index_fill_(0, rows, 0.0)
        return norms

    def _step(self, slots: Sequence[int], rates: Sequence[float], norms: Sequence[float]) -> None:
        beta1, beta2 = self.betas
        taken = [self.steps[slot] for slot in slots]
        device = self.bank.device

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)

        # max_norm 0 clips nothing; torch.nn.utils.clip_grad_norm_ has the same 1e-6
        clip = column([min(1.0, self.max_norm / (norm + 1e-6)) if self.max_norm else 1.0 for norm in norms])
        size = column([rate / (1 - beta1**step) for rate, step in zip(rates, taken, strict=True)])
        correction = column([math.sqrt(1 - beta2**step) for step in taken])
        kept = column([1 - rate * self.weight_decay for rate in rates])
        rows = torch.tensor(slots, device=device)
        width = max(_BLOCK_NUMBERS // len(slots), 1)
        for begin in range(0, self.bank.trained_numbers, width):
            block = slice(begin, min(begin + width, self.bank.trained_numbers))
            gradient = self.bank.gradients[:, block].index_select(0, rows).mul_(clip)
            first = self.first[:, block].index_select(0, rows).lerp_(gradient, 1 - beta1)
            second = self.second[:, block].index_select(0, rows).mul_(beta2)
            second.addcmul_(gradient, gradient, value=1 - beta2)
            vectors = self.bank.vectors[:, block].index_select(0, rows).mul_(kept)
            vectors.sub_(second.sqrt().div_(correction).add_(self.epsilon).reciprocal_().mul_(first).mul_(size))
            self.first[:, block].index_copy_(0, rows, first)
            self.second[:, block].index_copy_(0, rows, second)
            self.bank.vectors[:, block].index_copy_(0, rows, vectors)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moments [slots, trained_numbers] and the counts of steps, int64 [slots]."""
        return {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.first.copy_(state["first"])
        self.second.copy_(state["second"])
        self.steps = state["steps"].tolist()
