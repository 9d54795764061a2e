"""One adapted layer over every kind of frozen base: output, gradients, merge, dropout, casts."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qvera.adapters import QveraConfig, QveraLinear, SharedProjection
from qvera.models import linear
from tests.adapters.helpers import (
    FOUR_BIT,
    IN,
    KINDS,
    OUT,
    RANK,
    adapted,
    base_layer,
    dense_weight,
    exact_parts,
    perturb,
    reference,
    relative,
    run,
    summed_weight,
    weight_bytes,
)

SOME = ("linear", "conv1d", "int8", "nf4+dq-bfloat16")
SIZES = [  # dtype, rank, tokens, b_groups, whether with an a: one token and many, a rank of one and above the width
    (torch.float32, RANK, 1, 1, False), (torch.bfloat16, RANK, 37, 3, False), (torch.float32, RANK, 37, 1, True),
    (torch.bfloat16, RANK, 1, 3, True), (torch.float32, 1, 63, 1, False), (torch.float16, 64, 2, 1, False),
    (torch.float32, 257, 300, 1, False), (torch.bfloat16, 7, 300, 1, False),
]  # fmt: skip
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randn(2, tokens, IN, dtype=dtype), torch.randn(2, tokens, OUT, dtype=dtype)


def change(layer: QveraLinear, adapter: str = "default", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """ΔW in fp64."""
    p = exact_parts(layer, dtype, adapter)
    return summed_weight(p, 1.0) - p["W"]


def quietly_merged(layer: QveraLinear) -> list[str]:
    """What merging warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.merge()
    return [str(w.message) for w in caught if "quantized again" in str(w.message)]


@pytest.mark.parametrize(
    ("kind", "size"),
    [(kind, SIZES[(i + 3 * j) % 8]) for i, kind in enumerate(KINDS) for j in range(8 if kind in SOME[::3] else 3)],
)
def test_output_and_gradients_equal_the_dense_layer(kind: str, size: tuple[torch.dtype, int, int, int, bool]) -> None:
    dtype, rank, tokens, groups, scaled = size
    layer = adapted(kind, dtype, rank, groups=groups, scaled=scaled)
    x, upstream = inputs(tokens, dtype)
    actual, wanted = run(layer, x, upstream), reference(layer, x, upstream, dtype)
    assert actual[0].dtype == actual[1].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in actual[2:])
    names = ("y", "x", "b", "d", "a") if scaled else ("y", "x", "b", "d")
    for name, one, other in zip(names, actual, wanted, strict=True):
        assert relative(one, other) < TOLERANCE[dtype], name
    nn.init.zeros_(layer.vectors("default")["qvera_b"])  # as an adapter begins
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(("kind", "dtype"), [(k, (torch.float32, torch.bfloat16)[i % 2]) for i, k in enumerate(KINDS)])
def test_merge_and_unmerge_restore_the_very_bytes(kind: str, dtype: torch.dtype) -> None:
    layer = adapted(kind, dtype)
    base: Any = layer.base_layer
    x = torch.randn(7, IN, dtype=dtype)
    before, plain, with_adapter = weight_bytes(base), base(x), layer(x)
    target = dense_weight(base) + change(layer, dtype=dtype)
    said = quietly_merged(layer)
    error = relative(dense_weight(base), target)
    if kind in ("int8", *FOUR_BIT):
        # the warning tells the error that the merge really made
        (warning,) = said
        measured = re.search(r"relative error (\S+) ", warning)
        assert measured and float(measured.group(1)) == pytest.approx(error, rel=0.05)
        assert error < (0.02 if kind == "int8" else 0.25)
    else:
        assert not said and error < (1e-6 if dtype == torch.float32 else 4e-3)
    assert layer.merged and weight_bytes(base) != before
    wanted = x.double() @ dense_weight(base).t() + (0 if base.bias is None else base.bias.double())
    assert relative(layer(x), wanted) < (1e-5 if dtype == torch.float32 else 1e-2)  # the adapter is not added twice
    # bitsandbytes keeps two references to the state, and reads either
    assert kind not in FOUR_BIT or base.quant_state is base.weight.quant_state
    layer.unmerge()
    assert not layer.merged and weight_bytes(base) == before
    assert kind not in FOUR_BIT or base.quant_state is base.weight.quant_state
    assert torch.equal(base(x), plain) and torch.equal(layer(x), with_adapter)


