"""An engine trains adapters between the steps of answers, and neither changes the other."""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.models.loader import Base
from qvera.serve.background import Background
from qvera.serve.engine import Engine
from qvera.serve.requests import EndEvent, GenerationRequest
from qvera.training.online import OnlineTrainer
from qvera.training.roster import AdapterRun
from qvera.training.tenants import ModelShape, Tenants, TenantSettings
from tests.helpers import wait_until
from tests.serve.helpers import BASE, ENGINES, SECONDS, engine_of, request, store_of, submit, tiny_base
from tests.training.online_jobs import Jobs, datasets_of, job_recipe, server_recipe, write_job_rows
from tests.training.tenant_calls import STEP, some_rows

LENGTH = EndEvent("length")


class Slices:
    """Background work, for as long as it has any."""

    def __init__(self, do: Callable[[], object] = lambda: None, has: Callable[[], object] = lambda: True) -> None:
        self.do, self.has, self.asked, self.slices = do, has, 0, 0

    def has_work(self) -> bool:
        self.asked += 1
        return bool(self.has())

    def run_slice(self) -> None:
        self.do()
        self.slices += 1

    def wait_for_more(self, count: int = 10) -> None:
        slices = self.slices
        wait_until(lambda: self.slices > slices + count)


def _answers(engine: Engine, asked: list[GenerationRequest], before: Callable[[], object] = lambda: None) -> list[Any]:
    """One after the other, so that no answer depends on when another one came."""
    found = []
    for one in asked:
        before()
        answer = submit(engine, one)
        assert answer.end() == LENGTH
        found.append(answer.events)
    return found


@pytest.mark.parametrize(("kind", "dtype", "rank"), [("continuous", "bfloat16", 24), ("static", "float32", 8)])
def test_answers_are_the_same_to_the_bit_and_so_is_what_is_trained(
    kind: str, dtype: str, rank: int, make_recipe: Any, tiny_model_dir: Path, adapters_dir: Path, tmp_path: Path
) -> None:
    """The base answers before anything is trained, and adapters are first loaded after the training has begun.

    These have rank 8; another one in training makes the pair that they share a larger one.
    """
    model, training = {"compute_dtype": dtype}, {"per_device_train_batch_size": 2}
    recipe = server_recipe(make_recipe, adapter={"rank": rank}, model=model, training=training)
    own = {}
    for seed, name in enumerate(("anna", "ben")):
        rows = write_job_rows(tmp_path / f"{name}.jsonl", 10, seed)
        job = job_recipe(make_recipe, rows, {"eval_fraction": 0.3}, eval_steps=3, max_steps=5)
        own[name] = job.replace(adapter=recipe.adapter)
    alone = Jobs(recipe)
    expected = alone.finish([alone.begin(name, one) for name, one in own.items()])
    store = store_of(adapters_dir)

    def questions() -> list[GenerationRequest]:
        return [
            request([3 + i] * (5 + 7 * i), store.resolve(name), 6, top_logprobs=3)
            for i, name in enumerate((BASE, "a1", "a2"))
        ]

    asked, again = questions(), questions()
    with engine_of(tiny_model_dir, kind, model) as engine:
        without = _answers(engine, asked + again)

    base = tiny_base(tiny_model_dir, **model)
    trainer = OnlineTrainer(base, recipe, slots=2)
    runs = [trainer.prepare(name, one, datasets_of(one)) for name, one in own.items()]
    queue: deque[AdapterRun] = deque()

    def do_slice() -> None:
        while queue:  # jobs begin in the engine's thread
            trainer.begin(queue.popleft())
        trainer.run_slice()

    work = Slices(do_slice, lambda: queue or trainer.has_work)
    with engine_of(tiny_model_dir, kind, base=base, training_share=0.5) as engine:
        first = _answers(engine, asked[:1])
        queue.extend(runs)
        engine.set_background(work)
        rest = _answers(engine, asked[1:], lambda: work.wait_for_more(0))
        assert trainer.has_work
        wait_until(lambda: not work.has_work())
        assert engine.background.slices == work.slices > 0
        assert engine.stats().background_seconds > 0
        last = _answers(engine, again)
    assert [*first, *rest, *last] == without
    for run in runs:
        assert run.reason is None
        assert torch.equal(trainer.loop.bank.vectors[run.held_slot], expected[run.name])


