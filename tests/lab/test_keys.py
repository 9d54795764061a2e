"""What a recipe alone says against the keys of this package: each pair is refused by its key before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from qvera.adapters.methods import check_recipe
from qvera.config.schema import parse_recipe
from qvera.utils.errors import InputError

SPIEL = {"method": "spiel", "rank": 2, "reselect_every": 4, "accumulate_steps": 2}
BILORA = {"method": "bilora", "rank": 4, "alpha": 4}
LORTA = {"method": "lorta", "rank": 4, "alpha": 4}
PHASES, LEVELS, SAMPLED = {"resample_every": 3}, {"bilevel": True}, {"sample_tokens": 0.3}
BY_TASK = {"sampling": "task", "task_column": "kind"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"training": {**PHASES, "weight_decay": 0.1}}, "weight decay would go on to pull at the frozen phases"),
    ({"training": PHASES, "adapter": {"b_groups": 2}}, "training.resample_every: each phase has one b and one d"),
    ({"training": PHASES, "adapter": {"experts": "each"}}, "phases are not built for vectors of each expert"),
    ({"training": {**PHASES, **LEVELS}}, "training.resample_every: .* two schedules for the same vectors"),
    ({"training": LEVELS, "deepspeed": "zero2"}, "training.bilevel: DeepSpeed expects a gradient of every vector"),
    ({"training": LEVELS, "data": {"group_by_length": True}}, "training.bilevel: has an order of rows of its own"),
    ({"training": LEVELS, "data": BY_TASK}, "training.bilevel: cuts the rows into two parts"),
    ({"training": LEVELS, "adapter": {"train_d": False}}, "adapter.method vera has one here. Remove it, or train d"),
    ({"training": LEVELS, "adapter": {"method": "lora", "rank": 4}}, "or choose adapter.method bilora"),
    ({"adapter": {"method": "lora-sb", "rank": 4}, "deepspeed": "zero3"}, "zero3 shards the base"),
    (
        {
            "adapter": {"method": "lora-sb", "rank": 4},
            "training": {"objective": "grpo", "reward": "rewards.py:score", "sample_count": 0, "exact_match_rows": 0},
        },
        "training.objective: grpo has no gradient before there are answers",
    ),
    ({"adapter": BILORA, "deepspeed": "zero1"}, "adapter.orthogonal_penalty: is added to gradients"),
    (
        {"training": {"torch_compile": True}, "adapter": {"method": "sara", "rank": 4}},
        "training.torch_compile: adapter.method sara has other ranks",
    ),
    ({"training": {"torch_compile": True}, "adapter": LORTA}, "training.torch_compile: adapter.method lorta"),
    ({"training": {"torch_compile": True}, "adapter": SPIEL}, "training.torch_compile: is True"),
    ({"training": {"optim": "adamw_8bit"}, "adapter": SPIEL}, "training.optim: is adamw_8bit"),
    ({"adapter": SPIEL, "deepspeed": "zero2"}, "deepspeed: is zero2, .* Remove deepspeed, or choose another method"),
    ({"adapter": {**SPIEL, "accumulate_steps": 5}}, "adapter.accumulate_steps: 5 is more than adapter.reselect_every"),
    ({"training": SAMPLED}, "nothing to save with adapter.method vera. A is frozen, so .* only z = A x, 8"),
    ({"training": SAMPLED, "adapter": BILORA}, "keeps its inputs for more than the gradient of a trained A"),
    (
        {"training": SAMPLED, "adapter": {**LORTA, "lorta_convention": "output-first"}},
        "keeps its inputs for more than the gradient of a trained A",
    ),
    ({"training": {"adapt_steps": 2}}, "training.adapt_steps: has no effect without data.held_out_tasks"),
    (
        {"training": {"adapt_steps": 2}, "data": {**BY_TASK, "held_out_tasks": 1}, "deepspeed": "zero2"},
        "training.adapt_steps: steps with another optimizer than DeepSpeed's",
    ),
]


@pytest.mark.parametrize(("tree", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_does_not_go_together_is_refused_by_its_key(tree: dict[str, Any], words: str, make_recipe: Any) -> None:
    with pytest.raises(InputError, match=words):
        recipe = make_recipe(**{name: keys for name, keys in tree.items() if name != "deepspeed"})
        check_recipe(recipe.replace(deepspeed=tree.get("deepspeed")))


def test_a_number_of_experts_is_mixed_vectors_in_the_recipe_of_a_run_alone() -> None:
    tree = {"model": "m", "data": "rows.csv", "adapter": {"method": "sara", "rank": 8, "experts": 3}}
    adapter = parse_recipe(tree, "runs/old/recipe.yaml", drop_idle_keys=True).adapter
    assert (adapter.experts, vars(adapter)["mixed_vectors"]) == ("none", 3)
    with pytest.raises(InputError, match="adapter.experts: should be 'none', 'shared' or 'each', got 3"):
        parse_recipe(tree, "my.yaml")
