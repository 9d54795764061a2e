"""Training by a reward (`training.objective: grpo`): VeRA beside LoRA each at its own best rate, over three seeds.

    python -m bench.rewards [--task orders] [--trials 4]     # goes on where it stopped
    python -m bench.rewards --page docs/rewards.md           # writes the tables into it, and rewards.svg beside it

SmolLM2-135M-Instruct in NF4, in steps of 4 prompts with 8 answers each. ``sums`` is recipes/rewards/sums.yaml: the reward is 1 where
the last number of the answer is the sum. ``orders`` is recipes/rewards/orders.yaml: 1 where the answer equals the quickstart's JSON. Its base is
the model after 32 steps of the quickstart, merged, the same for all; the first trial makes it in runs/begun-merged. One line a trial
in results/rewards.jsonl or rewards-orders.jsonl. A search begins at a guessed rate and tries the neighbours of
the best so far, a factor of 3 away, until both are worse; the mean reward of the last 10 training steps chooses, with seed 0.
The best rate is then trained with seeds 1 and 2. ``eval_after`` is the share of right greedy answers to held-out prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

import qvera
from bench.common import RESULTS, ROOT, do_missing, markdown, read_lines, smollm2, train_records, with_table
from qvera.config.schema import Recipe, load_recipe
from qvera.training.trainer import train
from qvera.utils.files import read_json

SEEDS, STEPS, LAST, PROMPTS = (0, 1, 2), 40, 10, 4
TASKS = {"sums": "rewards.jsonl", "orders": "rewards-orders.jsonl"}
BEGUN_STEPS = 32
RECIPES = ROOT / "recipes"
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "VeRA r=64": ({"rank": 64}, 2),
    "LoRA r=1": ({"method": "lora", "rank": 1}, 0),
    "VeRA r=256": ({"rank": 256}, 2),
    "LoRA r=16": ({"method": "lora", "rank": 16}, -1),
}
"""Label → keys of the adapter, and where its search begins (`rate_of`)."""


@dataclasses.dataclass(frozen=True)
class Trial:
    method: str
    rate: int
    seed: int = 0


def rate_of(power: int) -> float:
    """0: 0.001; one more: 3 times as much."""
    return float(f"{1e-3 * 3**power:.3g}")


def plan(lines: list[dict[str, Any]]) -> Iterator[Trial]:
    """Asked anew after each trial; what comes after the first missing one is not final."""
    # the method with the fewest trials goes on, so that a table that is cut off has all of them
    for method in sorted(METHODS, key=lambda method: sum(line["method"] == method for line in lines)):
        best = best_of(method, lines)
        if best is None:
            yield Trial(method, METHODS[method][1])
        else:
            yield from (Trial(method, best["rate"] + step) for step in (1, -1))
            yield from (Trial(method, best["rate"], seed) for seed in SEEDS)


def best_of(method: str, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The line of seed 0 with the highest reward in its last steps."""
    same = [line for line in lines if line["method"] == method and line["seed"] == 0]
    return max(same, key=lambda line: line["reward_of_last_steps"], default=None)


def base_of(task: str) -> str:
    """Directory of the base: of ``orders`` one that has begun to answer in JSON."""
    if task == "sums":
        return smollm2()
    merged, rows = ROOT / "runs" / "begun-merged", RECIPES / "quickstart"
    if not merged.exists():
        recipe = load_recipe(RECIPES / "quickstart.yaml")
        recipe = recipe.replace(
            model=recipe.model.replace(path=smollm2()),
            data=recipe.data.replace(path=str(rows / "train.jsonl"), eval_path=str(rows / "heldout.jsonl")),
            training=recipe.training.replace(max_steps=BEGUN_STEPS),
        )
        with tempfile.TemporaryDirectory() as directory:
            train(recipe, Path(directory) / "run", console=Console(quiet=True))
            # not into the dequantized weights: rounding those to NF4 again gives the base without what was trained
            qvera.export(Path(directory) / "run", merged, base="original")
    return str(merged)


def recipe_of(trial: Trial, base: str, task: str) -> Recipe:
    recipe = load_recipe(RECIPES / "rewards" / f"{task}.yaml")
    training = recipe.training.replace(
        max_steps=STEPS, eval_steps=STEPS, global_batch_size=PROMPTS, learning_rate=rate_of(trial.rate), seed=trial.seed
    )
    adapter = recipe.adapter.replace(seed=trial.seed, **METHODS[trial.method][0])
    return recipe.replace(
        model=recipe.model.replace(path=base, compute_dtype="bfloat16"),  # auto would be another dtype on another CPU
        data=recipe.data.replace(seed=trial.seed),
        adapter=adapter,
        training=training,
    )


