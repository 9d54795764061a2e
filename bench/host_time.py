"""µs of Python that one decoder layer takes of the host, forward and backward: ours, PEFT's LoRA and VeRA, the frozen base.

    python bench/host_time.py [--rounds 41] [--result host_time]

Short batches wait for the host, so this is a number of its own. Sizes are so small that products take next to nothing, and
Triton's kernels are not launched at all: what is left is Python, autograd and torch's dispatcher. A CPU stands for the card:
the code takes the path of an accelerator, in 16 bits. A figure is the CPU time of this process for a model of six layers less
that for one of two, over four; medians of rounds in which all cases take turns. ``over_frozen``: over the stock frozen base.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import LoraConfig, VeraConfig, get_peft_model

from bench.common import header, perturb, write_result
from bench.synthesise import synthesise
from qvera.adapters.save_load import attach
from qvera.config.sections import AdapterSection, ModelSection
from qvera.kernels import choice, triton_kernels
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.linear import FrozenLinear4bit
from qvera.models.loader import load_base

TOKENS, RANK, LAYERS, REPEATS = 16, 8, (2, 6), 4
_EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def stock(model: Any) -> Any:
    """The base as transformers and bitsandbytes run it."""
    for module in model.modules():
        if type(module) is FrozenLinear4bit:
            module.__class__ = bnb.nn.Linear4bit
    return model


CASES: dict[str, Callable[[Any], Any]] = {
    "frozen": stock,
    "PEFT LoRA": lambda model: get_peft_model(stock(model), LoraConfig(r=RANK, **_EVERYWHERE)),
    "PEFT VeRA": lambda model: get_peft_model(stock(model), VeraConfig(r=RANK, save_projection=False, **_EVERYWHERE)),
    "ours, frozen": lambda model: model,
    "ours VeRA": lambda model: attach(model, AdapterSection(rank=RANK)),
    "ours LoRA": lambda model: attach(model, AdapterSection(rank=RANK, method="lora")),
}


@contextlib.contextmanager
def stubbed_kernels() -> Iterator[None]:
    """A context in which CPU tensors take the path of an accelerator, and no kernel of ours is launched."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(choice.accelerator, "is_accelerator", lambda device: True))
        stack.enter_context(mock.patch.object(choice, "switch", "on"))
        stack.enter_context(mock.patch.object(choice.accelerator, "in_use", lambda device: contextlib.nullcontext()))
        for name in vars(triton_kernels).keys():
            if name.startswith("launch_"):
                stack.enter_context(mock.patch.object(triton_kernels, name, lambda *arguments: None))
        yield


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """For each case ``microseconds_a_layer``, and ``checkpointed_…`` with the recomputation, each over the frozen base."""
    models: dict[tuple[str, int], Any] = {}
    found: dict[str, dict[str, float]] = {name: {} for name in CASES}
    ids = torch.arange(TOKENS)[None] + 3
    with tempfile.TemporaryDirectory() as directory:
        for layers in LAYERS:
            base = str(synthesise("host", Path(directory) / f"{layers}", nf4=True, layers=layers))
            for name, put_on in CASES.items():
                model = put_on(load_base(ModelSection(path=base, compute_dtype="bfloat16")).model)
                perturb(model)
                models[name, layers] = model.train()
        for word in ("", "checkpointed_"):
            if word:
                for model in models.values():
                    enable_checkpointing(model)
            steps = {key: functools.partial(_step, _decoder(model), ids) for key, model in models.items()}
            times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
            with stubbed_kernels():
                for turn in range(rounds + 1):
                    for key, step in steps.items():
                        began = time.process_time()
                        for _ in range(REPEATS):
                            step()
                        if turn:  # the first warms up
                            times[key].append((time.process_time() - began) / REPEATS)
            for name in CASES:
                few, many = (times[name, layers] for layers in LAYERS)
                layer = statistics.median(b - a for a, b in zip(few, many, strict=True)) / (LAYERS[1] - LAYERS[0])
                found[name][f"{word}microseconds_a_layer"] = layer * 1e6
            for name in CASES:
                layer, frozen = (found[case][f"{word}microseconds_a_layer"] for case in (name, "frozen"))
                found[name][f"{word}over_frozen"] = layer / frozen
    return found


def _decoder(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # nothing else wants a gradient in the frozen base
    inner.get_input_embeddings().register_forward_hook(_need_gradient)
    return inner.get_decoder()


def _need_gradient(_: Any, __: Any, out: torch.Tensor) -> None:
    out.requires_grad_()


def _step(decoder: Any, ids: torch.Tensor) -> None:
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    hidden.backward(hidden.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--result", default="host_time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = measured(args.rounds)
    for name, row in cases.items():
        print(f"{name:14}" + "".join(f"{value:9.2f}" for value in row.values()))
    print(write_result(args.result, {**header(), "rounds": args.rounds, "cases": cases}))


if __name__ == "__main__":
    main()
