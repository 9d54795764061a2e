"""Losses of explicit targets by their log-probabilities, for training by a loop of one's own and by rewards.

Each gives the loss of a target and w = -∂loss/∂lp. So its gradient is that of cross entropy with the weights w, which
the chunked head takes (`loss.target_loss`). With lp the log-probability now, q that of the sampler, A the advantage:

    r = exp(lp - q)        s = exp(mean of lp - q over the row's mask)

    cross_entropy          -w lp
    importance_sampling    -r A
    ppo                    -min(r A, clip(r) A)               PPO, arXiv 1707.06347, equation 7
    cispo                  -sg(clip(r)) A lp                  CISPO, arXiv 2506.13585, equation 4
    dro                    -(A lp - β/2 (lp - q)²)            DRO, arXiv 2405.19107, equation 3, without a value
    gspo                   -min(s A, clip(s) A), s_t = s p / sg(p)      GSPO, arXiv 2507.18071, equations 7 and 13

Losses are sums: nothing is averaged over tokens or rows.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qvera.models.loss import Weigh

Inputs = Mapping[str, Tensor]
"""Name → fp32 [n, K], aligned with the targets."""
Weighed = tuple[Tensor, Tensor]
"""The loss of each target, and its weight w."""


class TokenLoss(NamedTuple):
    """A loss.

    Attributes:
        inputs: names of what it needs beside the targets.
        settings: its settings and their usual values; None: there is none, so it has to be given.
        compute: of the log-probabilities [k, K], the inputs at the same places, and the settings.
        by_row: whether a token's weight depends on its whole row.
    """

    inputs: tuple[str, ...]
    settings: Mapping[str, float | None]
    compute: Callable[[Tensor, Inputs, Mapping[str, float]], Weighed]
    by_row: bool = False


def _ratio(apart: Tensor) -> Tensor:
    return apart.exp().clamp_max(torch.finfo(apart.dtype).max)  # finite, so that an advantage of 0 makes it nothing


def _importance_sampling(logprobs: Tensor, given: Inputs, _: Mapping[str, float]) -> Weighed:
    weights = _ratio(logprobs - given["logprobs"]) * given["advantages"]
    return -weights, weights


def _clipped(ratio: Tensor, advantages: Tensor, settings: Mapping[str, float]) -> Weighed:
    clipped = ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"]) * advantages
    free = ratio * advantages
    # where both are the same, the ratio is within the bounds
    return -torch.minimum(free, clipped), torch.where(free <= clipped, free, 0.0)


def _cispo(logprobs: Tensor, given: Inputs, settings: Mapping[str, float]) -> Weighed:
    ratio = _ratio(logprobs - given["logprobs"]).clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])
    weights = ratio * given["advantages"]
    return -weights * logprobs, weights


def _dro(logprobs: Tensor, given: Inputs, settings: Mapping[str, float]) -> Weighed:
    apart, beta = logprobs - given["logprobs"], settings["beta"]
    return beta / 2 * apart.square() - given["advantages"] * logprobs, given["advantages"] - beta * apart


_POLICY = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
TOKEN_LOSSES: Mapping[str, TokenLoss] = {
    "cross_entropy": TokenLoss(("weights",), {}, lambda lp, given, _: (-given["weights"] * lp, given["weights"])),
    "importance_sampling": TokenLoss(_POLICY, {}, _importance_sampling),
    "ppo": TokenLoss(
        _POLICY, _CLIP, lambda lp, given, s: _clipped(_ratio(lp - given["logprobs"]), given["advantages"], s)
    ),
    "cispo": TokenLoss(_POLICY, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}, _cispo),
    "dro": TokenLoss(_POLICY, {"beta": None}, _dro),
    "gspo": TokenLoss(
        (*_POLICY, "sequence_ratio_mask"),
        _CLIP,
        lambda _, given, s: _clipped(given["sequence_ratio"], given["advantages"], s),
        by_row=True,
    ),
}


def weigher(loss: TokenLoss, inputs: Inputs, settings: Mapping[str, float]) -> Weigh:
    """The loss over a batch, for `loss.target_loss`. ``inputs``: fp32 [n, K] by name, for all places."""

    def weigh(logprobs: Tensor, part: slice) -> Weighed:
        here = {name: tensor[part].to(logprobs.dtype) for name, tensor in inputs.items()}
        return loss.compute(logprobs, here, settings)

    return weigh


def sequence_ratios(logprobs: Tensor, inputs: Inputs, row: Tensor, rows: int) -> Tensor:
    """GSPO's s of each token's row, [n, 1], from log-probabilities [n, 1]. ``row``: int64 [n], each token's row."""
    mask, apart = inputs["sequence_ratio_mask"].squeeze(1), (logprobs - inputs["logprobs"]).squeeze(1)
    sums = logprobs.new_zeros(2, rows).index_add_(1, row, torch.stack([mask * apart, mask]).to(logprobs.dtype))
    return _ratio(sums[0] / sums[1].clamp_min(torch.finfo(sums.dtype).tiny))[row].unsqueeze(1)
