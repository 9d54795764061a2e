"""SpIEL in a model and in runs: which places it takes, its files, its exports, and that a run can be interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qvera.adapters.config import PREFIX
from qvera.adapters.methods import method_of
from qvera.adapters.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.cli.main import main
from qvera.config.sections import AdapterSection
from qvera.distributed.group import Group
from qvera.exporting.deltas import read_deltas
from qvera.lab import sparse
from qvera.lab.sparse import sampled_product
from qvera.lab.spiel import (
    PLACES,
    VALUES,
    AgedAdamW,
    Candidates,
    SparseSM3,
    by_accumulated_gradient,
    by_momentum,
    replace,
)
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.training.plan import make_plan
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import relative
from tests.conftest import small_llama
from tests.lab.authors import numbers_of
from tests.training.runs import cut_off, same, vectors

GROWTHS = {"accumulated-gradient": 2e-2, "momentum": 5e-2}
"""The ways of growth, with the rates that they learn with."""


def settings(growth: str, **training: Any) -> dict[str, Any]:
    """Places change after steps 2 and 6, and there is a checkpoint of step 5, in the middle of an accumulation."""
    return {
        "model": {"quantization": "nf4"},
        "adapter": {"method": "spiel", "rank": 2, "growth": growth, "reselect_every": 4, "accumulate_steps": 2},
        "training": {
            "max_steps": 7, "learning_rate": GROWTHS[growth], "save_steps": 5, "sample_count": 0, "weight_decay": 0.1,
            "save_total_limit": 9, **training,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each growth in a directory of its name."""
    directory = tmp_path_factory.mktemp("spiel")
    for growth in GROWTHS:
        train(make_recipe(**settings(growth)), directory / growth)
    return directory


@pytest.mark.parametrize("growth", GROWTHS)
def test_it_learns_and_its_places_move(growth: str, runs: Path) -> None:
    run, tensors = json.loads((runs / growth / "run.json").read_text()), vectors(runs / growth)
    assert run["result"]["eval_after"]["loss"] < 0.9 * run["result"]["eval_before"]["loss"]
    count = 2 * sum(2 * 128 + 2 * 96 + 3 * 256 for _ in range(2))  # rank (in + out) of each linear
    assert run["adapter"]["trainable_parameters"] == count
    assert sum(t.numel() for name, t in tensors.items() if name.endswith(VALUES)) == count
    early = load_file(runs / growth / "checkpoints" / "step-00000005" / "vectors.safetensors")
    for name in (n for n in tensors if n.endswith(PLACES)):
        assert tensors[name].dtype == torch.int32
        assert (tensors[name].diff() > 0).all()
        assert not torch.equal(early[name], tensors[name]), name


@pytest.mark.parametrize("growth", GROWTHS)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    growth: str, runs: Path, make_recipe: Any, tmp_path: Path
) -> None:
    copy = cut_off(runs / growth, tmp_path / "run", after=5)
    train(make_recipe(**settings(growth)), copy, resume=True)
    assert same(vectors(copy), vectors(runs / growth))


def test_checkpointing_changes_no_bit(runs: Path, make_recipe: Any, tmp_path: Path) -> None:
    train(make_recipe(**settings("accumulated-gradient", gradient_checkpointing=True)), tmp_path)
    assert same(vectors(tmp_path), vectors(runs / "accumulated-gradient"))


@pytest.mark.parametrize(("steps", "moved"), [(4, 0.25), (2, 0.0)])
def test_an_adapter_that_is_trained_further_keeps_its_places(
    steps: int, moved: float, runs: Path, make_recipe: Any, tmp_path: Path
) -> None:
    """A change after step 2 drops half of the values times the share of steps that are left; after the last step none.

    Not more than these move; fewer, where a dropped place is among the best candidates and stays.
    """
    first = runs / "momentum"
    tree = settings("accumulated-gradient", max_steps=steps, save_steps=100)
    tree["adapter"] |= {"init_from": str(first / "adapter"), "drop_share": 0.5}
    train(make_recipe(**tree), tmp_path)
    before, after = vectors(first), vectors(tmp_path)
    for name in (n for n in before if n.endswith(PLACES)):
        kept = torch.isin(after[name], before[name]).float().mean()
        assert 1 - moved <= kept <= 1 - moved / 2, name


