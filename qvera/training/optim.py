"""Optimizers and learning-rate schedules, for one adapter and for the slots of a bank."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from qvera.config.schema import Recipe
from qvera.config.sections import LrRange, TrainingSection
from qvera.models.quantization import bnb as bitsandbytes
from qvera.utils import accelerator
from qvera.utils.errors import InputError
from qvera.utils.formatting import first_of
from qvera.utils.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler

    from qvera.adapters.bank import AdapterBank

_BLOCK_NUMBERS = 2**22  # the numbers stepped at a time, which bounds temporary tensors
_LEAST_NUMBERS = 2**12  # the fewest of each adapter at a time, where memory is short


def build_optimizer(
    section: TrainingSection, vectors: dict[str, nn.Parameter], rate_factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Make AdamW over the vectors: torch's own or one of bitsandbytes', by its name in the recipe.

    ``rate_factors``: vector name → its learning rate relative to ``training.learning_rate``; 1 where it has no entry.
    Each factor has a parameter group, which holds it as ``rate_factor``. The group of factor 1 comes first. A paged
    optimizer without CUDA is an InputError.
    """
    settings: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
        "weight_decay": section.weight_decay,
    }
    by_factor: dict[float, list[nn.Parameter]] = {}
    for name, vector in vectors.items():
        by_factor.setdefault((rate_factors or {}).get(name, 1.0), []).append(vector)
    groups: list[dict[str, Any]] = [
        {"params": by_factor[factor], "lr": section.learning_rate * factor, "rate_factor": factor}
        for factor in sorted(by_factor, key=lambda factor: (factor != 1.0, factor))
    ]
    if section.optim == "adamw":
        return torch.optim.AdamW(groups, **settings)
    if section.optim.startswith("paged") and not accelerator.pages_optimizer_state():
        raise InputError(
            f"training.optim: {section.optim} pages its state through CUDA, and there is no GPU here; use adamw."
        )
    classes = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return classes[section.optim](groups, **settings)


def require_all_stepped(optimizer: torch.optim.Optimizer, vectors: Mapping[str, nn.Parameter], recipe: Recipe) -> None:
    """Refuse (InputError) a method's own optimizer that leaves out a tensor to train, such as a task's head."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if left_out := [name for name, vector in vectors.items() if id(vector) not in stepped]:
        raise InputError(
            f"adapter.method: {recipe.adapter.method} steps its own tensors only, and task: {recipe.task} trains "
            f"{first_of(left_out)} too. Use another method."
        )


def build_scaler(section: TrainingSection, dtype: torch.dtype, device: torch.device) -> GradScaler | None:
    """Make a dynamic loss scale for float16 (Micikevicius et al., arXiv 1710.03740); None for other dtypes.

    Gradients below 6e-8 are zero in float16. The scale lifts them above that in backward, and is divided out again.
    """
    if dtype != torch.float16:
        return None
    return GradScaler(device.type, init_scale=2.0**section.initial_scale_power)


def current_rate(schedule: LRScheduler) -> float:
    """Return the schedule's learning rate of now: that of a parameter group whose factor is 1 (`build_optimizer`)."""
    return float(schedule.get_last_lr()[0]) / schedule.optimizer.param_groups[0].get("rate_factor", 1.0)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the optimizer's state as held. A tensor that several vectors share counts once."""
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(held.values())


def build_schedule(
    section: TrainingSection, optimizer: torch.optim.Optimizer, steps: int, lengths: Sequence[int] = ()
) -> LambdaLR:
    """Make a cosine, linear or constant schedule over ``steps`` steps, as in transformers but for the warm-up.

    In transformers the first of w warm-up steps has rate 0 and changes nothing. Here step i (from 0) has (i+1)/(w+1) of
    ``learning_rate``. Step w has all of it in both.

    ``lengths``: for a run that was made longer, the steps that it had before each time. A constant rate stays. A rate
    that has decayed warms up again, and decays over the steps that were added.
    """
    return LambdaLR(optimizer, lr_lambda(section, steps, lengths))


def lr_lambda(section: TrainingSection, steps: int, lengths: Sequence[int] = ()) -> Callable[[int], float]:
    """Return step (from 0) → its share of ``learning_rate``, as `build_schedule` says."""
    if lengths and section.lr_scheduler_type == "constant":
        steps = lengths[0]  # its warm-up may be a share of them
    elif lengths:
        *before, last = lengths
        head, tail = lr_lambda(section, last, before), lr_lambda(section, steps - last)
        return lambda step: head(step) if step < last else tail(step - last)
    warmup = section.warmup_steps or math.ceil(section.warmup_ratio * steps)
    name = "constant_with_warmup" if section.lr_scheduler_type == "constant" else section.lr_scheduler_type
    return _lr_lambda(name, warmup, steps)


@functools.lru_cache(maxsize=256)  # many adapters of a run have equally many steps
def _lr_lambda(name: str, warmup: int, steps: int) -> Callable[[int], float]:
    unused = torch.optim.SGD([torch.zeros(1)])  # transformers makes its functions for an optimizer only
    share = get_scheduler(name, unused, warmup, steps).lr_lambdas[0]
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else share(step)


def build_range_test(section: TrainingSection, optimizer: torch.optim.Optimizer, ramp: LrRange) -> LambdaLR:
    """Make a schedule whose rate grows by one factor in each step, from ``ramp.start`` to ``ramp.end``."""
    growth = (ramp.end / ramp.start) ** (1 / (ramp.steps - 1))
    first = ramp.start / section.learning_rate
    return LambdaLR(optimizer, lambda step: first * growth**step)


