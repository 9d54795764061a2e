"""The method `lora`: where it starts, what a layer computes, and PEFT's files written and read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from qvera.adapters import QveraConfig, QveraLinear
from qvera.adapters.adapter_file import read_adapter
from qvera.adapters.methods import LinearSpec, method_of
from qvera.adapters.save_load import attach, load_adapter, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.config.sections import AdapterSection
from qvera.evaluation.run_info import directory_facts
from qvera.exporting.deltas import read_deltas
from qvera.exporting.lora import export_lora
from qvera.utils.errors import InputError
from tests.adapters.helpers import IN, OUT, base_layer, edit_config, logits, perturb, relative
from tests.conftest import small_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]
SETTINGS: list[dict[str, Any]] = [
    {"rank": 4},
    {"rank": 6, "alpha": 16.0, "use_rslora": True, "init_lora_weights": "gaussian", "targets": ["q_proj", "down_proj"]},
]


def lora(**settings: Any) -> AdapterSection:
    return AdapterSection(**{"method": "lora", "rank": 4, **settings})


def stock(directory: Path) -> Any:
    """The adapter as stock PEFT loads it, any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(small_llama(), str(directory))  # type: ignore[arg-type]


def stock_lora(directory: Path, **settings: Any) -> Any:
    """An adapter that stock PEFT made and saved, its tensors away from their start."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(small_llama(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return model


@pytest.mark.parametrize("start", ["default", "gaussian", "orthogonal"])
def test_a_fresh_adapter_leaves_the_logits(start: str) -> None:
    fresh, base = logits(attach(small_llama(), lora(init_lora_weights=start))), logits(small_llama())
    assert relative(fresh, base) < 1e-6
    if start != "orthogonal":  # whose B A is zero up to rounding
        assert torch.equal(fresh, base)


def test_starts_have_the_sizes_of_peft_s_and_depend_on_seed_and_place() -> None:
    spec, method = LinearSpec("model.layers.0.self_attn.q_proj", 400, 300), method_of(lora())

    def start(kind: str, name: str = "qvera_A", seed: int = 0, at: LinearSpec = spec) -> torch.Tensor:
        config = QveraConfig(method="lora", rank=40, init_lora_weights=kind, projection_seed=seed)
        return method.start(name, method.tensors(config, at)[name], config, at)

    default, gaussian = start("default"), start("gaussian")
    assert default.abs().max() <= 1 / 20
    assert default.std() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert gaussian.std() == pytest.approx(1 / 40, rel=0.02)
    A, B = start("orthogonal"), start("orthogonal", "qvera_B")
    assert (B @ A).abs().max() < 1e-6 * (B.norm() * A.norm())
    assert A.std() == pytest.approx(B.std().item(), rel=0.1)
    assert torch.equal(default, start("default"))
    elsewhere = LinearSpec("model.layers.1.self_attn.q_proj", 400, 300)
    assert all(relative(other, default) > 1 for other in (start("default", seed=1), start("default", at=elsewhere)))


@pytest.mark.parametrize(("kind", "dropout"), [("linear", 0.0), ("conv1d", 0.5), ("nf4+dq-uint8", 0.5)])
def test_a_layer_is_the_formula_with_every_gradient(kind: str, dropout: float) -> None:
    config = QveraConfig(method="lora", rank=4, alpha=10, dropout=dropout)
    base = base_layer(kind)
    layer = QveraLinear(base, "default", None, config, "q_proj").train()
    perturb(layer)
    A, B = (layer.vectors("default")[name] for name in ("qvera_A", "qvera_B"))
    assert (A.shape, B.shape) == ((4, IN), (OUT, 4))
    x = torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(3)
    y = layer(x)
    y.square().sum().backward()
    found = [y.detach(), *(t.grad for t in (x, A, B))]
    for tensor in (x, A, B):
        tensor.grad = None
    torch.manual_seed(3)
    inner = torch.nn.functional.dropout(x, dropout)
    y = base(x) + 2.5 * inner @ A.t() @ B.t()
    y.square().sum().backward()
    for one, other in zip(found, [y.detach(), *(t.grad for t in (x, A, B))], strict=True):
        assert one is not None and other is not None and relative(one, other) < 2e-6


@pytest.mark.parametrize("settings", SETTINGS)
def test_stock_peft_loads_our_files_and_gives_the_same_logits(settings: dict[str, Any], tmp_path: Path) -> None:
    model = attach(small_llama(), lora(**settings), "a/base", "f" * 64)
    perturb(model)
    save_adapter(model, tmp_path / "adapter")
    expected = logits(model)
    torch.testing.assert_close(logits(stock(tmp_path / "adapter")), expected, rtol=1e-5, atol=1e-5)
    again = load_adapter(small_llama(), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    config, tensors = read_adapter(tmp_path / "adapter")
    assert isinstance(config, QveraConfig)
    assert (config.method, config.base_fingerprint, config.base_model_name_or_path) == ("lora", "f" * 64, "a/base")
    save_adapter(again, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()
    assert {key.rpartition(".")[2] for key in tensors} == {"qvera_A", "qvera_B"}
    facts = directory_facts(tmp_path / "adapter")
    assert (facts["method"], facts["rank"], facts["base_fingerprint"]) == ("lora", settings["rank"], "f" * 64)


PATTERNS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "init_lora_weights": "gaussian"},
    {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 7}, "alpha_pattern": {".*v_proj": 3}},
]


@pytest.mark.parametrize("settings", PATTERNS)
def test_adapters_of_stock_peft_are_read_exported_and_merged(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = logits(stock_lora(tmp_path / "theirs", **settings))
    ours = load_adapter(small_llama(), tmp_path / "theirs")
    assert sum(isinstance(m, QveraLinear) for m in ours.modules()) == 6
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    deltas = read_deltas(tmp_path / "theirs", small_llama())
    export_lora(deltas, tmp_path / "copy", torch.float32)
    originals = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    copies = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    assert originals.keys() == copies.keys()
    assert all(torch.equal(originals[key], copies[key]) for key in originals)
    assert torch.equal(logits(stock(tmp_path / "copy")), expected)
    merged = small_llama()
    for name, delta in deltas.layers.items():
        merged.get_submodule(name).weight.data += delta.rows()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias"), ({"layer_replication": [[0, 2]]}, "layer"),
     ({"init_lora_weights": "pissa"}, "init_lora_weights"), ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
     ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow"),
     ({"r": 0}, "rank"), ({"lora_alpha": "much"}, "alpha")],
)  # fmt: skip
def test_a_lora_with_other_parts_is_refused_by_the_key(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    stock_lora(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **change)
    with pytest.raises(InputError, match=named):
        read_adapter(tmp_path / "theirs")


def test_damaged_facts_in_the_header_are_named(tmp_path: Path) -> None:
    stock_lora(tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    for facts in ("{", "[1]"):
        save_file(load_file(file), file, metadata={"format": "pt", "qvera": facts})
        with pytest.raises(InputError, match="header"):
            read_adapter(tmp_path / "theirs")


def test_training_goes_on_from_an_adapter_of_stock_peft(tmp_path: Path) -> None:
    expected = logits(stock_lora(tmp_path / "theirs"))
    same = {"alpha": 10, "targets": TARGETS, "init_from": str(tmp_path / "theirs")}
    model = attach(small_llama(), lora(**same))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert sum(p.requires_grad for p in model.parameters()) == 12
    for change, named in (
        ({"alpha": 8}, "alpha 10, the recipe 8"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank": 2}, "rank"),
    ):
        with pytest.raises(InputError, match=named):
            attach(small_llama(), lora(**{**same, **change}))
    with pytest.raises(InputError, match="method lora, the recipe vera"):
        attach(small_llama(), AdapterSection(rank=4, init_from=str(tmp_path / "theirs"), targets=same["targets"]))


def test_training_goes_on_from_a_lora_of_several_ranks(tmp_path: Path) -> None:
    expected = logits(stock_lora(tmp_path / "theirs", **PATTERNS[2]))
    model = attach(small_llama(), lora(alpha=10, targets=TARGETS, init_from=str(tmp_path / "theirs")))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(stock(tmp_path / "ours")), expected, rtol=1e-5, atol=1e-5)


def test_each_of_two_loras_is_saved_with_its_own_tensors(tmp_path: Path) -> None:
    model = attach(small_llama(), lora())
    model.add_adapter("two", model.peft_config["default"])
    perturb(model)
    save_adapter(model, tmp_path / "two", adapter="two")
    _, tensors = read_adapter(tmp_path / "two")
    own = get_peft_model_state_dict(model, adapter_name="two", save_embedding_layers=False)
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[key], own[key]) for key in own)


def test_rows_of_a_batch_use_loras_and_vera_side_by_side(tmp_path: Path) -> None:
    sections = {"lora": lora(), "rs": lora(rank=2, use_rslora=True), "vera": AdapterSection(rank=8)}
    directories, alone = {}, {}
    for seed, (name, section) in enumerate(sections.items()):
        model = attach(small_llama(), section)
        perturb(model, seed)
        directories[name] = tmp_path / name
        save_adapter(model, directories[name])
        alone[name] = logits(model)
    model = load_adapters(small_llama(), directories)
    for names in (["lora", "vera"], ["rs", "__base__"], ["lora", "lora"]):
        found = logits(model, adapter_names=names)
        for row, name in enumerate(names):
            expected = alone[name][row] if name in alone else logits(small_llama())[row]
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


def test_orthogonal_wants_an_even_rank() -> None:
    with pytest.raises(InputError, match="init_lora_weights: orthogonal takes an even adapter.rank, got 3"):
        lora(rank=3, init_lora_weights="orthogonal")
    config = QveraConfig(method="lora", rank=4, init_lora_weights="orthogonal", rank_pattern={"q_proj": 3})
    spec, method = LinearSpec("model.layers.0.self_attn.q_proj", 40, 30), method_of(lora())
    with pytest.raises(InputError, match="orthogonal takes even ranks, and model.layers.0.self_attn.q_proj has 3"):
        method.start("qvera_A", method.tensors(config, spec)["qvera_A"], config, spec)
