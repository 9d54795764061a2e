"""E2E NLG on SmolLM2-135M in NF4: the frozen base, stock PEFT LoRA and VeRA, and ours, with the same rows, order and steps.

    python bench/e2e.py sweep ../shared/data/e2e     # every trial of SWEEP, scored on a held-out part of the dev set
    python bench/e2e.py final ../shared/data/e2e     # what the sweep chose, three seeds, scored on all 630 test inputs
    python bench/e2e.py table                        # the finals as a Markdown table

A tenth of the dev set's inputs is held out with all of their references (no input is on both sides); settings are
chosen by the loss on those rows. The test set scores what was chosen and nothing else. Lines go to
results/e2e-sweep.jsonl and e2e-final.jsonl; a trial that stands there is not repeated. BLEU is sacrebleu's, lower case,
all references of an input; NIST is nltk's; METEOR and CIDEr are pycocoevalcap's, as in the paper's own scorer (METEOR
1.5 and the tokenizer run in Java). Beside `.[test]` it needs `pip install nltk pycocoevalcap`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import random
import tempfile
from pathlib import Path
from typing import Any

from bench.common import RESULTS, header, smollm2
from bench.trials import MORE, Trial, Written, add_half, run
from qvera.config.schema import Recipe, load_recipe
from qvera.data import build_datasets
from qvera.evaluation.held_out import answer_rows
from qvera.evaluation.metrics import scores_of, text_metrics

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "e2e" / "smollm2-135m.yaml"
SEEDS = (0, 1, 2)


def lora(**keys: Any) -> Trial:
    return Trial(method="lora", **{"rank": 16, **keys})


def ours(**keys: Any) -> Trial:
    return Trial(method="qvera", **keys)


SWEEP = [
    *(lora(learning_rate=rate, steps=50) for rate in (1e-3, 2e-3, 4e-3, 8e-3)),
    *(ours(rank=256, learning_rate=rate, steps=50) for rate in (3e-2, 0.1, 0.2)),
    ours(rank=256, learning_rate=0.1, d_initial=0.3, steps=50),
    lora(learning_rate=4e-3, b_rate=8e-3, steps=50),
    ours(rank=1024, learning_rate=0.1, steps=50),
    ours(rank=1024, learning_rate=5e-2, steps=50),
    ours(rank=256, learning_rate=0.1, targets="q_proj,v_proj", steps=50),
    ours(rank=256, learning_rate=0.1, schedule="linear", steps=50),
    lora(rank=64, learning_rate=2e-3, steps=50),
    lora(learning_rate=4e-3, targets="q_proj,v_proj", steps=50),
    lora(learning_rate=4e-3, schedule="linear", steps=50),
    ours(**MORE, learning_rate=0.1, schedule="linear", steps=50),
    lora(rank=64, learning_rate=2e-3, schedule="linear", steps=50),
    ours(**MORE, learning_rate=7e-2, schedule="linear", steps=50),
    lora(learning_rate=6e-3, schedule="linear", steps=50),
    ours(**MORE, learning_rate=0.13, schedule="linear", steps=50),
    lora(learning_rate=3e-3, schedule="linear", steps=50),
    lora(rank=32, learning_rate=4e-3, schedule="linear", steps=50),
    ours(rank=256, learning_rate=0.1, b_groups=8, input_scale=True, schedule="linear", steps=50),
    *(trial for lora_rate, rate in ((2e-3, 0.1), (4e-3, 7e-2), (6e-3, 5e-2)) for trial in (
        lora(learning_rate=lora_rate, schedule="linear", steps=200),
        ours(**MORE, learning_rate=rate, schedule="linear", steps=200),
    )),
]  # fmt: skip
"""At least as many of LoRA as of ours, fifty steps each; the best of each is trained for longer. What led to the vectors beyond
VeRA's is in bench/variants.py. The rates are tried at 200 steps too, where smaller ones may do better."""

FINAL = [
    lora(learning_rate=4e-3, steps=100),
    ours(rank=256, learning_rate=0.1, steps=100),
    lora(learning_rate=4e-3, schedule="linear", steps=100),
    ours(rank=256, learning_rate=0.1, schedule="linear", steps=100),
    ours(**MORE, learning_rate=0.1, schedule="linear", steps=100),
    lora(learning_rate=6e-3, schedule="linear", steps=100),
    lora(rank=64, learning_rate=2e-3, schedule="linear", steps=100),
    lora(learning_rate=4e-3, schedule="linear", steps=200),
    ours(**MORE, learning_rate=7e-2, schedule="linear", steps=200),
]
"""The best of each kind, as the sweep grew: with the cosine of its first trials, and with the linear decay that came out best; of
two within 0.001 the one with fewer settings of its own. LoRA r=64 is 0.0013 behind r=16 there, so it stands here too.
"""

ONCE = [Trial(method="vera", rank=256, learning_rate=1e-2, steps=100), Trial(method="frozen")]
"""With one seed, for scale: stock PEFT's VeRA at a rate that nobody tuned, and no training."""


def references(path: Path) -> dict[str, list[str]]:
    """Input → all of its references, in the file's order."""
    found: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["mr"], []).append(row["ref"])
    return found


