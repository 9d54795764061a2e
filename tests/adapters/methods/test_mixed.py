"""Methods beside each other, over bases and in uses that few people have."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.adapters import QveraLinear
from qvera.adapters.config import QveraConfig
from qvera.adapters.save_load import attach, load_adapter, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.config.schema import parse_recipe
from qvera.config.sections import AdapterSection
from qvera.evaluation.generate import generating
from qvera.models.loader import load_base
from qvera.utils.errors import InputError
from tests.adapters.helpers import logits, perturb
from tests.conftest import small_llama

ROUTED = {"method": "sara", "rank": 8, "singular_share": 0.3, "mixed_vectors": 2}


def over(model_dir: Path, **model: Any) -> Any:
    return load_base(parse_recipe({"model": {"path": str(model_dir), **model}, "data": {"path": "x"}}, "a test").model)


@pytest.mark.parametrize("adapter", [{"method": "lora", "rank": 4}, {"method": "spiel", "rank": 2}, ROUTED])
def test_over_int8_a_layer_is_held_in_the_dtype_it_computes_in(adapter: dict[str, Any], tiny_model_dir: Path) -> None:
    base = over(tiny_model_dir, quantization="int8", compute_dtype="bfloat16")
    model = perturb(attach(base.model, AdapterSection(**adapter)))
    expected = logits(model).float()
    layer = next(m for m in model.modules() if isinstance(m, QveraLinear))
    assert layer.held_dtype() == torch.bfloat16
    with generating(model):
        assert layer.holds_inference_weight != (adapter is ROUTED)
        assert (logits(model).float() - expected).abs().max() < 0.05 * expected.abs().max()
    with generating(model, base_only=True):
        assert layer.holds_inference_weight


@pytest.mark.parametrize("adapter", [{"method": "lora-xs", "rank": 6}, ROUTED | {"frozen_pair": "svd"}])
def test_a_core_between_other_factors_is_no_start(
    adapter: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    save_adapter(attach(over(tiny_model_dir, quantization="nf4").model, AdapterSection(**adapter)), tmp_path / "nf4")
    section = AdapterSection(**adapter, init_from=str(tmp_path / "nf4"))
    attach(over(tiny_model_dir, quantization="nf4").model, section)
    with pytest.raises(InputError, match=r"adapter\.init_from.*model\.quantization"):
        attach(over(tiny_model_dir, quantization="none").model, section)


@pytest.mark.parametrize(
    "adapters",
    [
        {"seed-0": {"method": "lora", "rank": 4}, "other": {"rank": 8}},
        {"v1.5": {"method": "lora-xs", "rank": 5}, "keys": {"method": "lora-xs", "rank": 4}},
    ],
)
def test_an_adapter_may_be_named_as_a_seed_a_version_or_a_word_of_python(
    adapters: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    sections = {name: AdapterSection(**keys) for name, keys in adapters.items()}
    for name, section in sections.items():
        save_adapter(perturb(attach(small_llama(), section)), tmp_path / name)
    model = load_adapters(small_llama(), {name: tmp_path / name for name in sections})
    found = logits(model, adapter_names=list(sections))
    for row, name in enumerate(sections):
        expected = logits(load_adapter(small_llama(), tmp_path / name))[row]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_a_model_can_be_copied_whatever_showed_its_progress() -> None:
    lock, shown = threading.Lock(), list[str]()

    class Display:
        def __init__(self) -> None:
            self.lock = lock  # as terminals' progress bars have

        def show(self, name: str) -> None:
            shown.append(name)

    model = attach(small_llama(), AdapterSection(method="lora-xs", rank=5), progress=Display().show)
    assert shown
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("adapter", [{"method": "lora", "rank": 4}, {"rank": 2}])
def test_a_base_weight_that_somebody_trains_gets_its_gradient(adapter: dict[str, Any]) -> None:
    model = perturb(attach(small_llama(), AdapterSection(**adapter))).train()
    layer = next(m for m in model.modules() if isinstance(m, QveraLinear))
    layer.base_layer.weight.requires_grad_(True)
    x = torch.randn(300, layer.in_features)
    layer(x).sum().backward()
    grad = layer.base_layer.weight.grad
    torch.testing.assert_close(grad, x.sum(0).expand_as(grad), rtol=1e-4, atol=1e-4)
    assert all(vector.grad is not None for vector in layer.vectors("default").values())


def test_an_adapter_that_scales_rows_is_not_merged_or_held_with_others() -> None:
    model = attach(small_llama(), AdapterSection(rank=8, magnitude=True))
    model.add_adapter("other", QveraConfig(rank=4, task_type="CAUSAL_LM"))
    perturb(model)
    expected = logits(model)
    with pytest.raises(ValueError, match="default scales the rows"):
        model.merge_adapter(["default", "other"])
    for first, then in (("default", "other"), ("other", "default")):
        model.merge_adapter([first])
        with pytest.raises(ValueError, match="default scales the rows"):
            model.merge_adapter([then])
        model.unmerge_adapter()
    model.base_model.set_adapter(["default", "other"])
    with generating(model), pytest.raises(ValueError, match="default scales the rows"):
        logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)
