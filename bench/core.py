"""Time and memory of one forward + backward: frozen base, ours, stock PEFT VeRA and LoRA, side by side.

    python bench/core.py [--rounds 5] [--rows 4] [--length 256] [--passes 1] [--dtype auto] [--only CASE ..] [--result NAME]

SmolLM2-135M (real weights) in NF4, all seven linears, no gradient checkpointing, vectors off zero. ``frozen`` is the
model without an adapter and with gradients flowing to the input embeddings, with stock Linear4bit and with our frozen
linear; ratios are against the faster. ``lean base`` is that with the norms and MLPs of `qvera.models.lean_layers` besides,
as an adapted model has: for scale. ``floor`` is VeRA's products alone: z for each distinct input, the expansion, M, ∂z
and ∂x, at the same shapes in the same dtype. ``kept`` is what autograd keeps for backward, counted twice: unique
storages seen by saved_tensors_hooks, and storages made during forward that are alive at its end (a dispatch-mode
census), parameters and buffers excluded from both. ``held`` keeps W + ΔW until the vectors change, as `qvera train` does where
memory allows (`qvera.adapters.products.fused.HeldWeight`). After ``--passes`` of forward and backward every trained number is changed,
as an optimizer would, so W + ΔW is made anew once in that many. ``7B layer`` is one decoder layer of 4096/11008 with 32 heads,
random weights in NF4, 512 tokens; ``checkpointed`` a whole step with our loss under gradient checkpointing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common import header, interleaved, perturb, smollm2, write_result
from bench.generation import stock
from bench.synthesise import synthesise
from bench.trials import MORE
from qvera.adapters import QveraLinear, hold_training_weights
from qvera.adapters.save_load import attach
from qvera.config.sections import AdapterSection, ModelSection
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.forward import batch_nll
from qvera.models.lean_layers import reduce_saved_activations
from qvera.models.linear import freeze_linears
from qvera.models.loader import load_base, pick_compute_dtype
from qvera.utils import accelerator

BEYOND = "ours r=96, 2 b, a"
"""With `trials.MORE`."""


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


class Census(TorchDispatchMode):
    """Every storage that an operation gives out, and which of them are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.seen[reference.cdata] = (reference, storage.nbytes())
        return out

    def alive_bytes(self, model: Any) -> int:
        own = {StorageWeakRef(t.untyped_storage()).cdata for t in [*model.parameters(), *model.buffers()]}
        return sum(n for key, (reference, n) in self.seen.items() if key not in own and not reference.expired())


def alive_bytes(model: Any, run: Any) -> int:
    """Storages made by ``run()`` that are alive while its result still is, without parameters and buffers."""
    gc.collect()
    with Census() as census:
        loss = run()
    gc.collect()
    total = census.alive_bytes(model)
    del loss
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


def over_frozen(times: dict[str, dict[str, float]]) -> dict[str, Any]:
    fastest = min(t["median"] for name, t in times.items() if name.startswith("frozen"))
    for name, t in times.items():
        print(f"  {name:<28}{t['median']:7.3f} s  {t['median'] / fastest:5.2f} x frozen")
    return {name: {"seconds": t, "over_frozen": t["median"] / fastest} for name, t in times.items()}


def layer_of_7b(rounds: int, dtype: torch.dtype, tokens: int = 512) -> dict[str, Any]:
    """One decoder layer of 7B shape, forward and backward to its input."""
    models: dict[str, Any] = {}
    for name in (
        "frozen, stock Linear4bit",
        "frozen, ours",
        "ours r=256",
        "ours r=1024",
        BEYOND,
        "stock PEFT VeRA r=256",
    ):
        with tempfile.TemporaryDirectory() as directory:
            model = stock(str(synthesise("7b", Path(directory) / "7b", nf4=True, layers=1)), dtype).train()
        if name == "frozen, ours":
            freeze_linears(model)
        elif name == BEYOND:
            model = attach(model, AdapterSection(**MORE))
        elif name.startswith("ours"):
            model = attach(model, AdapterSection(rank=int(name.partition("=")[2])))
        elif "VeRA" in name:
            config = VeraConfig(r=256, target_modules="all-linear", save_projection=False)
            model = get_peft_model(model, config)
        if "frozen" not in name:
            perturb(model)
        models[name] = model
    x = torch.randn(1, tokens, 4096, dtype=dtype)

    def run(model: Any) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.model(
            inputs_embeds=x.clone().requires_grad_(), use_cache=False
        ).last_hidden_state.float().sum().backward()

    print(f"one 7B layer, {tokens} tokens")
    cases: dict[str, Callable[[], Any]] = {name: functools.partial(run, m) for name, m in models.items()}
    for rank in (256, 1024):
        cases[f"floor r={rank}"] = floor(models[f"ours r={rank}"], tokens)
    return over_frozen(interleaved(cases, rounds))


