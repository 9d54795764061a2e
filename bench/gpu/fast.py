"""Part B: is it fast? Seconds a step and peak memory: ours, stock PEFT LoRA and VeRA, and the frozen base; the host's share.

Each case is a process, and rounds of all cases follow one another. A case is a `TrainingSession` as `qvera train` has it,
with another model on its base: the same rows, loss, checkpointing and attention. Stock cases run bitsandbytes' own linears,
and PEFT's adapters are in the compute dtype: in fp32, its default, they would take longer here.
A step is forward, backward, clipping and AdamW, and ends when the device has done it. The first piece runs `qvera train` itself and writes with which settings
its forward pass was called. A case whose own are not these is not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from bench import host_time
from bench.common import perturb, train_records
from bench.gpu.common import Lines, base_on_disk, do_piece, peak_bytes, recipe, start_peak, write_rows
from bench.gpu.first_machine import _CASES as CASE_NAMES
from bench.host_time import stock
from qvera.config.schema import load_recipe
from qvera.distributed.group import ALONE
from qvera.kernels.choice import use_kernels
from qvera.models import forward
from qvera.models.structure import causal_model, decoder_layers
from qvera.training import session as session_module
from qvera.training.session import TrainingSession
from qvera.training.trainer import train
from qvera.utils import accelerator

MOST_SECONDS = 6.0
"""No further step of a case and length begins after as many."""
_EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def peft(model: Any, config: Any) -> Any:
    """Stock PEFT over bitsandbytes' linears, all in the compute dtype."""
    return get_peft_model(stock(model), config, autocast_adapter_dtype=False)


STOCK: dict[str, Callable[[Any], Any]] = {
    "PEFT LoRA r=16": lambda model: peft(model, LoraConfig(r=16, **_EVERYWHERE)),
    "PEFT VeRA r=256": lambda model: peft(model, VeraConfig(r=256, save_projection=False, **_EVERYWHERE)),
    "frozen": stock,
}


