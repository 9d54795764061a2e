"""Rows with targets and losses of their own, and a pass over rows of many models."""

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
    targets: np.ndarray  # int64 [N, K]
    inputs: Mapping[str, np.ndarray]  # fp32 [N, K], by the names of `TOKEN_LOSSES`


Settings: TypeAlias = tuple[tuple[str, float], ...]
"""Of a loss, by name."""


class PassRow(NamedTuple):
    """A row of a pass: of the model in a slot, with a loss and its settings."""

    slot: int
    row: TokenRow
    loss: str
    settings: Settings


def run_pass(
    lent: LentBank, bank: AdapterBank, rows: Sequence[PassRow], chunk_tokens: int, is_training: bool, gradients: bool
) -> list[tuple[np.ndarray, float]]:
    """The log-probabilities of each row's targets, fp32 [N, K], and its loss. Gradients are added to the bank's.

    Rows of one loss and settings stand together. ``is_training`` is the mode of the model.
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
        arrays = {"places": np.concatenate([begin + np.arange(count) for begin, count in begins])}
        places = accelerator.tensors_on(bank.device, arrays)["places"]
        with bank.rows([own.slot for own in rows], tokens), torch.set_grad_enabled(gradients):
            hidden = states_at(forward.hidden_states(lent.model, batch), places)
            head, losses = Head.of(causal_model(lent.model)), list[Tensor]()
            found = list[tuple[list[PassRow], Tensor]]()
            for _, group in itertools.groupby(rows, lambda own: own[2:]):
                part, begin = list(group), sum(len(each) for _, each in found)
                end = begin + sum(len(own.row.tokens) for own in part)
                loss, each = _group_loss(hidden[begin:end], head, part, chunk_tokens)
                losses.append(loss)
                found.append((part, each))
            if gradients:
                torch.stack(losses).sum().backward()
        results = list[tuple[np.ndarray, float]]()
        for part, each in found:
            ends = np.cumsum([len(own.row.tokens) for own in part])
            for own, values in zip(part, np.split(each.cpu().numpy(), ends[:-1]), strict=True):
                results.append((values[:, : own.row.targets.shape[1]].copy(), math.fsum(values[:, -1].tolist())))
        return results


def _group_loss(hidden: Tensor, head: Head, rows: Sequence[PassRow], chunk_tokens: int) -> tuple[Tensor, Tensor]:
    """The loss of rows that have the same one, and fp32 [n, K + 1]: log-probabilities, and the loss of each token."""
    loss, wide = TOKEN_LOSSES[rows[0].loss], max(own.row.targets.shape[1] for own in rows)

    def joined(parts: Sequence[np.ndarray]) -> np.ndarray:  # what is beside a row's own targets weighs nothing
        return np.concatenate([np.pad(part, ((0, 0), (0, wide - part.shape[1]))) for part in parts])

    arrays = {name: joined([own.row.inputs[name].astype(np.float32) for own in rows]) for name in loss.inputs}
    arrays["targets"] = joined([own.row.targets for own in rows])
    arrays["row"] = np.repeat(np.arange(len(rows)), [len(own.row.tokens) for own in rows])
    given = accelerator.tensors_on(hidden.device, arrays)
    targets, row = given.pop("targets"), given.pop("row")
    if loss.by_row:
        _, logprobs = target_loss(hidden.detach(), targets, head, chunk_tokens, lambda lps, _: (lps, lps))
        given["sequence_ratio"] = sequence_ratios(logprobs, given, row, len(rows))
    weigh, losses = weigher(loss, given, dict(rows[0].settings)), torch.zeros(len(hidden), 1, device=hidden.device)

    def noted(logprobs: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        values, weights = weigh(logprobs, part)
        losses[part] = values.sum(1, keepdim=True)
        return values, weights

    total, logprobs = target_loss(hidden, targets, head, chunk_tokens, noted)
    return total, torch.cat([logprobs.float(), losses], 1)
