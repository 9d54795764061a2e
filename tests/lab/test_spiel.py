"""SpIEL in a model and in runs: which places it takes, its files, its exports, and that a run can be interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qvera.adapters.config import PREFIX
from qvera.adapters.files.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.adapters.methods import method_of
from qvera.cli.main import main
from qvera.config.schema import AdapterSection
from qvera.distributed.group import Group
from qvera.exporting.deltas import read_deltas
from qvera.lab.spiel import PLACES, VALUES
from qvera.models.loader import load_base
from qvera.models.model_config import empty_model
from qvera.training.plan import make_plan
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import relative
from tests.conftest import small_llama

IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3], [8, 8, 30, 1, 99, 4, 250, 6]])
GROWTHS = ["accumulated-gradient", "momentum"]
RATES = {"accumulated-gradient": 2e-2, "momentum": 5e-2}


def settings(growth: str, run_dir: Path, **training: Any) -> dict[str, Any]:
    """Places change after steps 2, 6, 10, .. and checkpoints are of steps 5 and 10, in the middle of an accumulation."""
    return {
        "model": {"quantization": "nf4"},
        "adapter": {"method": "spiel", "rank": 2, "growth": growth, "reselect_every": 4, "accumulate_steps": 2},
        "training": {
            "output_dir": str(run_dir), "max_steps": 10, "learning_rate": RATES[growth], "save_steps": 5,
            "sample_count": 0, "weight_decay": 0.1, **training,
        },
    }  # fmt: skip


@pytest.fixture(scope="module", params=GROWTHS)
def run_dir(request: Any, make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("spiel") / "run"
    assert train(make_recipe(**settings(request.param, directory)), directory) is not None
    return directory


def test_it_learns_and_its_places_move(run_dir: Path) -> None:
    run = json.loads((run_dir / "run.json").read_text())
    assert run["result"]["eval_after"]["loss"] < 0.8 * run["result"]["eval_before"]["loss"]
    tensors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    count = 2 * sum(2 * 128 + 2 * 96 + 3 * 256 for _ in range(2))  # rank (in + out) of each linear
    assert run["adapter"]["trainable_parameters"] == count
    assert sum(t.numel() for name, t in tensors.items() if name.endswith(VALUES)) == count
    assert run["adapter"]["file_bytes"] == pytest.approx(8 * count, rel=0.3)  # and names
    assert run["plan"]["adapter_bytes"] == pytest.approx(run["adapter"]["file_bytes"], abs=400)
    early = load_file(run_dir / "checkpoints" / "step-00000005" / "vectors.safetensors")
    for name in (n for n in tensors if n.endswith(PLACES)):
        assert tensors[name].dtype == torch.int32
        assert (tensors[name].diff() > 0).all()
        assert not torch.equal(early[name], tensors[name]), name


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(run_dir: Path, make_recipe: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "step-00000010")
    shutil.rmtree(copy / "adapter")
    growth = json.loads((copy / "checkpoints" / "step-00000005" / "state.json").read_text())["recipe"]["adapter"][
        "growth"
    ]
    train(make_recipe(**settings(growth, copy)), copy, resume=True)
    expected = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(copy / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("steps", "moved"), [(4, 0.25), (2, 0.0)])
def test_an_adapter_that_is_trained_further_keeps_its_places(
    steps: int, moved: float, run_dir: Path, make_recipe: Any, tmp_path: Path
) -> None:
    """A change after step 2 drops half of the values times the share of steps that are left; after the last step none.

    Not more than these move; fewer, where a dropped place is among the best candidates and stays.
    """
    tree = settings(GROWTHS[0], tmp_path / "further", max_steps=steps, save_steps=100)
    tree["adapter"] |= {"init_from": str(run_dir / "adapter"), "drop_share": 0.5}
    train(make_recipe(**tree), tmp_path / "further")
    before, after = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (run_dir, tmp_path / "further"))
    for name in (n for n in before if n.endswith(PLACES)):
        kept = torch.isin(after[name], before[name]).float().mean()
        assert 1 - moved <= kept <= 1 - moved / 2, name


def test_checkpointing_changes_no_bit(make_recipe: Any, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        directory = tmp_path / str(checkpointing)
        keys = settings(GROWTHS[0], directory, max_steps=3, gradient_checkpointing=checkpointing)
        train(make_recipe(**keys), directory)
        found.append(load_file(directory / "adapter" / "adapter_model.safetensors"))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


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
    vectors = named_vectors(model)
    assert len(vectors) == 28
    for key, places in vectors.items():
        if not key.endswith(PLACES):
            continue
        name, values = key.removeprefix(PREFIX).removesuffix(f".{PLACES}"), vectors[key.replace(PLACES, VALUES)]
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
        keys = settings(GROWTHS[0], tmp_path / dtype, max_steps=2, save_steps=2, **scale)
        keys["model"]["compute_dtype"] = dtype
        train(make_recipe(**keys), tmp_path / dtype)
        state = load_file(tmp_path / dtype / "checkpoints" / "step-00000002" / "optimizer.safetensors")
        norms.append(torch.stack([t.norm() for name, t in sorted(state.items()) if name.endswith("exp_avg")]))
    assert relative(norms[1], norms[0]) < 0.02


def test_exports(run_dir: Path, make_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = make_recipe(model={"quantization": "nf4"}).model
    base = load_base(section.replace(quantization="none")).model
    weights = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    deltas = read_deltas(run_dir / "adapter", empty_model(section))
    merged = tmp_path / "merged"
    assert main(["export", str(run_dir), str(merged), "--base", "original", "--dtype", "float32"]) == 0
    found = load_file(merged / "model.safetensors")
    vectors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    for name in deltas.layers:
        expected = weights[f"{name}.weight"].clone()
        places = vectors[f"{PREFIX}{name}.{PLACES}"].long()
        expected.view(-1)[places] += vectors[f"{PREFIX}{name}.{VALUES}"]
        assert torch.equal(found[f"{name}.weight"], expected), name
    assert main(["export", str(run_dir), str(tmp_path / "lora"), "--to", "lora"]) == 2
    assert "No LoRA is the same" in capsys.readouterr().err
    assert main(["export", str(run_dir), str(tmp_path / "peft"), "--to", "peft"]) == 2
    assert not (tmp_path / "lora").exists()


def test_info(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run_dir)]) == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert (said["method"], said["rank"]) == ("spiel", "2")


def test_merging_into_the_live_model_and_back(run_dir: Path, make_recipe: Any) -> None:
    section = make_recipe(model={"quantization": "none"}).model
    model = load_adapter(load_base(section).model, run_dir / "adapter")
    with torch.no_grad():
        wanted = model(IDS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize("damage", ["unsorted", "twice", "beyond", "negative", "floats", "long"])
def test_damaged_places_are_refused(damage: str, make_recipe: Any, tmp_path: Path) -> None:
    save_adapter(attach(small_llama(), AdapterSection(method="spiel", rank=2)), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(f"q_proj.{PLACES}"))
    places = tensors[name]
    if damage == "unsorted":
        tensors[name] = places.flip(0).clone()
    elif damage == "twice":
        places[3] = places[2]
    elif damage in ("beyond", "negative"):
        places[-1 if damage == "beyond" else 0] = 64 * 64 if damage == "beyond" else -1
    else:
        tensors[name] = places.float() if damage == "floats" else places.long()
    save_file(tensors, file, {"format": "pt"})
    section = make_recipe().model
    with pytest.raises(InputError, match=PLACES):
        load_adapter(small_llama(), tmp_path / "adapter")
    with pytest.raises(InputError, match=PLACES):
        read_deltas(tmp_path / "adapter", empty_model(section))


@pytest.mark.parametrize(
    ("section", "keys", "named"),
    [
        ("training", {"optim": "adamw_8bit"}, "training.optim"),
        ("training", {"torch_compile": True}, "training.torch_compile"),
        ("deepspeed", "zero2", "deepspeed: is zero2, .* Remove deepspeed, or choose another method"),
        ("adapter", {"rank": 30}, "adapter.rank"),
        ("adapter", {"accumulate_steps": 5}, "accumulate_steps"),
    ],
)
def test_what_does_not_go_together_is_refused_by_its_key(
    section: str, keys: Any, named: str, make_recipe: Any, tmp_path: Path
) -> None:
    tree = settings(GROWTHS[0], tmp_path / "run")
    if isinstance(keys, dict):
        tree[section] |= keys
    with pytest.raises(InputError, match=named):
        recipe = make_recipe(**tree)
        make_plan(recipe if isinstance(keys, dict) else recipe.replace(**{section: keys}), torch.device("cpu"))
