"""The run of one adapter, by the steps of `loop.AloneLoop`."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from qvera.adapters.methods import method_of
from qvera.adapters.methods.base import Method
from qvera.adapters.products.fused import BUILDS_UNHELD
from qvera.adapters.save_load import load_vectors, named_vectors, save_adapter, trained_vectors
from qvera.config import plugins
from qvera.config.schema import Recipe, load_recipe, parse_recipe
from qvera.distributed.group import for_all
from qvera.evaluation import held_out
from qvera.training import checkpoint
from qvera.training.checkpoint import Checkpoint, TrainState
from qvera.training.failures import has_finite_loss, held_out_not_finite
from qvera.training.loop import AloneLoop
from qvera.training.optim import build_schedule, optimizer_bytes
from qvera.training.run import Run
from qvera.training.run_dir import KEPT, LENGTH, repeat_line, step_facts, write_run, write_run_json
from qvera.utils.errors import InputError, Interrupted, NotFinite
from qvera.utils.files import ADAPTER_WEIGHTS, RECIPE_FILE, file_sha256, plain_json


def depends_on_length(recipe: Recipe) -> bool:
    """Whether what a step does depends on how many there are, so that the run can't be made longer."""
    sections = {"data": recipe.data, "adapter": recipe.adapter, "training": recipe.training}
    has_hook = type(method_of(recipe.adapter)).step_hook is not Method.step_hook
    return has_hook or any(schedule.plans_steps for schedule in plugins.schedules_of(**sections))


