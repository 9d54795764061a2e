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


class Failure:
    """Raises once, in the second pass of step `STEP`: as a layer begins, as it is recomputed, or in a copy."""

    def __init__(self, moment: str) -> None:
        self.moment, self.calls = moment, itertools.count(1)
        self.loop: AloneLoop | None = None
        self.raised = False

    def watch(self, loop: AloneLoop) -> None:
        """Count the uses of the third layer: one in forward and one in backward of each pass."""
        self.loop = loop
        layer = decoder_layers(causal_model(loop.model).get_decoder())[2]  # type: ignore[operator]
        wanted = {"forward": 3, "backward": 4}.get(self.moment)
        layer.input_layernorm.register_forward_pre_hook(lambda *_: self.raise_at(wanted))

    def raise_at(self, wanted: int | None) -> None:
        """Raise at that call of step `STEP`."""
        here = self.loop is not None and self.loop.state.step + 1 == STEP
        if here and wanted is not None and not self.raised and next(self.calls) == wanted:
            self.raised = True
            raise torch.OutOfMemoryError(MESSAGE)

    def copying(self, copy: Callable[..., Any]) -> Callable[..., Any]:
        """A function that copies, failing at its fourth call in the step."""

        def copy_or_fail(*args: Any, **kwargs: Any) -> Any:
            self.raise_at(4 if self.moment == "copy" else None)
            return copy(*args, **kwargs)

        return copy_or_fail


@pytest.fixture
def arrange(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Failure]]:
    """Let layers be streamed or their inputs offloaded, by a thread, and a step fail."""
    made: list[LateStream] = []

    def arranged(way: str, moment: str) -> Failure:
        failure = Failure(moment)
        start = AloneLoop.start

        def watched(loop: AloneLoop) -> None:
            start(loop)
            failure.watch(loop)

        monkeypatch.setattr(AloneLoop, "start", watched)
        plain: Any = stream.LayerStream
        pinned = way == "streamed"
        monkeypatch.setattr(
            stream, "LayerStream", lambda *args: plain(*args, pinned=pinned, copies=TwoThreads(HostStream()))
        )
        monkeypatch.setattr(TwoThreads, "copy", failure.copying(TwoThreads.copy))
        monkeypatch.setattr(LateStream, "copy", failure.copying(LateStream.copy))

        def offload(model: Any, *_: Any, **__: Any) -> None:
            enable_checkpointing(model)
            made.append(LateStream(longest_seconds=0.002))
            chunks = PinnedChunks(CHUNK_BYTES, pin_memory=False)
            copies: Any = made[-1]
            offload_inputs(model.get_base_model(), copies, chunks, use_reentrant=False)

        if way == "offloaded":
            monkeypatch.setattr(session, "enable_checkpointing", offload)
        return failure

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
    failure = arrange(way, moment)
    train(recipe(way, on_oom="halve"), tmp_path / "halved")
    assert failure.raised
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
