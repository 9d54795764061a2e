"""The only training loop, from top to bottom.

A run is a function of its recipe: the rows of optimizer step k depend on k alone, the loss is the mean over the
trained tokens of the whole global batch, and a checkpoint holds everything else that a step depends on. So a resumed
run gives the numbers of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from qvera.adapters.save_load import load_vectors, save_adapter
from qvera.config.schema import Recipe
from qvera.data import Datasets
from qvera.distributed.group import Group
from qvera.distributed.init import in_group, restarted
from qvera.models.loader import Base
from qvera.training import checkpoint
from qvera.training.logging import MetricsLog, Progress, Trackers
from qvera.training.optim import build_schedule, optimizer_bytes
from qvera.training.plan import planned_steps
from qvera.training.rank_checks import asked_to_stop, for_all, same_everywhere
from qvera.training.run_dir import Progressed, check_run_dir, check_same_run, finish, plain, run_facts
from qvera.training.scoring import evaluate_between, score
from qvera.training.setup import Ready, configured, load, read_rows, ready_device, spreading, start_engine
from qvera.training.train_step import train_step
from qvera.utils import memory
from qvera.utils.atomic import replace_text
from qvera.utils.errors import InputError, Interrupted, RunFailed
from qvera.utils.signals import StopRequests


@dataclasses.dataclass
class RunResult:
    """What `train` leaves behind: the run directory and the contents of its run.json."""

    run_dir: Path
    run: dict[str, Any]


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
    base: Base | None = None,
) -> RunResult | None:
    """Train an adapter as a recipe says and leave a run directory behind.

    Args:
        run_dir: must not hold a run yet, unless ``resume``.
        resume: go on from the newest checkpoint in ``run_dir`` that verifies. So does a run whose processes torchrun has restarted.
        dry_run: stop after the preflight; nothing is written (returns None).
        base: an already loaded base, for callers that train more than once on it.

    Raises:
        InputError: recipe, data, model or run directory are wrong; nothing was written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved at the step boundary.
        RunFailed: the loss or the gradient became NaN or Inf; the last checkpoint is kept.
    """
    with in_group() as group:
        return _prepared(recipe, run_dir, resume, dry_run, console or Console(stderr=True), base, group)


def _prepared(
    recipe: Recipe,
    run_dir: Path,
    resume: bool,
    dry_run: bool,
    console: Console,
    base: Base | None,
    group: Group,
) -> RunResult | None:
    """All that can be wrong with what was given is found here, before anything is written; then the run."""
    training = recipe.training
    console = console if group.first else Console(quiet=True)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    zero = configured(recipe, base, group)
    if group.sum([float(restarted())])[0]:  # on some node; the one that takes the place of a lost node does not know
        # only what this launch has begun: a run that was there before is still refused without --resume
        resume = resume or group.on_first(lambda: group.remembers(f"begun {run_dir}") and _has_begun(run_dir))
    same_everywhere(recipe, group, console)
    group.on_first(lambda: check_run_dir(run_dir, recipe, resume, dry_run))
    device = ready_device(recipe, group)
    reporters: list[Trackers] = []
    names = training.report_to if group.first else []
    group.agree(lambda: reporters.append(Trackers(names, run_dir, recipe.to_dict())))
    datasets = read_rows(recipe, base, console, group)
    if dry_run:
        return None
    with memory.PeakWatch(device) as watch, spreading(zero, recipe, run_dir, group) as spread:
        ready = load(recipe, datasets, zero, device, base, console, group, spread)
        return _run(recipe, run_dir, datasets, reporters[0], ready, resume, started, watch, console, group)


def _run(
    recipe: Recipe,
    run_dir: Path,
    datasets: Datasets,
    trackers: Trackers,
    ready: Ready,
    resume: bool,
    started: str,
    watch: memory.PeakWatch,
    console: Console,
    group: Group,
) -> RunResult | None:
    """The run itself, once all that it needs is there."""
    training, device = recipe.training, watch.device
    base, model, vectors, trained, optimizer = ready.base, ready.model, ready.vectors, ready.trained, ready.optimizer
    per_epoch = ready.batches.per_epoch
    steps = planned_steps(recipe, len(datasets.train))
    schedule = build_schedule(training, optimizer, steps)
    done = Progressed()

    checkpoints = run_dir / "checkpoints"
    if resume:
        found = None
        if group.first:
            found = checkpoint.newest(
                checkpoints,
                warn=lambda text: console.print(text, style="yellow", markup=False),
                check=lambda one: check_same_run(one, recipe),
            )
        found = checkpoint.shared(found, group)
        if found is None:
            console.print(f"No checkpoint in {checkpoints} verifies: starting from step 0.")
        else:
            checkpoint.restore(found, vectors, optimizer, group.rank)
            schedule.load_state_dict(found.state["schedule"])
            for parameters, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
                parameters["lr"] = rate
            done = Progressed(**found.state["progressed"])
            console.print(f"Going on from step {done.step} of {steps} ({found.path}).")

    engine = start_engine(ready, recipe, run_dir, datasets, schedule, steps, done.step > 0, console, group)
    if group.first:
        group.remember(f"begun {run_dir}")
    group.on_first(lambda: _begin(run_dir, recipe))
    log = MetricsLog(run_dir / "metrics.jsonl", keep_through_step=done.step) if group.first else None
    run = run_facts(base, model, datasets, device, started)
    run["plan"] = None if ready.plan is None else ready.plan.to_dict()
    run["processes"] = {"count": group.world_size, "deepspeed": recipe.deepspeed}
    facts: dict[str, Any] = run["adapter"]
    console.print(
        f"Training {facts['trainable_parameters']:,} numbers in {facts['adapted_modules']} linears "
        f"(LoRA r=64 would have {facts['lora_r64_parameters']:,}) for {steps} steps on {memory.device_name(device)}"
        + (f" and {group.world_size - 1} more" if group.world_size > 1 else "")
        + "."
    )

    saved_step = (
        done.step
    )  # of the checkpoint on disk that is known to be whole: a directory of that name may be damaged

    def save() -> None:
        nonlocal saved_step
        whole, held = engine.unsharded()
        random = group.gather_bytes(checkpoint.random_state(group.rank))
        state = {"recipe": recipe.to_dict(), "schedule": schedule.state_dict(), "progressed": dataclasses.asdict(done)}
        keep = {done.best_step} if done.best_step is not None else set()

        def write() -> None:
            if log is not None:
                log.flush()
            checkpoint.save(checkpoints, done.step, {**vectors, **whole}, held, plain(state), random)
            checkpoint.prune(checkpoints, training.save_total_limit, keep)

        group.on_first(write)
        saved_step = done.step

    def end(after: dict[str, Any] | None, samples: list[dict[str, Any]]) -> None:
        run["processes"]["ranks"] = group.gather({"host": group.host, "peak_bytes": watch.peak_bytes})
        # the others wait for it: a launcher that sees one process leave with 75 ends the rest of them
        group.on_first(lambda: finish(run_dir, run, done, steps, per_epoch, watch, after, samples, console))

    signals, asked = StopRequests(), None
    with signals, trackers:
        if done.before is None and datasets.eval:
            done.before, done.samples_before = score(model, base, datasets, recipe, console, "Before training", group)
        model.train()
        with Progress(console, steps, done.step) as bar:
            while done.step < steps and not done.stopped_early and not (asked := asked_to_stop(signals, group)):
                try:
                    record = train_step(model, engine, datasets, ready.batches, recipe, done, watch, group)
                except RunFailed:
                    run["status"] = "failed"
                    end(None, [])
                    raise
                if log is not None:
                    log.write(record)
                trackers.log(record)
                bar.update(record)
                if done.step == 1 and training.optim != "adamw":
                    stock_bytes = 2 * 4 * sum(p.numel() for p in trained.values())
                    console.print(
                        f"{training.optim} holds {optimizer_bytes(optimizer):,} bytes of state; torch's adamw would hold "
                        f"{stock_bytes:,}."
                    )
                due = done.step % training.save_steps == 0
                if datasets.eval and training.eval_steps and done.step % training.eval_steps == 0:
                    best_before = done.best_step
                    record = evaluate_between(model, datasets, recipe, done, bar, group)
                    if log is not None:
                        log.write(record)
                    trackers.log(record)
                    due = due or done.best_step != best_before  # the best vectors are then on disk, whatever comes
                if due:
                    save()
        if done.step and done.step != saved_step:
            save()
        if asked:
            run["status"] = "interrupted"
            end(None, [])
            raise for_all(
                Interrupted(
                    f"Stopped by {asked} after step {done.step} of {steps}, and saved. The same command with --resume goes on."
                )
            )
        if training.load_best_model_at_end and done.best_step is not None and done.best_step != done.step:
            path = checkpoints / f"step-{done.best_step:08d}"
            best = checkpoint.shared(_read_best(path, console) if group.first else None, group)
            if best is not None:
                load_vectors(model, best.vectors, str(best.path))
        engine.gather_vectors()
        run["adapter"]["file_bytes"] = group.on_first(lambda: save_adapter(model, run_dir / "adapter", base.tokenizer))
        after: dict[str, Any] | None = None
        samples: list[dict[str, Any]] = []
        if datasets.eval:
            after, samples = score(model, base, datasets, recipe, console, "After training", group)
    run["status"] = "done"
    end(after, samples)
    return RunResult(run_dir, run) if group.first else None


def _read_best(path: Path, console: Console) -> checkpoint.Checkpoint | None:
    try:
        return checkpoint.load(path)
    except InputError as error:  # a run that has come so far is not given up for it
        console.print(f"{error} The adapter gets the last step's vectors, not the best.", style="yellow", markup=False)
        return None


def _has_begun(run_dir: Path) -> bool:
    return (run_dir / "recipe.yaml").exists()


def _begin(run_dir: Path, recipe: Recipe) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(run_dir / "recipe.yaml", recipe.to_yaml())  # half of it would be a run that can't be resumed
