"""Log-probabilities of prompts' tokens, from last hidden states that steps of answers compute anyway.

The head is applied to a few places at a time, so logits of a whole prompt never exist.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from qvera.models.loss import Head
from qvera.serve.requests import PromptScores, PromptScoring
from qvera.serve.sampling import SMALLEST_TEMPERATURE, generator_of


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
        self._targets = torch.from_numpy(targets).to(device)
        self._generator = generator_of(scoring.seed, device)
        self._found: list[list[torch.Tensor]] = []

    def add(self, logprobs: torch.Tensor) -> None:
        """Take the log-probabilities [n, vocabulary] of the next places."""
        scoring, targets = self._scoring, self._targets[self._added :][: len(logprobs)]
        self._added += len(logprobs)
        top, top_tokens = logprobs.topk(min(scoring.top, logprobs.shape[1]))
        drawn = top_tokens[:, :0]
        if scoring.draws:
            likely = (logprobs / max(scoring.temperature, SMALLEST_TEMPERATURE)).softmax(-1)
            drawn = torch.multinomial(likely, scoring.draws, replacement=True, generator=self._generator)
        self._found.append([logprobs.gather(1, targets), top_tokens, top, drawn, logprobs.gather(1, drawn)])

    def scores(self) -> PromptScores:
        """Those of all places, at least one, once they were added."""
        targets, *others = (torch.cat(parts).cpu().numpy() for parts in zip(*self._found, strict=True))
        return PromptScores(targets[:, 0], targets[:, 1:], *others)


def add_scores(
    head: Head, prompts: Sequence[ScoredPrompt], hidden: torch.Tensor, most_rows: int, apart: bool = False
) -> None:
    """Score places of prompts, ``most_rows`` at a time.

    ``hidden``, [n, hidden], are their last hidden states, and ``prompts`` has the prompt of each. ``apart``: products
    always have ``most_rows``, filled up, and each place is scored by itself.
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
