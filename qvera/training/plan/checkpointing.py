"""What `training.gradient_checkpointing: auto` comes to: the fastest way that fits, by the plan of each.

Recomputing a layer is a third of its work where the base is frozen (no gradients of weights are taken), so it is left
out where there is room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from qvera.config.schema import Recipe
from qvera.models.checkpointing import Mode
from qvera.training.plan.activations import offloaded_bytes
from qvera.training.plan.memory import pinned_layer_bytes
from qvera.training.plan.run import PlannedRun
from qvera.training.plan.sharding import plan_rank
from qvera.utils import accelerator
from qvera.utils.formatting import size

OFF_SHARE_ACCELERATOR, ON_SHARE_ACCELERATOR = 0.85, 0.92
"""Activations are kept where the plan then takes at most the first share of a device's memory, and layer inputs are
kept on the device up to the second. The allocator's losses are in no plan."""

OFF_SHARE_CPU = 0.5
"""Of the RAM that is free, mapped weights counted too. Other processes come and go there."""


def mode_word(mode: Mode) -> str:
    """``off``, ``on`` or ``offload``."""
    return mode if isinstance(mode, str) else "on" if mode else "off"


@dataclass(frozen=True)
class Checkpointing:
    """A decision on `training.gradient_checkpointing`."""

    mode: Mode
    why: str
    asked: Mode | str
    needed_bytes: dict[Mode, int] = field(default_factory=dict)  # at the peak, by mode; empty unless auto was asked
    available_bytes: int = 0

    def fits(self, mode: Mode) -> bool:
        """Whether a run fits in another mode, without a margin; True where nothing is known."""
        return self.needed_bytes.get(mode, 0) <= self.available_bytes

    def __str__(self) -> str:
        """One sentence."""
        return f"Gradient checkpointing: {mode_word(self.mode)} ({self.why})."

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        needed = {mode_word(mode): count for mode, count in self.needed_bytes.items()}
        return {"asked": self.asked, "mode": self.mode, "why": self.why, "needed_bytes": needed}


def with_mode(recipe: Recipe, mode: Mode) -> Recipe:
    """The recipe with that mode written out."""
    return recipe.replace(training=recipe.training.replace(gradient_checkpointing=mode))


def decide(run: PlannedRun) -> Checkpointing:
    """The mode of a run, and why. Without ``auto``, what the recipe says."""
    asked, machine, sharing = run.recipe.training.gradient_checkpointing, run.machine, run.sharing
    if asked != "auto":
        shared = asked == "offload" and run.checkpointing is True
        why = "as the recipe says" + (": the device has no memory of its own to offload from" if shared else "")
        return Checkpointing(run.checkpointing, why, asked)
    available = machine.available_bytes // (1 if machine.on_gpu else sharing.per_node)  # ranks divide a machine's RAM
    runs = {mode: replace(run, recipe=with_mode(run.recipe, mode)) for mode in modes_of(run)}
    needed = {mode: plan_rank(one).total_bytes for mode, one in runs.items()}
    takes, of = {mode: size(count) for mode, count in needed.items()}, f"of {size(available)}"
    mode: Mode = True
    why = f"without it the run would take {takes[False]} {of}"
    if needed[False] <= available * (OFF_SHARE_ACCELERATOR if machine.on_gpu else OFF_SHARE_CPU):
        mode, why = False, f"without it the run takes {takes[False]} {of}"
    elif "offload" in runs and needed[True] > available * ON_SHARE_ACCELERATOR and needed["offload"] < needed[True]:
        host_bytes, free_bytes = offloaded_bytes(runs["offload"]) * sharing.per_node, machine.host_bytes
        layers_bytes = pinned_layer_bytes(run)  # which are locked first
        if free_bytes is None or host_bytes <= free_bytes - layers_bytes:
            mode, why = "offload", f"{why}, and with all layer inputs on the device {takes[True]}"
        else:
            beside = " beside the streamed layers" if layers_bytes else ""
            why += f", and {size(host_bytes)} of RAM to offload layer inputs to are not free{beside}"
    return Checkpointing(mode, f"auto: {why}", asked, needed, available)


def modes_of(run: PlannedRun) -> Iterator[Mode]:
    """What there is on a machine for a run, the fastest first."""
    yield from (False, True)
    # TRL enables checkpointing anew in each pass, as transformers does it
    if accelerator.has_own_memory(run.machine.device_type) and not run.task.loss_is_trl:
        yield "offload"
