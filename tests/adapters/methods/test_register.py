"""The method that docs/methods/adding.md adds: ΔW = v uᵀ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.adapters import QveraLinear, methods
from qvera.adapters.factors import Factors
from qvera.adapters.files.save_load import attach, load_adapter, save_adapter
from qvera.adapters.methods import Method, Place, Source, check_recipe
from qvera.config.schema import AdapterSection, ModelSection, parse_recipe
from qvera.models.loader import load_base
from qvera.utils.errors import InputError

IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3]])


class Bottleneck(Method):
    """ΔW = v uᵀ: a LoRA of rank 1 whose u and v are trained."""

    name = "bottleneck"
    source = Source.TRAINED
    keeps_input = True

    def tensors(self, adapter: Any, place: Place) -> dict[str, tuple[int, ...]]:
        return {"qvera_u": (1, place.in_features), "qvera_v": (place.out_features, 1)}

    def start(self, name: str, shape: tuple[int, ...], adapter: Any, place: Place) -> torch.Tensor:
        return torch.zeros(shape) if name == "qvera_v" else torch.full(shape, place.in_features**-0.5)

    def factors(self, adapter: Any, place: Place, tensors: Mapping[str, torch.Tensor], pair: Any) -> Factors:
        return Factors(tensors["qvera_u"], tensors["qvera_v"])

    def add(self, layer: Any, adapter_name: str, x: torch.Tensor, y: torch.Tensor, overwrite: bool) -> torch.Tensor:
        factors = layer.parts(adapter_name)
        return factors.expand(y, torch.nn.functional.linear(x, factors.A.to(x.dtype)), overwrite)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", {**methods._METHODS})
    methods.register(Bottleneck())


def test_a_registered_method_trains_saves_and_loads(tiny_model_dir: Path, tmp_path: Path) -> None:
    section = ModelSection(path=str(tiny_model_dir), compute_dtype="float32")
    model = attach(load_base(section).model, AdapterSection(method="bottleneck", rank=1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {n for m in model.modules() if isinstance(m, QveraLinear) for n in m.vectors("default")} == {
        "qvera_u",
        "qvera_v",
    }
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(load_base(section).model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("adapter", "training", "words"),
    [
        ({"method": "verra"}, {}, "adapter.method: takes one of .*Did you mean 'vera'"),
        ({"method": "shared-core", "rank": 8, "b_groups": 2}, {"learning_rate": 1e-2}, "adapter.b_groups: is read by vera"),
        ({"method": "shared-core"}, {"learning_rate": 1e-2}, "adapter.rank: has no default .* 64 is a usual value"),
        ({"method": "shared-core", "rank": 8}, {}, "training.learning_rate: has no default .* 0.004 is"),
    ],
    ids=["unknown", "another method's key", "no rank", "no learning rate"],
)  # fmt: skip
def test_a_recipe_that_does_not_suit_its_method_is_refused(
    adapter: dict[str, Any], training: dict[str, Any], words: str
) -> None:
    recipe = parse_recipe({"model": "m", "data": {"path": "x"}, "adapter": adapter, "training": training}, "a test")
    with pytest.raises(InputError, match=words):
        check_recipe(recipe)
