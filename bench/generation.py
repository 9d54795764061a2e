"""Tokens per second of greedy generation at batch 1 and 16: stock transformers on the 4-bit base, and ours on the same base.

    python bench/generation.py [--rounds 5] [--new-tokens 32]

SmolLM2-135M in NF4, one compute dtype for all, the same prompt and the same number of new tokens for all, interleaved.
``stock peft lora`` is LoRA r=16 on every linear with stock PEFT, for scale.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bench.common import header, interleaved, perturb, smollm2, write_result
from qvera.adapters.save_load import attach
from qvera.config.sections import AdapterSection, ModelSection
from qvera.evaluation.generate import generating
from qvera.models.loader import load_base, pick_compute_dtype
from qvera.utils import accelerator

DTYPE = pick_compute_dtype("auto", accelerator.current_device())
"""For stock and for ours: bfloat16 where the machine multiplies it fast, else float32 on a CPU."""


def stock(path: str, dtype: torch.dtype = DTYPE) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    path = smollm2()
    section = ModelSection(path=path)
    plain = load_base(section)
    adapted = attach(load_base(section).model, AdapterSection(rank=256), path)
    lora = get_peft_model(stock(path), LoraConfig(r=16, target_modules="all-linear"))
    for model in (adapted, lora):
        perturb(model)
    models: dict[str, Any] = {
        "stock 4-bit base": stock(path),
        "ours, 4-bit base": plain.model,
        "ours, VeRA r=256": adapted,
        "stock peft LoRA r=16": lora,
    }
    messages = [{"role": "user", "content": "Tell me three facts about the moon."}]
    ids = plain.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    result: dict[str, Any] = {**header(), "dtype": str(DTYPE), "tokens_per_second": {}}
    for batch in (1, 16):
        prompt = ids["input_ids"].repeat(batch, 1)

        def run(model: Any, prompt: torch.Tensor = prompt) -> None:
            model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens,
            )  # fmt: skip

        with generating(plain.model), generating(adapted):
            times = interleaved({n: functools.partial(run, m) for n, m in models.items()}, args.rounds)
        speed = {n: batch * args.new_tokens / t["median"] for n, t in times.items()}
        best = speed["stock 4-bit base"]
        result["tokens_per_second"][f"batch {batch}"] = {
            n: {"tokens_per_second": s, "over_stock_base": s / best, **{f"{k}_seconds": v for k, v in times[n].items()}}
            for n, s in speed.items()
        }
        for name, value in speed.items():
            print(f"batch {batch:2}  {name:<22}{value:8.1f} tokens/s   {value / best:.2f} of the stock base")
    print(write_result("generation", result))


if __name__ == "__main__":
    main()
