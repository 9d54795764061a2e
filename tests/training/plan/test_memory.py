"""What a run holds by the plan: stored weights, optimizer state, and one rank of many in each ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.plan_table import recipe_of, shapes
from qvera.cli.main import main
from qvera.config.schema import Recipe, parse_recipe
from qvera.models import quantization
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.training.optim import build_optimizer, optimizer_bytes
from qvera.training.plan import ALONE, Batch, Machine, PlannedRun, Sharing, plan_memory, plan_ways, right_way, shape_of
from qvera.training.plan.memory import (
    four_bit_bytes,
    host_bytes,
    optimizer_state_bytes,
    plan_rank,
    spread_of,
    traffic,
    weight_storage_bytes,
)  # fmt: skip
from tests.conftest import small_llama

SEVEN = "Llama-2 7B"
PLAIN = ["none", "zero1", "zero2", "zero3"]
BATCH = Batch(1, 512, 512, False, False, "", 512)
PACKED = 6_476_005_376 // 2
"""Linears of a 7B's layers, two weights in a byte."""


def gpu(size_bytes: int) -> Machine:
    return Machine("a GPU", "cuda", torch.bfloat16, False, size_bytes, 0, 0)


def cpu(free_bytes: int) -> Machine:
    return Machine("a CPU", "cpu", torch.bfloat16, True, free_bytes, 0, 0)


def seven(machine: Machine, recipe: Recipe | None = None, sharing: Sharing = ALONE) -> PlannedRun:
    return PlannedRun(shapes()[SEVEN], recipe or recipe_of(256), BATCH, machine, sharing=sharing)


def part(memory: Any, name: str) -> int:
    return sum(c.bytes for c in memory.standing if c.name == name)


