"""SpIEL's optimizers and its rules of dropping and growing, against the authors' numbers, step by step, and torch's AdamW."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qvera.lab import sparse
from qvera.lab.sparse import sampled_product
from qvera.lab.spiel import AgedAdamW, Candidates, Seeds, SparseSM3, by_accumulated_gradient, by_momentum, replace

REFERENCE = Path(__file__).parent / "reference"


class Authors:
    """Their numbers in double precision, with what belongs to the values sorted by place, as ours are."""

    def __init__(self, name: str) -> None:
        with np.load(REFERENCE / f"{name}.npz") as file:
            self.raw = {key: torch.from_numpy(file[key]) for key in file}

    def number(self, key: str) -> float:
        return self.raw[key].item()

    def at(self, key: str, step: int, after: bool = False) -> torch.Tensor:
        """An array of this step, before or after a selection."""
        suffix = "" if after or key == "grad" else "_pre_select"
        order = self.raw[f"indices{'' if after else '_pre_select'}"][step].argsort()
        found = self.raw[key + suffix][step]
        return (found if key.startswith("accumulator") else found[order]).clone().double()

    def indices(self, step: int, after: bool = False) -> torch.Tensor:
        return self.at("indices", step, after).int()

    def micro_batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(g, x) of each; their loss is divided by two."""
        return [(g.double() / 2, x.double()) for g, x in zip(self.raw["g"][step], self.raw["x"][step], strict=True)]


def close(found: torch.Tensor, expected: torch.Tensor, name: str, rtol: float) -> None:
    expected = expected.to(found.dtype)
    torch.testing.assert_close(found.detach(), expected, rtol=rtol, atol=rtol * expected.abs().max().item(), msg=name)


@pytest.mark.parametrize("elements", [2**21, 40])
def test_accumulated_gradient_like_the_authors(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(sparse, "_block_elements", lambda on_accelerator: elements)
    theirs = Authors("spiel_rigl")
    indices, values = theirs.raw["indices0"].sort().values.clone(), nn.Parameter(torch.zeros(24, dtype=torch.float64))
    # theirs decays after the step, and adds eps before the bias correction: here so too, from outside
    rate, betas = theirs.number("lr"), (theirs.number("beta1"), theirs.number("beta2"))
    optimizer = AgedAdamW([values], rate, betas, eps=0.0)
    candidates, selections = Candidates(24), 0
    observed = {0: range(3), 1: range(5, 9)}  # their first phase has three steps and their second four
    for step in range(10):
        values.grad = torch.zeros_like(values)
        for g, x in theirs.micro_batches(step):
            values.grad += sampled_product(g, x, indices)
            if step in observed.get(selections, ()):
                candidates.watch(g, x)
                candidates.end_step()  # they count micro-batches
        corrected = (1 - betas[1] ** (theirs.at("age", step) - 1)).sqrt()
        optimizer.param_groups[0]["eps"] = theirs.number("eps") / corrected
        optimizer.step()
        values.data *= 1 - rate * theirs.number("weight_decay")
        assert torch.equal(indices, theirs.indices(step))
        close(values.grad, theirs.at("grad", step), "grad", 1e-5)
        state = optimizer.state[values]
        for name, found in {"values": values, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}.items():
            close(found, theirs.at(name, step), f"{name} of step {step}", 1e-4)
        assert torch.equal(state["age"] + 1, theirs.at("age", step))  # theirs is that of the next gradient
        if step + 1 == theirs.raw.get(f"select{selections}_step", torch.tensor(-1)):
            prefix = f"select{selections}_"
            order = theirs.raw[prefix + "cand"].argsort()
            assert candidates.indices is not None and candidates.total is not None and candidates.squares is not None
            assert torch.equal(candidates.indices, theirs.raw[prefix + "cand"][order])
            close(candidates.total, theirs.raw[prefix + "cand_grad"][order], "candidates", 1e-5)
            close(candidates.squares, theirs.raw[prefix + "cand_grad_sq"][order], "candidates' squares", 1e-5)
            assert {candidates.steps} == set(theirs.raw[prefix + "cand_samples"].tolist())
            share = theirs.number(prefix + "p")
            change = by_accumulated_gradient(indices, values, share, candidates.indices, candidates.total)
            assert set(indices[change.slots].tolist()) == set(theirs.raw[prefix + "dropped"].tolist())
            assert set(change.places.tolist()) == set(theirs.raw[prefix + "grown"].tolist())
            replace(indices, values, change)
            assert torch.equal(indices, theirs.indices(step, after=True))
            close(values, theirs.at("values", step, after=True), "values", 1e-4)
            for name in ("exp_avg", "exp_avg_sq", "age"):  # ours start otherwise, see the test below
                state[name] = theirs.at(name, step, after=True) - float(name == "age")
            candidates, selections = Candidates(24), selections + 1
    assert selections == theirs.number("n_selections") == 2


def test_momentum_approximation_like_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_block_elements", lambda on_accelerator: 100)
    theirs = Authors("spiel_sm3")
    indices, values = theirs.raw["indices0"].sort().values.clone(), nn.Parameter(torch.zeros(24, dtype=torch.float64))
    rate = theirs.number("lr")
    optimizer = SparseSM3([values], [(indices, (24, 16))], rate, theirs.number("momentum"), theirs.number("eps"))
    selections = 0
    for step in range(10):
        values.grad = sum(sampled_product(g, x, indices) for g, x in theirs.micro_batches(step))  # type: ignore[assignment]
        optimizer.step()
        values.data *= 1 - rate * theirs.number("weight_decay")  # theirs decays after the step
        state = optimizer.state_of(values)
        assert torch.equal(indices, theirs.indices(step))
        for name, found in {
            "grad": values.grad, "values": values, "momentum_buffer": state["momentum"],
            "accumulator_0": state["row"], "accumulator_1": state["column"],
        }.items():  # fmt: skip
            assert found is not None
            close(found, theirs.at(name, step), f"{name} of step {step}", 1e-5)
        if step + 1 == theirs.raw.get(f"select{selections}_step", torch.tensor(-1)):
            prefix = f"select{selections}_"
            change = by_momentum(indices, values, theirs.number(prefix + "p"), state["row"], state["column"])
            assert set(indices[change.slots].tolist()) == set(theirs.raw[prefix + "dropped"].tolist())
            assert set(change.places.tolist()) == set(theirs.raw[prefix + "grown"].tolist())
            replace(indices, values, change)
            assert torch.equal(indices, theirs.indices(step, after=True))
            close(values, theirs.at("values", step, after=True), "values", 1e-5)
            state["momentum"] = theirs.at("momentum_buffer", step, after=True)  # a grown value inherits it there
            selections += 1
    assert selections == theirs.number("n_selections") == 2


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_without_new_places_it_is_adamw(dtype: torch.dtype, rtol: float) -> None:
    torch.manual_seed(0)
    ours, stock = (nn.Parameter(torch.linspace(-1, 1, 50, dtype=dtype)) for _ in range(2))
    settings = {"lr": 0.05, "betas": (0.8, 0.999), "eps": 1e-6, "weight_decay": 0.3}
    optimizers = AgedAdamW([ours], **settings), torch.optim.AdamW([stock], **settings)
    for _ in range(30):
        ours.grad = torch.randn(50, dtype=dtype)
        stock.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    close(ours, stock.detach(), "values", rtol)


def test_a_grown_value_steps_like_one_that_was_always_there() -> None:
    """The gradients at its place were equal in all steps. Then its averages equal those of an Adam that saw every step."""
    grown, always = (nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2))
    optimizers = AgedAdamW([grown], 0.1), AgedAdamW([always], 0.1)
    gradient = torch.tensor([0.3, -2.0, 1e-4], dtype=torch.float64)
    for _ in range(5):
        always.grad = gradient.clone()
        optimizers[1].step()
    order = torch.tensor([2, 0, 1])
    seeds = Seeds(gradient.clone(), gradient.square(), steps=5)
    optimizers[0].take_over(grown, torch.arange(3), order, seeds)
    for key, value in optimizers[0].state[grown].items():
        close(value, optimizers[1].state[always][key][order], key, 1e-12)


