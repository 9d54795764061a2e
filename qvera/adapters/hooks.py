"""Hooks by which a method or a schedule (`qvera.config.plugins.Schedule`) takes part in training."""

from typing import Any


class TrainingHook:
    """The training loop calls these methods; a subclass overrides what it needs.

    All ranks call a hook at the same steps, with the same vectors. DeepSpeed's ZeRO keeps its own copies of vectors and
    optimizer state. A hook that changes either must refuse a recipe with a ``deepspeed`` key.

    ``training`` is the running `qvera.training.loop.AloneLoop`. A hook reads its recipe, model, datasets, batches,
    optimizer, schedule, steps, state, group, device and console. It may call `warn`, `nll`, `held_out_loss`,
    `over_passes` (halves passes when memory runs out) and `branch` (the same model, trained on other rows).
    """

    def start(self, training: Any) -> None:
        """Prepare before the first step of a new run, but not of a resumed one. It may set the vectors.

        Raises:
            InputError: memory does not suffice for it.
            RunFailed: it can't be done.
        """

    def before_step(self, step: int) -> None:
        """Act before the first forward pass of optimizer step ``step`` (from 1).

        A vector whose ``requires_grad`` is False now is not stepped. If an attempt takes no step (float16 overflow, out
        of memory), this is called again for the same step: drop what was gathered since the last call.
        """

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        """Act after the vectors were stepped. The step's gradients, in backward, had the factor ``loss_scale``."""

    def metrics(self) -> dict[str, Any]:
        """Return additions to the record of the step just taken, in metrics.jsonl."""
        return {}

    def finish(self, training: Any) -> dict[str, Any]:
        """Act after the last step, when the adapter is saved and scored; returns additions to ``result`` in run.json.

        The model must have the trained vectors again when it returns. It may raise OutOfMemory.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of the step just taken has to hold for later steps: tensors, JSON values by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` gave, with tensors on the CPU. Called before the vectors are loaded."""


class TrainingHooks(TrainingHook):
    """Several hooks as one, called in order, with their states kept apart by name."""

    def __init__(self, hooks: dict[str, TrainingHook] | None = None) -> None:
        self.hooks = hooks or {}

    def start(self, training: Any) -> None:
        for hook in self.hooks.values():
            hook.start(training)

    def before_step(self, step: int) -> None:
        for hook in self.hooks.values():
            hook.before_step(step)

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        for hook in self.hooks.values():
            hook.after_step(step, loss_scale)

    def metrics(self) -> dict[str, Any]:
        return {key: value for hook in self.hooks.values() for key, value in hook.metrics().items()}

    def finish(self, training: Any) -> dict[str, Any]:
        return {key: value for hook in self.hooks.values() for key, value in hook.finish(training).items()}

    def state_dict(self) -> dict[str, Any]:
        """The states of all hooks, as ``hook/name``."""
        states = {name: hook.state_dict() for name, hook in self.hooks.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each hook its saved state, or an empty one."""
        for name, hook in self.hooks.items():
            prefix = f"{name}/"
            hook.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
