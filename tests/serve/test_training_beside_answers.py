"""An engine trains adapters between the steps of answers, and neither changes the other."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.serve.background import Background
from qvera.serve.engine import Engine
from qvera.serve.requests import EndEvent, GenerationRequest
from qvera.training.online import OnlineTrainer
from qvera.training.roster import AdapterRun
from tests.helpers import wait_until
from tests.serve.helpers import (
    BASE,
    ENGINES,
    SECONDS,
    Answer,
    engine_of,
    request,
    store_of,
    submit,
    tiny_base,
)
from tests.training.online_jobs import Jobs, datasets_of, job_recipe, server_recipe, write_job_rows


class Training:
    """Background work: a trainer's jobs, which begin in the engine's thread and are not ended."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer = trainer
        self.queue: deque[AdapterRun] = deque()
        self.parts = 0

    def has_work(self) -> bool:
        return bool(self.queue) or self.trainer.has_work

    def run_slice(self) -> None:
        while self.queue:
            self.trainer.begin(self.queue.popleft())
        self.trainer.run_slice()
        self.parts += 1


def _asked(root: Path) -> list[GenerationRequest]:
    store = store_of(root)
    return [
        request([3 + i] * (5 + 7 * i), store.resolve(name), 12, top_logprobs=3)
        for i, name in enumerate((BASE, "a1", BASE, "a2", "a1"))
    ]


def _answers(engine: Engine, asked: list[GenerationRequest], before: Callable[[], object]) -> list[Any]:
    """One after the other, so that no answer depends on when another one came."""
    found = []
    for one in asked:
        before()
        answer = submit(engine, one)
        assert answer.end() == EndEvent("length")
        found.append(answer.events)
    return found


@pytest.mark.parametrize(("kind", "dtype", "rank"), [("continuous", "bfloat16", 24), ("static", "float32", 8)])
def test_answers_are_the_same_to_the_bit_and_so_is_what_is_trained(
    kind: str, dtype: str, rank: int, make_recipe: Any, tiny_model_dir: Path, adapters_dir: Path, tmp_path: Path
) -> None:
    """The base answers before anything is trained, and adapters are first loaded after the training has begun.

    These have rank 8; another one in training makes the pair that they share a larger one.
    """
    model = {"compute_dtype": dtype}
    sections: dict[str, Any] = {"adapter": {"rank": rank}, "model": model}
    recipe = server_recipe(make_recipe, **sections, training={"per_device_train_batch_size": 2})
    data = {"eval_fraction": 0.3}
    own = {
        name: job_recipe(
            make_recipe, write_job_rows(tmp_path / f"{name}.jsonl", 20, seed), data, eval_steps=3, max_steps=8
        )
        for seed, name in enumerate(("anna", "ben"))
    }
    own = {name: one.replace(adapter=recipe.adapter) for name, one in own.items()}
    alone = Jobs(recipe)
    expected = alone.finish([alone.begin(name, one) for name, one in own.items()])
    asked, again = _asked(adapters_dir), _asked(adapters_dir)
    with engine_of(tiny_model_dir, kind, model) as engine:
        without = _answers(engine, asked + again, lambda: None)

    base = tiny_base(tiny_model_dir, **model)
    trainer = OnlineTrainer(base, recipe, slots=2)
    runs = [trainer.prepare(name, one, datasets_of(one)) for name, one in own.items()]
    work = Training(trainer)
    with engine_of(tiny_model_dir, kind, base=base, training_share=0.5) as engine:
        first = _answers(engine, asked[:1], lambda: None)
        work.queue.extend(runs)
        engine.set_background(work)

        def another_part() -> None:
            parts = work.parts
            wait_until(lambda: work.parts > parts)

        rest = _answers(engine, asked[1:], another_part)
        assert trainer.has_work
        wait_until(lambda: not work.has_work())
        assert engine.stats().background_parts == work.parts > 0
        assert engine.stats().background_seconds > 0
        last = _answers(engine, again, lambda: None)
    assert [*first, *rest, *last] == without
    for run in runs:
        assert run.reason is None
        assert torch.equal(trainer.loop.bank.vectors[run.held_slot], expected[run.name])


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Parts:
    """Background work that does nothing, for as long as it may."""

    def __init__(self, do: Callable[[], object] = lambda: None) -> None:
        self.do, self.asked, self.parts, self.has = do, 0, 0, True

    def has_work(self) -> bool:
        self.asked += 1
        return self.has

    def run_slice(self) -> None:
        self.parts += 1
        self.do()


@pytest.mark.parametrize(
    ("kind", "share"),
    [("continuous", 0.0), ("continuous", 0.1), ("continuous", 0.5), ("static", 0.5), ("continuous", 1.0)],
)
def test_work_takes_its_share_of_the_time_beside_answers_and_all_of_it_without_them(
    kind: str, share: float, tiny_model_dir: Path
) -> None:
    """A step and a part take a second each."""
    clock, beside, steps = Clock(), 0, 0
    with engine_of(tiny_model_dir, kind, training_share=share, max_running=1) as engine:
        engine.background.clock = clock
        step = engine.step

        def counted() -> Any:
            nonlocal steps
            clock.now += 1
            steps += 1
            return step()

        def part() -> None:
            nonlocal beside
            clock.now += 1
            beside += bool(engine.running)

        engine.step = counted  # type: ignore[method-assign]
        work = Parts(part)
        engine.set_background(work)
        wait_until(lambda: work.parts > 20)
        answers = [submit(engine, request([3], max_tokens=60)) for _ in range(2)]
        assert [answer.end() for answer in answers] == [EndEvent("length")] * 2
        clock.now += 1
        engine.wake()
        parts = work.parts
        wait_until(lambda: work.parts > parts + 20)
    # what began while nobody asked may be under way when the first request comes, and when the second one begins
    if share < 1:
        assert abs(beside - share * (steps + beside)) <= 3
    else:
        assert abs(beside - steps) <= 3


