"""Rows with targets and losses of their own: what a call may hold, and a pass over rows of many models."""

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
from qvera.models.loss import Head, Weigh, states_at, target_loss
from qvera.models.structure import causal_model, position_limit
from qvera.models.token_losses import TOKEN_LOSSES, sequence_ratios, weigher
from qvera.utils import accelerator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvera.adapters.bank import AdapterBank
    from qvera.training.lent_bank import LentBank


class TokenRow(NamedTuple):
    """A row to train on. Nothing is shifted: position t predicts ``targets[t]``."""

    tokens: np.ndarray  # int64 [N]
    targets: np.ndarray  # int64 [N, K]
    inputs: Mapping[str, np.ndarray]  # fp32 [N, K], by the names of `TOKEN_LOSSES`


Settings: TypeAlias = tuple[tuple[str, float], ...]
"""Of a loss, by name."""


def limits_of(model: PreTrainedModel) -> tuple[int, int, int]:
    """The most tokens of a row, and how many ids inputs and targets have."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    ids, head = model.get_input_embeddings(), model.get_output_embeddings()
    return min(most, position_limit(model) or most), int(ids.num_embeddings), int(head.out_features)


def checked_call(
    limits: tuple[int, int, int], rows: Sequence[TokenRow], name: str, settings: Mapping[str, float]
) -> Settings:
    """The settings of a loss, with the usual ones. ValueError: what a base can't do, by the names of Tinker's API."""
    if name not in TOKEN_LOSSES:
        raise ValueError(f"loss_fn: takes one of {', '.join(TOKEN_LOSSES)}, got {name!r}.")
    chosen = {**TOKEN_LOSSES[name].settings, **settings}
    for key, value in chosen.items():
        if key not in TOKEN_LOSSES[name].settings:
            raise ValueError(f"loss_fn_config.{key}: is no setting of {name}.")
        if value is None or not math.isfinite(value):
            raise ValueError(f"loss_fn_config.{key}: {name} takes a finite number, got {value}.")
    if not rows:
        raise ValueError("data: has no rows.")
    for number, row in enumerate(rows):
        if problem := _problem(row, name, *limits):
            raise ValueError(f"data[{number}]: {problem}.")
    return tuple(sorted((key, float(value)) for key, value in chosen.items() if value is not None))


def _problem(row: TokenRow, loss: str, most_tokens: int, input_ids: int, target_ids: int) -> str | None:
    """What is wrong with a row, if anything is."""
    count, shape, wanted = len(row.tokens), row.targets.shape, set(TOKEN_LOSSES[loss].inputs)
    if not 1 <= count <= most_tokens:
        return f"has {count:,} tokens; this base takes 1 to {most_tokens:,}"
    if len(shape) != 2 or shape[0] != count or not shape[1]:
        return f"target_tokens has the shape {list(shape)} for {count} tokens"
    if shape[1] > 1 and loss != "cross_entropy":
        return "target_tokens has several targets a token, which cross_entropy alone takes"
    for name, ids, known in (("model_input", row.tokens, input_ids), ("target_tokens", row.targets, target_ids)):
        if ids.min() < 0 or ids.max() >= known:
            return f"{name} has ids from {ids.min()} to {ids.max()}; this base has 0 to {known - 1}"
    if odd := sorted(wanted ^ row.inputs.keys()):
        return f"loss_fn_inputs.{odd[0]} is {'missing' if odd[0] in wanted else 'no input of this loss'}"
    for name, values in row.inputs.items():
        if values.shape != shape:
            return f"loss_fn_inputs.{name} has the shape {list(values.shape)}, target_tokens {list(shape)}"
        if not np.isfinite(values).all():
            return f"loss_fn_inputs.{name} has NaN or Inf"
    return None


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
    counts, wide = [len(own.row.tokens) for own in rows], max(own.row.targets.shape[1] for own in rows)
    ends, nothing = np.cumsum([0, *counts]).tolist(), np.zeros(0, np.int32)
    arrays = {"targets": np.zeros((ends[-1], wide), np.int64), "row": np.repeat(np.arange(len(rows)), counts)}
    for own, begin, end in zip(rows, ends, ends[1:], strict=False):
        for name, values in {"targets": own.row.targets, **own.row.inputs}.items():
            # what is beside a row's own targets weighs nothing
            array = arrays.setdefault(name, np.zeros((ends[-1], wide), np.float32))
            array[begin:end, : values.shape[1]] = values
    examples = [
        Example(own.row.tokens.astype(np.int32), np.zeros(count, bool), "", nothing, "", None)
        for own, count in zip(rows, counts, strict=True)
    ]
    with lent.training(is_training):
        batch = forward.make_batch(lent.model, examples, 0, prefix_once=False, whole_rows=True)
        tokens = forward.row_tokens(batch, examples)
        begins = zip(itertools.accumulate([0, *tokens[:-1]]), counts, strict=True)
        arrays["places"] = np.concatenate([begin + np.arange(count) for begin, count in begins])
        given = accelerator.tensors_on(bank.device, arrays)
        with bank.rows([own.slot for own in rows], tokens), torch.set_grad_enabled(gradients):
            hidden = states_at(forward.hidden_states(lent.model, batch), given["places"])
            head, targets = Head.of(causal_model(lent.model)), given["targets"]
            losses = torch.zeros(targets.shape, device=hidden.device)
            parts = list[tuple[slice, Weigh]]()
            for (name, settings), group in itertools.groupby(range(len(rows)), lambda i: rows[i][2:]):
                places, loss = list(group), TOKEN_LOSSES[name]
                part = slice(ends[places[0]], ends[places[-1] + 1])
                inputs = {key: given[key][part] for key in loss.inputs}
                if loss.by_row:
                    own_targets, row = targets[part, :1], given["row"][part] - places[0]
                    _, lps = target_loss(
                        hidden[part].detach(), own_targets, head, chunk_tokens, lambda lps, _: (lps, lps)
                    )
                    narrow = {key: values[:, :1] for key, values in inputs.items()}
                    inputs["sequence_ratio"] = sequence_ratios(lps, narrow, row, len(places))
                parts.append((part, weigher(loss, inputs, dict(settings))))

            def weigh(lps: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
                weights = torch.empty_like(lps)
                for part, own in parts:
                    begin, end = max(chunk.start, part.start), min(chunk.stop, part.stop)
                    if begin < end:
                        here, there = slice(begin - chunk.start, end - chunk.start), slice(begin, end)
                        losses[there], weights[here] = own(lps[here], slice(begin - part.start, end - part.start))
                return losses[chunk], weights

            total, lps = target_loss(hidden, targets, head, chunk_tokens, weigh)
            if gradients:
                total.backward()
        found = torch.cat([lps.float(), losses.sum(1, keepdim=True)], 1).cpu().numpy()
    each = zip(rows, (found[begin:end] for begin, end in itertools.pairwise(ends)), strict=True)
    return [(own[:, : row.row.targets.shape[1]].copy(), math.fsum(own[:, -1].tolist())) for row, own in each]
