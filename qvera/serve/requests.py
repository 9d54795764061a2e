"""What an engine is asked and what it answers. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvera.utils.errors import InputError


class Busy(Exception):
    """As many requests wait as may wait; ask again later."""


class EngineDead(Exception):
    """The engine's thread has ended, and no request is taken any more."""


class UnknownAdapter(InputError):
    """There is no adapter of that name."""


class AdapterChanged(InputError):
    """An adapter's file was replaced between `AdapterStore.resolve` and `Engine.submit`; resolve its name again."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one answer are chosen; several answers are several requests.

    Nothing else changes the model's probabilities: what a checkpoint's generation_config.json sets, such as a
    repetition penalty, is not applied. The numbers have been checked: ``max_tokens`` ≥ 1, ``temperature`` ≥ 0,
    0 < ``top_p`` ≤ 1, ``top_logprobs`` ≥ 0.
    """

    max_tokens: int
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    """None: a new one is drawn."""
    top_logprobs: int | None = None
    """None: no log-probabilities; 0: of the chosen token; k: and of the k most likely ones."""
    stop_tokens: frozenset[int] = frozenset()
    """Each ends the answer, and is not part of it."""


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """One adapter directory with the content that was found in it."""

    weight: float
    directory: Path
    sha256: str
    """Of its config and its vectors."""


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """An adapter, or a weighted sum of adapters, of which the content is known."""

    name: str
    """As it was asked for."""
    identity: str
    """SHA-256 of the content: of the parts with their weights. Two names of the same vectors have one identity."""
    parts: tuple[AdapterPart, ...]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to be answered once."""

    id: str
    """Unlike that of every other request of the engine's life."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    adapter: ResolvedAdapter | None
    """None: the base alone."""
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of an answer."""

    token: int
    logprob: float | None
    """Natural logarithm of its probability under the model: before temperature and top_p."""
    top: tuple[tuple[int, float], ...]
    """The most likely tokens with theirs, the likeliest first."""


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The end of an answer: the last event of every request, and there is exactly one."""

    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""
    """What went wrong, for the reason "error"."""


Event = TokenEvent | EndEvent


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How much an engine takes on."""

    max_running: int = 32
    """Requests answered at a time."""
    max_waiting: int = 256
    """Requests beyond these are refused (`Busy`)."""
    slots: int = 64
    """Adapters of one kind whose vectors are on the device; fewer than ``max_running`` make requests wait."""
    cache_tokens: int | None = None
    """Tokens whose keys and values are kept, of all requests together; None: as many as a share of the memory holds."""
    step_tokens: int = 512
    """Tokens in one forward pass at most; longer prompts take several."""
    batching: Literal["auto", "continuous", "static"] = "auto"
    """Whether requests may join a batch at any step, or batches begin and end together; auto: as the model allows."""
    share_prefixes: bool = True
    """Whether requests of one adapter share the keys and values of what their prompts begin with."""
    training_share: float = 0.1
    """Of the time while requests run or wait, and a second longer: what background work may take. Else it takes all."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at one moment; ``prompt_tokens`` and what follows it count from its start."""

    running: int
    """Requests that have a place in the batch."""
    waiting: int
    adapters_resident: int
    """Adapters whose vectors are on the device."""
    adapter_slots: int
    bank_bytes: int
    """Of all slots, used or not."""
    dead: str | None
    """Why the engine takes no requests any more; None while it does."""
    prompt_tokens: int
    generated_tokens: int
    finished: int
    """Requests that have ended, for whatever reason."""
    background_seconds: float = 0.0
    """What background work took (`qvera.serve.engine.BackgroundWork`)."""
    background_parts: int = 0
    background_failure: str | None = None
    """Why background work is parked; None while it is not."""
