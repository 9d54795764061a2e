"""A step that runs out of memory among layers that are streamed, or whose inputs are offloaded: undone like any other.

The errors are injected, and a thread stands in for the copy stream, so that bytes that a failed pass left behind would
be read by the next one. No accelerator has run this.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.models import stream
from qvera.models.checkpointing import enable_checkpointing, offload_inputs
from qvera.models.stream import PinnedChunks
from qvera.models.structure import causal_model, decoder_layers
from qvera.training import session
from qvera.training.loop import AloneLoop
from qvera.training.trainer import train
from qvera.utils.errors import OutOfMemory
from tests.late_stream import CHUNK_BYTES, LateStream
from tests.training.runs import MESSAGE, assert_close_run, assert_same_run, records
from tests.two_threads import HostStream, TwoThreads

pytestmark = pytest.mark.process

STEP = 2


@pytest.fixture
def arrange(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], list[str]]]:
    """Let layers be streamed or their inputs offloaded, by a thread, and the second pass of step `STEP` fail once.

    As a layer begins, as it is recomputed, or in a copy. What has failed is in the list that is returned.
    """
    made: list[LateStream] = []
    start = AloneLoop.start
    plain: Any = stream.LayerStream

    def arranged(way: str, moment: str) -> list[str]:
        loops: list[AloneLoop] = []
        failed: list[str] = []
        calls = itertools.count(1)

        def fail_at(wanted: int) -> None:
            here = bool(loops) and loops[-1].state.step + 1 == STEP
            if here and not failed and next(calls) == wanted:
                failed.append(moment)
                raise torch.OutOfMemoryError(MESSAGE)

        def watched(loop: AloneLoop) -> None:
            """Count the uses of the third layer: one in forward and one in backward of each pass."""
            start(loop)
            loops.append(loop)
            layer = decoder_layers(causal_model(loop.model).get_decoder())[2]  # type: ignore[operator]
            if moment != "copy":
                layer.input_layernorm.register_forward_pre_hook(lambda *_: fail_at(3 if moment == "forward" else 4))

        def copying(copy: Callable[..., Any]) -> Callable[..., Any]:
            def copy_or_fail(*args: Any, **kwargs: Any) -> Any:
                if moment == "copy":
                    fail_at(4)
                return copy(*args, **kwargs)

            return copy_or_fail

        def offload(model: Any, *_: Any, **__: Any) -> None:
            enable_checkpointing(model)
            made.append(LateStream(longest_seconds=0.002))
            copies: Any = made[-1]
            chunks = PinnedChunks(CHUNK_BYTES, pin_memory=False)
            offload_inputs(model.get_base_model(), copies, chunks, use_reentrant=False)

        def streamed(*args: Any) -> Any:
            return plain(*args, pinned=way == "streamed", copies=TwoThreads(HostStream()))

        monkeypatch.setattr(AloneLoop, "start", watched)
        monkeypatch.setattr(stream, "LayerStream", streamed)
        for threads in (TwoThreads, LateStream):
            monkeypatch.setattr(threads, "copy", copying(threads.copy))
        if way == "offloaded":
            monkeypatch.setattr(session, "enable_checkpointing", offload)
        return failed

    yield arranged
    for one in made:
        assert not one.dead
        one.close()


@pytest.fixture(scope="module")
def recipe(make_recipe: Any, five_layers: Path) -> Callable[..., Any]:
    def make(way: str | None = None, **training: Any) -> Any:
        return make_recipe(
            model={"path": str(five_layers), "stream": way is not None and way != "offloaded"},
            data={"eval_fraction": 0.0, "limit": 16},
            training={"max_steps": STEP, "save_steps": 9, "gradient_checkpointing": True, **training},
        )

    return make


@pytest.fixture(scope="module")
def whole(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs, on a resident base."""
    run_dir = tmp_path_factory.mktemp("layers") / "whole"
    train(recipe(), run_dir)
    return run_dir


SAMPLE = [("streamed", "forward"), ("streamed from the file", "copy"), ("offloaded", "backward")]
REST = [("streamed", "backward"), ("streamed", "copy"), ("offloaded", "forward"), ("offloaded", "copy")]


@pytest.mark.parametrize(("way", "moment"), [*SAMPLE, *(pytest.param(*one, marks=pytest.mark.matrix) for one in REST)])
def test_the_step_is_taken_again_with_half_the_rows(
    recipe: Any, tmp_path: Path, arrange: Any, whole: Path, way: str, moment: str
) -> None:
    failed = arrange(way, moment)
    train(recipe(way, on_oom="halve"), tmp_path / "halved")
    assert failed
    assert [(r["step"], r["pass_rows"]) for r in records(tmp_path / "halved", "out_of_memory")] == [(STEP, 2)]
    assert_close_run(tmp_path / "halved", whole)


@pytest.mark.parametrize("way", ["streamed", "offloaded"])
def test_the_run_is_saved_and_goes_on_to_the_bit(
    recipe: Any, tmp_path: Path, arrange: Any, whole: Path, way: str
) -> None:
    arrange(way, "backward")
    with pytest.raises(OutOfMemory, match=f"Step {STEP - 1} is saved"):
        train(recipe(way), tmp_path / "cut")
    train(recipe(way), tmp_path / "cut", resume=True)
    assert_same_run(tmp_path / "cut", whole)
