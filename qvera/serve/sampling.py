"""Draws the next token of each request of a batch, with random numbers of its own, and scores tokens of prompts.

Drawing uses the Gumbel trick: argmax of log p − log(noise), with exponential noise. Each request draws a number for
every token of the vocabulary from its own generator. So its answer depends neither on the rest of the batch nor on the
order in which tokens are summed.

Log-probabilities of prompts come from last hidden states that steps of answers compute anyway. The head is applied to a
few places at a time, so logits of a whole prompt never exist.
"""

import itertools
import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from qvera.models.loss import Head
from qvera.serve.requests import PromptScores, PromptScoring, Sampling, TokenEvent
from qvera.utils import accelerator

SMALLEST_TEMPERATURE = 1e-4
"""Division by less would overflow; this one already gives the likeliest token."""


def generator_of(seed: int | None, device: torch.device) -> torch.Generator:
    """Return a generator with this seed modulo 2^64, or with a new seed."""
    # mixed, because on a CPU torch takes the lower 32 bits only
    mixed = np.random.Philox(key=secrets.randbits(64) if seed is None else seed % 2**64).random_raw()
    return torch.Generator(device=device).manual_seed(int(mixed))


class TokenChooser:
    """One request's sampling settings and random numbers.

    A seed gives the same numbers on every run with the same device type and version of torch.
    """

    def __init__(self, sampling: Sampling, device: torch.device, prompt: Sequence[int] = ()) -> None:
        self.sampling, self._prompt = sampling, prompt
        self.generator: torch.Generator | None = None  # None: greedy
        if sampling.temperature > 0:
            self.generator = generator_of(sampling.seed, device)
        given = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
        self._penalizes = given != (0, 0, 1)
        self._counts: torch.Tensor | None = None  # [vocabulary], of the answer so far; once it is needed
        self._bias: tuple[torch.Tensor, ...] = ()  # likewise: tokens, and what is added to their logits
        self.grammar = None if sampling.grammar is None else sampling.grammar.copy()
        # whether `change` does anything
        self.changes = self._penalizes or bool(sampling.logit_bias) or self.grammar is not None

    def change(self, row: torch.Tensor) -> None:
        """Apply penalties, biases and the grammar to a row of logits [vocabulary], in place."""
        asked = self.sampling
        if self._penalizes:
            if self._counts is None:
                self._counts, self._in_prompt = torch.zeros_like(row), torch.zeros_like(row, dtype=torch.bool)
                known = [token for token in self._prompt if token < len(row)]  # an image's has no logit
                self._in_prompt.index_fill_(0, _sent(known, row), True)
            there = self._counts > 0
            if (factor := asked.repetition_penalty) != 1:
                repeated = torch.where(row > 0, row / factor, row * factor)
                row.copy_(torch.where(there | self._in_prompt, repeated, row))
            row -= self._counts * asked.frequency_penalty + there * asked.presence_penalty
        if asked.logit_bias:
            if not self._bias:
                tokens, values = zip(*asked.logit_bias, strict=True)
                self._bias = _sent(tokens, row), _sent(values, row).float()
            row.index_add_(0, *self._bias)
        if self.grammar is not None:
            row.masked_fill_(torch.from_numpy(~self.grammar.allowed(len(row))).to(row.device), -math.inf)

    def note(self, token: int) -> None:
        """Take note of a token that was drawn, for penalties and the grammar."""
        if self._counts is not None:
            self._counts[token] += 1
        if self.grammar is not None and token not in self.sampling.stop_tokens:
            self.grammar.take(token)


def choose_tokens(
    logits: torch.Tensor, choosers: Sequence[TokenChooser], apart: bool = False
) -> list[TokenEvent | None]:
    """The next token of each row of logits [rows, vocabulary]; None for a row that is not finite, or an empty choice.

    Log-probabilities are added where asked for. ``logits`` is not changed. ``apart``: one row after the other.
    """
    if apart:  # the split of no rows has a part all the same, so lengths may differ
        return [choose_tokens(row, [chooser])[0] for row, chooser in zip(logits.split(1), choosers, strict=False)]
    logits = logits.float()
    settings = [chooser.sampling for chooser in choosers]
    finite = torch.isfinite(logits.sum(-1))  # nan and inf survive the sum, and no mask of all logits is made
    scores = logits
    if changing := [i for i, chooser in enumerate(choosers) if chooser.changes]:
        scores = logits.clone()
        for i in changing:
            choosers[i].change(scores[i])
        finite &= torch.isfinite(scores.amax(-1))  # not where a grammar allows nothing
    if any(one.temperature > 0 for one in settings):
        scores = scores / _column([_divisor(one) for one in settings], logits)
        cut = [i for i, one in enumerate(settings) if one.temperature > 0 and (one.top_p < 1 or one.top_k)]
        if cut:
            rows = _sent(cut, logits)
            scores.index_copy_(0, rows, _likeliest(scores.index_select(0, rows), [settings[i] for i in cut]))
        noise = torch.ones_like(scores)  # the log of 1 changes nothing, so greedy rows stay greedy
        for row, chooser in zip(noise, choosers, strict=True):
            if chooser.generator is not None:
                row.exponential_(generator=chooser.generator)
        # without MKL a CPU draws 0 once in 2^24, which would take its token however unlikely that is, even a cut one
        scores = scores - noise.clamp_(min=2**-25).log_()
    tokens = torch.stack([scores.argmax(-1), finite.long()]).tolist()  # one copy from the device for both
    for i in changing:
        if tokens[1][i]:
            choosers[i].note(tokens[0][i])
    logprobs = _logprobs(logits, settings, tokens[0])
    return [
        TokenEvent(token, *logprobs.get(i, (None, ()))) if is_finite else None
        for i, (token, is_finite) in enumerate(zip(*tokens, strict=True))
    ]


