"""What goes wrong inside an engine ends the requests that it concerns, and never hangs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qvera.serve.engine import NOT_FINITE, Engine
from qvera.serve.requests import EndEvent, EngineDead
from qvera.serve.store import AdapterStore
from qvera.utils.paths import ADAPTER_WEIGHTS
from tests.helpers import wait_until
from tests.serve.helpers import ENGINES, assert_same, engine_of, request, submit


class _Fault:
    """A forward pass that fails for some time."""

    def __init__(self, engine: Engine, times: int) -> None:
        self.left = times
        self.handle = engine.model.register_forward_pre_hook(self._fail)

    def _fail(self, *_: object) -> None:
        if self.left:
            self.left -= 1
            raise RuntimeError("the card fell off\nwith details of no interest")


@pytest.mark.parametrize("kind", ENGINES)
def test_a_step_that_fails_ends_the_requests_that_run_and_the_engine_goes_on(
    kind: str, tiny_model_dir: Path, adapters_dir: Path, alone: Any
) -> None:
    adapter = AdapterStore(adapters_dir).resolve("a1")
    asked = request([3, 4], adapter, 20)
    expected = alone(adapters_dir / "a1").answer(asked)
    with engine_of(tiny_model_dir, kind, max_running=2) as engine:
        answers = [submit(engine, request([3, 4, 5 + i], adapter, 150)) for i in range(2)]
        answers[0].wait_for_token()
        waits = submit(engine, asked)
        _Fault(engine, 1)
        for answer in answers:
            assert answer.end() == EndEvent("error", "RuntimeError: the card fell off.")
        assert_same(waits, expected)
        assert engine.stats().dead is None


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_that_fails_at_every_step_says_that_it_is_dead(kind: str, tiny_model_dir: Path) -> None:
    with engine_of(tiny_model_dir, kind, max_running=1) as engine:
        _Fault(engine, 10**9)
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


def test_even_an_error_that_python_does_not_expect_ends_every_request(tiny_model_dir: Path) -> None:
    with engine_of(tiny_model_dir, max_running=1) as engine:
        runs = submit(engine, request([3], max_tokens=200))
        waits = submit(engine, request([3], max_tokens=200))
        runs.wait_for_token()

        def leave(*_: object) -> None:
            raise SystemExit(3)

        engine.model.register_forward_pre_hook(leave)
        assert runs.end().reason == waits.end().reason == "error"
        wait_until(lambda: engine.stats().dead)


def test_who_loads_an_adapter_into_an_engine_that_ends_is_told(tiny_model_dir: Path, adapters_dir: Path) -> None:
    adapter = AdapterStore(adapters_dir).resolve("a1")
    assert adapter is not None
    with engine_of(tiny_model_dir) as engine:

        def leave(_: object) -> None:
            raise SystemExit(3)

        engine.bank.acquire = leave  # type: ignore[method-assign, assignment]
        with pytest.raises(SystemExit):
            engine.load(adapter)
        wait_until(lambda: engine.stats().dead)
        with pytest.raises(EngineDead):
            engine.load(adapter)


@pytest.mark.parametrize("kind", ENGINES)
def test_an_adapter_of_numbers_beyond_all_bounds_ends_its_own_requests_alone(
    kind: str, tiny_model_dir: Path, adapters_dir: Path, tmp_path: Path, alone: Any
) -> None:
    """Its hidden states are not finite, and attention that only masks them would spoil the whole batch."""
    shutil.copytree(adapters_dir / "a2", tmp_path / "huge")
    vectors = load_file(tmp_path / "huge" / ADAPTER_WEIGHTS)
    save_file({key: vector * 1e30 for key, vector in vectors.items()}, tmp_path / "huge" / ADAPTER_WEIGHTS)
    good = AdapterStore(adapters_dir)
    asked = [request([5, 6 + i], good.resolve(f"a{i}"), 30, temperature=1.0, seed=i, top_logprobs=1) for i in range(4)]
    long_prompt = request([7] * 150, good.resolve("a5"), 5)
    expected = [alone(adapters_dir / f"a{i}").answer(one) for i, one in enumerate(asked)]
    expected.append(alone(adapters_dir / "a5").answer(long_prompt))
    huge = AdapterStore(tmp_path).resolve("huge")
    with engine_of(tiny_model_dir, kind) as engine:
        answers = [submit(engine, one) for one in asked]
        answers[0].wait_for_token()
        answers.append(submit(engine, long_prompt))
        bad = [submit(engine, request([3] * 40, huge, 30)), submit(engine, request([3], huge, 30))]
        assert [one.end() for one in bad] == [EndEvent("error", NOT_FINITE)] * 2
        for answer, events in zip(answers, expected, strict=True):
            assert_same(answer, events)
