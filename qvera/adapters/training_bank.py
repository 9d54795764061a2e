"""Many adapters in training: their vectors as rows of one tensor, and batches whose rows name their adapters.

`multi_adapter` has the same for answers. Here an adapter is a row of ``vectors`` [slots, numbers], and its gradient a
row of ``gradients``: clipping and the optimizer's step are then operations on rows, whatever the number of layers. What
a layer uses are views of columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from qvera.adapters.files.save_load import named_vectors
from qvera.adapters.layer import QveraLinear
from qvera.adapters.multi_adapter import add_own_paths, base_output
from qvera.adapters.products.row_vectors import TokenSlots
from qvera.adapters.vector_layout import VectorLayout
from qvera.utils import accelerator

if TYPE_CHECKING:
    from peft import PeftModel


class _TakeRows(torch.autograd.Function):
    """Rows of a bank's view. Backward adds to the bank's gradients; autograd would first make one of all slots."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, view: torch.Tensor, gradients: torch.Tensor | None, index: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients, ctx.index = gradients, index  # type: ignore[attr-defined]
        return view.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[None, None, None]:
        ctx.gradients.index_add_(0, ctx.index, g)  # type: ignore[attr-defined]
        return None, None, None


class TrainingBank:
    """The vectors of the adapters that are trained together, all of one method, rank and seed.

    Attributes:
        slots: how many adapters there is room for.
        numbers, trained_numbers: how many numbers an adapter has, and how many of them are trained.
        layout: which columns of a row are which tensor.
        vectors: fp32 [slots, numbers], those that are trained first.
        gradients: fp32 [slots, trained_numbers]; backward adds to them.
        initial: fp32 [numbers], what an adapter starts from.
    """

    def __init__(self, model: PeftModel, slots: int, adapter: str = "default") -> None:
        """Make room for ``slots`` adapters.

        Args:
            model: with one ordinary VeRA adapter, whose vectors are what every adapter starts from. It is not trained
                afterwards.
            slots: at least one.
            adapter: its name.
        """
        self.slots, self.adapter = slots, adapter
        named = named_vectors(model, adapter)
        trained = [key for key, vector in named.items() if vector.requires_grad]
        frozen = [key for key in named if key not in set(trained)]
        self.layout = VectorLayout({key: tuple(named[key].shape) for key in (*trained, *frozen)})
        self.numbers = self.layout.numbers
        self.trained_numbers = sum(named[key].numel() for key in trained)
        self.device = next(iter(named.values())).device
        self.initial = torch.cat([named[key].detach().reshape(-1) for key in self.layout.columns])
        self.vectors = self.initial.repeat(slots, 1)
        self.gradients = torch.zeros(slots, self.trained_numbers, device=self.device)
        for vector in named.values():
            vector.requires_grad_(False)
        self._ordinary = named
        self._layers: list[QveraLinear] = []
        self._of_layer: dict[str, dict[str, nn.Parameter]] = {}
        for name, module in model.named_modules():
            if isinstance(module, QveraLinear) and module.carries(adapter):
                self._layers.append(module)
                kinds = module.vectors(adapter)
                self._of_layer[module.spec.name] = {kind: self._view(f"{name}.{kind}") for kind in kinds}

    def _view(self, key: str) -> nn.Parameter:
        """One tensor of all adapters [slots, ...], which shares memory with `vectors` and its gradient with theirs."""
        columns = self.layout.columns[key]
        is_trained = columns.start < self.trained_numbers
        view = nn.Parameter(columns.of(self.vectors), requires_grad=is_trained)
        if is_trained:
            view.grad = columns.of(self.gradients)
        return view

    def start(self, slot: int) -> None:
        """Begin a new adapter in a slot: the initial vectors and no gradient."""
        self.vectors[slot].copy_(self.initial)
        self.gradients[slot].zero_()

    def put(self, slot: int, vectors: Mapping[str, torch.Tensor]) -> None:
        """Put an adapter's vectors into a slot, by their keys in an adapter file, without a gradient.

        Raises:
            ValueError: a key is missing or unknown, or a shape is another one.
        """
        self.layout.put(self.vectors[slot], vectors)
        self.gradients[slot].zero_()

    def take(self, slot: int) -> dict[str, torch.Tensor]:
        """A copy of an adapter's vectors, by their keys in an adapter file."""
        return self.layout.take(self.vectors[slot])

    @contextlib.contextmanager
    def rows(self, slots: Sequence[int], tokens: Sequence[int]) -> Iterator[None]:
        """A context in which row i of a batch uses the adapter in ``slots[i]``.

        The forward pass and its backward have to run within it: a checkpointed layer computes its forward pass again.
        Where all rows are of one adapter, the layers take the path that they take for an adapter alone.

        Args:
            slots: of each row's adapter.
            tokens: of each row, padding included. Rows stand in a padded batch, or one behind the other in a sequence.
        """
        taken = sorted(set(slots))
        if len(taken) == 1:
            with self._alone(taken[0]):
                yield
            return
        arrays = {"slots": taken, "index": np.repeat(np.searchsorted(taken, slots), tokens)}
        sent = accelerator.tensors_on(self.device, {k: np.asarray(v, dtype=np.int64) for k, v in arrays.items()})
        of_tokens = TokenSlots(sent["index"], len(taken))

        def forward(layer: QveraLinear, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            return self._forward(layer, sent["slots"], of_tokens, x, *args, **kwargs)

        try:
            for layer in self._layers:
                layer._row_forward = forward
            yield
        finally:
            for layer in self._layers:
                layer._row_forward = None

    @contextlib.contextmanager
    def _alone(self, slot: int) -> Iterator[None]:
        """The ordinary adapter's vectors are those of a slot, and backward adds to the slot's gradients."""
        before = {key: parameter.data for key, parameter in self._ordinary.items()}
        try:
            for key, parameter in self._ordinary.items():
                columns = self.layout.columns[key]
                parameter.data = columns.of(self.vectors[slot])
                if columns.start < self.trained_numbers:
                    parameter.requires_grad_(True)
                    parameter.grad = columns.of(self.gradients[slot])
            yield
        finally:
            for key, parameter in self._ordinary.items():
                parameter.grad = None
                parameter.requires_grad_(False)
                parameter.data = before[key]

    def _forward(
        self,
        layer: QveraLinear,
        slots: torch.Tensor,
        tokens: TokenSlots,
        x: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        if x.shape[:-1].numel() != len(tokens.index):
            raise ValueError(f"a pass of {len(tokens.index)} tokens got {x.shape[:-1].numel()}")
        result = base_output(layer, x, *args, **kwargs)
        if layer.disable_adapters:
            return result
        own = {kind: _TakeRows.apply(view, view.grad, slots) for kind, view in self._of_layer[layer.spec.name].items()}
        return add_own_paths(layer, x, result, own, layer.qvera_projection[self.adapter], tokens)
