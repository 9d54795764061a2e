"""BiLoRA's ΔW = P Λ Q: the penalty for factors that are not orthogonal, and steps on two levels."""

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

pytestmark = pytest.mark.process

BILORA = {"method": "bilora", "rank": 4, "alpha": 4}
LEVELS = {"bilevel": True, "bilevel_share": 0.25, "bilevel_lower_steps": 2, "bilevel_retrain": 0.3}
LOWER = {"vera": {"b"}, "bilora": {"A", "B"}}


def excess(X: torch.Tensor, name: str) -> torch.Tensor:
    """The penalty (γ = 1) of a Q [r, n] or a P [m, r]."""
    M = X @ X.t() if "qvera_A" in name else X.t() @ X
    return (M - torch.eye(len(M), dtype=X.dtype)).square().sum()


@pytest.mark.parametrize("rank", [3, 6])  # 6: P has more columns than rows, and can't be orthogonal
def test_the_penalty_adds_its_gradient_to_that_of_the_loss(rank: int) -> None:
    """Of a linear with a Q [r, 7] and a P [5, r], and of one with a Q that is not trained."""
    torch.manual_seed(0)
    shapes = {"qvera_A": (rank, 7), "qvera_B": (5, rank), "qvera_d": (rank,)}
    one, other = (
        torch.nn.ModuleDict(
            {name: torch.nn.ParameterDict({"default": torch.randn(shape).double()}) for name, shape in shapes.items()}
        )
        for _ in range(2)
    )
    other["qvera_A"].requires_grad_(False)
    model: Any = torch.nn.ModuleDict({"q_proj": one, "k_proj": other})
    factors = [(name, X) for name, X in model.named_parameters() if X.requires_grad and "qvera_d" not in name]
    torch.stack([0.3 * excess(X, name) for name, X in factors]).sum().backward()
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


def test_a_penalty_makes_the_factors_more_orthogonal(make_recipe: Any, tmp_path: Path) -> None:
    found = []
    for penalty in (0.0, 10.0):
        run_dir = tmp_path / str(penalty)
        train(make_recipe(adapter={**BILORA, "orthogonal_penalty": penalty}, training={"max_steps": 3}), run_dir)
        found.append(sum(excess(X, name).item() for name, X in vectors(run_dir).items() if "qvera_d" not in name))
    assert found[1] < 0.9 * found[0]


@pytest.fixture(scope="module", params=LOWER)
def run(request: Any, make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Six steps: lower, lower, upper, lower, and two of the lower level on all rows."""
    training = {**LEVELS, "max_steps": 6, "save_steps": 1, "save_total_limit": 9, "weight_decay": 0.1}
    recipe = make_recipe(training=training, adapter=BILORA if request.param == "bilora" else {"rank": 4})
    run_dir = tmp_path_factory.mktemp("bilevel") / "run"
    train(recipe, run_dir)
    return recipe, run_dir


def test_a_step_moves_the_vectors_of_its_level_alone(run: tuple[Any, Path]) -> None:
    """Neither momentum nor weight decay moves the others."""
    steps = [load_file(run[1] / "checkpoints" / f"step-{k:08d}" / "vectors.safetensors") for k in range(1, 7)]
    moved = [
        {name.rpartition("_")[2] for name in after if not torch.equal(after[name], before[name])}
        for before, after in zip(steps[:-1], steps[1:], strict=True)
    ]
    lower = LOWER[run[0].adapter.method]
    assert moved == [lower, {"d"}, lower, lower, lower]


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
