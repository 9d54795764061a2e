"""Phases: every some steps the vectors are frozen and a new random pair goes on; the sum is an exact LoRA."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qvera.adapters.config import QveraConfig
from qvera.adapters.factors import Factors
from qvera.adapters.methods import check_recipe
from qvera.adapters.projection import uniform_pair
from qvera.adapters.save_load import attach, load_adapter
from qvera.cli.main import main
from qvera.config.sections import AdapterSection
from qvera.distributed.group import Group
from qvera.evaluation.run_info import directory_facts
from qvera.lab.resample import carried_share, phase_count
from qvera.training.failures import step_error
from qvera.training.plan import Machine, make_plan
from qvera.training.plan.plan import print_plan
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from qvera.utils.memory import Shortage
from tests.adapters.helpers import logits, perturb, relative
from tests.conftest import small_llama
from tests.lab.authors import numbers_of
from tests.training.runs import cut_off, losses, same, vectors

pytestmark = pytest.mark.process

RANK, PHASES = 4, 3


def in_phases(rank: int, phases: int, seed: int = 0) -> dict[str, Any]:
    return {"rank": rank * phases, "b_groups": phases, "seed_chain": [seed + phase for phase in range(phases)]}


@pytest.fixture(scope="module")
def run(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Eight steps in phases of three, three and two, in fp32 over an unquantized base."""
    training = {"resample_every": 3, "max_steps": 8, "save_steps": 1, "save_total_limit": 9}
    recipe = make_recipe(model={"quantization": "none"}, adapter={"rank": RANK, "seed": 5}, training=training)
    run_dir = tmp_path_factory.mktemp("phases") / "run"
    train(recipe, run_dir)
    return recipe, run_dir


def saved(run_dir: Path, step: int, what: str = "vectors") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:08d}" / f"{what}.safetensors")


def counted(run_dir: Path, step: int) -> set[int]:
    """The steps that the optimizer's state has counted."""
    return {int(v) for name, v in saved(run_dir, step, "optimizer").items() if name.endswith("/step")}


def test_a_step_moves_its_phase_alone_and_a_new_phase_begins_at_zero(run: tuple[Any, Path]) -> None:
    for number in range(1, 8):
        before, after, phase = saved(run[1], number), saved(run[1], number + 1), number // 3
        for name, value in after.items():
            moved = (value != before[name]).reshape(PHASES, -1).any(dim=1)
            assert len(value) == (PHASES if name.endswith("_b") else PHASES * RANK)
            still = name.endswith("_d") and number % 3 == 0  # while b is 0, d has no gradient
            assert moved.tolist() == [p == phase and not still for p in range(PHASES)], (name, number)
            if name.endswith("_b"):
                assert not value[phase + 1 :].any()
    assert [counted(run[1], step) for step in (2, 3, 4, 8)] == [{2}, set(), {1}, {2}], "its state begins anew too"


def test_momentum_may_be_moved_and_moves_no_frozen_phase(run: tuple[Any, Path], tmp_path: Path) -> None:
    training = run[0].training.replace(resample_momentum="move", max_steps=5)
    train(run[0].replace(training=training), tmp_path)
    before = saved(tmp_path, 2, "optimizer")
    for name, momentum in saved(tmp_path, 3, "optimizer").items():
        if name.endswith("exp_avg"):
            groups = momentum.view(2, -1)
            assert not groups[0].any()
            carried = groups[1].norm() / before[name].view(2, -1)[0].norm()
            assert (0 < carried < 1) if "qvera_b" in name else carried == 0
        if name.endswith("exp_avg_sq"):
            assert torch.equal(*momentum.view(2, -1))
    assert counted(tmp_path, 4) == {4}
    then = saved(tmp_path, 3)
    for name, value in saved(tmp_path, 5).items():
        assert torch.equal(value.view(2, -1)[0], then[name].view(2, -1)[0])
        assert not torch.equal(value, then[name])


@pytest.mark.parametrize("after", [3, 4, 8], ids=["between two phases", "within one", "after the last step"])
def test_a_run_in_phases_is_resumed_to_the_bit(run: tuple[Any, Path], tmp_path: Path, after: int) -> None:
    recipe, whole = run
    again = cut_off(whole, tmp_path / "again", after=after)
    train(recipe, again, resume=True)
    assert losses(again) == losses(whole)
    assert same(vectors(again), vectors(whole))
    one, other = (json.loads((d / "run.json").read_text())["result"]["eval_after"]["loss"] for d in (whole, again))
    assert one == other, "scored with all phases"


