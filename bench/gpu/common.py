"""What the parts of the GPU bench share: their results file, a synthetic 4-bit base in memory or on disk, and timing."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import LlamaForCausalLM

from bench.synthesise import SHAPES, config_of, synthesise
from qvera.utils import memory

ROOT = Path(__file__).resolve().parents[2]


class Results:
    """Rows of JSON, one a line, each on disk before the next is measured."""

    def __init__(self, path: Path, part: str) -> None:
        self.path, self.part = path, part

    def add(self, **row: Any) -> None:
        """Write one row and show it."""
        line = json.dumps({"part": self.part, **row})
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(line + "\n")
        print(line, file=sys.stderr, flush=True)


def options(description: str | None) -> argparse.Namespace:
    """The options that `run.py` passes to every part."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results file; rows are added at its end")
    parser.add_argument("--scratch", type=Path, required=True, help="a folder for checkpoints and runs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="7b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=None, help="decoder layers, where not those of the shape")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--case", default=None, help="of `speed.py`: the one case to measure")
    return parser.parse_args()


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the speed is measured in."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement of `peak_bytes`."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> dict[str, int]:
    """The most that tensors took, and what the allocator took from the device for them. On a CPU: memory held now."""
    if device.type == "cpu":
        return {"peak_allocated_bytes": memory.private_bytes()}
    return {
        "peak_allocated_bytes": torch.accelerator.max_memory_allocated(device),
        "peak_reserved_bytes": torch.accelerator.max_memory_reserved(device),
    }


def base_on_device(shape: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """A random Llama, its linears but the head in NF4 with double quantization, made on ``device`` weight by weight."""
    config = config_of(shape)
    config.max_position_embeddings = 131_072
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).mul_(0.02).to(dtype)

    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
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
        model.set_submodule(name, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, last = name.rpartition(".")
            value = (
                torch.ones(parameter.shape, device=device, dtype=dtype) if "norm" in name else random(*parameter.shape)
            )
            setattr(model.get_submodule(parent), last, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def base_on_disk(args: argparse.Namespace, nf4: bool = True) -> Path:
    """The same as an NF4 or a bf16 checkpoint with a byte-level tokenizer; the parts make it once and share it."""
    out: Path = args.scratch / f"{args.shape}-{args.layers or 'all'}-layers-{'nf4' if nf4 else 'bf16'}"
    if not (out / "config.json").exists():
        synthesise(args.shape, out, nf4=nf4, layers=args.layers)
    return out


def write_rows(path: Path, count: int, characters: int) -> Path:
    """A JSONL file of ``count`` prompts and completions; every byte is a token, and lengths differ by up to a half."""
    with open(path, "w", encoding="utf-8") as handle:
        for i in range(count):
            length = characters - (i * 37) % (characters // 2)
            row = {"prompt": f"{i} " + "ab c" * (length // 8), "completion": "de f" * (length // 8)}
            handle.write(json.dumps(row) + "\n")
    return path


def qvera(*arguments: str, device: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of qvera from this checkout; ``device`` cpu hides the accelerator from it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    if device == "cpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "qvera", *arguments], env=env, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"qvera {' '.join(arguments)}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return done


def wait_for_step(metrics: Path, step: int, process: subprocess.Popen[str], limit_seconds: float = 240) -> None:
    """Wait until a run has logged that optimizer step.

    Raises:
        RuntimeError: it ended before, or the limit passed.
    """
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        if metrics.exists() and any(f'"step": {step},' in line for line in metrics.read_text().splitlines()):
            return
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before step {step}")
        time.sleep(0.05)
    raise RuntimeError(f"no step {step} within {limit_seconds:.0f} s")
