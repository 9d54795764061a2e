"""Runs on a streamed base: the same losses, gradients, answers and adapter as on a resident one, to the bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qvera.evaluation.load import open_run
from qvera.models import stream
from qvera.models.loader import load_base
from qvera.training.trainer import train
from qvera.utils.errors import InputError
from tests.training.runs import metrics
from tests.two_threads import HostStream, TwoThreads


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_run_on_a_streamed_base_equals_one_on_a_resident_base(
    make_recipe: Any, five_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    # copies run in a thread, so that a layer that is used before it has come gives other numbers
    plain: Any = stream.LayerStream
    monkeypatch.setattr(stream, "LayerStream", lambda *args: plain(*args, copies=TwoThreads(HostStream())))

    def run(streamed: bool, resume: bool = False) -> tuple[Any, ...]:
        recipe = make_recipe(
            model={"path": str(five_layers), "stream": streamed},
            data={"limit": 16},
            training={"max_steps": 2, "eval_steps": 1, "save_steps": 1, "gradient_checkpointing": checkpointing},
        )
        result = train(recipe, tmp_path / str(streamed and not resume), resume=resume)
        assert result is not None and ("streamed" in result.run["model"]) == streamed
        adapter = (result.run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
        return metrics(result.run_dir), result.run["samples"], adapter

    resident = run(streamed=False)
    assert run(streamed=True) == resident
    if checkpointing:  # a run goes on with a streamed base
        shutil.rmtree(tmp_path / "False" / "checkpoints" / "step-00000002")
        assert run(streamed=True, resume=True) == resident


def test_a_streamed_base_is_merged_and_saved_as_a_resident_one(
    make_recipe: Any, five_layers: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    train(make_recipe(model={"path": str(five_layers), "stream": True}, training={"max_steps": 1}), run_dir)
    states = []
    for streamed in (True, False):
        if not streamed:
            recipe = run_dir / "recipe.yaml"
            recipe.write_text(recipe.read_text().replace("stream: true", "stream: false"))
        model = open_run(run_dir).model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.warns(UserWarning, match="relative error"):
            merged = model.merge_and_unload()
        states.append((before, merged.state_dict()))
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


def test_a_streamed_base_can_not_be_moved_and_is_of_4_bit_layers(make_recipe: Any, five_layers: Path) -> None:
    base = load_base(make_recipe(model={"path": str(five_layers), "stream": True}).model)
    with pytest.raises(RuntimeError, match="streamed"):
        base.model.to("meta")
    for quantization in ("int8", "none"):
        with pytest.raises(InputError, match=r"model\.stream: only 4-bit layers"):
            make_recipe(model={"stream": True, "quantization": quantization, "compute_dtype": "auto"})
