"""Tokens are drawn from the distribution that was asked for, by each request's own random numbers.

Log-probabilities of prompts are those that a model gives alone, whatever else the engine does meanwhile.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from qvera.models.loss import Head
from qvera.serve.requests import GenerationRequest, PromptScoring, Sampling
from qvera.serve.sampling import ScoredPrompt, TokenChooser, add_scores, choose_tokens
from qvera.serve.store import AdapterStore
from qvera.utils.errors import InputError
from tests.serve.conftest import NAMES
from tests.serve.helpers import BASE, ENGINES, assert_same, request, submit


def _chooser(**settings: object) -> TokenChooser:
    return TokenChooser(Sampling(**{"max_tokens": 1, **settings}), torch.device("cpu"))  # type: ignore[arg-type]


def _tokens(logits: torch.Tensor, *choosers: TokenChooser) -> list[int]:
    return [event.token for event in choose_tokens(logits, list(choosers)) if event is not None]


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (2.0, 0.9, 0), (1.0, 1.0, 2), (2.0, 0.6, 3)]
)
def test_shares_of_drawn_tokens_are_the_probabilities(temperature: float, top_p: float, top_k: int) -> None:
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0, 1.5])
    chooser = _chooser(temperature=temperature, top_p=top_p, top_k=top_k, seed=3)
    counts = torch.zeros(5)
    for _ in range(3000):
        counts[_tokens(logits[None], chooser)[0]] += 1
    expected = (logits / temperature).softmax(-1)
    expected = torch.where(expected >= expected.topk(top_k or 5).values[-1], expected, 0.0)
    expected /= expected.sum()
    kept, total = set[int](), 0.0
    for token in expected.argsort(descending=True).tolist():  # in plain words: add the likeliest until top_p is reached
        if total < top_p:
            kept.add(token)
        total += float(expected[token])
    expected = torch.tensor([float(p) if i in kept else 0.0 for i, p in enumerate(expected)])
    torch.testing.assert_close(counts / 3000, expected / expected.sum(), atol=0.03, rtol=0)
    assert all(counts[i] == 0 for i in range(5) if i not in kept)


def test_a_request_draws_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    torch.manual_seed(0)
    steps = torch.randn(20, 3, 50)
    alone, other = _chooser(seed=5, top_p=0.9), _chooser(seed=6, top_p=0.9)
    expected = [_tokens(step[1:2], alone)[0] for step in steps]
    batch = [_chooser(temperature=0.0), _chooser(seed=5, top_p=0.9), _chooser(seed=7)]
    assert [_tokens(step, *batch)[1] for step in steps] == expected
    assert [_tokens(step[1:2], other)[0] for step in steps] != expected


def test_temperature_zero_and_nearly_zero_take_the_likeliest_token() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 100) * 10
    for temperature in (0.0, 1e-9):
        choosers = [_chooser(temperature=temperature, seed=1) for _ in range(8)]
        assert _tokens(logits, *choosers) == logits.argmax(-1).tolist()


def test_logprobs_are_the_models_own_whatever_the_temperature() -> None:
    torch.manual_seed(0)
    logits, asked = torch.randn(4, 30), {0.0: None, 3.0: 0, 0.2: 2, 1.0: 30}
    choosers = [_chooser(temperature=temperature, top_logprobs=k, seed=1) for temperature, k in asked.items()]
    events = choose_tokens(logits, choosers)
    for row, k, event in zip(logits.log_softmax(-1), asked.values(), events, strict=True):
        assert event is not None
        if k is None:
            assert (event.logprob, event.top) == (None, ())
            continue
        assert event.logprob == pytest.approx(float(row[event.token]), abs=1e-6)
        likeliest = row.topk(k)
        assert [token for token, _ in event.top] == likeliest.indices.tolist()
        assert [value for _, value in event.top] == pytest.approx(likeliest.values.tolist(), abs=1e-6)


def test_tempered_logprobs_are_those_of_the_distribution_that_was_drawn_from_before_it_was_cut() -> None:
    torch.manual_seed(0)
    logits, temperatures = torch.randn(3, 30), (0.5, 2.0, 0.0)
    choosers = [_chooser(temperature=t, tempered=True, top_logprobs=3, top_k=2, seed=1) for t in temperatures]
    for row, temperature, event in zip(logits, temperatures, choose_tokens(logits, choosers), strict=True):
        assert event is not None
        expected = (row / (temperature or 1.0)).log_softmax(-1)  # a greedy answer has the model's own
        assert event.logprob == pytest.approx(float(expected[event.token]), abs=1e-5)
        assert [value for _, value in event.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)


def test_seeds_that_differ_in_any_of_64_bits_draw_other_tokens() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 1, 200)
    drawn = {
        tuple(_tokens(step, chooser)[0] for step in logits)
        for seed in (0, 1, 2**32, 2**63, 2**64 - 1)
        for chooser in [_chooser(seed=seed)]
    }
    assert len(drawn) == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others(bad: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 20)
    first, spoilt, last = choose_tokens(logits, [_chooser(seed=i, top_p=0.8, top_logprobs=1) for i in range(3)])
    assert first and spoilt and last
    logits[1, 4] = bad
    found = choose_tokens(logits, [_chooser(seed=i, top_p=0.8, top_logprobs=1) for i in range(3)])
    assert found == [first, None, last]


def test_noise_of_zero_draws_no_token_that_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without MKL draws it once in 2^24 numbers, and a token of a large vocabulary takes 2^18."""
    monkeypatch.setattr(
        torch.Tensor, "exponential_", lambda row, **_: row.fill_(1).index_fill_(0, torch.tensor([2]), 0)
    )
    logits = torch.tensor([[5.0, 4.0, -30.0]])
    assert _tokens(logits, _chooser(top_k=2)) == _tokens(logits, _chooser()) == [0]


