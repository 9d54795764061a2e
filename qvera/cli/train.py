"""`qvera train` and `qvera launch`."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qvera.cli.common import (
    FindLr,
    LrFrom,
    LrSteps,
    LrTo,
    Overrides,
    RecipePath,
    Resume,
    console,
    flag,
    for_who_still_reads,
    number,
    option,
)
from qvera.config.sections import LrRange
from qvera.utils import formatting
from qvera.utils.adapter_names import shown_name
from qvera.utils.errors import InputError
from qvera.utils.files import RECIPE_FILE

if TYPE_CHECKING:
    from qvera.training.lr_finder import RangeTestResult


def train(
    recipe: RecipePath,
    overrides: Overrides,
    resume: Resume = False,
    dry_run: Annotated[bool, flag("--dry-run", "Check, show rows and plan, then stop.")] = False,
    find_lr: FindLr = False,
    lr_from: LrFrom = None,
    lr_to: LrTo = None,
    lr_steps: LrSteps = None,
) -> None:
    """Train an adapter as a recipe describes, or many.

    Writes adapter/ (or adapters/), checkpoints/, recipe.yaml, metrics.jsonl, run.json and report.html into
    training.output_dir (default: runs/RECIPE_NAME). Ctrl-C saves after the current step; --resume continues from there.

    Example:
        qvera train recipes/quickstart.yaml --set training.max_steps=100
    """
    from qvera.config.schema import load_recipe

    loaded = load_recipe(recipe, overrides, of_a_run=resume)
    ramp = _range_test(find_lr, lr_from, lr_to, lr_steps, resume=resume, dry_run=dry_run)

    from qvera.training import trainer

    run_dir = trainer.run_directory(loaded, recipe)
    # both give None in one of several processes that is not the first
    if ramp is not None:
        if (curve := trainer.find_lr(loaded, run_dir, ramp, console=console)) is not None:
            _print_curve(curve, run_dir, ramp)
        return
    result = trainer.train(loaded, run_dir, resume=resume, dry_run=dry_run, console=console)
    if result is not None:
        from qvera.training.alone import depends_on_length

        with for_who_still_reads():
            print_result(result.run_dir, result.run)
            sets = [part for override in overrides for part in ("--set", override)]
            count = result.run["processes"]["count"]
            begin = ["train", str(recipe)] if count == 1 else ["launch", str(recipe), "--gpus", str(count)]
            command = shlex.join(["qvera", *begin, *sets])
            has_rewards, fixed_length = loaded.training.reward is not None, depends_on_length(loaded)
            print(f"loss              {loss_line(result.run, command, has_rewards, fixed_length)}")


def launch(
    recipe: RecipePath,
    overrides: Overrides,
    gpus: Annotated[int | None, number("Processes per machine (default: GPUs).")] = None,
    hostfile: Annotated[Path | None, option("FILE", "A line `HOST slots=N` a machine.")] = None,
    node_rank: Annotated[int | None, option("K", "This machine's number, from 0.")] = None,
    nnodes: Annotated[int | None, option("N", "Number of machines.")] = None,
    rdzv: Annotated[str | None, option("HOST:PORT", "Where machine 0 is reached.")] = None,
    max_restarts: Annotated[int, number("Restarts from the last checkpoint.", 0)] = 0,
    resume: Resume = False,
    find_lr: FindLr = False,
    lr_from: LrFrom = None,
    lr_to: LrTo = None,
    lr_steps: LrSteps = None,
) -> int:
    """Train with several processes or machines.

    On one machine: --gpus N. From one machine on all that a host file names, by ssh: --hostfile FILE. Under a
    scheduler, on each machine: --node-rank K --nnodes N --rdzv HOST:PORT.

    It prints and runs torchrun, or deepspeed for a host file. Both also work directly: torchrun ... -m qvera train
    RECIPE. The recipe's deepspeed key says how the processes share the model.

    Example:
        qvera launch recipes/instruct/llama2-7b.yaml --gpus 4
    """
    from qvera.config.schema import load_recipe
    from qvera.distributed import launch as launcher
    from qvera.training.run_dir import check_run_dir, require_writable
    from qvera.training.trainer import check_early, run_directory

    # an error is reported once, before anything starts
    loaded = load_recipe(recipe, overrides, of_a_run=resume)
    _range_test(find_lr, lr_from, lr_to, lr_steps, resume=resume)
    if not (resume or find_lr or node_rank):
        require_writable(run_dir := run_directory(loaded, recipe))
        check_run_dir(run_dir, loaded, resume)
    check_early(loaded)
    arguments = [part for override in overrides for part in ("--set", override)]
    arguments += ["--resume"] * resume + ["--find-lr"] * find_lr
    for name, value in (("--lr-from", lr_from), ("--lr-to", lr_to), ("--lr-steps", lr_steps)):
        arguments += [] if value is None else [name, str(value)]
    command = launcher.launch_command(
        recipe,
        gpus=gpus,
        hostfile=hostfile,
        node_rank=node_rank,
        nnodes=nnodes,
        rdzv=rdzv,
        max_restarts=max_restarts,
        train_arguments=arguments,
    )
    if hostfile is not None:
        launcher.require_hosts(hostfile)
    print(shlex.join(command), file=sys.stderr)
    return launcher.run(command)


def _range_test(
    find_lr: bool, lr_from: float | None, lr_to: float | None, lr_steps: int | None, **of_a_run: bool
) -> LrRange | None:
    """The range test that --find-lr asks for; None: a run. InputError if options contradict each other."""
    values = {"start": lr_from, "end": lr_to, "steps": lr_steps}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if not find_lr:
        if given:
            raise InputError("--lr-from, --lr-to, --lr-steps go with --find-lr only; a run has training.learning_rate.")
        return None
    for name, value in of_a_run.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option}: goes with a run, and --find-lr makes none; drop one of them.")
    return LrRange(**given)


def _print_curve(found: RangeTestResult, run_dir: Path, ramp: LrRange) -> None:
    from qvera.training.lr_finder import PAGE, POINTS, RULE, rate_text

    if found.diverged is not None:
        print(f"diverged          at {rate_text(found.diverged)}, step {found.points[-1]['step']} of {ramp.steps}")
    else:
        print(f"diverged          not up to {rate_text(ramp.end)}; a higher --lr-to would show where")
    if found.steepest is not None:
        print(f"steepest fall     at {rate_text(found.steepest)}")
    if found.suggestion is None:
        print(f"suggestion        none: {found.reason}")
    else:
        begun = (run_dir / RECIPE_FILE).exists()
        elsewhere = ", with another training.output_dir: a run is in this one" if begun else ""
        print(f"suggestion        --set training.learning_rate={found.suggestion:.2g}{elsewhere}")
        print(f"                  {RULE}; worth a try down to the steepest fall")
    if found.known is not None:
        print(f"known before      {rate_text(found.known)}, of other rows near this hidden size (docs/evaluation.md)")
    print(f"curve             {run_dir / PAGE}\npoints            {run_dir / POINTS}")


def print_result(run_dir: Path, run: dict[str, Any]) -> None:
    """Print the end of a run, from its run.json."""
    result, adapter = run["result"], run["adapter"]
    before, after = result.get("eval_before"), result.get("eval_after")
    if "adapters" in run:
        _print_adapters(run_dir, run)
    else:
        if before and after:
            losses = (formatting.text_or_dash(one["loss"], "{:.4f}".format) for one in (before, after))
            print(f"held-out loss     {' → '.join(losses)}")
            if "reward" in after:
                print(f"held-out reward   {before['reward']:.4f} → {after['reward']:.4f}")
            if "exact_match" in after:
                share = f"{before['exact_match']:.1%} → {after['exact_match']:.1%}"
                print(f"exact match       {share} of {after['exact_match_rows']} held-out rows")
            for name in run.get("own", {}).get("metrics", []):
                both = (formatting.text_or_dash(one.get(name), "{:.4f}".format) for one in (before, after))
                print(f"{name:<17} {' → '.join(both)}")
        print(f"parameters        {adapter['trainable_parameters']:,} (LoRA r=64: {adapter['lora_r64_parameters']:,})")
        print(f"adapter           {formatting.size(adapter['file_bytes'])} in {run_dir / 'adapter'}")
    mapped = f", and {formatting.size(result['mapped_bytes'])} of mapped weights" if result["mapped_bytes"] else ""
    print(f"peak memory       {formatting.size(result['peak_bytes'])}{mapped}")
    if result["tokens_per_second"]:
        print(f"speed             {result['tokens_per_second']:,.0f} tokens/s, {result['seconds']:.0f} s of training")
    print(f"report            {run_dir / 'report.html'}")


HARDLY = 0.05  # a loss that fell by a smaller share has hardly fallen: the highest limit without needless advice
NOTHING = 0.005  # below this share, shown as 0 %, more steps at the same rate are no advice
FEW_STEPS = 50  # from here on another rate was what helped (both: bench/loss_line.py)


def loss_line(run: dict[str, Any], command: str, has_rewards: bool = False, fixed_length: bool = False) -> str:
    """What the loss did in a run, by its run.json; where that was little, what to do next by which command.

    ``fixed_length``: the run can't be made longer.
    """
    result = run["result"]
    pairs = [(one.get("eval_before"), one.get("eval_after")) for one in run.get("adapters", [result])]
    scored = [(before["loss"], after["loss"]) for before, after in pairs if before and after]
    trained = [(one["train_loss_first"], one["train_loss_last"]) for one in run.get("adapters", [result])]
    known = [each for each in scored or trained if all(loss is not None and math.isfinite(loss) for loss in each)]
    if not result["steps"]:
        return "no step was taken: the adapter is what it was at the start. See training.max_steps."
    if not known:
        return "not known"
    before, after = (sum(losses) / len(known) for losses in zip(*known, strict=True))
    share, steps, kind = (before - after) / abs(before or 1.0), result["steps"], "held-out" if scored else "training"
    change = f"the {kind} loss {'fell' if share > 0 else 'rose'} by {formatting.percent(abs(share))}"
    if not share:
        change = f"the {kind} loss stayed the same"
    answers = result.get("eval_after") or {}
    if has_rewards:
        change = (
            "a step's loss tells nothing of rewards; the report has them. Hold out rows to score them before and after"
        )
        if scored:  # a loss that is the negative reward
            change = f"the held-out reward went from {0.0 - before:.4g} to {0.0 - after:.4g}"
        equal = "In the last step all answers to a prompt had equal rewards, of which nothing is learnt (equal_groups)."
        return f"{change}. {equal}" if result.get("grad_norm_last") == 0 else f"{change}."
    if result.get("grad_norm_last") == 0 and result["train_loss_last"]:
        dead = "and the last step had no gradient: nothing is learnt any more"
        return f"{change}, {dead}. Try a lower rate: {command} --find-lr"
    if steps == 1 and not scored:  # the first loss is the last
        return "not known"
    right, by_one = answers.get("exact_match"), answers.get("commonest_reference", 0.0)
    none_learnt = right is not None and right <= by_one and right < 1
    if share >= HARDLY and not none_learnt:
        return f"{change}."
    shorter = re.sub(r" --set training\.(max_steps|num_train_epochs)=\S+", "", command)
    longer = f"{shorter} --resume --set training.max_steps={2 * steps}"
    find = f"{command} --find-lr"
    first, last = result.get("train_loss_first"), result.get("train_loss_last")
    if share < 0 and first and last and last < first * (1 - HARDLY) and result.get("epochs", 0) > 1:
        return f"{change}, while the training loss fell: the rows are learnt by heart. Add rows, or take fewer steps."
    has_ended = fixed_length or result.get("stopped_early") or "adapters" in run
    if not has_ended and share >= NOTHING and steps < FEW_STEPS:
        return f"{change} in {steps} steps, which are few. Go on: {longer}   Or look for a better rate: {find}"
    if share >= HARDLY:
        more = "no more held-out answers are right than if all were the commonest one"
        change += f", and {more if right else 'no held-out answer is right'}"
    elif share > 0:
        change += ", which is little"
    return f"{change}. Look for a better rate: {find}   Or add rows or steps."


def _print_adapters(run_dir: Path, run: dict[str, Any]) -> None:
    from qvera.evaluation.report.read import by_remark, entries_of

    entries = entries_of(run)
    counts = [f"{number:,} {text}" for text, number in Counter(entry.status_text for entry in entries).most_common()]
    print(f"adapters          {', '.join(counts)}, in {run_dir / 'adapters'}")
    both = [(entry.loss_before, entry.loss_after) for entry in entries]
    if scored := [(before, after) for before, after in both if before is not None and after is not None]:
        before, after = (sum(losses) / len(scored) for losses in zip(*scored, strict=True))
        print(f"held-out loss     {before:.4f} → {after:.4f} in the mean of {len(scored):,} adapters")
    for what, flagged in by_remark(entries).items():
        print(f"look at           {what}: {formatting.first_of([shown_name(entry.name) for entry in flagged])}")
