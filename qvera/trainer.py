"""The only training loop, from top to bottom.

A run is a function of its recipe: the rows of optimizer step k depend on k alone, the loss is the mean over the
trained tokens of the whole global batch, and a checkpoint holds everything else that a step depends on. So a resumed
run gives the numbers of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import checkpoint, evaluate, measure, rehearsal
from .data import (
    Datasets,
    Example,
    build_datasets,
    global_batch,
    microbatches,
    print_preflight,
    steps_per_epoch,
)
from .errors import InputError, Interrupted, RunFailed
from .metrics import MetricsLog, Progress, Trackers
from .model import (
    Base,
    attach,
    enable_checkpointing,
    load_base,
    load_tokenizer,
    load_vectors,
    named_vectors,
    pick_device,
    save_adapter,
)
from .optimize import build_optimizer, build_schedule, optimizer_bytes
from .plan import planned_steps
from .recipe import Recipe
from .rundir import Progressed, check_run_dir, finish, plain, run_facts
from .stop import StopRequests


@dataclasses.dataclass
class RunResult:
    """What `train` leaves behind: the run directory and the contents of its run.json."""

    run_dir: Path
    run: dict[str, Any]


class LocalEngine:
    """One process: backward, clip, step. A DeepSpeed engine takes this object's place when there are many."""

    world_size = 1
    rank = 0

    def __init__(
        self, vectors: dict[str, torch.nn.Parameter], optimizer: Any, schedule: Any, max_grad_norm: float
    ) -> None:
        self.parameters = list(vectors.values())
        self.optimizer, self.schedule, self.max_grad_norm = optimizer, schedule, max_grad_norm

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self) -> float:
        """Norm of the gradient of all vectors together before clipping."""
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))

    def step(self) -> float:
        """Take the optimizer step; returns the learning rate it was taken with."""
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return rate


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
        resume: go on from the newest checkpoint in ``run_dir`` that verifies.
        dry_run: stop after the preflight; nothing is written (returns None).
        base: an already loaded base, for callers that train more than once on it.

    Raises:
        InputError: recipe, data, model or run directory are wrong; nothing was written.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved at the step boundary.
        RunFailed: the loss or the gradient became NaN or Inf; the last checkpoint is kept.
    """
    console = console or Console(stderr=True)
    training = recipe.training
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    check_run_dir(run_dir, recipe, resume, dry_run)
    trackers = Trackers(training.report_to, run_dir, recipe.to_dict())
    device = pick_device()
    torch.manual_seed(training.seed)
    if training.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    # data first: a wrong row is found before minutes go into loading and quantizing a model
    tokenizer = base.tokenizer if base is not None else load_tokenizer(recipe.model)
    datasets = build_datasets(recipe.data, tokenizer, console)
    if not datasets.train:
        raise InputError(f"{recipe.data.path}: no row is left to train on. Raise data.max_length.")
    print_preflight(datasets, tokenizer, console)
    if dry_run:
        return None
    with measure.PeakWatch(device) as watch:
        return _run(recipe, run_dir, datasets, base, trackers, resume, started, watch, console)


def _run(
    recipe: Recipe,
    run_dir: Path,
    datasets: Datasets,
    base: Base | None,
    trackers: Trackers,
    resume: bool,
    started: str,
    watch: measure.PeakWatch,
    console: Console,
) -> RunResult:
    """The run itself, once data and recipe are known to be good."""
    training, device = recipe.training, watch.device
    plan = rehearsal.plan_run(recipe, datasets, device, base, console)
    with console.status(f"Loading {recipe.model.path}") as status:

        def quantizing(stage: str, done: int, total: int, what: str) -> None:
            status.update(
                f"{stage.capitalize()} {recipe.model.path}: {done / max(total, 1):.0%} of {total / 1e9:.1f} GB"
            )

        base = base or load_base(recipe.model, device, quantizing)
        model = attach(base.model, recipe.adapter, recipe.model.path, base.facts.get("fingerprint"))
    if training.gradient_checkpointing:
        enable_checkpointing(model)
    vectors = named_vectors(model)
    trained = {name: vector for name, vector in vectors.items() if vector.requires_grad}
    optimizer = build_optimizer(training, trained)
    per_epoch = steps_per_epoch(len(datasets.train), training.global_batch_size)
    steps = planned_steps(recipe, len(datasets.train))
    schedule = build_schedule(training, optimizer, steps)
    engine = LocalEngine(trained, optimizer, schedule, training.max_grad_norm)
    done = Progressed()

    checkpoints = run_dir / "checkpoints"
    if resume:
        found = checkpoint.newest(checkpoints, warn=lambda text: console.print(f"[yellow]{text}"))
        if found is None:
            console.print(f"No checkpoint in {checkpoints} verifies: starting from step 0.")
        else:
            checkpoint.restore(found, vectors, optimizer)
            schedule.load_state_dict(found.state["schedule"])
            for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
            done = Progressed(**found.state["progressed"])
            console.print(f"Going on from step {done.step} of {steps} ({found.path}).")
    if done.step == 0 and steps and training.rehearse_longest_batch:
        with console.status("Trying the longest batch"):
            rehearsal.run_longest_batch(model, recipe, datasets, plan, steps, optimizer)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    log = MetricsLog(run_dir / "metrics.jsonl", keep_through_step=done.step)
    run = run_facts(base, model, datasets, device, started)
    run["plan"] = None if plan is None else plan.to_dict()
    facts: dict[str, Any] = run["adapter"]
    console.print(
        f"Training {facts['trainable_parameters']:,} numbers in {facts['adapted_modules']} linears "
        f"(LoRA r=64 would have {facts['lora_r64_parameters']:,}) for {steps} steps on {measure.device_name(device)}."
    )

    def save() -> None:
        state = {"schedule": schedule.state_dict(), "progressed": dataclasses.asdict(done)}
        checkpoint.save(checkpoints, done.step, vectors, optimizer, plain(state))
        keep = {done.best_step} if done.best_step is not None else set()
        checkpoint.prune(checkpoints, training.save_total_limit, keep)

    def score(label: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return _score(model, base, datasets, recipe, console, label)

    signals = StopRequests()
    with signals, trackers:
        if done.before is None and datasets.eval:
            done.before, done.samples_before = score("Before training")
        model.train()
        with Progress(console, steps, done.step) as bar:
            while done.step < steps and not done.stopped_early and not signals.asked:
                try:
                    record = _step(model, engine, datasets, recipe, done, watch)
                except RunFailed:
                    run["status"] = "failed"
                    finish(run_dir, run, done, steps, per_epoch, watch, None, [], console)
                    raise
                log.write(record)
                trackers.log(record)
                bar.update(record)
                if done.step == 1 and training.optim != "adamw":
                    stock_bytes = 2 * 4 * sum(p.numel() for p in trained.values())
                    console.print(
                        f"{training.optim} holds {optimizer_bytes(optimizer):,} bytes of state; torch's adamw would hold "
                        f"{stock_bytes:,}."
                    )
                if datasets.eval and training.eval_steps and done.step % training.eval_steps == 0:
                    best_before = done.best_step
                    _evaluate(model, datasets, recipe, done, log, trackers, bar)
                    if done.best_step != best_before:
                        save()  # the best vectors are then on disk, whatever comes
                if done.step % training.save_steps == 0:
                    save()
        if done.step and not (checkpoints / f"step-{done.step:08d}").exists():
            save()
        if signals.asked and done.step < steps and not done.stopped_early:
            run["status"] = "interrupted"
            finish(run_dir, run, done, steps, per_epoch, watch, None, [], console)
            raise Interrupted(
                f"Stopped by {signals.asked} after step {done.step} of {steps}, and saved. The same command with --resume goes on."
            )
        if training.load_best_model_at_end and done.best_step is not None and done.best_step != done.step:
            best = checkpoint.load(checkpoints / f"step-{done.best_step:08d}")
            load_vectors(model, best.vectors, str(best.path))
        run["adapter"]["file_bytes"] = save_adapter(model, run_dir / "adapter")
        after, samples = score("After training") if datasets.eval else (None, [])
    run["status"] = "done"
    finish(run_dir, run, done, steps, per_epoch, watch, after, samples, console)
    return RunResult(run_dir, run)


def _step(
    model: Any, engine: LocalEngine, datasets: Datasets, recipe: Recipe, done: Progressed, watch: measure.PeakWatch
) -> dict[str, Any]:
    """One optimizer step: accumulate the gradient of the mean loss over the global batch's trained tokens, clip, step."""
    training, data = recipe.training, recipe.data
    began = time.perf_counter()
    rows = global_batch(done.step, len(datasets.train), training.global_batch_size, data.seed, data.shuffle)
    trained = sum(datasets.train[i].trained_tokens for i in rows)
    nlls, inputs = [], 0
    for micro in microbatches(rows, training.per_device_train_batch_size):
        examples = [datasets.train[i] for i in micro]
        batch = evaluate.make_batch(model, examples, datasets.pad_id, recipe.data.prefix_once)
        nll, _ = evaluate.batch_nll(model, batch, training.loss_chunk_tokens)
        # divided by the tokens of the whole global batch, so that accumulation does not change the mean
        engine.backward(nll / trained)
        nlls.append(nll.detach())
        inputs += sum(len(e.input_ids) for e in examples)
    losses = torch.stack(nlls).tolist()
    norm = engine.clip()
    if not all(map(math.isfinite, losses)) or not math.isfinite(norm):
        raise RunFailed(
            _not_finite(done.step + 1, losses, norm, rows, datasets.train, training.per_device_train_batch_size)
        )
    rate = engine.step()
    done.step += 1
    seconds = time.perf_counter() - began
    loss = sum(losses) / trained
    done.train_loss_first = loss if done.train_loss_first is None else done.train_loss_first
    done.train_loss_last = loss
    done.train_seconds += seconds
    done.input_tokens += inputs
    per_epoch = steps_per_epoch(len(datasets.train), training.global_batch_size)
    return {
        "kind": "train",
        "step": done.step,
        "epoch": round(done.step / per_epoch, 4),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "trained_tokens": trained,
        "input_tokens": inputs,
        "step_seconds": seconds,
        "tokens_per_second": inputs / seconds,
        "memory_bytes": measure.memory_bytes(watch.device),
        "peak_bytes": watch.peak_bytes,
    }


