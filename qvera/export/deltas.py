"""An adapter directory → the factors of ΔW for each weight it changes, without loading the base model's weights.

QVERA adapters and adapters of PEFT's own VeRA (with their projections in the file, or only their seed) read alike.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from peft.tuners.vera.model import _kaiming_init
from transformers.pytorch_utils import Conv1D

from ..attached import read_adapter
from ..errors import InputError
from ..skeleton import skeleton as skeleton
from ..vera.functional import delta_weight, times_b
from ..vera.layer import layer_shape
from ..vera.projection import uniform_pair, vera_scale

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in an adapter file."""


@dataclasses.dataclass
class Delta:
    """ΔW = diag(b) B diag(s d) A diag(a) of one adapted weight, in factors; A and B are views of the shared pair.

    b [m], or [groups, m]; a [n], or None for ones (`qvera.vera.functional`).
    """

    A: torch.Tensor
    B: torch.Tensor
    d: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool
    a: torch.Tensor | None = None

    def right(self, columns: slice = slice(None)) -> torch.Tensor:
        """Columns of A diag(a) [r, n]."""
        return self.A[:, columns] if self.a is None else self.A[:, columns] * self.a[columns]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.B.shape[0], self.A.shape[1]

    def lora(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A' = diag(s d) A diag(a) [r, n] and B' = diag(b) B [m, r] in fp32: ΔW = B' A'."""
        return (self.d * self.scale).unsqueeze(1) * self.right(), times_b(self.B, self.b)

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Rows [first, first + count) of `weight`."""
        part = slice(first, first + count)
        if self.transposed:
            return delta_weight(self.right(part), self.B, self.d, self.b, self.scale).t().contiguous()
        change = delta_weight(self.A, self.B[part], self.d, self.b[..., part], self.scale)
        return (
            change if self.a is None else change.mul_(self.a)
        )  # some rows at a time: cheaper than A diag(a) for each of them

    def weight(self) -> torch.Tensor:
        """ΔW [out, in] fp32, or [in, out] for a Conv1D."""
        delta = delta_weight(self.right(), self.B, self.d, self.b, self.scale)
        return delta.t() if self.transposed else delta


@dataclasses.dataclass
class AdapterDeltas:
    """All of an adapter: its config, the pair at full size, and module name → `Delta`."""

    config: Any
    A: torch.Tensor
    B: torch.Tensor
    layers: dict[str, Delta]

    @property
    def groups(self) -> int:
        """How many b each layer has."""
        return getattr(self.config, "b_groups", 1)

    @property
    def input_scale(self) -> bool:
        """Whether each layer has an a."""
        return getattr(self.config, "input_scale", False)


def read_deltas(adapter_dir: Path, base: torch.nn.Module) -> AdapterDeltas:
    """Read an adapter for the model that ``base`` is (a skeleton will do), with every shape checked.

    Raises:
        InputError: it is no VeRA adapter, or another model's.
    """
    config, tensors = read_adapter(adapter_dir)
    names = _StockNames if config.peft_type != "QVERA" else _OwnNames
    A, B = _stock_pair(config, tensors, base) if names is _StockNames else _own_pair(config)
    rank = A.shape[0]
    modules = dict(base.named_modules())
    layers: dict[str, Delta] = {}
    for name in sorted({k.removeprefix(PREFIX).rpartition(".")[0] for k in tensors if k.startswith(PREFIX)}):
        d, b = tensors.get(f"{PREFIX}{name}.{names.d}"), tensors.get(f"{PREFIX}{name}.{names.b}")
        if d is None or b is None:
            raise InputError(f"{adapter_dir}: has no {names.d if d is None else names.b} for {name}.")
        shape = layer_shape(modules[name]) if name in modules else None
        if shape is None:
            raise InputError(
                f"{adapter_dir}: changes {name}, which the base model does not have as a linear layer: it is another "
                "model's adapter."
            )
        in_features, out_features = shape
        a = tensors.get(f"{PREFIX}{name}.qvera_a")
        if (a is not None) != getattr(config, "input_scale", False) or (a is not None and a.numel() != in_features):
            raise InputError(
                f"{adapter_dir}: its qvera_a of {name} is not what its config (input_scale) and the base ({in_features} inputs) "
                "ask for: the file is damaged, or another model's adapter."
            )
        groups = getattr(config, "b_groups", 1)
        expected = (out_features,) if groups == 1 else (groups, out_features)
        if b.shape != expected or in_features > A.shape[1] or out_features > B.shape[0] or d.numel() != rank:
            raise InputError(
                f"{adapter_dir}: {name} has shape {[out_features, in_features]} in the base, but the adapter has b of "
                f"{list(b.shape)} for it (expected {list(expected)}) and a pair of {list(A.shape)} and {list(B.shape)}: "
                "another model's adapter."
            )
        scale = vera_scale(rank, in_features) if names is _OwnNames else 1.0
        transposed = isinstance(modules[name], Conv1D)
        a = None if a is None else a.float()
        layers[name] = Delta(A[:, :in_features], B[:out_features], d.float(), b.float(), scale, transposed, a)
    if not layers:
        raise InputError(f"{adapter_dir}: has no vectors in it.")
    return AdapterDeltas(config, A, B, layers)


class _OwnNames:
    d, b = "qvera_d", "qvera_b"


class _StockNames:
    d, b = "vera_lambda_d", "vera_lambda_b"


def _own_pair(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    largest = config.projection_shapes
    if not largest:
        raise InputError("the adapter's config has no projection_shapes: it was not written by qvera's save.")
    pair = uniform_pair(config.rank, largest["A"][1], largest["B"][0], config.projection_seed)
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


def _stock_pair(
    config: Any, tensors: dict[str, torch.Tensor], base: torch.nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's pair: from the file, else drawn by PEFT's own function in PEFT's order (first A, then B)."""
    if "base_model.vera_A" in tensors:
        return tensors["base_model.vera_A"].float(), tensors["base_model.vera_B"].float()
    modules = dict(base.named_modules())
    names = {k.removeprefix(PREFIX).rpartition(".")[0] for k in tensors}
    shapes = [shape for name in names if name in modules and (shape := layer_shape(modules[name])) is not None]
    if not shapes:
        raise InputError("the adapter changes no linear layer of this base: it is another model's adapter.")
    generator = torch.Generator(device="cpu").manual_seed(config.projection_prng_key)
    A = _kaiming_init((config.r, max(n for n, _ in shapes)), generator=generator)
    return A, _kaiming_init((max(m for _, m in shapes), config.r), generator=generator)
