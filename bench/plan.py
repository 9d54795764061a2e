"""The plan against measurement: `qvera train` runs watched from outside, and its peak is compared with what it planned.

Peak: RssAnon + RssShmem + VmSwap of the process, sampled from outside (bench/limits.py), plus the mapped pages of the
weights.

    python bench/plan.py                       SmolLM2-135M and the tiny shape
    python bench/plan.py --shape 7b            a synthesised 7B (13.5 GB of disk, then its NF4)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from bench.common import header, smollm2, write_result
from bench.limits import measured
from bench.synthesise import SHAPES, synthesise

TARGET = 0.10
VARIED = "SmolLM2, r=256, 4 x ever new lengths"
"""Forty steps whose lengths differ: what products leave behind adds up."""


def rows_file(directory: Path, tokens: int, varied: bool) -> Path:
    """Rows that fill ``tokens`` with any tokenizer: the data decides the longest batch, and here all are as long as allowed.

    Args:
        varied: instead 160 rows of ever different lengths, from a few tokens to about as many as that.
    """
    path = directory / "rows.jsonl"
    repeats = [1 + i * 7 % 160 * tokens // 640 for i in range(160)] if varied else [tokens] * 8
    with open(path, "w", encoding="utf-8") as handle:
        for i, times in enumerate(repeats):
            handle.write(json.dumps({"text": f"row {i} " + "zq xj " * times}) + "\n")
    return path


def cases(smol: str | None, shape: str | None, directory: Path) -> dict[str, dict[str, Any]]:
    """Name → sections of a recipe."""
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, path: str, tokens: int, batch: int, **sections: Any) -> None:
        tree: dict[str, Any] = {"model": {"path": path}, "data": {"path": "", "max_length": tokens}}
        tree["training"] = {
            "max_steps": 1, "global_batch_size": batch, "per_device_train_batch_size": batch, "report_to": [],
        }  # fmt: skip
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
        found[name] = tree

    if smol is not None:
        add("SmolLM2, r=256, 4 x 256", smol, 256, 4)
        add("SmolLM2, r=256, 2 x 256, kept", smol, 256, 2, training={"gradient_checkpointing": False})
        add("SmolLM2, r=1024, 1 x 512", smol, 512, 1, adapter={"rank": 1024})
        kept = {"training": {"gradient_checkpointing": False}, "model": {"compute_dtype": "float32"}}
        add("SmolLM2, r=65, 1 x 512, fp32, kept", smol, 512, 1, adapter={"rank": 65}, **kept)
        add("SmolLM2, DVoRA r=64, 1 x 512, fp32, kept", smol, 512, 1, adapter={"rank": 64, "magnitude": True}, **kept)
        add(VARIED, smol, 256, 4, training={"max_steps": 40, "gradient_checkpointing": False})
    if shape is not None:
        made = synthesise(shape, directory / shape)
        for rank in (256, 1024):
            add(f"{shape}, r={rank}, 1 x 512", str(made), 512, 1, adapter={"rank": rank})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of bench/synthesise.py (default: %(default)s)")
    parser.add_argument("--no-smollm2", action="store_true", help="that shape alone")
    parser.add_argument("--scratch", type=Path, help="where checkpoint and runs go (default: a temporary directory)")
    parser.add_argument("--name", default="plan", help="of the result file (default: %(default)s)")
    args = parser.parse_args()
    document: dict[str, Any] = {**header(), "target_relative_error": TARGET, "cases": {}}
    smol = None if args.no_smollm2 else smollm2()
    scratch = Path(tempfile.mkdtemp(prefix="qvera-plan-", dir=args.scratch))
    os.environ["QVERA_CACHE"] = str(scratch / "cache")  # quantized copies go when the bench does
    try:
        for number, (name, tree) in enumerate(cases(smol, args.shape, scratch).items()):
            tree["data"]["path"] = str(rows_file(scratch, tree["data"]["max_length"], name == VARIED))
            tree["training"]["output_dir"] = str(scratch / f"run-{number}")
            recipe = scratch / f"recipe-{number}.yaml"
            recipe.write_text(yaml.safe_dump(tree))
            # the plan is of a run whose base has been quantized before; the first use does that in the same process
            subprocess.run([sys.executable, "-m", "qvera", "quantize", tree["model"]["path"]], check=True)
            seen = measured([sys.executable, "-m", "qvera", "train", str(recipe)])
            if seen.returncode:
                raise SystemExit(f"{name}: the run failed with exit code {seen.returncode}")
            plan = json.loads((scratch / f"run-{number}" / "run.json").read_text())["plan"]
            inside = plan["measured"]
            peak = seen.peak_bytes + inside["mapped_bytes"]
            error = plan["memory"]["total_bytes"] / peak - 1
            document["cases"][name] = {
                "predicted_bytes": plan["memory"]["total_bytes"],
                "predicted_private_bytes": plan["memory"]["private_bytes"],
                "predicted_mapped_bytes": plan["memory"]["mapped_bytes"],
                "peak_moment": plan["memory"]["peak_moment"],
                "measured_bytes": peak,
                "measured_private_bytes": seen.peak_bytes,
                "measured_mapped_bytes": inside["mapped_bytes"],
                "measured_inside_bytes": inside["total_bytes"],
                "relative_error": error,
                "within_target": abs(error) <= TARGET,
                "components": plan["memory"]["moments"][plan["memory"]["peak_moment"]],
                "seconds": seen.seconds,
            }
            planned = plan["memory"]["total_bytes"]
            print(
                f"{name:<38} planned {planned / 1e6:7,.0f} MB   measured {peak / 1e6:7,.0f} MB   {error:+.1%}",
                flush=True,
            )
            write_result(args.name, document)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
