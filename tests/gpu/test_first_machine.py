"""The first machine's pieces on the fake accelerator: a tensor left on the CPU raises, and a wait of the host is seen.

Not here: `operators`, `layer`, `resumed`, `export`, `blocks 64`: they compare values. `tests`, `sanitizer`, `beside training`:
another process has no fake accelerator. `host` is the CPU's. `compiled`: torch compiles nothing where operators are recorded.
`PEFT N`: stock PEFT picks the rows of each adapter by a list, which fake tensors don't take. tests/test_bench.py has all.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
import torch

from bench import serve_peers
from bench.common import read_lines
from bench.gpu import common, fast, large, right, serving
from bench.gpu.common import Lines
from qvera.adapters.bank import AdapterShape
from qvera.evaluation.generate import generating
from qvera.models import attention
from qvera.models.loader import Base
from qvera.serve import batches, paged, requests, slots, store
from qvera.serve.engine import Engine
from qvera.training import checkpoint
from qvera.training.session import TrainingSession
from tests.gpu.fake_accelerator import FakeAccelerator, FakeTokenizer
from tests.gpu.kernel_counts import CASES as PREPARED
from tests.gpu.own_process import measured
from tests.gpu.test_stream import streamed

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOKENS = 2048
MODES = ("checkpointing", "no checkpointing", "offloaded", "packed", "float16", "streamed")
PIECES = ("ceilings", "qvera train", *MODES, "profile", "streamed 70b", "offloaded 32k", "ours 32")


def one_kernel(*_: object) -> list[tuple[str, int, float]]:
    """In the place of a profile. A mock would keep the session that it is called with."""
    return [("a kernel", 1, 1.0)]


@contextlib.contextmanager
def on_fake_base(fake: FakeAccelerator, layers: int) -> Any:
    """A context in which sessions and engines have a 7B of so many layers; no plan, no adapter read, no thread."""

    def base(*_: object) -> Base:
        tokenizer: Any = FakeTokenizer()
        return Base(fake.model("7b", layers), tokenizer, {"dense_matrices": {}})

    def load(session: TrainingSession, *_: object) -> Base:
        made = base()
        if session.recipe.model.stream is True:
            streamed(made.model, fake.device)
        return made

    def submit(engine: Engine, *what: Any) -> None:
        put(engine, *what)
        if len(engine._waiting) == engine.settings.max_running:
            with torch.no_grad(), engine._layout:
                engine._layout.enter_context(generating(engine.model, True))
                while engine._is_asked():
                    engine._admit()
                    engine._try_step()

    put = Engine.submit
    peft = {name: PREPARED[name.replace(" r", ", r")] for name in fast.STOCK if name.startswith("PEFT")}
    with (
        mock.patch.object(TrainingSession, "_load_base", load),
        mock.patch.dict(fast.STOCK, peft),
        mock.patch.object(fast, "kernels_of", one_kernel),
        mock.patch.object(large, "kernels_of", one_kernel),
        mock.patch.object(attention, "varlen_runs", return_value=True),  # its trial needs values
        mock.patch.object(checkpoint, "save", lambda directory, *_: directory),
        mock.patch("peft.peft_model.safe_save_file", save_nothing),
        mock.patch.multiple(Engine, start=lambda _: None, submit=submit),  # another thread has no fake tensors
        mock.patch.object(batches, "choose_kernel", return_value=paged.PagedKernel(256, is_flash=True)),  # as above
        mock.patch.object(serve_peers, "load_base", base),
        mock.patch.object(store.AdapterStore, "resolve", lambda _, name: requests.ResolvedAdapter(name, name, ())),
        mock.patch.object(slots.ServingBank, "read", read_nothing),
        mock.patch.object(serving, "write_adapters", lambda root, **_: root.mkdir()),
    ):
        yield


def save_nothing(tensors: dict[str, torch.Tensor], file: Path, metadata: Any) -> None:
    """Zeros of these shapes, for tensors without data."""
    safetensors.numpy.save_file({name: np.zeros(t.shape, np.float32) for name, t in tensors.items()}, file, metadata)


def read_nothing(bank: slots.ServingBank, adapter: requests.ResolvedAdapter) -> slots.HostVectors:
    """The vectors of an adapter that has none on disk: VeRA on all linears."""
    shape = AdapterShape("vera", 0, 256, 1, False, "none", tuple(sorted(bank._specs.keys() - {"lm_head"})))
    return slots.HostVectors(adapter.identity, shape, torch.zeros(shape.layout(bank._specs).numbers))


def pieces(fake: FakeAccelerator, scratch: str) -> dict[str, Any]:
    """Pieces as far as they need no values; of each case's timed step: launches, waits, and the most bytes."""
    args = argparse.Namespace(scratch=Path(scratch), shape="tiny", device=fake.device.type, tokens=[TOKENS], steps=2)

    def lines(piece: str) -> Lines:
        return Lines(args.scratch / "lines.jsonl", piece, fake.device, args.shape)

    found = {}
    with on_fake_base(fake, layers=2):
        for piece in PIECES:
            asked = next(module for module in (right, fast, large, serving) if piece in module.PIECES)
            asked.PIECES[piece](args, lines(piece))
        args.steps = 1
        for case in fast.CASE_NAMES:
            with contextlib.ExitStack() as stack:
                recorded: list[Any] = []

                def begin(_: object, into: Any = recorded, stack: Any = stack) -> None:
                    gc.collect()  # as `start_peak` does
                    into.append(stack.enter_context(fake.record()))

                stack.enter_context(mock.patch.object(fast, "start_peak", begin))
                fast.measure_at(args, lines(f"{case}, round 1"), case, 1, TOKENS)
            found[case] = recorded[0].to_dict()
    return found


def test_pieces_run_on_a_device_and_the_host_waits_for_none_of_a_timed_step(tmp_path: Path) -> None:
    common.base_on_disk(argparse.Namespace(scratch=tmp_path, shape="tiny"))
    found = measured(pieces, str(tmp_path))
    assert found.keys() == set(fast.CASE_NAMES)
    for case, row in found.items():
        assert row["syncs"] == {}, case
        assert row["copies"] == {"to device": 1}, case
    assert found["frozen"]["launches"] < found["ours r=256"]["launches"] < found["PEFT LoRA r=16"]["launches"]
    peaks = {case: row["peak_bytes"] for case, row in found.items()}
    assert peaks["ours r=256"] < peaks["ours r=1024"] < peaks["PEFT LoRA r=16"] < peaks["PEFT VeRA r=256"]
    rows = read_lines(tmp_path / "lines.jsonl")
    ran = [row["mode"] for row in rows if row.get("step_seconds", 0) > 0 and "mode" in row]
    assert ran == [*MODES, "70b layers on the card", "70b layers streamed", "offloaded 32k"]
    assert [row["adapters"] for row in rows if "who" in row and row["tokens_per_second"] > 0] == [0, 1, 3]
