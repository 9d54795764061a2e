"""The check before a run: what differs between nodes, and where the plan does not fit, is said with the node's name."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from qvera.distributed.group import Group
from qvera.distributed.processes import Processes
from qvera.models.hub import fingerprint_of
from qvera.training import session
from qvera.training.plan import Machine, Sharing, make_plan
from qvera.utils.errors import InputError

HOSTS = ["node0", "node0", "node1", "node1"]
BASE = "the base's fingerprint (model.path)"


@dataclasses.dataclass(frozen=True)
class Four(Processes):
    """Four ranks on two nodes, of which this process is the first; what the others say is made of what it says itself."""

    rank: int = 0
    world_size: int = 4
    host: str = "node0"
    others: Any = None
    """(rank, what it would say if it were like rank 0) → what it says."""

    def gather(self, value: Any) -> list[Any]:
        alike_ = [[host, *value[1:]] if isinstance(value, list) else host for host in HOSTS]
        return [self.others(rank, one) if self.others else one for rank, one in enumerate(alike_)]

    def agree(self, do: Any) -> Any:
        return do()

    def measure_network(self) -> tuple[float, float]:
        return 0.001, 1e8


def differing(key: str, value: str) -> Any:
    def others(rank: int, said: Any) -> Any:
        return [said[0], {**said[1], key: value}] if rank == 2 and isinstance(said[1], dict) else said

    return others


def test_nodes_that_are_alike_are_named_with_what_the_network_does(make_recipe: Any) -> None:
    console = Console(record=True, width=300)
    session.check_same_setup(make_recipe(), Four(), console)
    text = " ".join(console.export_text().split())
    assert "4 processes on 2 nodes (node0, node1) with the same versions, recipe and base model" in text
    assert "an all-reduce takes 1.00 ms, and 4 MB of it pass at 100 MB/s" in text


@pytest.mark.parametrize("key", ["the version of python", "the version of deepspeed", "training.learning_rate", BASE])
def test_a_difference_is_refused_with_the_node_and_what(make_recipe: Any, key: str) -> None:
    recipe = make_recipe().replace(deepspeed="zero1")
    with pytest.raises(InputError) as caught:
        session.check_same_setup(recipe, Four(others=differing(key, "another")), Console(quiet=True))
    text = str(caught.value)
    assert f"{key} is another on rank 2 (node1) and " in text
    assert "on rank 0 (node0)" in text
    assert caught.value.shared
    assert "rank 3" not in text
    assert text.count(" is ") == 1


def test_the_base_s_fingerprint_is_of_its_content(make_recipe: Any, tiny_model_dir: Any, tmp_path: Any) -> None:
    """Another base under the same path on node1."""
    recipe, other = make_recipe(), tmp_path / "model"
    shutil.copytree(tiny_model_dir, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    there = str(fingerprint_of(recipe.model.replace(path=str(other))))
    with pytest.raises(InputError, match=r"the base's fingerprint \(model.path\) is .* on rank 2 \(node1\)"):
        session.check_same_setup(recipe, Four(others=differing(BASE, there)), Console(quiet=True))


def short_on(rank_: int, free: int) -> Any:
    return lambda rank, said: [said[0], said[1], free] if rank == rank_ and isinstance(said, list) else said


def planned(make_recipe: Any, machine: Machine) -> Any:
    return make_plan(make_recipe(), machine, sharing=Sharing(0, None, 2, 2))


def test_a_gpu_without_room_is_refused_by_rank_and_node_and_one_that_is_a_little_too_small_is_not(
    make_recipe: Any,
) -> None:
    plan = planned(make_recipe, Machine("a GPU", "cuda", torch.bfloat16, False, 10**10, 0, 0))
    session.check_memory(plan, Four(), Console(quiet=True))
    with pytest.raises(InputError) as caught:
        session.check_memory(plan, Four(others=short_on(3, 1000)), Console(quiet=True))
    text = str(caught.value)
    assert "rank 3 on node1 needs " in text
    assert "its GPU has 1.00 kB" in text
    assert "rank 2" not in text
    assert "qvera plan RECIPE --nodes 2 --gpus 2" in text
    assert caught.value.shared
    console = Console(record=True, width=300)
    session.check_memory(plan, Four(others=short_on(3, int(plan.needed_bytes / 1.1))), console)
    assert "rank 3 on node1 needs " in console.export_text()


def test_ranks_of_a_node_share_its_ram_and_too_little_is_a_warning(make_recipe: Any) -> None:
    machine = Machine("a CPU", "cpu", torch.float32, True, 10**10, 10**6, 0)
    plan = planned(make_recipe, machine)
    one_needs = plan.memory.needed_bytes(machine) - machine.runtime_bytes
    for free, fits in ((2 * one_needs, True), (2 * one_needs - 1, False)):
        console = Console(record=True, width=300)
        session.check_memory(plan, Four(others=short_on(2, free)), console)
        text = console.export_text()
        assert ("ranks 2, 3 on node1 will need" in text) is not fits
        assert "node0" not in text


def test_ranks_are_counted_by_node() -> None:
    assert session.count_nodes(Four()) == (2, 2)
    assert session.count_nodes(Group()) == (1, 1)
