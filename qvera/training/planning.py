"""The memory plan that a run goes by: agreed on by all ranks, shown, and refused where a GPU lacks the room."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qvera.config.schema import Recipe
from qvera.distributed.group import Group
from qvera.models.checkpointing import Mode
from qvera.training.plan import Plan, Sharing, make_plan
from qvera.training.plan.checkpointing import mode_word, with_mode
from qvera.training.plan.show import run_lines
from qvera.training.rank_checks import check_memory
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from qvera.data import Datasets


def plan_run(
    recipe: Recipe, device: torch.device, data: Datasets, sharing: Sharing, group: Group, console: Console
) -> tuple[Plan, Mode]:
    """The memory plan of this rank, and the gradient checkpointing of all; the plan is printed in a few lines.

    A plan that does not fit is a warning on a CPU, where swap may make room, and where it is near what a GPU has
    (`Plan.is_refused`).

    Raises:
        InputError: it does not fit into the memory of a GPU.
        NotPlannable: no plan can be made of this model.
    """
    rows, adapter_rows = data.train, [len(adapter.train) for adapter in data.adapters]
    plan = make_plan(recipe, device, rows, sharing, adapter_rows=adapter_rows, datasets=data)
    # ranks with less memory decide for all
    mode: Mode = max(group.gather(plan.checkpointing), key=[False, True, "offload"].index)
    if mode != plan.checkpointing:
        plan = make_plan(with_mode(recipe, mode), device, rows, sharing, adapter_rows=adapter_rows, datasets=data)
    if plan.is_refused and group.world_size == 1:
        raise InputError("\n".join(run_lines(plan)))
    style = None if plan.fits and not plan.is_tight else "yellow"
    for line in run_lines(plan):
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    check_memory(plan, group, console)
    return plan, mode


def resumed_mode(recorded: Mode, planned: Mode, plan: Plan | None, group: Group, console: Console) -> Mode:
    """The gradient checkpointing of a run that goes on: what ``auto`` came to when it began, where that still fits.

    The MLPs of recomputed layers go by tiles where there are many tokens, so another choice may give other bits.

    Args:
        recorded: in the checkpoint.
        planned: what ``auto`` comes to now.
        plan: of this rank; None where none could be made.
    """
    if recorded == planned:
        return planned
    if all(group.gather(plan is None or plan.decided.fits(recorded))):
        console.print(f"Gradient checkpointing stays {mode_word(recorded)}, as the run began.")
        return recorded
    console.print(
        f"Gradient checkpointing was {mode_word(recorded)} when the run began, which does not fit into memory now; it "
        f"goes on with {mode_word(planned)}, and its numbers may differ in the last bits.",
        style="yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return planned
