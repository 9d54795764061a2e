"""What it costs to serve a VeRA adapter as a LoRA of low rank, as engines that take LoRA alone need it.

    qvera quickstart                                    # first: leaves runs/quickstart
    python bench/lora_cut.py [--run runs/quickstart] [--ranks 8 16 32 64 128] [--rows 256]

The run's adapter is exported as `qvera export --to lora --rank K` does, in fp16, and whole (`--to lora`). Stock PEFT
loads each on the run's own 4-bit base. Held-out loss, exact answers, the error of ΔW in the median layer (Frobenius),
and the size of the file; beside those of the VeRA adapter and of the base alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.common import header, markdown, write_result
from qvera.data import build_datasets
from qvera.evaluation.load import OpenRun, find_target, open_run, open_target
from qvera.exporting import lora
from qvera.exporting.compare import adapter_scores
from qvera.exporting.deltas import read_deltas
from qvera.models.model_class import empty_model
from qvera.utils import formatting
from qvera.utils.files import ADAPTER_WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 32, 64, 128])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--result", default="lora_cut")
    args = parser.parse_args()
    opened = open_run(args.run)
    recipe, adapter = opened.target.recipe, opened.target.adapter
    assert recipe is not None and adapter is not None
    recipe = recipe.replace(data=recipe.data.replace(eval_limit=args.rows))
    datasets = build_datasets(recipe.data, opened.base.tokenizer)
    rows, document = datasets.eval, {**header(), "rows": len(datasets.eval), "cases": {}}

    def record(name: str, model: OpenRun, **facts: Any) -> None:
        found = adapter_scores(model, recipe, datasets, rows)
        document["cases"][name] = {"held_out_loss": found.pop("loss"), **found, **facts}
        write_result(args.result, document)
        print(
            f"{name:<20} loss {document['cases'][name]['held_out_loss']:.4f}  exact {found['exact_match']:.1%}",
            flush=True,
        )

    record("VeRA", opened, file_bytes=(adapter / ADAPTER_WEIGHTS).stat().st_size)
    with opened.model.disable_adapter():
        record("base", opened)
    deltas = read_deltas(adapter, empty_model(recipe.model), recipe.model)
    for rank in [*args.ranks, None]:
        factors, facts = None, dict[str, Any]()
        if rank is not None:
            whole = ((name, delta.lora()) for name, delta in deltas.layers.items())
            factors, errors = lora.truncate_all(whole, deltas.rank, rank, torch.float16)
            facts["median_relative_error"] = statistics.median(errors.values())
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "lora"
            lora.export_lora(deltas, out, torch.float16, factors)
            model = open_target(find_target(out, args.run))
            facts["file_bytes"] = (out / ADAPTER_WEIGHTS).stat().st_size
        record(f"LoRA r={rank or deltas.rank}" + ("" if rank else ", whole"), model, **facts)
    print(table(document["cases"]))


def table(cases: dict[str, dict[str, Any]]) -> str:
    """As docs/serving-at-scale.md has it."""

    def row(name: str, case: dict[str, Any]) -> list[str]:
        error, size = case.get("median_relative_error"), case.get("file_bytes")
        return [
            name, f"{case['held_out_loss']:.4f}", f"{case['exact_match']:.1%}",
            "–" if error is None else f"{error:.2f}", "–" if size is None else formatting.size(size),
        ]  # fmt: skip

    titles = ["", "held-out loss", "exact answers", "error of ΔW", "file"]
    return markdown(titles, (row(name, case) for name, case in cases.items()))


if __name__ == "__main__":
    main()
