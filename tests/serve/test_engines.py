"""A request gets from a busy engine what it gets alone, whatever shares its batch."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.serve.requests import Busy, EndEvent, EngineDead, GenerationRequest
from qvera.serve.store import AdapterStore
from qvera.utils.errors import InputError
from tests.helpers import wait_until
from tests.serve.helpers import (
    BASE,
    ENGINES,
    assert_same,
    engine_of,
    expected_of,
    request,
    store_of,
    submit,
)

NAMES = [f"a{i}" for i in range(10)]


def _mixed(store: AdapterStore, count: int) -> list[GenerationRequest]:
    """Base and adapters, greedy and sampled, short and long, with and without log-probabilities."""
    chooser = random.Random(1)
    asked = []
    for i in range(count):
        prompt = [chooser.randrange(3, 300) for _ in range(chooser.choice([1, 5, 17, 40, 90]))]
        sampling: dict[str, Any] = {"top_logprobs": chooser.choice([None, 0, 3])}
        if i % 2:
            sampling |= {"temperature": 1.0, "seed": i, "top_p": chooser.choice([1.0, 0.9])}
        name = chooser.choice([BASE, *NAMES])
        asked.append(request(prompt, store.resolve(name), chooser.choice([1, 6, 25]), **sampling))
    return asked


@pytest.mark.parametrize("kind", ENGINES)
def test_every_answer_of_a_mixed_batch_is_that_of_the_request_alone(
    kind: str, tiny_model_dir: Path, adapters_dir: Path, alone: Any
) -> None:
    """They come one after the other while others run, and some are cancelled."""
    asked = _mixed(store_of(adapters_dir), 40)
    expected = expected_of(alone, adapters_dir, asked)
    cancelled = {7, 18, 30}
    with engine_of(tiny_model_dir, kind, max_running=9, step_tokens=48) as engine:
        answers = []
        for i, one in enumerate(asked):
            answers.append(submit(engine, one))
            if i % 5 == 4:
                answers[i - 4].wait_for_token()
            if i in cancelled:
                engine.cancel(one.id)
        for i, answer in enumerate(answers):
            if i in cancelled:
                assert answer.end() == EndEvent("cancelled")
                assert answer.tokens == [event.token for event in expected[i]][: len(answer.tokens)]
            else:
                assert answer.end() == EndEvent("length")
                assert_same(answer, expected[i])
        stats = engine.stats()
    assert stats.finished == 40
    assert stats.running == stats.waiting == 0
    assert stats.generated_tokens == sum(len(answer.events) for answer in answers)


@pytest.mark.parametrize("kind", ENGINES)
def test_many_clients_that_ask_and_go_away_at_any_time_each_get_one_end(
    kind: str, tiny_model_dir: Path, adapters_dir: Path
) -> None:
    store = store_of(adapters_dir)
    with engine_of(tiny_model_dir, kind, slots=3, max_running=5, cache_tokens=256) as engine:

        def client(number: int) -> list[str]:
            chooser, ends = random.Random(number), list[str]()
            for _ in range(15):
                asked = request(
                    [3] * chooser.choice([1, 30]), store.resolve(chooser.choice(NAMES)), chooser.choice([1, 30])
                )
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
    assert (stats.finished, stats.running, stats.waiting, stats.dead) == (90, 0, 0, None)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(
    kind: str, tiny_model_dir: Path, adapters_dir: Path, alone: Any
) -> None:
    store = store_of(adapters_dir)
    whole = alone(adapters_dir / "a1").answer(request([5, 6, 7], max_tokens=12))
    stop = whole[4].token
    first = [event.token for event in whole].index(stop)
    with engine_of(tiny_model_dir, kind) as engine:
        answer = submit(engine, request([5, 6, 7], store.resolve("a1"), 12, stop_tokens=frozenset({stop, 1})))
        assert answer.tokens == [event.token for event in whole[:first]]
        assert answer.end() == EndEvent("stop")


def test_prompts_that_begin_alike_are_answered_by_each_adapter_from_its_own_keys_and_values(
    tiny_model_dir: Path, adapters_dir: Path, alone: Any
) -> None:
    store, prompt = store_of(adapters_dir), [9, 8, 7, 6] * 20
    asked = [
        request([*prompt, 40 + i], store.resolve(name), 6, top_logprobs=0)
        for i in range(2)  # the second time all find their own pages
        for name in (BASE, "a1", "a2", "a1")
    ]
    expected = expected_of(alone, adapters_dir, asked)
    with engine_of(tiny_model_dir) as engine:
        computed = _count_tokens(engine)
        for one, events in zip(asked, expected, strict=True):
            assert_same(submit(engine, one), events)
        shared = sum(computed)
    with engine_of(tiny_model_dir, share_prefixes=False) as engine:
        computed = _count_tokens(engine)
        for name in (BASE, "a1", "a2", "a1") * 2:
            submit(engine, request([*prompt, 40], store.resolve(name), 6)).end()
    pages = len(prompt) // 16 * 16
    assert shared == sum(computed) - 5 * pages  # three of eight computed all of their prompt


def _count_tokens(engine: Any) -> list[int]:
    """The tokens of each step from now on."""
    counts: list[int] = []
    use = engine.bank.use

    def count(users: Any) -> None:
        counts.append(sum(tokens for _, _, tokens in users))
        use(users)

    engine.bank.use = count
    return counts


@pytest.mark.parametrize("kind", ENGINES)
def test_four_slots_serve_ten_adapters_and_none_that_answers_is_evicted(
    kind: str, tiny_model_dir: Path, adapters_dir: Path, alone: Any
) -> None:
    store = store_of(adapters_dir)
    asked = [request([3, 4 + i], store.resolve(NAMES[i % 10]), 5 + i % 7) for i in range(30)]
    expected = expected_of(alone, adapters_dir, asked)
    with engine_of(tiny_model_dir, kind, slots=4, max_running=8) as engine:
        answers = [submit(engine, one) for one in asked]
        for answer, events in zip(answers, expected, strict=True):
            assert_same(answer, events)
        assert engine.stats().adapters_resident == 4


def test_requests_wait_for_a_slot_and_go_on_when_one_is_free(tiny_model_dir: Path, adapters_dir: Path) -> None:
    store = store_of(adapters_dir)
    with engine_of(tiny_model_dir, slots=1) as engine:
        long = submit(engine, request([3], store.resolve("a0"), 200))
        long.wait_for_token()
        waits = submit(engine, request([3], store.resolve("a1"), 2))
        passes = submit(engine, request([3], store.resolve("a0"), 2))  # it has a slot, and still comes after the other
        assert engine.stats().waiting == 2
        engine.cancel(next(iter(engine.running)))
        assert long.end() == EndEvent("cancelled")
        assert waits.end() == passes.end() == EndEvent("length")


def test_a_request_that_waits_is_cancelled_at_once(tiny_model_dir: Path) -> None:
    with engine_of(tiny_model_dir, max_running=1) as engine:
        runs = submit(engine, request([3], max_tokens=200))
        asked = request([4])
        waits = submit(engine, asked)
        engine.cancel(asked.id)
        assert waits.end() == EndEvent("cancelled")
        assert not waits.events
        assert not runs.ends
        engine.cancel("no such request")
    assert runs.end() == EndEvent("cancelled")  # the engine was closed


def test_a_full_queue_is_busy_and_what_does_not_fit_is_refused(tiny_model_dir: Path) -> None:
    with engine_of(tiny_model_dir, max_running=1, max_waiting=1) as engine:
        longest = engine.longest_tokens
        assert longest == 256
        for prompt, max_tokens, message in (
            ([3] * 250, 7, "are more than the 256 that fit"),
            ([], 1, "has no tokens"),
            ([3, 304], 1, "0 to 303"),
            ([-1], 1, "0 to 303"),
        ):
            with pytest.raises(InputError, match=message):
                submit(engine, request(prompt, max_tokens=max_tokens))
        first = submit(engine, request([3] * 6, max_tokens=250))
        wait_until(lambda: engine.stats().running)
        submit(engine, request([3], max_tokens=1))
        with pytest.raises(Busy):
            submit(engine, request([3]))
        assert first.end() == EndEvent("length")
    with engine_of(tiny_model_dir, max_running=2, max_waiting=0) as engine:  # a free place is no place in a queue
        assert [submit(engine, request([3], max_tokens=1)).end() for _ in range(2)] == [EndEvent("length")] * 2
    with pytest.raises(EngineDead):
        submit(engine, request([3]))


def test_a_cache_too_small_for_all_makes_some_begin_again_and_changes_no_answer(
    tiny_model_dir: Path, adapters_dir: Path, alone: Any
) -> None:
    store = store_of(adapters_dir)
    asked = [
        request([3 + i] * 20, store.resolve(NAMES[i]), 60, temperature=1.0, seed=i, top_logprobs=1) for i in range(6)
    ]
    expected = expected_of(alone, adapters_dir, asked)
    with engine_of(tiny_model_dir, cache_tokens=192) as engine:
        assert engine.longest_tokens == 192
        computed = _count_tokens(engine)
        answers = [submit(engine, one) for one in asked]
        for answer, events in zip(answers, expected, strict=True):
            assert_same(answer, events)
    assert sum(computed) > 6 * (20 + 60 - 1)  # some were computed twice


def test_the_events_of_a_receiver_that_fails_end_its_own_request_only(tiny_model_dir: Path) -> None:
    def fail(_: object) -> None:
        raise OSError("the client went away")

    with engine_of(tiny_model_dir) as engine:
        engine.submit(request([3], max_tokens=100), fail)
        assert submit(engine, request([3], max_tokens=20)).end() == EndEvent("length")
        wait_until(lambda: engine.stats().finished == 2)


def test_loading_makes_an_adapter_resident_and_unloading_lets_those_that_run_finish(
    tiny_model_dir: Path, adapters_dir: Path, alone: Any
) -> None:
    adapter = store_of(adapters_dir).resolve("a3")
    assert adapter is not None
    asked = request([3, 9], adapter, 100)
    [expected] = expected_of(alone, adapters_dir, [asked])
    with engine_of(tiny_model_dir) as engine:
        engine.load(adapter)
        assert engine.stats().adapters_resident == 1
        answer = submit(engine, asked)
        answer.wait_for_token()
        engine.unload(adapter.identity)
        assert_same(answer, expected)
        wait_until(lambda: engine.stats().adapters_resident == 0)


def test_a_step_runs_the_same_operations_whatever_the_number_of_adapters_in_it(
    tiny_model_dir: Path, adapters_dir: Path
) -> None:
    store = store_of(adapters_dir)
    counts = {}
    with engine_of(tiny_model_dir, max_running=8, share_prefixes=False) as engine:
        for adapters in (2, 8):
            operations: list[int] = []
            forward = engine.model.forward

            def counted(*args: Any, forward: Any = forward, into: list[int] = operations, **kwargs: Any) -> Any:
                with _Operations() as mode:
                    result = forward(*args, **kwargs)
                if kwargs["input_ids"].shape[1] == 8:  # one token of each answer
                    into.append(mode.count)
                return result

            engine.model.forward = counted  # type: ignore[method-assign]
            answers = [submit(engine, request([3, 4], store.resolve(NAMES[i % adapters]), 20)) for i in range(8)]
            assert {answer.end().reason for answer in answers} == {"length"}
            engine.model.forward = forward  # type: ignore[method-assign]
            counts[adapters] = set(operations)
    assert counts[2] == counts[8]
    assert len(counts[2]) == 1


class _Operations(TorchDispatchMode):
    """Counts what torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