def _not_finite(step: int, losses: list[float], norm: float, rows: list[int], train: list[Example], size: int) -> str:
    bad = [micro for micro, loss in zip(microbatches(rows, size), losses, strict=True) if not math.isfinite(loss)]
    where = ", ".join(train[i].source for micro in bad for i in micro) or "the gradient only; rows " + ", ".join(
        train[i].source for i in rows
    )
    return (
        f"Step {step}: the loss or its gradient is not finite (losses {losses}, gradient norm {norm}); rows: {where}. No step was "
        "taken and earlier checkpoints are kept. Lower training.learning_rate, or look at these rows."
    )


def _evaluate(
    model: Any,
    datasets: Datasets,
    recipe: Recipe,
    done: Progressed,
    log: MetricsLog,
    trackers: Trackers,
    bar: Progress,
) -> None:
    """Held-out loss in the middle of a run: logged, and compared with the best so far."""
    result = _held_out(model, datasets, recipe)
    record = {"kind": "eval", "step": done.step, **result}
    log.write(record)
    trackers.log(record)
    bar.note(f"step {done.step}: held-out loss {result['loss']:.4f}, perplexity {result['perplexity']:.3f}")
    if done.best_loss is None or result["loss"] < done.best_loss:
        done.best_loss, done.best_step, done.evaluations_without_gain = result["loss"], done.step, 0
    else:
        done.evaluations_without_gain += 1
        patience = recipe.training.early_stopping_patience
        if patience and done.evaluations_without_gain >= patience:
            done.stopped_early = True
            bar.note(f"stopping: {patience} evaluations without a lower held-out loss (best: step {done.best_step})")


