"""Checkpointed layers: their inputs offloaded to RAM and brought back, with a thread in the place of the copy stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import Gemma3Config

from qvera.adapters.files.save_load import attach, named_vectors
from qvera.config.schema import AdapterSection
from qvera.models.checkpointing import INPUTS_ON_DEVICE, draws_random_numbers, enable_checkpointing, offload_inputs
from qvera.models.stream import PinnedChunks
from tests.adapters.helpers import perturb
from tests.conftest import small_llama
from tests.late_stream import CHUNK_BYTES, LateStream

IDS = torch.randint(3, 300, (2, 21), generator=torch.Generator().manual_seed(0))
LAYERS = 5


class CarelessStream(LateStream):
    """One whose user forgets to wait."""

    def wait(self, event: threading.Event) -> None:
        pass


@pytest.fixture
def streams() -> Iterator[list[LateStream]]:
    made: list[LateStream] = []
    yield made
    for one in made:
        one.close()


def adapted(**changes: Any) -> Any:
    model = attach(small_llama(num_hidden_layers=LAYERS, **changes).requires_grad_(False), AdapterSection(rank=8))
    perturb(model)
    return model.train()


def gradients(model: Any, ids: torch.Tensor = IDS) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: v.grad.clone() for name, v in named_vectors(model).items()}  # type: ignore[union-attr]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], gradient) for name, gradient in other.items())


def offloaded(streams: list[LateStream], stream: LateStream | None = None) -> tuple[Any, PinnedChunks]:
    model, chunks = adapted(), PinnedChunks(CHUNK_BYTES, pin_memory=False)
    enable_checkpointing(model)
    streams.append(stream or LateStream())
    offload_inputs(model.get_base_model(), streams[-1], chunks, use_reentrant=False)  # type: ignore[arg-type]
    return model, chunks


@pytest.mark.parametrize("longest_seconds", [0.0, 0.004], ids=["late", "some-time"])
def test_offloaded_inputs_give_the_same_gradients_to_the_bit(streams: list[LateStream], longest_seconds: float) -> None:
    plain = adapted()
    enable_checkpointing(plain)
    model, chunks = offloaded(streams, LateStream(longest_seconds))
    for ids in (IDS, IDS[:1, :9], IDS):  # chunks are used again, by inputs of other sizes too
        assert equal(gradients(model, ids), gradients(plain, ids))
    assert streams[0].copies and not streams[0].dead
    allocated = chunks.allocated
    for _ in range(3):
        model(input_ids=IDS, labels=IDS)  # a graph that is dropped gives its memory back
    assert equal(gradients(model), gradients(plain))
    # the last input of a dropped graph stays until the next pass begins
    assert chunks.allocated <= allocated + allocated // LAYERS


def test_a_stream_that_nobody_waits_for_would_be_noticed(streams: list[LateStream]) -> None:
    plain = adapted()
    enable_checkpointing(plain)
    model, _ = offloaded(streams, CarelessStream())
    found = gradients(model)
    assert not equal(found, gradients(plain))
    streams[0].close()  # now the copies run
    assert streams[0].dead


def test_few_inputs_are_on_the_device_at_a_time(streams: list[LateStream]) -> None:
    model, _ = offloaded(streams)
    loss = model(input_ids=IDS, labels=IDS).loss
    # a layer's own, and the embeddings, which transformers' forward holds until it ends
    assert max(streams[0].inputs_at_copies) == 2
    del streams[0].inputs_at_copies[:]
    loss.backward()
    assert max(streams[0].inputs_at_copies) == INPUTS_ON_DEVICE


@pytest.mark.parametrize("mode", [True, "offload"])
def test_offload_on_a_cpu_is_plain_checkpointing(mode: Any) -> None:
    kept, model = adapted(), adapted()
    enable_checkpointing(kept, False)
    enable_checkpointing(model, mode)
    assert not any(layer.gradient_checkpointing for layer in kept.get_base_model().model.layers)
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)
    assert equal(gradients(model), gradients(kept))


def test_random_state_is_kept_where_a_layer_draws_from_it() -> None:
    assert not draws_random_numbers(adapted())
    assert draws_random_numbers(small_llama(attention_dropout=0.1))
    config = Gemma3Config(text_config={"attention_dropout": 0.1, "num_hidden_layers": 1, "hidden_size": 16})
    assert draws_random_numbers(cast(nn.Module, SimpleNamespace(config=config, modules=list)))  # one within another
    dropping = attach(small_llama(), AdapterSection(rank=8, dropout=0.2))
    assert draws_random_numbers(dropping)
    perturb(dropping)
    recomputed = attach(small_llama(), AdapterSection(rank=8, dropout=0.2))
    perturb(recomputed)
    enable_checkpointing(recomputed)
    found = []
    for model in (dropping.train(), recomputed.train()):
        torch.manual_seed(0)
        found.append(gradients(model))
    assert equal(*found)
