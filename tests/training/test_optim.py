"""The learning rate over a run."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from qvera.config.schema import TrainingSection
from qvera.training.optim import build_schedule


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)


def rates(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(float(schedule.get_last_lr()[0]))
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("kind", "steps", "warmup"),
    [("linear", 50, 5), ("cosine", 37, 4), ("constant", 20, 7), ("linear", 10, 0), ("cosine", 3, 1), ("linear", 4, 9)],
)
def test_the_schedule_is_that_of_transformers_but_no_step_has_rate_0(kind: str, steps: int, warmup: int) -> None:
    section = TrainingSection(lr_scheduler_type=kind, warmup_steps=warmup, warmup_ratio=0.0)  # type: ignore[arg-type]
    ours = rates(build_schedule(section, optimizer(), steps), steps)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = rates(get_scheduler(name, optimizer(), num_warmup_steps=warmup, num_training_steps=steps), steps)
    assert ours[warmup:] == theirs[warmup:]  # to the bit
    assert ours[:warmup] == pytest.approx([0.3 * (i + 1) / (warmup + 1) for i in range(min(warmup, steps))])
    assert min(ours) > 0
    if warmup:
        assert theirs[0] == 0
