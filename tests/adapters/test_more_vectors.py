"""Adapters with more than one b a linear and with a vector on the input: a whole run, and what becomes of its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qvera.adapters import QveraConfig, QveraLinear, register
from qvera.adapters.files.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.cli.main import main
from qvera.config.schema import AdapterSection, parse_recipe
from qvera.exporting.deltas import read_deltas
from qvera.exporting.merge_adapters import same_directions
from qvera.models.loader import load_base
from qvera.models.model_config import empty_model
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.adapters.helpers import perturb, relative
from tests.conftest import small_llama

MORE: dict[str, Any] = {"rank": 8, "b_groups": 2, "input_scale": True}
IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3], [8, 8, 30, 1, 99, 4, 250, 6]])


@pytest.fixture(scope="module")
def run_dir(tiny_model_dir: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("more") / "run"
    assert train(recipe(tiny_model_dir, tiny_rows), directory) is not None
    return directory


def recipe(model: Path, rows: Path, **training: Any) -> Any:
    tree = {
        "model": {"path": str(model), "compute_dtype": "float32"},
        "data": {"path": str(rows), "eval_fraction": 0.2, "max_length": 64},
        "adapter": MORE,
        "training": {
            "max_steps": 30, "global_batch_size": 8, "learning_rate": 5e-2, "save_steps": 15, "sample_count": 0,
            "report_to": [], **training,
        },
    }  # fmt: skip
    return parse_recipe(tree, "a test")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_it_learns_and_every_vector_is_trained(run_dir: Path) -> None:
    run = json.loads((run_dir / "run.json").read_text())
    assert run["result"]["eval_after"]["loss"] < 0.7 * run["result"]["eval_before"]["loss"]
    facts = run["adapter"]
    assert (facts["rank"], facts["b_groups"], facts["input_scale"]) == (8, 2, True)
    vectors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, vector in vectors.items():
        shapes.setdefault(name.rpartition(".")[2], set()).add(tuple(vector.shape))
        start = {"qvera_b": 0.0, "qvera_d": 0.1, "qvera_a": 1.0}[name.rpartition(".")[2]]
        assert vector.dtype == torch.float32 and (vector != start).float().mean() > 0.9, name
    # tiny-llama: hidden 64, 4 heads and 2 key-value heads of 16, inside 192
    assert shapes == {"qvera_b": {(2, 64), (2, 32), (2, 192)}, "qvera_d": {(8,)}, "qvera_a": {(64,), (192,)}}
    assert len(vectors) == 3 * 14
    assert facts["trainable_parameters"] == sum(v.numel() for v in vectors.values())
    # a plan is made from the same shapes
    assert facts["file_bytes"] == pytest.approx(run["plan"]["adapter_bytes"], abs=400)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    run_dir: Path, tiny_model_dir: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "adapter")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000030")
    assert train(recipe(tiny_model_dir, tiny_rows), tmp_path / "again", resume=True) is not None
    one, other = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (run_dir, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_exports_give_the_trained_models_logits(run_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    trained = load_adapter(load_base(recipe(tiny_model_dir, Path("-")).model).model, run_dir / "adapter")
    wanted = logits(trained)
    base = load_base(recipe(tiny_model_dir, Path("-")).model).model
    assert (logits(base) - wanted).abs().max() > 0.5
    assert main(["export", str(run_dir), str(tmp_path / "lora"), "--to", "lora", "--dtype", "float32"]) == 0
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "lora")), wanted, rtol=1e-4, atol=1e-4)
    command = ["export", str(run_dir), str(tmp_path / "merged"), "--base", "dequantized", "--dtype", "float32"]
    assert main(command) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-4)


def test_info_says_what_it_consists_of(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run_dir)]) == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert (said["rank"], said["b_groups"], said["input_scale"]) == ("8", "2", "yes")


def test_stock_peft_reads_it_by_its_own_way_in(run_dir: Path, tiny_model_dir: Path) -> None:
    register()
    made = recipe(tiny_model_dir, Path("-"))
    wanted = logits(load_adapter(load_base(made.model).model, run_dir / "adapter"))
    assert torch.equal(logits(PeftModel.from_pretrained(load_base(made.model).model, run_dir / "adapter")), wanted)


def test_merge_and_unload_and_deleting(run_dir: Path, tiny_model_dir: Path) -> None:
    made = recipe(tiny_model_dir, Path("-"))
    model = load_adapter(load_base(made.model.replace(quantization="none")).model, run_dir / "adapter")
    wanted = logits(model)
    layers = [m for m in model.modules() if isinstance(m, QveraLinear)]
    model.add_adapter("other", QveraConfig(rank=4, input_scale=True))
    assert all({n for n in ("default", "other") if m.carries(n)} == {"default", "other"} for m in layers)
    model.delete_adapter("other")
    assert not any(m.carries("other") for m in layers)
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted, rtol=1e-4, atol=1e-4)


def test_the_format_says_the_oldest_reader_that_can_read_it() -> None:
    assert QveraConfig(rank=8).format_version == 1
    assert QveraConfig(rank=8, b_groups=2).format_version == 2
    assert QveraConfig(rank=8, input_scale=True).format_version == 2


def test_starting_from_another_kind_is_refused(run_dir: Path, tiny_model_dir: Path) -> None:
    model = load_base(recipe(tiny_model_dir, Path("-")).model).model
    for key, value in (("b_groups", 1), ("input_scale", False)):
        section = AdapterSection(**{**MORE, key: value}, init_from=str(run_dir / "adapter"))
        with pytest.raises(InputError, match=rf"adapter.init_from: .* has {key}"):
            attach(model, section)
    attached = attach(model, AdapterSection(**MORE, init_from=str(run_dir / "adapter")))
    wanted = logits(load_adapter(load_base(recipe(tiny_model_dir, Path("-")).model).model, run_dir / "adapter"))
    assert torch.equal(logits(attached), wanted)


def test_a_vector_that_the_config_does_not_speak_of_is_refused(
    run_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "input_scale": False}))
    model = load_base(recipe(tiny_model_dir, Path("-")).model).model
    with pytest.raises(InputError, match="qvera_a"):
        load_adapters(model, {"it": tmp_path / "adapter"})
    with pytest.raises(InputError, match="qvera_a"):
        load_adapter(load_base(recipe(tiny_model_dir, Path("-")).model).model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("key", "value"), [("input_scale", "false"), ("input_scale", None), ("b_groups", True), ("b_groups", 3)]
)
def test_a_config_of_another_type_is_refused_by_its_key(
    key: str, value: Any, run_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(InputError, match=f"adapter_config.json: {key}: "):
        load_adapter(load_base(recipe(tiny_model_dir, Path("-")).model).model, tmp_path / "adapter")


def test_stock_vera_to_start_from_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    stock = get_peft_model(small_llama(), VeraConfig(r=8, target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path / "vera")
    model = load_base(recipe(tiny_model_dir, Path("-")).model).model
    with pytest.raises(InputError, match="adapter.init_from: .*PEFT's own VeRA"):
        attach(model, AdapterSection(rank=8, targets=["q_proj"], init_from=str(tmp_path / "vera")))


def test_sums_where_d_and_a_agree(run_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir / "adapter", tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    vectors = {k: v * -0.5 if k.endswith("qvera_b") else v for k, v in load_file(file).items()}
    save_file(vectors, file, {"format": "pt"})
    made = recipe(tiny_model_dir, Path("-"))
    one, other = (read_deltas(d, empty_model(made.model)) for d in (run_dir / "adapter", tmp_path / "other"))
    assert main(["merge-adapters", str(run_dir / "adapter"), str(tmp_path / "other"), str(tmp_path / "sum")]) == 0
    found = read_deltas(tmp_path / "sum", empty_model(made.model))
    for name, delta in found.layers.items():
        wanted = 0.5 * one.layers[name].rows() + 0.5 * other.layers[name].rows()
        torch.testing.assert_close(delta.rows(), wanted, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(delta.rows(3, 7), delta.rows()[3:10], rtol=1e-5, atol=1e-7)
    save_file({k: v + 0.1 if k.endswith("qvera_a") else v for k, v in vectors.items()}, file, {"format": "pt"})
    assert "they differ in a (first at" in str(
        same_directions([one, read_deltas(tmp_path / "other", empty_model(made.model))])
    )


def test_vectors_cast_to_sixteen_bits_train(tiny_model_dir: Path) -> None:
    """TRL's SFTTrainer does that on a 4-bit base."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = attach(load_base(recipe(tiny_model_dir, Path("-")).model).model, AdapterSection(**MORE))
        perturb(model)
        for vector in named_vectors(model).values():
            vector.data = vector.data.to(dtype)
        model(IDS.repeat(1, 20)).logits.square().mean().backward()
        found.append({name: vector.grad for name, vector in named_vectors(model).items()})
    for name, exact in found[0].items():
        assert (
            exact is not None and found[1][name].dtype == torch.bfloat16 and relative(found[1][name], exact) < 0.05
        ), name


