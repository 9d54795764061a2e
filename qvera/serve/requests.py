"""An engine's requests, events and settings. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qvera.utils.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from qvera.data.images import StoredImage
    from qvera.serve.grammars import Grammar


class Busy(Exception):
    """The queue is full; ask again later."""


class EngineDead(Exception):
    """The engine's thread has ended, so it takes no requests."""


class UnknownAdapter(InputError):
    """No adapter has this name."""


class AdapterChanged(InputError):
    """An adapter's file was replaced between `AdapterStore.resolve` and `Engine.submit`; resolve its name again."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """The settings by which the tokens of one answer are drawn; several answers are several requests.

    Nothing else changes the model's probabilities: a checkpoint's generation_config.json, with a repetition penalty for
    example, is not applied. Values are already checked: ``max_tokens`` ≥ 1, ``temperature`` ≥ 0, 0 < ``top_p`` ≤ 1,
    ``top_k`` and ``top_logprobs`` ≥ 0, ``repetition_penalty`` > 0.

    A token's logit is first divided by ``repetition_penalty`` if positive, else multiplied by it, if the token is in
    the prompt or the answer (CTRL, arXiv:1909.05858). Then ``frequency_penalty`` times its count in the answer is taken
    off, and ``presence_penalty`` if it is there at all, as in OpenAI's API. ``logit_bias`` is added last. Then tokens
    that ``grammar`` does not allow are left out.
    """

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # of what top_k leaves
    top_k: int = 0  # the most tokens to draw from; 0: all
    seed: int | None = None  # taken modulo 2^64; None: a new one is drawn
    top_logprobs: int | None = None
    """None: no log-probabilities; 0: of the chosen token; k: also of the k most likely ones."""
    tempered: bool = False
    """Whether log-probabilities are those of softmax(logits / temperature), as reinforcement learning needs them."""
    stop_tokens: frozenset[int] = frozenset()  # each ends the answer
    keeps_stop: bool = False  # whether the stop token is part of the answer
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # of tokens
    grammar: Grammar | None = None  # at its beginning; it is copied, not moved


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """A question about the last tokens of a prompt: each one's log-probability after the tokens before it."""

    last: int  # so many tokens, from 1 to all but the first
    top: int = 0  # also of the most likely tokens in each place
    targets: np.ndarray | None = None  # also of these tokens, int64 [last, K]
    draws: int = 0  # also of so many tokens that are drawn in each place, independently
    temperature: float = 1.0  # of the draws; all log-probabilities are the model's own
    seed: int | None = None  # of the draws


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The answer to a `PromptScoring`: fp32 log-probabilities and int64 tokens, a row for each of the last tokens."""

    own: np.ndarray  # [last], of the prompt's tokens
    targets: np.ndarray  # [last, K]
    top_tokens: np.ndarray  # [last, top], the likeliest first
    top: np.ndarray
    drawn_tokens: np.ndarray  # [last, draws]
    drawn: np.ndarray


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """One adapter directory and the hash of its content."""

    weight: float
    directory: Path
    sha256: str  # of config and vectors


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter, or a weighted sum of adapters, with known content."""

    name: str  # as asked for
    identity: str
    """SHA-256 of the parts' content and weights. Two names of the same vectors have one identity."""
    parts: tuple[AdapterPart, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to be answered once."""

    id: str  # unique in the engine's life
    prompt: tuple[int, ...]  # token ids, at least one
    adapter: ResolvedAdapter | None  # None: the base
    sampling: Sampling
    images: tuple[StoredImage, ...] = ()  # their places are in the prompt
    scoring: PromptScoring | None = None


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of an answer."""

    token: int
    logprob: float | None
    """Natural, under the model: before penalties, biases, top_k and top_p, and before temperature unless `tempered`."""
    top: tuple[tuple[int, float], ...]  # the most likely tokens and their logprobs, likeliest first
    cached_tokens: int = 0  # of the first token: leading ones of the prompt that were in the cache when it began


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The last event of every request; there is exactly one."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""  # what went wrong, for "error"


Event = TokenEvent | PromptScores | EndEvent
"""Scores come before the first token."""


def require_fits(prompt: int, new: int, longest: int) -> None:
    """Raise InputError for an empty prompt, or if a prompt and an answer of so many tokens are too long together."""
    if not prompt:
        raise InputError("prompt: has no tokens; expected at least one.")
    if prompt + new > longest:
        raise InputError(
            f"prompt and max_tokens: {prompt:,} and {new:,} tokens are more than the {longest:,} that fit; shorten the "
            "prompt or lower max_tokens."
        )


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits of an engine."""

    max_running: int = 32  # requests answered at a time
    max_waiting: int = 256  # further requests are refused (`Busy`)
    slots: int = 64
    """Adapters of one shape on the device. With fewer than ``max_running``, requests may wait for one."""
    cache_tokens: int | None = None
    """Keys and values kept for all requests together; None: as many as a share of the memory holds."""
    step_tokens: int = 512  # most tokens of a forward pass; longer prompts take several
    batching: Literal["auto", "continuous", "static"] = "auto"
    """Continuous: requests join at any step. Static: batches begin and end together. Auto: as the model allows."""
    batch_invariant: bool = False
    """Whether an answer is the same to the bit whoever shares the batch (`qvera.serve.invariance`)."""
    training_share: float = 0.1
    """Background work's share of the time while requests run or wait, and a moment longer. Otherwise it takes all."""
    answering_seconds: float = 1.0  # that moment, after the last step of an answer


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at one moment. ``prompt_tokens`` and all after it count from its start."""

    running: int  # requests with a place in the batch
    waiting: int
    adapters_resident: int  # adapters on the device
    adapter_slots: int
    bank_bytes: int  # of all slots, used or not
    dead: str | None  # why the engine has ended; None while it runs
    prompt_tokens: int
    generated_tokens: int
    finished: int  # requests that ended for any reason
    background_seconds: float = 0.0
    background_failure: str | None = None  # why background work is parked; None: it is not
