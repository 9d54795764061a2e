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

NAMES = ("y", "x", "b", "d")
WAYS = {"keeps z": 12, "keeps x": 80}  # the rank decides
TOKENS = 600


LINEARS = [kind for kind in KINDS if kind != "conv1d"]


@pytest.mark.parametrize(
    ("kind", "rank", "scaled"),
    [(kind, (12, 80)[i % 2], scaled) for i, kind in enumerate(LINEARS) for scaled in (False, True)]
    + [(kind, (80, 12)[i % 2], False) for i, kind in enumerate(LINEARS)],
)
def test_it_is_taken_and_equals_the_dense_layer(
    kind: str, rank: int, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = adapted(kind, rank=rank, scaled=scaled)
    assert fused.pays(TOKENS, IN, OUT, rank, torch.float32, "cpu", scaled)
    assert fused.keeps_input(TOKENS, IN, OUT, rank, scaled) is (scaled or rank == WAYS["keeps x"])
    torch.manual_seed(5)
    x, upstream = torch.randn(2, TOKENS // 2, IN), torch.randn(2, TOKENS // 2, OUT)
    calls = []
    product = fused.summed_weight
    monkeypatch.setattr(fused, "summed_weight", lambda *a: calls.append(1) or product(*a))
    actual = run(layer, x, upstream)
    assert len(calls) == 2  # forward and backward
    names = (*NAMES, "a") if scaled else NAMES
    for name, one, other in zip(names, actual, reference(layer, x, upstream, torch.float32), strict=True):
        assert relative(one, other) < 3e-6, name
    monkeypatch.setattr(fused, "pays", lambda *_: False)
    low_rank = run(layer, x, upstream)
    assert len(calls) == 2
    for name, one, other in zip(names, actual, low_rank, strict=True):
        assert relative(one, other) < 3e-6, name


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("keeps_z", [True, False])
def test_gradcheck(keeps_z: bool, groups: int) -> None:
    p = parts(9, 4, 5, 6, groups=groups)
    module = nn.Linear(4, 5).double().requires_grad_(False)
    x, d, b = (p[k].requires_grad_() for k in ("x", "d", "b"))

    def through(x: torch.Tensor, d: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = (x.detach() @ p["A"].t()) if keeps_z else None
        return fused.summed_linear(module, x, z, Factors(p["A"], p["B"], d, b, 0.7))

    assert torch.autograd.gradcheck(through, (x, d, b))
    upstream = torch.randn(9, 5, dtype=torch.float64)
    module.weight.data, module.bias.data = p["W"].clone(), torch.zeros(5, dtype=torch.float64)
    expected = textbook({k: v.detach() for k, v in p.items()}, 0.7, upstream)
    y = through(x, d, b)
    y.backward(upstream)
    for actual, name in ((y.detach(), "y"), (x.grad, "x"), (d.grad, "d"), (b.grad, "b")):
        assert actual is not None and relative(actual, expected[name]) < 1e-12, name


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("by_weight", [True, False])
def test_gradcheck_of_a_scaled_input(by_weight: bool, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = parts(9, 4, 5, 6, groups=groups, scaled=True)
    module = nn.Linear(4, 5, bias=False).double().requires_grad_(False)
    module.weight.data = p["W"].clone()
    monkeypatch.setattr(fused, "_by_weight", lambda *_, **__: by_weight)
    leaves = [p[k].requires_grad_() for k in ("x", "d", "b", "a")]

    def through(x: torch.Tensor, d: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return fused.summed_linear(module, x, None, Factors(p["A"], p["B"], d, b, 0.7, a))

    assert torch.autograd.gradcheck(through, leaves)
    upstream = torch.randn(9, 5, dtype=torch.float64)
    expected = textbook({k: v.detach() for k, v in p.items()}, 0.7, upstream)
    y = through(*leaves)
    y.backward(upstream)
    for actual, name in zip((y.detach(), *(leaf.grad for leaf in leaves)), ("y", "x", "d", "b", "a"), strict=True):
        assert actual is not None and relative(actual, expected[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("groups", "scaled"), [(1, False), (2, True)], ids=["one b", "two b and an a"])
@pytest.mark.parametrize("rank", WAYS.values(), ids=WAYS)
def test_in_sixteen_bits_it_is_as_close_to_the_reference_as_the_low_rank_path(
    rank: int, groups: int, scaled: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = adapted("nf4+dq-bfloat16", dtype, rank=rank, groups=groups, scaled=scaled)
    torch.manual_seed(5)
    x, upstream = torch.randn(2, TOKENS // 2, IN).to(dtype), torch.randn(2, TOKENS // 2, OUT).to(dtype)
    expected = reference(layer, x, upstream, dtype)
    taken = run(layer, x, upstream)
    monkeypatch.setattr(fused, "summed_weight", no_product)
    monkeypatch.setattr(fused, "pays", lambda *_: False)
    low_rank = run(layer, x, upstream)
    names = (*NAMES, "a") if scaled else NAMES
    for name, one, other, truth in zip(names, taken, low_rank, expected, strict=True):
        assert relative(one, truth) < 1.5 * relative(other, truth) + torch.finfo(dtype).eps / 4, name


def test_few_tokens_and_sixteen_bits_on_cuda_take_the_low_rank_path() -> None:
    shape = 576, 576, 256
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert fused.pays(1024, *shape, dtype)
        assert fused.pays(1024, *shape, dtype, "cuda") is (dtype.itemsize >= 4)
        assert not fused.pays(64, *shape, dtype)
        assert not fused.pays(512, 4096, 4096, 256, dtype)


def test_a_layer_that_holds_its_weight_takes_it_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, tokens = adapted("nf4+dq-bfloat16"), 2 * (IN * OUT // (IN + 2 * OUT) // 2 + 1)
    x, upstream = torch.randn(2, tokens // 2, IN), torch.randn(2, tokens // 2, OUT)
    calls: list[int] = []
    original = fused.summed_linear
    monkeypatch.setattr(fused, "summed_linear", lambda *a: calls.append(1) or original(*a))
    low_rank = run(layer, x, upstream)
    assert not calls
    hold_training_weights(layer, True)
    held = run(layer, x, upstream)
    assert len(calls) == 1
    for name, one, other in zip(NAMES, held, low_rank, strict=True):
        assert relative(one, other) < 3e-6, name
    with torch.no_grad():  # an evaluation goes the same way in every process
        layer(x)
    assert len(calls) == 1
    hold_training_weights(layer, False, builds=1.0)  # the path of a run that began with more memory
    for one, other in zip(held, run(layer, x, upstream), strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 2


def no_product(*_: Any) -> None:
    raise AssertionError("took the product with W + ΔW")


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
    monkeypatch.setattr(fused, "summed_weight", no_product)
    layer(torch.randn(TOKENS, IN)).sum()


def test_what_is_kept_for_backward() -> None:
    for rank, width in ((WAYS["keeps z"], WAYS["keeps z"]), (WAYS["keeps x"], IN)):
        layer = adapted("nf4+dq-bfloat16", rank=rank)
        large: list[tuple[int, ...]] = []

        def pack(tensor: torch.Tensor, large: list[Any] = large) -> torch.Tensor:
            if tensor.shape[:1] == (TOKENS,):
                large.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(torch.randn(TOKENS, IN, requires_grad=True))
        assert large == [(TOKENS, width)]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", LINEARS)
def test_a_held_weight_gives_the_same_numbers_and_is_made_once_a_step(
    kind: str, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, plain = (adapted(kind, rank=WAYS["keeps z"], scaled=scaled) for _ in range(2))
    hold_training_weights(layer, True)
    x, upstream = torch.randn(2, TOKENS // 2, IN), torch.randn(2, TOKENS // 2, OUT)
    calls = []
    product = fused.summed_weight
    for step, vector in enumerate(("qvera_b", "qvera_d"), start=1):
        for each in (layer, plain):
            getattr(each, vector)["default"].data.mul_(1.5)  # no version tells of it
        expected = run(plain, x, upstream)
        with monkeypatch.context() as patch:
            patch.setattr(fused, "summed_weight", lambda *a: calls.append(1) or product(*a))
            for _ in range(2):  # micro-batches
                for one, other in zip(run(layer, x, upstream), expected, strict=True):
                    assert torch.equal(one, other)
        assert len(calls) == step


def test_a_held_weight_notices_another_base_weight_and_another_pair() -> None:
    layer = adapted("linear", rank=WAYS["keeps z"])
    x, upstream = torch.randn(1, TOKENS, IN), torch.randn(1, TOKENS, OUT)
    hold_training_weights(layer, True)
    run(layer, x, upstream)
    changes = (
        lambda: layer.base_layer.weight.mul_(2),
        lambda: layer.qvera_projection["default"].A.mul_(2),
        lambda: setattr(layer.base_layer, "weight", nn.Parameter(torch.randn(OUT, IN), requires_grad=False)),
    )
    for change in changes:
        with torch.no_grad():
            change()
        held = run(layer, x, upstream)
        hold_training_weights(layer, False)
        for one, other in zip(held, run(layer, x, upstream), strict=True):
            assert torch.equal(one, other)
        hold_training_weights(layer, True)
        run(layer, x, upstream)
