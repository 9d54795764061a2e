"""Many adapters on one model: each is a slot of an `AdapterBank`, and each token of a batch names its slot.

The adapters of one shape are one fp32 tensor [slots, numbers], and layers use views of its columns. So clipping and the
optimizer's step are a few operations, where a thousand PEFT adapters on 210 linears would be 420,000 parameters.
A batch costs one low-rank product for each bank, whatever the number of adapters (`MixedForward`); adapters that have
A and B of their own cost one for each adapter of the batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from qvera.adapters.config import PREFIX, QveraConfig
from qvera.adapters.layer import QveraLinear
from qvera.adapters.methods import LinearSpec, method_of
from qvera.adapters.products.slots import PATHS, TokenSlots, lora_slots
from qvera.adapters.save_load import named_vectors
from qvera.kernels import once_differentiable
from qvera.utils import accelerator
from qvera.utils.errors import InputError

if TYPE_CHECKING:
    from qvera.adapters.tuner import QveraExperts
    from qvera.models.experts import Routing


class Columns(NamedTuple):
    """The place of one tensor among an adapter's numbers."""

    start: int
    shape: tuple[int, ...]

    def of(self, numbers: Tensor) -> Tensor:
        """A view of this tensor, from one slot [numbers] or all slots [slots, numbers]."""
        part = numbers[..., self.start : self.start + math.prod(self.shape)]
        return part.view(*numbers.shape[:-1], *self.shape)


class VectorLayout:
    """The columns of an adapter's tensors, one after the other, by their keys in an adapter file."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.columns: dict[str, Columns] = {}
        self.numbers = 0
        for key, shape in shapes.items():
            self.columns[key] = Columns(self.numbers, tuple(shape))
            self.numbers += math.prod(shape)

    def pack(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Flatten an adapter's vectors to fp32 [numbers]; ValueError if keys or shapes are wrong."""
        if wrong := sorted(set(vectors) ^ set(self.columns)):
            raise ValueError(f"these vectors are not those of an adapter of this model: {', '.join(wrong[:3])}")
        for key, columns in self.columns.items():
            if tuple(vectors[key].shape) != columns.shape:
                raise ValueError(f"{key} has the shape {tuple(vectors[key].shape)}, not {columns.shape}")
        return torch.cat([vectors[key].detach().reshape(-1).float() for key in self.columns])


class AdapterShape(NamedTuple):
    """The settings that all adapters of a bank have in common."""

    method: str
    seed: int
    rank: int
    b_groups: int
    input_scale: bool
    experts: str
    linears: tuple[str, ...]
    """The names of the adapted linears in the base model."""

    @property
    def config(self) -> QveraConfig:
        """The config of a fresh adapter of this shape."""
        return QveraConfig(
            method=self.method,
            rank=self.rank,
            b_groups=self.b_groups,
            input_scale=self.input_scale,
            experts=self.experts,
            projection_seed=self.seed,
            target_modules=set(self.linears),
            task_type="CAUSAL_LM",
        )

    def layout(self, specs: Mapping[str, LinearSpec]) -> VectorLayout:
        """The columns of an adapter of this shape. ``specs``: the base's linears by name."""
        return _layout(self.config, self.linears, specs)


def fit_to_bank(
    config: QveraConfig, vectors: Mapping[str, Tensor], specs: Mapping[str, LinearSpec], directory: Path
) -> tuple[AdapterShape, Mapping[str, Tensor]]:
    """Return the shape of the adapter in ``directory``, and its vectors as a bank of that shape holds them.

    ``specs`` are the base's linears by name. A LoRA's rank is filled up with zeros to the next power of two, so that
    there are few shapes, and B takes its scale.

    InputError: its linears, shapes or projections do not fit the base.
    """
    linears = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in vectors})
    for name in linears:
        if name not in specs:
            raise InputError(f"{directory}: has vectors of {name}, which this base does not have.")
    method = method_of(config)
    expected = {key: columns.shape for key, columns in _layout(config, linears, specs).columns.items()}
    given = {key: tuple(vector.shape) for key, vector in vectors.items()}
    for key in sorted(expected.keys() | given.keys()):
        if given.get(key) != expected.get(key):
            raise InputError(
                f"{directory}: {key} has the shape {given.get(key)}; this base and the adapter's config need "
                f"{expected.get(key)}."
            )
    if method.peft_type == "LORA":
        # a bank has one scale; in a file α and the rank, and so the scale, may differ from linear to linear
        scaled = dict(vectors)
        for name in linears:
            pair = {kind: vectors[f"{PREFIX}{name}.{kind}"] for kind in ("qvera_A", "qvera_B")}
            factors = method.factors(config, specs[name], pair, None)
            scaled[f"{PREFIX}{name}.qvera_B"] = factors.B * factors.scale
        return sum_of_loras(linears, [scaled], [1.0])
    settings = config.method, config.projection_seed, config.rank, config.b_groups, config.input_scale, config.experts
    if linears and config.projection_sha256 is not None:
        sizes = [(specs[name].in_features, specs[name].out_features) for name in linears]
        try:
            config.check_projection(*(max(side) for side in zip(*sizes, strict=True)))
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None
    return AdapterShape(*settings, tuple(linears)), vectors


