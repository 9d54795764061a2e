"""The real `qvera train` in its modes of memory and precision: tokens a second, and the plan against what was reserved."""

from __future__ import annotations

import json
import statistics

import yaml

from bench.common import train_records
from bench.gpu.common import Results, base_on_disk, options, qvera, write_rows

MODES: dict[str, dict[str, dict[str, object]]] = {
    "no checkpointing": {"training": {"gradient_checkpointing": False}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "offloaded checkpoints": {"training": {"gradient_checkpointing": "offload"}},
    "streamed base": {"training": {"gradient_checkpointing": True}, "model": {"stream": True}},
    "packed": {"training": {"gradient_checkpointing": True}, "data": {"packing": True}},
    "float16": {"training": {"gradient_checkpointing": True}, "model": {"compute_dtype": "float16"}},
    "compiled": {"training": {"gradient_checkpointing": True, "torch_compile": True}},
}
"""What each mode changes in the recipe."""


def main() -> None:
    args = options(__doc__)
    results, base = Results(args.out, "modes"), base_on_disk(args)
    tokens = args.tokens[len(args.tokens) // 2]
    rows = write_rows(args.scratch / f"rows-{tokens}.jsonl", 64, tokens)
    for name, changes in MODES.items():
        if name == "compiled" and args.device == "cpu":
            continue  # inductor's C++ takes minutes to build; tests/adapters/test_compile.py has what a CPU can show
        run = args.scratch / f"mode-{name.replace(' ', '-')}"
        tree: dict[str, dict[str, object]] = {
            "model": {"path": str(base)},
            "data": {"path": str(rows), "template": "plain", "max_length": tokens},
            "adapter": {"rank": 256},
            "training": {
                "output_dir": str(run), "max_steps": args.steps, "global_batch_size": 4,
                "per_device_train_batch_size": 2, "sample_count": 0, "report_to": [],
            },
        }  # fmt: skip
        for section, keys in changes.items():
            tree[section] |= keys
        path = args.scratch / f"{run.name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        done = qvera("train", str(path), device=args.device, check=False)
        if done.returncode:
            results.add(mode=name, tokens=tokens, error=done.stderr[-1500:])
            continue
        document, records = json.loads((run / "run.json").read_text()), train_records(run)
        seconds = [record["step_seconds"] for record in records[1:]] or [records[0]["step_seconds"]]
        results.add(mode=name, tokens=tokens, step_seconds=statistics.median(seconds),
                    tokens_per_second=document["result"]["tokens_per_second"], losses=[r["loss"] for r in records],
                    peak_bytes=document["result"]["peak_bytes"], plan=document["plan"]["measured"],
                    planned_step_seconds=document["plan"]["step_seconds"])  # fmt: skip


if __name__ == "__main__":
    main()