def whole_batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows [B, T] of which every token but the first is trained."""
    trained = torch.arange(ids.numel()).view(ids.shape)[:, :-1].flatten()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "trained": trained}


def checkpointed(section: ModelSection, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """A whole step with our loss under gradient checkpointing."""
    path, base = section.path, load_base(section).model
    base.gradient_checkpointing_enable({"use_reentrant": False})
    models: dict[str, Any] = {"frozen, ours": base}
    for rank in (256, 1024):
        models[f"ours r={rank}"] = attach(load_base(section).model, AdapterSection(rank=rank), path)
        enable_checkpointing(models[f"ours r={rank}"])
        perturb(models[f"ours r={rank}"])
    batch = whole_batch(ids)
    for model in models.values():
        model.train()
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
    print("a whole step with gradient checkpointing")

    def whole_step(model: Any) -> None:
        batch_nll(model, batch, 512)[0].backward()

    return over_frozen(interleaved({n: functools.partial(whole_step, m) for n, m in models.items()}, rounds))


def step(forward: Callable[[], Any], model: Any, passes: int) -> None:
    """Passes of forward and backward, then a change of every trained number."""
    for _ in range(passes):
        forward().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.0001)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--passes", type=int, default=1, help="of forward and backward between changes of the vectors")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--only", nargs="*", help="substrings of case names")
    parser.add_argument("--result", default="core", help="the name of the file in bench/results")
    args = parser.parse_args()
    path = smollm2()
    section = ModelSection(path=path, compute_dtype=args.dtype)
    dtype = pick_compute_dtype(args.dtype, accelerator.current_device())
    ids = torch.randint(10, 40_000, (args.rows, args.length), generator=torch.Generator().manual_seed(0))

    models: dict[str, Any] = {"frozen, stock Linear4bit": stock(path, dtype), "frozen, ours": load_base(section).model}
    models["lean base"] = load_base(section).model
    reduce_saved_activations(models["lean base"])
    for rank in (256, 1024):
        models[f"ours r={rank}"] = attach(load_base(section).model, AdapterSection(rank=rank), path)
        models[f"ours r={rank}, held"] = attach(load_base(section).model, AdapterSection(rank=rank), path)
        hold_training_weights(models[f"ours r={rank}, held"])
        vera = VeraConfig(r=rank, target_modules="all-linear", save_projection=False)
        models[f"stock PEFT VeRA r={rank}"] = get_peft_model(stock(path, dtype), vera)
    models[BEYOND] = attach(load_base(section).model, AdapterSection(**MORE), path)
    models["ours LoRA r=16"] = attach(load_base(section).model, AdapterSection(method="lora", rank=16), path)
    models["stock PEFT LoRA r=16"] = get_peft_model(stock(path, dtype), LoraConfig(r=16, target_modules="all-linear"))
    if args.only:
        models = {n: m for n, m in models.items() if any(part in n for part in args.only)}
    forwards: dict[str, Any] = {}
    for name, model in models.items():
        model.train()  # stock Linear4bit must never run in evaluation mode before training, see tests/models/test_linear.py
        if "frozen" in name or name == "lean base":
            model.requires_grad_(False)
        else:
            perturb(model)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        embeddings = inner.get_input_embeddings()

        def forward(inner: Any = inner, embeddings: Any = embeddings) -> torch.Tensor:
            x = embeddings(ids).detach().requires_grad_()
            return inner.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state.float().pow(2).mean()

        forwards[name] = forward

    cases: dict[str, Callable[[], Any]] = {
        n: functools.partial(step, f, models[n], args.passes) for n, f in forwards.items()
    }
    for rank in (256, 1024):
        if f"ours r={rank}" in models:
            cases[f"floor r={rank}"] = floor(models[f"ours r={rank}"], args.rows * args.length)
    kept = {name: kept_bytes(models[name], f) for name, f in forwards.items()}
    alive = {name: alive_bytes(models[name], f) for name, f in forwards.items()}
    times = interleaved(cases, args.rounds)
    frozen = min((t["median"] for n, t in times.items() if n.startswith("frozen")), default=float("nan"))
    kept_frozen = kept.get("frozen, ours", 0)
    rows: dict[str, dict[str, Any]] = {}
    for name, t in times.items():
        rows[name] = {"seconds": t, "over_frozen": t["median"] / frozen}
        if name in kept:
            rows[name] |= {"kept_bytes": kept[name], "kept_minus_frozen_bytes": kept[name] - kept_frozen}
            rows[name]["alive_bytes"] = alive[name]
    result: dict[str, Any] = {
        **header(),
        "dtype": str(dtype),
        "tokens": args.rows * args.length,
        "passes": args.passes,
        "cases": rows,
        "ratios": {},
    }
    for rank in (256, 1024):
        ours, theirs = times.get(f"ours r={rank}"), times.get(f"stock PEFT VeRA r={rank}")
        if ours and theirs:
            result["ratios"][f"ours over stock PEFT VeRA r={rank}"] = ours["median"] / theirs["median"]
    if lora := times.get("stock PEFT LoRA r=16"):
        for name in ("ours r=256", "ours r=256, held", "ours LoRA r=16"):
            if name in times:
                result["ratios"][f"{name} over stock PEFT LoRA r=16"] = times[name]["median"] / lora["median"]
                user = times[name]["user_median"] / lora["user_median"]
                result["ratios"][f"{name} over stock PEFT LoRA r=16, user CPU"] = user
    if "ours r=256" in models:
        batch = whole_batch(ids)
        whole = lambda: batch_nll(models["ours r=256"], batch, 512)[0]  # noqa: E731
        result["whole_step_kept_bytes"] = kept_bytes(models["ours r=256"], whole)
        result["whole_step_alive_bytes"] = alive_bytes(models["ours r=256"], whole)
        gc.collect()
        print(f"kept by a whole step with our loss, r=256: {result['whole_step_kept_bytes'] / 2**20:.0f} MiB")
    for name, row in rows.items():
        memory = f"{row['kept_minus_frozen_bytes'] / 2**20:8.0f} MiB kept beyond frozen" if "kept_bytes" in row else ""
        print(f"{name:<28}{row['seconds']['median']:7.3f} s  {row['over_frozen']:5.2f} x frozen {memory}")
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio:.2f}")
    if not args.only:
        del models, forwards, cases
        gc.collect()
        result["7B layer"] = layer_of_7b(args.rounds, dtype)
        result["checkpointed"] = checkpointed(section, ids, args.rounds)
    print(write_result(args.result, result))


if __name__ == "__main__":
    main()
