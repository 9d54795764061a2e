"""Fine-tune a model in 4-bit with VeRA, from Python.

    python examples/finetune.py                              # the quickstart's model and rows
    python examples/finetune.py MODEL ROWS OUT --steps 100   # any Llama, any data file that qvera reads

The defaults need `qvera quickstart --fetch-only` once.
"""

import argparse
from pathlib import Path

import qvera
from qvera.utils.files import cache_root

cache = cache_root() / "quickstart"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default=str(cache / "smollm2-135m-instruct"))
parser.add_argument("rows", nargs="?", default=str(cache / "orders" / "train.jsonl"))
parser.add_argument("out", nargs="?", default="runs/finetune", type=Path)
parser.add_argument("--steps", type=int, default=60)
args = parser.parse_args()

# A recipe is the same tree as in YAML. What it does not say has a default (docs/recipe.md).
recipe = qvera.Recipe(
    model={"path": args.model, "quantization": "nf4"},
    data={"path": args.rows, "eval_fraction": 0.05, "max_length": 256},
    adapter={"rank": 256, "targets": "all-linear"},
    training={"max_steps": args.steps, "global_batch_size": 4, "learning_rate": 3e-2, "sample_max_new_tokens": 40},
)
result = qvera.train(recipe, args.out).run["result"]
print(f"held-out loss {result['eval_before']['loss']:.3f} → {result['eval_after']['loss']:.3f}")
print(*qvera.generate(args.out, "Please send two blue mugs to Ann in Leeds.", max_new_tokens=60))
