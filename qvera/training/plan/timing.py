"""Seconds of a step: a few matrix products are timed on this machine, then all products of the step are counted."""

import time
from collections.abc import Callable

import torch

from qvera.adapters.products.functional import few_tokens
from qvera.adapters.products.fused import gradient_cost
from qvera.models.copy_stream import CHUNK_BYTES
from qvera.models.quantized_values import quantized_reader
from qvera.training.plan.plan import Plan
from qvera.training.plan.run import PlannedRun
from qvera.training.plan.streaming import pass_bytes
from qvera.utils import accelerator

_TOKENS_OF_LAYER = 4096
"""Enough for an accelerator's full rate, and a bound on the memory that the timing takes."""
_WEIGHTS_OF_PIECE, _TOKENS_OF_PIECE, _FLOPS_OF_PIECE = 2**20, 1024, 30e9
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

    ``products``: FLOPs of x Wᵀ and g W at the recipe's tokens and the layers' shapes, in the compute dtype; ``low
    rank``: of products one side of which is the rank; ``dequantization``: 4-bit weights made into the compute dtype;
    ``elementwise``: bytes read and written. On an accelerator each is that of a whole decoder layer: less would time
    the launch of a kernel.
    """
    with accelerator.forked_random_state():
        return (_rates_of_layer if run.machine.on_gpu else _rates_of_piece)(run, device)


def _rates_of_layer(run: PlannedRun, device: torch.device) -> dict[str, float]:
    """All linears of a layer, forward and backward. They share one weight and one input, drawn on the device."""
    layer, dtype, tokens = run.layer, run.machine.dtype, min(run.batch.all_tokens, _TOKENS_OF_LAYER)
    sides = {x.n for x in layer} | {x.m for x in layer}
    weights = torch.randn(max(x.n * x.m for x in layer), dtype=dtype, device=device)
    inputs = torch.randn(tokens * max(sides), dtype=dtype, device=device)
    narrow = torch.randn(max(tokens, *sides) * run.rank, dtype=dtype, device=device)

    def first(numbers: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return numbers[: rows * columns].view(rows, columns)

    def products() -> None:
        for x in layer:
            weight = first(weights, x.m, x.n)
            torch.mm(first(inputs, tokens, x.n), weight.t())
            torch.mm(first(inputs, tokens, x.m), weight)

    def low_rank() -> None:
        for x in layer:
            torch.mm(first(inputs, tokens, x.n), first(narrow, run.rank, x.n).t())  # z = x Aᵀ
            torch.mm(first(narrow, tokens, run.rank), first(narrow, x.m, run.rank).t())  # z Cᵀ

    quantized = [x for x in layer if run.is_quantized(x)]
    readers = [quantized_reader(first(weights, x.m, x.n), run.recipe.model) for x in quantized]

    def dequantize() -> None:
        for read in readers:
            read()

    numbers, wide = sum(x.n * x.m for x in layer), first(inputs, tokens, max(sides))
    return {
        "products": _rate(4 * tokens * numbers, products),
        "low rank": _rate(2 * tokens * run.rank * sum(x.n + x.m for x in layer), low_rank),
        "dequantization": _rate(sum(x.n * x.m for x in quantized), dequantize),
        "elementwise": _elementwise_rate(wide),
    }


def _rates_of_piece(run: PlannedRun, device: torch.device) -> dict[str, float]:
    """On a CPU: some rows of one weight, with at most so many tokens, which is long enough there."""
    hidden, dtype, tokens = run.shape.hidden, run.machine.dtype, min(run.batch.all_tokens, _TOKENS_OF_PIECE)
    widest = min(run.shape.ff, max(64, int(_FLOPS_OF_PIECE / (2 * _TOKENS_OF_PIECE * hidden))))
    x, weight, narrow, wide = (
        torch.randn(*size, device=device).to(dtype)
        for size in ((tokens, hidden), (widest, hidden), (run.rank, hidden), (tokens, run.shape.ff))
    )
    rows = max(64, min(_WEIGHTS_OF_PIECE // hidden, widest))
    read = quantized_reader(torch.randn(rows, hidden, device=device).to(dtype), run.recipe.model)
    return {
        "products": _rate(2 * tokens * hidden * widest, lambda: x @ weight.t()),
        "low rank": _rate(2 * tokens * hidden * run.rank, lambda: x @ narrow.t()),
        "dequantization": _rate(0 if run.recipe.model.quantization == "none" else rows * hidden, read),
        "elementwise": _elementwise_rate(wide),
    }


def _elementwise_rate(numbers: torch.Tensor) -> float:
    return _rate(2 * numbers.numel() * numbers.element_size(), lambda: torch.nn.functional.silu(numbers))


def _rate(amount: float, run: Callable[[], object]) -> float:
    """``amount`` that ``run`` does, by the second; infinite for nothing, which takes no time."""
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
