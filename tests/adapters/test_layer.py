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
from qvera.adapters.projection import uniform_pair
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
    perturb,
    reference,
    relative,
    run,
    times_b,
    weight_bytes,
)

QUANTIZED = ("int8", *FOUR_BIT)


def expected_delta(layer: QveraLinear, adapter: str = "default", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """diag(b) B_k diag(d) A_k in fp64, where A_k and B_k carry their own Kaiming bounds (VeRA, section 3.2)."""
    rank = layer.parts(adapter).rank
    a, b = (torch.from_numpy(m).to(dtype).double() for m in uniform_pair(rank, IN, OUT, 3))
    a, b = a * (6 / IN) ** 0.5, b * (6 / rank) ** 0.5
    if "qvera_a" in layer.vectors(adapter):
        a = a @ torch.diag(layer.vectors(adapter)["qvera_a"].double())
    return (
        times_b(b, layer.vectors(adapter)["qvera_b"].double())
        @ torch.diag(layer.vectors(adapter)["qvera_d"].double())
        @ a
    )


@pytest.mark.parametrize(
    ("scaled", "dtype", "tokens"),  # every pair of two of them
    [(False, torch.float32, 1), (False, torch.bfloat16, 37), (True, torch.float32, 37), (True, torch.bfloat16, 1)],
)
@pytest.mark.parametrize(("kind", "groups"), [*((kind, 1) for kind in KINDS), ("linear", 3), ("nf4+dq-bfloat16", 3)])
def test_output_and_gradients_equal_the_dense_layer(
    kind: str, groups: int, scaled: bool, dtype: torch.dtype, tokens: int
) -> None:
    tolerance = 3e-6 if dtype == torch.float32 else 2e-2
    layer = adapted(kind, dtype, groups=groups, scaled=scaled)
    assert layer.vectors("default")["qvera_b"].shape == ((OUT,) if groups == 1 else (groups, OUT))
    torch.manual_seed(5)
    x, upstream = torch.randn(2, tokens, IN, dtype=dtype), torch.randn(2, tokens, OUT, dtype=dtype)
    actual = run(layer, x, upstream)
    wanted = reference(layer, x, upstream, dtype)
    assert actual[0].dtype == actual[1].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in actual[2:])
    names = ("y", "x", "b", "d", "a") if scaled else ("y", "x", "b", "d")
    for name, one, other in zip(names, actual, wanted, strict=True):
        assert relative(one, other) < tolerance, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    layer = adapted(kind)
    nn.init.zeros_(layer.vectors("default")["qvera_b"])
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, (torch.float32, torch.bfloat16)[i % 2]) for i, kind in enumerate((*KINDS, *KINDS[:4]))]
)
def test_merge_and_unmerge_restore_the_very_bytes(kind: str, dtype: torch.dtype) -> None:
    layer = adapted(kind, dtype)
    base: Any = layer.base_layer
    x = torch.randn(7, IN, dtype=dtype)
    before, plain, with_adapter = weight_bytes(base), base(x), layer(x)
    dense = dense_weight(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.merge()
    said = [str(w.message) for w in caught if "quantized again" in str(w.message)]
    merged_weight = dense_weight(base)
    target = dense + expected_delta(layer, dtype=dtype)
    error = relative(merged_weight, target)
    if kind in QUANTIZED:
        # the warning tells the error that the merge really made
        assert len(said) == 1
        measured = float(re.search(r"relative error (\S+) ", said[0]).group(1))  # type: ignore[union-attr]
        assert measured == pytest.approx(error, rel=0.05)
        assert error < (0.02 if kind == "int8" else 0.25)
    else:
        assert not said
        assert error < (1e-6 if dtype == torch.float32 else 4e-3)
    assert layer.merged
    assert weight_bytes(base) != before
    wanted = x.double() @ merged_weight.t() + (0 if base.bias is None else base.bias.double())
    assert relative(layer(x), wanted) < (1e-5 if dtype == torch.float32 else 1e-2)  # the adapter is not added twice
    if kind in FOUR_BIT:  # bitsandbytes keeps two references to the state, and reads either
        assert base.quant_state is base.weight.quant_state
    layer.unmerge()
    assert not layer.merged
    assert weight_bytes(base) == before
    assert kind not in FOUR_BIT or base.quant_state is base.weight.quant_state
    assert torch.equal(base(x), plain)
    assert torch.equal(layer(x), with_adapter)


@pytest.mark.parametrize("kind", ["linear", "int8", "nf4+dq-bfloat16"])
def test_disabling_a_merged_adapter_gives_the_base_back(kind: str) -> None:
    layer = adapted(kind)
    x = torch.randn(7, IN)
    plain = layer.base_layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), plain)
    assert not layer.merged
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), plain)


