"""The product with W + ΔW against the low-rank path and the textbook formula; and when it is taken at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qvera.adapters import hold_training_weights
from qvera.adapters.factors import Factors
from qvera.adapters.products import fused
from tests.adapters.helpers import IN, KINDS, OUT, adapted, parts, reference, relative, run, textbook

NAMES = ("y", "x", "b", "d", "a")
KEEPS_Z, KEEPS_X = 12, 80  # the rank decides
TOKENS = 600
LINEARS = [kind for kind in KINDS if kind != "conv1d"]


def inputs(dtype: torch.dtype = torch.float32, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(2, tokens // 2, IN).to(dtype), torch.randn(2, tokens // 2, OUT).to(dtype)


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_product(*_: Any) -> None:
        raise AssertionError("took the product with W + ΔW")

    monkeypatch.setattr(fused, "summed_weight", no_product)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every W + ΔW that is made."""
    calls: list[int] = []
    product = fused.summed_weight
    monkeypatch.setattr(fused, "summed_weight", lambda *a: calls.append(1) or product(*a))
    return calls


WAYS = [(KEEPS_Z, False), (KEEPS_X, False), (KEEPS_Z, True), (KEEPS_X, True)]


@pytest.mark.parametrize(("kind", "way"), [(k, WAYS[(i + j) % 4]) for i, k in enumerate(LINEARS) for j in (0, 2)])
def test_it_is_taken_and_equals_the_dense_layer(
    kind: str, way: tuple[int, bool], made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, scaled = way
    layer = adapted(kind, rank=rank, scaled=scaled)
    assert fused.keeps_input(TOKENS, IN, OUT, rank, scaled) is (scaled or rank == KEEPS_X)
    x, upstream = inputs()
    actual = run(layer, x, upstream)
    assert len(made) == 2  # forward and backward
    monkeypatch.setattr(fused, "pays", lambda *_: False)
    low_rank = run(layer, x, upstream)
    assert len(made) == 2
    for expected in (low_rank, reference(layer, x, upstream, torch.float32)):
        for name, one, other in zip(NAMES, actual, expected, strict=False):
            assert relative(one, other) < 3e-6, name


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("way", ["keeps z", "keeps x", "an a, by the tokens", "an a, by the weight"])
def test_gradcheck(way: str, groups: int) -> None:
    tokens, rank = (3, 3) if way == "an a, by the tokens" else (9, 6)
    p = parts(tokens, 4, 5, rank, groups=groups, scaled=way.startswith("an a"))
    module = nn.Linear(4, 5, bias=groups == 1).double().requires_grad_(False)
    module.weight.data = p["W"].clone()
    leaves = {k: p[k].clone().requires_grad_() for k in "xdba" if k in p}

    def through(x: torch.Tensor, d: torch.Tensor, b: torch.Tensor, *a: torch.Tensor) -> torch.Tensor:
        z = (x.detach() @ p["A"].t()) if way == "keeps z" else None
        return fused.summed_linear(module, x, z, Factors(p["A"], p["B"], d, b, 0.7, *a))

    assert torch.autograd.gradcheck(through, tuple(leaves.values()))
    upstream = torch.randn(tokens, 5, dtype=torch.float64)
    expected = textbook(p, 0.7, upstream)
    y = through(*leaves.values())
    y.backward(upstream)
    if module.bias is not None:
        expected["y"] += module.bias
    for name, found in {"y": y.detach(), **{k: leaf.grad for k, leaf in leaves.items()}}.items():
        assert found is not None and relative(found, expected[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "groups", "scaled"), [(KEEPS_Z, 1, False), (KEEPS_X, 1, False), (KEEPS_Z, 2, True)])
def test_in_sixteen_bits_it_is_as_close_to_the_reference_as_the_low_rank_path(
    rank: int, groups: int, scaled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = adapted("nf4+dq-bfloat16", dtype, rank=rank, groups=groups, scaled=scaled)
    x, upstream = inputs(dtype)
    taken, expected = run(layer, x, upstream), reference(layer, x, upstream, dtype)
    refuse(monkeypatch)
    monkeypatch.setattr(fused, "pays", lambda *_: False)
    for one, other, truth in zip(taken, run(layer, x, upstream), expected, strict=True):
        assert relative(one, truth) < 1.5 * relative(other, truth) + torch.finfo(dtype).eps / 4


def test_few_tokens_and_sixteen_bits_on_cuda_take_the_low_rank_path() -> None:
    shape = 576, 576, 256
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert fused.pays(1024, *shape, dtype)
        assert fused.pays(1024, *shape, dtype, "cuda") is (dtype.itemsize >= 4)
        assert not fused.pays(64, *shape, dtype)
        assert not fused.pays(512, 4096, 4096, 256, dtype)


@pytest.mark.parametrize("reason", ["conv1d", "dropout", "two adapters", "ZeRO-3", "disabled"])
def test_where_it_would_be_wrong_or_lose_precision_it_is_not_taken(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = adapted("conv1d" if reason == "conv1d" else "linear", dropout=0.1 if reason == "dropout" else 0.0)
    if reason == "two adapters":
        other = adapted("linear")
        for name in ("qvera_d", "qvera_b", *layer.other_param_names):
            if "default" in getattr(other, name):
                getattr(layer, name)["other"] = getattr(other, name)["default"]
        layer.set_adapter(["default", "other"])
    if reason == "ZeRO-3":
        layer.base_layer.weight.ds_id = 3  # type: ignore[union-attr, assignment]
    if reason == "disabled":
        layer.enable_adapters(False)
    refuse(monkeypatch)
    layer(torch.randn(TOKENS, IN)).sum()


@pytest.mark.parametrize(("rank", "width"), [(KEEPS_Z, KEEPS_Z), (KEEPS_X, IN)])
def test_what_is_kept_for_backward(rank: int, width: int) -> None:
    layer = adapted("nf4+dq-bfloat16", rank=rank)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(TOKENS, IN, requires_grad=True))
    assert [tuple(t.shape) for t in kept if len(t) == TOKENS] == [(TOKENS, width)]


def test_a_layer_that_holds_its_weight_takes_it_where_that_pays(made: list[int]) -> None:
    layer, tokens = adapted("nf4+dq-bfloat16"), 2 * (IN * OUT // (IN + 2 * OUT) // 2 + 1)
    x, upstream = inputs(tokens=tokens)
    low_rank = run(layer, x, upstream)
    assert not made
    hold_training_weights(layer, True)
    held = run(layer, x, upstream)
    assert len(made) == 1
    for name, one, other in zip(NAMES, held, low_rank, strict=False):
        assert relative(one, other) < 3e-6, name
    hold_training_weights(layer, False, builds=1.0)  # the path of a run that began with more memory
    for one, other in zip(held, run(layer, x, upstream), strict=True):
        assert torch.equal(one, other)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("kind", "scaled"), [("linear", True), ("int8", False), ("nf4-uint8", True), ("fp4+dq-bfloat16", False)]
)
def test_a_held_weight_gives_the_same_numbers_and_is_made_once_a_step(kind: str, scaled: bool, made: list[int]) -> None:
    layer, plain = (adapted(kind, rank=KEEPS_Z, scaled=scaled) for _ in range(2))
    hold_training_weights(layer, True)
    x, upstream = inputs()
    for vector in ("qvera_b", "qvera_d"):
        for each in (layer, plain):
            getattr(each, vector)["default"].data.mul_(1.5)  # no version tells of it
        expected = run(plain, x, upstream)
        made.clear()
        for _ in range(2):  # micro-batches
            for one, other in zip(run(layer, x, upstream), expected, strict=True):
                assert torch.equal(one, other)
        assert len(made) == 1


def test_a_held_weight_notices_another_base_weight_and_another_pair() -> None:
    layer = adapted("linear", rank=KEEPS_Z)
    x, upstream = inputs()
    changes = (
        lambda: layer.base_layer.weight.mul_(2),
        lambda: layer.qvera_projection["default"].A.mul_(2),
        lambda: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(OUT, IN), requires_grad=False)),
    )
    for change in changes:
        hold_training_weights(layer, True)
        run(layer, x, upstream)
        with torch.no_grad():
            change()
        held = run(layer, x, upstream)
        hold_training_weights(layer, False)
        for one, other in zip(held, run(layer, x, upstream), strict=True):
            assert torch.equal(one, other)
