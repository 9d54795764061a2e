"""The first machine's pieces on the fake accelerator: a tensor left on the CPU raises, and a wait of the host is seen."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy
import torch

from bench.common import read_lines
from bench.gpu import common, fast, large, right
from bench.gpu.common import Lines
from qvera.models import attention
from qvera.models.loader import Base
from qvera.training import checkpoint
from qvera.training.session import TrainingSession
from tests.gpu.fake_accelerator import FakeAccelerator, FakeTokenizer
from tests.gpu.kernel_counts import CASES as PREPARED
from tests.gpu.own_process import measured

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOKENS = 8192
MODES = ("checkpointing", "no checkpointing", "offloaded", "packed", "float16", "profile")
"""Of part C. tests/gpu/test_stream.py has streamed layers."""


@contextlib.contextmanager
def on_fake_base(fake: FakeAccelerator, layers: int) -> Any:
    """A context in which a session has a 7B of so many layers, without a plan."""

    def load(session: TrainingSession, *_: object) -> Base:
        tokenizer: Any = FakeTokenizer()
        return Base(fake.model("7b", layers), tokenizer, {"dense_matrices": {}})

    peft = {name: PREPARED[name.replace(" r", ", r")] for name in fast.STOCK if name.startswith("PEFT")}
    with (
        mock.patch.object(TrainingSession, "_load_base", load),
        mock.patch.dict(fast.STOCK, peft),
        mock.patch.object(fast, "kernels_of", return_value=[]),
        mock.patch.object(large, "kernels_of", return_value=[("a kernel", 1, 1.0)]),
        mock.patch.object(attention, "varlen_runs", return_value=True),  # its trial needs values
        mock.patch.object(checkpoint, "save", lambda directory, *_: directory),
        mock.patch("peft.peft_model.safe_save_file", save_nothing),
    ):
        yield


def save_nothing(tensors: dict[str, torch.Tensor], file: Path, metadata: Any) -> None:
    """Zeros of these shapes, for tensors without data."""
    safetensors.numpy.save_file({name: np.zeros(t.shape, np.float32) for name, t in tensors.items()}, file, metadata)


def pieces(fake: FakeAccelerator, scratch: str) -> dict[str, Any]:
    """Parts B and C as far as they need no values; of each case's timed step: launches, waits, and the most bytes."""
    args = argparse.Namespace(scratch=Path(scratch), shape="tiny", device=fake.device.type, tokens=[TOKENS], steps=2)

    def lines(piece: str) -> Lines:
        return Lines(args.scratch / "lines.jsonl", piece, fake.device, args.shape)

    found = {}
    with on_fake_base(fake, layers=2):
        for module, piece in ((right, "ceilings"), (fast, "qvera train"), *((large, mode) for mode in MODES)):
            module.PIECES[piece](args, lines(piece))
        args.steps = 1
        for case in fast.CASE_NAMES:
            with contextlib.ExitStack() as stack:
                recorded: list[Any] = []

                def begin(_: object, into: Any = recorded, stack: Any = stack) -> None:
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
    assert found["ours r=256"]["peak_bytes"] < found["PEFT VeRA r=256"]["peak_bytes"]
    ran = [
        row["mode"] for row in read_lines(tmp_path / "lines.jsonl") if row.get("step_seconds", 0) > 0 and "mode" in row
    ]
    assert ran == [mode for mode in MODES if mode != "profile"]
