"""Draws the next token of each request of a batch, with random numbers of its own.

It uses the Gumbel trick: argmax of log p − log(noise), with exponential noise. Each request draws a number for every
token of the vocabulary from its own generator. So its answer depends neither on the rest of the batch nor on the order
in which tokens are summed.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import torch

from qvera.serve.requests import Sampling, TokenEvent

_SMALLEST_TEMPERATURE = 1e-4
"""Division by less would overflow; this one already gives the likeliest token."""


class TokenChooser:
    """One request's sampling settings and random numbers.

    A seed gives the same numbers on every run with the same device type and version of torch.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.generator: torch.Generator | None = None  # None: greedy
        if sampling.temperature > 0:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63
            self.generator = torch.Generator(device=device).manual_seed(seed)


def choose_tokens(logits: torch.Tensor, choosers: Sequence[TokenChooser]) -> list[TokenEvent | None]:
    """The next token of each row of logits [rows, vocabulary]; None for a row that is not finite.

    Log-probabilities are added where asked for. ``logits`` is not changed.
    """
    logits = logits.float()
    settings = [chooser.sampling for chooser in choosers]
    finite = torch.isfinite(logits.sum(-1))
    scores = logits
    if any(one.temperature > 0 for one in settings):
        scale = [max(one.temperature, _SMALLEST_TEMPERATURE) if one.temperature > 0 else 1.0 for one in settings]
        scores = logits / torch.tensor(scale, device=logits.device).unsqueeze(1)
        cut = [i for i, one in enumerate(settings) if one.temperature > 0 and one.top_p < 1]
        if cut:
            scores[cut] = _within_top_p(scores[cut], [settings[i].top_p for i in cut])
        noise = torch.ones_like(scores)
        for row, chooser in zip(noise, choosers, strict=True):
            if chooser.generator is not None:
                row.exponential_(generator=chooser.generator)
        scores = scores - noise.log_()
    tokens = torch.stack([scores.argmax(-1), finite.long()]).tolist()
    logprobs = _logprobs(logits, settings, tokens[0])
    return [
        TokenEvent(token, *logprobs.get(i, (None, ()))) if is_finite else None
        for i, (token, is_finite) in enumerate(zip(*tokens, strict=True))
    ]


def _within_top_p(scores: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Scores, −inf outside the smallest set of likeliest tokens whose probability reaches ``top_p``, never empty."""
    ordered, places = scores.sort(dim=-1, descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = -1.0
    limits = torch.tensor(list(top_p), device=scores.device).unsqueeze(1)
    ordered = ordered.masked_fill(before >= limits, -math.inf)
    return torch.empty_like(scores).scatter_(-1, places, ordered)


def _logprobs(
    logits: torch.Tensor, settings: Sequence[Sampling], tokens: Sequence[int]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """For rows that asked: row → its token's log-probability, and the most likely tokens with theirs."""
    asked = [i for i, one in enumerate(settings) if one.top_logprobs is not None]
    if not asked:
        return {}
    logprobs = logits[asked].log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor([[tokens[i]] for i in asked], device=logits.device)).squeeze(1).tolist()
    most = min(max(settings[i].top_logprobs or 0 for i in asked), logits.shape[-1])
    values, places = (t.tolist() for t in logprobs.topk(most)) if most else ([[]] * len(asked),) * 2
    return {
        i: (own, tuple(zip(places[k], values[k], strict=True))[: settings[i].top_logprobs])
        for k, (i, own) in enumerate(zip(asked, chosen, strict=True))
    }