def test_unmerging_what_is_not_merged_warns() -> None:
    layer = adapted("linear")
    before = weight_bytes(layer.base_layer)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    assert weight_bytes(layer.base_layer) == before


@pytest.mark.parametrize("kind", ["linear", "conv1d", "int8", "nf4-uint8"])
def test_safe_merge_refuses_nan_and_leaves_the_layer_alone(kind: str) -> None:
    layer = adapted(kind)
    before = weight_bytes(layer.base_layer)
    with torch.no_grad():
        layer.vectors("default")["qvera_b"][3] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.merge(safe_merge=True)
    assert weight_bytes(layer.base_layer) == before
    assert not layer.merged


def test_an_int8_layer_that_bitsandbytes_ran_before_merges_and_unmerges() -> None:
    base = base_layer("int8", freeze=False)
    base(torch.randn(2, IN))  # stock forward: moves rows and scales from the weight into the layer's state
    assert base.weight.CB is None
    assert base.state.CB is not None
    dense = dense_weight(base)
    linear.freeze_linears(base)
    projection = SharedProjection(3, torch.device("cpu"), torch.float32)
    projection.ensure(RANK, IN, OUT)
    layer = QveraLinear(base, "default", projection, QveraConfig(rank=RANK, projection_seed=3))
    perturb(layer)
    x = torch.randn(5, IN)
    wanted = layer(x)
    assert relative(base(x) - base.bias, x.double() @ dense.t()) < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.merge()
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
        delta = sum(expected_delta(layer, name) for name in active)
        wanted = x.double() @ (dense_weight(base) + delta).t() + base.bias.double()
        assert relative(layer(x), wanted) < 1e-5
    before = weight_bytes(base)
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    assert layer.merged_adapters == ["default", "second"]
    assert relative(layer(x), wanted) < 1e-5
    layer.unmerge()
    assert weight_bytes(base) == before


def test_dropout_acts_on_the_adapters_input_only_and_only_in_training() -> None:
    layer = adapted("linear", dropout=0.5)
    x = torch.randn(64, IN)
    layer.eval()
    evaluated = layer(x)
    layer.train()
    torch.manual_seed(2)
    trained = layer(x)
    torch.manual_seed(2)
    kept = torch.nn.functional.dropout(x, 0.5)
    base: Any = layer.base_layer
    wanted = base(x).double() + kept.double() @ expected_delta(layer).t()
    assert relative(trained, wanted) < 1e-5
    assert not torch.allclose(trained, evaluated)
    layer.eval()
    assert torch.equal(layer(x), evaluated)


