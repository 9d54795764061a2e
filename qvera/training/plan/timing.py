"""Seconds of a step: a few matrix products are timed on this machine, then all products of the step are counted."""

import time
from collections.abc import Callable

import torch

from qvera.adapters.functional import few_tokens
from qvera.adapters.fused import gradient_cost
from qvera.models import quantization
from qvera.models.copy_stream import CHUNK_BYTES
from qvera.training.plan.plan import Plan
from qvera.training.plan.run import PlannedRun
from qvera.training.plan.streaming import pass_bytes
from qvera.utils import accelerator

_WEIGHTS_PROBED = 2**20
_TOKENS_PROBED = 1024
_FLOPS_PROBED = 30e9
_BUDGET_SECONDS = 0.5


def time_step(plan: Plan, device: torch.device) -> dict[str, float]:
    """Seconds of one optimizer step in parts, from a calibration of ``device`` (2 to 5 seconds).

    With several ranks: of one on a device like this one for each, without what the network takes. Every forward pass of
    the step is taken to be as long as the plan's batch.
    """
    times = plan.passes
    work, rates = _work(plan), _rates(plan, device)
    seconds = {part: times * amount / rates[kind] for part, (kind, amount) in work.items()}
    if plan.streams and accelerator.has_own_memory(device):
        copying = times * pass_bytes(plan) / _copied_per_second(device)
        computing = sum(seconds.values()) - seconds["head and loss"]
        seconds["waiting for streamed layers"] = max(0.0, copying - computing)
    return seconds


def _copied_per_second(device: torch.device) -> float:
    """Bytes from page-locked RAM to ``device``."""
    source = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return CHUNK_BYTES / _seconds(lambda: target.copy_(source, non_blocking=True))


def _rates(run: PlannedRun, device: torch.device) -> dict[str, float]:
    """What ``device`` does in a second.

    ``products``: FLOPs of x Wᵀ at the recipe's tokens and the layers' shapes, in the compute dtype; ``low rank``: of
    x Aᵀ, whose inner or outer side is the rank; ``dequantization``: 4-bit weights made into the compute dtype;
    ``elementwise``: bytes read and written.
    """
    shape, model, dtype = run.shape, run.recipe.model, run.machine.dtype
    # on a GPU anything less than a whole weight and all tokens would time the launch of a kernel
    tokens = run.batch.all_tokens if run.machine.on_gpu else min(run.batch.all_tokens, _TOKENS_PROBED)
    widest = (
        shape.ff
        if run.machine.on_gpu
        else min(shape.ff, max(64, int(_FLOPS_PROBED / (2 * _TOKENS_PROBED * shape.hidden))))
    )
    generator = torch.Generator(device="cpu").manual_seed(0)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(device=device, dtype=dtype)

    x, weight, narrow = drawn(tokens, shape.hidden), drawn(widest, shape.hidden), drawn(run.rank, shape.hidden)
    wide = drawn(tokens, shape.ff)
    dequantized = float("inf")
    if model.quantization in ("nf4", "fp4"):
        side = shape.ff if run.machine.on_gpu else max(64, min(_WEIGHTS_PROBED // shape.hidden, widest))
        layer = quantization.Linear4bit(
            shape.hidden, side, bias=False, compute_dtype=dtype, quant_type=model.quantization,
            compress_statistics=model.double_quant,
        ).to(device)  # fmt: skip
        dequantized = shape.hidden * side / _seconds(lambda: quantization.dequantized_weight(layer, dtype))
    return {
        "products": 2 * tokens * shape.hidden * widest / _seconds(lambda: x @ weight.t()),
        "low rank": 2 * tokens * shape.hidden * run.rank / _seconds(lambda: x @ narrow.t()),
        "dequantization": dequantized,
        "elementwise": 2 * wide.numel() * wide.element_size() / _seconds(lambda: torch.nn.functional.silu(wide)),
    }


def _seconds(run: Callable[[], object]) -> float:
    """The fastest of a few runs; `torch.utils.benchmark` would do, but its import needs setuptools."""
    run()
    accelerator.synchronize()
    best, spent = float("inf"), 0.0
    while spent < _BUDGET_SECONDS:
        began = time.perf_counter()
        run()
        accelerator.synchronize()
        seconds = time.perf_counter() - began
        best, spent = min(best, seconds), spent + seconds
    return best


def _work(run: Plan) -> dict[str, tuple[str, float]]:
    """Parts of one forward and backward pass: the rate of `_rates` that each goes by, and how much there is of it."""
    passes = 3 if run.checkpointing else 2  # forward, recompute, backward
    # how often W + ΔW is made; where it is held, once an optimizer step
    made = 1 / run.passes if run.holds_weights else passes
    flops, low_rank, weights, passed = 0.0, 0.0, 0.0, 0.0
    T, size, section = run.batch.all_tokens, run.itemsize, run.recipe.adapter
    for x in run.layer:
        flops += passes * 2 * T * x.n * x.m
        read = made if run.is_summed(x) else passes
        weights += read * x.n * x.m if run.is_quantized(x) else 0
        if x.name not in run.adapted_names:
            continue
        if run.is_summed(x):
            low_rank += made * 2 * x.n * x.m * run.rank
            passed += made * (2 * x.m * run.rank * 4 + x.n * x.m * size) * 2
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
    seen = b.longest_row if b.offsets else b.tokens  # by a token at most: offsets keep it within its row
    attention = (passes - 1 + 2.5) * 4 * b.rows * b.tokens * seen * s.heads * s.head_dim
    # some 12 passes over the stream, 5 over the MLP's inside, 6 over q and k; the same again in each pass
    passed += passes * size * T * (24 * s.hidden + 10 * s.ff + 12 * s.heads * s.head_dim)
    head = 4 * min(b.trained_tokens, T) * s.vocabulary * s.hidden
    return {
        "frozen products": ("products", s.layers * flops),
        "dequantization": ("dequantization", s.layers * weights),
        "low-rank products": ("low rank", s.layers * low_rank),
        "attention": ("products", s.layers * attention),
        "head and loss": ("products", head),
        "elementwise": ("elementwise", s.layers * passed),
    }