def _held_out(model: Any, datasets: Datasets, recipe: Recipe) -> dict[str, Any]:
    return evaluate.held_out_loss(
        model,
        datasets.eval,
        pad_id=datasets.pad_id,
        batch_size=recipe.training.per_device_eval_batch_size,
        chunk_tokens=recipe.training.loss_chunk_tokens,
    )


def _score(
    model: Any, base: Base, datasets: Datasets, recipe: Recipe, console: Console, label: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Held-out loss and, where the recipe asks for it, exact match of greedy answers; and the answers to show as samples."""
    training = recipe.training
    with console.status(f"{label}: held-out loss") as status, evaluate.scoring(model):
        result = _held_out(model, datasets, recipe)
        judged = [e for e in datasets.eval if e.reference is not None and len(e.prompt_ids)]
        judged = judged[: training.exact_match_rows]
        shown = [e for e in datasets.eval if len(e.prompt_ids)][: training.sample_count]
        rows = judged + [e for e in shown if not any(e is other for other in judged)]  # each is answered once
        answers = evaluate.answer_rows(
            model,
            base.tokenizer,
            rows,
            max_new_tokens=training.sample_max_new_tokens,
            batch_size=training.answer_batch_size,
            progress=lambda done: status.update(f"{label}: {done} of {len(rows)} answers"),
        )
    by_row = {id(example): answer for example, answer in zip(rows, answers, strict=True)}
    if judged:
        result["exact_match"] = sum(bool(by_row[id(e)]["exact"]) for e in judged) / len(judged)
        result["exact_match_rows"] = len(judged)
    text = f"{label}: held-out loss {result['loss']:.4f}"
    if judged:
        text += f", exact match {result['exact_match']:.1%} of {result['exact_match_rows']} rows"
    console.print(text)
    return result, [by_row[id(e)] for e in shown]