def test_jobs_and_tenants_train_on_one_base_that_answers_as_without_them(
    make_recipe: Any, tiny_model_dir: Path, adapters_dir: Path, tmp_path: Path
) -> None:
    """Tenants of two shapes and a job take turns, and each becomes to the bit what it becomes without the others."""
    recipe = server_recipe(make_recipe, training={"per_device_train_batch_size": 2})
    own = job_recipe(make_recipe, write_job_rows(tmp_path / "anna.jsonl", 10, 1), max_steps=3)
    alone = Jobs(recipe)
    expected = alone.finish([alone.begin("anna", own)])["anna"]
    store, shapes = store_of(adapters_dir), {"a": ModelShape("lora", 4), "b": ModelShape("vera", 16, "attention")}
    asked = [request([3 + i] * (5 + 7 * i), store.resolve(name), 6) for i, name in enumerate((BASE, "a1", "a2") * 3)]
    with engine_of(tiny_model_dir) as engine:
        without = _answers(engine, asked)

    def begin(base: Base, name: str) -> tuple[Tenants, dict[str, Any]]:
        tenants, found = Tenants(base, TenantSettings(tmp_path / name), lambda: None), dict[str, Any]()
        for model_id, shape in shapes.items():
            tenants.create(model_id, "anna", shape, 0, lambda _: None)
            for step in range(3):
                rows = some_rows(4, step)
                tenants.forward_backward(model_id, rows, "cross_entropy", {}, False, lambda _: None)
                tenants.optim_step(model_id, STEP, lambda _: None)
            keep = functools.partial(found.__setitem__, model_id)
            tenants.forward_backward(model_id, some_rows(4, 5), "cross_entropy", {}, True, keep)
        return tenants, found

    quiet, losses = begin(tiny_base(tiny_model_dir), "quiet")
    while quiet.has_work():
        quiet.run_slice()
    base = tiny_base(tiny_model_dir)
    trainer = OnlineTrainer(base, recipe, slots=1)
    run = trainer.prepare("anna", own, datasets_of(own))
    tenants, beside = begin(base, "beside")

    def do_slice() -> None:
        if run.slot is None:
            trainer.begin(run)
        trainer.run_slice()
        tenants.run_slice()

    work = Slices(do_slice, lambda: trainer.has_work or tenants.has_work())
    with engine_of(tiny_model_dir, base=base, training_share=0.5) as engine:
        first = _answers(engine, asked[:1])
        engine.set_background(work)
        rest = _answers(engine, asked[1:4], lambda: work.wait_for_more(0))
        wait_until(lambda: not work.has_work())
        last = _answers(engine, asked[4:])
    assert [*first, *rest, *last] == without
    assert torch.equal(trainer.loop.bank.vectors[run.held_slot], expected)
    assert [beside[key].loss for key in shapes] == [losses[key].loss for key in shapes]


