"""A loss of the caller's: a function of log-probabilities, or of a classifier's logits, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from qvera.utils.errors import OwnCodeFailed, one_line
from qvera.utils.memory import is_out_of_memory

if TYPE_CHECKING:
    from qvera.data import Example


class LossBatch(NamedTuple):
    """What a loss is told of the n targets of a pass, beside the model's outputs.

    Attributes:
        labels: int64 [n], the trained tokens or the classes; fp32 [n], the numbers of a regression.
        row: int64 [n], the place in ``rows`` of each target.
        rows: ``source``, ``prompt`` and ``reference`` of each row.
    """

    labels: torch.Tensor
    row: torch.Tensor
    rows: list[dict[str, Any]]


OwnLoss: TypeAlias = Callable[[torch.Tensor, LossBatch], torch.Tensor]
"""Outputs of a pass → the loss of each target [n], or their mean (scalar)."""


def own_loss_sum(loss: OwnLoss, outputs: torch.Tensor, labels: torch.Tensor, rows: Sequence[Example]) -> torch.Tensor:
    """The loss summed over the n targets of a pass, of the first dimension of ``outputs``; a mean counts n times.

    OwnCodeFailed: the function raises, or returns something else than a loss.
    """
    counts = torch.tensor([1 if row.is_labelled else row.trained_tokens for row in rows])
    row = torch.repeat_interleave(torch.arange(len(rows)), counts).to(labels.device)
    told = [{"source": each.source, "prompt": each.prompt_text, "reference": each.reference} for each in rows]
    try:
        found: Any = loss(outputs, LossBatch(labels, row, told))
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        problem = None if shape in ((), (len(labels),)) else f"returned {shape}"
        if problem is None and outputs.requires_grad and not found.requires_grad:
            problem = "returned a tensor without a gradient"
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = f"raised {type(error).__name__} ({one_line(error)})"
    if problem is None:
        return found.sum() if found.dim() else found * len(labels)
    where = ", ".join(each.source for each in rows)
    raise OwnCodeFailed(
        f"loss: {own_name(loss)} {problem} on {where}; expected a scalar, their mean, or the losses [{len(labels)}] of "
        "their targets, as a tensor that has a gradient."
    )


def own_name(function: Callable[..., Any]) -> str:
    """The name of a function of the caller's, for messages and run.json."""
    return getattr(function, "__qualname__", type(function).__name__)