def test_values_keep_their_state_when_others_move() -> None:
    values = nn.Parameter(torch.tensor([3.0, 0.1, -2.0, 0.2]))
    indices = torch.tensor([4, 9, 13, 21], dtype=torch.int32)
    adam, sm3 = AgedAdamW([values], 0.0), SparseSM3([values], [(indices, (5, 5))], 0.0)
    values.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    adam.step()
    sm3.step()
    before = {key: value.clone() for key, value in adam.state[values].items()}
    momentum = sm3.state_of(values)["momentum"].clone()
    candidates, total = torch.tensor([0, 4, 9, 17], dtype=torch.int32), torch.tensor([1.0, 50.0, -9.0, -30.0])
    # half are dropped: 9 and 21; the best free candidates are 17 and 9, and 9 stays, with its value
    change = by_accumulated_gradient(indices, values, 0.5, candidates, total)
    assert (change.slots.tolist(), change.places.tolist()) == ([3], [17])
    assert change.chosen is not None and candidates[change.chosen].tolist() == [17]
    order = replace(indices, values, change)
    assert (indices.tolist(), order.tolist()) == ([4, 9, 13, 17], [0, 1, 2, 3])
    assert values.tolist() == pytest.approx([3.0, 0.1, -2.0, 0.0])
    adam.take_over(values, change.slots, order, Seeds(total[change.chosen] / 5, torch.ones(1), 5))
    sm3.take_over(values, change.slots, order)
    for key, value in adam.state[values].items():
        assert torch.equal(value[:3], before[key][:3]), key
    assert adam.state[values]["age"].tolist() == [1, 1, 1, 5]
    assert sm3.state_of(values)["momentum"].tolist() == [*momentum[:3].tolist(), 0.0]


def test_a_step_that_was_not_taken_leaves_no_trace() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(6, 7), torch.randn(6, 5)) for _ in range(4)]
    plain, undone = Candidates(4), Candidates(4)
    undone.watch(*batches[3])
    undone.drop_step()
    for one in (plain, undone):
        one.watch(*batches[0])
        one.watch(*batches[1])
        one.end_step()
    undone.watch(*batches[3])
    undone.drop_step()
    for one, scale in ((plain, 1.0), (undone, 1024.0)):
        one.watch(batches[2][0] * scale, batches[2][1])
        one.end_step(loss_scale=scale)
    assert plain.steps == undone.steps == 2
    for name in ("indices", "total", "squares"):
        assert torch.equal(getattr(plain, name), getattr(undone, name)), name
