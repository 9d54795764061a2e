"""A caller's callbacks as one hook of the loop: functions of a record, and transformers' callbacks.

transformers' callbacks get its own args, state and control, filled with the run's numbers. An exception in one of them
stops the run like a signal: at the end of the step, which is saved.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qvera.adapters.hooks import TrainingHook
from qvera.utils import accelerator
from qvera.utils.errors import InputError, first_line, require_takes

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

    from qvera.training.alone import Trainer

EVENTS = (
    *("on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate"),
    *("on_save", "on_epoch_end", "on_train_end"),
)
_INSIDE_A_STEP = ("on_pre_optimizer_step", "on_optimizer_step", "on_substep_end")
_RESET = {"on_log": "should_log", "on_evaluate": "should_evaluate", "on_save": "should_save"}
_SAME_KEYS = (  # of a recipe's training and of transformers' arguments
    *("per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "learning_rate", "weight_decay"),
    *("lr_scheduler_type", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed", "save_steps"),
    "save_total_limit",
)


class Callbacks(TrainingHook):
    """The caller's callbacks.

    Attributes:
        functions: get each record of metrics.jsonl, in the first process. One that returns False stops the run.
        callbacks: get transformers' events, in every process.
        stopped_by: the name of one that stopped the run.
        error: what one raised; none is called after that.
    """

    def __init__(self, given: Sequence[Any] = ()) -> None:
        """Sort callbacks by kind. InputError: one is no callback, or asks for what only transformers' Trainer has."""
        from transformers import TrainerCallback, TrainerControl

        self.functions: list[Callable[[dict[str, Any]], object]] = []
        self.callbacks: list[TrainerCallback] = []
        if not isinstance(given, Iterable):
            raise InputError(f"callbacks: expected a list of callbacks, got {given!r}. Put it in brackets.")
        for one in given:
            callback = _made(one) if isinstance(one, type) else one
            if isinstance(callback, TrainerCallback):
                _require_events(callback)
                self.callbacks.append(callback)
            elif callable(callback):
                require_takes(callback, 1, f"callbacks: {getattr(callback, '__name__', callback)}")  # a record
                self.functions.append(callback)
            else:
                raise InputError(f"callbacks: {one!r} is neither a transformers callback nor a function of a record.")
        self.control = TrainerControl()
        self.stopped_by: str | None = None
        self.error: Exception | None = None
        self._epoch: int | None = None

    @property
    def own(self) -> dict[str, Any]:
        """The names of all callbacks, for run.json."""
        names = [getattr(one, "__qualname__", type(one).__name__) for one in (*self.functions, *self.callbacks)]
        return {"callbacks": names} if names else {}

    def begin(self, run: Trainer) -> None:
        """Make args and state from a run that is set up, and tell the callbacks that training begins."""
        if not self.callbacks:
            return
        from transformers import TrainerState

        self.run, self.args, group = run, _arguments(run), run.group
        self.state = TrainerState(is_local_process_zero=group.local_rank == 0, is_world_process_zero=group.first)
        self.state.compute_steps(self.args, run.steps)
        self.state.max_steps = run.steps
        self.state.num_train_epochs = math.ceil(run.steps / run.loop.batches.per_epoch)
        self.fire("on_init_end")
        self.fire("on_train_begin")

    def before_step(self, step: int) -> None:
        self.control._new_step()
        if self.callbacks and (epoch := (step - 1) // self.run.loop.batches.per_epoch) != self._epoch:
            self._epoch = epoch
            self.fire("on_epoch_begin")
        self.fire("on_step_begin")

    def end_step(self, evaluate: bool, save: bool) -> None:
        """Tell of a step that was taken. ``evaluate``, ``save``: the recipe asks for it; a callback may change it."""
        control = self.control
        control.should_evaluate |= evaluate  # on_step_begin may have asked already
        control.should_save |= save
        control.should_log = True
        self.fire("on_step_end")

    def log(self, record: dict[str, Any]) -> None:
        """Fire ``on_log`` for a record of scores, and for that of a step where ``should_log`` is set."""
        is_step = record["kind"] == "train"
        if self.callbacks and (self.control.should_log if is_step else record["kind"] == "eval"):
            logs = {name: value for name, value in record.items() if name not in ("kind", "step")}
            logs = logs if is_step else {**_scores(logs), "epoch": self.state.epoch}
            self.state.log_history.append({**logs, "step": record["step"]})
            self.fire("on_log", logs=logs)

    def call_functions(self, record: dict[str, Any]) -> None:
        """Hand a record to the functions."""
        for function in self.functions:
            name = getattr(function, "__name__", type(function).__name__)
            said = self._guarded(name, function, dict(record))
            # a comparison of numpy's numbers or of tensors gives a boolean of their own
            is_boolean = isinstance(said, bool) or str(getattr(said, "dtype", "")) in ("bool", "torch.bool")
            if is_boolean and not said:
                self.stopped_by = self.stopped_by or name

    def evaluated(self, scores: dict[str, Any]) -> None:
        """Tell of held-out scores. The best score that callbacks see is still that of earlier evaluations."""
        self.fire("on_evaluate", metrics=_scores(scores))

    def state_dict(self) -> dict[str, Any]:
        """Return the states of callbacks that have one, as transformers saves them."""
        from transformers.trainer_callback import ExportableState

        kept = [one for one in self.callbacks if isinstance(one, ExportableState)]
        return {"states": [[type(one).__name__, one.state()["attributes"]] for one in kept]} if kept else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        left = list(state.get("states", []))
        for callback in self.callbacks:
            # several of one class take their states in the order in which they were saved
            saved = next((each for each in left if each[0] == type(callback).__name__), None)
            if saved is not None:
                left.remove(saved)
                vars(callback).update(saved[1])

    def fire(self, event: str, **more: Any) -> None:
        """Call an event of all callbacks, with the numbers of now."""
        # a flag is down before its event, as in transformers' CallbackHandler, so that a callback may set it again
        if event in _RESET:
            setattr(self.control, _RESET[event], False)
        for callback in self.callbacks:
            self._guarded(type(callback).__name__, self._call, callback, event, more)

    def _call(self, callback: TrainerCallback, event: str, more: dict[str, Any]) -> None:
        run, loop, state, now = self.run, self.run.loop, self.state, self.run.state
        state.global_step, state.epoch = now.step, now.step / loop.batches.per_epoch
        state.num_input_tokens_seen = now.input_tokens
        state.best_metric, state.best_global_step = run.best_score, now.best_step
        best = None if now.best_step is None else run.run_dir / "checkpoints" / f"step-{now.best_step:08d}"
        state.best_model_checkpoint = None if best is None else str(best)
        about = {"model": loop.model, "optimizer": loop.optimizer, "lr_scheduler": loop.schedule, **more}
        about["processing_class"] = run.session.base.tokenizer
        self.control = getattr(callback, event)(self.args, state, self.control, **about) or self.control
        name = f"callbacks: {type(callback).__name__} sets"
        if self.control.should_evaluate and not loop.datasets.eval:
            self.control.should_evaluate = False  # the step is still saved, and no score of nothing recorded
            wanted = "data.eval_path, eval_split or eval_fraction"
            raise InputError(f"{name} should_evaluate, and no rows are held out. Set {wanted}.")
        if self.control.should_epoch_stop:
            text = "The rows of a step depend on its number alone, so none are left out; set should_training_stop."
            raise InputError(f"{name} should_epoch_stop. {text}")

    def _guarded(self, name: str, do: Callable[..., Any], *arguments: Any) -> Any:
        if self.error is not None:  # the run is about to stop, and its step is still saved
            return None
        try:
            return do(*arguments)
        except (StopIteration, KeyboardInterrupt):
            pass
        except Exception as error:
            self.error = error
        self.stopped_by = self.stopped_by or name
        return None


def _made(kind: type) -> Any:
    try:
        return kind()
    except Exception as error:
        problem = f"callbacks: {kind.__name__} can't be made without arguments: {first_line(error)}"
        raise InputError(f"{problem} Give an instance.") from None


def _require_events(callback: TrainerCallback) -> None:
    """Raise InputError where a callback needs what only transformers' Trainer has."""
    from transformers import Trainer, TrainerCallback

    name = f"callbacks: {type(callback).__name__}"
    if "trainer" in vars(callback) or any(isinstance(value, Trainer) for value in vars(callback).values()):
        raise InputError(f"{name} works on a transformers Trainer. Take one that works on what its events are given.")
    for event in _INSIDE_A_STEP:
        if getattr(type(callback), event) is not getattr(TrainerCallback, event):
            text = "would never be called: gradients are clipped and stepped as one."
            raise InputError(f"{name}.{event} {text} There are {', '.join(EVENTS)}.")
    for event in EVENTS:
        asked = inspect.signature(getattr(callback, event)).parameters.keys() & {"train_dataloader", "eval_dataloader"}
        if asked:
            raise InputError(f"{name}.{event} asks for a {asked.pop()}, and rows come without one.")


def _arguments(run: Trainer) -> TrainingArguments:
    """Make transformers' arguments from the run's settings. Those that mean nothing here have their defaults."""
    from transformers import TrainingArguments

    training, loop = run.recipe.training, run.loop
    pass_rows = training.per_device_train_batch_size * run.group.world_size
    args = TrainingArguments(
        output_dir=str(run.run_dir),
        run_name=run.run_dir.name,
        max_steps=run.steps,
        gradient_accumulation_steps=max(1, training.step_rows // pass_rows),
        warmup_steps=training.warmup_steps or training.warmup_ratio,
        logging_steps=1,
        eval_strategy="steps" if loop.datasets.eval and training.eval_steps else "no",
        eval_steps=training.eval_steps or None,
        metric_for_best_model=training.metric_for_best_model,
        greater_is_better=training.takes_greater,
        report_to=[],
        use_cpu=not accelerator.is_accelerator(loop.device),
        **{name: getattr(training, name) for name in _SAME_KEYS},
    )
    # set afterwards: transformers wants save_steps to be a multiple of eval_steps, and a run does not
    args.load_best_model_at_end = training.load_best_model_at_end
    return args


def _scores(scores: dict[str, Any]) -> dict[str, Any]:
    """Return scores of held-out rows under the names that transformers gives them."""
    return {f"eval_{name}": value for name, value in scores.items()}
