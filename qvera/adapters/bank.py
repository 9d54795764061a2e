"""Many adapters on one model: each is a slot of an `AdapterBank`, and each token of a batch says which slot it uses.

A thousand adapters as PEFT would hold them are 420,000 parameters for a model of 210 linears. Here the adapters of one
shape are one fp32 tensor [slots, numbers]: clipping and the optimizer's step are operations on it, whatever the number
of layers, and a layer uses views of its columns. Training, answers in a batch and the server share it. A batch costs
one low-rank product for each bank in it, whatever the number of adapters (`MixedForward`).

A bank does not know how its adapters compute: that is the path of their method (`_PATHS`). VeRA's goes through the pair
that all adapters of a seed share; adapters with matrices of their own are one path more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.autograd.function import FunctionCtx, once_differentiable

from qvera.adapters.config import PREFIX, QveraConfig
from qvera.adapters.files.save_load import named_vectors
from qvera.adapters.layer import QveraLinear
from qvera.adapters.methods import LinearSpec, method_of
from qvera.adapters.products.slots import TokenSlots, expand_slots, scale_slots
from qvera.adapters.projection import vera_scale
from qvera.models import linear
from qvera.utils import accelerator
from qvera.utils.errors import InputError


def _vera_path(
    layer: QveraLinear,
    adapter: str,
    x: torch.Tensor,
    y: torch.Tensor,
    tensors: Mapping[str, torch.Tensor],
    tokens: TokenSlots | None,
) -> torch.Tensor:
    """y + b_i ⊙ B (s d_i ⊙ A (a_i ⊙ x_i)) for the slot i of each token, through the pair of ``adapter``."""
    pair, dtype = layer.qvera_projection[adapter], linear.compute_dtype(layer.base_layer, x)
    rank = tensors["qvera_d"].shape[-1]
    inner = scale_slots(x.to(dtype), tensors["qvera_a"], tokens) if "qvera_a" in tensors else x
    z = pair.project(inner, rank, dtype)  # shared by q, k and v, which read the same x, where there is no a
    scale, B = vera_scale(rank, layer.in_features), pair.B[: layer.out_features, :rank]
    return expand_slots(y, z, tensors["qvera_d"], tensors["qvera_b"], B, scale, tokens)


_PATHS = {"vera": _vera_path}
"""Method → the output y [..., m] of a layer with the adapter of each token; those of the type VERA have one.

