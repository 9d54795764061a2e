"""What `model.stream: auto` comes to: streamed where the run does not fit with the base on the device, and fits so.

What it costs follows `qvera.models.stream`: two layers on the device, and two copies of each layer in a pass but of the
two that are there when the pass turns round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qvera.training.plan.checkpointing import Checkpointing, decide, with_mode
from qvera.training.plan.memory import layer_bytes, pinned_layer_bytes
from qvera.training.plan.run import PlannedRun
from qvera.training.plan.sharding import plan_rank
from qvera.utils import accelerator
from qvera.utils.formatting import duration, size

PCIE_BYTES_PER_SECOND = 25e9
"""PCIe 4.0 x16 from page-locked RAM, where none was measured: 80 % of the 31.5 GB/s that it carries in theory."""


@dataclass(frozen=True)
class Streaming:
    """A decision on `model.stream`."""

    streams: bool
    why: str
    asked: bool | str
    ram_bytes: int = 0  # of the layers that stay there
    pass_bytes: int = 0  # that one forward and backward pass copies to the device
    too_little_ram: bool = False  # the layers are read from the mapped file

    def __str__(self) -> str:
        """One or two sentences."""
        if not self.streams:
            return f"Streaming: off ({self.why})."
        if not self.pass_bytes:
            return f"Streaming: on ({self.why})."
        seconds = self.pass_bytes / PCIE_BYTES_PER_SECOND
        text = (
            f"Streaming: on ({self.why}). {size(self.ram_bytes)} of layers stay in RAM, and a pass copies "
            f"{size(self.pass_bytes)}: {duration(seconds)} at {PCIE_BYTES_PER_SECOND / 1e9:g} GB/s, hidden where the "
            "pass computes for longer."
        )
        if self.too_little_ram:
            text += " So much RAM is not free: the layers are read from their file in each pass."
        return text

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "asked": self.asked,
            "streams": self.streams,
            "why": self.why,
            "ram_bytes": self.ram_bytes,
            "bytes_per_pass": self.pass_bytes,
        }


def pass_bytes(run: PlannedRun) -> int:
    """What one forward and backward pass copies to the device."""
    layers = layer_bytes(run)
    return 2 * sum(layers) * max(0, len(layers) - 2) // max(1, len(layers))


def decide_both(run: PlannedRun) -> tuple[PlannedRun, Checkpointing, Streaming]:
    """The run with both `model.stream` and `training.gradient_checkpointing` written out, and why."""
    asked, machine = run.recipe.model.stream, run.machine

    def planned(streams: bool) -> tuple[PlannedRun, Checkpointing, int]:
        one = run.with_stream(streams)
        mode = decide(one)
        one = one.with_recipe(with_mode(one.recipe, mode.mode))
        return one, mode, plan_rank(one).needed_bytes(machine)

    streams = asked is True
    found, mode, needed = planned(streams)
    why = "as the recipe says"
    if asked == "auto":
        fits = needed <= machine.available_bytes
        why = "auto: the run fits without it" if fits else "auto: this run's layers can't be streamed"
        if not fits and run.can_stream:
            other, its_mode, less = planned(True)
            why = "auto: the run does not fit with it either"
            if less <= machine.available_bytes:
                why = (
                    f"auto: with the base on the device the run takes {size(needed)} of {size(machine.available_bytes)}"
                )
                streams, found, mode = True, other, its_mode
    if not streams:
        return found, mode, Streaming(False, why, asked)
    if not accelerator.has_own_memory(machine.device_type):
        why += "; here it only adds copies: the mapped file is in RAM anyway"
        return found, mode, Streaming(True, why, asked)
    short = not pinned_layer_bytes(found)
    return found, mode, Streaming(True, why, asked, sum(layer_bytes(found)), pass_bytes(found), short)