def test_it_grows_where_the_dense_gradient_is_largest(make_recipe: Any) -> None:
    """Against gradients of the dense weights, by autograd; the rate is zero, so that they are the base's."""
    recipe = make_recipe(
        adapter={"method": "spiel", "rank": 2, "accumulate_steps": 2},
        training={"learning_rate": 1e-30, "adam_beta1": 0.8},
    )
    dense, model = small_llama(), attach(small_llama(), recipe.adapter)
    before = {name: tensor.clone() for name, tensor in named_vectors(model).items()}
    method = method_of(recipe.adapter)
    optimizer = method.optimizer(model, recipe)
    assert optimizer is not None
    hook = method.step_hook(model, recipe, optimizer, 10, Group())
    assert hook is not None
    first: dict[str, torch.Tensor] = {}
    steps: list[dict[str, torch.Tensor]] = []
    weights = {name: m.weight for name, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}
    for step in (1, 2):
        hook.before_step(step)
        for micro in range(3):
            ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(10 * step + micro))
            for one in (model, dense):
                one(ids, labels=ids).loss.backward()
            first = first or {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
        steps.append({name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None})
        dense.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        hook.after_step(step)
    grown = named_vectors(model)
    assert len(grown) == 28
    for key, places in grown.items():
        if not key.endswith(PLACES):
            continue
        name, values = key.removeprefix(PREFIX).removesuffix(f".{PLACES}"), grown[key.replace(PLACES, VALUES)]
        expected = first[name].flatten().abs().topk(len(places)).indices.sort().values
        assert torch.equal(places.long(), expected), name
        mean = (steps[0][name] + steps[1][name]).flatten()[expected] / 2
        square = (steps[0][name].square() + steps[1][name].square()).flatten()[expected] / 2
        state, new = optimizer.state[values], ~torch.isin(places, before[key])  # one that was there goes on
        assert new.sum() > len(new) // 2
        torch.testing.assert_close(state["exp_avg"][new] / (1 - 0.8**2), mean[new], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(state["exp_avg_sq"][new] / (1 - 0.999**2), square[new], rtol=1e-3, atol=1e-9)
        assert values.abs().max() < 1e-20
        assert (state["age"] == 2).all()


def test_float16_gradients_are_divided_by_the_loss_scale(make_recipe: Any, tmp_path: Path) -> None:
    norms = []
    for dtype in ("float32", "float16"):
        scale = {"initial_scale_power": 12} if dtype == "float16" else {}
        keys = settings("accumulated-gradient", max_steps=2, save_steps=2, **scale)
        keys["model"]["compute_dtype"] = dtype
        train(make_recipe(**keys), tmp_path / dtype)
        state = load_file(tmp_path / dtype / "checkpoints" / "step-00000002" / "optimizer.safetensors")
        norms.append(torch.stack([t.norm() for name, t in sorted(state.items()) if name.endswith("exp_avg")]))
    assert relative(norms[1], norms[0]) < 0.02


def test_its_export_is_the_weight_with_its_values_added_at_their_places(
    runs: Path, make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged = runs / "momentum", tmp_path / "merged"
    assert main(["export", str(run), str(merged), "--base", "original", "--dtype", "float32", "--no-compare"]) == 0
    found, tensors = load_file(merged / "model.safetensors"), vectors(run)
    base = load_base(make_recipe(model={"quantization": "none"}).model).model
    for key in (n for n in tensors if n.endswith(PLACES)):
        name = key.removeprefix(PREFIX).removesuffix(f".{PLACES}")
        expected = base.get_submodule(name).weight.detach().clone()
        expected.view(-1)[tensors[key].long()] += tensors[key.replace(PLACES, VALUES)]
        assert torch.equal(found[f"{name}.weight"], expected), name
    for to in ("lora", "peft"):
        assert main(["export", str(run), str(tmp_path / to), "--to", to]) == 2
        assert to == "peft" or "No LoRA is the same" in capsys.readouterr().err
        assert not (tmp_path / to).exists()
    assert main(["merge-adapters", str(run), str(run), str(tmp_path / "sum"), "--to", "qvera"]) == 2
    assert capsys.readouterr().err.endswith("the method spiel has no vectors d and b.\n")


DAMAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "unsorted": lambda places: places.flip(0),
    "twice": lambda places: places.index_copy(0, torch.tensor([3]), places[2:3]),
    "beyond": lambda places: places.index_fill(0, torch.tensor([len(places) - 1]), 64 * 64),
    "negative": lambda places: places.index_fill(0, torch.tensor([0]), -1),
    "long": lambda places: places.long(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_places_are_refused(
    damage: Callable[[torch.Tensor], torch.Tensor], make_recipe: Any, tmp_path: Path
) -> None:
    save_adapter(attach(small_llama(), AdapterSection(method="spiel", rank=2)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(f"q_proj.{PLACES}"))
    save_file({**tensors, name: damage(tensors[name]).contiguous()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=PLACES):
        load_adapter(small_llama(), tmp_path)
    with pytest.raises(InputError, match=PLACES):
        read_deltas(tmp_path, empty_model(make_recipe().model))


def test_a_rank_with_more_values_than_half_of_a_weight_is_refused(make_recipe: Any) -> None:
    with pytest.raises(InputError, match="adapter.rank: 30 gives"):
        make_plan(make_recipe(adapter={"method": "spiel", "rank": 30}), torch.device("cpu"))


class Authors:
    """Their numbers in double precision, with what belongs to the values sorted by place, as ours are."""

    def __init__(self, name: str) -> None:
        self.raw = numbers_of(name)

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
            slots, new, _ = by_accumulated_gradient(indices, values, share, candidates.indices, candidates.total)
            assert set(indices[slots].tolist()) == set(theirs.raw[prefix + "dropped"].tolist())
            assert set(new.tolist()) == set(theirs.raw[prefix + "grown"].tolist())
            replace(indices, values, slots, new)
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
            slots, new = by_momentum(indices, values, theirs.number(prefix + "p"), state["row"], state["column"])
            assert set(indices[slots].tolist()) == set(theirs.raw[prefix + "dropped"].tolist())
            assert set(new.tolist()) == set(theirs.raw[prefix + "grown"].tolist())
            replace(indices, values, slots, new)
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
    optimizers[0].take_over(grown, torch.arange(3), order, gradient.clone(), gradient.square(), steps=5)
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
    slots, new, chosen = by_accumulated_gradient(indices, values, 0.5, candidates, total)
    assert (slots.tolist(), new.tolist(), candidates[chosen].tolist()) == ([3], [17], [17])
    order = replace(indices, values, slots, new)
    assert (indices.tolist(), order.tolist()) == ([4, 9, 13, 17], [0, 1, 2, 3])
    assert values.tolist() == pytest.approx([3.0, 0.1, -2.0, 0.0])
    adam.take_over(values, slots, order, total[chosen] / 5, torch.ones(1), 5)
    sm3.take_over(values, slots, order)
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
