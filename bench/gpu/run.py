"""Memory and speed on one CUDA GPU, no network: frozen base, ours, stock PEFT VeRA and LoRA, on 7B- and 13B-shaped models in NF4.

    python bench/gpu/run.py --out $OUT/gpu.csv                          # about 10 minutes, stops in time
    python bench/gpu/run.py --device cpu --shapes tiny --tokens 32 64   # what the tests run

Weights are random, quantized layer by layer, so nothing is downloaded. A step is forward, the same chunked loss for
all, backward, with gradient checkpointing; AdamW's update is left out (it is the same and small). Stock cases run on stock
Linear4bit, ours on the frozen linear. ``peak_bytes`` is `torch.cuda.max_memory_allocated` over the timed steps, model
included (on a CPU the largest resident size). Packages that such a machine lacks are carried: bench/gpu/carry.sh.
"""

from __future__ import annotations

import argparse
import csv
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bitsandbytes as bnb  # noqa: E402
from peft import LoraConfig, VeraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from qvera.adapters import QveraConfig  # noqa: E402
from qvera.evaluation.evaluate import batch_nll  # noqa: E402
from qvera.models import linear, quantization
from qvera.utils import memory  # noqa: E402

SHAPES: dict[str, dict[str, int]] = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
CHUNK_TOKENS = 512


def synthetic(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A random Llama of that shape, its linears but the head in NF4 with double quantization, built on ``device``."""
    vocabulary = 32000 if shape in ("7B", "13B") else 320
    config = LlamaConfig(**SHAPES[shape], vocab_size=vocabulary, max_position_embeddings=16384)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).mul_(0.02).to(dtype)

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        parent, _, last = name.rpartition(".")
        layer = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, compress_statistics=True,
            quant_type="nf4", quant_storage=torch.bfloat16, device="meta",
        )  # fmt: skip
        packed, state = bnb.functional.quantize_4bit(
            random(module.out_features, module.in_features), compress_statistics=True, quant_type="nf4",
            quant_storage=torch.bfloat16,
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, compress_statistics=True, quant_type="nf4",
            quant_storage=torch.bfloat16, module=layer, bnb_quantized=True,
        )  # fmt: skip
        layer.quant_state = state
        setattr(model.get_submodule(parent), last, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, last = name.rpartition(".")
            value = (
                torch.ones(parameter.shape, device=device, dtype=dtype) if "norm" in name else random(*parameter.shape)
            )
            setattr(model.get_submodule(parent), last, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.config.use_cache = False
    return model.requires_grad_(False)


def liger(model: Any) -> bool:
    """Liger's RMSNorm, SwiGLU and RoPE in place of transformers', where the package is there and the device is a GPU."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError:
        return False
    apply_liger_kernel_to_llama(model=model, rms_norm=True, swiglu=True, rope=True, cross_entropy=False,
                                fused_linear_cross_entropy=False)  # fmt: skip
    return True


def stock_linears(model: Any) -> Any:
    """Undo `freeze_linears`, so that a stock case runs bitsandbytes' own linear."""
    for module in model.modules():
        if type(module) is linear.FrozenLinear4bit:
            module.__class__ = quantization.Linear4bit
    return model


def cases(names: list[str]) -> dict[str, Callable[[Any], Any]]:
    targets = "all-linear"
    vera = lambda r: VeraConfig(r=r, target_modules=targets, save_projection=False, task_type="CAUSAL_LM")  # noqa: E731
    lora = lambda r: LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM")  # noqa: E731
    ours = lambda r: QveraConfig(rank=r, target_modules=targets, task_type="CAUSAL_LM")  # noqa: E731

    def frozen_ours(model: Any) -> Any:
        linear.freeze_linears(model)
        return model

    everything: dict[str, Callable[[Any], Any]] = {
        "frozen, stock": stock_linears,
        "PEFT LoRA r=16": lambda m: get_peft_model(stock_linears(m), lora(16)),
        "PEFT LoRA r=64": lambda m: get_peft_model(stock_linears(m), lora(64)),
        "PEFT VeRA r=256": lambda m: get_peft_model(stock_linears(m), vera(256)),
        "PEFT VeRA r=1024": lambda m: get_peft_model(stock_linears(m), vera(1024)),
        "frozen, ours": frozen_ours,
        "ours r=256": lambda m: get_peft_model(m, ours(256)),
        "ours r=1024": lambda m: get_peft_model(m, ours(1024)),
        "ours r=256 + Liger": lambda m: get_peft_model(m, ours(256)) if liger(m) else None,
    }
    return {n: make for n, make in everything.items() if not names or any(part in n for part in names)}


def perturb(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.private_bytes()


def one_case(model: Any, tokens: int, steps: int, device: torch.device) -> tuple[list[float], int]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    embeddings = inner.get_input_embeddings()
    ids = torch.randint(3, inner.config.vocab_size, (1, tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    # the frozen base has no parameter that wants a gradient: let it flow to the embeddings' output, in every case
    handle = embeddings.register_forward_hook(lambda m, i, out: out.requires_grad_())
    seconds = []
    try:
        for step in range(steps + 1):
            if step == 1 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            nll, count = batch_nll(model, batch, CHUNK_TOKENS)
            (nll / count).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if step:
                seconds.append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    finally:
        handle.remove()
    return seconds, peak_bytes(device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.csv"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["7B", "13B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=[], help="parts of case names")
    parser.add_argument("--limit-seconds", type=float, default=560.0, help="start no further case after this")
    args = parser.parse_args(arguments)
    began = time.perf_counter()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    facts = {"device": memory.device_name(device), "python": platform.python_version()}
    facts |= {
        k: v for k, v in memory.versions().items() if k in ("torch", "transformers", "bitsandbytes", "peft", "qvera")
    }
    columns = ["shape", "case", "tokens", "step_seconds", "step_seconds_min", "step_seconds_max", "tokens_per_second",
               "peak_bytes", "trained_numbers", "error", *facts]  # fmt: skip
    rows = 0
    with open(args.out, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        for shape in args.shapes:
            base = synthetic(shape, device, dtype)
            for name, make in cases(args.cases).items():
                if time.perf_counter() - began > args.limit_seconds:
                    print(f"{shape} {name}: left out, the time is up", file=sys.stderr)
                    continue
                model = make(base)
                if model is None:
                    print(f"{shape} {name}: left out, the package is not here", file=sys.stderr)
                    continue
                perturb(model)
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                for tokens in args.tokens:
                    row: dict[str, Any] = {
                        "shape": shape,
                        "case": name,
                        "tokens": tokens,
                        "trained_numbers": trained,
                        **facts,
                    }
                    try:
                        seconds, peak = one_case(model, tokens, args.steps, device)
                        middle = statistics.median(seconds)
                        row |= {"step_seconds": f"{middle:.5f}", "step_seconds_min": f"{min(seconds):.5f}",
                                "step_seconds_max": f"{max(seconds):.5f}", "tokens_per_second": f"{tokens / middle:.1f}",
                                "peak_bytes": peak}  # fmt: skip
                    except torch.OutOfMemoryError:
                        row["error"] = "out of memory"
                    writer.writerow(row)
                    handle.flush()
                    rows += 1
                    print({k: row.get(k) for k in columns[:8]}, file=sys.stderr)
                if hasattr(model, "unload"):
                    model.unload()
                del model
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            del base
            gc.collect()
    print(f"{rows} rows in {args.out}, {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
