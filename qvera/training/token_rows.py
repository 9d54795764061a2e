"""A forward and backward pass over rows of many models, each with targets and a loss of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from qvera.data import Example
from qvera.models import forward
from qvera.models.loss import Head, states_at, target_loss
from qvera.models.structure import causal_model
from qvera.models.token_losses import TOKEN_LOSSES, sequence_ratios, weigher
from qvera.utils import accelerator

if TYPE_CHECKING:
    from qvera.adapters.bank import AdapterBank
    from qvera.training.lent_bank import LentBank


class TokenRow(NamedTuple):
    """A row to train on. Nothing is shifted: position t predicts ``targets[t]``."""

    tokens: np.ndarray  # int64 [N]
    targets: np.ndarray  # int64 [N], or [N, K]
    inputs: Mapping[str, np.ndarray]  # fp32, of the targets' shape, by the names of `TOKEN_LOSSES`


class RowResults(NamedTuple):
    """The result of a call with rows (`Tenants.forward_backward`)."""

    logprobs: list[np.ndarray]  # of each row's targets, in fp32, by the model before the next step
    loss: float  # the sum over the call


LossSettings: TypeAlias = tuple[tuple[str, float], ...]
"""The settings of a loss, by name."""


class PassRow(NamedTuple):
    """A row of a pass: the slot of its model, the row, and its loss with settings."""

    slot: int
    row: TokenRow
    loss: str
    settings: LossSettings


def run_pass(
    lent: LentBank, bank: AdapterBank, rows: Sequence[PassRow], chunk_tokens: int, is_training: bool, gradients: bool
) -> list[tuple[np.ndarray, float]]:
    """Return the log-probabilities of each row's targets, in fp32, and its loss. Add gradients to the bank's.

    Rows of one loss with equal settings must stand together. ``is_training``: the mode that the model is in.
    """
    counts, nothing = [len(own.row.tokens) for own in rows], np.zeros(0, np.int32)
    examples = [
        Example(own.row.tokens.astype(np.int32), np.zeros(count, bool), "", nothing, "", None)
        for own, count in zip(rows, counts, strict=True)
    ]
    with lent.training(is_training):
        batch = forward.make_batch(lent.model, examples, 0, prefix_once=False, whole_rows=True)
        tokens = forward.row_tokens(batch, examples)
        begins = zip(itertools.accumulate([0, *tokens[:-1]]), counts, strict=True)
        numbers = np.concatenate([begin + np.arange(count) for begin, count in begins])
        places = accelerator.tensor_on(bank.device, numbers)
        with bank.rows([own.slot for own in rows], tokens), torch.set_grad_enabled(gradients):
            # the states of all rows' own tokens, in one sequence; those of padding are left out
            hidden = states_at(forward.hidden_states(lent.model, batch), places)
            head, losses = Head.of(causal_model(lent.model)), list[Tensor]()
            found = list[tuple[list[PassRow], Tensor]]()
            for _, group in itertools.groupby(rows, lambda own: own[2:]):  # by loss and settings
                part, begin = list(group), sum(len(each) for _, each in found)
                end = begin + sum(len(own.row.tokens) for own in part)
                loss, each = _group_loss(hidden[begin:end], head, part, chunk_tokens)
                losses.append(loss)
                found.append((part, each))
            if gradients:  # one backward pass through the layers for all losses
                torch.stack(losses).sum().backward()
        results = list[tuple[np.ndarray, float]]()
        for part, each in found:
            ends = np.cumsum([len(own.row.tokens) for own in part])
            for own, values in zip(part, np.split(each.cpu().numpy(), ends[:-1]), strict=True):
                targets = own.row.targets
                logprobs = values[:, : targets[0].size].reshape(targets.shape).copy()
                results.append((logprobs, math.fsum(values[:, -1].tolist())))
        return results


def _group_loss(hidden: Tensor, head: Head, rows: Sequence[PassRow], chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the loss of rows that share a kind, and fp32 [n, K + 1]: log-probabilities, and each token's loss."""
    loss, wide = TOKEN_LOSSES[rows[0].loss], max(own.row.targets[0].size for own in rows)

    # rows with fewer targets at a position than others get more of them; their inputs are 0, so these weigh nothing
    def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
        columns = [part.reshape(len(part), -1) for part in parts]
        return np.concatenate([np.pad(part, ((0, 0), (0, wide - part.shape[1]))) for part in columns])

    arrays = {name: joined([own.row.inputs[name].astype(np.float32) for own in rows]) for name in loss.inputs}
    arrays["targets"] = joined([own.row.targets for own in rows])
    arrays["row"] = np.repeat(np.arange(len(rows)), [len(own.row.tokens) for own in rows])
    given = accelerator.tensors_on(hidden.device, arrays)
    targets, row = given.pop("targets"), given.pop("row")
    if loss.by_row:  # the weight of a token depends on all tokens of its row, so a pass without gradient comes first
        _, logprobs = target_loss(hidden.detach(), targets, head, chunk_tokens, lambda lps, _: (lps, lps))
        given["sequence_ratio"] = sequence_ratios(logprobs, given, row, len(rows))
    weigh, losses = weigher(loss, given, dict(rows[0].settings)), torch.zeros(len(hidden), 1, device=hidden.device)

    def noted(logprobs: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        values, weights = weigh(logprobs, part)
        losses[part] = values.sum(1, keepdim=True)
        return values, weights

    total, logprobs = target_loss(hidden, targets, head, chunk_tokens, noted)
    return total, torch.cat([logprobs.float(), losses], 1)
