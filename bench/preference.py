"""DPO, ORPO or KTO on a real model: how far the margin of held-out pairs moves.

    pip install 'qvera[trl]'
    python bench/preference.py [--objective dpo] [--pairs 60] [--held-out 16] [--epochs 1] [--learning-rate 1e-2]

SmolLM2-135M-Instruct in NF4 with VeRA r=256. The rows are the quickstart's: a delivery order in free text, and the order
as JSON. The chosen answer is the right JSON; in the rejected one a single field is wrong (the count, the colour, the
item, the day or the city, in turn, taken from the next row). For KTO each pair is two judged answers. The base has seen
neither. A line for each run is added to bench/results/preference.jsonl; a number of seconds is not measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, header, write_rows
from qvera.cli.quickstart import fetch_quickstart_base
from qvera.config.schema import parse_recipe
from qvera.training.trainer import train
from qvera.utils.files import plain_json

FIELDS = ("count", "colour", "item", "day", "city")
KEPT = ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected", "kl", "rows")


def pairs(name: str, count: int) -> list[dict[str, str]]:
    """The first rows of a file of the quickstart as pairs; the wrong field differs from the right one."""
    lines = (ROOT / "recipes" / "quickstart" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = []
    for number, row in enumerate(rows[:count]):
        right, field = json.loads(row["completion"]), FIELDS[number % len(FIELDS)]
        wrong = json.loads(row["completion"])
        place = "to" if field == "city" else None
        for other in rows[number + 1 :] + rows[:number]:
            values = json.loads(other["completion"])
            value = values["to"]["city"] if place else values[field]
            if value != (right["to"]["city"] if place else right[field]):
                break
        (wrong["to"] if place else wrong)[field] = value
        text = json.dumps(wrong, ensure_ascii=False, separators=(",", ":"))
        found.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": text})
    return found


def judged(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each pair as a good and a bad answer."""
    kinds = (("chosen", True), ("rejected", False))
    return [{"prompt": row["prompt"], "completion": row[key], "label": label} for row in rows for key, label in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=["dpo", "orpo", "kto"], default="dpo")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    args = parser.parse_args()
    about = header()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        made = pairs("train", args.pairs), pairs("heldout", args.held_out)
        rows, held_out = map(judged, made) if args.objective == "kto" else made
        recipe = parse_recipe(
            {
                "model": {"path": str(fetch_quickstart_base())},
                "data": {
                    "path": write_rows(place / "train.jsonl", rows),
                    "eval_path": write_rows(place / "heldout.jsonl", held_out),
                    "system": "Reply in JSON.",
                    "max_length": 256,
                },
                "training": {
                    "objective": args.objective,
                    "num_train_epochs": args.epochs,
                    "global_batch_size": 4,
                    "learning_rate": args.learning_rate,
                    "sample_count": 0,
                    "report_to": [],
                },
            },
            "bench/preference.py",
        )
        result = train(recipe, place / "run")
        assert result is not None
        run = result.run
    scores = {when: {k: run["result"][when].get(k) for k in KEPT} for when in ("eval_before", "eval_after")}
    line = {
        **about,
        "trl": version("trl"),
        "objective": args.objective,
        "pairs": args.pairs,
        "steps": run["result"]["steps"],
        "learning_rate": args.learning_rate,
        "trained_parameters": run["adapter"]["trainable_parameters"],
        "peak_bytes": run["result"]["peak_bytes"],
        "mapped_bytes": run["result"]["mapped_bytes"],
        **scores,
    }
    with open(RESULTS / "preference.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(plain_json(line)) + "\n")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