class Trainer(Run):
    """A run of one adapter. All processes call each method together."""

    loop: AloneLoop
    after: dict[str, Any] | None = None
    samples: Sequence[dict[str, Any]] = ()

    def setup(self) -> None:
        self.loop = AloneLoop(self.session)
        self.loop.hooks.hooks["callbacks"] = self.callbacks  # before the checkpoint, which has their state too
        self.extra: dict[str, Any] = {}  # what hooks add to the result
        if self.resume:
            self.load_checkpoint()
        self.saved = self.state.step  # a directory of another step's name may be damaged
        self.loop.start()  # after the checkpoint: an engine takes over the vectors and the state that it finds
        # the evaluation after the last step is made again, and so is its record
        self.open_files(again="eval" if self.state.evaluation_due else None)
        # the adapter of the run before it was made longer is still there, and one that replaces it is to be noticed
        written = {"sha256": of} if (of := (self.before.get("adapter") or {}).get("sha256")) else {}
        self.write_begun(self.steps, self._known(), **written)
        facts, others = self.summary["adapter"], self.group.world_size - 1
        head = f", and {facts['head_parameters']:,} of a head," if "head_parameters" in facts else ""
        self.say(
            f"Training {facts['trainable_parameters']:,} parameters in {facts['adapted_modules']} linear layers (LoRA "
            f"of rank 64: {facts['lora_r64_parameters']:,}){head} for {self.steps} steps on {self.summary['device']}"
            + (f" and {others} more." if others else ".")
        )
        self.callbacks.begin(self)

    def no_longer(self) -> str | None:
        if (self.before.get("result") or {}).get("stopped_early"):
            return "it stopped early"
        if depends_on_length(self.recipe):
            method = self.recipe.adapter.method
            return f"what {method} or a schedule of the recipe does in a step depends on how many there are"
        return None

    @property
    def state(self) -> TrainState:
        """The adapter's progress: steps taken, best step, losses."""
        return self.loop.state

    @property
    def count(self) -> int:
        return self.state.step

    steps_behind = count

    @property
    def steps(self) -> int:
        return self.loop.steps

    @property
    def has_steps_left(self) -> bool:
        """Whether `take_turn` has anything to do: steps, or first an evaluation that had no end."""
        return self.state.evaluation_due or (self.state.step < self.steps and not self.state.stopped_early)

    def score_before(self) -> None:
        state = self.state
        if state.before is None and self.loop.datasets.eval:
            state.before, state.samples_before = self.score("Before training")
            # run.json is there while a run goes, with what is known so far
            self.summary |= self._known()
            self.group.on_first(lambda: write_run_json(self.run_dir, self.summary))

    def _known(self) -> dict[str, Any]:
        if self.state.before is None:
            return {}
        return {"result": {"eval_before": self.state.before}, "samples": self._samples_before()}

    def _samples_before(self) -> list[dict[str, Any]]:
        shown = ("prompt", "reference", "images")
        return [{key: a.get(key) for key in shown} | {"before": a["answer"]} for a in self.state.samples_before]

    def take_turn(self) -> None:
        training, state, callbacks = self.recipe.training, self.state, self.callbacks
        if state.evaluation_due:  # memory ran out in it, or a signal came
            callbacks.control.should_evaluate = callbacks.control.should_save = True
        else:
            # the order of transformers' Trainer: on_step_end, on_log, on_evaluate, on_save, and on_epoch_end with them
            record = self.loop.train_step()
            if record["kind"] == "train":
                every, is_last = training.eval_steps, state.step == self.steps
                evaluate = bool(self.loop.datasets.eval) and every > 0 and state.step % every == 0
                callbacks.end_step(evaluate, save=is_last or state.step % training.save_steps == 0)
            self.log(record)
            if record["kind"] != "train":  # it was not taken
                return
        self._evaluate_and_save()
        is_epoch = state.step % self.loop.batches.per_epoch == 0
        if not state.evaluation_due and (is_epoch or not self.has_steps_left):
            callbacks.fire("on_epoch_end")
            self._evaluate_and_save()

    def _evaluate_and_save(self) -> None:
        """Evaluate and save where the recipe or a callback asks for it. A new best step is saved in any case.

        A signal in the evaluation saves at once: Slurm waits for 30 seconds. The run then goes on with the evaluation.
        Several ranks see the signal at its end only, so they save before it, too.
        """
        state, best_step = self.state, self.state.best_step
        state.evaluation_due = self._wants("should_evaluate")
        if state.evaluation_due:
            if self.group.world_size > 1:
                self._write_checkpoint()
            try:
                self.evaluate()
            except Interrupted:
                self.save_checkpoint()
                return
        if self._wants("should_training_stop") and not state.stopped_early and state.step < self.steps:
            # the step may have been saved before
            state.stopped_early = self.callbacks.control.should_save = True
            self.say("stopping: a callback asks for it")
        if self._wants("should_save") or state.best_step != best_step:
            self.save_checkpoint()

    def _wants(self, flag: str) -> bool:
        """Whether a flag of the callbacks' control is set on any rank."""
        mine = bool(getattr(self.callbacks.control, flag))
        return bool(self.group.sum([float(mine)])[0]) if self.callbacks.callbacks else mine

    def complete(self) -> None:
        """Save the adapter and score it. Delete it again (NotFinite) where training made its loss not finite."""
        state = self.state
        if self.recipe.training.load_best_model_at_end and state.best_step not in (None, state.step):
            self.load_best_vectors()
        self.save_adapter()  # before the scores, which may run out of memory
        after: dict[str, Any] | None = None
        samples: list[dict[str, Any]] = []
        if self.loop.datasets.eval:
            after, samples = self.score("After training")
        self.extra = self.loop.hooks.finish(self.loop)
        self.after, self.samples = after, samples
        self.callbacks.fire("on_train_end")
        if after is None or has_finite_loss(after):
            return
        text = held_out_not_finite(f"Step {state.step}", state.before)
        if state.before is not None and not has_finite_loss(state.before):  # it is not the training that did it
            self.warn(text)
            return
        self.group.on_first(lambda: shutil.rmtree(self.run_dir / "adapter"))
        raise for_all(NotFinite(f"{text} The adapter is not saved; checkpoints are kept."))

    def stop_requested(self) -> bool:
        """Whether to stop: a signal to any rank, or a callback there, stops all of them at the same step."""
        asked, group = self.asked, self.group
        if group.sum([float(asked is not None)])[0]:
            of_ranks = group.gather([asked, group.host])
            rank, (name, host) = next((rank, signal) for rank, signal in enumerate(of_ranks) if signal[0])
            self.stopped_by = name if group.world_size == 1 else f"{name} at rank {rank} on {host}"
        return self.stopped_by is not None

    def log(self, record: dict[str, Any]) -> None:
        """Write a record to metrics.jsonl, the trackers and the progress bar."""
        self.write_records(record)
        self.trackers.log(record)
        self.callbacks.log(record)
        if (line := repeat_line(record)) is not None:
            self.warn(line)
        if record["kind"] == "train":
            self.progress(record["step"], facts=step_facts(record))
            if record["step"] == 1 and self.recipe.training.optim != "adamw":
                stock_bytes = 2 * 4 * sum(vector.numel() for vector in trained_vectors(self.loop.model).values())
                self.say(
                    f"{self.recipe.training.optim} holds {optimizer_bytes(self.loop.optimizer):,} bytes of state; "
                    f"torch's adamw would hold {stock_bytes:,}."
                )

    def evaluate(self) -> None:
        """Score the held-out rows in the middle of a run, note the best step, and stop early where the recipe says so.

        Where memory runs out the run ends (OutOfMemory), and so it does at a signal (Interrupted). One that goes on
        begins with this evaluation.
        """
        state, training, task = self.state, self.recipe.training, self.session.task
        patience, metric = training.early_stopping_patience, training.metric_for_best_model
        rows = self.loop.datasets.eval

        def show(done: int, total: int | None = None, name: str | None = None) -> None:
            self.progress(done, total, name)
            if self.signals.asked and self.group.world_size == 1:  # of several ranks, the others wait in a collective
                raise Interrupted(self.signals.asked)

        with self.progress.within("held-out loss", len(rows)):
            result = self.loop.held_out_loss(show)
            if task.own_metrics or metric == "exact_match":
                about = self.loop.model, self.session.base.tokenizer, rows, self.group
                result |= task.answers(*about, _answering(show, "adapter"))[0]
        state.evaluation_due = False
        self.log({"kind": "eval", "step": state.step, **result})
        self.callbacks.evaluated(result)  # which shall still see the best score of earlier evaluations
        state.add_evaluation(self._sign * result.get(metric, math.nan), patience)
        self.say(f"step {state.step}: {self._line(result)}")
        if state.stopped_early:
            best = f"(best: step {state.best_step})"
            if not training.load_best_model_at_end:
                best += ". The adapter is the last step's; the best step's takes training.load_best_model_at_end: true"
            self.say(f"stopping: {patience} evaluations without a better held-out {metric} {best}")

    def _line(self, scores: dict[str, Any]) -> str:
        task = self.session.task
        return ", ".join([task.line(scores), *(f"{name} {scores[name]:.4f}" for name in task.own_metrics)])

    @property
    def _sign(self) -> int:
        """The factor that makes a loss of the score that chooses the best step: of a loss less is better."""
        return -1 if self.recipe.training.takes_greater else 1

    @property
    def best_score(self) -> float | None:
        """The score of the best step so far; None before the first evaluation."""
        return None if self.state.best_loss is None else self._sign * self.state.best_loss

    def score(self, label: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Score the held-out rows by loss and, where the recipe asks for it, by greedy answers. Ranks share the rows.

        Returns the scores, and the answers to show as samples.
        """
        loop, task, rows = self.loop, self.session.task, self.loop.datasets.eval
        who = "base" if loop.state.step == 0 else "adapter"
        with self.session.phase(f"held-out loss of the {who}", len(rows)) as show, held_out.scoring(loop.model):
            result = loop.held_out_loss(show)
            about = loop.model, self.session.base.tokenizer, rows, self.group
            answered, samples = task.answers(*about, _answering(show, who))
        result |= answered
        self.say(f"{label}: {self._line(result)}")
        return result, samples

    def save_checkpoint(self) -> None:
        self._write_checkpoint()
        self.callbacks.fire("on_save")

    def _write_checkpoint(self) -> None:
        loop, session = self.loop, self.session
        vectors, optimizer = loop.engine.unsharded()
        # tensors that are not trained are the model's own; of the others an engine may have better ones than the model
        vectors = {**named_vectors(loop.model), **vectors}
        random = self.group.gather_bytes(checkpoint.generator_states(self.group.rank))
        hooks = loop.hooks.state_dict()
        state = {
            "recipe": self.recipe.to_dict(),
            "inputs": session.inputs,
            "schedule": loop.schedule.state_dict(),
            "loss_scale": None if session.scaler is None else session.scaler.state_dict(),
            "gradient_checkpointing": session.checkpointing,
            "builds_per_pass": session.builds_per_pass,
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
        self.saved = self.state.step

    def load_checkpoint(self) -> None:
        """Go on from the newest checkpoint that verifies; from step 0 where the run ended before its first one."""
        newest: list[Checkpoint | None] = []

        def check(saved: Checkpoint) -> None:
            # only to raise KeyError or TypeError for what another version wrote
            TrainState(**saved.state["progressed"])
            saved.state["schedule"], saved.state["optimizer_scalars"]
            if "recipe" not in saved.state:  # of the first checkpoints
                saved.state["recipe"] = load_recipe(self.run_dir / RECIPE_FILE, of_a_run=True).to_dict()

        def find() -> None:
            newest.append(checkpoint.newest_of_run(self.run_dir, self.recipe, "step", self.warn, check))

        self.group.on_first(find)
        saved = checkpoint.shared(newest[0] if newest else None, self.group)
        if saved is None:
            self.say(f"No checkpoint is in {self.run_dir}: starting from step 0.")
            return
        loop, session = self.loop, self.session
        checkpoint.require_same_inputs(saved.path, saved.state.get("inputs"), session.inputs)
        # hooks come before the vectors, as they are told (`TrainingHook.load_state_dict`)
        loop.hooks.load_state_dict(saved.hook_state)
        checkpoint.restore(saved, named_vectors(loop.model), loop.optimizer, self.group.rank)
        loop.state, rates = TrainState(**saved.state["progressed"]), saved.state["schedule"]
        # a run that has been made longer: its schedule starts anew after each length that was planned before
        begun = parse_recipe(saved.state["recipe"], str(saved.path), drop_idle_keys=True)
        if (planned := self.planned_steps(begun)) < self.steps:
            loop.state.lengths.append(planned)
        if loop.state.lengths:
            loop.schedule = build_schedule(self.recipe.training, loop.optimizer, self.steps, loop.state.lengths)
            # the checkpoint's own rates are those of the shorter schedule
            share = loop.schedule.lr_lambdas[0](rates["last_epoch"])
            rates = {**rates, "_last_lr": [rate * share for rate in loop.schedule.base_lrs]}
        loop.schedule.load_state_dict(rates)
        # a schedule that is loaded leaves the optimizer's rates as they are
        for parameters, rate in zip(loop.optimizer.param_groups, loop.schedule.get_last_lr(), strict=True):
            parameters["lr"] = rate
        if session.scaler is not None and saved.state.get("loss_scale"):
            session.scaler.load_state_dict(saved.state["loss_scale"])
        # passes stay as small as they had become
        for halving in loop.state.halvings:
            loop.batches.limit(halving.get("pass_rows") or halving["pass_tokens"])
        session.keep_checkpointing(saved.state.get("gradient_checkpointing", session.checkpointing), self.group)
        session.builds_per_pass = saved.state.get("builds_per_pass", BUILDS_UNHELD)
        self.say(f"Going on from step {self.state.step} of {self.steps} ({saved.path}).")
        if self.state.stopped_early:
            self.say("It stopped early, so no step is left. A new run with adapter.init_from goes on from its adapter.")
        elif not self.has_steps_left:
            self.say(f"All steps are done. A larger {' or '.join(LENGTH)} makes the run longer.")

    def load_best_vectors(self) -> None:
        """Put the best step's vectors into the model. Those of the last step stay where that checkpoint is damaged."""
        best = None
        if self.group.first:
            try:
                best = checkpoint.load(self.run_dir / "checkpoints" / f"step-{self.state.best_step:08d}")
            except InputError as error:  # a run that has come so far is not given up for it
                self.warn(f"{error} The adapter gets the last step's vectors, not the best.")
        best = checkpoint.shared(best, self.group)
        if best is not None:
            self.loop.hooks.load_state_dict(best.hook_state)
            load_vectors(self.loop.model, best.files["vectors"], str(best.path))

    def save_adapter(self) -> None:
        """Write the adapter into the run directory."""
        self.loop.engine.gather_vectors()
        directory = self.run_dir / "adapter"

        def save() -> dict[str, int | str]:
            tokenizer, template = self.session.base.tokenizer, self.session.chat_template
            if (card := directory / "README.md").exists():
                self.warn(
                    f"{card}: is kept, and describes the adapter before this. Without it, `qvera card` writes one."
                )
            file_bytes = save_adapter(self.loop.model, directory, tokenizer, chat_template=template, kept=KEPT)
            return {"file_bytes": file_bytes, "sha256": file_sha256(directory / ADAPTER_WEIGHTS)}

        self.summary["adapter"] |= self.group.on_first(save)

    def finish(self, status: str) -> None:
        state = self.state
        self.summary["status"] = status
        self.summary["result"] = {
            "steps": state.step,
            "planned_steps": self.steps,
            "epochs": state.step / self.loop.batches.per_epoch,
            "train_loss_first": state.train_loss_first,
            "train_loss_last": state.train_loss_last,
            "grad_norm_last": state.grad_norm_last,
            "eval_before": state.before,
            "eval_after": self.after,
            "best_step": state.best_step,
            "stopped_early": state.stopped_early,
            "skipped_steps": state.skipped_steps,
            "halvings": state.halvings,
            "seconds": state.train_seconds,
            "tokens_per_second": state.input_tokens / state.train_seconds if state.train_seconds else None,
            **self.measured(),
            **self.extra,
        }
        samples = self._samples_before()
        if self.samples:  # else the run has not come to its end
            samples = [
                before | {"after": after["answer"]} for before, after in zip(samples, self.samples, strict=False)
            ]
        self.summary["samples"] = samples
        self.group.on_first(lambda: write_run(self.run_dir, self.summary, self.console))


def _answering(show: Callable[[int, int, str], None], who: str) -> Callable[[int, int], None]:
    """Return what reports answers to ``show``, as a phase of their own."""
    return lambda done, total: show(done, total, f"answering {total} prompts with the {who}")
