"""The method `lorta`: the authors' numbers in both conventions, and tensors that all linears of a model share."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from qvera.adapters import QveraLinear
from qvera.adapters.config import QveraConfig
from qvera.adapters.factors import Factors
from qvera.adapters.methods import LinearSpec, method_of
from qvera.adapters.products.low_rank import trained_path
from qvera.adapters.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.config.sections import AdapterSection
from qvera.exporting.deltas import read_deltas
from qvera.lab.sample_tokens import TokenSampler
from qvera.utils.errors import InputError
from tests.adapters.helpers import IDS, dense_weight, logits, perturb, relative
from tests.adapters.methods.cases import lorta_delta
from tests.conftest import small_llama
from tests.lab.authors import numbers_of
from tests.training.runs import same

LORTA = {"method": "lorta", "rank": 5}
OUTPUT_FIRST = {**LORTA, "lorta_convention": "output-first"}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


class Authors:
    """Stored numbers of one of the authors' codes: the factors as our tensors, and ΔW of each linear."""

    def __init__(self, file: str, convention: str) -> None:
        self.data = numbers_of(file)
        self.adapter = AdapterSection.model_validate(
            {"method": "lorta", "rank": 5, "alpha": 8, "lorta_convention": convention}
        )
        names = {"A": "qvera_A_self_attn_24", "B": "qvera_B_self_attn_24", "C_h": "qvera_heads_self_attn_24"}
        leaf = {key: self.data[key].clone().requires_grad_() for key in (*names, "C_l", "C_m")}
        self.leaves = leaf
        self.tensors = {ours: leaf[theirs] for theirs, ours in names.items()} | {"qvera_layers": leaf["C_l"]}
        for row, module in zip(leaf["C_m"], MODULES, strict=True):
            self.tensors[f"qvera_module_self_attn_{module}"] = row

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.data[key]

    def factors(self, layer: int, module: int) -> Factors:
        spec = LinearSpec(f"model.layers.{layer}.self_attn.{MODULES[module]}", 24, 24)
        return method_of(self.adapter).factors(self.adapter, spec, self.tensors, None)

    def path(self, layer: int, module: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What our layer computes, with its own backward."""
        factors = self.factors(layer, module)
        return trained_path(x @ weight.t(), x, factors.A, factors.B, factors.scale)

    def check_gradients(self, x: dict[str, torch.Tensor]) -> None:
        for key, leaf in (*self.leaves.items(), *x.items()):
            torch.testing.assert_close(leaf.grad, self[f"grad_{key}"], rtol=1e-11, atol=1e-11)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_input_first_gives_the_numbers_of_the_authors_language_model_code() -> None:
    authors = Authors("lorta_litgpt", "input-first")
    x_qkv, x_o = (authors[key].clone().requires_grad_() for key in ("x_qkv", "x_o"))
    for layer in range(2):
        weights = authors["W_qkv"].chunk(3)
        y = torch.cat([authors.path(layer, i, x_qkv, weights[i]) for i in range(3)], dim=1)
        out = authors.path(layer, 3, x_o, authors["W_o"])
        close(y, authors["y_qkv"][layer])
        close(out, authors["y_o"][layer])
        ((y * authors["g_qkv"][layer]).sum() + (out * authors["g_o"][layer]).sum()).backward()
        for i in range(4):
            factors = authors.factors(layer, i)
            close(factors.scale * factors.B @ factors.A, 1.6 * authors["dW"][layer, i].t())
    authors.check_gradients({"x_qkv": x_qkv, "x_o": x_o})


def test_output_first_gives_the_numbers_of_the_authors_fork_of_peft() -> None:
    authors = Authors("lorta_peft_fork", "output-first")
    x = authors["x"].clone().requires_grad_()
    for layer in range(2):
        for i, name in enumerate("qkvo"):
            y = authors.path(layer, i, x, authors[f"W_{name}"])
            close(y, authors["y"][layer, i])
            (y * authors["g"][layer, i]).sum().backward()
            factors = authors.factors(layer, i)
            close(factors.scale * factors.B @ factors.A, 1.6 * authors["dW"][layer, i])
    authors.check_gradients({"x": x})


@pytest.mark.parametrize(("convention", "wide"), [("input-first", 1), ("output-first", 6)])
def test_it_starts_where_the_authors_do(convention: str, wide: int) -> None:
    """A in ±1/√r, the C in ±1/√r or, in the fork of PEFT, ±√(6/r), B zero."""
    section = AdapterSection.model_validate({"method": "lorta", "rank": 64, "lorta_convention": convention})
    found: dict[str, list[torch.Tensor]] = {}
    for name, vector in named_vectors(attach(small_llama(), section)).items():
        found.setdefault(name.rpartition(".")[2].split("_")[1], []).append(vector.detach().flatten())
    largest = {kind: torch.cat(vectors).abs().max().item() for kind, vectors in found.items()}
    bound = (wide / 64) ** 0.5
    assert largest["B"] == 0
    assert largest["A"] == pytest.approx(1 / 8, rel=0.01)
    assert [largest[kind] for kind in ("heads", "layers", "module")] == pytest.approx([bound] * 3, rel=0.05)
    if wide == 6:
        stored = numbers_of("lorta_peft_fork")  # of rank 5
        assert stored["init_max_abs_A"] < (1 / 5) ** 0.5 < stored["init_max_abs_C_h"] < (6 / 5) ** 0.5


def test_heads_wider_than_the_model_has_room_for() -> None:
    """Qwen3: q has 8 heads of 16 over a width of 64, and o reads 128; gate's 200 rows are 12 heads and a half."""
    sizes = {"hidden_size": 64, "intermediate_size": 200, "num_attention_heads": 8, "num_key_value_heads": 2}
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16, num_hidden_layers=2, vocab_size=320))
    for adapter in (LORTA, OUTPUT_FIRST):
        model = perturb(attach(copy.deepcopy(base), AdapterSection(**adapter)))
        for layer in (m for m in model.modules() if isinstance(m, QveraLinear)):
            own = {name: tensor.double() for name, tensor in layer.tensors("default").items()}
            dense = lorta_delta(own, layer.spec.name, 5, layer.in_features, adapter is LORTA)
            delta = layer.delta_weight_fp32("default")
            assert relative(delta, dense[: layer.out_features, : layer.in_features].detach()) < 1e-5
            x = torch.randn(3, layer.in_features)
            assert relative(layer(x), x @ (dense_weight(layer.base_layer).float() + delta).t()) < 1e-5


