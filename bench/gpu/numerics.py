"""Numbers of the device against fp32 on the CPU: every kernel, a training step in each dtype, and a merged export.

The reference of a step is the same 4-bit base, the same vectors and the same rows in fp32 on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
import yaml
from safetensors.torch import load_file

from bench.common import perturb
from bench.gpu.common import Results, base_on_disk, options, qvera, write_rows
from qvera.adapters.files.save_load import attach
from qvera.config.schema import AdapterSection, ModelSection
from qvera.data import Example
from qvera.models.forward import batch_nll, make_batch
from qvera.models.loader import load_base
from qvera.training.engine import trained_vectors

ROWS, TOKENS, RANK = 3, 200, 96
Dtype = Literal["float32", "bfloat16", "float16"]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is expected, in fp64."""
    a, b = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def step_numbers(base: Path, device: torch.device, dtype: Dtype) -> dict[str, torch.Tensor]:
    """Loss and gradient of every vector of one step over rows of different lengths."""
    loaded = load_base(ModelSection(path=str(base), compute_dtype=dtype), device)
    model = attach(loaded.model, AdapterSection(rank=RANK), str(base))
    perturb(model)
    model.train()
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(ROWS):
        ids = torch.randint(3, 259, (TOKENS - 37 * i,), generator=generator).numpy()
        rows.append(Example(ids, ids >= 20, f"row {i}", ids[:0], "", None))
    nll, count = batch_nll(model, make_batch(model, rows, 2), 64)
    (nll / count).backward()
    vectors = trained_vectors(model)
    return {"loss": nll.detach() / count} | {n: v.grad for n, v in vectors.items() if v.grad is not None}


def steps(base: Path, device: torch.device, results: Results) -> None:
    """A training step in each dtype of the device."""
    expected = step_numbers(base, torch.device("cpu"), "float32")
    for dtype in get_args(Dtype):
        found = step_numbers(base, device, dtype)
        errors = {name: relative_error(found[name], one) for name, one in expected.items()}
        worst = max(errors, key=lambda name: errors[name])
        results.add(what="training step", dtype=dtype, loss_error=errors.pop("loss"), vectors=len(errors),
                    gradient_error_median=sorted(errors.values())[len(errors) // 2],
                    gradient_error_worst=errors.get(worst, max(errors.values())), worst=worst)  # fmt: skip


def export(base: Path, device: str, scratch: Path, results: Results) -> None:
    """The merged fp16 checkpoint of one run, made on the device and on the CPU."""
    rows = write_rows(scratch / "few.jsonl", 16, 100)
    run = scratch / "exported"
    tree = {
        "model": {"path": str(base)},
        "data": {"path": str(rows), "template": "plain"},
        "adapter": {"rank": RANK},
        "training": {"output_dir": str(run), "max_steps": 2, "learning_rate": 0.1, "sample_count": 0, "report_to": []},
    }
    (scratch / "exported.yaml").write_text(yaml.safe_dump(tree))
    qvera("train", str(scratch / "exported.yaml"), device=device)
    made: dict[str, dict[str, torch.Tensor]] = {}
    for where in dict.fromkeys((device, "cpu")):
        qvera("export", str(run), str(scratch / f"merged-{where}"), "--no-compare", device=where)
        made[where] = {}
        for file in sorted((scratch / f"merged-{where}").glob("*.safetensors")):
            made[where] |= load_file(file)
    errors = {name: relative_error(made[device][name], one) for name, one in made["cpu"].items()}
    results.add(what="merged export", dtype="float16", tensors=len(errors), error_worst=max(errors.values()))


def main() -> None:
    args = options(__doc__)
    results = Results(args.out, "numerics")
    base = base_on_disk(args)
    steps(base, torch.device(args.device), results)
    export(base_on_disk(args, nf4=False), args.device, args.scratch, results)


if __name__ == "__main__":
    main()
