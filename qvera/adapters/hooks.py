"""What a method or a schedule (`qvera.config.plugins.Schedule`) adds to a training. The loop knows none by name."""

from __future__ import annotations

from typing import Any


class TrainingHook:
    """Called by the loop at the places that the methods name; a subclass overrides what it needs.

    All ranks call it at the same steps, with the same vectors. Under ZeRO DeepSpeed has its own copies of vectors and
    optimizer state: a hook that changes either has to refuse a recipe with a ``deepspeed`` key.

    ``training`` is the running `qvera.training.session.TrainingSession`. A hook reads its recipe, model, datasets,
    batches, optimizer, schedule, steps, state, group, device and console, and may call `warn`, `nll`, `held_out_loss`,
    `over_passes` (passes that are halved where memory runs out) and `branch` (the same model, trained on other rows).
    """

    def start(self, training: Any) -> None:
        """Before the first step of a run that begins, not of one that goes on; it may set the vectors.

        Raises:
            InputError: memory does not suffice for it.
            RunFailed: it can't be done.
        """

    def before_step(self, step: int) -> None:
        """Before the first forward pass of optimizer step ``step`` (from 1).

        A vector whose ``requires_grad`` is False now is not stepped. Called again for the same step where an attempt at
        it took none (a gradient that overflowed in float16, memory that ran out): what was gathered during that attempt
        is to be dropped then.
        """

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        """After the vectors were stepped. Never for an attempt that took no step.

        ``loss_scale``: what the gradients in this step's backward passes were multiplied with.
        """

    def metrics(self) -> dict[str, Any]:
        """What it adds to the record of the step just taken, in metrics.jsonl."""
        return {}

    def finish(self, training: Any) -> dict[str, Any]:
        """After the last step, when the adapter is saved and scored; returns what it adds to ``result`` in run.json.

        The model has the trained vectors again when it returns.

        Raises:
            OutOfMemory: as an evaluation.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a later step depends on, for the checkpoint of the step just taken: tensors and JSON values by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, tensors on the CPU. Called before the vectors are loaded."""


class TrainingHooks(TrainingHook):
    """Several hooks as one, called in their order; their states are kept apart by name."""

    def __init__(self, hooks: dict[str, TrainingHook] | None = None) -> None:
        self.hooks = hooks or {}

    def start(self, training: Any) -> None:
        """See `TrainingHook.start`."""
        for hook in self.hooks.values():
            hook.start(training)

    def before_step(self, step: int) -> None:
        """See `TrainingHook.before_step`."""
        for hook in self.hooks.values():
            hook.before_step(step)

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        """See `TrainingHook.after_step`."""
        for hook in self.hooks.values():
            hook.after_step(step, loss_scale)

    def metrics(self) -> dict[str, Any]:
        """See `TrainingHook.metrics`."""
        return {key: value for hook in self.hooks.values() for key, value in hook.metrics().items()}

    def finish(self, training: Any) -> dict[str, Any]:
        """See `TrainingHook.finish`."""
        return {key: value for hook in self.hooks.values() for key, value in hook.finish(training).items()}

    def state_dict(self) -> dict[str, Any]:
        """The states of all hooks, as ``hook/name``."""
        states = {name: hook.state_dict() for name, hook in self.hooks.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each hook what it saved; a hook that saved nothing gets an empty state."""
        for name, hook in self.hooks.items():
            prefix = f"{name}/"
            hook.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