@pytest.mark.parametrize("kind", SOME)
def test_disabling_a_merged_adapter_gives_the_base_back(kind: str) -> None:
    layer = adapted(kind)
    x = torch.randn(7, IN)
    plain = layer.base_layer(x)
    quietly_merged(layer)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), plain) and not layer.merged
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), plain)


@pytest.mark.parametrize("kind", SOME)
def test_safe_merge_refuses_nan_and_leaves_the_layer_alone(kind: str) -> None:
    layer = adapted(kind)
    before = weight_bytes(layer.base_layer)
    layer.vectors("default")["qvera_b"].data[3] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.merge(safe_merge=True)
    assert weight_bytes(layer.base_layer) == before and not layer.merged


def test_an_int8_layer_that_bitsandbytes_ran_before_merges_and_unmerges() -> None:
    base = base_layer("int8", freeze=False)
    base(torch.randn(2, IN))  # stock forward: moves rows and scales from the weight into the layer's state
    assert base.weight.CB is None and base.state.CB is not None
    dense = dense_weight(base)
    linear.freeze_linears(base)
    projection = SharedProjection(3, torch.device("cpu"), torch.float32)
    projection.ensure(RANK, IN, OUT)
    layer = perturb(QveraLinear(base, "default", projection, QveraConfig(rank=RANK, projection_seed=3)))
    x = torch.randn(5, IN)
    wanted = layer(x)
    assert relative(base(x) - base.bias, x.double() @ dense.t()) < 1e-6
    quietly_merged(layer)
    assert relative(layer(x), wanted) < 0.05
    layer.unmerge()
    assert torch.equal(layer(x), wanted)


def test_two_adapters_add_up_and_merge_together() -> None:
    layer = adapted("linear")
    layer.update_layer("second", layer.qvera_projection["default"], QveraConfig(rank=7, projection_seed=3))
    perturb(layer, seed=9, adapter="second")
    x = torch.randn(5, IN)
    base: Any = layer.base_layer
    for active in (["default"], ["second"], ["default", "second"]):
        layer.set_adapter(active)
        delta = sum(change(layer, name) for name in active)
        wanted = x.double() @ (dense_weight(base) + delta).t() + base.bias.double()
        assert relative(layer(x), wanted) < 1e-5
    before = weight_bytes(base)
    for name in active:
        layer.merge(adapter_names=[name])
    assert layer.merged_adapters == ["default", "second"]
    assert relative(layer(x), wanted) < 1e-5
    layer.unmerge()
    assert weight_bytes(base) == before


def test_dropout_acts_on_the_adapters_input_only_and_only_in_training() -> None:
    layer = adapted("linear", dropout=0.5)
    x = torch.randn(64, IN)
    evaluated = layer.eval()(x)
    torch.manual_seed(2)
    trained = layer.train()(x)
    torch.manual_seed(2)
    kept = nn.functional.dropout(x, 0.5)
    wanted = layer.base_layer(x).double() + kept.double() @ change(layer).t()
    assert relative(trained, wanted) < 1e-5
    assert not torch.allclose(trained, evaluated)
    assert torch.equal(layer.eval()(x), evaluated)


CASTS = {
    "to(float16)": lambda m: m.to(torch.float16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to(cpu, float16)": lambda m: m.to("cpu", torch.float16),
    "half and back": lambda m: m.half().float(),
    "type(float16)": lambda m: m.type(torch.float16),
}
STORED = ("nf4+dq-uint8", "nf4+dq-bfloat16", "int8", "nf4+dq-float16", "nf4+dq-float32")


@pytest.mark.parametrize(
    ("cast", "kind"), [*((cast, STORED[i % 5]) for i, cast in enumerate(CASTS)), ("half", "int8"), ("float", "int8")]
)
def test_a_cast_leaves_packed_bytes_and_fp32_vectors_alone(cast: str, kind: str) -> None:
    layer = adapted(kind)
    base: Any = layer.base_layer
    x = torch.randn(9, IN)
    before, wanted = weight_bytes(base), layer(x)
    vectors = {n: p.detach().clone() for n, p in layer.named_parameters() if "qvera" in n}
    CASTS[cast](layer)
    assert weight_bytes(base) == before
    assert base.weight.dtype == (torch.int8 if kind == "int8" else getattr(torch, kind.rpartition("-")[2]))
    assert isinstance(base.weight, bnb.nn.Int8Params if kind == "int8" else bnb.nn.Params4bit)
    for name, vector in vectors.items():
        parameter = layer.get_parameter(name)
        assert parameter.dtype.itemsize >= 4 and torch.equal(parameter.float(), vector)
    # computed in the layer's compute dtype, fp32, still; only the bias was rounded, and A and B once
    assert relative(layer(x), wanted) < 5e-3


def test_a_deep_copy_is_independent() -> None:
    layer = adapted("nf4+dq-bfloat16")
    x = torch.randn(3, IN)
    wanted = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), wanted)
    perturb(other, seed=8)
    assert not torch.equal(other(x), wanted)
    assert torch.equal(layer(x), wanted)