It is given the layer, the name of the ordinary adapter that stands for the bank, x [..., n], W x, the tensors of the
slots by kind [R, ...], and the slot of each token (None: R is 1)."""


class Columns(NamedTuple):
    """Where one tensor of an adapter lies among its numbers."""

    start: int
    shape: tuple[int, ...]

    def of(self, numbers: torch.Tensor) -> torch.Tensor:
        """The tensor in one slot [numbers] of a bank, or in all of them [slots, numbers]: a view of this shape."""
        part = numbers[..., self.start : self.start + math.prod(self.shape)]
        return part.view(*numbers.shape[:-1], *self.shape)


class VectorLayout:
    """The columns of an adapter's tensors, one after the other.

    Attributes:
        columns: key in an adapter file → its columns.
        numbers: how many numbers an adapter has.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """``shapes``: key → shape, in the order of the columns."""
        self.columns: dict[str, Columns] = {}
        self.numbers = 0
        for key, shape in shapes.items():
            self.columns[key] = Columns(self.numbers, tuple(shape))
            self.numbers += math.prod(shape)

    def pack(self, vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """An adapter's vectors, by their keys in an adapter file, as fp32 [numbers].

        Raises:
            ValueError: a key is missing or unknown, or a shape is another one.
        """
        if set(vectors) != set(self.columns):
            wrong = sorted(set(vectors) ^ set(self.columns))
            raise ValueError(f"these vectors are not those of an adapter of this model: {', '.join(wrong[:3])}")
        for key, columns in self.columns.items():
            if tuple(vectors[key].shape) != columns.shape:
                raise ValueError(f"{key} has the shape {tuple(vectors[key].shape)}, not {columns.shape}")
        return torch.cat([vectors[key].detach().reshape(-1).float() for key in self.columns])


class AdapterShape(NamedTuple):
    """What the adapters of a bank have in common: which numbers they have, and what these mean."""

    method: str
    seed: int
    rank: int
    b_groups: int
    input_scale: bool
    linears: tuple[str, ...]
    """The names of the adapted linears in the base model."""

    @property
    def config(self) -> QveraConfig:
        """Of a fresh adapter of this shape. Put on a model, it makes the layers and draws the pair."""
        return QveraConfig(
            method=self.method,
            rank=self.rank,
            b_groups=self.b_groups,
            input_scale=self.input_scale,
            projection_seed=self.seed,
            target_modules=set(self.linears),
            task_type="CAUSAL_LM",
        )

    def layout(self, specs: Mapping[str, LinearSpec]) -> VectorLayout:
        """The columns of such an adapter. ``specs``: the linears of the base, by name."""
        config = self.config
        tensors = {name: method_of(config).tensors(config, specs[name]) for name in self.linears}
        return VectorLayout(
            {f"{PREFIX}{name}.{kind}": shape for name, kinds in tensors.items() for kind, shape in kinds.items()}
        )


def shape_of(
    config: QveraConfig, vectors: Mapping[str, torch.Tensor], specs: Mapping[str, LinearSpec], directory: Path
) -> AdapterShape:
    """The shape of an adapter that was read from ``directory``, once it was found to fit the base.

    Args:
        config: the adapter's.
        vectors: its tensors by their keys in the file.
        specs: the linears of the base, by name.

    Raises:
        InputError: it has vectors of other linears or of other shapes, or was trained with other projections.
    """
    linears = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in vectors})
    expected: dict[str, tuple[int, ...]] = {}
    for name in linears:
        if name not in specs:
            raise InputError(f"{directory}: has vectors of {name}, which this base does not have.")
        shapes = method_of(config).tensors(config, specs[name])
        expected |= {f"{PREFIX}{name}.{kind}": shape for kind, shape in shapes.items()}
    given = {key: tuple(vector.shape) for key, vector in vectors.items()}
    for key in sorted(expected.keys() | given.keys()):
        if given.get(key) != expected.get(key):
            raise InputError(
                f"{directory}: {key} has the shape {given.get(key)}; this base and the adapter's config need "
                f"{expected.get(key)}."
            )
    if linears and config.projection_sha256 is not None:
        sizes = [(specs[name].in_features, specs[name].out_features) for name in linears]
        try:
            config.check_projection(*(max(side) for side in zip(*sizes, strict=True)))
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None
    settings = config.method, config.projection_seed, config.rank, config.b_groups, config.input_scale
    return AdapterShape(*settings, tuple(linears))


