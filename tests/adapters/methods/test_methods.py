"""What holds for every method of adaptation (`cases.CASES`): its start, counts, gradients, files, resume and exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qvera.adapters import QveraLinear
from qvera.adapters.methods import method_of
from qvera.adapters.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.cli.main import main
from qvera.config.schema import Recipe, load_recipe, parse_recipe
from qvera.config.sections import AdapterSection
from qvera.exporting.deltas import read_deltas
from qvera.models import lean_layers
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.training.trainer import train
from tests.adapters.helpers import IDS, SHAPES, dense_weight, logits, on_meta, perturb, relative, trainable
from tests.adapters.methods.cases import CASES, Case

TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}


def recipe_of(case: Case, model_dir: Path, rows: Path, output_dir: Path, **training: Any) -> Recipe:
    tree = {
        "model": {"path": str(model_dir), "compute_dtype": "float32"},
        "data": {"path": str(rows), "eval_fraction": 0.2, "max_length": 64},
        "adapter": case.adapter,
        "training": {
            "output_dir": str(output_dir), "max_steps": 4, "global_batch_size": 8, "save_steps": 2, "sample_count": 0,
            "learning_rate": case.learning_rate, "report_to": [], **training,
        },
    }  # fmt: skip
    return parse_recipe(tree, "a test")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def run_dir(case: Case, tiny_model_dir: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps over the tiny model in NF4."""
    run = tmp_path_factory.mktemp("method") / "run"
    train(recipe_of(case, tiny_model_dir, tiny_rows, run), run)
    return run


def base_of(run: Path) -> Any:
    return load_base(load_recipe(run / "recipe.yaml").model)


@pytest.fixture(scope="module")
def loaded(run_dir: Path) -> Any:
    """The run's adapter on its base."""
    return load_adapter(base_of(run_dir).model, run_dir / "adapter")


@pytest.fixture(scope="module")
def run_logits(loaded: Any) -> torch.Tensor:
    return logits(loaded)


def fresh(case: Case, model_dir: Path, **model: Any) -> PeftModel:
    section = parse_recipe({"model": {"path": str(model_dir), **model}, "data": {"path": "x"}}, "a test").model
    return attach(load_base(section).model, AdapterSection(**case.adapter))


def test_a_fresh_adapter_leaves_the_logits_as_they_are(case: Case, tiny_model_dir: Path) -> None:
    model = fresh(case, tiny_model_dir, compute_dtype="float32")
    with model.disable_adapter():
        without = logits(model)
    assert torch.equal(logits(model), without) == case.starts_at_base
    assert not torch.equal(logits(perturb(model)), without)


def test_the_count_on_a_7b_is_the_formulas(case: Case) -> None:
    one, two = (
        trainable(attach(on_meta("LLaMA-7B", num_hidden_layers=layers), AdapterSection(**case.on_7b)))
        for layers in (1, 2)
    )
    assert one + (SHAPES["LLaMA-7B"]["num_hidden_layers"] - 1) * (two - one) == case.trained_on_7b


WAYS = [("nf4", "float32"), ("int8", "bfloat16"), ("nf4", "bfloat16"), ("none", "float16"), ("fp4", "bfloat16")]


@pytest.mark.parametrize(
    ("name", "quantization", "dtype"),
    [(name, *WAYS[(2 * i + j) % 5]) for i, name in enumerate(CASES) for j in range(2)],  # two ways each
)
def test_outputs_and_gradients_are_those_of_the_dense_equation(
    name: str, quantization: str, dtype: str, tiny_model_dir: Path
) -> None:
    case = CASES[name]
    model = perturb(fresh(case, tiny_model_dir, quantization=quantization, compute_dtype=dtype))
    compute, limit = getattr(torch, dtype), TOLERANCE[dtype]
    layers = {m.spec.name: m for m in model.modules() if isinstance(m, QveraLinear)}
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):  # grouped keys; wide and narrow
        layer = layers[name].train()
        model.zero_grad()
        torch.manual_seed(3)
        x = torch.randn(2, 5, layer.in_features).to(compute).requires_grad_()
        upstream = torch.randn(2, 5, layer.out_features).to(compute)
        y = layer(x)
        y.backward(upstream)
        held, tensors = layer.pair("default"), layer.tensors("default")
        own = {n: v.detach().double().requires_grad_(v.is_floating_point()) for n, v in tensors.items()}
        pair: tuple[Any, Any] = (None, None) if held is None else (held[0].double(), held[1].double())
        wide = x.detach().double().requires_grad_()
        reference = wide @ case.weight(dense_weight(layer.base_layer), own, *pair, name).t()
        if layer.base_layer.bias is not None:
            reference = reference + layer.base_layer.bias.double()
        reference.backward(upstream.double())
        assert relative(y, reference) < limit, name
        assert relative(x.grad, wide.grad) < limit, name
        for kind, vector in tensors.items():
            if vector.requires_grad and own[kind].grad is not None:
                assert relative(vector.grad, own[kind].grad) < limit, (name, kind)
            else:
                assert vector.grad is None


