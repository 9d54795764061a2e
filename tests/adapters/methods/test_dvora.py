"""VeRA with a trained magnitude: DoRA's numbers, norms without the weight, PEFT's DoRA from it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from qvera.adapters import QveraConfig, QveraLinear, SharedProjection
from qvera.adapters.files.save_load import attach, load_adapter, save_adapter
from qvera.adapters.methods.vera import held_bytes
from qvera.adapters.projection import vera_scale
from qvera.cli.main import main
from qvera.config.schema import AdapterSection, ModelSection, parse_recipe
from qvera.exporting.deltas import read_deltas
from qvera.exporting.lora import export_lora, export_stock_vera
from qvera.exporting.sums import same_directions
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.utils.errors import InputError
from tests.adapters.helpers import IN, KINDS, OUT, base_layer, dense_weight, perturb, relative

REFERENCE = Path(__file__).parents[1] / "reference"
IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3]])


def adapted(base: Any, projection: SharedProjection, rank: int = 12, **settings: Any) -> QveraLinear:
    return QveraLinear(base, "default", projection, QveraConfig(rank=rank, magnitude=True, **settings))


def pair_of(rank: int, dtype: torch.dtype) -> SharedProjection:
    projection = SharedProjection(3, torch.device("cpu"), dtype)
    projection.ensure(rank, IN + 9, OUT + 2)
    return projection


@pytest.mark.parametrize("kind", ["linear", "nf4+dq-bfloat16"])
def test_dropout_is_on_the_input_of_the_change_alone(kind: str) -> None:
    base = base_layer(kind, torch.float32)
    layer = adapted(base, pair_of(12, torch.float32), dropout=0.5).train()
    perturb(layer)
    x = torch.randn(3, 7, IN)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    W, factors = dense_weight(base).float(), layer.parts("default")
    delta = factors.delta()
    rows = (factors.magnitude / torch.linalg.vector_norm(W + delta, dim=1)).detach()
    expected = rows * (x @ W.t() + dropped @ delta.t()) + (0.0 if base.bias is None else base.bias)
    assert relative(y.detach(), expected) < 1e-5
    assert relative(layer.eval()(x).detach(), expected) > 1e-2


@pytest.mark.parametrize("name", ["dora_peft", "dora_rslora_peft"])
def test_given_factors_it_is_peft_s_dora(name: str) -> None:
    """With b = 1 and d = scaling / s, ΔW is the stored LoRA; the gradients of d and b follow from those of A and B."""
    found = {k: torch.from_numpy(v) for k, v in np.load(REFERENCE / f"{name}.npz").items()}
    (m, n), rank, scaling = found["W"].shape, int(found["r"]), float(found["scaling"])
    base = nn.Linear(n, m, dtype=torch.float64).requires_grad_(False)
    base.weight.copy_(found["W"])
    assert base.bias is not None
    base.bias.copy_(found["bias"])
    projection = SharedProjection(0, torch.device("cpu"), torch.float64)
    projection.A, projection.B = found["A"], found["B"]
    layer = adapted(base, projection, rank)
    ratio = scaling / vera_scale(rank, n)
    starts = {"qvera_b": torch.ones(m), "qvera_d": torch.full((rank,), ratio), "qvera_m": found["magnitude"]}
    magnitude = layer.vectors("default")["qvera_m"]
    torch.testing.assert_close(magnitude.double(), found["magnitude_init"], rtol=1e-6, atol=0)
    for kind, vector in layer.vectors("default").items():
        vector.data = starts[kind].double().clone()
    layer.vectors("default")["qvera_d"].data.fill_(ratio)
    x = found["x"].clone().requires_grad_()
    y = layer(x)
    (y * found["g"]).sum().backward()
    grads = {kind: vector.grad for kind, vector in layer.vectors("default").items()}
    expected = {
        "qvera_m": found["grad_magnitude"],
        "qvera_d": (found["grad_A"] * found["A"]).sum(1) / ratio,
        "qvera_b": (found["grad_B"] * found["B"]).sum(1),
    }
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, found["y"], **exact)
    torch.testing.assert_close(x.grad, found["grad_x"], **exact)
    for kind, gradient in expected.items():
        torch.testing.assert_close(grads[kind], gradient, **exact)
    merged = found["W"] + layer.parts("default").change(found["W"])
    torch.testing.assert_close(merged.double(), found["W_merged"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_without_the_weight_are_those_of_the_dense_sum(kind: str) -> None:
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        projection = pair_of(12, dtype)
        layer = adapted(base_layer(kind, dtype), projection, b_groups=3)
        weight = dense_weight(layer.base_layer)
        assert relative(layer.vectors("default")["qvera_m"], weight.norm(dim=1)) < limit
        norms, gram = layer.qvera_frozen["default"], projection.gram(12, IN)
        for seed in (1, 2):  # the second time they are held from the first
            perturb(layer, seed)
            factors = layer.parts("default")
            expected = (weight + factors.delta().double()).norm(dim=1)
            assert (expected / weight.norm(dim=1) - 1).abs().max() > 0.1
            for _ in range(2):
                assert relative(norms.of_sum(factors, gram), expected) < limit
        x = torch.randn(3, 4, IN).to(dtype)
        dense = expected.reciprocal() * layer.vectors("default")["qvera_m"].double()
        wanted = x.double() @ (dense.unsqueeze(1) * (weight + factors.delta().double())).t()
        bias = layer.base_layer.bias
        wanted = wanted if bias is None else wanted + bias.double()
        assert relative(layer(x), wanted) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_merged_into_a_dense_weight_it_has_the_same_outputs() -> None:
    for kind in ("linear", "conv1d"):
        layer = adapted(base_layer(kind), pair_of(12, torch.float32))
        perturb(layer)
        x = torch.randn(5, IN)
        before = layer(x).detach()
        layer.merge()
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


def test_a_row_of_zeros_stays_one_and_is_no_dora(tiny_model_dir: Path, tmp_path: Path) -> None:
    base = base_layer("linear", torch.float32)
    base.weight.data[5] = 0.0
    layer = adapted(base, pair_of(12, torch.float32)).train()
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), base(x))
    perturb(layer)
    layer.vectors("default")["qvera_m"].data[5] = 0.0  # as it began
    y = layer(x)
    y.square().sum().backward()
    assert all(torch.isfinite(vector.grad).all() for vector in layer.vectors("default").values())
    torch.testing.assert_close(y[:, 5], base.bias[5].expand(3))
    dense_run(tiny_model_dir, tmp_path / "adapter")
    deltas = read_deltas(tmp_path / "adapter", empty_model(ModelSection(path=str(tiny_model_dir))))
    magnitude = next(iter(deltas.layers.values())).magnitude
    assert magnitude is not None
    magnitude[3] = 0.0
    with pytest.raises(InputError, match=r"1 of its \d+ rows are zeros .*Export with --to merged"):
        export_lora(deltas, tmp_path / "dora", torch.float32)


def test_adapters_of_one_seed_hold_what_is_made_from_the_weight_once() -> None:
    projection = pair_of(12, torch.float32)
    layer = adapted(base_layer("linear"), projection)
    layer.update_layer("other", projection, QveraConfig(rank=7, magnitude=True))
    assert layer.qvera_frozen["other"] is layer.qvera_frozen["default"]
    perturb(layer, adapter="other")
    layer.set_adapter("other")
    x, weight = torch.randn(3, IN), dense_weight(layer.base_layer)
    summed = weight + layer.parts("other").delta().double()
    dense = layer.vectors("other")["qvera_m"].double() / summed.norm(dim=1)
    wanted = x.double() @ (dense.unsqueeze(1) * summed).t() + layer.base_layer.bias.double()
    assert relative(layer(x), wanted) < 1e-5
    layer.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="can't be active together"):
        layer(x)


def test_the_plan_knows_what_is_held() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        projection = pair_of(12, dtype)
        layer = adapted(base_layer("linear", dtype), projection)
        layer(torch.randn(2, IN).to(dtype))
        norms = layer.qvera_frozen["default"]
        held = [*norms.buffers(), projection.gram(12, IN)]
        counted = held_bytes(12, [(IN, OUT)], dtype.itemsize)
        assert counted == sum(t.numel() * t.element_size() for t in held)


def dense_run(model_dir: Path, out: Path, **settings: Any) -> Any:
    """An adapter with every vector at random over the tiny model in fp32, and its logits."""
    section = ModelSection(path=str(model_dir), quantization="none", compute_dtype="float32")
    model = attach(load_base(section).model, AdapterSection(rank=8, magnitude=True, **settings), str(model_dir))
    perturb(model)
    save_adapter(model, out)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_stock_peft_computes_the_same_with_its_dora(
    dtype: str, limit: float, tiny_model_dir: Path, tmp_path: Path
) -> None:
    expected = dense_run(tiny_model_dir, tmp_path / "adapter")
    deltas = read_deltas(tmp_path / "adapter", empty_model(ModelSection(path=str(tiny_model_dir))))
    export_lora(deltas, tmp_path / "dora", getattr(torch, dtype))
    assert json.loads((tmp_path / "dora" / "adapter_config.json").read_text())["use_dora"] is True
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, tmp_path / "dora").eval()
    with torch.no_grad():
        assert relative(stock(input_ids=IDS).logits, expected) < limit
    for name, module in stock.named_modules():
        if vectors := getattr(module, "lora_magnitude_vector", None):
            own = deltas.layers[name.removeprefix("base_model.model.")].factors.magnitude
            assert torch.equal(vectors["default"].weight, own)  # never rounded


def test_what_it_can_t_be_is_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense_run(tiny_model_dir, tmp_path / "adapter")
    deltas = read_deltas(tmp_path / "adapter", empty_model(ModelSection(path=str(tiny_model_dir))))
    with pytest.raises(InputError, match=r"a magnitude for each linear .*--to lora"):
        export_stock_vera(deltas, tmp_path / "vera")
    with pytest.raises(InputError, match="adapter.magnitude: .* can't be added"):
        same_directions([deltas, deltas])
    tree = {"model": "m", "data": {"path": "x"}, "adapter": {"magnitude": True, "input_scale": True}}
    with pytest.raises(InputError, match="magnitude: can't be combined with adapter.input_scale"):
        parse_recipe(tree, "a test")
    both = [str(tmp_path / "adapter"), str(tmp_path / "adapter"), str(tmp_path / "sum")]
    assert main(["merge-adapters", *both]) == 2
    assert "can't be added" in capsys.readouterr().err


def test_a_file_from_before_the_key_is_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    section = ModelSection(path=str(tiny_model_dir), quantization="none", compute_dtype="float32")
    save_adapter(attach(load_base(section).model, AdapterSection(rank=8)), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    tree = json.loads(file.read_text())
    assert tree["format_version"] == 1
    file.write_text(json.dumps({**tree, "magnitude": None}))
    assert load_adapter(load_base(section).model, tmp_path / "adapter").peft_config["default"].magnitude is False
