"""Part A: is it right? Every operator and a whole layer against fp64 or fp32, a killed run, an export, the suite, the sanitizer."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file

from bench.common import perturb
from bench.gpu.common import BASE_LAYERS, ROOT, Lines, base_on_disk, do_piece, qvera, recipe, write_rows
from bench.synthesise import SHAPES
from qvera.adapters.products.functional import expand, project, scale_input
from qvera.adapters.save_load import attach, trained_vectors
from qvera.config.sections import AdapterSection, ModelSection
from qvera.data import Example
from qvera.kernels import dequantize, elementwise
from qvera.models.attention import varlen_attention
from qvera.models.forward import batch_nll, make_batch
from qvera.models.loader import load_base
from qvera.models.loss import Head, target_loss
from qvera.utils import accelerator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS, TOKENS, RANK = 3, 200, 96
SCALE = 2.0**10
"""Of the loss: in fp16 small gradients would be rounded to nothing, which a training avoids by its scaler."""
Dtype = Literal["float32", "bfloat16", "float16"]
Function = Callable[..., Any]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected, in fp64."""
    a, b = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def seconds_of(do: Callable[[], Any], repeats: int) -> float:
    """The least of five."""
    best = float("inf")
    for _ in range(5):
        accelerator.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            do()
        accelerator.synchronize()
        best = min(best, (time.perf_counter() - began) / repeats)
    return best


def ceilings(args: argparse.Namespace, lines: Lines) -> None:
    """What the card can: bytes a second of a copy, multiply-adds a second of a product."""
    device, size = accelerator.current_device(), 256 if args.shape == "tiny" else 8192
    x = torch.empty(size, size, 4, device=device)
    lines.add(what="copy", bytes_per_second=2 * x.nbytes / seconds_of(x.clone, 10))
    for dtype in DTYPES:
        left = torch.randn(size, size, device=device, dtype=dtype)
        lines.add(
            what="product",
            dtype=str(dtype),
            flops_per_second=2 * size**3 / seconds_of(functools.partial(torch.mm, left, left), 5),
        )