def test_checkpointed_gradients_are_the_same(case: Case, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In long rows the MLP goes by tiles, also where its linears share their tensors with others."""
    for name, value in (("TILED_ABOVE_TOKENS", 4), ("_TILE_TOKENS", 4), ("_MULTIPLE", 1)):
        monkeypatch.setattr(lean_layers, name, value)
    model, found = perturb(fresh(case, tiny_model_dir, compute_dtype="float32")).train(), []
    for by_tiles in (None, False, True):
        if by_tiles is not None:
            enable_checkpointing(model, by_tiles=by_tiles)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: vector.grad for name, vector in named_vectors(model).items() if vector.requires_grad})
    for name, grad in found[0].items():
        for other in found[1:]:
            assert relative(other[name], grad) < 5e-4, name  # fp32 sums of tiles, in another order


def test_it_learns_and_says_its_name(case: Case, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = json.loads((run_dir / "run.json").read_text())
    assert run["result"]["eval_after"]["loss"] < run["result"]["eval_before"]["loss"]
    name = case.adapter.get("method", "vera")
    assert run["adapter"]["method"] == name
    assert main(["info", str(run_dir), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["method"] == name
    assert info["adapted_modules"] == run["adapter"]["adapted_modules"]
    assert info["trained_parameters"] == run["adapter"]["trainable_parameters"]
    title = method_of(AdapterSection(**case.adapter)).title or name
    assert f"{title} of rank {case.adapter['rank']} " in (run_dir / "report.html").read_text(encoding="utf-8")


def test_the_file_holds_the_tensors_and_nothing_else(case: Case, run_dir: Path, loaded: Any) -> None:
    run, tensors = json.loads((run_dir / "run.json").read_text()), named_vectors(loaded)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    names = sum(len(name) + 80 for name in tensors)  # in the header: name, dtype, shape, places
    assert size < run["adapter"]["file_bytes"] < size + names + 4500
    if not case.planned_exactly:
        assert run["plan"]["trained_numbers"] > run["adapter"]["trainable_parameters"]
        return
    assert run["plan"]["adapter_bytes"] == pytest.approx(run["adapter"]["file_bytes"], abs=400)
    assert run["plan"]["trained_numbers"] == run["adapter"]["trainable_parameters"]


def test_what_is_saved_is_loaded_to_the_bit(loaded: Any, run_dir: Path, tmp_path: Path) -> None:
    save_adapter(loaded, tmp_path / "again")
    one, other = (load_file(d / "adapter_model.safetensors") for d in (run_dir / "adapter", tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


STATEFUL = ("lora-sb", "lorta")  # a start of its own, shared tensors; test_trainer.py and test_spiel.py have others


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=() if n in STATEFUL else pytest.mark.slow) for n in CASES], indirect=True
)
def test_a_resumed_run_is_the_same_to_the_bit(
    case: Case, run_dir: Path, tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(next((tmp_path / "run" / "checkpoints").glob("*4")))
    train(recipe_of(case, tiny_model_dir, tiny_rows, run_dir), tmp_path / "run", resume=True)
    one, other = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (run_dir, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_merged_export_has_the_runs_logits(run_dir: Path, run_logits: torch.Tensor, tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--base", "dequantized", "--no-compare"]
    assert main(["export", str(run_dir), str(tmp_path / "merged"), *options]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), run_logits, rtol=1e-4, atol=1e-4)


def test_the_lora_export_is_exact_or_refused(
    case: Case, run_dir: Path, run_logits: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = main(["export", str(run_dir), str(tmp_path / "lora"), "--to", "lora", "--dtype", "float32"])
    if not case.as_lora:
        assert done == 2
        assert "--to merged" in capsys.readouterr().err
        return
    assert done == 0
    lora = PeftModel.from_pretrained(base_of(run_dir).model, tmp_path / "lora")
    torch.testing.assert_close(logits(lora), run_logits, rtol=1e-4, atol=1e-4)


def test_rows_of_a_batch_take_their_own_adapters(run_dir: Path, run_logits: torch.Tensor, tmp_path: Path) -> None:
    other = perturb(load_adapter(base_of(run_dir).model, run_dir / "adapter"))
    with other.disable_adapter():
        base = logits(other)[1]
    save_adapter(other, tmp_path / "other")
    both = load_adapters(base_of(run_dir).model, {"one": run_dir / "adapter", "other": tmp_path / "other"})
    torch.testing.assert_close(logits(both, adapter_names=["one", "__base__"]), torch.stack([run_logits[0], base]))
    mixed = logits(both, adapter_names=["other", "one"])
    torch.testing.assert_close(mixed, torch.stack([logits(other)[0], run_logits[1]]))


def test_the_factors_of_a_file_are_those_of_the_layer(loaded: Any, run_dir: Path) -> None:
    section = load_recipe(run_dir / "recipe.yaml").model
    deltas = read_deltas(run_dir / "adapter", empty_model(section)).layers
    layers = {m.spec.name: m for m in loaded.modules() if isinstance(m, QveraLinear)}
    assert deltas.keys() == layers.keys()
    for name, delta in deltas.items():
        weight = dense_weight(layers[name].base_layer).float()
        torch.testing.assert_close(delta.rows(weight=weight), layers[name].delta_weight_fp32("default"))
        torch.testing.assert_close(delta.rows(3, 5, weight[3:8]), delta.rows(weight=weight)[3:8])
