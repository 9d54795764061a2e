"""The learning rate over a run, and of each parameter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from qvera.adapters.methods import method_of
from qvera.config.sections import AdapterSection, TrainingSection
from qvera.training.optim import build_optimizer, build_schedule, current_rate


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


def test_rates_per_parameter_are_those_of_peft_s_lora_plus() -> None:
    with np.load(Path(__file__).parent / "reference" / "loraplus_groups.npz") as stored:
        rate, ratio, decay = (float(stored[key]) for key in ("lr", "loraplus_lr_ratio", "loraplus_weight_decay"))
        trainable = [json.loads(line) for line in stored["lora_qv_trainable"]]
        groups = [json.loads(line) for line in stored["lora_qv_groups"]]
    expected = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["params"]}
    vectors = {one["name"]: torch.nn.Parameter(torch.zeros(one["shape"])) for one in trainable}
    adapter = AdapterSection(method="lora", rank=8, loraplus_lr_ratio=ratio)
    kinds = {name: "qvera_B" if ".lora_B." in name else "qvera_A" for name in vectors}
    factors = {name: method_of(adapter).traits(kind, adapter).rate for name, kind in kinds.items()}
    section = TrainingSection(learning_rate=rate, weight_decay=decay)
    built = build_optimizer(section, vectors, factors)
    names = {id(vector): name for name, vector in vectors.items()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in built.param_groups for p in group["params"]
    }
    assert found == {name: pytest.approx(pair, rel=1e-15) for name, pair in expected.items()}


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("factors", [{"b": 16.0}, {"a": 2.0, "b": 0.5}, {}])
def test_every_parameter_follows_the_schedule_at_its_own_rate(optim: str, factors: dict[str, float]) -> None:
    section = TrainingSection(learning_rate=0.01, optim=optim, warmup_steps=2)  # type: ignore[arg-type]
    vectors = {name: torch.nn.Parameter(torch.zeros(3)) for name in "ab"}
    built = build_optimizer(section, vectors, factors)
    schedule = build_schedule(section, built, 6)
    alone = build_optimizer(section, {"a": torch.nn.Parameter(torch.zeros(3))})
    expected = rates(build_schedule(section, alone, 6), 6)
    for rate in expected:
        assert current_rate(schedule) == pytest.approx(rate, rel=1e-15)
        before = {name: vector.detach().clone() for name, vector in vectors.items()}
        for vector in vectors.values():
            vector.grad = torch.ones(3)  # AdamW's step is then the rate itself
        built.step()
        schedule.step()
        for name, vector in vectors.items():
            torch.testing.assert_close(before[name] - vector, torch.full((3,), rate * factors.get(name, 1.0)))
