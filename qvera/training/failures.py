"""Errors of steps that can't be taken, which name the rows, the shortage of memory, and what to change."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qvera.adapters.config import PREFIX
from qvera.data import Example
from qvera.distributed.group import Group, for_all
from qvera.training.plan import Plan
from qvera.training.plan.plan import change_lines
from qvera.training.plan.run import changed
from qvera.utils.errors import InputError, NotFinite, OutOfMemory, RunFailed
from qvera.utils.files import plain_json
from qvera.utils.formatting import counted, first_of
from qvera.utils.memory import Shortage

_CHANGES = 3
_LEAST_SHARE = 0.05  # a change has to take at least this share less than was planned, since the plan was too low
_EXPERT = re.compile(r"\.experts\.\d+\.")
LOWER_RATE = "Begin again with a lower training.learning_rate, in another training.output_dir."
"""A run that goes on keeps its rate, and nothing is written over one."""
_ANY_RUN = "Lower data.max_length, or training.per_device_train_batch_size where rows are not packed."


def longest_batch_error(shortage: Shortage, plan: Plan | None, path: str, examples: Sequence[Example]) -> InputError:
    """Return the error of a run whose longest batch, of rows of ``path``, does not fit before its first step."""
    rows = first_of([example.source for example in examples], 4)
    text = f"{path}: the longest batch of this run ({_batch(examples)}: {rows}) does not fit into memory: {shortage}."
    return InputError(f"{text}\n{_advice(plan, shortage)}")


def not_finite_error(
    step: int, losses: list[float], norm: float, passes: list[list[str]], rows: list[str], group: Group
) -> NotFinite:
    """Return the error of a loss or gradient that is not finite, with the rows that it came from on all ranks.

    ``losses`` are of this rank's passes, ``passes`` the sources of their rows, ``rows`` the sources of the whole step.
    """
    bad = [sources for sources, loss in zip(passes, losses, strict=True) if not math.isfinite(loss)]
    of_ranks = group.gather({"losses": plain_json(losses), "rows": [source for sources in bad for source in sources]})
    where = [source for each in of_ranks for source in each["rows"]] or [f"the gradient only; rows {', '.join(rows)}"]
    text = not_finite_text(f"Step {step}", [loss for each in of_ranks for loss in each["losses"]], norm, where)
    # the rate has no part in the first step's loss
    advice = LOWER_RATE if step > 1 else "Or begin again with another model.compute_dtype and training.output_dir."
    kept = "No step was taken and earlier checkpoints are kept. Look at these rows."
    return for_all(NotFinite(f"{text} {kept} {advice}"))


def not_finite_text(step: str, losses: Sequence[float | None], norm: float, rows: Sequence[str]) -> str:
    """Return a sentence, begun with ``step``, about a loss (None or NaN) or gradient that is not finite.

    ``rows``: the sources of the rows that it came from.
    """
    shown = ", ".join("not finite" if loss is None or not math.isfinite(loss) else f"{loss:g}" for loss in losses)
    where = ", ".join(rows)
    return f"{step}: the loss or its gradient is not finite (losses {shown}; gradient norm {norm}); rows: {where}."


def has_finite_loss(scores: dict[str, Any]) -> bool:
    """Whether a held-out loss is finite. One that is not is None where it was read from a checkpoint."""
    return scores["loss"] is not None and math.isfinite(scores["loss"])


def held_out_not_finite(step: str, before: dict[str, Any] | None) -> str:
    """Return why an adapter is not saved whose last held-out loss is not finite. ``before``: scores before training."""
    before_too = before is not None and not has_finite_loss(before)
    more = "It was not finite before training either: look at the held-out rows."
    advice = more if before_too else LOWER_RATE
    return f"{step}: its held-out loss is not finite. {advice}"


def require_gradients(gradients: Mapping[str, torch.Tensor | None]) -> None:
    """Raise RunFailed where the first backward pass gave some adapted layers no gradient, as these would never train.

    ``gradients``: of all trained tensors, by their keys in an adapter file, summed over ranks. Experts that are modules
    of their own may have got no token, and are not asked.
    """
    # by layer: one of its tensors may rightly have none, such as the A of a LoRA whose B begins as zero
    layers: dict[str, list[torch.Tensor]] = {}
    for key, gradient in gradients.items():
        found = layers.setdefault(key.rpartition(".")[0], [])
        if gradient is not None:
            found.append(gradient.detach().abs().amax().float())
    device = next((each[0].device for each in layers.values() if each), None)
    if device is None:
        return
    nothing = torch.zeros((), device=device)
    most = torch.stack([torch.stack([nothing, *each]).amax() for each in layers.values()]).tolist()  # one wait
    without = [n for n, largest in zip(layers, most, strict=True) if largest == 0 and not _EXPERT.search(n)]
    if not without or not any(most):  # a batch that is learnt already has no gradient at all
        return
    kinds = sorted({name.rpartition(".")[2] for name in layers.keys() - set(without)})
    named = first_of([name.removeprefix(PREFIX) for name in without])
    raise for_all(
        RunFailed(
            f"adapter.targets: the first backward pass gave {len(without)} of {len(layers)} adapted layers no "
            f"gradient: {named}. The model reads their weights without calling the layer, or does not use them. Name "
            f"the others: adapter.targets: [{', '.join(kinds)}]."
        )
    )


def step_error(
    step: str, shortage: Shortage, examples: Sequence[Example] | None, plan: Plan | None, group: Group
) -> OutOfMemory:
    """Return the error of a step that memory does not suffice for. Every rank has undone the step and calls this.

    Args:
        step: begins the message.
        shortage: the worst of all ranks.
        examples: of the pass that failed on this rank; empty: before its first pass; None: it did not fail here.
    """
    rank = f"rank {group.rank}" if group.world_size > 1 else None
    what = next(
        text for text in group.gather(None if examples is None else _what_failed(examples, rank)) if text is not None
    )
    return for_all(OutOfMemory(f"{step}: {what}: {shortage}. The step was undone.\n{_advice(plan, shortage)}"))


def lone_error(
    step: int, shortage: Shortage, examples: Sequence[Example], plan: Plan | None, group: Group
) -> OutOfMemory:
    """Return the error of one rank under ZeRO. It can't tell the others: they wait inside DeepSpeed's passes."""
    what = _what_failed(examples, f"rank {group.rank} on {group.host}")
    return OutOfMemory(
        f"Step {step}: {what}: {shortage}. Under ZeRO a step that one rank can't take ends the run; "
        "earlier checkpoints are kept, and training.save_steps says how many there are.\n"
        f"{_advice(plan, shortage)}"
    )


def _advice(plan: Plan | None, shortage: Shortage) -> str:
    if plan is None:
        return _ANY_RUN
    recipe = plan.recipe
    if recipe.training.on_oom == "halve":  # a pass has one row by now, so another key must help
        smaller = changed(recipe, {"training.per_device_train_batch_size": 1})
        plan = dataclasses.replace(plan, recipe=smaller, batch=plan.batch_of(smaller))
    # the mildest changes by which the plan takes as much less as was missing
    missing = max((shortage.asked_bytes or 0) - shortage.free_bytes, int(_LEAST_SHARE * plan.needed_bytes))
    fitting = min(plan.needed_bytes, plan.machine.available_bytes) - missing
    lines = change_lines(plan.within(max(fitting, 0)))[: 1 + _CHANGES]
    if recipe.training.on_oom == "save" and recipe.deepspeed is None and not recipe.data.has_adapters:
        lines.append("Or set training.on_oom=halve, which goes on with half as many rows in a pass.")
    return "\n".join(lines) or _ANY_RUN


def _what_failed(examples: Sequence[Example], rank: str | None) -> str:
    where = ", ".join(part for part in (rank, _batch(examples) if examples else None) if part is not None)
    what = "memory ran out in a forward and backward pass"
    if not examples:
        what = "memory ran out before the first forward and backward pass"
    return f"{what} ({where})" if where else what


def _batch(examples: Sequence[Example]) -> str:
    longest = max((max(example.row_tokens) for example in examples), default=0)  # a rank may have no rows
    return f"{counted(len(examples), 'row')}, the longest of {longest:,} tokens"