def test_it_lives_beside_other_adapters() -> None:
    model = perturb(attach(small_llama(), AdapterSection(**LORTA)))
    alone = logits(model)
    for name, settings in (("other", OUTPUT_FIRST), ("vera", {"rank": 8})):
        model.add_adapter(name, QveraConfig(**settings))
    perturb(model, adapter="other")

    def trained() -> set[str]:
        names = ("default", "other", "vera")
        return {name for name in names if all(v.requires_grad for v in named_vectors(model, name).values())}

    assert torch.equal(logits(model), alone)
    for name in ("default", "vera", "other"):
        model.set_adapter(name)
        assert trained() == {name}
    model.set_requires_grad("other", False)
    assert not trained()
    other = logits(copy.deepcopy(model))
    assert not torch.equal(other, alone)
    model.delete_adapter("default")
    assert not any("default" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), other)


def test_a_cast_and_a_copy_keep_one_set_of_fp32_tensors() -> None:
    model = perturb(attach(small_llama(), AdapterSection(**LORTA)))
    other = copy.deepcopy(model).to(torch.bfloat16)
    for name, vector in named_vectors(other).items():
        assert vector.dtype == torch.float32
        vector.data.zero_()
        assert named_vectors(model)[name].any()
    layers = [m for m in other.modules() if isinstance(m, QveraLinear)]
    assert all(not layer.delta_weight_fp32("default").any() for layer in layers)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_reads_and_writes_it(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, base = perturb(attach(small_llama(), AdapterSection(**LORTA))), small_llama()
    save_adapter(model, tmp_path / "one")
    held: Any = PeftModel.from_pretrained(base, str(tmp_path / "one"), low_cpu_mem_usage=low_cpu_mem_usage)  # type: ignore[arg-type]
    assert torch.equal(logits(held), logits(model))
    held.save_pretrained(str(tmp_path / "two"))
    assert same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")))


def test_a_sample_of_the_tokens_gives_the_gradient_of_a_in_expectation() -> None:
    model = perturb(attach(small_llama(), AdapterSection(**LORTA))).train()
    layer = next(m for m in model.modules() if isinstance(m, QveraLinear))
    torch.manual_seed(0)
    x, upstream = torch.randn(40, layer.in_features), torch.randn(40, layer.out_features)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        layer(x.clone()).backward(upstream)
        return {name: v.grad for name, v in layer.tensors("default").items() if v.grad is not None}

    exact = gradients()
    layer.input_sampler = TokenSampler(0.5).draw
    draws = [gradients() for _ in range(200)]
    for name, gradient in exact.items():
        mean = torch.stack([draw[name] for draw in draws]).mean(0)
        assert relative(mean, gradient) < (0.15 if "_A_" in name else 1e-4), name
        assert ("_A_" in name) != torch.equal(draws[0][name], draws[1][name])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    save_adapter(perturb(attach(small_llama(), AdapterSection(**LORTA))), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.shared.qvera_layers"
    for damaged in ({k: v for k, v in tensors.items() if k != key}, {**tensors, key: tensors[key][:1]}):
        save_file(damaged, file)
        with pytest.raises(InputError, match="qvera_layers"):
            load_adapter(small_llama(), tmp_path)
        with pytest.raises(InputError, match=r"shared tensors.*damaged"):
            read_deltas(tmp_path, small_llama())


def test_an_adapter_of_the_other_convention_is_no_start(tmp_path: Path) -> None:
    save_adapter(attach(small_llama(), AdapterSection(**LORTA)), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["shared_by"] == 14
    attach(small_llama(), AdapterSection(**LORTA, init_from=str(tmp_path)))
    with pytest.raises(InputError, match=r"adapter\.init_from.*lorta_convention"):
        attach(small_llama(), AdapterSection(**OUTPUT_FIRST, init_from=str(tmp_path)))


def test_what_it_can_not_share_is_refused() -> None:
    section = AdapterSection(**LORTA)
    with pytest.raises(InputError, match=r"adapter\.targets: lm_head is in no numbered layer"):
        attach(small_llama(), section.replace(targets=["lm_head", "q_proj"]))
    with pytest.raises(InputError, match=r"adapter\.method: lorta .* heads"):
        method_of(section).shared_tensors(section, [LinearSpec("layers.0.q", 4, 4)], None)
    spread = small_llama()  # each layer would need the shared tensors on its own device
    spread.model.layers[1].to("meta")
    message = "adapter.method: lorta has tensors that all linears share, .* devices: cpu, meta"
    with pytest.raises(InputError, match=message):
        attach(spread, section)


@pytest.mark.parametrize("adapter", [LORTA, OUTPUT_FIRST])
def test_gradients_of_a_whole_model_are_those_of_dense_weights(adapter: dict[str, Any]) -> None:
    """Every linear adds to the same tensors."""
    model = perturb(attach(small_llama(), AdapterSection(**adapter))).double()
    model(input_ids=IDS, labels=IDS).loss.backward()
    shared = {name.rpartition(".")[2]: v.detach().clone().requires_grad_() for name, v in named_vectors(model).items()}
    weights = {}
    for layer in (m for m in model.modules() if isinstance(m, QveraLinear)):
        delta = lorta_delta(shared, layer.spec.name, 5, layer.in_features, adapter is LORTA)
        weights[f"{layer.spec.name}.weight"] = layer.base_layer.weight.detach() + delta[: layer.out_features]
    torch.func.functional_call(
        small_llama().double(), weights, kwargs={"input_ids": IDS, "labels": IDS}
    ).loss.backward()
    for name, vector in named_vectors(model).items():
        found, expected = vector.grad, shared[name.rpartition(".")[2]].grad
        assert found is not None
        assert expected is not None
        assert relative(found, expected) < 1e-5, name  # rotations and the loss are in fp32