def test_a_pause_follows_the_length_of_the_part_before_it() -> None:
    clock = Clock()
    background = Background(0.25, clock)

    def take(seconds: float) -> None:
        clock.now += seconds

    lengths = iter([2.0, 5.0])
    background.set(Parts(lambda: take(next(lengths))))
    for length, pause in ((2.0, 6.0), (5.0, 15.0)):
        assert background.has_part(answering=True)
        assert background.run_slice()
        assert background.has_part(answering=False)
        clock.now += pause - 0.01
        assert not background.has_part(answering=True)
        clock.now += 0.02
        assert length
    assert background.has_part(answering=True)
    assert (background.seconds, background.parts) == (7.0, 2)


def test_a_client_that_asks_again_and_again_waits_for_few_parts() -> None:
    """The moments between its requests are no time without answers; a second without any is."""
    clock = Clock()
    background = Background(0.1, clock)
    background.set(Parts(lambda: setattr(clock, "now", clock.now + 5)))
    assert background.run_slice()
    waited = 0
    for _ in range(440):  # steps of a tenth of a second, and as long between two requests
        clock.now += 0.1
        background.answered()
        clock.now += 0.1
        if background.has_part(answering=False):
            background.run_slice()
            waited += 1
    assert waited == 1  # 45 s after the first one, and the next one would be after 95 s
    assert background.seconds_to_wait(answering=False) == pytest.approx(0.9)
    clock.now += 1
    assert background.has_part(answering=False)


@pytest.mark.parametrize("tick", [0.4, 0.21])
def test_a_part_whose_time_comes_while_the_engine_looks_is_done(tick: float, tiny_model_dir: Path) -> None:
    """Each look at the clock takes a while: with these ticks the second without answers ends between two of them."""
    clock = Clock()

    def read() -> float:
        clock.now += tick
        return clock.now

    with engine_of(tiny_model_dir, training_share=0.0) as engine:
        engine.background.clock = read
        work = Parts()
        engine.set_background(work)
        wait_until(lambda: work.parts)
        assert submit(engine, request([3], max_tokens=3)).end() == EndEvent("length")
        parts = work.parts
        wait_until(lambda: work.parts > parts + 3, 20)


def test_an_idle_engine_sleeps_until_it_is_woken(tiny_model_dir: Path) -> None:
    with engine_of(tiny_model_dir) as engine:
        work = Parts()
        work.has = False
        engine.set_background(work)
        wait_until(lambda: work.asked)
        time.sleep(0.2)
        asked = work.asked
        time.sleep(0.3)
        assert work.asked == asked
        work.has = True
        engine.wake()
        wait_until(lambda: work.parts > 10)
        work.has = False
        engine.set_background(None)
        assert submit(engine, request([3], max_tokens=3)).end() == EndEvent("length")


def test_an_error_parks_the_work_until_it_is_woken_and_answers_go_on(tiny_model_dir: Path) -> None:
    with engine_of(tiny_model_dir) as engine:
        work = Parts(lambda: 1 / 0)
        engine.set_background(work)
        wait_until(lambda: engine.stats().background_failure)
        assert engine.stats().background_failure == "ZeroDivisionError: division by zero."
        assert submit(engine, request([3], max_tokens=20)).end() == EndEvent("length")
        assert work.parts == 1
        assert engine.stats().dead is None
        work.do = lambda: None
        engine.wake()
        wait_until(lambda: work.parts > 10)
        assert engine.stats().background_failure is None


@pytest.mark.parametrize("kind", ENGINES)
def test_requests_tasks_and_the_end_wait_for_one_part_at_most(
    kind: str, tiny_model_dir: Path, adapters_dir: Path
) -> None:
    """Parts begin and end when the test says so."""
    store, may_end, began = store_of(adapters_dir), threading.Semaphore(0), threading.Semaphore(0)

    def part() -> None:
        began.release()
        assert may_end.acquire(timeout=SECONDS)

    with engine_of(tiny_model_dir, kind, training_share=0.0) as engine:
        engine.set_background(Parts(part))
        assert began.acquire(timeout=SECONDS)
        answer = submit(engine, request([3], store.resolve("a1"), 5))
        assert not answer.events
        may_end.release()  # with no share of its own, no other part begins before the answer has ended
        assert answer.end() == EndEvent("length")
        assert began.acquire(timeout=SECONDS)
        waits: Answer = submit(engine, request([3], max_tokens=5))
        closing = threading.Thread(target=engine.close)
        closing.start()
        wait_until(lambda: engine._closing)
        may_end.release()
        closing.join(SECONDS)
        assert not closing.is_alive()
        assert waits.end() == EndEvent("cancelled")
        assert not began.acquire(blocking=False)