def test_a_frozen_d_stays_frozen_in_a_file_and_when_the_adapter_is_chosen_again(tmp_path: Path) -> None:
    model = attach(small_llama(), AdapterSection(rank=4, train_d=False))
    model.set_adapter("default")
    save_adapter(model, tmp_path / "a")
    register()
    read = PeftModel.from_pretrained(small_llama(), str(tmp_path / "a"), is_trainable=True)
    for one in (model, read):
        trained = {name.rpartition(".")[2] for name, vector in named_vectors(one).items() if vector.requires_grad}
        assert trained == {"qvera_b"}


@pytest.mark.parametrize("damage", ["no a", "short a", "flat b"])
def test_a_file_without_what_its_config_says_is_refused(
    damage: str, run_dir: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    vectors = load_file(file)
    name = next(k for k in sorted(vectors) if k.endswith("qvera_b" if damage == "flat b" else "qvera_a"))
    if damage == "no a":
        del vectors[name]
    else:
        vectors[name] = vectors[name].flatten() if damage == "flat b" else vectors[name][:-1].clone()
    save_file(vectors, file, {"format": "pt"})
    with pytest.raises(InputError, match="adapter_model.safetensors"):
        load_adapter(load_base(recipe(tiny_model_dir, Path("-")).model).model, tmp_path / "adapter")
    with pytest.raises(InputError, match=name.rpartition(".")[0]):
        load_adapters(load_base(recipe(tiny_model_dir, Path("-")).model).model, {"it": tmp_path / "adapter"})
    command = ["export", str(tmp_path / "adapter"), str(tmp_path / "lora"), "--to", "lora"]
    assert main(command) == 2
    assert name.rpartition(".")[2].removeprefix("qvera_") in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"rank": 8, "b_groups": 3}, "adapter.b_groups: 3 does not divide adapter.rank"),
        ({"rank": 8, "b_groups": 0}, "adapter.b_groups"),
        ({"input_scale": True, "train_d": False}, "adapter.input_scale: is a vector to train"),
        ({"input_scale": "yes"}, "adapter.input_scale"),
    ],
)
def test_a_recipe_that_can_not_be_is_refused(adapter: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_recipe({"model": "-", "data": {"path": "-"}, "adapter": adapter}, "a test")
