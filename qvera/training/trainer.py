"""The training loop.

A run is a function of its recipe. The rows of optimizer step k depend on k alone, the loss is the mean over the trained
tokens of the whole global batch, and a checkpoint holds everything else that a step depends on. So a resumed run gives
the same bits as an uninterrupted one.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qvera.adapters.files.save_load import load_vectors, named_vectors, save_adapter
from qvera.adapters.products.fused import BUILDS_UNHELD
from qvera.config.schema import Recipe
from qvera.distributed.group import for_all
from qvera.distributed.init import in_group
from qvera.evaluation import held_out
from qvera.training import checkpoint
from qvera.training.checkpoint import TrainState
from qvera.training.engine import trained_vectors
from qvera.training.failures import has_finite_loss, held_out_not_finite
from qvera.training.logging import ProgressBar, repeat_line
from qvera.training.many.trainer import ManyTrainer
from qvera.training.optim import build_schedule, optimizer_bytes
from qvera.training.plan import planned_steps
from qvera.training.run import Run, RunResult
from qvera.training.run_dir import check_run_dir, newest_checkpoint, require_same_inputs, write_run
from qvera.training.run_json import add_result, begun_run, begun_samples
from qvera.utils.atomic import disk_errors
from qvera.utils.errors import InputError, Interrupted, NotFinite, OutOfMemory, RunFailed
from qvera.utils.files import plain_json
from qvera.utils.status_line import status_line


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    on_step: Callable[[dict[str, Any]], object] | None = None,
    console: Console | None = None,
) -> RunResult | None:
    """Train an adapter, or many, as a recipe says, and write a run directory.

    Args:
        recipe: what to train, on what, and how.
        run_dir: must not hold a run yet, unless ``resume``.
        resume: go on from the newest checkpoint in ``run_dir`` that verifies. A run whose processes torchrun restarted
            does so by itself.
        dry_run: check all that can be checked without the base's weights, show rows and the plan, and stop; nothing is
            written (returns None).
        on_step: as `qvera.api.train` has it.
        console: for progress; default: standard error.

    Returns:
        The result; None in a process that is not the first of several.

    Raises:
        InputError: recipe, data, model or run directory are wrong, or another process trains there; nothing was
        written.
        Interrupted: SIGINT, SIGTERM or SIGHUP came, or ``on_step`` stopped the run; a checkpoint was saved at the step
            boundary.
        RunFailed: the loss, the gradient or the held-out loss at the end became NaN or Inf, or the disk is full; the
            last checkpoint is kept.
    """
    kind = ManyTrainer if recipe.data.has_adapters else Trainer
    with in_group() as group, kind(recipe, run_dir, group, console) as trainer:
        if dry_run:
            group.on_first(lambda: check_run_dir(run_dir, recipe, resume))
            trainer.load_data(preview=True)
            trainer.check_model()
            return None
        trainer.open_run_dir(resume)
        trainer.load_data()
        trainer.load_model()
        trainer.setup()
        trainer.on_step = on_step
        try:
            return trainer.train()
        finally:  # in place of Interrupted, or after the last step
            if trainer.callback_error is not None:
                raise trainer.callback_error


class Trainer(Run):
    """A run of one adapter: `open_run_dir`, `load_data`, `load_model`, `setup` and `train`, in this order."""

    def setup(self) -> None:
        """Build the schedule, load the checkpoint to resume from, build the engine and open the run's files."""
        self.steps = planned_steps(self.recipe, len(self.datasets.train))
        self.schedule = build_schedule(self.recipe.training, self.optimizer, self.steps)
        if self.resume:
            self.load_checkpoint()
        self.saved_step = self.state.step  # a directory of another step's name may be damaged
        self.build_engine(self.schedule, self.steps)
        if self.group.first:
            self.group.set_flag(f"begun {self.run_dir}")
        due = "eval" if self.state.evaluation_due else None
        self.group.on_first(lambda: self.open_files(self.state.step, again=due))
        self.run = begun_run(self, self.started)
        facts, others = self.run["adapter"], self.group.world_size - 1
        head = f", and {facts['head_parameters']:,} of a head," if "head_parameters" in facts else ""
        self.console.print(
            f"Training {facts['trainable_parameters']:,} parameters in {facts['adapted_modules']} linear layers (LoRA "
            f"of rank 64: {facts['lora_r64_parameters']:,}){head} for {self.steps} steps on {self.run['device']}"
            + (f" and {others} more." if others else "."),
            soft_wrap=True,
        )
        self.write_begun()

    def train(self) -> RunResult | None:
        """Take the steps that are left, then evaluate, save the adapter and write run.json.

        Returns:
            The result on rank 0, None on the others.
        """
        training, state = self.recipe.training, self.state
        after: dict[str, Any] | None = None
        samples: list[dict[str, Any]] = []
        extra: dict[str, Any] = {}
        with self.signals, self.trackers:
            if state.before is None and self.datasets.eval:
                state.before, state.samples_before = self.score("Before training")
                self.write_begun(result={"eval_before": state.before}, samples=begun_samples(state.samples_before))
            self.model.train()
            with ProgressBar(self.console, self.steps, state.step) as self.progress:
                if state.evaluation_due:  # the run ran out of memory in it
                    self.evaluate()
                    self.save_checkpoint()
                while state.step < self.steps and not state.stopped_early and not self.stop_requested():
                    try:
                        record = self.train_step()
                    except RunFailed as error:
                        raise self.end(error) from None
                    self.log(record)
                    if record["kind"] != "train":
                        continue
                    best_step = state.best_step
                    if self.datasets.eval and training.eval_steps and state.step % training.eval_steps == 0:
                        state.evaluation_due = True
                        self.evaluate()
                    # the best vectors are on disk, whatever comes
                    if state.step % training.save_steps == 0 or state.best_step != best_step:
                        self.save_checkpoint()
            if state.step != self.saved_step:
                self.save_checkpoint()
            if self.stopped_by is not None:
                self.finish("interrupted")
                text = f"Stopped by {self.stopped_by} after step {state.step} of {self.steps}, and saved. "
                raise for_all(Interrupted(f"{text}The same command with --resume goes on."))
            if training.load_best_model_at_end and state.best_step not in (None, state.step):
                self.load_best_vectors()
            self.save_adapter()
            try:
                if self.datasets.eval:
                    after, samples = self.score("After training")
                extra = self.hooks.finish(self)
            except OutOfMemory as error:
                raise self.end(error) from None
            if after is not None and not has_finite_loss(after):
                self._refuse_adapter(after)
        self.finish("done", after, samples, extra)
        return RunResult(self.run_dir, self.run) if self.group.first else None

    def _refuse_adapter(self, after: dict[str, Any]) -> None:
        """Take back an adapter whose held-out loss is not finite, where that of the base was.

        Raises:
            NotFinite: it was taken back; checkpoints are kept.
        """
        state = self.state
        text = held_out_not_finite(f"Step {state.step}", state.before)
        if state.before is not None and not has_finite_loss(state.before):
            self.warn(text)
            return
        self.group.on_first(lambda: shutil.rmtree(self.run_dir / "adapter"))
        self.finish("failed", after)
        raise for_all(NotFinite(f"{text} The adapter is not saved; checkpoints are kept."))

    def end(self, error: RunFailed) -> RunFailed:
        """Save the step before one that memory did not suffice for, and write run.json; returns the error to raise."""
        if self.group.world_size > 1 and not error.shared:
            return error  # the other ranks are elsewhere
        if isinstance(error, OutOfMemory) and self.state.step:
            if self.state.step != self.saved_step:
                self.save_checkpoint()
            error = for_all(
                OutOfMemory(
                    f"{error}\nStep {self.state.step} is saved: the same command with --resume goes on from it."
                )
            )
        self.finish("failed")
        return error

    def stop_requested(self) -> bool:
        """Whether a signal asks this run to stop, whichever rank got it; all ranks stop at the same step."""
        asked, group = self.signals.asked, self.group
        if group.sum([float(asked is not None)])[0]:
            found = group.gather([asked, group.host])
            rank, (name, host) = next((rank, one) for rank, one in enumerate(found) if one[0])
            self.stopped_by = name if group.world_size == 1 else f"{name} at rank {rank} on {host}"
        return self.stopped_by is not None

    def log(self, record: dict[str, Any]) -> None:
        """Write a record to metrics.jsonl, the trackers and the progress bar."""
        self.write_records(record)
        self.trackers.log(record)
        if (line := repeat_line(record)) is not None:
            self.console.print(line, style="yellow", highlight=False, soft_wrap=True)
        if record["kind"] == "train":
            self.progress.show(record)
            if record["step"] == 1 and self.recipe.training.optim != "adamw":
                stock_bytes = 2 * 4 * sum(vector.numel() for vector in trained_vectors(self.model).values())
                self.console.print(
                    f"{self.recipe.training.optim} holds {optimizer_bytes(self.optimizer):,} bytes of state; torch's "
                    f"adamw would hold {stock_bytes:,}."
                )

    def evaluate(self) -> None:
        """Held-out loss in the middle of a run. Remembers the best step, and stops early where the recipe says so.

        Raises:
            OutOfMemory: memory ran out, and the run ended; one that goes on begins with this evaluation.
        """
        state, patience = self.state, self.recipe.training.early_stopping_patience
        try:
            result = self.held_out_loss()
        except OutOfMemory as error:
            raise self.end(error) from None
        state.evaluation_due = False
        state.add_evaluation(result["loss"], patience)
        self.console.print(f"step {state.step}: {self.task.line(result)}", soft_wrap=True)
        if state.stopped_early:
            self.console.print(
                f"stopping: {patience} evaluations without a lower held-out loss (best: step {state.best_step})"
            )
        self.log({"kind": "eval", "step": state.step, **result})

    def score(self, label: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Held-out loss and, where the recipe asks for it, exact match of greedy answers.

        The ranks share the held-out rows.

        Returns:
            The scores, and the answers to show as samples.
        """
        training, rows, task = self.recipe.training, self.datasets.eval, self.task
        with status_line(self.console, f"{label}: held-out loss") as update, held_out.scoring(self.model):
            result = self.held_out_loss()

            def say(text: str) -> None:
                update(f"{label}: {text}")

            found, samples = task.answers(self.model, self.base.tokenizer, rows, training, self.group, say)
        result |= found
        self.console.print(f"{label}: {task.line(result)}", soft_wrap=True)
        return result, samples

    def save_checkpoint(self) -> None:
        """Save everything that a later step depends on, and delete checkpoints beyond the recipe's limit."""
        vectors, optimizer = self.engine.unsharded()
        vectors = {**named_vectors(self.model), **vectors}
        random = self.group.gather_bytes(checkpoint.random_state(self.group.rank))
        hooks = self.hooks.state_dict()
        state = {
            "recipe": self.recipe.to_dict(),
            "inputs": self.inputs,
            "schedule": self.schedule.state_dict(),
            "loss_scale": None if self.scaler is None else self.scaler.state_dict(),
            "gradient_checkpointing": self.checkpointing,
            "builds_per_pass": self.builds_per_pass,
            "progressed": dataclasses.asdict(self.state),
        }

        def write() -> None:
            if self.log_file is not None:
                self.log_file.flush()
            directory, best = self.run_dir / "checkpoints", self.state.best_step
            checkpoint.save(directory, self.state.step, vectors, optimizer, plain_json(state), random, hooks)
            keep, also = self.recipe.training.save_total_limit, set() if best is None else {best}
            checkpoint.prune(directory, self.state.step, keep, also)

        self.group.on_first(write)
        self.saved_step = self.state.step

    def load_checkpoint(self) -> None:
        """Go on from the newest checkpoint that verifies; from step 0 where the run ended before its first one.

        Raises:
            InputError: the run has saved checkpoints, and none of them can be used.
        """
        found: list[checkpoint.Checkpoint | None] = []
        self.group.on_first(lambda: found.append(newest_checkpoint(self.run_dir, self.recipe, self.warn)))
        one = checkpoint.shared(found[0] if found else None, self.group)
        if one is None:
            self.console.print(f"No checkpoint was saved in {self.run_dir} yet: starting from step 0.", soft_wrap=True)
            return
        require_same_inputs(one.path, one.state.get("inputs"), self.inputs)
        self.hooks.load_state_dict(one.hook_state)
        checkpoint.restore(one, named_vectors(self.model), self.optimizer, self.group.rank)
        self.schedule.load_state_dict(one.state["schedule"])
        for parameters, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            parameters["lr"] = rate
        if self.scaler is not None and one.state.get("loss_scale"):
            self.scaler.load_state_dict(one.state["loss_scale"])
        self.state = TrainState(**one.state["progressed"])
        for halving in self.state.halvings:
            self.batches.limit(halving.get("pass_rows") or halving["pass_tokens"])
        self.keep_checkpointing(one.state.get("gradient_checkpointing", self.checkpointing), self.group)
        self.builds_per_pass = one.state.get("builds_per_pass", BUILDS_UNHELD)
        self.console.print(f"Going on from step {self.state.step} of {self.steps} ({one.path}).", soft_wrap=True)

    def load_best_vectors(self) -> None:
        """Put the vectors of the best step into the model; the last step's stay where that checkpoint is damaged."""
        best = None
        if self.group.first:
            try:
                best = checkpoint.load(self.run_dir / "checkpoints" / f"step-{self.state.best_step:08d}")
            except InputError as error:  # a run that has come so far is not given up for it
                self.warn(f"{error} The adapter gets the last step's vectors, not the best.")
        best = checkpoint.shared(best, self.group)
        if best is not None:
            self.hooks.load_state_dict(best.hook_state)
            load_vectors(self.model, best.vectors, str(best.path))

    def save_adapter(self) -> None:
        """Write the adapter into the run directory."""
        self.engine.gather_vectors()
        directory, kept = self.run_dir / "adapter", "Checkpoints are kept; mend that and go on with --resume."

        def save() -> int:
            with disk_errors(f"the adapter in {directory}", kept):
                return save_adapter(self.model, directory, self.base.tokenizer)

        self.run["adapter"]["file_bytes"] = self.group.on_first(save)

    def finish(
        self,
        status: str,
        after: dict[str, Any] | None = None,
        samples: Sequence[dict[str, Any]] = (),
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Write run.json and the report. ``extra``: what the hooks add to the result.

        The ranks wait for it: a launcher that sees one leave with 75 ends the others.
        """
        add_result(self.run, self, status, after, samples, extra or {})
        self.group.on_first(lambda: write_run(self.run_dir, self.run, self.console))