def write_rows(path: Path, inputs: dict[str, list[str]]) -> Path:
    """A CSV file like the data set's own, one row a reference."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        writer.writerows((mr, ref) for mr, refs in inputs.items() for ref in refs)
    return path


def recipe_of(data: Path, to: Path) -> Recipe:
    """The recipe, with a tenth of the dev set's inputs held out."""
    inputs = references(data / "devset.csv")
    held_out = set(random.Random("qvera e2e").sample(sorted(inputs), len(inputs) // 10))
    train = write_rows(to / "train.csv", {mr: refs for mr, refs in inputs.items() if mr not in held_out})
    heldout = write_rows(to / "heldout.csv", {mr: refs for mr, refs in inputs.items() if mr in held_out})
    return load_recipe(RECIPE, [f"model.path={smollm2()}", f"data.path={train}", f"data.eval_path={heldout}",
                                "data.eval_fraction=0"])  # fmt: skip


def answered(model: Any, tokenizer: Any, recipe: Recipe, inputs: dict[str, list[str]]) -> dict[str, Any]:
    """Greedy answers to every input, scored against all of its references."""
    from nltk.translate.nist_score import corpus_nist  # here: other benches take the rows without these scores

    firsts = write_rows(Path(recipe.data.path).parent / "asked.csv", {mr: refs[:1] for mr, refs in inputs.items()})
    asked = build_datasets(recipe.data.replace(eval_path=str(firsts)), tokenizer).eval
    tokens = recipe.training.sample_max_new_tokens
    rows = answer_rows(model, tokenizer, asked, max_new_tokens=tokens, batch_size=42)
    answers, wanted = [" ".join(row["answer"].split()) for row in rows], list(inputs.values())
    if [row["reference"] for row in rows] != [refs[0] for refs in wanted]:
        raise SystemExit("the answers are not in the order of the inputs")
    found = scores_of(text_metrics(["bleu-lowercase", "rougeL", "chrf", "ter"]), answers, wanted)
    words = [answer.lower().split() for answer in answers]
    found["nist"] = float(corpus_nist([[ref.lower().split() for ref in refs] for refs in wanted], words))
    return {**found, **caption_scores(answers, wanted), "inputs": len(answers)}


def caption_scores(answers: list[str], wanted: list[list[str]]) -> dict[str, float]:
    """METEOR (0 to 100) and CIDEr (0 to 10)."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenize = PTBTokenizer().tokenize
    said = tokenize({i: [{"caption": answer}] for i, answer in enumerate(answers)})
    references = tokenize({i: [{"caption": ref} for ref in refs] for i, refs in enumerate(wanted)})
    meteor, cider = (scorer.compute_score(references, said)[0] for scorer in (Meteor(), Cider()))
    return {"meteor": 100 * float(meteor), "cider": float(cider)}


def table() -> str:
    """The finals as a Markdown table: mean over the seeds, and the lowest and highest."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in Written(RESULTS / "e2e-final.jsonl", header()).lines:
        groups.setdefault(str(Trial(**{**line["trial"], "seed": 0})), []).append(line)
    metrics = {"bleu-lowercase": ("BLEU", 1), "rougeL": ("ROUGE-L", 3), "nist": ("NIST", 2), "meteor": ("METEOR", 1),
               "cider": ("CIDEr", 2), "chrf": ("chrF", 1), "ter": ("TER", 1)}  # fmt: skip
    rows = [f"| | trained numbers | seeds | {' | '.join(name for name, _ in metrics.values())} |",
            "|" + "---|" * (3 + len(metrics))]  # fmt: skip
    for name, lines in groups.items():
        cells = [name, f"{lines[0]['trainable']:,}", str(len(lines))]
        for metric, (_, digits) in metrics.items():
            found = [line[metric] for line in lines if metric in line]
            if len(found) < len(lines):  # METEOR and CIDEr came later
                cells.append("")
                continue
            low, high = (f"{bound(found):.{digits}f}" for bound in (min, max))
            cells.append(f"{sum(found) / len(found):.{digits}f}" + (f" ({low} to {high})" if len(found) > 1 else ""))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["sweep", "final", "table"])
    parser.add_argument("data", type=Path, nargs="?", help="directory with devset.csv and testset_w_refs.csv")
    add_half(parser)
    parser.add_argument(
        "--keep", type=Path, help="directory for what was trained, so that `final` need not train it again"
    )
    args = parser.parse_args()
    if args.what == "table":
        print(table())
        return
    if args.data is None:
        parser.error("data: name the directory with devset.csv and testset_w_refs.csv")
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    trials = SWEEP if args.what == "sweep" else [*(dataclasses.replace(t, seed=s) for s in SEEDS for t in FINAL), *ONCE]
    written = Written(RESULTS / f"e2e-{args.what}.jsonl", header())
    with tempfile.TemporaryDirectory() as directory:
        recipe = recipe_of(args.data, Path(directory))
        if args.what == "final":  # which is scored on the test set alone
            recipe = recipe.replace(data=recipe.data.replace(eval_path=None))
        for trial in written.missing(trials, args.half):
            model, base, _, facts = run(trial, recipe, args.keep)
            if args.what == "final":
                facts |= answered(model, base.tokenizer, recipe, references(args.data / "testset_w_refs.csv"))
            written.add(trial, facts)


if __name__ == "__main__":
    main()