@pytest.mark.parametrize("machine", [gpu(10**11), cpu(10**11)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_zero3_divides_packed_weights_embedding_and_head_and_nothing_is_lost(machine: Machine, world_size: int) -> None:
    run = seven(machine)
    whole = plan_memory(run)
    spread = plan_rank(seven(machine, sharing=Sharing(3, None, world_size)))
    tables = 2 * 2 * 32000 * 4096
    assert spread_of(run.shape).all == PACKED + tables
    share = part(spread, "a share of the base")
    assert share == -(-(PACKED + tables) // world_size)
    kept = part(spread, "statistics, norms")
    base = sum(c.bytes for c in whole.standing if c.kind == "base")
    assert kept + PACKED + tables == base
    assert not any(c.mapped for c in spread.standing if c.name == "a share of the base")
    # beside that share, in any moment less than a tenth of the model is whole at a time
    for moment in spread.moments:
        gathered = sum(c.bytes for c in spread.moments[moment] if c.kind == "base")
        assert 0 < gathered < base * 0.14


def test_zero1_and_zero2_save_nothing_with_two_ranks_and_a_few_mb_with_many() -> None:
    trained = 1_417_216
    plain = plan_rank(seven(gpu(0))).total_bytes
    for stage in (1, 2):
        two = plan_rank(seven(gpu(0), sharing=Sharing(stage, None, 1, 2))).total_bytes
        many = plan_rank(seven(gpu(0), sharing=Sharing(stage, None, 16, 8))).total_bytes
        nccl = 32 * 3 * 10 * 2**20  # its buffers, of which a run of one GPU has none
        assert two - nccl == plain
        assert plain - (many - nccl) == pytest.approx(8 * trained, rel=0.02)  # 11 of 4,700 MB


def test_what_travels_in_a_step() -> None:
    recipe = recipe_of(256)
    recipe = recipe.replace(training=recipe.training.replace(global_batch_size=2, per_device_train_batch_size=1))
    plain = traffic(seven(gpu(0), recipe, Sharing(0, None, 2)))
    assert (plain.gradients, plain.base) == (4 * 1_417_216, 0)  # 5.7 MB
    assert (
        sum(traffic(seven(gpu(0), recipe, Sharing(1, None, 2)))) == 6 * 1_417_216
    )  # bench/bandwidth.py received 1.004 times that of a 1.1B
    spread = traffic(seven(gpu(0), recipe, Sharing(3, None, 2)))
    down = 32 * 4096 * 11008 // 2
    assert spread.base == (3 * PACKED - down + 2 * 2 * 32000 * 4096) // 2
    assert spread.gradients == plain.gradients
    recipe = recipe.replace(training=recipe.training.replace(global_batch_size=8))  # four passes on each of two ranks
    assert traffic(seven(gpu(0), recipe, Sharing(3, None, 2))).base == 4 * spread.base
    assert sum(traffic(seven(gpu(0), recipe, Sharing(3)))) == 0
    recipe = recipe.replace(training=recipe.training.replace(gradient_checkpointing=False))
    assert traffic(seven(gpu(0), recipe, Sharing(3, None, 2))).base == 2 * (2 * PACKED + 2 * 2 * 32000 * 4096)


@pytest.mark.parametrize(
    ("card_gb", "word", "words"),
    [
        (24, "none", "the base fits on each rank"),
        (4.5, "zero3", "zero3: without it a rank needs"),
        (2.3, "zero3-offload-cpu", "of RAM on each node"),
        (1.4, None, "None fits: even zero3-offload-nvme needs"),
    ],
)
def test_the_right_stage_for_a_card(card_gb: float, word: str | None, words: str) -> None:
    machine = gpu(int(card_gb * 1e9))
    ways = plan_ways(seven(machine), 2, 2)
    assert [way.sharing.word for way in ways] == [*PLAIN, "zero3-offload-cpu", "zero3-offload-nvme"]
    in_ram, on_disk = ways[-2:]
    assert on_disk.needed_bytes <= in_ram.needed_bytes < 1.1 * on_disk.needed_bytes  # which has the next layer there
    assert 0 < host_bytes(on_disk) < 0.5 * host_bytes(in_ram)
    way, why = right_way(ways)
    assert (None if way is None else way.sharing.word) == word
    assert words in why


def test_on_a_cpu_ranks_of_a_node_divide_its_ram_and_share_its_pages() -> None:
    machine = cpu(4 * 10**9)
    ways = plan_ways(seven(machine), 1, 4)
    assert [way.sharing.word for way in ways] == [*PLAIN, "zero3-offload-nvme"]
    assert {way.machine.available_bytes for way in ways} == {10**9}
    assert right_way(ways)[0] is ways[0]
    assert not ways[3].fits


def test_a_base_in_16_bits_is_not_offered_to_zero3() -> None:
    recipe = recipe_of(256)
    recipe = recipe.replace(model=recipe.model.replace(quantization="none"))
    ways = plan_ways(seven(gpu(10**9), recipe), 1, 2)
    assert [way.sharing.word for way in ways] == ["none", "zero1", "zero2"]


def test_the_command_for_many_ranks(write_recipe: Any, capsys: Any) -> None:
    recipe = str(write_recipe())
    assert main(["plan", recipe, "--no-timing", "--nodes", "2", "--gpus", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 ranks, 2 on each of 2 nodes" in said
    assert "Leave deepspeed out" in said
    assert main(["plan", recipe, "--gpu", "8GB", "--nodes", "2", "--json", "--set", "deepspeed=zero3"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["processes"] == {"deepspeed": "zero3", "nodes": 2, "per_node": 1}
    assert plan["right_way"]["deepspeed"] == "none"
    ways = {way["deepspeed"]: way for way in plan["ways"]}
    assert ways["zero3"]["memory"] == plan["memory"]
    assert ways["zero3"]["received_bytes_per_step"]["base"] > 0 == ways["zero2"]["received_bytes_per_step"]["base"]
    assert main(["plan", recipe, "--nodes", "0"]) == 2
    assert "--nodes" in capsys.readouterr().err


def test_a_plan_that_needs_another_stage_says_which(tmp_path: Path, write_recipe: Any, capsys: Any) -> None:
    recipe = str(write_recipe(training={"gradient_checkpointing": True}))
    assert main(["plan", recipe, "--gpu", "8GB", "--gpus", "2", "--json"]) == 0
    ways = {way["deepspeed"]: way for way in json.loads(capsys.readouterr().out)["ways"]}
    between = (ways["none"]["needed_bytes"] + ways["zero3"]["needed_bytes"]) / 2 / 1e9
    assert main(["plan", recipe, "--gpu", f"{between:.6f}GB", "--gpus", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--set deepspeed=zero3 makes it fit" in said
    assert "Does not fit" in said


@pytest.mark.parametrize("double_quant", [True, False])
def test_base_bytes_are_those_of_the_loaded_modules(tiny_model_dir: Path, double_quant: bool) -> None:
    tree = {
        "model": {"path": str(tiny_model_dir), "double_quant": double_quant, "compute_dtype": "float32"},
        "data": {"path": "-"},
    }
    made = parse_recipe(tree, "a test")
    base = load_base(made.model, torch.device("cpu"))
    shape = shape_of(empty_model(made.model))
    assert shape.parameters == base.facts["parameters"]
    stored = {n: m for n, m in base.model.named_modules() if isinstance(m, quantization.Linear4bit)}
    assert {x.name for x in shape.linears if x.quantizable} == set(stored)
    for x in shape.linears:
        assert weight_storage_bytes(x, made, 4) == quantization.storage_bytes(stored[x.name])
    run = PlannedRun(shape, made, BATCH, Machine("test", "cpu", torch.float32, True, 10**12))
    memory = plan_memory(run)
    # norms are held in the compute dtype, two bytes a number more than in the file
    norms = shape.dense_numbers - 2 * shape.vocabulary * shape.hidden
    assert sum(c.bytes for c in memory.standing if c.kind == "base") == base.facts["base_bytes"] - 2 * norms


def test_published_sizes() -> None:
    # QLoRA, section 3.2: 0.127 bits a weight for double quantization with blocks of 64, 0.5 without
    assert four_bit_bytes(2**24, True) * 8 / 2**24 == pytest.approx(4.127, abs=1e-3)
    assert four_bit_bytes(2**24, False) * 8 / 2**24 == 4.5


def test_the_8_bit_optimizer_s_state_is_bitsandbytes_own() -> None:
    section = parse_recipe({"model": "-", "data": {"path": "-"}, "training": {"optim": "adamw_8bit"}}, "t").training
    sizes = [256, 4095, 4096, 11008]
    vectors = {str(n): torch.nn.Parameter(torch.randn(n)) for n in sizes}
    optimizer = build_optimizer(section, vectors)
    for vector in vectors.values():
        vector.grad = torch.randn_like(vector)
    optimizer.step()
    # two tables of 256 numbers for what 8 bits mean, shared
    assert 0 <= optimizer_bytes(optimizer) - optimizer_state_bytes(sizes, "adamw_8bit") <= 2 * 256 * 4


def test_what_a_cpu_keeps_of_freed_memory_is_a_share_of_the_peak_unless_layers_are_checkpointed() -> None:
    def kept(checkpointing: bool) -> float:
        made = recipe_of(16)
        made = made.replace(training=made.training.replace(gradient_checkpointing=checkpointing))
        memory = plan_memory(seven(cpu(10**12), made))
        return part(memory, "freed memory that malloc keeps") / sum(c.bytes for c in memory.peak)

    assert kept(True) < 0.02 and 0.06 < kept(False) < 0.2


def test_a_mapped_base_is_not_private() -> None:
    made = recipe_of(16)
    shape = shape_of(small_llama(hidden_size=256, vocab_size=1000))
    machines = [Machine("t", "cpu", torch.float32, mapped_base, 10**12) for mapped_base in (False, True)]
    whole, mapped = (plan_memory(PlannedRun(shape, made, BATCH, machine)) for machine in machines)
    assert whole.mapped_bytes == 0 < mapped.mapped_bytes
    linears = sum(x.n * x.m for x in shape.linears)
    # embeddings and head in 16 bits, whatever the compute dtype
    assert mapped.mapped_bytes == pytest.approx(linears * 4.127 / 8 + 2 * shape.dense_numbers, rel=0.01)
    assert mapped.needed_bytes(machines[1]) < whole.needed_bytes(machines[0])
