"""Against stock PEFT VeRA: the same projections and the same vectors give the same logits and the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qvera.adapters import QveraConfig, QveraLinear
from qvera.adapters.projection import vera_scale
from tests.adapters.helpers import perturb, relative
from tests.conftest import small_llama

IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3], [8, 8, 30, 1, 99, 4, 250, 6]])
RANK = 12


def base(quantized: bool, directory: Path) -> Any:
    if not quantized:
        return small_llama()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=config)


def stock_layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "vera_lambda_b") and hasattr(m, "base_layer")}


def ours_and_stock(quantized: bool, directory: Path, copy_from: str, targets: Any) -> tuple[Any, Any]:
    """Two models with the same base, projections and vectors; the scale between the two conventions goes into d.

    Stock VeRA multiplies the Kaiming bounds of the *largest* layer into A and B; ours multiplies each layer's own into
    d.
    """
    ours = get_peft_model(base(quantized, directory), QveraConfig(rank=RANK, target_modules=targets))
    perturb(ours)
    config = VeraConfig(r=RANK, target_modules=targets, projection_prng_key=3)
    stock = get_peft_model(base(quantized, directory), config)
    theirs = stock_layers(stock)
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, QveraLinear)}
    assert layers.keys() == theirs.keys()
    assert layers
    projection = next(iter(layers.values())).qvera_projection["default"]
    stock_a, stock_b = stock.base_model.vera_A["default"], stock.base_model.vera_B["default"]
    assert stock_a.shape == projection.A.shape
    assert stock_b.shape == projection.B.shape
    if copy_from == "ours":
        stock_a.copy_(projection.A), stock_b.copy_(projection.B)
    else:
        projection.A.copy_(stock_a), projection.B.copy_(stock_b)
    with torch.no_grad():
        for name, layer in layers.items():
            theirs[name].vera_lambda_b["default"].copy_(layer.vectors("default")["qvera_b"])
            theirs[name].vera_lambda_d["default"].copy_(
                layer.vectors("default")["qvera_d"] * vera_scale(RANK, layer.in_features)
            )
    return ours.train(), stock.train()


def logits_and_loss(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "qv"])
@pytest.mark.parametrize("copy_from", ["ours", "stock"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_same_logits_and_gradients(quantized: bool, copy_from: str, targets: Any, tiny_model_dir: Path) -> None:
    ours, stock = ours_and_stock(quantized, tiny_model_dir, copy_from, targets)
    our_logits, our_loss = logits_and_loss(ours)
    stock_logits, stock_loss = logits_and_loss(stock)
    with ours.disable_adapter(), torch.no_grad():
        assert relative(ours(IDS).logits, our_logits) > 1e-2  # the adapters do something
    assert relative(our_logits, stock_logits) < 3e-6
    torch.testing.assert_close(our_loss, stock_loss, rtol=1e-6, atol=1e-6)
    theirs = stock_layers(stock)
    compared = 0
    for name, layer in ours.named_modules():
        if isinstance(layer, QveraLinear):
            b, d = layer.vectors("default")["qvera_b"].grad, layer.vectors("default")["qvera_d"].grad
            stock_b, stock_d = theirs[name].vera_lambda_b["default"].grad, theirs[name].vera_lambda_d["default"].grad
            assert b is not None
            assert d is not None
            assert b.norm() > 0
            assert d.norm() > 0
            assert relative(b, stock_b) < 2e-5, name
            # the chain rule through stock d = scale * our d
            assert relative(d, vera_scale(RANK, layer.in_features) * stock_d) < 2e-5, name
            compared += 1
    assert compared == (14 if targets == "all-linear" else 4)


def test_merged_weights_agree(tiny_model_dir: Path) -> None:
    ours, stock = ours_and_stock(False, tiny_model_dir, "ours", "all-linear")
    theirs = stock_layers(stock)
    for name, layer in ours.named_modules():
        if isinstance(layer, QveraLinear):
            stock_delta = theirs[name].get_delta_weight("default").detach()
            assert relative(layer.get_delta_weight("default"), stock_delta) < 1e-6
