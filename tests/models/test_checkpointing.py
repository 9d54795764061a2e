"""Checkpointed layers: their inputs offloaded to RAM and brought back, with a thread in the place of the copy stream."""

from __future__ import annotations

import queue
import random
import threading
import weakref
from collections.abc import Iterable, Iterator
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

IDS = torch.randint(3, 300, (2, 21), generator=torch.Generator().manual_seed(0))
LAYERS = 5
CHUNK_BYTES = 4096


class Piece:
    """Bytes of a tensor that do not keep it alive, as a copy that was given to a device does not."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._range = tensor.storage_offset(), tensor.numel()

    def tensor(self) -> torch.Tensor | None:
        storage = self._storage()
        if storage is None:
            return None
        start, count = self._range
        return torch.empty(0, dtype=torch.uint8).set_(storage, start, (count,))  # type: ignore[call-overload]


class ThreadStream:
    """A `CopyStream` over CPU tensors: a thread copies, as late as possible, and keeps no tensor alive.

    A copy runs when somebody waits for it or for a later one, or (``longest_seconds``) after a random time. What is
    copied in holds NaN until then. A tensor that was let go of before its copy ran is counted.
    """

    device = torch.device("cpu")

    def __init__(self, longest_seconds: float = 0.0) -> None:
        self.copies = self.dead = 0
        self.inputs_at_copies: list[int] = []
        self._inputs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._random, self._longest_seconds = random.Random(0), longest_seconds
        self._tasks: queue.Queue[tuple[threading.Event, list[tuple[Piece, Piece]]] | None] = queue.Queue()
        self._needed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> threading.Event:
        done, pieces = threading.Event(), []
        for destination, source in pairs:
            for tensor in (destination, source):
                if tensor.untyped_storage().nbytes() != CHUNK_BYTES:
                    self._inputs.add(tensor.untyped_storage())
            if source.untyped_storage().nbytes() == CHUNK_BYTES:  # on its way in
                destination.fill_(255)
            pieces.append((Piece(destination), Piece(source)))
        self.inputs_at_copies.append(len(self._inputs))
        self._tasks.put((done, pieces))
        return done

    def wait(self, event: threading.Event) -> None:
        self._needed.set()
        assert event.wait(60)
        if not self._longest_seconds:
            self._needed.clear()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._needed.wait(self._random.random() * self._longest_seconds if self._longest_seconds else None)
            for destination, source in task[1]:
                self._copy_now(destination.tensor(), source.tensor())
            task[0].set()

    def _copy_now(self, destination: torch.Tensor | None, source: torch.Tensor | None) -> None:
        if destination is None or source is None:
            self.dead += 1
        else:
            destination.copy_(source)
            self.copies += 1

    def close(self) -> None:
        self._tasks.put(None)
        self._needed.set()
        self._thread.join()


class CarelessStream(ThreadStream):
    """One whose user forgets to wait."""

    def wait(self, event: threading.Event) -> None:
        pass


@pytest.fixture
def streams() -> Iterator[list[ThreadStream]]:
    made: list[ThreadStream] = []
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


def offloaded(streams: list[ThreadStream], stream: ThreadStream | None = None) -> tuple[Any, PinnedChunks]:
    model, chunks = adapted(), PinnedChunks(CHUNK_BYTES, pin_memory=False)
    enable_checkpointing(model)
    streams.append(stream or ThreadStream())
    offload_inputs(model.get_base_model(), streams[-1], chunks, use_reentrant=False)  # type: ignore[arg-type]
    return model, chunks


@pytest.mark.parametrize("longest_seconds", [0.0, 0.004], ids=["late", "some-time"])
def test_offloaded_inputs_give_the_same_gradients_to_the_bit(
    streams: list[ThreadStream], longest_seconds: float
) -> None:
    plain = adapted()
    enable_checkpointing(plain)
    model, chunks = offloaded(streams, ThreadStream(longest_seconds))
    for ids in (IDS, IDS[:1, :9], IDS, IDS):  # chunks are used again, by inputs of other sizes too
        assert equal(gradients(model, ids), gradients(plain, ids))
    (stream,) = streams
    per_input = -(-IDS.numel() * 64 * 4 // CHUNK_BYTES)
    assert not stream.dead
    assert chunks.allocated == LAYERS * per_input
    # all inputs go out; the last one is still there when backward begins
    assert stream.copies == (3 * per_input + 1) * (2 * LAYERS - 1)


def test_a_stream_that_nobody_waits_for_would_be_noticed(streams: list[ThreadStream]) -> None:
    plain = adapted()
    enable_checkpointing(plain)
    model, _ = offloaded(streams, CarelessStream())
    found = gradients(model)
    assert not equal(found, gradients(plain))
    streams[0].close()  # now the copies run
    assert streams[0].dead


def test_a_graph_that_is_dropped_gives_its_memory_back(streams: list[ThreadStream]) -> None:
    model, chunks = offloaded(streams)
    first = gradients(model)
    allocated = chunks.allocated
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        del loss
    assert equal(gradients(model), first)
    # the last input of a dropped graph stays until the next pass begins
    assert chunks.allocated <= allocated + allocated // LAYERS
    assert not streams[0].dead


def test_few_inputs_are_on_the_device_at_a_time(streams: list[ThreadStream]) -> None:
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
