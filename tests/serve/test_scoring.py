"""Log-probabilities of prompts are those that a model gives alone, whatever else the engine does meanwhile."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from qvera.models.loss import Head
from qvera.serve.requests import GenerationRequest, PromptScoring, Sampling
from qvera.serve.scoring import ScoredPrompt, add_scores
from qvera.serve.store import AdapterStore
from qvera.utils.errors import InputError
from tests.serve.conftest import NAMES
from tests.serve.helpers import BASE, ENGINES, assert_same, request, submit


def _scored(
    prompt: list[int], adapter: Any, scoring: PromptScoring, max_tokens: int = 1, **sampling: Any
) -> GenerationRequest:
    asked = request(prompt, adapter, max_tokens, **sampling)
    return GenerationRequest(asked.id, asked.prompt, adapter, asked.sampling, scoring=scoring if scoring.last else None)


@pytest.mark.parametrize("kind", ENGINES)
def test_prompts_of_many_adapters_are_scored_as_each_model_scores_them_alone(
    kind: str, engine_with: Any, store: AdapterStore, alone: Any, expected: Any, adapters_dir: Any
) -> None:
    """Beside answers, in pieces, with a cache in which some begin again."""
    chooser, asked = random.Random(2), []
    for i in range(14):
        prompt = [chooser.randrange(3, 300) for _ in range(chooser.choice([1, 2, 17, 60]))]
        name, rest = chooser.choice([BASE, *NAMES[:3]]), len(prompt) - 1
        last = chooser.choice([0, rest // 2, rest, rest])
        targets = np.array([[chooser.randrange(304) for _ in range(i % 3)] for _ in range(last)], np.int64)
        scoring = PromptScoring(
            last, top=chooser.choice([0, 5]), targets=targets.reshape(last, i % 3), draws=chooser.choice([0, 2]), seed=i
        )
        sampling = {"temperature": 1.0, "seed": i} if i % 2 else {}
        asked.append(_scored(prompt, store.resolve(name), scoring, chooser.choice([1, 6]), **sampling))
        asked.append(request(prompt, store.resolve(name), 6, top_logprobs=0))
    answers = expected(asked)
    rows = [
        alone(None if one.adapter is None else adapters_dir / one.adapter.name).logprobs(one.prompt) for one in asked
    ]
    with engine_with(kind, max_running=5, step_tokens=24, cache_tokens=160) as engine:
        found = [submit(engine, one) for one in asked]
        for one, answer, events, whole in zip(asked, found, answers, rows, strict=True):
            assert_same(answer, events)
            given, scores = one.scoring, answer.scores
            if given is None:
                assert scores is None
                continue
            assert scores is not None and given.targets is not None
            wanted = whole[-1 - given.last : -1].numpy()
            own = np.array(one.prompt[-given.last :])

            def near(found: Any, places: Any, wanted: Any = wanted) -> bool:
                return np.allclose(found, np.take_along_axis(wanted, places, 1), rtol=0, atol=1e-4)

            assert near(scores.own[:, None], own[:, None])
            assert near(scores.targets, given.targets)
            assert near(scores.top, np.argsort(-wanted)[:, : given.top]) and near(scores.top, scores.top_tokens)
            assert near(scores.drawn, scores.drawn_tokens)
            assert scores.drawn.shape == (given.last, given.draws)


def test_a_prompt_is_computed_once_for_its_scores_and_all_answers_that_are_asked_at_once(
    engine_with: Any, store: AdapterStore
) -> None:
    prompt, adapter, counts = [9, 8, 7, 6] * 20, store.resolve("a1"), list[int]()
    group = [_scored(prompt, adapter, PromptScoring(79), 2), *(request(prompt, adapter, 2) for _ in range(7))]
    with engine_with(step_tokens=48) as engine:
        run = engine._batches.run
        engine._batches.run = lambda batch, *more: (counts.append(sum(count for _, count in batch)), run(batch, *more))[
            1
        ]
        answers = [submit(engine, one) for one in group]
        assert len({tuple(answer.tokens) for answer in answers}) == 1
        assert sum(counts) == 80 + 7 * 16 + 8  # the last block is each one's own, and so is the first new token
        counts.clear()
        later = submit(engine, _scored([*prompt, 5, 4], adapter, PromptScoring(2)))
        assert len(later.tokens) == 1 and later.scores is not None
        assert sum(counts) == 82 - 64  # the places before the last two were in the cache


def test_the_head_never_sees_more_places_at_a_time_than_requests_may_run(engine_with: Any) -> None:
    with engine_with(max_running=3, step_tokens=64) as engine:
        rows = list[int]()
        head = Head.of(engine.model).module
        hook = head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].flatten(0, -2).shape[0]))
        answer = submit(engine, _scored([3 + i for i in range(255)], None, PromptScoring(254, top=2)))
        assert len(answer.tokens) == 1
        hook.remove()
    assert answer.scores is not None and len(answer.scores.own) == 254
    assert max(rows) == 3


def test_targets_beyond_the_vocabulary_are_refused(engine_with: Any) -> None:
    with engine_with() as engine, pytest.raises(InputError, match="scoring.targets: token ids of this model are 0 to"):
        submit(engine, _scored([3, 4], None, PromptScoring(1, targets=np.array([[304]]))))


def test_drawn_tokens_come_as_often_as_their_temperature_says_and_again_with_their_seed() -> None:
    torch.manual_seed(0)
    head = Head(torch.nn.Linear(4, 5), None, 1.0)
    hidden = torch.randn(2, 4)

    def drawn(rows: int, **settings: Any) -> Any:
        prompt = ScoredPrompt(PromptScoring(2, draws=4000, **settings), [0, 1, 2], torch.device("cpu"))
        with torch.no_grad():
            add_scores(head, [prompt, prompt], hidden, rows)
        return prompt.scores().drawn_tokens

    found = drawn(2, seed=2**64 - 1, temperature=0.5)
    for row, tokens in zip((head.module(hidden) / 0.5).softmax(-1).tolist(), found, strict=True):
        assert np.bincount(tokens, minlength=5) / 4000 == pytest.approx(row, abs=0.03)
    assert (drawn(1, seed=2**64 - 1, temperature=0.5) == found).all()  # however many places come at a time
    assert (drawn(2, seed=2**63 - 1, temperature=0.5) != found).any()
    assert (drawn(2, temperature=0.0) == head.module(hidden).argmax(-1, keepdim=True).numpy()).all()


def test_a_stop_token_that_is_kept_ends_the_answer_as_its_last_token(engine_with: Any, expected: Any) -> None:
    asked = request([3, 9], max_tokens=12, top_logprobs=0)
    [whole] = expected([asked])
    stop = frozenset({whole[4].token})
    first = next(i for i, event in enumerate(whole) if event.token in stop)
    kept = Sampling(12, 0.0, top_logprobs=0, stop_tokens=stop, keeps_stop=True)
    with engine_with() as engine:
        answer = submit(engine, GenerationRequest("kept", asked.prompt, None, kept))
        assert answer.end().reason == "stop"
        assert_same(answer, whole[: first + 1])