def sum_of_loras(
    linears: Sequence[str], parts: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> tuple[AdapterShape, Mapping[str, Tensor]]:
    """Return shape and vectors of the LoRA Σ w_i B_i A_i, whose B has the scales in it.

    Its rank is the sum of the ranks, filled up with zeros to the next power of two.
    """
    keys = {name: (f"{PREFIX}{name}.qvera_A", f"{PREFIX}{name}.qvera_B") for name in linears}
    needed = {name: sum(part[A].shape[-2] for part in parts) for name, (A, _) in keys.items()}
    rank, vectors = 1 << (max(needed.values(), default=1) - 1).bit_length(), dict[str, Tensor]()
    for name, (A, B) in keys.items():
        # the A one below the other and the B side by side: their product is the sum of the products
        more = rank - needed[name]
        vectors[A] = nn.functional.pad(torch.cat([part[A] for part in parts], -2), (0, 0, 0, more))
        outward = torch.cat([weight * part[B] for part, weight in zip(parts, weights, strict=True)], -1)
        vectors[B] = nn.functional.pad(outward, (0, more))
    experts = "each" if any(vector.dim() == 3 for vector in vectors.values()) else "none"
    return AdapterShape("lora", 0, rank, 1, False, experts, tuple(linears)), vectors


def _layout(config: QveraConfig, linears: Sequence[str], specs: Mapping[str, LinearSpec]) -> VectorLayout:
    """The columns of an adapter of that config on these linears. ``specs``: the base's linears by name."""
    tensors = {name: method_of(config).tensors(config, specs[name]) for name in linears}
    return VectorLayout(
        {f"{PREFIX}{name}.{kind}": shape for name, kinds in tensors.items() for kind, shape in kinds.items()}
    )


def _taken(view: Tensor, slots: slice | Tensor) -> Tensor:
    return view[slots] if isinstance(slots, slice) else view.index_select(0, slots)


class _TakeSlots(torch.autograd.Function):
    """Select slots of a bank's view. Backward adds to the bank's gradients, so no gradient of all slots is made."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, gradients: Tensor | None, slots: slice | Tensor) -> Tensor:
        ctx.gradients, ctx.slots = gradients, slots
        return _taken(view, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None]:
        if isinstance(ctx.slots, slice):
            ctx.gradients[ctx.slots].add_(g)
        else:
            ctx.gradients.index_add_(0, ctx.slots, g)
        return None, None, None


class AdapterBank:
    """The adapters of one shape.

    Attributes:
        slots: their number. If the bank is not trained, slot 0 is zeros, for tokens that use none of its adapters.
        numbers: how many numbers one adapter has; those of its trained tensors come first.
        trained_numbers: how many of them are trained.
        initial: fp32 [numbers], the start of a trained adapter.
        vectors: fp32 [slots, numbers].
        gradients: fp32 [slots, trained_numbers]; backward adds to them.
        tensors: linear → kind → that tensor of all adapters [slots, ...]. It is a view of ``vectors``, and its gradient
            a view of ``gradients``.
        takes_slots: whether a batch works on the tensors of the slots that it uses, which it copies out where they are
            no neighbours; else it works on those of all.
    """

    def __init__(
        self, model: PeftModel, slots: int, adapter: str = "default", layout: VectorLayout | None = None
    ) -> None:
        """Make a bank in the shape of an ordinary adapter. If that is trained, the bank is trained in its place."""
        self.slots, self.adapter = slots, adapter
        named = named_vectors(model, adapter)
        trained = {key: vector for key, vector in named.items() if vector.requires_grad}
        # trained tensors first, so that the gradients are those of the first columns and frozen tensors need none
        if layout is None:
            layout = VectorLayout({key: vector.shape for key, vector in (trained | named).items()})
        self.layout, self.numbers = layout, layout.numbers
        self.trained_numbers = sum(vector.numel() for vector in trained.values())
        self.device = next(iter(named.values())).device
        self.initial = torch.cat([named[key].detach().reshape(-1) for key in layout.columns])
        unused = (slots, self.numbers)
        self.vectors = self.initial.repeat(slots, 1) if trained else torch.zeros(unused, device=self.device)
        self.gradients = torch.zeros(slots, self.trained_numbers, device=self.device)
        # from now on the ordinary adapter only lends its layers, and is not trained itself
        for vector in named.values():
            vector.requires_grad_(False)
        self._ordinary = named
        self.layers: list[QveraLinear] = []
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, QveraLinear) and module.carries(adapter):
                self.layers.append(module)
                views = self.tensors[module.spec.name] = {}
                for kind in module.vectors(adapter):
                    columns = layout.columns[f"{name}.{kind}"]
                    views[kind] = columns.of(self.vectors)
                    # backward then adds into `gradients` itself, and no gradient has to be gathered
                    if columns.start < self.trained_numbers:
                        views[kind] = nn.Parameter(views[kind])
                        views[kind].grad = columns.of(self.gradients)
        self.path = PATHS[method_of(model.peft_config[adapter]).peft_type]
        self.takes_slots = bool(trained) or self.path is lora_slots

    def start(self, slot: int) -> None:
        """Start a new adapter in a slot: initial vectors, gradient zero."""
        self.put(slot, self.initial)

    def put(self, slot: int, vectors: Mapping[str, Tensor] | Tensor) -> None:
        """Put an adapter into a slot, by the keys of its file or packed, and zero its gradient.

        ValueError: a key is missing or unknown, or a shape is wrong.
        """
        self.vectors[slot].copy_(vectors if isinstance(vectors, Tensor) else self.layout.pack(vectors))
        self.gradients[slot].zero_()

    def take(self, slot: int) -> dict[str, Tensor]:
        """Copy an adapter's vectors, by their keys in an adapter file."""
        return {key: columns.of(self.vectors[slot]).clone() for key, columns in self.layout.columns.items()}

    @contextlib.contextmanager
    def rows(self, slots: Sequence[int], tokens: Sequence[int]) -> Iterator[None]:
        """Let row i of a batch use the adapter in ``slots[i]``, within the context.

        Run backward within it too, since a checkpointed layer repeats its forward pass there. ``tokens`` has each row's
        length, padding included, for rows that are padded or concatenated.
        """
        if len(set(slots)) > 1:
            mixed = MixedForward(self.device)
            mixed.use([(self, slot) for slot in slots], tokens)
            with mixed.installed(self.layers):
                yield
            return
        # one adapter alone: its vectors and gradients are lent to the ordinary adapter, so that layers take the path of
        # an adapter by itself
        before = {key: parameter.data for key, parameter in self._ordinary.items()}
        try:
            for key, parameter in self._ordinary.items():
                columns = self.layout.columns[key]
                parameter.data = columns.of(self.vectors[slots[0]])
                if columns.start < self.trained_numbers:
                    parameter.requires_grad_(True)
                    parameter.grad = columns.of(self.gradients[slots[0]])
            yield
        finally:
            for key, parameter in self._ordinary.items():
                parameter.grad = None
                parameter.requires_grad_(False)
                parameter.data = before[key]


User: TypeAlias = tuple[AdapterBank, int] | str | None
"""The adapter that a token uses: a slot of a bank, an ordinary adapter by its name, or None for the base alone."""


@dataclass
class _Part:
    """The slots of one bank that the tokens of a batch use."""

    bank: AdapterBank
    slots: slice | Tensor | None  # the slots that the batch uses; None: all, which get no gradients
    count: int  # how many slots that is
    index: Tensor | None  # each token's (or row's) place among these slots; None: there is only one slot
    fixed: bool = False  # see `TokenSlots.fixed`
    ends: Sequence[int] = ()  # `TokenSlots.ends` of the index
    tokens: dict[int, TokenSlots] = field(default_factory=dict)  # by the number of tokens in a pass

    def add(self, layer: QveraLinear, x: Tensor, y: Tensor) -> Tensor:
        """Add each token's adapter to y, the output so far. A layer without the bank's adapters returns y."""
        tensors = self._tensors(layer)
        if tensors is None:
            return y
        return self.bank.path(layer, self.bank.adapter, x, y, tensors, self._slots_of(x.shape[:-1].numel()))

    def add_experts(self, layer: QveraExperts, x: Tensor, y: Tensor, routing: Routing, of_tokens: bool) -> Tensor:
        """Add each token's adapter to y, the output so far, for rows that are sorted by expert."""
        tensors, each = self._tensors(layer), self._slots_of(routing.token_count)
        if tensors is None:
            return y
        slots = None if each is None else TokenSlots(each.index[routing.tokens], each.slots)
        # experts with vectors of their own: tensors are [slots, experts, ..], and each (slot, expert) is a slot here
        if layer.qvera_settings[self.bank.adapter][1].experts == "each":
            experts = layer.spec.experts
            index = routing.experts if slots is None else slots.index * experts + routing.experts
            slots = TokenSlots(index, self.count * experts)
            tensors = {kind: tensor.flatten(0, 1) for kind, tensor in tensors.items()}
        return self.bank.path(layer, self.bank.adapter, x, y, tensors, slots, routing.tokens if of_tokens else None)

    def _tensors(self, layer: QveraLinear) -> dict[str, Tensor] | None:
        """Return a layer's tensors for the slots in use; None: the bank's adapters are not on the layer."""
        tensors = self.bank.tensors.get(layer.spec.name)
        if tensors is None or self.slots is None:
            return tensors
        if self.bank.trained_numbers:
            return {kind: _TakeSlots.apply(view, view.grad, self.slots) for kind, view in tensors.items()}
        return {kind: _taken(view, self.slots) for kind, view in tensors.items()}

    def _slots_of(self, total: int) -> TokenSlots | None:
        """Return each token's slot in a pass of ``total`` tokens; None: all use the same slot."""
        if self.index is None:
            return None
        if total not in self.tokens:
            known = len(self.index)  # with fewer entries than tokens it has one for each row
            index = self.index if total == known else self.index.repeat_interleave(total // known)
            ends = tuple(end * (total // known) for end in self.ends)
            self.tokens[total] = TokenSlots(index, self.count, ends, self.fixed)
        return self.tokens[total]


class MixedForward:
    """The forward pass of layers when tokens use different adapters; `use` says which."""

    def __init__(self, device: torch.device, fixed: bool = False) -> None:
        """``fixed``: see `TokenSlots.fixed`; all passes are held then (`use`)."""
        self._device, self._fixed = device, fixed
        self._parts: list[_Part] = []
        self._ordinary: list[tuple[str, Tensor | None]] = []
        self._rows: int | None = None  # rows of the batch, if users were named by row
        self._tokens: int | None = None  # tokens of the batch, if users were named by runs of tokens
        self._held: dict[tuple[str, int, int], accelerator.HeldTensors] = {}

    def use(self, users: Sequence[User], tokens: Sequence[int] | None = None, held: bool = False) -> Hashable:
        """Set the adapters of the next forward passes: one for each run of neighbouring tokens.

        ``tokens`` has the length of each run; None: the runs are the batch's rows. A trained bank must be used alone.
        ``held``: passes with the value that is returned read the same memory in the same shapes, as a graph has to.
        """
        self._parts, self._ordinary = [], []
        self._rows, self._tokens = (len(users), None) if tokens is None else (None, sum(tokens))
        banks, keys = dict.fromkeys(user[0] for user in users if isinstance(user, tuple)), list[tuple[str, int, int]]()
        # one part for each bank: which of its slots the batch uses, and where among them each token's stands
        for bank in sorted(banks, key=lambda bank: bank.adapter):
            # tokens of other users take slot 0, whose zeros add nothing
            index = np.array([u[1] if isinstance(u, tuple) and u[0] is bank else 0 for u in users], dtype=np.int64)
            arrays, count = {"index": index}, bank.slots
            # all tokens use one slot: a view is enough, and nothing has to be sent to the device
            if not held and not bank.trained_numbers and (index == index[0]).all():
                self._parts.append(_Part(bank, slice(int(index[0]), int(index[0]) + 1), 1, None))
                continue
            used: slice | None = None
            if bank.takes_slots:
                slots, arrays["index"] = np.unique(index, return_inverse=True)
                first, span = int(slots[0]), int(slots[-1] - slots[0]) + 1
                # neighbours are a view; some slots in between that have no tokens cost less than copies
                if not held and span <= len(slots) * (1 if bank.trained_numbers else 2):
                    used, count, arrays["index"] = slice(first, first + span), span, index - first
                else:
                    # a power of two, so that few shapes come up and a graph of one can be used again
                    count = 1 << (len(slots) - 1).bit_length() if held else len(slots)
                    arrays["slots"] = np.resize(slots, count)  # the repeated slots at the end have no tokens
            if tokens is not None:
                arrays["index"] = np.repeat(arrays["index"], tokens)
            ends: list[int] = []
            if not held and (np.diff(arrays["index"]) >= 0).all():
                ends = np.searchsorted(arrays["index"], np.arange(count + 1)).tolist()
            if held:
                keys.append((bank.adapter, count, len(arrays["index"])))
                if keys[-1] not in self._held:
                    self._held[keys[-1]] = accelerator.HeldTensors(self._device, arrays)
                sent = self._held[keys[-1]].fill(arrays)
            else:
                sent = accelerator.tensors_on(self._device, arrays)
            self._parts.append(_Part(bank, used or sent.get("slots"), count, sent["index"], self._fixed, ends))
        # ordinary adapters: the rows that use one, or nothing to send where all do
        for name in dict.fromkeys(user for user in users if isinstance(user, str)):
            rows = np.array([i for i, user in enumerate(users) if user == name], dtype=np.int64)
            everywhere = len(rows) == len(users)
            sent = {} if everywhere else accelerator.tensors_on(self._device, {"rows": rows})
            self._ordinary.append((name, sent.get("rows")))
        return tuple(keys)

    @contextlib.contextmanager
    def installed(self, layers: Sequence[QveraLinear]) -> Iterator[None]:
        """Make these layers compute this way within the context."""
        try:
            for layer in layers:
                layer.mixed = self
            yield
        finally:
            for layer in layers:
                layer.mixed = None

    def forward_experts(self, layer: QveraExperts, x: Tensor, routing: Routing, of_tokens: bool) -> Tensor:
        """Compute `forward` for rows that are sorted by expert. ValueError: the batch has another number of tokens."""
        total, known = routing.token_count, self._tokens if self._rows is None else self._rows
        if known and total % known:
            raise ValueError(f"a pass of {known} rows or tokens got {total} tokens")
        y = layer.base_layer(x, routing, of_tokens)
        if layer.disable_adapters:
            return y
        for part in self._parts:
            y = part.add_experts(layer, x, y, routing, of_tokens)
        for name, mine in self._ordinary:
            if not layer.carries(name):
                continue
            changed = layer.add_routed(name, x, y, routing, of_tokens)
            if mine is not None:  # a mask, since picking out the tokens would make the host wait for their number
                rows = routing.tokens // (total // (known or 1))
                changed = torch.where(torch.isin(rows, mine).unsqueeze(-1), changed, y)
            y = changed
        return y

    def forward(self, layer: QveraLinear, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """base(x) plus what each token's own adapter adds; x is [..., n].

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
        # a held W serves every row; a held W + ΔW has an adapter in it that other rows do not use
        if layer.holds_inference_weight and not layer._inference_adapters and not torch.is_grad_enabled():
            y = layer.inference_product(x)
        else:
            y = layer.base_layer(x, *args, **kwargs)
        if layer.disable_adapters:
            return y
        for part in self._parts:
            y = part.add(layer, x, y)
        for name, mine in self._ordinary:
            if not layer.carries(name):
                continue
            if mine is None:
                y = layer.method(name).add(layer, name, x, y, False)
            else:
                y = y.index_copy(0, mine, layer.method(name).add(layer, name, x[mine], y[mine], False))
        return y