def phase_delta(d: torch.Tensor, b: torch.Tensor, seed: int, n: int, m: int) -> torch.Tensor:
    """ΔW of a plain VeRA of that seed, in float64."""
    A, B = (torch.from_numpy(matrix).double() for matrix in uniform_pair(RANK, n, m, seed))
    return (6 / n) ** 0.5 * (6 / RANK) ** 0.5 * (b.unsqueeze(1) * B * d) @ A


def test_the_saved_adapter_is_the_sum_of_its_phases(run: tuple[Any, Path]) -> None:
    name, seeds = "base_model.model.model.layers.0.mlp.down_proj", [5, 6, 7]
    config = json.loads((run[1] / "adapter" / "adapter_config.json").read_text())
    assert (config["rank"], config["b_groups"], config["seed_chain"]) == (PHASES * RANK, PHASES, seeds)
    d, b = (vectors(run[1])[f"{name}.qvera_{kind}"].double() for kind in "db")
    wanted = sum(phase_delta(*own, 192, 64) for own in zip(d.split(RANK), b, seeds, strict=True))
    layer = load_adapter(small_llama(), run[1] / "adapter").get_submodule(name)
    assert relative(layer.delta_weight_fp32("default"), wanted) < 1e-5  # type: ignore[arg-type, operator]
    assert directory_facts(run[1] / "adapter")["seed_chain"] == seeds


def test_the_gradients_of_a_phase_are_those_of_its_own_vera() -> None:
    """With earlier phases as part of a dense base, in every gradient."""
    model = attach(small_llama(), AdapterSection(rank=RANK, seed=5), changes=in_phases(RANK, PHASES, 5))
    perturb(model)
    model.peft_config["default"].current_phase = 1
    layer = next(m for n, m in model.named_modules() if n.endswith("0.mlp.up_proj"))
    x, g = torch.randn(40, 64, requires_grad=True), torch.randn(40, 192)
    d, b = (getattr(layer, kind)["default"] for kind in ("qvera_d", "qvera_b"))
    (layer(x) * g).sum().backward()
    wide: Any = [one.detach().double().requires_grad_() for one in (x, d, b)]
    weight = layer.base_layer.weight.detach().double()
    weight = weight + phase_delta(d[:RANK].detach().double(), b[0].detach().double(), 5, 64, 192)
    weight = weight + phase_delta(wide[1][RANK : 2 * RANK], wide[2][1], 6, 64, 192)  # the third has not begun
    ((wide[0] @ weight.t()) * g.double()).sum().backward()
    for mine, wanted in zip((x, d, b), wide, strict=True):
        assert wanted.grad.norm() > 0
        assert relative(mine.grad, wanted.grad) < 1e-4
    assert not d.grad[:RANK].any()
    assert not b.grad[0].any()


def test_phases_export_to_an_exact_lora(run: tuple[Any, Path], tmp_path: Path, tiny_model_dir: Path) -> None:
    out = tmp_path / "lora"
    assert main(["export", str(run[1]), str(out), "--to", "lora", "--dtype", "float32"]) == 0
    base, other = (AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32) for _ in range(2))
    plain = logits(base)
    mine, theirs = logits(load_adapter(other, run[1] / "adapter")), logits(PeftModel.from_pretrained(base, str(out)))
    assert json.loads((out / "adapter_config.json").read_text())["r"] == PHASES * RANK
    assert (mine - plain).abs().max() > 1e-3
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_plan_is_that_of_the_last_phase_or_says_that_it_can_not_count_them(
    run: tuple[Any, Path], make_recipe: Any
) -> None:
    recipe, run_dir = run
    plan = make_plan(recipe, torch.device("cpu"))
    assert plan.trained_parameters == sum(tensor.numel() for tensor in vectors(run_dir).values())
    assert not plan.notes
    endless = make_recipe(adapter={"rank": RANK}, training={"resample_every": 3, "max_steps": -1})
    first, text = make_plan(endless, torch.device("cpu")), io.StringIO()
    assert first.trained_parameters < plan.trained_parameters
    assert first.to_dict()["first_phase_only"]
    print_plan(first, Console(file=text, width=200))
    assert "This is the first phase alone" in text.getvalue()


