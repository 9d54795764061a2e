"""Time and memory of one forward + backward: frozen base, ours, stock PEFT VeRA and LoRA, side by side.

    python bench/core.py [--rounds 5] [--rows 4] [--length 256]

SmolLM2-135M (real weights) in NF4, all seven linears, no gradient checkpointing, vectors off zero. ``frozen`` is the model
without an adapter and with gradients flowing to the input embeddings, with stock Linear4bit and with our frozen linear; ratios
are against the faster. ``floor`` is VeRA's products alone: z for each distinct input, the expansion, M, ∂z and ∂x, at the
same shapes in the same dtype. ``kept`` is what autograd keeps for backward (unique storages seen by saved_tensors_hooks,
parameters and buffers excluded).
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from common import header, interleaved, perturb, smollm2, write_result
from generation import stock
from peft import LoraConfig, VeraConfig, get_peft_model

from qvera.evaluate import batch_nll
from qvera.model import attach, load_base
from qvera.recipe import AdapterSection, ModelSection
from qvera.vera import QveraLinear


def kept_bytes(model: Any, run: Any) -> int:
    """Unique storages that autograd saves while ``run()`` goes forward, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    alive = []  # saved tensors are held here, so that no storage is freed and its address counted twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    total = sum(seen.values())
    del loss
    alive.clear()
    gc.collect()
    return total


def floor(model: Any, tokens: int) -> Any:
    """VeRA's products alone, at the shapes of this model's layers."""
    shared: dict[int, tuple[torch.Tensor, ...]] = {}
    work = []
    for layer in (m for m in model.modules() if isinstance(m, QveraLinear)):
        A, B, *_ = layer.parts("default")
        n, m = layer.in_features, layer.out_features
        if n not in shared:
            shared[n] = (torch.randn(tokens, n, dtype=A.dtype), torch.randn(tokens, A.shape[0], dtype=A.dtype))
        work.append((A, B, shared[n], torch.randn(tokens, m, dtype=A.dtype)))

    def run() -> None:
        for index, (A, B, (x, z), g) in enumerate(work):
            position = index % 7  # q, k, v share z; gate, up share z
            if position not in (1, 2, 5):
                x @ A.t()  # z
                z @ A  # its part of ∂x
            z @ B.t()
            g.t() @ z  # M
            g @ B  # ∂z

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", nargs="*", help="substrings of case names")
    args = parser.parse_args()
    path = smollm2()
    section = ModelSection(path=path, compute_dtype="bfloat16")
    ids = torch.randint(10, 40_000, (args.rows, args.length), generator=torch.Generator().manual_seed(0))

    models: dict[str, Any] = {"frozen, stock Linear4bit": stock(path), "frozen, ours": load_base(section).model}
    for rank in (256, 1024):
        models[f"ours r={rank}"] = attach(load_base(section).model, AdapterSection(rank=rank), path)
        vera = VeraConfig(r=rank, target_modules="all-linear", save_projection=False)
        models[f"stock PEFT VeRA r={rank}"] = get_peft_model(stock(path), vera)
    models["stock PEFT LoRA r=16"] = get_peft_model(stock(path), LoraConfig(r=16, target_modules="all-linear"))
    if args.only:
        models = {n: m for n, m in models.items() if any(part in n for part in args.only)}
    forwards: dict[str, Any] = {}
    for name, model in models.items():
        model.train()  # stock Linear4bit must never run in evaluation mode before training, see tests/test_frozen.py
        if "frozen" in name:
            model.requires_grad_(False)
        else:
            perturb(model)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        embeddings = inner.get_input_embeddings()

        def forward(inner: Any = inner, embeddings: Any = embeddings) -> torch.Tensor:
            x = embeddings(ids).detach().requires_grad_()
            return inner.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state.float().pow(2).mean()

        forwards[name] = forward

    cases = {name: (lambda f=f: f().backward()) for name, f in forwards.items()}
    for rank in (256, 1024):
        if f"ours r={rank}" in models:
            cases[f"floor r={rank}"] = floor(models[f"ours r={rank}"], args.rows * args.length)
    kept = {name: kept_bytes(models[name], f) for name, f in forwards.items()}
    times = interleaved(cases, args.rounds)
    frozen = min((t["median"] for n, t in times.items() if n.startswith("frozen")), default=float("nan"))
    kept_frozen = kept.get("frozen, ours", 0)
    rows = {}
    for name, t in times.items():
        rows[name] = {"seconds": t, "over_frozen": t["median"] / frozen}
        if name in kept:
            rows[name] |= {"kept_bytes": kept[name], "kept_minus_frozen_bytes": kept[name] - kept_frozen}
    result: dict[str, Any] = {**header(), "tokens": args.rows * args.length, "cases": rows, "ratios": {}}
    for rank in (256, 1024):
        ours, theirs = times.get(f"ours r={rank}"), times.get(f"stock PEFT VeRA r={rank}")
        if ours and theirs:
            result["ratios"][f"ours over stock PEFT VeRA r={rank}"] = ours["median"] / theirs["median"]
    if "ours r=256" in times and "stock PEFT LoRA r=16" in times:
        result["ratios"]["ours r=256 over stock PEFT LoRA r=16"] = (
            times["ours r=256"]["median"] / times["stock PEFT LoRA r=16"]["median"]
        )
    if "ours r=256" in models:
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        result["whole_step_kept_bytes"] = kept_bytes(
            models["ours r=256"], lambda: batch_nll(models["ours r=256"], batch, 512)[0]
        )
        print(f"kept by a whole step with our loss, r=256: {result['whole_step_kept_bytes'] / 2**20:.0f} MiB")
    for name, row in rows.items():
        memory = f"{row['kept_minus_frozen_bytes'] / 2**20:8.0f} MiB kept beyond frozen" if "kept_bytes" in row else ""
        print(f"{name:<28}{row['seconds']['median']:7.3f} s  {row['over_frozen']:5.2f} x frozen {memory}")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    print(write_result("core", result))


if __name__ == "__main__":
    main()
