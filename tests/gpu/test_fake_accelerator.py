"""The real code at the shape of an 8B on the fake accelerator: nothing stays on the CPU, and nothing waits for it.

A tensor that was left on the CPU ends the measurement with an error.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import LlamaForCausalLM

from qvera.adapters.config import QveraConfig
from qvera.adapters.save_load import named_vectors
from qvera.adapters.shared_model import load_adapters
from qvera.evaluation import held_out
from qvera.evaluation.generate import generate
from qvera.exporting.deltas import read_deltas
from qvera.exporting.merged import Merging
from qvera.models.safetensors_stream import Block
from tests.gpu.fake_accelerator import FakeAccelerator, FakeSession
from tests.gpu.own_process import measured

pytestmark = pytest.mark.process

SHAPE = "8b"

# How often the host waits for the device, by what it waits for.

STEP_SYNCS = {"list": 2}
"""In an optimizer step, however many layers and passes it has: the losses of all passes, once they are all under way, and
the gradient norm, since a step that is not finite must not be taken."""
EVALUATION_SYNCS = {"list": 1}
"""The loss of all held-out rows."""
TOKEN_SYNCS = {"number": 2}
"""For each token of a batch's answers: transformers asks whether all have ended, and whether a prompt is padded."""
BATCH_SYNCS = {"copy to device", "list"}
"""For each batch of answers: its prompts and transformers' special tokens go over, its answers come back."""
MERGE_SYNCS = {"copy to device": 1, "list": 1, "copy to host": 1}
"""For each block of rows of a merged export; the list is the largest change, and whether all is finite."""


def waits(seen: dict[str, Any]) -> dict[str, int]:
    """What the host waited for → how often, wherever in the code."""
    total: Counter[str] = Counter()
    for place, times in seen["syncs"].items():
        total[place.rpartition(": ")[2]] += times
    return dict(total)


def everything(fake: FakeAccelerator) -> dict[str, Any]:
    """What each part of the work takes on a model of one layer."""
    session = fake.session(SHAPE, rows=[512, 500], rank=64, layers=1, prompt_tokens=100)
    found: dict[str, Any] = {"devices": devices_of(session.model)}
    session.train_step()
    with fake.record() as seen:
        session.train_step()
    states = [value for state in session.optimizer.state.values() for key, value in state.items() if key != "step"]
    found |= {"states": sorted({str(value.device) for value in states}), "step": seen.to_dict()}
    with fake.record() as seen, held_out.scoring(session.model):
        held_out.held_out_loss(session.model, session.datasets.eval, pad_id=0, batch_size=1, chunk_tokens=512)
    found |= {"evaluation": seen.to_dict(), "answers": [answers(fake, session, questions) for questions in (4, 6)]}
    base, adapter = fake.model(SHAPE, layers=1), written_adapter(fake, session)
    return found | {"merge": merge(fake, base, adapter), "many": many_adapters(fake, base, adapter)}


def devices_of(model: torch.nn.Module) -> list[str]:
    return sorted({str(tensor.device) for tensor in [*model.parameters(), *model.buffers()]})


def answers(fake: FakeAccelerator, session: FakeSession, questions: int) -> dict[str, Any]:
    """Two prompts of different length, answered until the device has been asked so often whether all have ended."""
    fake.answer(*[False] * questions)
    with fake.record() as seen:
        generate(session.model, session.base.tokenizer, [[5] * 7, [6] * 9], max_new_tokens=64)
    return seen.to_dict()


def written_adapter(fake: FakeAccelerator, session: FakeSession) -> Path:
    """The adapter's directory, without torch: its tensors have no values here."""
    directory = fake.scratch / "adapter"
    config = session.model.peft_config["default"]
    assert isinstance(config, QveraConfig)
    config.save_pretrained(str(directory))
    vectors = named_vectors(session.model)
    arrays = {name: np.zeros(tuple(vector.shape), dtype=np.float32) for name, vector in vectors.items()}
    save_file(arrays, directory / "adapter_model.safetensors")
    return directory


def merge(fake: FakeAccelerator, base: LlamaForCausalLM, adapter: Path) -> dict[str, Any]:
    """One block of rows of the widest weight, merged."""
    name = "model.layers.0.mlp.down_proj"
    deltas = read_deltas(adapter, base).on(fake.device)
    rows = torch.empty(256, deltas.layers[name].shape[1], dtype=torch.bfloat16)
    entry: Any = SimpleNamespace(name=f"{name}.weight")
    export = Merging.__new__(Merging)
    export.deltas, export.tables, export.dtype = {entry.name: deltas.layers[name]}, {}, torch.float16
    export.expert_sources, export.flat = {}, {}
    export.reader = None  # type: ignore[assignment]
    with fake.record() as seen:
        _, merged, changed = export._merge(Block(entry, 512, rows, False))
    return {**seen.to_dict(), "merged": [str(merged.device), str(merged.dtype)], "changed": changed}


def many_adapters(fake: FakeAccelerator, base: LlamaForCausalLM, adapter: Path) -> dict[str, Any]:
    """A batch of three rows with two adapters and none."""
    model = load_adapters(base, {"one": adapter, "two": adapter})
    ids = torch.zeros(3, 20, dtype=torch.int64, device=fake.device)
    with fake.record() as seen, torch.no_grad():
        out = model(input_ids=ids, adapter_names=["one", "__base__", "two"])
    return {**seen.to_dict(), "devices": devices_of(model), "logits": list(out.logits.shape)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return measured(everything)


def test_a_training_step(found: dict[str, Any]) -> None:
    assert found["devices"] == found["states"] == ["fakegpu:0"]
    assert waits(found["step"]) == STEP_SYNCS
    assert found["step"]["copies"] == {"to device": 1}
    assert found["step"]["kernels"]["qvera.dequantize_4bit"] >= 2 * 7


def test_held_out_loss(found: dict[str, Any]) -> None:
    assert waits(found["evaluation"]) == EVALUATION_SYNCS
    assert found["evaluation"]["copies"] == {"to device": 2}  # one a batch


def test_answers(found: dict[str, Any]) -> None:
    fewer, more = map(waits, found["answers"])
    assert {name: more[name] - fewer[name] for name in more if more[name] != fewer[name]} == TOKEN_SYNCS
    assert set(more) == TOKEN_SYNCS.keys() | BATCH_SYNCS


def test_a_block_of_a_merged_export(found: dict[str, Any]) -> None:
    merge = found["merge"]
    assert merge["merged"] == ["cpu", "torch.float16"] and merge["kernels"]["aten.mm"] == 1
    assert waits(merge) == MERGE_SYNCS


def test_rows_with_different_adapters(found: dict[str, Any]) -> None:
    many = found["many"]
    assert many["devices"] == ["fakegpu:0"] and many["logits"][:2] == [3, 20]
    assert many["syncs"] == {} and many["copies"] == {"to device": 1}
