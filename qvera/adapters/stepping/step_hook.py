"""What a method or a schedule does between optimizer steps, beside the steps themselves."""

from __future__ import annotations

from typing import Any


class StepHook:
    """Called around each optimizer step of a run; a subclass overrides what it needs.

    All ranks call it at the same steps, with the same vectors. Under ZeRO DeepSpeed has its own copies of vectors and
    optimizer state: a hook that changes either has to refuse a recipe with a ``deepspeed`` key.
    """

    def before_step(self, step: int) -> None:
        """Before the first forward pass of optimizer step ``step`` (from 1).

        Called again for the same step where an attempt at it took none (a gradient that overflowed in float16, memory
        that ran out): what was gathered during that attempt is to be dropped then.
        """

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        """After the vectors were stepped. Never for an attempt that took no step.

        ``loss_scale``: what the gradients in this step's backward passes were multiplied with.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a later step depends on, for the checkpoint of the step just taken: tensors and JSON values by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, tensors on the CPU. Called before the vectors are loaded."""


class StepHooks(StepHook):
    """Several hooks as one, called in their order; their states are kept apart by name."""

    def __init__(self, hooks: dict[str, StepHook] | None = None) -> None:
        self.hooks = hooks or {}

    def before_step(self, step: int) -> None:
        """See `StepHook.before_step`."""
        for hook in self.hooks.values():
            hook.before_step(step)

    def after_step(self, step: int, loss_scale: float = 1.0) -> None:
        """See `StepHook.after_step`."""
        for hook in self.hooks.values():
            hook.after_step(step, loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """The states of all hooks, as ``hook/name``."""
        states = {name: hook.state_dict() for name, hook in self.hooks.items()}
        return {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each hook what it saved; a hook that saved nothing gets an empty state."""
        for name, hook in self.hooks.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            hook.load_state_dict(own)
