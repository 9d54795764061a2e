"""How often the line at the end of `qvera train` about the loss is right, over the trials in results/.

    python -m bench.loss_line --data ../shared/data            # computes results/loss_before.json where it is missing
    python -m bench.loss_line

Advice is due after a trial that gained less than half of what the best trial on its task gained, whatever the rate, method and
steps: in held-out loss, or where its answers were scored in right ones beyond those of the commonest label. It is given where
the loss fell by less than a threshold, or no more answers are right than that label gives (`qvera.cli.train.loss_line`).

The trials have no loss before training. Here it is the base's on the first 60 held-out rows, and for a classifier that of a head
which knows nothing, the logarithm of the number of labels.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

from bench import family
from bench.common import RESULTS, header, markdown, read_lines, write_result
from qvera.cli.train import HARDLY
from qvera.data import build_datasets
from qvera.evaluation import held_out
from qvera.models.loader import load_base

THRESHOLDS = (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3)
COMMONEST = {"trec": 0.276, "sst2": 0.509, "rte": 0.527}
"""Task → the share of its test rows that have the commonest label."""
LABELS = {"trec": 6, "sst2": 2, "rte": 2}


class Outcome(NamedTuple):
    """What a trial came to. ``right``: the share of right answers, where they were scored."""

    task: str
    before: float
    after: float
    right: float | None = None
    commonest: float = 0.0
    kind: str = ""  # trials of one kind differ by their rates alone

    @property
    def fall(self) -> float:
        return (self.before - self.after) / self.before

    def gain(self, scored: bool) -> float:
        """What counts when trials are compared: right answers, or the loss."""
        return (self.right or 0.0) - self.commonest if scored else self.fall


def compute_before(data: Path) -> None:
    """Write the base's held-out loss on the tasks of bench/family.py to results/loss_before.json."""
    losses, base = {}, None
    for task in family.TASKS:
        with tempfile.TemporaryDirectory() as directory:
            keys = family.prepare(task, data, Path(directory))
            recipe = family.recipe_of(family.Trial("vera", task, 0.1, 1), keys, Path(directory) / "run")
            section = recipe.data.replace(path=keys["test"], eval_limit=60)  # the fewest rows that are not held out
            base = base or load_base(recipe.model)
            rows = build_datasets(section, base.tokenizer)
            found = held_out.held_out_loss(base.model, rows.eval, pad_id=rows.pad_id, batch_size=4, chunk_tokens=512)
        losses[task] = found["loss"]
    write_result("loss_before", {**header(), "held_out_loss": losses})


def outcomes() -> list[Outcome]:
    """All trials with a held-out loss."""
    before = json.loads((RESULTS / "loss_before.json").read_text())["held_out_loss"]
    found = []
    for line in read_lines(RESULTS / "family.jsonl"):
        task, right = line["task"], (line["scores"] or {}).get("accuracy")
        share = None if right is None else right / 100
        found.append(Outcome(f"{task}, answers", before[task], line["held_out_loss"], share, COMMONEST.get(task, 0.0),
                             f"{line['method']}, {line['steps']} steps"))  # fmt: skip
    alpaca = read_lines(RESULTS / "alpaca.jsonl")
    frozen = next(line["held_out_loss"] for line in alpaca if line["trial"]["method"] == "frozen")
    found += [Outcome("alpaca, 50 steps", frozen, x["held_out_loss"]) for x in alpaca if x["trial"]["steps"]]
    for line in read_lines(RESULTS / "classification.jsonl"):
        task = line["task"]
        right = (line["scores"] or {}).get("accuracy")
        name = f"{task}, a head on {line['base']}"
        found.append(Outcome(name, math.log(LABELS[task]), line["held_out_loss"], right, COMMONEST[task],
                             f"{line['method']}, {line['steps']} steps"))  # fmt: skip
    return [one for one in found if one.after is not None]


def is_due(one: Outcome, others: list[Outcome]) -> bool:
    """Whether a trial should be followed by advice: it has less than half of the best gain on its task, or there is none."""
    scored = one.right is not None
    best = max(other.gain(scored) for other in others if other.task == one.task and (other.right is not None) == scored)
    return best <= 0.02 or one.gain(scored) < best / 2


def table() -> str:
    found = outcomes()
    due = [is_due(one, found) for one in found]
    rows = []
    for looks in (False, True):
        for threshold in THRESHOLDS:
            given = [
                one.fall < threshold
                or (
                    looks
                    and one.task.endswith("answers")
                    and one.right is not None
                    and one.right <= one.commonest + 0.005
                )
                for one in found
            ]
            caught = sum(g and d for g, d in zip(given, due, strict=True))
            needless = sum(g and not d for g, d in zip(given, due, strict=True))
            agree = sum(g == d for g, d in zip(given, due, strict=True))
            chosen = " (chosen)" if looks and threshold == HARDLY else ""
            rows.append([
                f"{threshold:.0%}{chosen}", "yes" if looks else "no", f"{caught} of {sum(due)}",
                f"{needless} of {len(due) - sum(due)}", f"{agree / len(due):.1%}",
            ])  # fmt: skip
    return markdown(("fell by less than", "looks at answers", "advice where due", "where not", "right"), rows)


def by_another_rate() -> str:
    """Whether another rate is the right advice: over trials of rates, on tasks that were learnt at one of them."""
    found = [one for one in outcomes() if one.kind.endswith((" 50 steps", " 100 steps"))]
    good = {(one.task, one.kind) for one in found if not is_due(one, found)}
    poor = [one for one in found if is_due(one, found) and one.task in {task for task, _ in good}]
    helped = sum((one.task, one.kind) in good for one in poor)
    return (
        f"After {helped} of {len(poor)} trials of 50 or 100 steps with little gain, another rate gained more than half."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the directory with the sets")
    args = parser.parse_args()
    if args.data is not None and not (RESULTS / "loss_before.json").exists():
        compute_before(args.data)
    print(table())
    print(by_another_rate())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
