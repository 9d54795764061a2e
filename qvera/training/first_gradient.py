"""The start of methods that are made from the first gradient (`Method.from_gradient`), before the first step.

The rows are the first ``adapter.gradient_rows`` that the run trains on, and the loss is the sum over their trained
tokens: each token counts the same, as in a step of that many rows. The frozen weights' gradients are added up for as
many linears at a time as a quarter of the free memory holds, each time in one pass over the rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from qvera.adapters.layer import QveraLinear
from qvera.adapters.methods import method_of
from qvera.adapters.products.weight_gradients import collected
from qvera.adapters.projection import forget_inputs
from qvera.models.loader import causal_model
from qvera.training.optim import current_rate
from qvera.utils import memory
from qvera.utils.errors import InputError, RunFailed
from qvera.utils.status_line import status_line

if TYPE_CHECKING:
    from qvera.training.session import TrainingSession

_SHARE_OF_FREE_MEMORY = 4


def start_from_gradient(session: TrainingSession) -> None:
    """Give the adapter its start. All ranks call it together; each takes its share of the rows.

    Raises:
        InputError: the base is sharded (ZeRO-3).
        RunFailed: a gradient is not finite.
    """
    section, group, train = session.recipe.adapter, session.group, session.datasets.train
    if session.sharder is not None:
        raise InputError(
            f"adapter.method: {section.method} starts from gradients of whole weights, and ZeRO-3 shards them. Use "
            "deepspeed: zero1, zero2 or none."
        )
    layers = {name: m for name, m in session.model.named_modules() if isinstance(m, QveraLinear)}
    rows = session.batches.epoch_order(0)[: section.gradient_rows].tolist()
    passes = session.batches.passes(rows, group.rank, group.world_size)
    method, rate = method_of(section), current_rate(session.schedule)
    parts = _parts(layers, memory.available_bytes(session.device) // _SHARE_OF_FREE_MEMORY)
    with status_line(session.console, "Gradient of the first rows") as update, _base_alone(session.model, layers):
        for number, part in enumerate(parts):
            linears = {name: layer.base_layer for name, layer in part.items()}
            with collected(causal_model(session.model), linears) as gradients:
                for done, micro in enumerate(passes):
                    share = (number + done / len(passes)) / len(parts)
                    update(f"Gradient of the first {len(rows)} rows: {share:.0%}")
                    if micro:
                        session.nll([train[i] for i in micro])[0].backward()
            for name, layer in part.items():
                gradient = gradients.pop(name)
                group.all_reduce([gradient])
                if not torch.isfinite(gradient).all():
                    raise RunFailed(f"{name}: its gradient over the first {len(rows)} rows has NaN or Inf.")
                config = layer.qvera_settings["default"][1]
                made = method.from_gradient(config, layer.place, gradient, rate)
                made = group.broadcast_tensors({kind: tensor.cpu() for kind, tensor in made.items()})
                with torch.no_grad():
                    for kind, vector in layer.vectors("default").items():
                        vector.copy_(made[kind])


def _parts(layers: dict[str, QveraLinear], most_bytes: int) -> list[dict[str, QveraLinear]]:
    """The layers, in order, in groups whose weights' gradients take so many bytes together; one layer at least."""
    parts: list[dict[str, QveraLinear]] = []
    room = 0
    for name, layer in layers.items():
        size = 4 * layer.in_features * layer.out_features
        if not parts or size > room:
            parts.append({})
            room = most_bytes
        parts[-1][name] = layer
        room -= size
    return parts


@contextlib.contextmanager
def _base_alone(model: nn.Module, layers: dict[str, QveraLinear]) -> Iterator[None]:
    """The base without its adapter, in the mode in which layers are recomputed."""
    was_training = model.training
    # PEFT, asked for the base within a pass (a loss with a reference), freezes vectors of layers that are off already
    vectors = [vector for layer in layers.values() for vector in layer.tensors("default").values()]
    trained = [vector.requires_grad for vector in vectors]
    try:
        for layer in layers.values():
            layer._disable_adapters = True
        model.train()
        yield
    finally:
        for layer in layers.values():
            layer._disable_adapters = False
        for vector, requires_grad in zip(vectors, trained, strict=True):
            vector.requires_grad_(requires_grad)
        model.train(was_training)
        forget_inputs(model)