def test_what_helps_where_memory_ran_out_is_no_rank_of_all_phases(make_recipe: Any) -> None:
    """adapter.rank is that of one phase."""
    training = {"resample_every": 3, "max_steps": 9, "gradient_checkpointing": False}
    recipe = make_recipe(data={"max_length": 1024}, adapter={"rank": 64}, training=training)
    plan = make_plan(recipe, Machine("a GPU", "cuda", torch.bfloat16, False, 10**10))
    said = str(step_error("Step 1", Shortage(plan.needed_bytes, 0), [], plan, Group()))
    assert "--set data.max_length=" in said and "adapter.rank" not in said


def test_phases_are_refused_by_the_key_that_they_do_not_go_with(make_recipe: Any) -> None:
    for adapter, named in (({"magnitude": True}, "adapter.magnitude"), ({"method": "lora"}, "adapter.method lora")):
        recipe = make_recipe(adapter={"rank": RANK, **adapter}, training={"resample_every": 3})
        with pytest.raises(InputError, match=f"resample_every: phases are .*, not with {named}"):
            check_recipe(recipe)


def test_more_phases_than_an_adapter_has_room_for_are_refused(make_recipe: Any) -> None:
    recipe = make_recipe(adapter={"rank": 8192}, training={"resample_every": 1, "max_steps": 9})
    with pytest.raises(InputError, match="resample_every: 9 phases of rank 8,192 are one adapter of rank 73,728"):
        phase_count(recipe, 32)


def test_a_seed_chain_that_does_not_fit_is_refused() -> None:
    for chain in ([1, 2], [0, 1, 2], [0, -1]):
        with pytest.raises(InputError, match="seed_chain: takes the seeds of 2 phases"):
            QveraConfig(rank=8, b_groups=2, seed_chain=chain)


def moved_momentum(momentum: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Flora's: the momentum M [m, r] of a gradient G, kept as G P_oldᵀ, in another subspace: M' = (M P_old) P_newᵀ."""
    return momentum @ (old @ new.t())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_momentum_after_a_resample_is_the_authors(side: str) -> None:
    """In their second step M' = β moved(M) + (1 - β) P_new(update), with Adafactor's update."""
    stored = numbers_of(f"flora_{side}")
    root, beta, step = float(stored["rank"]) ** 0.5, stored["beta1"], 1
    row, column = stored["exp_avg_sq_row"][step], stored["exp_avg_sq_col"][step]
    update = stored["grad_decompressed"][step] / (row / row.mean()).sqrt().unsqueeze(1) / column.sqrt()
    before, after = stored["exp_avg"][0], stored["exp_avg"][step]
    old, new = stored["momentum_randn_old"][step] / root, stored["momentum_randn_new"][step] / root
    if side == "left":  # P [r, rows] G: its transpose is a projection from the right
        update, before, after = update.t(), before.t(), after.t()
    else:
        old, new = old.t(), new.t()
    moved = moved_momentum(before, old, new)
    torch.testing.assert_close(beta * moved + (1 - beta) * update @ new.t(), after, rtol=0, atol=1e-12)
    assert (moved - before).norm() > 0.1 * before.norm()


def test_little_of_the_momentum_of_b_comes_over() -> None:
    """The closed form is Flora's move along b's own direction of each row; of SmolLM2's linears it is some percent."""
    n, m, rank = 576, 32, 64
    old, new = (
        Factors(A=A, B=B, d=torch.rand(rank) + 0.1, scale=0.3)
        for A, B in (map(torch.from_numpy, uniform_pair(rank, n, m, seed)) for seed in (1, 2))
    )
    share = carried_share(old, new)
    for row in range(m):
        v, v_new = (f.scale * (f.B[row] * d) @ f.A for f, d in ((old, old.d), (new, new.d)) if d is not None)
        moved = moved_momentum(torch.ones(1, 1), (v / v.square().sum()).unsqueeze(0), v_new.unsqueeze(0))
        torch.testing.assert_close(share[row], moved[0, 0], rtol=1e-3, atol=1e-5)
    size = share.square().mean().sqrt()
    assert 0.2 * n**-0.5 < size < 5 * n**-0.5
    torch.testing.assert_close(carried_share(old, old), torch.ones(m))