def operators(args: argparse.Namespace, lines: Lines) -> None:
    """Each operator at the shape's widths in 16 and 32 bits against the plain code in fp64 on the same, rounded inputs."""
    device, shape, tokens = accelerator.current_device(), SHAPES[args.shape], 64 if args.shape == "tiny" else 500
    h, f, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    size, r, generator = h // heads, 256, torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    ends = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=device)
    vocabulary = 1000 if args.shape == "tiny" else 32_003  # no multiple of a block
    head = torch.nn.Linear(h, vocabulary, bias=False, device=device).requires_grad_(False)
    labels = torch.arange(tokens, device=device)[None] % vocabulary

    def joined(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at = "cpu" if q.dtype == torch.float64 else device  # no card has the kernel in fp64
        longest = tokens - tokens // 3
        where = ends.to(at)
        out = varlen_attention(q.to(at), k.to(at), v.to(at), where, where, longest, longest, size**-0.5)
        return out.to(device)

    def loss(x: torch.Tensor, cap: float | None = None, smoothing: float = 0.0) -> torch.Tensor:
        module = torch.nn.Linear(h, vocabulary, bias=False, device="meta")
        module.weight = torch.nn.Parameter(head.weight.to(x.dtype), requires_grad=False)
        return target_loss(x[0, :-1], labels[0, 1:, None], Head(module, cap, 1.0), 256, label_smoothing=smoothing)[0]

    def vera(x: Any, A: Any, B: Any, base: Any, d: Any, b: Any) -> torch.Tensor:
        return expand(base.clone(), project(x, A), d, b, B, 0.3)

    # name → what is computed, its inputs, and how many of them at the end are vectors, which stay in fp32
    cases: dict[str, tuple[Function, list[torch.Tensor], int]] = {
        "VeRA up": (vera, [draw(tokens, h), draw(r, h), draw(f, r), draw(tokens, f), draw(r), draw(f)], 2),
        "VeRA down, b_groups: 3": (
            vera, [draw(tokens, f), draw(255, f), draw(h, 255), draw(tokens, h), draw(255), draw(3, h)], 2,
        ),
        "input scale": (scale_input, [draw(tokens, f), draw(f)], 1),
        "RMS norm": (lambda x, w: elementwise.rms_norm(x, w, 1e-5), [draw(tokens, h), draw(h)], 0),
        "RMS norm, backward": (
            lambda g, x, w: elementwise.rms_norm_backward(g, x, elementwise.rms_norm(x, w, 1e-5)[1], w),
            [draw(tokens, h), draw(tokens, h), draw(h)], 0,
        ),
        "SwiGLU": (elementwise.swiglu, [draw(tokens, f), draw(tokens, f)], 0),
        "SwiGLU, backward": (elementwise.swiglu_backward, [draw(tokens, f) for _ in range(3)], 0),
        "joined rows": (joined, [draw(tokens, heads, size) for _ in range(3)], 0),
        "loss": (loss, [draw(1, tokens, h)], 0),
        "loss, capped and smoothed": (
            functools.partial(loss, cap=5.0, smoothing=0.1), [draw(1, tokens, h)], 0,
        ),
    }  # fmt: skip
    with_gradients = ("VeRA up", "VeRA down, b_groups: 3", "input scale", "joined rows", "loss",
                      "loss, capped and smoothed")  # fmt: skip

    def numbers(name: str, dtype: torch.dtype, rounded: torch.dtype) -> list[torch.Tensor]:
        function, inputs, vectors = cases[name]
        wide = torch.promote_types(dtype, torch.float32)
        kinds = [dtype] * (len(inputs) - vectors) + [wide] * vectors
        leaves = [
            (x if kind == wide and i >= len(inputs) - vectors else x.to(rounded)).to(kind, copy=True)
            for i, (x, kind) in enumerate(zip(inputs, kinds, strict=True))
        ]
        if name not in with_gradients:
            out = function(*leaves)
            return list(out) if isinstance(out, tuple) else [out]
        trained = [0, *range(len(leaves) - vectors, len(leaves))]
        for i in trained:
            leaves[i].requires_grad_()
        out = function(*leaves)
        upstream = torch.linspace(-1, 1, out.numel(), device=device, dtype=torch.float64).view(out.shape).to(out.dtype)
        return [out, *torch.autograd.grad(out, [leaves[i] for i in trained], upstream if out.dim() else None)]

    for dtype in DTYPES:
        for name in cases:
            found, exact = numbers(name, dtype, dtype), numbers(name, torch.float64, dtype)
            errors = [relative_error(x, y) for x, y in zip(found, exact, strict=True)]
            lines.add(what=name, dtype=str(dtype), tokens=tokens, error_worst=max(errors), errors=errors)
        packed, state = bnb.quantize_4bit(
            draw(f, h).to(dtype), compress_statistics=True, quant_type="nf4", quant_storage=torch.bfloat16
        )
        ours, theirs = dequantize.dequantize_4bit(packed, state), bnb.dequantize_4bit(packed, state)
        equal = None if ours is None else torch.equal(ours, theirs)
        lines.add(what="4-bit weight", dtype=str(dtype), same_bits_as_bitsandbytes=equal)


def layer(args: argparse.Namespace, lines: Lines) -> None:
    """One layer of the shape, forward and backward of a training pass, in each dtype, against fp32 on the CPU."""
    base, tokens = base_on_disk(args, layers=1), 80 if args.shape == "tiny" else TOKENS
    expected = step_numbers(base, torch.device("cpu"), "float32", tokens)
    for dtype in get_args(Dtype):
        found = step_numbers(base, accelerator.current_device(), dtype, tokens)
        errors = {name: relative_error(found[name], one) for name, one in expected.items()}
        loss_error, worst = errors.pop("loss"), max(errors, key=errors.__getitem__)
        lines.add(what="training pass", dtype=dtype, loss_error=loss_error, vectors=len(errors), worst=worst,
                  gradient_error_worst=errors[worst], gradient_error_median=sorted(errors.values())[len(errors) // 2])  # fmt: skip


def step_numbers(base: str, device: torch.device, dtype: Dtype, tokens: int) -> dict[str, torch.Tensor]:
    """Loss and gradient, by `SCALE`, of every vector of one pass over rows of different lengths, at most ``tokens``."""
    model = attach(
        load_base(ModelSection(path=base, compute_dtype=dtype), device).model, AdapterSection(rank=RANK), base
    )
    perturb(model)
    model.train()
    generator, rows = torch.Generator().manual_seed(1), []
    for i in range(ROWS):
        ids = torch.randint(3, 259, (tokens - tokens * i // 5,), generator=generator).numpy()
        rows.append(Example(ids, ids >= 20, f"row {i}", ids[:0], "", None))
    nll, count = batch_nll(model, make_batch(model, rows, 2), 64)
    (nll / count * SCALE).backward()
    return {"loss": nll.detach() / count} | {n: v.grad for n, v in trained_vectors(model).items() if v.grad is not None}


def resumed(args: argparse.Namespace, lines: Lines) -> None:
    """`qvera train`, killed in the middle and resumed: the adapter must be that of a run which nobody killed."""
    rows, base = write_rows(args.scratch / "rows.jsonl", 64, 60), base_on_disk(args, BASE_LAYERS, shape="tiny")
    steps = 8 if args.device == "cpu" else 200  # so many that the kill comes before the last one
    training = {"max_steps": steps, "save_steps": 3, "learning_rate": 0.02, "full_determinism": True}
    (path, whole), (again, killed) = (
        recipe(args, name, base, rows, training=training, adapter={"rank": 64}) for name in ("whole", "killed")
    )
    qvera("train", str(path))
    line = [sys.executable, "-m", "qvera", "train", str(again)]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    metrics = killed / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 4,' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    if (code := process.wait()) != -signal.SIGKILL:
        raise RuntimeError(f"the run that was to be killed ended by itself, with exit code {code}")
    qvera("train", str(again), "--resume")
    same = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, killed)]
    lines.add(what="a run killed and resumed", same_bits=same[0] == same[1])


def export(args: argparse.Namespace, lines: Lines) -> None:
    """The merged fp16 checkpoint of one run, made on the device and on the CPU."""
    base = base_on_disk(args, nf4=False, shape="tiny")
    training = {"max_steps": 2, "learning_rate": 0.1}
    path, run = recipe(args, "exported", base, write_rows(args.scratch / "few.jsonl", 16, 60), training=training)
    qvera("train", str(path))
    made: list[dict[str, torch.Tensor]] = []
    for hidden in ({}, {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}):
        out = args.scratch / f"merged-{len(made)}"
        shutil.rmtree(out, ignore_errors=True)
        qvera("export", str(run), str(out), "--no-compare", **hidden)
        made.append({n: x for file in sorted(out.glob("*.safetensors")) for n, x in load_file(file).items()})
    errors = {name: relative_error(made[0][name], one) for name, one in made[1].items()}
    lines.add(what="merged export", tensors=len(errors), error_worst=max(errors.values()))


def tests(args: argparse.Namespace, lines: Lines) -> None:
    """The suite's kernels, adapters and models on the card (`QVERA_TEST_DEVICE`), against their own references."""
    rooms = ["tests/kernels", "tests/adapters", "tests/models"]
    if args.device == "cpu":  # `make test` runs them
        rooms = ["tests/kernels/test_columns.py"]
    several = ["-n", "8"] if find_spec("xdist") is not None and args.device != "cpu" else []
    for room in rooms:
        line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *several, room]
        run_and_add(line, {"QVERA_TEST_DEVICE": args.device}, lines, what=room)


def sanitizer(args: argparse.Namespace, lines: Lines) -> None:
    """CUDA's compute-sanitizer over `operators`: reads and writes out of bounds."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if args.device != "cuda" or not Path(tool).exists():
        lines.add(what="compute-sanitizer", left_out=f"it needs CUDA and {tool}, and this machine has not both")
        return
    options = ["--lines", os.devnull, "--scratch", str(args.scratch), "--device", args.device, "--shape", "tiny"]
    line = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "bench.gpu.right", "operators"]
    # each tensor an allocation of its own: within a block of torch's allocator the tool sees no end of a tensor
    run_and_add([*line, *options], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, lines, what="compute-sanitizer")


def run_and_add(command: list[str], environment: dict[str, str], lines: Lines, what: str) -> None:
    """Run a program and add a line with its exit code and the end of what it said.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
    lines.add(what=what, exit=done.returncode, said=done.stdout[-4000:])
    if done.returncode:
        raise RuntimeError(f"{what}: exit {done.returncode}; its line has the end of what it said")


PIECES = {f.__name__: f for f in (ceilings, operators, layer, resumed, export, tests, sanitizer)}

if __name__ == "__main__":
    do_piece(__doc__, PIECES)
