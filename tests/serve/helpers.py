"""Adapters on the tiny model, an engine that answers by them, and what each request gets alone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qvera.adapters.save_load import attach, load_adapter, save_adapter
from qvera.config.sections import AdapterSection, ModelSection
from qvera.models.loader import Base, load_base
from qvera.serve.engine import Engine
from qvera.serve.requests import (
    EndEvent,
    EngineSettings,
    Event,
    GenerationRequest,
    PromptScores,
    ResolvedAdapter,
    Sampling,
    TokenEvent,
)
from qvera.serve.sampling import TokenChooser, choose_tokens
from qvera.serve.store import AdapterStore
from tests.adapters.helpers import perturb

ENGINES = ("continuous", "static")
"""Ways to batch requests."""
SECONDS = 120.0
BASE = "base"
_numbers = itertools.count()


def tiny_base(model_dir: Path, **model: Any) -> Base:
    """The tiny Llama in NF4, computing in fp32, unless ``model`` says otherwise."""
    return load_base(ModelSection.model_validate({"path": str(model_dir), "compute_dtype": "float32", **model}))


def write_adapters(
    root: Path, model_dir: Path, seeds: dict[str, int], base: dict[str, Any] | None = None, **settings: Any
) -> None:
    """An adapter of other vectors for each directory name and seed."""
    loaded = tiny_base(model_dir, **(base or {}))
    section = AdapterSection.model_validate({"rank": 8, "targets": "all-linear", **settings})
    model = attach(loaded.model, section, str(model_dir), loaded.facts.get("fingerprint"))
    for name, seed in seeds.items():
        perturb(model, seed=seed)
        save_adapter(model, root / name)


class Answer:
    """The events of one request."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.ends: list[EndEvent] = []
        self.scores: PromptScores | None = None
        self._ended = threading.Event()
        self._began = threading.Event()

    def take(self, event: Event) -> None:
        """What `Engine.submit` calls."""
        if isinstance(event, TokenEvent):
            assert not self.ends, "a token came after the end"
            self.events.append(event)
            self._began.set()
        elif isinstance(event, PromptScores):
            assert not self.events and self.scores is None
            self.scores = event
        else:
            self.ends.append(event)
            self._ended.set()
            self._began.set()

    def wait_for_token(self) -> None:
        """Until the first token is there."""
        assert self._began.wait(SECONDS), "no token came"

    def end(self) -> EndEvent:
        """The only end."""
        assert self._ended.wait(SECONDS), "no end came"
        assert len(self.ends) == 1
        return self.ends[0]

    @property
    def tokens(self) -> list[int]:
        """Of the whole answer."""
        self.end()
        return [event.token for event in self.events]


def request(
    prompt: Sequence[int], adapter: ResolvedAdapter | None = None, max_tokens: int = 8, **sampling: Any
) -> GenerationRequest:
    """A greedy request of a new id, unless ``sampling`` says otherwise."""
    settings = Sampling(max_tokens=max_tokens, **{"temperature": 0.0, **sampling})
    return GenerationRequest(f"request {next(_numbers)}", tuple(prompt), adapter, settings)


def submit(engine: Engine, asked: GenerationRequest) -> Answer:
    """Submit it and collect its events."""
    answer = Answer()
    engine.submit(asked, answer.take)
    return answer


@contextmanager
def engine_of(
    model_dir: Path,
    kind: str = "continuous",
    model: dict[str, Any] | None = None,
    base: Base | None = None,
    **settings: Any,
) -> Iterator[Engine]:
    """A running engine on a base of its own, or on this one."""
    defaults: dict[str, Any] = {"cache_tokens": 2048, "step_tokens": 64, "batching": kind}
    base = base or tiny_base(model_dir, **(model or {}))
    engine = Engine(base, EngineSettings(**{**defaults, **settings}))
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


class Alone:
    """What a request gets when nothing shares its batch: one adapter loaded alone, all tokens computed anew each time."""

    def __init__(self, model_dir: Path, adapter: Path | None, **model: Any) -> None:
        base = tiny_base(model_dir, **model)
        self._model: Any = base.model if adapter is None else load_adapter(base.model, adapter, base)

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary]: of the token after each place."""
        return self._model(input_ids=torch.tensor([list(tokens)])).logits[0].float().log_softmax(-1)

    @torch.no_grad()
    def answer(self, asked: GenerationRequest) -> list[TokenEvent]:
        """The tokens of its answer."""
        ids, events = list(asked.prompt), list[TokenEvent]()
        chooser = TokenChooser(asked.sampling, torch.device("cpu"), asked.prompt)
        while len(events) < asked.sampling.max_tokens:
            logits = self._model(input_ids=torch.tensor([ids])).logits[:, -1].float()
            event = choose_tokens(logits, [chooser])[0]
            assert event is not None
            if event.token in asked.sampling.stop_tokens:
                break
            ids.append(event.token)
            events.append(event)
            if chooser.grammar is not None and chooser.grammar.finished:
                break
        return events


def assert_same(found: Answer, expected: Sequence[TokenEvent]) -> None:
    """The same tokens, and log-probabilities to 1e-4."""
    assert found.tokens == [event.token for event in expected]
    for one, other in zip(found.events, expected, strict=True):
        if other.logprob is None:
            assert one.logprob is None
            continue
        assert one.logprob is not None
        assert abs(one.logprob - other.logprob) < 1e-4
        assert [t for t, _ in one.top] == [t for t, _ in other.top]
        assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(one.top, other.top, strict=True))


def assert_answers(
    engine: Engine, asked: Sequence[GenerationRequest], expected: Sequence[Sequence[TokenEvent]]
) -> None:
    """Asked at once, each gets what it gets alone."""
    for answer, events in zip([submit(engine, one) for one in asked], expected, strict=True):
        assert_same(answer, events)


def store_of(root: Path) -> AdapterStore:
    """The adapters of a directory, and the base."""
    return AdapterStore(root, base_names=[BASE])


def resolved(store: AdapterStore, name: str = "a1") -> ResolvedAdapter:
    """One of its adapters, and not the base."""
    adapter = store.resolve(name)
    assert adapter is not None
    return adapter


def expected_of(alone: Any, root: Path, asked: list[GenerationRequest]) -> list[list[TokenEvent]]:
    """What each gets alone. Before an engine runs: transformers loads no model while another thread uses torch."""
    return [alone(None if one.adapter is None else root / one.adapter.name).answer(one) for one in asked]
