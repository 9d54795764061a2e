"""A request gets from a busy engine what it gets alone; faults end the requests that they concern, and never hang."""

from __future__ import annotations

import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qvera.serve.engine import NOT_FINITE
from qvera.serve.requests import Busy, EndEvent, EngineDead, PromptScoring
from qvera.serve.store import AdapterStore
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_WEIGHTS
from tests.helpers import wait_until
from tests.serve.conftest import NAMES
from tests.serve.helpers import BASE, ENGINES, assert_answers, assert_same, request, submit

kinds = pytest.mark.parametrize("kind", ENGINES)
LENGTH = EndEvent("length")


@kinds
def test_every_answer_of_a_mixed_batch_is_that_of_the_request_alone(
    kind: str, engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    """They come one after the other while others run, more than slots and cache hold, and some are cancelled."""
    chooser, asked = random.Random(1), []
    for i in range(24):  # base and adapters, greedy and sampled, short and long, with and without log-probabilities
        prompt = [chooser.randrange(3, 300) for _ in range(chooser.choice([1, 5, 17, 40, 90]))]
        sampling: dict[str, Any] = {"top_logprobs": chooser.choice([None, 0, 3])}
        if i % 2:
            sampling |= {"temperature": 1.0, "seed": i, "top_p": chooser.choice([1.0, 0.9])}
        if i % 4 == 0:
            sampling |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": ((5, 3.0),)}
        if i % 3 == 0:
            sampling["stop_tokens"] = frozenset(chooser.sample(range(304), 60))  # none of them is part of the answer
        name = chooser.choice([BASE, *NAMES])
        asked.append(request(prompt, store.resolve(name), chooser.choice([1, 4, 15]), **sampling))
    alone, cancelled = expected(asked), {7, 18}
    with engine_with(kind, max_running=7, step_tokens=48, slots=4, cache_tokens=160) as engine:
        answers = []
        for i, one in enumerate(asked):
            answers.append(submit(engine, one))
            if i % 5 == 4:
                answers[i - 4].wait_for_token()
            if i in cancelled:
                engine.cancel(one.id)
        ends = [answer.end().reason for answer in answers]
        for i, answer in enumerate(answers):
            if i in cancelled:
                assert answer.tokens == [event.token for event in alone[i]][: len(answer.tokens)]
            else:
                assert_same(answer, alone[i])
                assert ends[i] == ("length" if len(alone[i]) == asked[i].sampling.max_tokens else "stop")
        stats = engine.stats()
    assert set(ends) == {"length", "stop", "cancelled"}
    assert (stats.finished, stats.running, stats.waiting, stats.adapters_resident) == (24, 0, 0, 4)
    assert stats.generated_tokens == sum(len(answer.events) for answer in answers)


@kinds
def test_many_clients_that_ask_and_go_away_at_any_time_each_get_one_end(
    kind: str, engine_with: Any, store: AdapterStore
) -> None:
    with engine_with(kind, slots=3, max_running=5, cache_tokens=256) as engine:

        def client(number: int) -> list[str]:
            chooser, ends = random.Random(number), list[str]()
            for _ in range(5):
                adapter = store.resolve(chooser.choice(NAMES))
                asked = request([3] * chooser.choice([1, 30]), adapter, chooser.choice([1, 20]))
                answer = submit(engine, asked)
                if chooser.random() < 0.5:
                    time.sleep(chooser.random() / 50)
                    engine.cancel(asked.id)
                ends.append(answer.end().reason)
                if chooser.random() < 0.2:
                    engine.unload(asked.adapter.identity)  # type: ignore[union-attr]
            return ends

        with ThreadPoolExecutor(6) as pool:
            ends = [end for each in pool.map(client, range(6)) for end in each]
        stats = engine.stats()
    assert set(ends) == {"length", "cancelled"}
    assert (stats.finished, stats.running, stats.waiting, stats.dead) == (30, 0, 0, None)


def _count_tokens(engine: Any) -> list[int]:
    """The tokens of each step from now on."""
    counts: list[int] = []
    use = engine.bank.use

    def count(users: Any, *how: Any) -> Any:
        counts.append(sum(tokens for _, _, tokens in users))
        return use(users, *how)

    engine.bank.use = count
    return counts


def test_prompts_that_begin_alike_are_answered_by_each_adapter_from_its_own_keys_and_values(
    engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    prompt, names = [9, 8, 7, 6] * 20, (BASE, "a1", "a2", "a1")
    asked = [  # the second time all find their own blocks
        request([*prompt, 40 + i], store.resolve(name), 4, top_logprobs=0) for i in range(2) for name in names
    ]
    alone = expected(asked)
    with engine_with() as engine:
        computed = _count_tokens(engine)
        for one, events in zip(asked, alone, strict=True):
            assert_same(submit(engine, one), events)
    whole = len(asked) * (len(prompt) + 4)
    assert sum(computed) == whole - 5 * (len(prompt) // 16 * 16)  # three of eight computed all of their prompt


def test_a_cache_too_small_for_all_makes_some_begin_again_and_changes_no_answer(
    engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    asked = [
        request([3 + i] * 20, store.resolve(NAMES[i]), 28, temperature=1.0, seed=i, top_logprobs=1) for i in range(3)
    ]
    alone = expected(asked)
    with engine_with(cache_tokens=96) as engine:
        assert engine.longest_tokens == 96
        computed = _count_tokens(engine)
        assert_answers(engine, asked, alone)
    assert sum(computed) > 3 * (20 + 28 - 1)  # some were computed twice


def test_requests_wait_for_a_slot_and_go_on_when_one_is_free(engine_with: Any, store: AdapterStore) -> None:
    with engine_with(slots=1) as engine:
        long = submit(engine, request([3], store.resolve("a0"), 200))
        long.wait_for_token()
        waits = submit(engine, request([3], store.resolve("a1"), 2))
        passes = submit(engine, request([3], store.resolve("a0"), 2))  # it has a slot, and still comes after the other
        leaves = request([4])
        left = submit(engine, leaves)
        assert engine.stats().waiting == 3
        engine.cancel(leaves.id)
        assert left.end() == EndEvent("cancelled")  # at once
        assert not left.events and not long.ends
        engine.cancel("no such request")
        engine.cancel(next(iter(engine.running)))
        assert long.end() == EndEvent("cancelled")
        assert waits.end() == passes.end() == LENGTH
        runs = submit(engine, request([3], max_tokens=200))
    assert runs.end() == EndEvent("cancelled")  # the engine was closed
    with pytest.raises(EngineDead):
        submit(engine, request([3]))


def test_a_full_queue_is_busy_and_what_does_not_fit_is_refused(engine_with: Any) -> None:
    with engine_with(max_running=1, max_waiting=1) as engine:
        assert engine.longest_tokens == 256
        for prompt, max_tokens, message in (
            ([3] * 250, 7, "are more than the 256 that fit"),
            ([], 1, "has no tokens"),
            ([3, 304], 1, "0 to 303"),
            ([-1], 1, "0 to 303"),
        ):
            with pytest.raises(InputError, match=message):
                submit(engine, request(prompt, max_tokens=max_tokens))
        engine._outputs = 100  # as if the embedding had tokens for images behind those that are written
        with pytest.raises(InputError, match="logit_bias: token ids of this model are 0 to 99"):
            submit(engine, request([150], logit_bias=((100, 1.0),)))
        first = submit(engine, request([3] * 180, max_tokens=76))
        wait_until(lambda: engine.stats().running)
        submit(engine, request([3], max_tokens=1))
        with pytest.raises(Busy):
            submit(engine, request([3]))
        assert first.end() == LENGTH
    with engine_with(max_running=2, max_waiting=0) as engine:  # a free place is no place in a queue
        assert [submit(engine, request([3], max_tokens=1)).end() for _ in range(2)] == [LENGTH] * 2


def test_loading_makes_an_adapter_resident_and_unloading_lets_those_that_run_finish(
    engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    asked = request([3, 9], store.resolve("a3"), 40)
    assert asked.adapter is not None
    [alone] = expected([asked])
    with engine_with() as engine:
        engine.load(asked.adapter)
        assert engine.stats().adapters_resident == 1
        answer = submit(engine, asked)
        answer.wait_for_token()
        engine.unload(asked.adapter.identity)
        assert_same(answer, alone)
        wait_until(lambda: engine.stats().adapters_resident == 0)


def test_an_adapter_that_goes_while_its_static_batch_runs_on_takes_no_other_answer_with_it(
    engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    short, long = request([3, 9], store.resolve("a3"), 1), request([5], max_tokens=100)
    assert short.adapter is not None
    [alone] = expected([long])
    with engine_with("static") as engine:
        first = submit(engine, request([4], max_tokens=60))  # the other two wait for its end, and begin together
        first.wait_for_token()
        answers = [submit(engine, short), submit(engine, long)]
        assert answers[0].end() == LENGTH
        engine.unload(short.adapter.identity)
        wait_until(lambda: engine.stats().adapters_resident == 0)
        assert_same(answers[1], alone)
        assert engine._batches._cache is None, "a server that waits keeps no keys and values"


# Faults


def _fail(engine: Any, times: int, error: BaseException | None = None) -> None:
    """Make so many of the next forward passes fail."""
    left = [error or RuntimeError("the card fell off\nwith details of no interest")] * times

    def fail(*_: object) -> None:
        if left:
            raise left.pop()

    engine.model.register_forward_pre_hook(fail)


def test_the_events_of_a_receiver_that_fails_end_its_own_request_only(engine_with: Any) -> None:
    def fail(_: object) -> None:
        raise OSError("the client went away")

    with engine_with() as engine:
        engine.submit(request([3], max_tokens=100), fail)
        assert submit(engine, request([3], max_tokens=20)).end() == LENGTH
        wait_until(lambda: engine.stats().finished == 2)


@kinds
def test_a_step_that_fails_ends_the_requests_that_run_and_an_engine_that_fails_at_every_step_is_dead(
    kind: str, engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    adapter = store.resolve("a1")
    asked = request([3, 4], adapter, 10)
    [alone] = expected([asked])
    with engine_with(kind, max_running=2) as engine:
        answers = [submit(engine, request([3, 4, 5 + i], adapter, 150)) for i in range(2)]
        answers[0].wait_for_token()
        waits = submit(engine, asked)
        _fail(engine, 1)
        assert [answer.end() for answer in answers] == [EndEvent("error", "RuntimeError: the card fell off.")] * 2
        assert_same(waits, alone)
        assert engine.stats().dead is None
        _fail(engine, 10)
        with pytest.raises(EngineDead, match="the card fell off"):
            for _ in range(9):
                assert submit(engine, request([3], max_tokens=50)).end().reason == "error"
        assert "the card fell off" in str(engine.stats().dead)


def test_even_an_error_that_python_does_not_expect_ends_every_request_and_is_told_to_who_loads(
    engine_with: Any, store: AdapterStore
) -> None:
    def leave(_: object) -> None:
        raise SystemExit(3)

    with engine_with(max_running=1) as engine:
        runs, waits = (submit(engine, request([3], max_tokens=200)) for _ in range(2))
        runs.wait_for_token()
        engine.bank.acquire = leave
        with pytest.raises(SystemExit):
            engine.load(store.resolve("a1"))
        assert runs.end().reason == waits.end().reason == "error"
        wait_until(lambda: engine.stats().dead)
        with pytest.raises(EngineDead):
            engine.load(store.resolve("a1"))


@kinds
def test_an_adapter_of_numbers_beyond_all_bounds_ends_its_own_requests_alone(
    kind: str, engine_with: Any, store: AdapterStore, adapters_dir: Path, tmp_path: Path, expected: Any
) -> None:
    """Its hidden states are not finite, and attention that only masks them would spoil the whole batch."""
    shutil.copytree(adapters_dir / "a2", tmp_path / "huge")
    vectors = load_file(tmp_path / "huge" / ADAPTER_WEIGHTS)
    save_file({key: vector * 1e30 for key, vector in vectors.items()}, tmp_path / "huge" / ADAPTER_WEIGHTS)
    asked = [request([5, 6 + i], store.resolve(f"a{i}"), 20, temperature=1.0, seed=i, top_logprobs=1) for i in range(3)]
    asked.append(request([7] * 150, store.resolve("a5"), 3))
    alone, huge = expected(asked), AdapterStore(tmp_path).resolve("huge")
    with engine_with(kind) as engine:
        answers = [submit(engine, one) for one in asked[:3]]
        answers[0].wait_for_token()
        answers.append(submit(engine, asked[3]))
        bad = [submit(engine, request([3] * 40, huge, 30)), submit(engine, request([3], huge, 30))]
        bad.append(submit(engine, replace(request([3] * 9, huge, 30), scoring=PromptScoring(4, draws=2))))
        assert [one.end() for one in bad] == [EndEvent("error", NOT_FINITE)] * 3
        for answer, events in zip(answers, alone, strict=True):
            assert_same(answer, events)