def test_autocast_runs_the_low_rank_path_in_its_dtype() -> None:
    layer = adapted("linear")
    x = torch.randn(5, IN)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert 1e-5 < relative(y, exact) < 2e-2


@pytest.mark.parametrize(("tokens", "groups", "scaled"), [(2, 1, False), (2, 3, True), (100, 1, False), (100, 3, True)])
def test_vectors_cast_to_16_bits_compute_as_they_do_after_reload(tokens: int, groups: int, scaled: bool) -> None:
    """TRL casts everything trainable to bfloat16 on a 4-bit base; a saved adapter is loaded in fp32."""
    cast, loaded = (adapted("nf4+dq-bfloat16", groups=groups, scaled=scaled) for _ in range(2))
    for name, parameter in cast.named_parameters():
        if "qvera" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
            loaded.get_parameter(name).data = parameter.data.float()
    ours, wanted = (run(layer, *inputs(tokens)) for layer in (cast, loaded))
    assert torch.equal(ours[0], wanted[0]) and torch.equal(ours[1], wanted[1])
    for gradient, exact in zip(ours[2:], wanted[2:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, exact.to(torch.bfloat16))


@pytest.mark.parametrize(("kind", "tokens"), [("linear", 3), *((kind, 600) for kind in SOME[1:])])
def test_a_bias_that_is_trained_gets_its_gradient(kind: str, tokens: int) -> None:
    """PEFT's ``bias``: over a quantized base too, and where W + ΔW would be one product."""
    layer = adapted(kind)
    x, upstream = inputs(tokens)
    frozen = run(layer, x, upstream)
    base: Any = layer.base_layer
    base.bias.requires_grad_()
    for one, other in zip(run(layer, x, upstream), frozen, strict=True):
        assert relative(one, other) < 3e-6
    torch.testing.assert_close(base.bias.grad, upstream.sum((0, 1)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokens", [2, 40, 600], ids=["expand", "combined", "summed"])  # the number decides
@pytest.mark.parametrize(("dtype", "scaled"), [(torch.float32, True), (torch.bfloat16, False)])
def test_outputs_can_be_changed_in_place(dtype: torch.dtype, scaled: bool, tokens: int) -> None:
    """`y = layer(x); y += x`, as in transformers' Llama 4."""
    layer = adapted("linear", dtype, scaled=scaled)
    x, upstream = inputs(tokens, dtype)
    results = []
    for in_place in (True, False):
        layer.zero_grad()
        inner = x.clone().requires_grad_()
        y = layer(inner)
        y = y.mul_(2).add_(1) if in_place else y * 2 + 1
        y.backward(upstream)
        results.append([y.detach(), inner.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) == (5 if scaled else 4)
    for one, other in zip(*results, strict=True):
        assert one is not None and torch.equal(one, other)


def test_only_linears_can_be_adapted() -> None:
    projection = SharedProjection(0, torch.device("cpu"), torch.float32)
    for module in (nn.LayerNorm(4), nn.Embedding(4, 4), nn.Conv1d(1, 1, 1)):
        with pytest.raises(TypeError, match=type(module).__name__):
            QveraLinear(module, "default", projection, QveraConfig(rank=2))


@pytest.mark.parametrize("tokens", [2, 2000])
def test_hooks_of_the_base_layer_run_whatever_the_number_of_tokens(tokens: int) -> None:
    layer = adapted("linear", rank=1)
    perturb(layer)
    x, _ = inputs(tokens)
    expected, calls = layer(x), []
    hook = layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    hook.remove()
    assert len(calls) == 1
