"""Tokens a second of greedy decoding: stock transformers on the 4-bit base, ours on it, and ours with an adapter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench.common import interleaved, perturb
from bench.gpu.common import Results, base_on_disk, options
from qvera.adapters.files.save_load import attach
from qvera.config.schema import AdapterSection, ModelSection
from qvera.evaluation.generate import generate
from qvera.models.loader import load_base

PROMPT_TOKENS = 64


def main() -> None:
    args = options(__doc__)
    device, results = torch.device(args.device), Results(args.out, "decoding")
    base = str(base_on_disk(args))
    new_tokens = max(8, min(128, max(args.tokens) // 16))
    section = ModelSection(path=base)
    plain = load_base(section, device)
    adapted = {r: attach(load_base(section, device).model, AdapterSection(rank=r), base) for r in (256, 1024)}
    for model in adapted.values():
        perturb(model)
        model.requires_grad_(False)  # as `qvera generate` has it; a model in training keeps its memory for the steps
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map={"": device}).eval()
    # an end of turn must not cut an answer short: all cases decode as many tokens
    for model in (stock, plain.model, *adapted.values()):
        model.generation_config.eos_token_id = None
    plain.tokenizer.eos_token_id = None
    for batch in (1, 16):
        prompts = [[3 + (7 * i + j) % 250 for j in range(PROMPT_TOKENS)] for i in range(batch)]
        ids = torch.tensor(prompts, device=device)

        def stock_run(ids: torch.Tensor = ids) -> None:
            stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=2)  # fmt: skip

        def run(model: Any, prompts: list[list[int]] = prompts) -> None:
            generate(model, plain.tokenizer, prompts, max_new_tokens=new_tokens)

        cases: dict[str, Callable[[], Any]] = {
            "stock 4-bit base": stock_run,
            "ours, 4-bit base": functools.partial(run, plain.model),
        }
        cases |= {f"ours, VeRA r={r}": functools.partial(run, model) for r, model in adapted.items()}
        times = interleaved(cases, rounds=3)
        for name, time in times.items():
            results.add(case=name, batch=batch, new_tokens=new_tokens, tokens_per_second=batch * new_tokens / time["median"],
                        over_stock=times["stock 4-bit base"]["median"] / time["median"], **time)  # fmt: skip


if __name__ == "__main__":
    main()
