"""A thousand SmolLM2 adapters in one process: memory, loading time, and a batch of 32 rows that all use different ones.

    python bench/adapters.py [--adapters 1000] [--rows 32] [--length 64] [--new-tokens 16] [--rounds 5]

The adapters are r=256 on all linears with random vectors, written to a temporary directory (0.9 MB each). ``one
adapter`` is the same batch on a model with that one adapter, as `load_adapter` makes it; ``mixed`` names 32 different
ones; ``one by one`` runs the 32 rows one after the other, each with its adapter. Forward passes without gradients and
greedy generation.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from bench.common import header, interleaved, smollm2, write_result
from qvera.adapters.save_load import attach, load_adapter, save_adapter
from qvera.adapters.shared_model import load_adapters
from qvera.config.sections import AdapterSection, ModelSection
from qvera.evaluation.generate import generate
from qvera.models.loader import load_base


def write_adapters(
    root: Path, section: ModelSection, count: int, size: float = 0.02, adapter: AdapterSection | None = None
) -> dict[str, Path]:
    """Adapters of different vectors, by name: VeRA r=256 without ``adapter``.

    ``size``: the deviation of the noise in each of them.
    """
    save_adapter(attach(load_base(section).model, adapter or AdapterSection(rank=256), section.path), root / "first")
    vectors = load_file(root / "first" / "adapter_model.safetensors")
    directories = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        target = root / f"user-{number:04d}"
        target.mkdir()
        shutil.copy(root / "first" / "adapter_config.json", target)
        moved = {k: v + size * torch.randn(v.shape, generator=generator) for k, v in vectors.items()}
        save_file(moved, target / "adapter_model.safetensors", metadata={"format": "pt"})
        directories[target.name] = target
    return directories


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("adapters", 1000), ("rows", 32), ("length", 64), ("new-tokens", 16), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    section = ModelSection(path=smollm2())
    result: dict[str, Any] = {**header(), "adapters": args.adapters, "rows": args.rows, "length": args.length}
    with tempfile.TemporaryDirectory() as directory:
        directories = write_adapters(Path(directory), section, args.adapters)
        base = load_base(section)
        gc.collect()
        before = psutil.Process().memory_info().rss
        began = time.perf_counter()
        many = load_adapters(base.model, directories)
        result["load_seconds"] = time.perf_counter() - began
        gc.collect()
        result["bytes_beyond_base"] = psutil.Process().memory_info().rss - before
        banks = {id(bank): bank for bank, _ in many.base_model.banked.values()}
        result["bank_bytes"] = sum(bank.vectors.nbytes for bank in banks.values())
        print(json.dumps({k: result[k] for k in ("load_seconds", "bytes_beyond_base", "bank_bytes")}))
        one = load_adapter(load_base(section).model, directories["user-0000"])
        names = list(directories)[: args.rows]
        ids = torch.randint(10, 40_000, (args.rows, args.length), generator=torch.Generator().manual_seed(0))

        def forward(model: Any, rows: torch.Tensor, adapters: list[str] | None) -> None:
            with torch.no_grad():
                model(input_ids=rows, **({} if adapters is None else {"adapter_names": adapters}))

        def one_by_one() -> None:
            for row, name in enumerate(names):
                forward(many, ids[row : row + 1], [name])

        cases: dict[str, Any] = {
            "forward, one adapter": lambda: forward(one, ids, None),
            "forward, mixed": lambda: forward(many, ids, names),
            "forward, one by one": one_by_one,
        }
        prompts = [row.tolist() for row in ids]

        def answer(model: Any, adapters: list[str] | None) -> None:
            generate(
                model, base.tokenizer, prompts, max_new_tokens=args.new_tokens, batch_size=args.rows, adapters=adapters
            )

        cases["generate, one adapter"] = lambda: answer(one, None)
        cases["generate, mixed"] = lambda: answer(many, names)
        times = interleaved(cases, args.rounds)
    result["seconds"] = times
    for what in ("forward", "generate"):
        result[f"{what}_mixed_over_one"] = times[f"{what}, mixed"]["median"] / times[f"{what}, one adapter"]["median"]
    result["one_by_one_over_mixed"] = times["forward, one by one"]["median"] / times["forward, mixed"]["median"]
    for name, t in times.items():
        print(f"{name:<26}{t['median']:8.3f} s")
    print(json.dumps({k: v for k, v in result.items() if "over" in k}))
    print(write_result("adapters", result))


if __name__ == "__main__":
    main()
