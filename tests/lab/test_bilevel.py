"""Two levels: each step moves the vectors of its own level alone, on rows that the other level never sees."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR

from qvera.distributed.group import Group
from qvera.training.engine import LocalEngine
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.training.runs import cut_off, losses, same, vectors

pytestmark = pytest.mark.process

LEVELS = {"bilevel": True, "bilevel_share": 0.25, "bilevel_lower_steps": 2, "bilevel_retrain": 0.25}


LOWER = {"vera": {"b"}, "sara": {"b"}, "bilora": {"A", "B"}}


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


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"deepspeed": "zero2"}, "training.bilevel: DeepSpeed expects a gradient of every vector"),
        ({"data": {"group_by_length": True}}, "training.bilevel: has an order of rows of its own"),
        ({"data": {"sampling": "task", "task_column": "kind"}}, "training.bilevel: cuts the rows into two parts"),
        (
            {"data": {"limit": 1, "eval_fraction": 0.0}},
            "training.bilevel: cuts the rows into two parts, and there is one",
        ),
        (
            {"adapter": {"train_d": False}},
            "needs two groups of trained parameters, and adapter.method vera has one here. Remove it, or train d",
        ),
        (
            {"adapter": {"method": "lora", "rank": 4}},
            "adapter.method lora has one here. Remove it, or choose adapter.method bilora",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make_recipe: Any, tmp_path: Path, sections: Any, words: str) -> None:
    stage = sections.pop("deepspeed", None)
    with pytest.raises(InputError, match=words):
        recipe = make_recipe(**{"training": LEVELS, **sections})
        train(recipe.replace(deepspeed=stage), tmp_path / "run")
