"""Checkpointed layers: their inputs offloaded to RAM and brought back, with a thread in the place of the copy stream."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import Gemma3Config

from qvera.adapters.save_load import attach, named_vectors
from qvera.config.sections import AdapterSection
from qvera.models.checkpointing import INPUTS_ON_DEVICE, draws_random_numbers, enable_checkpointing, offload_inputs
from qvera.models.stream import PinnedChunks
from tests.adapters.helpers import perturb
from tests.conftest import small_llama
from tests.late_stream import CHUNK_BYTES, LateStream

IDS = torch.randint(3, 300, (2, 21), generator=torch.Generator().manual_seed(0))
LAYERS = 5


@pytest.fixture
def streams() -> Iterator[list[LateStream]]:
    made: list[LateStream] = []
    yield made
    for one in made:
        one.close()


def adapted(checkpointing: Any = None, **adapter: Any) -> Any:
    base = small_llama(num_hidden_layers=LAYERS).requires_grad_(False)
    model = perturb(attach(base, AdapterSection(rank=8, **adapter)))
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
    return model.train()


def gradients(model: Any, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(named_vectors(model).values()))


def equal(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(itertools.starmap(torch.equal, zip(one, other, strict=True)))


def offloaded(streams: list[LateStream], longest_seconds: float = 0.0) -> tuple[Any, PinnedChunks]:
    model, chunks = adapted(True), PinnedChunks(CHUNK_BYTES, pin_memory=False)
    streams.append(LateStream(longest_seconds))
    offload_inputs(model.get_base_model(), streams[-1], chunks, use_reentrant=False)  # type: ignore[arg-type]
    return model, chunks


@pytest.mark.parametrize("longest_seconds", [0.0, 0.004], ids=["late", "some-time"])
def test_offloaded_inputs_give_the_same_gradients_to_the_bit(streams: list[LateStream], longest_seconds: float) -> None:
    plain = adapted(True)
    model, chunks = offloaded(streams, longest_seconds)
    for ids in (IDS, IDS[:1, :9], IDS):  # chunks are used again, by inputs of other sizes too
        assert equal(gradients(model, ids), gradients(plain, ids))
    assert streams[0].copies and not streams[0].dead
    allocated = chunks.allocated
    for _ in range(3):
        model(input_ids=IDS, labels=IDS)  # a graph that is dropped gives its memory back
    assert equal(gradients(model), gradients(plain))
    # the last input of a dropped graph stays until the next pass begins
    assert chunks.allocated <= allocated + allocated // LAYERS


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
    kept, model = adapted(False), adapted(mode)
    assert not any(layer.gradient_checkpointing for layer in kept.get_base_model().model.layers)
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)
    assert equal(gradients(model), gradients(kept))


def test_random_state_is_kept_where_a_layer_draws_from_it() -> None:
    assert not draws_random_numbers(adapted())
    assert draws_random_numbers(small_llama(attention_dropout=0.1))
    config = Gemma3Config(text_config={"attention_dropout": 0.1, "num_hidden_layers": 1, "hidden_size": 16})
    assert draws_random_numbers(cast(nn.Module, SimpleNamespace(config=config, modules=list)))  # one within another
    assert draws_random_numbers(adapted(dropout=0.2))
    assert equal(gradients(adapted(dropout=0.2)), gradients(adapted(True, dropout=0.2)))
