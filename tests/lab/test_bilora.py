"""BiLoRA's ΔW = P Λ Q: the penalty for factors that are not orthogonal, and what does not go with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from qvera.distributed.group import Group
from qvera.lab.bilora import OrthogonalPenalty
from qvera.training.engine import LocalEngine
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.training.runs import cut_off, losses, same, vectors


def factors(rank: int = 3) -> Any:
    """A linear with a Q [r, 7] and a P [5, r], and one with a Q that is not trained."""
    torch.manual_seed(0)
    shapes = {"qvera_A": (rank, 7), "qvera_B": (5, rank), "qvera_d": (rank,)}
    one, other = (
        torch.nn.ModuleDict(
            {name: torch.nn.ParameterDict({"default": torch.randn(shape).double()}) for name, shape in shapes.items()}
        )
        for _ in range(2)
    )
    other["qvera_A"].requires_grad_(False)
    return torch.nn.ModuleDict({"q_proj": one, "k_proj": other})


def penalty_of(model: torch.nn.Module, gamma: float) -> torch.Tensor:
    """The penalty as it is written, over what is trained."""
    total = torch.zeros((), dtype=torch.float64)
    for name, X in model.named_parameters():
        if X.requires_grad and not name.endswith("qvera_d.default"):
            M = X @ X.t() if name.endswith("qvera_A.default") else X.t() @ X
            total = total + gamma * (M - torch.eye(len(M), dtype=torch.float64)).square().sum()
    return total


@pytest.mark.parametrize("rank", [3, 5, 6])  # 6: P has more columns than rows, and can't be orthogonal
def test_the_penalty_adds_its_gradient_to_that_of_the_loss(rank: int) -> None:
    model = factors(rank)
    penalty_of(model, 0.3).backward()
    expected = {n: 1 + (torch.zeros_like(p) if p.grad is None else p.grad) for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    OrthogonalPenalty(model, 0.3, optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    model["k_proj"]["qvera_B"]["default"].grad = None  # as where bilevel trains the other level
    optimizer.step()
    for name, p in model.named_parameters():
        if name.startswith(("k_proj.qvera_A", "k_proj.qvera_B")):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-12, atol=1e-12)


def excess(run_dir: Path) -> float:
    """The penalty (γ = 1) of a run's P and Q."""
    return sum(
        (M - torch.eye(len(M))).square().sum().item()
        for name, X in vectors(run_dir).items()
        if not name.endswith("qvera_d")
        for M in [X @ X.t() if name.endswith("qvera_A") else X.t() @ X]
    )


def test_a_penalty_makes_the_factors_more_orthogonal(make_recipe: Any, tmp_path: Path) -> None:
    found = {}
    for penalty in (0.0, 10.0):
        adapter = {"method": "bilora", "rank": 4, "alpha": 4, "orthogonal_penalty": penalty}
        training = {"max_steps": 12, "learning_rate": 2e-2, "bilevel": True, "bilevel_share": 0.25}
        run_dir = tmp_path / str(penalty)
        train(make_recipe(adapter=adapter, training=training), run_dir)
        found[penalty] = excess(run_dir)
    assert vectors(tmp_path / "10.0").keys() == vectors(tmp_path / "0.0").keys()
    assert found[10.0] < 0.5 * found[0.0]


pytestmark = pytest.mark.process

LEVELS = {"bilevel": True, "bilevel_share": 0.25, "bilevel_lower_steps": 2, "bilevel_retrain": 0.25}


LOWER = {"vera": {"b"}, "bilora": {"A", "B"}}


@pytest.fixture(scope="module", params=LOWER)
def run(request: Any, make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Eight steps: lower, lower, upper, lower, lower, upper, and two of the lower level on all rows."""
    training = {**LEVELS, "max_steps": 8, "save_steps": 1, "save_total_limit": 9, "weight_decay": 0.1}
    adapter = {"method": request.param, "rank": 4, **({"alpha": 4} if request.param == "bilora" else {})}
    recipe = make_recipe(training=training, adapter=adapter)
    run_dir = tmp_path_factory.mktemp("bilevel") / "run"
    train(recipe, run_dir)
    return recipe, run_dir


def test_a_step_moves_the_vectors_of_its_level_alone(run: tuple[Any, Path]) -> None:
    """Neither momentum nor weight decay moves the others."""
    steps = [load_file(run[1] / "checkpoints" / f"step-{k:08d}" / "vectors.safetensors") for k in range(1, 9)]
    moved = [
        {name.rpartition("_")[2] for name in after if not torch.equal(after[name], before[name])}
        for before, after in zip(steps[:-1], steps[1:], strict=True)
    ]
    lower = LOWER[run[0].adapter.method]
    assert moved == [lower, {"d"}, lower, lower, {"d"}, lower, lower]


def test_a_bilevel_run_is_resumed_to_the_bit(run: tuple[Any, Path], tmp_path: Path) -> None:
    recipe, whole = run
    again = cut_off(whole, tmp_path / "again", after=2)
    train(recipe, again, resume=True)
    assert losses(again) == losses(whole)
    assert same(vectors(again), vectors(whole))


def test_several_ranks_step_no_vector_of_the_other_level() -> None:
    upper, lower = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.AdamW([upper, lower], lr=0.1)

    @dataclasses.dataclass(frozen=True)
    class Two(Group):
        world_size: int = 2

        def all_reduce(self, tensors: Any) -> None:
            for tensor in tensors:
                tensor.mul_(2)

    parts = {"upper": upper, "lower": lower}
    engine = LocalEngine(parts, optimizer, LambdaLR(optimizer, lambda _: 1.0), 0.0, Two())
    for trained, frozen in ((upper, lower), (lower, upper)):
        frozen.requires_grad_(False)
        before = frozen.clone()
        engine.backward((upper * lower).sum(), last=True)
        engine.step()
        assert torch.equal(frozen, before)
        assert not torch.equal(trained, torch.ones(3))
        frozen.requires_grad_(True)


def test_one_row_is_not_cut_in_two(make_recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="training.bilevel: cuts the rows into two parts, and there is one"):
        train(make_recipe(training=LEVELS, data={"limit": 1, "eval_fraction": 0.0}), tmp_path / "run")