def _divisor(sampling: Sampling) -> float:
    """Return the number that logits are divided by; 1 for greedy requests."""
    return max(sampling.temperature, SMALLEST_TEMPERATURE) if sampling.temperature > 0 else 1.0


def _sent(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Return numbers as a tensor on the device of ``like``. The host does not wait for what the device computes."""
    dtype = np.int64 if all(isinstance(value, int) for value in values) else np.float32
    return accelerator.tensor_on(like.device, np.array(values, dtype))


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return _sent(values, like).unsqueeze(1)


def _likeliest(scores: torch.Tensor, settings: Sequence[Sampling]) -> torch.Tensor:
    """Return scores that are −inf for all tokens but those to draw from, of which there is at least one.

    These are the ``top_k`` likeliest tokens, and of these the fewest whose probability together reaches ``top_p``.
    """
    ordered, places = scores.sort(dim=-1, descending=True, stable=True)
    width = scores.shape[1]
    rank = torch.arange(width, device=scores.device)
    # no tensor holds an integer of any size, and an error here would end everybody's requests
    ordered = ordered.masked_fill(
        rank >= _column([min(one.top_k or width, width) for one in settings], rank), -math.inf
    )
    # the probability of all likelier tokens; the first token has none, and stays whatever ``top_p`` is
    before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = -1.0
    ordered = ordered.masked_fill(before >= _column([one.top_p for one in settings], scores), -math.inf)
    return torch.empty_like(scores).scatter_(-1, places, ordered)


def _logprobs(
    logits: torch.Tensor, settings: Sequence[Sampling], tokens: Sequence[int]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Map each row that asked to its token's log-probability, and to the most likely tokens with theirs."""
    asked = [i for i, one in enumerate(settings) if one.top_logprobs is not None]
    if not asked:
        return {}
    divisors = [_divisor(settings[i]) if settings[i].tempered else 1.0 for i in asked]
    logprobs = (logits.index_select(0, _sent(asked, logits)) / _column(divisors, logits)).log_softmax(-1)
    chosen = logprobs.gather(1, _column([tokens[i] for i in asked], logits)).squeeze(1).tolist()
    most = min(max(settings[i].top_logprobs or 0 for i in asked), logits.shape[-1])
    values, places = (t.tolist() for t in logprobs.topk(most)) if most else ([[]] * len(asked),) * 2
    return {
        i: (own, tuple(zip(places[k], values[k], strict=True))[: settings[i].top_logprobs])
        for k, (i, own) in enumerate(zip(asked, chosen, strict=True))
    }


class ScoredPrompt:
    """The scores of one prompt, whose places come in order.

    Attributes:
        places: those whose last hidden states are asked for. Each predicts the token behind it.
    """

    def __init__(self, scoring: PromptScoring, prompt: Sequence[int], device: torch.device) -> None:
        self._scoring, self._added = scoring, 0
        self.places = range(len(prompt) - 1 - scoring.last, len(prompt) - 1)
        own = np.array(prompt, np.int64)[self.places.start + 1 :, None]
        targets = own if scoring.targets is None else np.concatenate([own, scoring.targets], 1)
        self._targets = torch.from_numpy(targets)  # on the CPU, as the request may wait for long
        self._generator = generator_of(scoring.seed, device)
        self._found: list[list[torch.Tensor]] = []

    def add(self, logprobs: torch.Tensor) -> None:
        """Take the log-probabilities [n, vocabulary] of the next places."""
        scoring, targets = self._scoring, self._targets[self._added :][: len(logprobs)].to(logprobs.device)
        self._added += len(logprobs)
        top, top_tokens = logprobs.topk(min(scoring.top, logprobs.shape[1]))
        drawn = top_tokens[:, :0]  # none
        if scoring.draws:
            likely = (logprobs / max(scoring.temperature, SMALLEST_TEMPERATURE)).softmax(-1)
            likely = likely.nan_to_num(1.0)  # multinomial raises on nan, which would end the others' requests too
            drawn = torch.multinomial(likely, scoring.draws, replacement=True, generator=self._generator)
        self._found.append([logprobs.gather(1, targets), top_tokens, top, drawn, logprobs.gather(1, drawn)])

    def scores(self) -> PromptScores:
        """Return the scores of all places, once `add` has had them. There is at least one place."""
        targets, *others = (torch.cat(parts).cpu().numpy() for parts in zip(*self._found, strict=True))
        return PromptScores(targets[:, 0], targets[:, 1:], *others)


def add_scores(
    head: Head, prompts: Sequence[ScoredPrompt], hidden: torch.Tensor, most_rows: int, apart: bool = False
) -> None:
    """Score places of prompts, ``most_rows`` at a time.

    Args:
        prompts: the prompt of each place, n in all; places of one prompt stand beside each other, in order.
        hidden: their last hidden states [n, hidden].
        apart: products always have ``most_rows`` rows, filled up, and each place is scored by itself.
    """
    for begin in range(0, len(prompts), most_rows):
        part = slice(begin, begin + most_rows)
        if apart:
            filled = F.pad(hidden[part], (0, 0, 0, most_rows - len(prompts[part])))
            logits = head.logits(head.module(filled).float())
            for prompt, row in zip(prompts[part], logits.split(1), strict=False):
                prompt.add(row.log_softmax(-1))
            continue
        logprobs = head.logits(head.module(hidden[part]).float()).log_softmax(-1)
        sizes = [(prompt, len(list(places))) for prompt, places in itertools.groupby(prompts[part])]
        for (prompt, _), rows in zip(sizes, logprobs.split([size for _, size in sizes]), strict=True):
            prompt.add(rows)
