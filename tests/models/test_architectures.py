"""Models that read weights without calling a layer, share layers, or choose what a token meets, through `Trial`'s steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from qvera import api
from qvera.adapters.save_load import attach, named_vectors, save_adapter
from qvera.config.sections import AdapterSection, ModelSection
from qvera.models.loader import load_base
from qvera.training.trainer import train
from qvera.utils.errors import RunFailed
from tests.adapters.helpers import perturb, relative
from tests.architectures import Trial
from tests.families import FAMILIES, Family

_STEPS = ("gradients", "generate", "padding", "merged")
_SLOW = ("mamba", "zamba2", "deepseek_v4", "kimi_linear")
_OTHERS = (
    "gemma3n_text", "falcon_mamba", "mamba2", "jamba", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba",
    "minimax", "bailing_hybrid", "minicpm3", "falcon",
)  # fmt: skip
_GEMMA_4: dict[str, dict[str, Any]] = {
    "dense": {"hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0},
    "experts": {
        "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64,
    },
    "shared keys": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
}  # fmt: skip


def _tried(family: Family, steps: tuple[str, ...], root: Path) -> Trial:
    tried = Trial(family, root)
    for step in steps:
        getattr(tried, step)()
    return tried


@pytest.mark.parametrize(
    "name",
    [
        "recurrent_gemma",
        *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW),
        *(pytest.param(name, marks=pytest.mark.matrix) for name in _OTHERS),
    ],
)
def test_gradients_padded_batches_and_exports_are_those_of_plain_rows(name: str, tmp_path: Path) -> None:
    """In a batch with and without checkpointing; prompts of several lengths answered as each alone."""
    _tried(FAMILIES[name], ("train", *_STEPS), tmp_path)


@pytest.mark.parametrize(
    "variant",
    ["experts", pytest.param("shared keys", marks=pytest.mark.slow), pytest.param("dense", marks=pytest.mark.matrix)],
)
def test_gemma_4_whose_layers_differ_in_heads_is_planned_trained_answers_and_is_exported(
    variant: str, tmp_path: Path
) -> None:
    family = FAMILIES["gemma4_text"]
    experts = "4 bits" if variant == "experts" else ""
    family = dataclasses.replace(family, changes={**family.changes, **_GEMMA_4[variant]}, experts=experts)
    tried = _tried(family, ("plan", "train", *_STEPS, "lora", "serve"), tmp_path)
    model = tried.found.opened.base.model
    routers = [module for name, module in model.named_modules() if name.endswith("router.proj")]
    assert len(routers) == (2 if variant == "experts" else 0)
    assert all(isinstance(module, torch.nn.Linear) and module.weight.is_floating_point() for module in routers)


def test_a_mixer_calls_its_projection_where_a_kernel_would_read_its_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILIES["mamba2"].write(tmp_path)
    model = attach(
        load_base(ModelSection(path=str(tmp_path), compute_dtype="float32")).model, AdapterSection(rank=8), "x"
    )
    perturb(model).train()

    def kernel(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError("the fused kernel was called")

    monkeypatch.setattr(modeling_mamba2, "mamba2_split_conv1d_scan_combined", kernel)
    model(input_ids=torch.arange(3, 14)[None], use_cache=False).logits.square().sum().backward()
    assert model.get_base_model().training
    found = {name: vector.grad for name, vector in named_vectors(model).items() if ".out_proj." in name}
    assert found
    assert all(grad is not None and grad.norm() > 0 for grad in found.values())


def test_a_layer_that_is_named_and_never_called_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    tried = Trial(FAMILIES["mamba"], tmp_path)
    recipe = tried.recipe()
    recipe = recipe.replace(adapter=recipe.adapter.replace(targets=["in_proj", "dt_proj"]))
    with pytest.raises(
        RunFailed, match=r"no gradient: backbone\.layers\.0\.mixer\.dt_proj .* Name the others: .*in_proj"
    ):
        train(recipe, tmp_path / "run")


def test_an_adapter_of_a_shared_block_is_a_lora_in_every_place_of_it(tmp_path: Path) -> None:
    """Opened by PEFT on transformers' model, which ties the weights of modules of their own."""
    family = dataclasses.replace(FAMILIES["zamba2"], four_bit="no")
    tried = _tried(family, ("train",), tmp_path)
    model = tried.adapted()
    names = {name for name in named_vectors(model) if "shared_transformer" in name}
    assert names
    assert {name.split(".")[4] for name in names} == {"1"}  # of layers 1 and 2, which are one block
    save_adapter(model, tmp_path / "adapter")
    api.load(tmp_path / "adapter", recipe=tmp_path / "run").export(
        tmp_path / "lora", to="lora", dtype="float32", compare=False
    )
    plain = AutoModelForCausalLM.from_pretrained(tried.directory, dtype=torch.float32)
    stock = PeftModel.from_pretrained(plain, str(tmp_path / "lora")).eval()
    ids = torch.arange(3, 14)[None]
    with torch.no_grad():
        assert relative(stock(input_ids=ids).logits, model.eval()(input_ids=ids).logits) < 1e-5


def test_text_is_not_held_to_the_positions_of_a_vision_tower(tmp_path: Path) -> None:
    """Nor is a part of it adapted."""
    tried = _tried(FAMILIES["phi4_multimodal"], ("plan", "train"), tmp_path)
    names = named_vectors(tried.adapted())
    assert names
    assert all(".model.layers." in name for name in names)
