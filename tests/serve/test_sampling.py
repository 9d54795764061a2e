"""Tokens are drawn from the distribution that was asked for, by each request's own random numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from qvera.serve.requests import Sampling
from qvera.serve.sampling import TokenChooser, choose_tokens


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
