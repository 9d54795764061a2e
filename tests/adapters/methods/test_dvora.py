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

from qvera.adapters import QveraConfig, QveraLinear, SharedProjection
from qvera.adapters.methods.vera import held_bytes
from qvera.adapters.projection import vera_scale
from qvera.adapters.save_load import attach, load_adapter, save_adapter
from qvera.cli.main import main
from qvera.config.schema import parse_recipe
from qvera.config.sections import AdapterSection, ModelSection
from qvera.exporting.deltas import read_deltas
from qvera.exporting.lora import export_lora, export_stock_vera
from qvera.models.loader import load_base
from qvera.models.model_class import empty_model
from qvera.utils.errors import InputError
from tests.adapters.helpers import IN, KINDS, OUT, base_layer, dense_weight, edit_config, logits, perturb, relative

REFERENCE = Path(__file__).parents[1] / "reference"


def adapted(base: Any, projection: SharedProjection, rank: int = 12, **settings: Any) -> QveraLinear:
    return QveraLinear(base, "default", projection, QveraConfig(rank=rank, magnitude=True, **settings))


def pair_of(rank: int, dtype: torch.dtype) -> SharedProjection:
    projection = SharedProjection(3, torch.device("cpu"), dtype)
    projection.ensure(rank, IN + 9, OUT + 2)
    return projection


def test_dropout_is_on_the_input_of_the_change_alone() -> None:
    base = base_layer("nf4+dq-bfloat16", torch.float32)
    layer = perturb(adapted(base, pair_of(12, torch.float32), dropout=0.5).train())
    x = torch.randn(3, 7, IN)
    torch.manual_seed(7)
    y = layer(x)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(x, 0.5)
    W, factors = dense_weight(base).float(), layer.parts("default")
    delta = factors.delta()
    rows = (factors.magnitude / torch.linalg.vector_norm(W + delta, dim=1)).detach()
    expected = rows * (x @ W.t() + dropped @ delta.t()) + base.bias
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


@pytest.mark.parametrize(("kind", "dtype"), [(k, (torch.float32, torch.bfloat16)[i % 2]) for i, k in enumerate(KINDS)])
def test_norms_without_the_weight_are_those_of_the_dense_sum(kind: str, dtype: torch.dtype) -> None:
    limit, projection = 1e-6 if dtype == torch.float32 else 1e-3, pair_of(12, dtype)
    layer = adapted(base_layer(kind, dtype), projection, b_groups=3)
    weight = dense_weight(layer.base_layer)
    assert relative(layer.vectors("default")["qvera_m"], weight.norm(dim=1)) < limit
    norms, gram = layer.qvera_frozen["default"], projection.gram(12, IN)
    for seed in (1, 2):  # the second time they are held from the first
        perturb(layer, seed)
        expected = (weight + layer.parts("default").delta().double()).norm(dim=1)
        assert (expected / weight.norm(dim=1) - 1).abs().max() > 0.1
        for _ in range(2):
            assert relative(norms.of_sum(layer.parts("default"), gram), expected) < limit
    x = torch.randn(3, 4, IN).to(dtype)
    assert relative(layer(x), dense_output(layer, x)) < (1e-5 if dtype == torch.float32 else 2e-2)
    if kind in ("linear", "conv1d") and dtype == torch.float32:
        before = layer(x).detach()
        layer.merge()
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


def dense_output(layer: QveraLinear, x: torch.Tensor, adapter: str = "default") -> torch.Tensor:
    """The equation in fp64."""
    summed = dense_weight(layer.base_layer) + layer.parts(adapter).delta().double()
    rows = layer.vectors(adapter)["qvera_m"].double() / summed.norm(dim=1)
    y, bias = x.double() @ (rows.unsqueeze(1) * summed).t(), layer.base_layer.bias
    return y if bias is None else y + bias.double()


def test_a_row_of_zeros_stays_one_and_is_no_dora(model_section: ModelSection, saved: Path, tmp_path: Path) -> None:
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
    deltas = read_deltas(saved, empty_model(model_section))
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
    x = torch.randn(3, IN)
    assert relative(layer(x), dense_output(layer, x, "other")) < 1e-5
    layer.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="can't be active together"):
        layer(x)


def test_a_base_without_weights_has_no_norms_to_move() -> None:
    projection = SharedProjection(3, torch.device("meta"), torch.float32)
    projection.ensure(12, IN, OUT)
    layer = adapted(nn.Linear(IN, OUT, device="meta"), projection)
    with pytest.raises(RuntimeError, match="load them before you add it"):
        layer.to_empty(device="cpu")


def test_the_plan_knows_what_is_held() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        projection = pair_of(12, dtype)
        layer = adapted(base_layer("linear", dtype), projection)
        layer(torch.randn(2, IN).to(dtype))
        norms = layer.qvera_frozen["default"]
        held = [*norms.buffers(), projection.gram(12, IN)]
        counted = held_bytes(12, [(IN, OUT)], dtype.itemsize)
        assert counted == sum(t.numel() * t.element_size() for t in held)


@pytest.fixture(scope="module")
def model_section(tiny_model_dir: Path) -> ModelSection:
    return ModelSection(path=str(tiny_model_dir), quantization="none", compute_dtype="float32")


@pytest.fixture(scope="module")
def saved(model_section: ModelSection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with every vector at random over the tiny model in fp32."""
    model = attach(load_base(model_section).model, AdapterSection(rank=8, magnitude=True), model_section.path)
    directory = tmp_path_factory.mktemp("dvora") / "adapter"
    save_adapter(perturb(model), directory)
    return directory


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_stock_peft_computes_the_same_with_its_dora(
    dtype: str, limit: float, model_section: ModelSection, saved: Path, tmp_path: Path
) -> None:
    deltas = read_deltas(saved, empty_model(model_section))
    export_lora(deltas, tmp_path / "dora", getattr(torch, dtype))
    assert json.loads((tmp_path / "dora" / "adapter_config.json").read_text())["use_dora"] is True
    stock = PeftModel.from_pretrained(load_base(model_section).model, tmp_path / "dora")
    assert relative(logits(stock), logits(load_adapter(load_base(model_section).model, saved))) < limit
    for name, module in stock.named_modules():
        if vectors := getattr(module, "lora_magnitude_vector", None):
            own = deltas.layers[name.removeprefix("base_model.model.")].factors.magnitude
            assert torch.equal(vectors["default"].weight, own)  # never rounded


def test_what_it_can_t_be_is_refused_by_name(
    model_section: ModelSection, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deltas = read_deltas(saved, empty_model(model_section))
    with pytest.raises(InputError, match=r"a magnitude for each linear .*--to lora"):
        export_stock_vera(deltas, tmp_path / "vera")
    tree = {"model": "m", "data": {"path": "x"}, "adapter": {"magnitude": True, "input_scale": True}}
    with pytest.raises(InputError, match="magnitude: can't be combined with adapter.input_scale"):
        parse_recipe(tree, "a test")
    assert main(["merge-adapters", str(saved), str(saved), str(tmp_path / "sum")]) == 2
    assert "adapter.magnitude: " in (said := capsys.readouterr().err) and "can't be added" in said


def test_a_file_from_before_the_key_is_read(model_section: ModelSection, tmp_path: Path) -> None:
    save_adapter(attach(load_base(model_section).model, AdapterSection(rank=8)), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", magnitude=None)
    model = load_adapter(load_base(model_section).model, tmp_path / "adapter")
    assert model.peft_config["default"].magnitude is False
