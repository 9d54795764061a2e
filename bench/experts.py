"""What adapting experts is worth: a small Mixtral, trained here from scratch, then adapted with its experts left alone or not.

The base learns the quickstart's rows (orders -> JSON) with plain torch. Each trial then learns the customers' rows, which ask
for other formats, with VeRA of one rank and the same rows, order and steps. A line for each trial:

    python bench/experts.py SCRATCH          # some ten minutes on two cores; bench/results/experts.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from bench.common import RESULTS, ROOT, do_missing, train_facts
from bench.synthesise import tokenizer as byte_tokenizer
from qvera.config.schema import Recipe, parse_recipe

ROWS = ROOT / "recipes" / "quickstart" / "train.jsonl"
SHAPE: dict[str, Any] = {
    "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    "router_aux_loss_coef": 0.01, "output_router_logits": True, "tie_word_embeddings": True,
}  # fmt: skip
PRETRAINING = {"steps": 250, "rows": 8, "learning_rate": 3e-3}
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Trial:
    """``experts``: the recipe's ``adapter.experts``; ``frozen``: no step is taken."""

    experts: str
    rank: int
    learning_rate: float
    steps: int


def pretrain(out: Path) -> None:
    """The base, in bfloat16, with a tokenizer of bytes; its loss on the last rows goes to standard error."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}],
            tokenize=False,
        )
        for row in rows
    ]
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SHAPE)
    model = MixtralForCausalLM(config)
    steps, each = int(PRETRAINING["steps"]), int(PRETRAINING["rows"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAINING["learning_rate"], steps)
    began = time.perf_counter()
    for step in range(steps):
        chosen = [texts[i] for i in torch.randint(len(texts), (each,)).tolist()]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=320)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def recipe_of(trial: Trial, base: Path) -> Recipe:
    tree = {
        "model": str(base),
        "data": {"path": str(ROOT / "recipes" / "customers" / "rows.csv"), "eval_fraction": 0.25, "max_length": 256},
        "adapter": {"rank": trial.rank, "experts": trial.experts},
        "training": {
            "max_steps": trial.steps, "learning_rate": trial.learning_rate, "global_batch_size": 16,
            "per_device_train_batch_size": 16, "warmup_ratio": 0.1, "gradient_checkpointing": False, "report_to": [],
        },
    }  # fmt: skip
    return parse_recipe(tree, "bench/experts.py")


def trials(steps: int) -> list[Trial]:
    return [Trial(experts, 64, rate, steps) for experts in ("none", "shared", "each") for rate in (0.01, 0.03, 0.1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="for the base and the runs")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    base = args.scratch / "mixtral"
    if not (base / "config.json").is_file():
        pretrain(base)
    AutoModelForCausalLM.from_pretrained(base)  # it opens as published models do

    def do(trial: Trial) -> dict[str, Any]:
        out = args.scratch / f"{trial.experts}-{trial.rank}-{trial.learning_rate:g}-{trial.steps}"
        return {**train_facts(recipe_of(trial, base), out), "scores": None}

    do_missing(RESULTS / "experts.jsonl", Trial, lambda: trials(args.steps), do)


if __name__ == "__main__":
    main()