class AdamSettings(NamedTuple):
    """The settings of an adapter's step. ``max_norm`` is that of clipping, the others are torch's AdamW's."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_norm: float
    """The gradient's norm is clipped to this; 0 clips nothing."""

    @classmethod
    def of(cls, section: TrainingSection, rate: float) -> Self:
        """Return AdamW's settings of a recipe, at the rate that its schedule has now."""
        return cls(
            rate, section.adam_beta1, section.adam_beta2, section.adam_epsilon, section.weight_decay,
            section.max_grad_norm,
        )  # fmt: skip


class BankAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) as torch has it, over the slots of an `AdapterBank`.

    ``first`` and ``second``: the moments, fp32 [slots, trained_numbers]. ``steps``: taken by each slot's adapter.
    ``rate_factors`` are those of `build_optimizer`, by the keys of the bank's layout.
    """

    def __init__(self, bank: AdapterBank, rate_factors: Mapping[str, float] | None = None) -> None:
        self.bank = bank
        self.first = torch.zeros_like(bank.gradients)
        self.second = torch.zeros_like(bank.gradients)
        self.steps = [0] * bank.slots
        self.factors = torch.ones(bank.numbers, device=bank.device)
        for key, factor in (rate_factors or {}).items():
            bank.layout.columns[key].of(self.factors).fill_(factor)

    def reset(self, slot: int) -> None:
        """Clear the state that the slot's last adapter left."""
        self.first[slot].zero_()
        self.second[slot].zero_()
        self.steps[slot] = 0

    @torch.no_grad()
    def step(self, slots: Sequence[int], settings: Sequence[AdamSettings]) -> list[float]:
        """Clip each adapter's gradient, step with its settings and drop the gradients. Returns the norms before it.

        An adapter whose gradient is not finite takes no step.
        """
        if not slots:
            return []
        rows = accelerator.tensor_on(self.bank.device, np.array(slots, np.int64))
        norms: list[float] = torch.linalg.vector_norm(self.bank.gradients, dim=1)[rows].tolist()
        # the others are left out: clipped by a factor of 0, infinite gradients become NaN, and moments still decay
        finite = [i for i, norm in enumerate(norms) if math.isfinite(norm)]
        for i in finite:
            self.steps[slots[i]] += 1
        try:
            if finite:
                self._step([slots[i] for i in finite], [settings[i] for i in finite], [norms[i] for i in finite])
        except (RuntimeError, MemoryError):  # before the first block, so no adapter has taken its step
            for i in finite:
                self.steps[slots[i]] -= 1
            raise
        self.bank.gradients.index_fill_(0, rows, 0.0)
        return norms

    def _step(self, slots: Sequence[int], settings: Sequence[AdamSettings], norms: Sequence[float]) -> None:
        # Numbers of one adapter are one row [8]. They go to the device as one tensor, whatever the number of adapters.
        columns = []
        for own, norm, slot in zip(settings, norms, slots, strict=True):
            rate, steps = own.learning_rate, self.steps[slot]
            # torch.nn.utils.clip_grad_norm_ has the same 1e-6
            clip = min(1.0, own.max_norm / (norm + 1e-6)) if own.max_norm else 1.0
            size, correction = rate / (1 - own.beta1**steps), math.sqrt(1 - own.beta2**steps)
            betas = 1 - own.beta1, own.beta2, 1 - own.beta2
            columns.append([clip, size, correction, rate * own.weight_decay, own.epsilon, *betas])
        each = accelerator.tensor_on(self.bank.device, np.array(columns, np.float32)).t().unsqueeze(2)
        rows, begin = accelerator.tensor_on(self.bank.device, np.array(slots, np.int64)), 0
        width = max(_BLOCK_NUMBERS // len(slots), 1)
        while begin < self.bank.trained_numbers:
            block = slice(begin, min(begin + width, self.bank.trained_numbers))
            try:
                self._step_block(rows, block, each)
            except (RuntimeError, MemoryError) as error:  # the block is as it was, so a narrower one may be tried
                # a step that has begun is taken to its end, however narrow its blocks become
                if not is_out_of_memory(error) or width <= (_LEAST_NUMBERS if begin == 0 else 1):
                    raise
                width //= 2
            else:
                begin = block.stop

    def _step_block(self, rows: torch.Tensor, block: slice, each: torch.Tensor) -> None:
        """Step some columns of these rows. Nothing is written before all that takes memory is computed."""
        clip, size, correction, decay, epsilon, new1, beta2, new2 = each  # fp32 [adapters, 1], in the order of `_step`
        gradient = self.bank.gradients[:, block].index_select(0, rows).mul_(clip)
        first = self.first[:, block].index_select(0, rows).lerp_(gradient, new1)
        second = self.second[:, block].index_select(0, rows).mul_(beta2).addcmul_(gradient * new2, gradient)
        own = self.factors[block]
        vectors = self.bank.vectors[:, block].index_select(0, rows).mul_(1 - decay * own)
        vectors.sub_(second.sqrt().div_(correction).add_(epsilon).reciprocal_().mul_(first).mul_(size * own))
        self.first[:, block].index_copy_(0, rows, first)
        self.second[:, block].index_copy_(0, rows, second)
        self.bank.vectors[:, block].index_copy_(0, rows, vectors)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The moments [slots, trained_numbers] and the counts of steps, int64 [slots]."""
        return {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.first.copy_(state["first"])
        self.second.copy_(state["second"])
        self.steps = state["steps"].tolist()