def settings_of(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What decides the time of a pass besides the adapter, as the forward pass finds it."""
    inner, mask = causal_model(model), batch.get("attention_mask")
    layer: Any = decoder_layers(model)[0]
    again = layer._gradient_checkpointing_func if getattr(layer, "gradient_checkpointing", False) else None
    embedding = inner.get_input_embeddings().weight
    return {
        "attention": inner.config._attn_implementation,
        "mask": None if mask is None else [list(mask.shape), list(mask.stride()), str(mask.dtype)],
        "checkpointing": None if again is None else {key: str(value) for key, value in again.keywords.items()},
        "dtype": str(embedding.dtype),
        "kernels": use_kernels(embedding),
        "in_training": inner.training,
        "tokens": list(batch["input_ids"].shape),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF", ""),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@contextlib.contextmanager
def seen_settings() -> Iterator[list[dict[str, Any]]]:
    """The settings of each forward pass for a loss in this context."""
    seen: list[dict[str, Any]] = []
    own = forward.hidden_states

    def spy(model: Any, batch: dict[str, Any], decoder: Any = None) -> torch.Tensor:
        seen.append(settings_of(model, batch))
        return own(model, batch, decoder)

    with mock.patch.object(forward, "hidden_states", spy):
        yield seen


def recipe_of(args: argparse.Namespace, case: str, tokens: int) -> tuple[Path, Path]:
    """The recipe of a case: one row of ``tokens`` tokens a step."""
    rank, method = int(case.partition("=")[2] or 8), "lora" if case.startswith("ours LoRA") else "vera"
    return recipe(
        args, f"{case} {tokens}", base_on_disk(args), write_rows(args.scratch / f"{tokens}.jsonl", 8, tokens, even=True),
        model={"resident": "resident" in case}, data={"max_length": tokens}, adapter={"rank": rank, "method": method},
        training={"global_batch_size": 1, "per_device_train_batch_size": 1, "gradient_checkpointing": True,
                  "learning_rate": 1e-4},
    )  # fmt: skip


def train_itself(args: argparse.Namespace, lines: Lines) -> None:
    """`qvera train` in this process: its settings, and the seconds of its steps."""
    for tokens in args.tokens:
        path, run = recipe_of(args, "ours r=256", tokens)
        with seen_settings() as seen:
            train(load_recipe(path), run, console=Console(quiet=True))
        steps = [record["step_seconds"] for record in train_records(run)[1:]]
        lines.add(tokens=tokens, settings=seen[-1], step_seconds=statistics.median(steps),
                  peak_bytes=json.loads((run / "run.json").read_text())["result"]["peak_bytes"])  # fmt: skip


def expected_settings(lines: Lines, tokens: int) -> dict[str, Any]:
    """Those that the piece ``qvera train`` found.

    Raises:
        RuntimeError: it has not run at this commit, on this card and shape.
    """
    found = [row["settings"] for row in lines.read("qvera train") if row.get("tokens") == tokens and "settings" in row]
    if not found:
        raise RuntimeError(
            f"no timing at {tokens} tokens: the piece `qvera train` has to run first, at the same commit"
        )
    return found[-1]


def session_of(args: argparse.Namespace, case: str, tokens: int) -> TrainingSession:
    """`qvera train`'s session, for a stock case with the model of that case in the place of the adapted one."""
    path, run = recipe_of(args, case, tokens)
    session = TrainingSession(load_recipe(path), run, ALONE, Console(quiet=True))
    put_on = STOCK.get(case)
    changed = mock.patch.object(session_module, "attach", lambda model, *_, **__: put_on(model)) if put_on else None
    with changed or contextlib.nullcontext():
        session.load_data()
        session.load_model()
    session.prepare_model()
    if case == "frozen":  # nothing else wants a gradient
        session.model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    perturb(session.model)
    session.model.train()
    return session


def measure(args: argparse.Namespace, lines: Lines, case: str, turn: int) -> None:
    """Seconds of a step of one case at each length. Nothing is written of one with other settings (RuntimeError)."""
    for tokens in args.tokens:
        measure_at(args, lines, case, turn, tokens)


def measure_at(args: argparse.Namespace, lines: Lines, case: str, turn: int, tokens: int) -> None:
    """The same at one length; all that it has loaded is free when it ends."""
    expected, session = expected_settings(lines, tokens), session_of(args, case, tokens)
    trained = [p for p in session.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained) if trained else None

    def step() -> None:
        nll, count = session.task.loss(session.model, [session.datasets.train[0]])
        (nll / count).backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with session.resources:
        with seen_settings() as seen:
            step()  # which compiles kernels and makes the optimizer's state
        if seen[-1] != expected:
            differ = {key: (seen[-1][key], expected[key]) for key in expected if seen[-1][key] != expected[key]}
            raise RuntimeError(f"{case}: not timed, since these settings are not those of qvera train: {differ}")
        accelerator.synchronize()
        start_peak(session.device)
        seconds = list[float]()
        while len(seconds) < args.steps and sum(seconds) < MOST_SECONDS:
            began = time.perf_counter()
            step()
            accelerator.synchronize()
            seconds.append(time.perf_counter() - began)
        took = statistics.median(seconds)
        peaks, kernels = peak_bytes(session.device), kernels_of(step, session.device)
    lines.add(case=case, round=turn, tokens=tokens, trained_numbers=sum(p.numel() for p in trained),
              step_seconds=took, step_seconds_min=min(seconds), step_seconds_max=max(seconds),
              kernel_seconds=sum(kernel[2] for kernel in kernels) / 1e6, tokens_per_second=tokens / took,
              **peaks)  # fmt: skip


def kernels_of(step: Callable[[], object], device: torch.device) -> list[tuple[str, int, float]]:
    """Name, launches and µs of each kernel of a step, by torch.profiler; on a CPU, of each operator.

    Raises:
        RuntimeError: the profiler sees no kernel of this device.
    """
    on_card = device.type != "cpu"
    kind = getattr(ProfilerActivity, device.type.upper())
    with profile(activities=[kind]) as measured:
        step()
        accelerator.synchronize()
    rows = [
        (event.key, event.count, event.self_device_time_total if on_card else event.self_cpu_time_total)
        for event in measured.key_averages()
        if (event.device_type.name == "CPU") != on_card and not event.is_user_annotation
    ]
    if not rows:
        raise RuntimeError(f"torch.profiler sees no kernel on {device.type}: is CUPTI there?")
    return sorted(rows, key=lambda row: -row[2])


def host(args: argparse.Namespace, lines: Lines) -> None:
    """µs of Python a layer, kernels stubbed (bench/host_time.py)."""
    rounds = 1 if args.shape == "tiny" else 21
    for case, row in host_time.measured(rounds).items():
        lines.add(case=case, **row)


PIECES: dict[str, Any] = {"qvera train": train_itself, "host": host}
PIECES |= {
    f"{case}, round {turn}": functools.partial(measure, case=case, turn=turn) for case in CASE_NAMES for turn in (1, 2)
}

if __name__ == "__main__":
    do_piece(__doc__, PIECES)
