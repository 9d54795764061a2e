"""The frozen linear: right forward and backward, the weight read again, and nothing that an evaluation could spoil."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from qvera.adapters.products import fused
from qvera.adapters.save_load import attach, named_vectors
from qvera.config.sections import AdapterSection, ModelSection
from qvera.evaluation.generate import generate, generating
from qvera.models import linear, quantization
from qvera.models.linear import WeightBlocks, blocked_input_grad, blocked_linear
from qvera.models.loader import load_base
from tests.adapters.helpers import FOUR_BIT, IN, OUT, adapted, base_layer, dense_weight, perturb, relative, weight_bytes

QUANTIZED = ("int8", *FOUR_BIT)
IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3], [8, 8, 30, 1, 99, 4, 250, 6]])
HAS_FUSED_KERNEL = getattr(bnb.functional, "has_avx512bf16", lambda: False)()
needs_fused_kernel = pytest.mark.skipif(not HAS_FUSED_KERNEL, reason="this CPU has no AVX512-BF16")


def gradient(layer: Any, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_forward_and_backward_are_those_of_the_dequantized_weight(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """And nothing is saved for backward, in which the weight is read again."""
    layer = base_layer(kind, dtype)
    W = dense_weight(layer)
    for tokens in (1, 65):
        x, upstream = torch.randn(2, tokens, IN, dtype=dtype), torch.randn(2, tokens, OUT, dtype=dtype)
        with torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("a tensor was saved"), lambda t: t):
            y, grad = gradient(layer, x, upstream)
        assert y.dtype == grad.dtype == dtype
        assert relative(y, x.double() @ W.t() + layer.bias.double()) < tolerance
        assert relative(grad, upstream.double() @ W) < tolerance
        with torch.no_grad():
            assert relative(layer(x), y) < tolerance
    again = base_layer(kind, dtype)
    again.weight = quantization.requantized(layer, W.float())
    if kind == "int8":
        again.state.CB = None
    else:
        again.quant_state = again.weight.quant_state
    assert relative(dense_weight(again), W) < (0.03 if "fp4" in kind else 0.01)  # quantizing again is harmless
    assert (again.weight.dtype, again.weight.shape) == (layer.weight.dtype, layer.weight.shape)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_the_product_is_taken_in_the_compute_dtype_and_comes_back_in_the_inputs(compute: torch.dtype) -> None:
    layer, x = base_layer("nf4-uint8", compute), torch.randn(5, IN, dtype=torch.float16)
    W = dense_weight(layer)
    exact = torch.nn.functional.linear(x.to(compute), W.to(compute), layer.bias.to(compute)).to(torch.float16)
    torch.testing.assert_close(layer(x), exact, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5, IN), (2, 5, IN)])
@pytest.mark.parametrize("kind", ["int8", "nf4-uint8", "stored in 16 bits", "by blocks"])
def test_the_output_can_be_changed_in_place(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 4 does it (`out.add_`), and stock linears allow it."""
    layer = base_layer({"stored in 16 bits": "linear", "by blocks": "nf4-uint8"}.get(kind, kind))
    if kind == "stored in 16 bits":
        layer = layer.to(torch.bfloat16)
        layer.__class__ = linear.FrozenLinear
    if kind == "by blocks":
        monkeypatch.setattr(linear, "BLOCK_WEIGHTS", 10 * IN)
    W, bias = dense_weight(layer).float(), layer.bias.float()
    for change in (torch.Tensor.__iadd__, torch.Tensor.mul_):
        x, upstream = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], OUT)
        z = torch.randn_like(upstream, requires_grad=True)
        results = []
        for y in (layer(x), (x @ W.t() + bias).clone()):
            change(y, z)
            results.append((y.detach(), *torch.autograd.grad(y, (x, z), upstream)))
        for one, other in zip(*results, strict=True):
            assert relative(one, other) < 1e-6


def test_backward_reads_the_weight_again() -> None:
    """What ZeRO-3 does: the weight is gone after forward and back before backward. A view kept would keep it alive."""
    layer = base_layer("nf4+dq-bfloat16")
    wanted, packed = torch.ones(5, OUT, dtype=torch.float64) @ dense_weight(layer), layer.weight.data
    x = torch.randn(5, IN, requires_grad=True)
    y = layer(x)
    layer.weight.data = torch.empty(0, dtype=packed.dtype)
    layer.weight.data = packed.clone()
    assert relative(torch.autograd.grad(y.sum(), x)[0], wanted) < 1e-6
    y = layer(x)
    layer.weight.data = base_layer("nf4+dq-bfloat16", seed=1).weight.data
    assert relative(torch.autograd.grad(y.sum(), x)[0], wanted) > 0.1  # reads what is there now