def do(trial: Trial, base: str, task: str) -> dict[str, Any]:
    used = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        train(recipe_of(trial, base, task), run_dir, console=Console(quiet=True))
        rewards = [record["reward"] for record in train_records(run_dir)]
        run = read_json(run_dir / "run.json", "a run's record")
    scores = {"before": run["result"]["eval_before"]["reward"], "after": run["result"]["eval_after"]["reward"]}
    return {
        "learning_rate": rate_of(trial.rate),
        "trained": run["adapter"]["trainable_parameters"],
        "rewards": [round(reward, 4) for reward in rewards],
        "reward_of_last_steps": statistics.mean(rewards[-LAST:]),
        "scores": scores,
        "rows": run["result"]["eval_after"]["rows"],
        "cpu_seconds": time.process_time() - used,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table: a row for each method at its best rate so far."""
    rows = []
    for method in METHODS:
        best = best_of(method, lines)
        if best is None:
            continue
        mine = [line for line in lines if line["method"] == method]
        tried = {line["rate"] for line in mine if line["seed"] == 0}
        final = [line for line in mine if line["rate"] == best["rate"]]
        is_interior = {best["rate"] - 1, best["rate"] + 1} <= tried

        def shown(values: list[float]) -> str:
            text = " ".join(f"{100 * value:.0f}" for value in values)
            return f"{100 * statistics.mean(values):.1f} ({text})"

        cells = [method, f"{best['trained']:,}", f"{best['learning_rate']:g}", "yes" if is_interior else "no"]
        cells += [shown([statistics.mean(line["rewards"][:LAST]) for line in final])]
        cells += [
            shown([line["reward_of_last_steps"] for line in final]),
            shown([line["scores"]["after"] for line in final]),
        ]
        rows.append(cells)
    titles = ["method", "trained", "best rate", "interior"]
    titles += [f"reward of the first {LAST} steps, %", f"of the last {LAST}", "held-out, greedy"]
    return markdown(titles, rows)


_LEFT, _TOP, _WIDTH, _HEIGHT = 44, 44, 200, 150
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1a1d20}.soft{fill:#555d66;font-size:12px}.grid{stroke:#d8dde0}"
    "path{fill:none;stroke:#00696f}.seed{opacity:.35}.mean{stroke-width:2.5}"
    "@media(prefers-color-scheme:dark){text{fill:#e7e9ea}.soft{fill:#a1a9b1}.grid{stroke:#3c444a}path{stroke:#5cc7c0}}"
)


def picture(tasks: dict[str, list[dict[str, Any]]]) -> str:
    """A standalone SVG: a row for each task, a panel for each method; the reward by step, at the best rate."""
    width, row_height = len(METHODS) * (_LEFT + _WIDTH + 10), _TOP + _HEIGHT + 40
    height = len(tasks) * row_height + 20
    said = "Mean reward by step of each method at its best rate, over its seeds"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{said}">',
        f"<style>{_STYLE}</style>",
    ]
    for row, (task, lines) in enumerate(tasks.items()):
        for column, method in enumerate(METHODS):
            if (best := best_of(method, lines)) is not None:
                seeds = [line["rewards"] for line in lines if (line["method"], line["rate"]) == (method, best["rate"])]
                left, top = column * (_LEFT + _WIDTH + 10) + _LEFT, row * row_height + _TOP
                parts += _panel(f"{task}: {method} at {best['learning_rate']:g}", seeds, left, top)
    note = "Thin: a seed. Thick: the mean. Each is the mean of five steps."
    parts.append(f'<text class="soft" x="12" y="{height - 8}">{note}</text></svg>')
    return "\n".join(parts) + "\n"


def _panel(title: str, seeds: list[list[float]], left: int, top: int) -> list[str]:
    parts = [f'<text x="{left}" y="{top - 14}">{title}</text>']
    for share in (0, 0.5, 1):
        y = top + _HEIGHT * (1 - share)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + _WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="soft" x="{left - 6}" y="{y + 4}" text-anchor="end">{share:.0%}</text>')
    for step in (10, 20, 30, 40):
        x = left + _WIDTH * step / STEPS
        parts.append(f'<text class="soft" x="{x}" y="{top + _HEIGHT + 18}" text-anchor="middle">{step}</text>')
    mean = [statistics.mean(rewards) for rewards in zip(*seeds, strict=True)]
    for kind, rewards in [*(("seed", one) for one in seeds), ("mean", mean)]:
        smooth = [statistics.mean(rewards[max(0, step - 4) : step + 1]) for step in range(len(rewards))]
        points = [
            f"{left + _WIDTH * (step + 1) / STEPS:.1f} {top + _HEIGHT * (1 - value):.1f}"
            for step, value in enumerate(smooth)
        ]
        parts.append(f'<path class="{kind}" d="M{" L".join(points)}"/>')
    return parts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=TASKS, default="sums")
    parser.add_argument("--page", type=Path, help="write tables and picture of what stands there, and train nothing")
    parser.add_argument("--trials", type=int, help="stop after as many")
    args = parser.parse_args()
    lines = RESULTS / TASKS[args.task]
    if args.page:
        found = {task: read_lines(RESULTS / file) for task, file in TASKS.items() if (RESULTS / file).exists()}
        for task, of_task in found.items():
            args.page.write_text(with_table(args.page.read_text(), task, table(of_task)))
        args.page.with_suffix(".svg").write_text(picture(found))
        return
    base = base_of(args.task)
    do_missing(lines, Trial, lambda: plan(read_lines(lines)), lambda trial: do(trial, base, args.task), args.trials)


if __name__ == "__main__":
    main()