def test_a_top_k_beyond_any_vocabulary_draws_from_all_tokens_and_fails_no_other_request() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]] * 2)
    huge, other = _chooser(top_k=10**30, seed=1), _chooser(top_k=2, seed=2)
    assert _tokens(logits, huge, other) == _tokens(logits, _chooser(seed=1), _chooser(top_k=2, seed=2))


def test_a_token_of_the_prompt_that_has_no_logit_is_penalized_nowhere() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])  # as Llama 3.2 Vision's, whose token for an image is behind the head's
    settings = Sampling(1, temperature=0.0, repetition_penalty=2.0)
    found = [TokenChooser(settings, torch.device("cpu"), prompt) for prompt in ([0], [0, 3, 9])]
    assert _tokens(logits.repeat(2, 1), *found) == [1, 1]


def test_penalties_and_biases_change_the_draw_as_their_formulas_say_and_leave_logprobs_alone() -> None:
    torch.manual_seed(0)
    asked: list[dict[str, Any]] = [
        {
            "repetition_penalty": 1.7,
            "presence_penalty": -0.5,
            "frequency_penalty": 0.4,
            "logit_bias": ((3, 2.5), (9, -100.0)),
        },
        {"frequency_penalty": 1.5},
        {"logit_bias": ((7, 100.0),)},
        {},
    ]
    prompt, answers = [1, 2, 3, 3], [[], [], [], []]  # type: tuple[list[int], list[list[int]]]
    choosers = [
        TokenChooser(Sampling(max_tokens=1, temperature=0.0, top_logprobs=0, **keys), torch.device("cpu"), prompt)
        for keys in asked
    ]
    for _ in range(30):
        logits = torch.randn(12).mul(1.5).repeat(4, 1)
        before = logits.clone()
        events = choose_tokens(logits, choosers)
        assert torch.equal(logits, before)
        for keys, answer, event in zip(asked, answers, events, strict=True):
            scores = logits[0].tolist()  # in plain words
            for token in range(12):
                factor = keys.get("repetition_penalty", 1)
                if token in prompt or token in answer:
                    scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
                scores[token] -= answer.count(token) * keys.get("frequency_penalty", 0)
                scores[token] -= (token in answer) * keys.get("presence_penalty", 0)
                scores[token] += dict(keys.get("logit_bias", ())).get(token, 0)
            assert event is not None
            assert event.token == max(range(12), key=scores.__getitem__)
            assert event.logprob == pytest.approx(float(logits[0].log_softmax(-1)[event.token]), abs=1e-6)
            answer.append(event.token)
    assert set(answers[2]) == {7}
    assert 9 not in answers[0]
    assert answers[1] != answers[3]


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


def test_scoring_that_does_not_fit_its_prompt_is_told_to_its_caller_alone(engine_with: Any) -> None:
    with engine_with() as engine:
        with pytest.raises(ValueError, match="dimension"):
            submit(engine, _scored([3, 4], None, PromptScoring(1, targets=np.zeros((2, 1), np.int64))))
        assert submit(engine, request([3], max_tokens=1)).end().reason == "length"


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