@needs_fused_kernel
def test_a_weight_that_stock_code_repacked_is_refused() -> None:
    layer = base_layer("nf4-uint8", torch.bfloat16, freeze=False)
    with torch.no_grad():
        layer.eval()(torch.randn(6, IN, dtype=torch.bfloat16))
    linear.freeze_linears(layer)
    with pytest.raises(RuntimeError, match="repacked by a bitsandbytes evaluation pass"):
        layer(torch.randn(6, IN, dtype=torch.bfloat16, requires_grad=True))


@needs_fused_kernel
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_inference_layout_answers_alike_and_removes_its_copies(kind: str) -> None:
    layer = base_layer(kind, torch.bfloat16)
    for tokens in (1, 40):
        x, upstream = torch.randn(1, tokens, IN).bfloat16(), torch.randn(1, tokens, OUT).bfloat16()
        with torch.no_grad():
            plain = layer(x)
        trained = gradient(layer, x, upstream)
        with linear.inference_layout(layer):
            assert layer._inference_pack is not None
            with torch.no_grad():
                assert relative(layer(x), plain) < 1e-2
            torch.testing.assert_close(gradient(layer, x, upstream), trained, rtol=0, atol=0)
        assert not hasattr(layer, "_inference_pack")
        with torch.no_grad():
            assert torch.equal(layer(x), plain)


@needs_fused_kernel
def test_inference_layout_cleans_up_after_an_error_nests_and_skips() -> None:
    layers = torch.nn.ModuleList([base_layer("nf4-uint8", torch.bfloat16) for _ in range(3)])

    def packed() -> list[bool]:
        return [hasattr(layer, "_inference_pack") for layer in layers]

    with pytest.raises(KeyError), linear.inference_layout(layers):
        raise KeyError
    assert packed() == [False] * 3
    with linear.inference_layout(layers):
        with linear.inference_layout(layers):
            pass
        assert packed() == [True] * 3
    with linear.inference_layout(layers, skip=[layers[1]]):
        assert packed() == [True, False, True]


def test_freezing_can_be_repeated_and_leaves_dense_linears_and_the_library_alone() -> None:
    model = torch.nn.ModuleList(base_layer(kind, freeze=False) for kind in ("nf4-uint8", "int8", "linear"))
    for _ in range(2):
        linear.freeze_linears(model)
        assert [type(m) for m in model] == [linear.FrozenLinear4bit, linear.FrozenLinear8bit, torch.nn.Linear]
    assert type(base_layer("nf4-uint8", freeze=False)) is bnb.nn.Linear4bit


# The whole model.


def loaded(directory: Path, quantization: Any, compute: Any, **more: Any) -> tuple[Any, Any]:
    section = ModelSection(path=str(directory), quantization=quantization, compute_dtype=compute, **more)
    base = load_base(section, torch.device("cpu"))
    return perturb(attach(base.model, AdapterSection(rank=8))), base.tokenizer


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: vector.grad.clone() for name, vector in named_vectors(model).items()}  # type: ignore[union-attr]


def stored(model: Any) -> list[bytes]:
    kinds = linear.FrozenLinear4bit, linear.FrozenLinear8bit
    return [weight_bytes(m) for m in model.modules() if isinstance(m, kinds)]


@pytest.mark.parametrize(
    ("quantization", "compute"), [("nf4", "bfloat16"), ("fp4", "float32"), ("int8", "bfloat16"), ("none", "float32")]
)
def test_evaluating_and_generating_leave_training_unchanged_to_the_bit(
    tiny_model_dir: Path, quantization: str, compute: str
) -> None:
    model, tokenizer = loaded(tiny_model_dir, quantization, compute)
    model.train()
    before, weights = gradients(model), stored(model)
    assert all(g.norm() > 0 for g in before.values())
    model.eval()
    with torch.no_grad():
        plain = model(IDS).logits
        with generating(model):  # in the layout for answers
            assert relative(model(IDS).logits, plain) < (1e-5 if compute == "float32" else 3e-2)
        assert torch.equal(model(IDS).logits, plain)
    model.train()
    generate(model, tokenizer, [[5, 9, 7], [31]], max_new_tokens=4)
    assert model.training
    assert stored(model) == weights
    torch.testing.assert_close(gradients(model), before, rtol=0, atol=0)