class _TakeSlots(torch.autograd.Function):
    """Slots of a bank's view. Backward adds to the bank's gradients; autograd would first make one of all slots."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, view: torch.Tensor, gradients: torch.Tensor | None, slots: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients, ctx.slots = gradients, slots  # type: ignore[attr-defined]
        return view.index_select(0, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[None, None, None]:
        ctx.gradients.index_add_(0, ctx.slots, g)  # type: ignore[attr-defined]
        return None, None, None


class AdapterBank:
    """The adapters of one shape.

    Attributes:
        slots: how many adapters there is room for. In a bank that is not trained slot 0 is of zeros, for tokens that
            use none of its adapters.
        adapter: the name of the ordinary adapter that stands for them.
        layers: those that it is on.
        layout: which columns are which tensor; those that are trained come first.
        numbers, trained_numbers: how many numbers an adapter has, and how many of them are trained.
        initial: fp32 [numbers], what an adapter in training starts from.
        vectors: fp32 [slots, numbers].
        gradients: fp32 [slots, trained_numbers]; backward adds to them.
    """

    def __init__(
        self, model: PeftModel, slots: int, adapter: str = "default", layout: VectorLayout | None = None
    ) -> None:
        """Make room for ``slots`` adapters.

        Args:
            model: with an ordinary adapter of the bank's shape. Where it is trained, so is the bank, and every adapter
                starts from its vectors. It is not trained itself afterwards.
            slots: at least one.
            adapter: its name.
            layout: None: that of its vectors, as they come in the model.
        """
        self.slots, self.adapter = slots, adapter
        named = named_vectors(model, adapter)
        trained = {key: vector for key, vector in named.items() if vector.requires_grad}
        if layout is None:
            layout = VectorLayout({key: vector.shape for key, vector in (trained | named).items()})
        self.layout, self.numbers = layout, layout.numbers
        self.trained_numbers = sum(vector.numel() for vector in trained.values())
        self.device = next(iter(named.values())).device
        self.initial = torch.cat([named[key].detach().reshape(-1) for key in layout.columns])
        if trained:
            self.vectors = self.initial.repeat(slots, 1)
        else:
            self.vectors = torch.zeros(slots, self.numbers, device=self.device)
        self.gradients = torch.zeros(slots, self.trained_numbers, device=self.device)
        for vector in named.values():
            vector.requires_grad_(False)
        self._ordinary = named
        self.layers: list[QveraLinear] = []
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, QveraLinear) and module.carries(adapter):
                self.layers.append(module)
                kinds = module.vectors(adapter)
                self._tensors[module.spec.name] = {kind: self._view(f"{name}.{kind}") for kind in kinds}
        self._path = _PATHS[model.peft_config[adapter].method]

    def _view(self, key: str) -> torch.Tensor:
        """One tensor of all adapters [slots, ...], which shares memory with `vectors` and its gradient with theirs."""
        columns = self.layout.columns[key]
        if columns.start >= self.trained_numbers:
            return columns.of(self.vectors)
        view = nn.Parameter(columns.of(self.vectors))
        view.grad = columns.of(self.gradients)
        return view

    def start(self, slot: int) -> None:
        """Begin a new adapter in a slot: the initial vectors and no gradient."""
        self.vectors[slot].copy_(self.initial)
        self.gradients[slot].zero_()

    def put(self, slot: int, vectors: Mapping[str, torch.Tensor] | torch.Tensor) -> None:
        """Put an adapter into a slot, by the keys of its file or packed (`VectorLayout.pack`), without a gradient.

        Raises:
            ValueError: a key is missing or unknown, or a shape is another one.
        """
        self.vectors[slot].copy_(vectors if isinstance(vectors, torch.Tensor) else self.layout.pack(vectors))
        self.gradients[slot].zero_()

    def take(self, slot: int) -> dict[str, torch.Tensor]:
        """A copy of an adapter's vectors, by their keys in an adapter file."""
        return {key: columns.of(self.vectors[slot]).clone() for key, columns in self.layout.columns.items()}

    def add(
        self,
        layer: QveraLinear,
        x: torch.Tensor,
        y: torch.Tensor,
        slots: slice | torch.Tensor | None,
        tokens: TokenSlots | None,
    ) -> torch.Tensor:
        """The output of a layer with the adapter of each token: y is without it.

        Args:
            layer: any adapted linear; one that the bank's adapters are not on adds nothing.
            x: its input.
            y: the output so far.
            slots: the slots that ``tokens`` counts; None: all of the bank. A tensor's get gradients.
            tokens: the place of each token's slot among them; None: there is one.
        """
        tensors = self._tensors.get(layer.spec.name)
        if tensors is None:
            return y
        if isinstance(slots, slice):
            tensors = {kind: view[slots] for kind, view in tensors.items()}
        elif slots is not None:
            tensors = {kind: _TakeSlots.apply(view, view.grad, slots) for kind, view in tensors.items()}
        return self._path(layer, self.adapter, x, y, tensors, tokens)

    @contextlib.contextmanager
    def rows(self, slots: Sequence[int], tokens: Sequence[int]) -> Iterator[None]:
        """A context in which row i of a batch uses the adapter in ``slots[i]``.

        The forward pass and its backward have to run within it: a checkpointed layer computes its forward pass again.
        Where all rows are of one adapter, the layers take the path that they take for an adapter alone.

        Args:
            slots: of each row's adapter.
            tokens: of each row, padding included. Rows stand in a padded batch, or one behind the other in a sequence.
        """
        if len(set(slots)) == 1:
            with self._alone(slots[0]):
                yield
            return
        mixed = MixedForward(self.device)
        mixed.use([(self, slot) for slot in slots], tokens)
        with mixed.installed(self.layers):
            yield

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


User: TypeAlias = tuple[AdapterBank, int] | str | None
"""Who uses a token: a slot of a bank, an ordinary adapter of the model by its name, or nobody, which is the base."""