class Clock:
    """Seconds that pass only where a test says so, and ``tick`` with each look at it."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def take(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("kind", "share"), [("continuous", 0.25), ("static", 1.0)])
def test_work_takes_its_share_of_the_time_beside_answers_and_all_of_it_without_them(
    kind: str, share: float, tiny_model_dir: Path
) -> None:
    """A step and a slice take a second each."""
    clock, beside, steps = Clock(), 0, 0
    with engine_of(tiny_model_dir, kind, training_share=share, max_running=1) as engine:
        engine.background.clock = clock
        step = engine.step

        def counted() -> Any:
            nonlocal steps
            clock.take(1)
            steps += 1
            return step()

        def do_slice() -> None:
            nonlocal beside
            clock.take(1)
            beside += bool(engine.running)

        engine.step = counted  # type: ignore[method-assign]
        work = Slices(do_slice)
        engine.set_background(work)
        work.wait_for_more()
        answers = [submit(engine, request([3], max_tokens=40)) for _ in range(2)]
        assert [answer.end() for answer in answers] == [LENGTH] * 2
        clock.take(1)
        engine.wake()
        work.wait_for_more()
    # what began while nobody asked may be under way when the first request comes, and when the second one begins
    assert abs(beside - (share * (steps + beside) if share < 1 else steps)) <= 3


def test_a_client_that_asks_again_and_again_waits_for_few_parts() -> None:
    """The moments between its requests are no time without answers; a second without any is."""
    clock = Clock()
    background = Background(0.1, clock)
    background.set(Slices(lambda: clock.take(5)))
    assert background.run_slice()
    for _ in range(440):  # steps of a tenth of a second, and as long between two requests
        clock.take(0.1)
        background.answered()
        clock.take(0.1)
        if background.has_slice(answering=False):
            background.run_slice()
    assert background.slices == 2  # the second 45 s after the first one, and the next one would be after 95 s
    assert background.seconds_to_wait(answering=False) == pytest.approx(0.9)
    clock.take(1)
    assert background.has_slice(answering=False)


def test_several_works_share_the_time_in_turn_and_one_that_fails_stops_no_other() -> None:
    done = []

    def fail() -> None:
        done.append("b")
        raise ValueError

    works = [Slices(lambda: done.append("a")), Slices(fail), Slices(lambda: done.append("c"), lambda: len(done) < 5)]
    background = Background(0.1, Clock())
    background.set(*works)
    for _ in range(7):
        background.failure = None  # as `Engine.wake` does
        assert background.has_slice(answering=False)
        background.run_slice()
    assert done == ["a", "b", "c", "a", "b", "a", "b"]


def test_a_part_may_begin_at_once_after_the_last_answer_where_the_settings_say_so() -> None:
    clock = Clock()
    background = Background(0.0, clock, answering_seconds=0.0)
    background.set(Slices(lambda: clock.take(1)))
    background.run_slice()
    background.answered()
    assert background.has_slice(answering=False)
    assert not background.has_slice(answering=True)


@pytest.mark.parametrize("tick", [0.4, 0.21])
def test_a_part_whose_time_comes_while_the_engine_looks_is_done(tick: float, tiny_model_dir: Path) -> None:
    """With these ticks the second without answers ends between two looks at the clock."""
    with engine_of(tiny_model_dir, training_share=0.0) as engine:
        engine.background.clock = Clock(tick)
        work = Slices()
        engine.set_background(work)
        work.wait_for_more(0)
        assert submit(engine, request([3], max_tokens=3)).end() == LENGTH
        work.wait_for_more(3)


def test_an_engine_sleeps_until_it_is_woken_and_an_error_parks_the_work_until_then(tiny_model_dir: Path) -> None:
    with engine_of(tiny_model_dir) as engine:
        work = Slices(lambda: 1 / 0)
        engine.set_background(work)
        wait_until(lambda: engine.stats().background_failure)
        assert engine.stats().background_failure == "ZeroDivisionError: division by zero."
        assert submit(engine, request([3], max_tokens=20)).end() == LENGTH
        assert (engine.background.slices, engine.stats().dead) == (1, None)
        work.do = lambda: None
        engine.wake()
        work.wait_for_more()
        assert engine.stats().background_failure is None
        work.has = lambda: False
        asked = -1
        while asked != work.asked:  # it comes to rest
            asked = work.asked
            threading.Event().wait(0.2)
        work.has = lambda: True
        engine.wake()
        work.wait_for_more()
        engine.set_background()
        assert submit(engine, request([3], max_tokens=3)).end() == LENGTH


@pytest.mark.parametrize("kind", ENGINES)
def test_requests_tasks_and_the_end_wait_for_one_part_at_most(
    kind: str, tiny_model_dir: Path, adapters_dir: Path
) -> None:
    """Slices begin and end when the test says so."""
    may_end, began = threading.Semaphore(0), threading.Semaphore(0)

    def do_slice() -> None:
        began.release()
        assert may_end.acquire(timeout=SECONDS)

    with engine_of(tiny_model_dir, kind, training_share=0.0) as engine:
        engine.set_background(Slices(do_slice))
        assert began.acquire(timeout=SECONDS)
        answer = submit(engine, request([3], store_of(adapters_dir).resolve("a1"), 5))
        assert not answer.events
        may_end.release()  # with no share of its own, no other slice begins before the answer has ended
        assert answer.end() == LENGTH
        assert began.acquire(timeout=SECONDS)
        waits = submit(engine, request([3], max_tokens=5))
        closing = threading.Thread(target=engine.close)
        closing.start()
        wait_until(lambda: engine._closing)
        may_end.release()
        closing.join(SECONDS)
        assert not closing.is_alive()
        assert waits.end() == EndEvent("cancelled")
        assert not began.acquire(blocking=False)
