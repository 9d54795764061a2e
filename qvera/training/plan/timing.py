"""Seconds of a step: a few matrix products are timed on this machine, then all products of the step are counted."""

import time
from collections.abc import Callable

import torch

from qvera.adapters.products.functional import few_tokens
from qvera.adapters.products.fused import gradient_cost
from qvera.models.quantization import quantized_reader
from qvera.models.stream import CHUNK_BYTES
from qvera.training.plan.memory import stream_bytes
from qvera.training.plan.plan import Plan
from qvera.training.plan.run import PlannedRun
from qvera.utils import accelerator

_TOKENS = 4096  # enough for an accelerator's full rate, and a bound on the memory that the timing takes
_WEIGHTS_CPU, _TOKENS_CPU, _FLOPS_CPU = 2**20, 1024, 30e9
_BUDGET_SECONDS = 0.5


def time_step(plan: Plan, device: torch.device) -> dict[str, float]:
    """Seconds of one optimizer step in parts, from a calibration of ``device`` (2 to 5 seconds).

    Each rank is taken to have such a device; the network is left out. Every pass is taken to be the plan's batch.
    """
    times = plan.passes
    work, rates = _work(plan), _rates(plan, device)
    seconds = {part: times * amount / rates[kind] for part, (kind, amount) in work.items()}
    if plan.streams and accelerator.has_own_memory(device):
        source = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=device)
        per_second = CHUNK_BYTES / _seconds(lambda: target.copy_(source, non_blocking=True))
        copying = times * stream_bytes(plan) / per_second
        computing = sum(seconds.values()) - seconds["head and loss"]
        seconds["waiting for streamed layers"] = max(0.0, copying - computing)
    return seconds


def _rates(run: PlannedRun, device: torch.device) -> dict[str, float]:
    """What ``device`` does in a second.

    ``products``: FLOPs of x Wᵀ and g W; ``low rank``: FLOPs of products one side of which is the rank;
    ``dequantization``: 4-bit weights; ``elementwise``: bytes read and written. An accelerator is timed on all linears
    of a layer: less would time the launch of a kernel. On a CPU a piece of one weight is long enough.
    """
    tokens, rank = min(run.batch.all_tokens, _TOKENS if run.machine.on_gpu else _TOKENS_CPU), run.rank
    products = quantized = [(x.n, x.m) for x in run.layer]  # (in_features, out_features)
    if run.machine.on_gpu:
        quantized = [(x.n, x.m) for x in run.layer if run.is_quantized(x)]
    else:
        hidden = run.shape.hidden
        widest = min(run.shape.ff, max(64, int(_FLOPS_CPU / (2 * _TOKENS_CPU * hidden))))
        products = [(hidden, widest)]
        rows = max(64, min(_WEIGHTS_CPU // hidden, widest))
        quantized = [] if run.recipe.model.quantization == "none" else [(hidden, rows)]
    sides = {side for sizes in (*products, *quantized) for side in sizes}

    def drawn(numbers: int) -> torch.Tensor:
        return torch.randn(numbers, device=device, dtype=run.machine.dtype)

    def first(numbers: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return numbers[: rows * columns].view(rows, columns)

    with accelerator.forked_random_state():
        weights = drawn(max(n * m for n, m in (*products, *quantized)))
        inputs, narrow = drawn(tokens * max(*sides, run.shape.ff)), drawn(max(tokens, *sides) * rank)
        readers = [quantized_reader(first(weights, m, n), run.recipe.model) for n, m in quantized]

        def dense() -> None:
            for n, m in products:
                torch.mm(first(inputs, tokens, n), first(weights, m, n).t())
                torch.mm(first(inputs, tokens, m), first(weights, m, n))

        def low_rank() -> None:
            for n, m in products:
                torch.mm(first(inputs, tokens, n), first(narrow, rank, n).t())  # z = x Aᵀ
                torch.mm(first(narrow, tokens, rank), first(narrow, m, rank).t())  # z Cᵀ

        def dequantize() -> None:
            for read in readers:
                read()

        wide = first(inputs, tokens, max(*sides, run.shape.ff))
        return {
            "products": _rate(4 * tokens * sum(n * m for n, m in products), dense),
            "low rank": _rate(2 * tokens * rank * sum(n + m for n, m in products), low_rank),
            "dequantization": _rate(sum(n * m for n, m in quantized), dequantize),
            "elementwise": _rate(2 * wide.numel() * wide.itemsize, lambda: torch.nn.functional.silu(wide)),
        }


def _rate(amount: float, run: Callable[[], object]) -> float:
    """``amount`` per second of ``run``; infinite for nothing, which takes no time."""
    return amount / _seconds(run) if amount else float("inf")


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
    made = run.builds_per_pass if run.holds_weights else passes  # how often W + ΔW is made
    flops, low_rank, weights, passed = 0.0, 0.0, 0.0, 0.0
    T, size, section = run.batch.all_tokens, run.itemsize, run.recipe.adapter
    for x in run.layer:
        flops += passes * 2 * T * x.n * x.m
        weights += (made if run.is_summed(x) else passes) * x.n * x.m if run.is_quantized(x) else 0
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
    head = 6.0 * T * s.head_numbers if s.head else 4.0 * min(b.trained_tokens, T) * s.vocabulary * s.hidden
    without_gradient = run.task.passes_without_gradient
    more = 1 + without_gradient / passes
    head *= (3 + without_gradient) / 2 if run.task.loss_is_trl else 1  # TRL makes logits again
    return {
        "frozen products": ("products", s.layers * flops * more),
        "dequantization": ("dequantization", s.layers * weights * more),
        "low-rank products": ("low rank", s.layers * low_rank),
        "attention": ("products", s.layers * attention * more),
        "head and loss": ("products", head),
        "elementwise": ("elementwise", s.layers * passed * more),
    }