@dataclass
class _Part:
    """The tokens of a batch that use adapters of one bank, and which."""

    bank: AdapterBank
    slots: slice | torch.Tensor | None  # see `AdapterBank.add`
    count: int  # of these slots
    index: torch.Tensor | None  # the place of each token's slot, or of each row's; None: there is one
    tokens: dict[int, TokenSlots] = field(default_factory=dict)

    def slots_of(self, x: torch.Tensor) -> TokenSlots | None:
        if self.index is None:
            return None
        total, known = x.shape[:-1].numel(), len(self.index)
        if total not in self.tokens:
            each = self.index if total == known else self.index.repeat_interleave(total // known)
            self.tokens[total] = TokenSlots(each, self.count)
        return self.tokens[total]


class MixedForward:
    """The forward pass of layers in a batch whose tokens use different adapters, as `use` said last."""

    def __init__(self, device: torch.device) -> None:
        """``device``: the model's."""
        self._device = device
        self._parts: list[_Part] = []
        self._ordinary: list[tuple[str, torch.Tensor | None]] = []
        self._rows: int | None = None  # where rows of one length were named
        self._tokens: int | None = None  # where tokens were counted

    def use(self, users: Sequence[User], tokens: Sequence[int] | None = None) -> None:
        """Say which adapters the tokens of the next forward passes use, in the order of the flattened batch.

        Args:
            users: of each run of neighbouring tokens. Where a bank is trained, all are its own.
            tokens: of each of these runs; None: they are the rows of the batch, and equally long.
        """
        self._parts, self._ordinary = [], []
        self._rows, self._tokens = (len(users), None) if tokens is None else (None, sum(tokens))
        for bank in dict.fromkeys(user[0] for user in users if isinstance(user, tuple)):
            index = np.array([u[1] if isinstance(u, tuple) and u[0] is bank else 0 for u in users], dtype=np.int64)
            arrays, count = {"index": index}, bank.slots
            if bank.trained_numbers:  # backward then sums up for those slots alone that have tokens
                arrays["slots"], arrays["index"] = np.unique(index, return_inverse=True)
                count = len(arrays["slots"])
            elif (index == index[0]).all():
                self._parts.append(_Part(bank, slice(int(index[0]), int(index[0]) + 1), 1, None))
                continue
            if tokens is not None:
                arrays["index"] = np.repeat(arrays["index"], tokens)
            sent = accelerator.tensors_on(self._device, arrays)
            self._parts.append(_Part(bank, sent.get("slots"), count, sent["index"]))
        for name in dict.fromkeys(user for user in users if isinstance(user, str)):
            rows = np.array([i for i, user in enumerate(users) if user == name], dtype=np.int64)
            everywhere = len(rows) == len(users)
            sent = {} if everywhere else accelerator.tensors_on(self._device, {"rows": rows})
            self._ordinary.append((name, sent.get("rows")))

    @contextlib.contextmanager
    def installed(self, layers: Sequence[QveraLinear]) -> Iterator[None]:
        """A context in which these layers go this way."""
        try:
            for layer in layers:
                layer.mixed = self
            yield
        finally:
            for layer in layers:
                layer.mixed = None

    def forward(self, layer: QveraLinear, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """base(x), and for each token of x [..., n] what its own adapter adds.

        Raises:
            ValueError: adapters are merged into the base, or the batch has another number of rows or tokens.
        """
        rows, total = self._rows, x.shape[:-1].numel()
        if rows is not None and x.dim() == 2 and len(x) != rows and len(x) % rows == 0:
            # the MLPs of some models (OPT, Llama 4) get [rows · tokens, n]
            return self.forward(layer, x.view(rows, -1, x.shape[-1]), *args, **kwargs).flatten(0, 1)
        if rows is not None and len(x) != rows:
            raise ValueError(f"adapter_names: has {rows} names for a batch of {len(x)} rows.")
        if rows is None and any(part.index is not None for part in self._parts) and total != self._tokens:
            raise ValueError(f"a pass of {self._tokens} tokens got {total}")
        if layer.merged:
            raise ValueError("adapter_names: adapters are merged into the base weights; unmerge them first.")
        if layer.holds_inference_weight and not layer._inference_adapters and not torch.is_grad_enabled():
            y = layer.inference_product(x)
        else:
            y = layer.base_layer(x, *args, **kwargs)
        if layer.disable_adapters:
            return y
        for part in self._parts:
            y = part.bank.add(layer, x, y, part.slots, part.slots_of(x))
        for name, mine in self._ordinary:
            if not layer.carries(name):
                continue
            if mine is None:
                y = layer.add_adapter(name, x, y)
            else:
                y = y.index_copy(0, mine, layer.add_adapter(name, x[mine], y[mine]))
        return y
