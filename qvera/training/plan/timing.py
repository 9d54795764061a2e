"""Seconds of a step: a few matrix products are timed on this machine, then all products of the step are counted."""

import math
import time
from collections.abc import Callable

import torch

from qvera.adapters.products.fused import gradient_cost
from qvera.models.quantization import quantized_reader
from qvera.models.stream import CHUNK_BYTES
from qvera.tasks import task_of
from qvera.training.plan.memory import expert_storage_bytes, stream_bytes
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
    times, rates = plan.passes, _rates(plan, device)
    seconds = {part: times * amount / rates[kind] for part, (kind, amount) in _work(plan).items()}
    if plan.streaming.streams and accelerator.has_own_memory(device):
        source = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.empty_like(source, device=device)
        copying = times * stream_bytes(plan) * _seconds(lambda: target.copy_(source, non_blocking=True)) / CHUNK_BYTES
        computing = sum(seconds.values()) - seconds["head and loss"]
        seconds["waiting for streamed layers"] = max(0.0, copying - computing)
    return seconds


def _rates(run: PlannedRun, device: torch.device) -> dict[str, float]:
    """What ``device`` does in a second.

    ``products``: FLOPs of x Wᵀ and g W; ``low rank``: FLOPs of products one side of which is the rank;
    ``dequantization``: 4-bit weights; ``elementwise``: bytes read and written. An accelerator is timed on all linears
    of a layer: less would time the launch of a kernel. On a CPU a piece of one weight is long enough.
    """
    rank, hidden = run.recipe.adapter.rank, run.shape.hidden
    if run.machine.on_gpu:
        tokens, products = min(run.batch.all_tokens, _TOKENS), [(x.n, x.m) for x in run.layer]  # (n, m)
        quantized = [(x.n, x.m) for x in run.layer if x.quantizable]
    else:
        tokens = min(run.batch.all_tokens, _TOKENS_CPU)
        widest = min(run.shape.ff, max(64, int(_FLOPS_CPU / (2 * _TOKENS_CPU * hidden))))
        products = [(hidden, widest)]
        quantized = [(hidden, max(64, min(_WEIGHTS_CPU // hidden, widest)))]
    if run.recipe.model.quantization == "none":
        quantized = []
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
                read()  # one is in memory at a time

        wide = first(inputs, tokens, max(*sides, run.shape.ff))
        numbers = sum(n * m for n, m in products)
        dequantized = sum(n * m for n, m in quantized)
        return {
            "products": 4 * tokens * numbers / _seconds(dense),
            "low rank": 2 * tokens * rank * sum(n + m for n, m in products) / _seconds(low_rank),
            "dequantization": dequantized / _seconds(dequantize) if readers else float("inf"),
            "elementwise": 2 * wide.nbytes / _seconds(lambda: torch.nn.functional.silu(wide)),
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
    made = run.builds_per_pass if run.holds_weights else passes  # how often W + ΔW is made
    flops, low_rank, weights, passed = 0.0, 0.0, 0.0, 0.0
    T, size, section, s, b = run.batch.all_tokens, run.itemsize, run.recipe.adapter, run.shape, run.batch
    for x in run.layer:
        is_summed, pair = run.is_summed(x), 2 * x.m * section.rank * 4  # bytes of B read and C written
        flops += passes * 2 * T * x.n * x.m
        if run.recipe.model.quantization != "none" and x.quantizable:
            weights += (made if is_summed else passes) * x.n * x.m
        if is_summed:
            low_rank += made * 2 * x.n * x.m * section.rank
            low_rank += 2 * gradient_cost(T, x.n, x.m, section.rank, section.input_scale)
            passed += made * (pair + x.n * x.m * size) * 2
        elif x.name in run.adapted_names:
            # z is made, and its gradient spent, once for all readers of the same input
            shared = x.role in ("k_proj", "v_proj", "up_proj") and not section.input_scale
            low_rank += 2 * T * section.rank * ((0 if shared else passes * x.n) + (passes + 1) * x.m)
            passed += (passes + 1) * pair * 2
    for stack in run.layer_experts:
        experts, *sizes, _ = stack.spec
        routed, numbers = T * s.experts_per_token, math.prod(sizes)
        flops += passes * 2 * routed * numbers
        # the experts that rows spread evenly would meet
        met = experts * (1 - (1 - s.experts_per_token / experts) ** T)
        weights += passes * met * numbers if expert_storage_bytes(stack, run) else 0
        if stack.name in {x.name for x in run.adapted_experts}:
            n, m = stack.adapted_spec.in_features, stack.adapted_spec.out_features
            low_rank += 2 * section.rank * (passes * T * n + (passes + 1) * routed * m)
    seen = b.longest_row if b.offsets else b.tokens  # by a token at most: offsets keep it within its row
    attention = (passes - 1 + 2.5) * 4 * b.rows * b.tokens * seen * s.heads * s.head_dim
    # some 12 passes over the stream, 5 over the MLP's inside, 6 over q and k; the same again in each pass
    passed += passes * size * T * (24 * s.hidden + 10 * s.ff + 12 * s.heads * s.head_dim)
    head = 6.0 * T * s.head_numbers if s.head else 4.0 * min(b.trained_tokens, T) * s.vocabulary * s.hidden
    task = task_of(run.recipe)
    more = 1 + task.passes_without_gradient / passes
    head *= (3 + task.passes_without_gradient) / 2 if task.loss_is_trl else 1  # TRL makes logits again
    if run.recipe.model.resident is True:
        weights = 0.0
    return {
        "frozen products": ("products", s.layers * flops * more),
        "dequantization": ("dequantization", s.layers * weights * more),
        "low-rank products": ("low rank", s.layers * low_rank),
        "attention": ("products", s.layers * attention * more),
        "head and loss": ("products", head),
        "elementwise": ("elementwise", s.layers * passed * more),
    }
