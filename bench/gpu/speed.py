"""Seconds a step and peak memory of one case: ours, stock PEFT VeRA, LoRA, or the frozen base. `run.py` starts a process for each.

A step is forward, the same chunked loss for all, and backward, with gradient checkpointing. AdamW's update is left out:
it is the same for all and small. Stock cases run bitsandbytes' own linear, ours the frozen linear.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, VeraConfig, get_peft_model

from bench.common import perturb
from bench.gpu.common import Results, base_on_device, compute_dtype, options, peak_bytes, reset_peak, synchronize
from qvera.adapters import QveraConfig
from qvera.models import linear
from qvera.models.forward import batch_nll

CHUNK_TOKENS = 512
_EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def _lora(rank: int) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(model, LoraConfig(r=rank, **_EVERYWHERE))


def _vera(rank: int) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(model, VeraConfig(r=rank, save_projection=False, **_EVERYWHERE))


def _frozen(model: Any) -> Any:
    linear.freeze_linears(model)
    return model


def _ours(rank: int) -> Callable[[Any], Any]:
    return lambda model: get_peft_model(_frozen(model), QveraConfig(rank=rank, **_EVERYWHERE))


CASES: dict[str, Callable[[Any], Any]] = {
    "frozen, stock": lambda model: model,
    "PEFT LoRA r=16": _lora(16),
    "PEFT VeRA r=256": _vera(256),
    "PEFT VeRA r=1024": _vera(1024),
    "frozen, ours": _frozen,
    "ours r=256": _ours(256),
    "ours r=1024": _ours(1024),
}
"""Name → what makes the case of a base on stock bitsandbytes linears."""


def step(model: Any, tokens: int, device: torch.device) -> None:
    """One forward and backward pass over a row of ``tokens`` tokens."""
    ids = torch.randint(3, 259, (1, tokens), device=device)
    nll, count = batch_nll(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, CHUNK_TOKENS
    )
    (nll / count).backward()
    model.zero_grad(set_to_none=True)


def prepared(case: str, base: Any) -> Any:
    """The model of a case, its trained numbers moved off zero, with gradient checkpointing."""
    model = CASES[case](base)
    perturb(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    # a frozen base has no parameter that wants a gradient: it flows to the embedding's output, in every case
    inner.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return model


def main() -> None:
    args = options(__doc__)
    device, results = torch.device(args.device), Results(args.out, "speed")
    model = prepared(args.case, base_on_device(args.shape, args.layers, device, compute_dtype(device)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for tokens in args.tokens:
        row = {"case": args.case, "shape": args.shape, "tokens": tokens, "trained_numbers": trained}
        try:
            step(model, tokens, device)
            reset_peak(device)
            seconds = []
            for _ in range(args.steps):
                synchronize(device)
                began = time.perf_counter()
                step(model, tokens, device)
                synchronize(device)
                seconds.append(time.perf_counter() - began)
        except torch.OutOfMemoryError:
            results.add(**row, error="out of memory")
            continue
        middle = statistics.median(seconds)
        results.add(**row, step_seconds=middle, step_seconds_min=min(seconds), step_seconds_max=max(seconds),
                    tokens_per_second=tokens / middle, **peak_bytes(device))  # fmt: skip


if __name__ == "__main__":
    main()
