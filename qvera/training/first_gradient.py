"""The start of methods that are made from the first gradient (`Method.from_gradient`), before the first step.

The rows are the first ``adapter.gradient_rows`` that the run trains on, and the loss is the sum over their trained
tokens: each token counts the same, as in a step of that many rows. The frozen weights' gradients are added up for as
many linears at a time as a quarter of the free memory holds, each time in one pass over the rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qvera.adapters.hooks import SCHEDULES, TrainingHook
from qvera.adapters.layer import QveraLinear
from qvera.adapters.methods import method_of
from qvera.adapters.products.weight_gradients import collected
from qvera.adapters.projection import forget_inputs
from qvera.models.loader import causal_model
from qvera.training.optim import current_rate
from qvera.utils import memory
from qvera.utils.errors import RunFailed
from qvera.utils.status_line import status_line

if TYPE_CHECKING:
    from qvera.data import Batches
    from qvera.training.session import TrainingSession

_SHARE_OF_FREE_MEMORY = 4


def start_from_gradient(session: TrainingSession) -> None:
    """Give the adapter its start. All ranks call it together; each takes its share of the rows.

    Raises:
        InputError: memory does not suffice for it.
        RunFailed: a gradient is not finite.
    """
    section: Any = session.recipe.adapter
    group = session.group
    layers = {name: m for name, m in session.model.named_modules() if isinstance(m, QveraLinear)}
    rows = _first_rows(session.batches, max(session.steps, session.batches.per_epoch), section.gradient_rows)
    method, rate = method_of(section), current_rate(session.schedule)
    parts = _parts(layers, memory.available_bytes(session.device) // _SHARE_OF_FREE_MEMORY)
    with status_line(session.console, "Gradient of the first rows") as update, _base_alone(session.model, layers):
        for number, part in enumerate(parts):

            def show(share: float, number: int = number) -> None:
                update(f"Gradient of the first {len(rows)} rows: {(number + share) / len(parts):.0%}")

            gradients = _gradients(session, {name: layer.base_layer for name, layer in part.items()}, rows, show)
            for name, layer in part.items():
                gradient = gradients.pop(name)
                group.all_reduce([gradient])
                if not torch.isfinite(gradient).all():
                    raise RunFailed(f"{name}: its gradient over the first {len(rows)} rows has NaN or Inf.")
                config = layer.qvera_settings["default"][1]
                made = method.from_gradient(config, layer.spec, gradient, rate)
                made = group.broadcast_tensors({kind: tensor.cpu() for kind, tensor in made.items()})
                with torch.no_grad():
                    for kind, vector in layer.vectors("default").items():
                        vector.copy_(made[kind])


def _gradients(
    session: TrainingSession, linears: dict[str, nn.Module], rows: list[int], show: Callable[[float], None]
) -> dict[str, torch.Tensor]:
    """The sums of these linears' gradients over this rank's rows."""
    train = session.datasets.train

    def in_passes(passes: list[list[int]]) -> dict[str, torch.Tensor]:
        with collected(causal_model(session.model), linears) as gradients:
            for done, micro in enumerate(passes):
                show(done / len(passes))
                if micro:
                    session.nll([train[i] for i in micro])[0].backward()
        return gradients

    return session.over_passes(rows, in_passes, "The gradient of the first rows")


def _first_rows(batches: Batches, steps: int, most: int) -> list[int]:
    """The first ``most`` rows that so many steps train on, each once, in the order that they come in."""
    found: dict[int, None] = {}
    for step in range(steps):
        if len(found) >= most:
            break
        found |= dict.fromkeys(batches.rows(step))
    return list(found)[:most]


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


class FirstGradientHook(TrainingHook):
    """`start_from_gradient` before the first step."""

    def start(self, training: TrainingSession) -> None:
        """See `TrainingHook.start`."""
        start_from_gradient(training)


def _hook(training: Any) -> FirstGradientHook | None:
    section = training.recipe.adapter
    return FirstGradientHook() if method_of(section).starts_from_gradient and section.init_from is None else None


SCHEDULES["first_gradient"] = _hook
