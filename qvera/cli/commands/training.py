"""How a run begins and what is said of it: train, preview, launch, plan, quickstart."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from qvera.cli.commands.common import console, quiet_libraries, require_new_file
from qvera.config.load import load_recipe
from qvera.config.schema import RangeTest, Recipe
from qvera.data import Rows, build_datasets, data_warnings, decode, print_preflight
from qvera.distributed import launch as launcher
from qvera.distributed.zero_config import read_config as read_deepspeed
from qvera.evaluation.report.preview_page import write_preview
from qvera.models.loader import pick_device
from qvera.models.tokenizer import load_tokenizer
from qvera.training.lr_finder import PAGE, POINTS, RULE, find_lr
from qvera.training.lr_page import rate_text
from qvera.training.plan import Sharing, gpu_machine, make_plan, parse_size, time_step
from qvera.training.plan import table as plan_table
from qvera.training.plan.show import print_plan
from qvera.training.run_dir import run_directory
from qvera.training.trainer import train as train_run
from qvera.utils import formatting
from qvera.utils.errors import InputError
from qvera.utils.paths import resolve_path


def train(args: argparse.Namespace) -> None:
    """Qvera train"""
    recipe = load_recipe(args.recipe, args.overrides)
    quiet_libraries()
    run_dir = run_directory(recipe, args.recipe)
    ramp = _ramp(args)
    if ramp is not None:
        _find_lr(recipe, run_dir, ramp)
        return
    result = train_run(recipe, run_dir, resume=args.resume, dry_run=args.dry_run, console=console)
    if result is not None:
        _say_result(result.run_dir, result.run)


def _ramp(args: argparse.Namespace) -> RangeTest | None:
    """What --find-lr and its neighbours ask for; None: a run."""
    given = {"start": args.lr_from, "end": args.lr_to, "steps": args.lr_steps}
    given = {name: value for name, value in given.items() if value is not None}
    if args.find_lr:
        for name in ("resume", "dry_run"):
            if getattr(args, name, False):
                raise InputError(
                    f"--{name.replace('_', '-')}: goes with a run, and --find-lr makes none; drop one of them."
                )
        return RangeTest(**given)
    if given:
        raise InputError(
            "--lr-from, --lr-to and --lr-steps go with --find-lr only; a run's rate is training.learning_rate."
        )
    return None


def _find_lr(recipe: Recipe, run_dir: Path, ramp: RangeTest) -> None:
    """Train --find-lr"""
    found = find_lr(recipe, run_dir, ramp, console=console)
    if found is None:
        return  # one of several processes that is not the first
    last = found.points[-1]
    if found.diverged is not None:
        print(f"diverged          at {rate_text(found.diverged)}, step {last['step']} of {ramp.steps}")
    else:
        print(f"diverged          not up to {rate_text(ramp.end)}; a higher --lr-to would show where")
    if found.steepest is not None:
        print(f"steepest fall     at {rate_text(found.steepest)}")
    if found.suggestion is None:
        print(f"suggestion        none: {found.reason}")
    else:
        print(f"suggestion        --set training.learning_rate={found.suggestion:.2g}")
        print(f"                  {RULE}; worth a try down to the steepest fall")
    print(f"curve             {run_dir / PAGE}\npoints            {run_dir / POINTS}")


def preview(args: argparse.Namespace) -> None:
    """Qvera preview"""
    recipe = load_recipe(args.recipe, args.overrides)
    if args.html is not None:
        require_new_file(args.html)
    quiet_libraries()
    tokenizer = load_tokenizer(recipe.model)
    datasets = build_datasets(recipe.data, tokenizer, console)
    shown = datasets.first_rows(args.rows)
    print_preflight(datasets, tokenizer, Console(), args.rows)
    if args.html is not None:
        warnings = data_warnings(datasets.stats)
        write_preview(
            args.html, args.recipe.stem, recipe.data.path, datasets.stats, warnings, shown, partial(decode, tokenizer)
        )
        print(f"{args.html}: the same as a page, all tokens of {len(shown)} rows")


def handed_on(args: argparse.Namespace) -> list[str]:
    """What `qvera launch` was given for `qvera train`, as that takes it."""
    found = [part for override in args.overrides for part in ("--set", override)]
    for name in ("resume", "find_lr"):
        found += [f"--{name.replace('_', '-')}"] * getattr(args, name)
    for name in ("lr_from", "lr_to", "lr_steps"):
        value = getattr(args, name)
        found += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return found


def launch(args: argparse.Namespace) -> int:
    """Qvera launch"""
    load_recipe(args.recipe, args.overrides)  # what is wrong with it is said once, before anything starts
    _ramp(args)
    command = launcher.launch_command(
        args.recipe,
        gpus=args.gpus,
        hostfile=args.hostfile,
        node_rank=args.node_rank,
        nnodes=args.nnodes,
        rdzv=args.rdzv,
        max_restarts=args.max_restarts,
        train_arguments=handed_on(args),
    )
    if args.hostfile is not None:
        launcher.require_hosts(args.hostfile)
    print(launcher.say(command), file=sys.stderr)
    return launcher.run(command)


def _say_result(run_dir: Path, run: dict[str, Any]) -> None:
    """The end of a run in a few lines: scores, sizes, speed, where things are."""
    result, adapter = run["result"], run["adapter"]
    before, after = result.get("eval_before"), result.get("eval_after")
    lines = []
    if before and after:
        lines.append(f"held-out loss     {before['loss']:.4f} → {after['loss']:.4f}")
        if "exact_match" in after:
            share = f"{before['exact_match']:.1%} → {after['exact_match']:.1%}"
            lines.append(f"exact match       {share} of {after['exact_match_rows']} held-out rows")
    lines += [
        f"trained numbers   {adapter['trainable_parameters']:,} (LoRA r=64: {adapter['lora_r64_parameters']:,})",
        f"adapter           {formatting.size(adapter['file_bytes'])} in {run_dir / 'adapter'}",
        f"peak memory       {formatting.size(result['peak_bytes'])}"
        + (f", and {formatting.size(result['mapped_bytes'])} of mapped weights" if result["mapped_bytes"] else ""),
    ]
    if result["tokens_per_second"]:
        lines.append(
            f"speed             {result['tokens_per_second']:,.0f} tokens/s, {result['seconds']:.0f} s of training"
        )
    lines.append(f"report            {run_dir / 'report.html'}")
    print("\n".join(lines))


def plan(args: argparse.Namespace) -> None:
    """Qvera plan"""
    quiet_libraries()
    if args.table:
        print(plan_table.markdown(), end="")
        if args.svg is not None:
            args.svg.write_text(plan_table.picture(), encoding="utf-8")
        return
    if args.recipe is None:
        raise InputError("takes a RECIPE (such as recipes/quickstart.yaml), or --table.")
    if args.svg is not None:
        raise InputError("--svg: goes with --table only.")
    recipe = load_recipe(args.recipe, args.overrides)
    device = pick_device()
    machine = None if args.gpu is None else gpu_machine(recipe.model, parse_size(args.gpu))
    several = args.nodes is not None or args.gpus is not None
    for name, value in (("--nodes", args.nodes), ("--gpus", args.gpus)):
        if value is not None and value < 1:
            raise InputError(f"{name}: takes a whole number >= 1, got {value}.")
    sharing = Sharing.of(read_deepspeed(recipe.deepspeed), args.nodes or 1, args.gpus or 1)
    made = make_plan(recipe, machine or device, _rows_at_hand(recipe), sharing, every_way=several)
    if machine is None and not args.no_timing:
        with console.status("Timing this machine"):
            made = dataclasses.replace(made, seconds=time_step(made, recipe, device))
    if args.json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        print_plan(made, Console())


def _rows_at_hand(recipe: Recipe) -> Rows | None:
    """The training rows where they and the tokenizer are local, else None; a plan must not wait for a download."""
    if not Path(resolve_path(recipe.data.path)).exists() or not Path(resolve_path(recipe.model.path)).is_dir():
        return None
    try:
        tokenizer = load_tokenizer(recipe.model)
    except InputError:
        return None
    return build_datasets(recipe.data, tokenizer, console).train


def quickstart(args: argparse.Namespace) -> None:
    """Qvera quickstart"""
    from qvera.cli.quickstart import prepare

    quiet_libraries()
    parts = prepare(say=console.print)
    where = f"training.output_dir={json.dumps(args.output_dir)}"
    recipe = load_recipe(parts.recipe, [*parts.overrides(), where, *args.overrides])
    if args.fetch_only:
        print(
            f"base model   {parts.base}\ntraining     {parts.train}\nheld out     {parts.heldout}\nrecipe       {parts.recipe}"
        )
        return
    result = train_run(recipe, run_directory(recipe, parts.recipe), resume=args.resume, console=console)
    if result is None:
        return  # one of several processes that is not the first
    for number, sample in enumerate(result.run["samples"], start=1):
        print(f"\n── held-out prompt {number} " + "─" * 60)
        print(sample["prompt"].strip())
        for label in ("before", "after", "reference"):
            print(f"{label + ':':<11}{sample[label]}")
    print("\n" + "─" * 80)
    _say_result(result.run_dir, result.run)
    print(f"talk to it        qvera chat {result.run_dir}")
    print(f"export it         qvera export {result.run_dir} OUT --to merged")
