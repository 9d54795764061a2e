"""Seconds of a step: a few matrix products are timed on this machine, then all products of the step are counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qvera.adapters.functional import few_tokens
from qvera.adapters.fused import gradient_cost
from qvera.models import quantization
from qvera.training.plan.run import PlannedRun

_WEIGHTS_PROBED = 2**20
_BUDGET_SECONDS = 0.5
_TOKENS_PROBED = 1024


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second.

    Attributes:
        product_flops: of x Wᵀ at the recipe's tokens and the layers' shapes, in the compute dtype.
        rank_flops: of x Aᵀ, whose inner or outer side is the rank.
        dequantized_weights: 4-bit weights made into the compute dtype.
        passes_bytes: read and written by an elementwise operation.
    """

    product_flops: float
    rank_flops: float
    dequantized_weights: float
    passes_bytes: float


def calibrate(run: PlannedRun, device: torch.device) -> Rates:
    """Time representative products on ``device``: 2 to 5 seconds on two cores."""
    dtype, tokens = run.machine.dtype, min(run.batch.all_tokens, _TOKENS_PROBED)
    shape = run.shape
    widest = min(shape.ff, _largest_side(shape.hidden))
    generator = torch.Generator(device="cpu").manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(device=device, dtype=dtype)

    x, weight, narrow = drawn(tokens, shape.hidden), drawn(widest, shape.hidden), drawn(run.rank, shape.hidden)
    wide = drawn(tokens, shape.ff)
    product = _seconds(lambda: x @ weight.t(), device)
    rank = _seconds(lambda: x @ narrow.t(), device)
    elementwise = _seconds(lambda: torch.nn.functional.silu(wide), device)
    weights_per_second = float("inf")
    if run.recipe.model.quantization in ("nf4", "fp4"):
        side = max(64, min(_WEIGHTS_PROBED // shape.hidden, widest))
        layer = quantization.Linear4bit(
            shape.hidden, side, bias=False, compute_dtype=dtype, quant_type=run.recipe.model.quantization,
            compress_statistics=run.recipe.model.double_quant,
        ).to(device)  # fmt: skip
        one = _seconds(lambda: quantization.dequantized_weight(layer, dtype), device)
        weights_per_second = shape.hidden * side / one
    return Rates(
        2 * tokens * shape.hidden * widest / product,
        2 * tokens * shape.hidden * run.rank / rank,
        weights_per_second,
        2 * wide.numel() * wide.element_size() / elementwise,
    )


def _largest_side(hidden: int) -> int:
    """A side that keeps one probed product below some 30 GFLOP whatever the model."""
    return max(64, int(30e9 / (2 * _TOKENS_PROBED * hidden)))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few runs within `_BUDGET_SECONDS`."""
    run()
    best, spent = float("inf"), 0.0
    while spent < _BUDGET_SECONDS:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
        best, spent = min(best, took), spent + took
    return best


def step_seconds(run: PlannedRun, rates: Rates, times: int) -> dict[str, float]:
    """Seconds of one optimizer step, in parts. Counted: products, dequantization, attention, elementwise passes.

    Every one of the step's forward passes (``times``) is taken to be as long as the batch of the plan.
    """
    passes = 3 if run.recipe.training.gradient_checkpointing else 2  # forward, recompute, backward
    flops, low_rank, weights, passed = 0.0, 0.0, 0.0, 0.0
    T, size, section = run.batch.all_tokens, run.itemsize, run.recipe.adapter
    for x in run.layer:
        flops += passes * 2 * T * x.n * x.m
        weights += passes * x.n * x.m if run.is_quantized(x) else 0
        if x.name not in run.adapted_names:
            continue
        if run.is_summed(x):
            low_rank += passes * 2 * x.n * x.m * run.rank
            passed += passes * (2 * x.m * run.rank * 4 + x.n * x.m * size) * 2
            low_rank += 2 * gradient_cost(T, x.n, x.m, run.rank, section.input_scale)
        else:
            # z is made, and its gradient spent, once for all readers of the same input
            shared = x.role in ("k_proj", "v_proj", "up_proj") and not section.input_scale
            low_rank += 0 if shared else passes * 2 * T * run.rank * x.n
            low_rank += (passes + 1) * 2 * T * run.rank * x.m
            if not few_tokens(T, torch.empty(x.m, run.rank, device="meta"), section.b_groups):
                passed += passes * 2 * x.m * run.rank * 4 * 2
            passed += 2 * x.m * run.rank * 4 * 2
    s, b = run.shape, run.batch
    attention = (passes - 1 + 2.5) * 4 * b.rows * b.tokens**2 * s.heads * s.head_dim
    # some 12 passes over the stream, 5 over the MLP's inside, 6 over q and k; the same again in each pass
    passed += passes * size * T * (24 * s.hidden + 10 * s.ff + 12 * s.heads * s.head_dim)
    head = 4 * min(b.trained_tokens, T) * s.vocabulary * s.hidden
    return {
        "frozen products": times * (s.layers * flops) / rates.product_flops,
        "dequantization": times * s.layers * weights / rates.dequantized_weights,
        "low-rank products": times * s.layers * low_rank / rates.rank_flops,
        "attention": times * s.layers * attention / rates.product_flops,
        "head and loss": times * head / rates.product_flops,
        "elementwise": times * s.layers * passed / rates.passes_bytes,
    }