def test_whole_model_casts_leave_packed_bytes_alone(tiny_model_dir: Path) -> None:
    for storage in ("uint8", "float16"):
        model, _ = loaded(tiny_model_dir, "nf4", "float32", quant_storage=storage)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights, plain = stored(model), model(IDS).logits
            for cast in (model.bfloat16, model.half, model.float, lambda m=model: m.to("cpu", torch.float16)):
                cast()
                assert stored(model) == weights
                assert relative(model(IDS).logits, plain) < 3e-2


def four_bit(m: int, n: int, dtype: torch.dtype = torch.float32, bias: bool = False, **settings: Any) -> Any:
    torch.manual_seed(m)
    layer = quantization.Linear4bit(n, m, bias, compute_dtype=dtype, **{"quant_type": "nf4", **settings}).to("cpu")
    linear.freeze_linears(layer)
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    ("m", "n", "kind", "nested", "dtype"),
    [
        (192, 128, "nf4", True, torch.bfloat16),
        (100, 64, "nf4", False, torch.float32),
        (65, 320, "fp4", True, torch.float32),
    ],
)
def test_the_blocks_are_the_weight_to_the_bit_and_so_are_products_by_them(
    m: int, n: int, kind: str, nested: bool, dtype: torch.dtype
) -> None:
    layer = four_bit(m, n, dtype, quant_type=kind, compress_statistics=nested)
    found = list(WeightBlocks(layer, dtype, 7 * n + 3))
    assert [rows.start for rows, _ in found] == list(range(0, m, 7))
    assert torch.equal(torch.cat([weight for _, weight in found]), quantization.dequantized_weight(layer, dtype))
    W, tolerance = quantization.dequantized_weight(layer, torch.float64), 1e-6 if dtype == torch.float32 else 5e-3
    x, g, b = torch.randn(11, n, dtype=dtype), torch.randn(11, m, dtype=dtype), torch.randn(m, dtype=dtype)
    for bias in (None, b):
        y = blocked_linear(x, WeightBlocks(layer, dtype, 5 * n), bias)
        assert y.dtype == dtype
        assert relative(y, x.double() @ W.t() + (0 if bias is None else bias.double())) < tolerance
    out = torch.empty(11, n, dtype=dtype)
    blocked_input_grad(g, WeightBlocks(layer, dtype, 5 * n), out)
    assert relative(out, g.double() @ W) < tolerance


@pytest.mark.parametrize("width", [32, 96, 160])
def test_a_weight_whose_scales_lie_across_rows_is_one_block(width: int) -> None:
    layer = four_bit(64, width)
    ((rows, weight),) = WeightBlocks(layer, torch.float32, width)
    assert rows == slice(0, 64)
    assert torch.equal(weight, quantization.dequantized_weight(layer, torch.float32))


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_large_frozen_linear_goes_by_blocks_and_backward_with_many_tokens_does_not(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "BLOCK_WEIGHTS", 64 * 128)
    monkeypatch.setattr(linear, "_MAX_SUMMED_ELEMENTS", 20 * 128)
    layer = four_bit(128, 128, bias=True)
    assert linear.backward_by_blocks(tokens, 128) is (tokens == 3)
    W, x, g = dense_weight(layer), torch.randn(1, tokens, 128), torch.randn(1, tokens, 128)
    y, grad = gradient(layer, x, g)
    assert relative(y, x.double() @ W.t() + layer.bias) < 1e-5
    assert relative(grad, g.double() @ W) < 1e-5


def test_resident_copies_give_the_same_bits_and_are_dequantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = base_layer("nf4+dq-bfloat16", torch.bfloat16)
    x, upstream = torch.randn(2, 37, IN).bfloat16(), torch.randn(2, 37, OUT).bfloat16()
    plain = gradient(layer, x, upstream)
    quantization.hold_resident(layer)
    wide = quantization.dequantized_weight(layer, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "dequantized_packed", lambda *_: pytest.fail("dequantized again"))
        patch.setattr(quantization, "dequantized_rows", lambda *_: pytest.fail("dequantized again"))
        for one, other in zip(plain, gradient(layer, x, upstream), strict=True):
            assert torch.equal(one, other)
    factors = adapted("nf4+dq-bfloat16", torch.bfloat16).parts("default")
    held = quantization.dequantized_weight(layer, torch.bfloat16).clone()
    fused.summed_weight(layer, factors, torch.bfloat16)
    assert torch.equal(quantization.dequantized_weight(layer, torch.bfloat16), held), "W + ΔW was written into it"
    # a merge quantizes other numbers: the copy is not theirs
    layer.weight = quantization.requantized(layer, 2 * wide)
    layer.quant_state = layer.weight.quant_state
    assert relative(quantization.dequantized_weight(layer, torch.bfloat16), 2 * wide) < 0.02