CASTS = {
    "to(float16)": lambda m: m.to(torch.float16),
    "half": lambda m: m.half(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to(cpu, float16)": lambda m: m.to("cpu", torch.float16),
    "half and back": lambda m: m.half().float(),
    "type(float16)": lambda m: m.type(torch.float16),
}


STORAGES = ["uint8", "bfloat16", "float16", "float32"]


@pytest.mark.parametrize(
    ("cast", "storage"),
    [
        *((cast, STORAGES[i % 4]) for i, cast in enumerate(CASTS)),
    ],
)
def test_a_cast_leaves_packed_bytes_and_fp32_vectors_alone(cast: str, storage: str) -> None:
    layer = adapted(f"nf4+dq-{storage}")
    base: Any = layer.base_layer
    x = torch.randn(9, IN)
    before, wanted = weight_bytes(base), layer(x)
    vectors = {n: p.detach().clone() for n, p in layer.named_parameters() if "qvera" in n}
    CASTS[cast](layer)
    assert weight_bytes(base) == before
    assert base.weight.dtype == getattr(torch, storage)
    for name, parameter in layer.named_parameters():
        if name in vectors:
            assert parameter.dtype.itemsize >= 4
            assert torch.equal(parameter.float(), vectors[name])
    # computed in the layer's compute dtype, fp32, still; only the bias was rounded, and A and B once
    assert relative(layer(x), wanted) < 5e-3
    assert isinstance(base.weight, bnb.nn.Params4bit)


@pytest.mark.parametrize("cast", ["half", "to(bfloat16)", "float"])
def test_a_cast_of_an_int8_layer_keeps_it_int8(cast: str) -> None:
    layer = adapted("int8")
    base: Any = layer.base_layer
    x = torch.randn(9, IN)
    before, wanted = weight_bytes(base), layer(x)
    CASTS[cast](layer)
    assert weight_bytes(base) == before
    assert base.weight.dtype == torch.int8
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


@pytest.mark.parametrize("tokens", [3, 200])  # below and above where the low-rank path and the sum W + ΔW change form
@pytest.mark.parametrize(("groups", "scaled"), [(1, False), (3, True)])
def test_vectors_cast_to_16_bits_compute_as_they_do_after_reload(tokens: int, groups: int, scaled: bool) -> None:
    """TRL casts everything trainable to bfloat16 on a 4-bit base; a saved adapter is loaded in fp32."""
    torch.manual_seed(5)
    x, upstream = torch.randn(1, tokens, IN), torch.randn(1, tokens, OUT)
    cast, loaded = (adapted("nf4+dq-bfloat16", groups=groups, scaled=scaled) for _ in range(2))
    for name, parameter in cast.named_parameters():
        if "qvera" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
            loaded.get_parameter(name).data = parameter.data.float()
    ours, wanted = run(cast, x, upstream), run(loaded, x, upstream)
    assert torch.equal(ours[0], wanted[0])
    assert torch.equal(ours[1], wanted[1])
    for gradient, exact in zip(ours[2:], wanted[2:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert torch.equal(gradient, exact.to(torch.bfloat16))


@pytest.mark.parametrize("tokens", [3, 600])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "int8", "nf4+dq-bfloat16"])
def test_a_bias_that_is_trained_gets_its_gradient(kind: str, tokens: int) -> None:
    """PEFT's ``bias``: over a quantized base too, and where W + ΔW would be one product."""
    layer = adapted(kind)
    torch.manual_seed(5)
    x, upstream = torch.randn(2, tokens, IN), torch.randn(2, tokens, OUT)
    frozen = run(layer, x, upstream)
    base: Any = layer.base_layer
    base.bias.requires_grad_()
    for one, other in zip(run(layer, x, upstream), frozen, strict=True):
        assert relative(one, other) < 3e-6
    torch.testing.assert_close(base.bias.grad, upstream.sum((0, 1)), rtol=1e-5, atol=1e-4)


WAYS = {"expand": 2, "combined": 40, "summed": 600}  # the number of tokens decides


@pytest.mark.parametrize("tokens", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("dtype", "scaled"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_outputs_can_be_changed_in_place(dtype: torch.dtype, scaled: bool, tokens: int) -> None:
    """`y = layer(x); y += x`, as in transformers' Llama 4."""
    layer = adapted("linear", dtype, scaled=scaled)
    torch.manual_seed(5)
    x, upstream = torch.randn(2, tokens, IN, dtype=dtype), torch.randn(2, tokens, OUT, dtype=dtype)
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
        assert one is not None
        assert torch.equal(one, other)


def test_only_linears_can_be_adapted() -> None:
    projection = SharedProjection(0, torch.device("cpu"), torch.float32)
    for module in (nn.LayerNorm(4), nn.Embedding(4, 4), nn.Conv1d(1, 1, 1)):
        with pytest.raises(TypeError, match=type(module).__name__):
            QveraLinear(module, "default", projection, QveraConfig(rank=2))


# one row of the slow test's grid: every kind, and every pair of dtype, rank and tokens about once
SIZES = [(torch.float32, 1, 63), (torch.bfloat16, 7, 300), (torch.float16, 64, 2), (torch.float32, 257, 300)]


@pytest.mark.parametrize(("kind", "sizes"), [(kind, SIZES[i % len(SIZES)]) for i, kind in enumerate(KINDS)])
def test_ranks_and_tokens_of_every_size(kind: str, sizes: tuple[torch.dtype, int, int]) -> None:
    check_sizes(kind, *sizes)


def check_sizes(kind: str, dtype: torch.dtype, rank: int, tokens: int) -> None:
    layer = adapted(kind, dtype, rank)
    x, upstream = torch.randn(tokens, IN, dtype=dtype), torch.randn(tokens, OUT, dtype=dtype)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    for one, other in zip(run(layer, x, upstream), reference(layer, x, upstream, dtype), strict=True):
        assert relative(one, other) < tolerance
