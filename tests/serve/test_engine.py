"""A request gets from a busy engine what it gets alone; faults end the requests that they concern, and never hang."""

from __future__ import annotations

import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.serve.engine import NOT_FINITE
from qvera.serve.requests import Busy, EndEvent, EngineDead
from qvera.serve.store import AdapterStore
from qvera.utils.errors import InputError
from qvera.utils.paths import ADAPTER_WEIGHTS
from tests.helpers import wait_until
from tests.serve.conftest import NAMES
from tests.serve.helpers import BASE, ENGINES, assert_same, request, submit

kinds = pytest.mark.parametrize("kind", ENGINES)


@kinds
def test_every_answer_of_a_mixed_batch_is_that_of_the_request_alone(
    kind: str, engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    """They come one after the other while others run, and some are cancelled."""
    chooser, asked = random.Random(1), []
    for i in range(24):  # base and adapters, greedy and sampled, short and long, with and without log-probabilities
        prompt = [chooser.randrange(3, 300) for _ in range(chooser.choice([1, 5, 17, 40, 90]))]
        sampling: dict[str, Any] = {"top_logprobs": chooser.choice([None, 0, 3])}
        if i % 2:
            sampling |= {"temperature": 1.0, "seed": i, "top_p": chooser.choice([1.0, 0.9])}
        name = chooser.choice([BASE, *NAMES])
        asked.append(request(prompt, store.resolve(name), chooser.choice([1, 4, 15]), **sampling))
    alone, cancelled = expected(asked), {7, 18}
    with engine_with(kind, max_running=7, step_tokens=48) as engine:
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
                assert answer.tokens == [event.token for event in alone[i]][: len(answer.tokens)]
            else:
                assert answer.end() == EndEvent("length")
                assert_same(answer, alone[i])
        stats = engine.stats()
    assert (stats.finished, stats.running, stats.waiting) == (24, 0, 0)
    assert stats.generated_tokens == sum(len(answer.events) for answer in answers)


@kinds
def test_many_clients_that_ask_and_go_away_at_any_time_each_get_one_end(
    kind: str, engine_with: Any, store: AdapterStore
) -> None:
    with engine_with(kind, slots=3, max_running=5, cache_tokens=256) as engine:

        def client(number: int) -> list[str]:
            chooser, ends = random.Random(number), list[str]()
            for _ in range(8):
                asked = request(
                    [3] * chooser.choice([1, 30]), store.resolve(chooser.choice(NAMES)), chooser.choice([1, 20])
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
    assert (stats.finished, stats.running, stats.waiting, stats.dead) == (48, 0, 0, None)


@kinds
def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(
    kind: str, engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    [whole] = expected([request([5, 6, 7], store.resolve("a1"), 8)])
    stop = whole[4].token
    first = [event.token for event in whole].index(stop)
    with engine_with(kind) as engine:
        answer = submit(engine, request([5, 6, 7], store.resolve("a1"), 8, stop_tokens=frozenset({stop, 1})))
        assert answer.tokens == [event.token for event in whole[:first]]
        assert answer.end() == EndEvent("stop")


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
    with engine_with(share_prefixes=False) as engine:
        unshared = _count_tokens(engine)
        for name in names * 2:
            submit(engine, request([*prompt, 40], store.resolve(name), 4)).end()
    blocks = len(prompt) // 16 * 16
    assert sum(computed) == sum(unshared) - 5 * blocks  # three of eight computed all of their prompt


def _count_tokens(engine: Any) -> list[int]:
    """The tokens of each step from now on."""
    counts: list[int] = []
    use = engine.bank.use

    def count(users: Any) -> None:
        counts.append(sum(tokens for _, _, tokens in users))
        use(users)

    engine.bank.use = count
    return counts


@kinds
def test_four_slots_serve_ten_adapters_and_none_that_answers_is_evicted(
    kind: str, engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    asked = [request([3, 4 + i], store.resolve(NAMES[i % 10]), 3 + i % 5) for i in range(16)]
    alone = expected(asked)
    with engine_with(kind, slots=4, max_running=8) as engine:
        for answer, events in zip([submit(engine, one) for one in asked], alone, strict=True):
            assert_same(answer, events)
        assert engine.stats().adapters_resident == 4


def test_requests_wait_for_a_slot_and_go_on_when_one_is_free(engine_with: Any, store: AdapterStore) -> None:
    with engine_with(slots=1) as engine:
        long = submit(engine, request([3], store.resolve("a0"), 200))
        long.wait_for_token()
        waits = submit(engine, request([3], store.resolve("a1"), 2))
        passes = submit(engine, request([3], store.resolve("a0"), 2))  # it has a slot, and still comes after the other
        assert engine.stats().waiting == 2
        engine.cancel(next(iter(engine.running)))
        assert long.end() == EndEvent("cancelled")
        assert waits.end() == passes.end() == EndEvent("length")


def test_a_request_that_waits_is_cancelled_at_once(engine_with: Any) -> None:
    with engine_with(max_running=1) as engine:
        runs = submit(engine, request([3], max_tokens=200))
        asked = request([4])
        waits = submit(engine, asked)
        engine.cancel(asked.id)
        assert waits.end() == EndEvent("cancelled")
        assert not waits.events
        assert not runs.ends
        engine.cancel("no such request")
    assert runs.end() == EndEvent("cancelled")  # the engine was closed


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
        first = submit(engine, request([3] * 180, max_tokens=76))
        wait_until(lambda: engine.stats().running)
        submit(engine, request([3], max_tokens=1))
        with pytest.raises(Busy):
            submit(engine, request([3]))
        assert first.end() == EndEvent("length")
    with engine_with(max_running=2, max_waiting=0) as engine:  # a free place is no place in a queue
        assert [submit(engine, request([3], max_tokens=1)).end() for _ in range(2)] == [EndEvent("length")] * 2
    with pytest.raises(EngineDead):
        submit(engine, request([3]))


def test_a_cache_too_small_for_all_makes_some_begin_again_and_changes_no_answer(
    engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    asked = [
        request([3 + i] * 20, store.resolve(NAMES[i]), 28, temperature=1.0, seed=i, top_logprobs=1) for i in range(5)
    ]
    alone = expected(asked)
    with engine_with(cache_tokens=96) as engine:
        assert engine.longest_tokens == 96
        computed = _count_tokens(engine)
        for answer, events in zip([submit(engine, one) for one in asked], alone, strict=True):
            assert_same(answer, events)
    assert sum(computed) > 5 * (20 + 28 - 1)  # some were computed twice


def test_loading_makes_an_adapter_resident_and_unloading_lets_those_that_run_finish(
    engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    adapter = store.resolve("a3")
    assert adapter is not None
    asked = request([3, 9], adapter, 40)
    [alone] = expected([asked])
    with engine_with() as engine:
        engine.load(adapter)
        assert engine.stats().adapters_resident == 1
        answer = submit(engine, asked)
        answer.wait_for_token()
        engine.unload(adapter.identity)
        assert_same(answer, alone)
        wait_until(lambda: engine.stats().adapters_resident == 0)


def test_a_step_runs_the_same_operations_whatever_the_number_of_adapters_in_it(
    engine_with: Any, store: AdapterStore
) -> None:
    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = {}
    with engine_with(max_running=8, step_tokens=512, share_prefixes=False) as engine:
        forward = engine.model.forward
        for adapters in (2, 8):
            operations: list[int] = []

            def counted(*args: Any, into: list[int] = operations, **kwargs: Any) -> Any:
                with Operations() as mode:
                    result = forward(*args, **kwargs)
                if kwargs["input_ids"].shape[1] == 8:  # one token of each answer, and no prompt
                    into.append(mode.count)
                return result

            engine.model.forward = counted
            answers = [submit(engine, request([3] * 10, store.resolve(NAMES[i % adapters]), 20)) for i in range(8)]
            assert {answer.end().reason for answer in answers} == {"length"}
            counts[adapters] = set(operations)
    assert counts[2] == counts[8]
    assert len(counts[2]) == 1


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
        assert submit(engine, request([3], max_tokens=20)).end() == EndEvent("length")
        wait_until(lambda: engine.stats().finished == 2)


@kinds
def test_a_step_that_fails_ends_the_requests_that_run_and_the_engine_goes_on(
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
        for answer in answers:
            assert answer.end() == EndEvent("error", "RuntimeError: the card fell off.")
        assert_same(waits, alone)
        assert engine.stats().dead is None


@kinds
def test_an_engine_that_fails_at_every_step_says_that_it_is_dead(kind: str, engine_with: Any) -> None:
    with engine_with(kind, max_running=1) as engine:
        _fail(engine, 10)
        answers = []
        for _ in range(6):
            try:
                answers.append(submit(engine, request([3], max_tokens=50)))
            except EngineDead:
                break
        assert {answer.end().reason for answer in answers} == {"error"}
        wait_until(lambda: engine.stats().dead)
        assert "the card fell off" in str(engine.stats().dead)
        with pytest.raises(EngineDead, match="the card fell off"):
            submit(engine, request([3]))


def test_even_an_error_that_python_does_not_expect_ends_every_request(engine_with: Any) -> None:
    with engine_with(max_running=1) as engine:
        runs = submit(engine, request([3], max_tokens=200))
        waits = submit(engine, request([3], max_tokens=200))
        runs.wait_for_token()
        _fail(engine, 1, SystemExit(3))
        assert runs.end().reason == waits.end().reason == "error"
        wait_until(lambda: engine.stats().dead)


def test_who_loads_an_adapter_into_an_engine_that_ends_is_told(engine_with: Any, store: AdapterStore) -> None:
    adapter = store.resolve("a1")
    with engine_with() as engine:

        def leave(_: object) -> None:
            raise SystemExit(3)

        engine.bank.acquire = leave
        with pytest.raises(SystemExit):
            engine.load(adapter)
        wait_until(lambda: engine.stats().dead)
        with pytest.raises(EngineDead):
            engine.load(adapter)


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
        assert [one.end() for one in bad] == [EndEvent("error", NOT_FINITE)] * 2
        for answer, events in zip(answers, alone, strict=True):
            assert_same(answer, events)
