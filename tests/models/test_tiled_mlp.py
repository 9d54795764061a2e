"""MLPs by tiles of tokens against the same MLPs in one piece: output, and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qvera.adapters.files.save_load import attach, named_vectors
from qvera.config.schema import AdapterSection
from qvera.models import lean_layers
from qvera.models.checkpointing import enable_checkpointing
from tests.adapters.helpers import perturb, relative
from tests.conftest import small_llama


@pytest.fixture(autouse=True)
def few_tokens_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 tokens above 20."""
    monkeypatch.setattr(lean_layers, "TILED_ABOVE_TOKENS", 20)
    monkeypatch.setattr(lean_layers, "_TILE_TOKENS", 8)
    monkeypatch.setattr(lean_layers, "_MULTIPLE", 1)


def adapted(dtype: torch.dtype = torch.float32, checkpointing: bool = True, **adapter: Any) -> Any:
    model = attach(small_llama().to(dtype).requires_grad_(False), AdapterSection(rank=8, **adapter))
    perturb(model)
    enable_checkpointing(model, checkpointing)
    return model.train()


def results(model: Any, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: v.grad.clone() for name, v in named_vectors(model).items()}  # type: ignore[union-attr]
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize(("rows", "tokens"), [(1, 21), (2, 37), (3, 8), (1, 64)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_tiles_give_the_numbers_of_the_whole(
    dtype: torch.dtype, tolerance: float, rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    real = lean_layers._tiles
    monkeypatch.setattr(lean_layers, "_tiles", lambda count: passes.append(count) or real(count))
    expected = results(adapted(dtype, checkpointing=False), rows, tokens)
    assert not passes
    found = results(adapted(dtype), rows, tokens)
    # forward and backward of two layers; a recomputation ends before the MLP
    assert passes == [rows * tokens] * 4
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == value.dtype for name, value in expected.items())
    # 16 bits round every product: a small gradient alone may differ by more
    one, other = (torch.cat([value.float().flatten() for value in each.values()]) for each in (found, expected))
    assert relative(one, other) < tolerance


@pytest.mark.parametrize(
    "adapter", [{"b_groups": 4, "input_scale": True}, {"targets": ["gate_proj"]}, {"targets": ["down_proj", "q_proj"]}]
)
def test_more_vectors_and_other_targets(adapter: dict[str, Any]) -> None:
    expected = results(adapted(checkpointing=False, **adapter), 2, 30)
    found = results(adapted(**adapter), 2, 30)
    assert all(relative(found[name], value) < 1e-5 for name, value in expected.items())


def test_few_tokens_give_the_same_bits_and_no_tiles() -> None:
    expected, found = results(adapted(checkpointing=False), 2, 10), results(adapted(), 2, 10)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_mlp_that_drops_elements_is_not_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_layers, "tiled", None)
    results(adapted(dropout=0.5), 1, 40)


def test_a_layer_that_looks_at_the_gradients_of_a_pass_sees_all_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """SpIEL's first look finds the places that may get a value next."""
    model = adapted()
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.zeros(1, 40, mlp.down_proj.out_features)
    assert lean_layers.can_tile(mlp, x)
    mlp.down_proj.needs_whole_passes = True
    assert not lean_layers.can_tile(mlp, x)


def test_without_a_checkpoint_and_under_autocast() -> None:
    """The function by itself: no gradient of x is asked for, then one is, in another dtype than the weights'."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 40), nn.SiLU(), nn.Linear(40, 16))
    x, upstream = torch.randn(3, 11, 16), torch.randn(3, 11, 16)
    for wanted in (False, True):
        both = []
        for function in (mlp, lambda x: lean_layers.tiled(mlp, mlp, x)):
            mlp.zero_grad()
            given = x.clone().requires_grad_(wanted)
            with torch.autocast("cpu", torch.bfloat16):
                y = function(given)
            y.backward(upstream.to(y.dtype))
            both.append([y, *(p.grad.clone() for p in mlp.parameters()), *([given.grad] if wanted else [])])  # type: ignore[union-attr]
        for one, other in zip(*both, strict=True):
            assert relative(one, other) < 2e-2  # type: ignore[arg-type]


def test_tiles_are_at_most_4096_tokens_and_at_least_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sizes = {tokens: lean_layers.tile_tokens(tokens) for tokens in (4097, 8000, 16384, 16385, 100_000)}
    assert sizes == {4097: 1088, 8000: 2048, 16384: 4096, 16385: 3328, 100_000: 4032}
