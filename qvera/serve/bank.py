"""The vectors of the adapters that answer now, as rows of tensors on the device, and batches whose tokens name theirs.

`qvera.adapters.training_bank` has the same for training. Adapters may differ in seed, rank, ``b_groups``,
``input_scale`` and targets; those that are alike in all of these are of one kind, and share a tensor [slots, numbers].
A batch then costs one low-rank product for each kind in it, whatever the number of adapters.

Files are read, not mapped: a process that has mapped a file which another one cuts short is killed by SIGBUS. What
keeps files of evicted adapters in memory is the system's page cache.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from qvera.adapters.adapted_forward import layer_shape
from qvera.adapters.config import PREFIX, QveraConfig
from qvera.adapters.files.adapter_file import read_adapter, require_base
from qvera.adapters.layer import QveraLinear
from qvera.adapters.methods import LinearSpec, method_of
from qvera.adapters.multi_adapter import add_own_paths, base_output, require_projection_of, require_shareable
from qvera.adapters.products.row_vectors import TokenSlots
from qvera.adapters.projection import SharedProjection
from qvera.adapters.shared_model import add_adapter, give_to_answers
from qvera.adapters.vector_layout import VectorLayout
from qvera.serve.content import read_content, read_file
from qvera.serve.requests import AdapterChanged, AdapterPart, ResolvedAdapter
from qvera.serve.slots import SlotTable
from qvera.utils import accelerator
from qvera.utils.errors import InputError
from qvera.utils.paths import ADAPTER_CONFIG

if TYPE_CHECKING:
    from pathlib import Path

    from peft import VeraConfig

    from qvera.models.loader import Base


class AdapterShape(NamedTuple):
    """What adapters of one tensor have in common."""

    seed: int
    rank: int
    groups: int
    input_scale: bool
    linears: tuple[str, ...]
    """The names of the adapted linears in the base model."""


@dataclass(frozen=True, eq=False)
class HostVectors:
    """An adapter's vectors as they were read, in the order of its kind's columns."""

    identity: str
    kind: AdapterShape
    row: torch.Tensor
    """fp32 [numbers], not on the device."""


class _KindBank:
    """The adapters of one kind that are on the device."""

    def __init__(
        self, kind: AdapterShape, layout: VectorLayout, pair: SharedProjection, slots: int, device: torch.device
    ):
        self.kind, self.pair = kind, pair
        self.table = SlotTable(slots)
        self.vectors = torch.zeros(slots + 1, layout.numbers, device=device)  # row 0 is of zeros: the base alone
        self.of_linear = {
            name: {
                tensor: layout.columns[f"{PREFIX}{name}.{tensor}"].of(self.vectors)
                for tensor in ("qvera_d", "qvera_b", "qvera_a")
                if f"{PREFIX}{name}.{tensor}" in layout.columns
            }
            for name in kind.linears
        }


class _Part(NamedTuple):
    """The tokens of a batch that use adapters of one kind."""

    bank: _KindBank
    slot: int | None
    """The one that all tokens of the batch use; None: see ``tokens``."""
    tokens: TokenSlots | None


def require_served(found: QveraConfig | VeraConfig, directory: Path) -> QveraConfig:
    """The config of an adapter that can be served beside others.

    Raises:
        InputError: it has another method than VeRA without magnitude and phases, or more than vectors.
    """
    way = "`qvera export --to merged` makes a checkpoint of its own, which `qvera serve` takes."
    if tokens := getattr(found, "added_tokens", None):
        raise InputError(f"{directory}: adds the tokens {', '.join(tokens)}, whose rows are not served. {way}")
    try:
        config = require_shareable(found, directory)
    except InputError as error:
        raise InputError(f"{error} Or serve it merged: {way}") from None
    if not method_of(config).is_banked:
        raise InputError(
            f"{directory}: the method {method_of(config).name} with these options is not served beside other adapters; "
            f"expected vera without magnitude and without phases. {way}"
        )
    return config


class ServingBank:
    """The vectors on the device, and which of them the tokens of the next forward pass use.

    `read` may be called from any thread; everything else only from the thread that runs the model.
    """

    def __init__(self, base: Base, slots: int) -> None:
        """``slots``: how many adapters of a kind there is room for."""
        self.slots = slots
        self._base = base
        self.device = next(base.model.parameters()).device
        self._places = {
            name: LinearSpec(name, *shape)
            for name, module in base.model.named_modules()
            if (shape := layer_shape(module)) is not None
        }
        self._kinds: dict[AdapterShape, _KindBank] = {}
        self._numbers = itertools.count()  # of kinds that were begun
        self._parts: list[_Part] = []
        self._read: weakref.WeakValueDictionary[str, HostVectors] = weakref.WeakValueDictionary()
        self._resident: dict[str, HostVectors] = {}
        """Those in a slot, so that a request for one that is evicted before its turn needs no file."""
        self._lock = threading.Lock()

    # Reading, in any thread

    def read(self, adapter: ResolvedAdapter) -> HostVectors:
        """The vectors of an adapter: those that a request already holds, or from its files.

        Raises:
            InputError: it is damaged, not one for this base, or not one that can be one of many; or the parts of a
                blend differ in more than b.
            AdapterChanged: a file was replaced after it was resolved.
        """
        with self._lock:
            known = self._read.get(adapter.identity)
        if known is not None:
            return known
        kind, vectors = self._blend(adapter)
        layout = self._layout(kind)
        row = torch.empty(layout.numbers)
        layout.put(row, vectors)
        with self._lock:
            return self._read.setdefault(adapter.identity, HostVectors(adapter.identity, kind, row))

    def _blend(self, adapter: ResolvedAdapter) -> tuple[AdapterShape, dict[str, torch.Tensor]]:
        kinds, parts = zip(*(self._read_part(part) for part in adapter.parts), strict=True)
        if len(parts) == 1 and adapter.parts[0].weight == 1:
            return kinds[0], parts[0]
        # b ⊙ (B (d ⊙ A x)) is linear in b alone
        first = adapter.parts[0].directory.name
        for part, kind, vectors in zip(adapter.parts, kinds, parts, strict=True):
            if kind != kinds[0]:
                raise InputError(
                    f"{adapter.name}: {first} and {part.directory.name} differ in seed, rank, b_groups, input_scale or "
                    "targets, so no single adapter is their weighted sum."
                )
            for key, vector in vectors.items():
                if not key.endswith(".qvera_b") and not torch.equal(vector, parts[0][key]):
                    raise InputError(
                        f"{adapter.name}: {first} and {part.directory.name} have different vectors "
                        f"{key.rpartition('.')[2].removeprefix('qvera_')}, so no single adapter is their weighted sum. "
                        "Adapters of one base that were trained with adapter.train_d: false can be blended."
                    )
        weighted = [(part.weight, vectors) for part, vectors in zip(adapter.parts, parts, strict=True)]
        return kinds[0], {
            key: sum((w * vectors[key].double() for w, vectors in weighted), torch.zeros(())).float()
            if key.endswith(".qvera_b")
            else vector
            for key, vector in parts[0].items()
        }

    def _read_part(self, part: AdapterPart) -> tuple[AdapterShape, dict[str, torch.Tensor]]:
        content = read_content(part.directory)
        found, vectors = read_adapter(part.directory, content.vectors)
        # the config was read by its path: it has to be the one of the content
        if content.sha256 != part.sha256 or read_file(part.directory / ADAPTER_CONFIG) != content.config:
            raise AdapterChanged(f"{part.directory}: was replaced while it was read; ask again.")
        config = require_served(found, part.directory)
        require_base(config, part.directory, str(self._base.facts.get("path")), self._base.facts.get("fingerprint"))
        linears = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key in vectors})
        kind = AdapterShape(config.projection_seed, config.rank, config.b_groups, config.input_scale, tuple(linears))
        self._require_fit(part, config, linears, vectors)
        require_projection_of(config, [self._places[name] for name in linears], part.directory)
        return kind, vectors

    def _require_fit(
        self, part: AdapterPart, config: QveraConfig, linears: Iterable[str], vectors: dict[str, torch.Tensor]
    ) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for name in linears:
            if name not in self._places:
                raise InputError(f"{part.directory}: has vectors of {name}, which this base does not have.")
            shapes = method_of(config).tensors(config, self._places[name])
            expected |= {f"{PREFIX}{name}.{tensor}": shape for tensor, shape in shapes.items()}
        given = {key: tuple(vector.shape) for key, vector in vectors.items()}
        for key in sorted(expected.keys() | given.keys()):
            if given.get(key) != expected.get(key):
                raise InputError(
                    f"{part.directory}: {key} has the shape {given.get(key)}; this base and the adapter's config need "
                    f"{expected.get(key)}."
                )

    def _layout(self, kind: AdapterShape) -> VectorLayout:
        config = QveraConfig(rank=kind.rank, b_groups=kind.groups, input_scale=kind.input_scale)
        return VectorLayout(
            {
                f"{PREFIX}{name}.{tensor}": shape
                for name in kind.linears
                for tensor, shape in method_of(config).tensors(config, self._places[name]).items()
            }
        )

    # Slots, in the model's thread

    def needs_layers(self, vectors: HostVectors) -> bool:
        """Whether `acquire` would change the model's layers, as for the first adapter of a kind."""
        return vectors.kind not in self._kinds

    def acquire(self, vectors: HostVectors) -> int | None:
        """A slot for one more user of an adapter, with its vectors in it; None: all slots of its kind are in use."""
        bank = self._kinds.get(vectors.kind) or self._add_kind(vectors.kind)
        found = bank.table.acquire(vectors.identity)
        if found is None:
            return None
        slot, is_new = found
        if is_new:
            bank.vectors[slot].copy_(vectors.row)
            self._resident[vectors.identity] = vectors
            if len(self._resident) > sum(len(kind.table) for kind in self._kinds.values()):
                self._forget_evicted()
        return slot

    def release(self, vectors: HostVectors) -> None:
        """One user less."""
        self._kinds[vectors.kind].table.release(vectors.identity)
        self._forget_evicted()

    def unload(self, identity: str) -> None:
        """Free an adapter's slot, once it has no user."""
        for bank in self._kinds.values():
            bank.table.unload(identity)
        self._forget_evicted()

    def _forget_evicted(self) -> None:
        gone = [i for i, vectors in self._resident.items() if i not in self._kinds[vectors.kind].table]
        for identity in gone:
            del self._resident[identity]

    @property
    def resident(self) -> int:
        """How many adapters are in a slot."""
        return sum(len(bank.table) for bank in list(self._kinds.values()))

    @property
    def size_bytes(self) -> int:
        """Of the vectors of all slots, used or not."""
        return sum(bank.vectors.nbytes for bank in list(self._kinds.values()))

    def _add_kind(self, kind: AdapterShape) -> _KindBank:
        """Put an ordinary, unchanged adapter on the model, which draws the pair and makes the layers."""
        name = f"__kind_{next(self._numbers)}__"
        config = QveraConfig(
            rank=kind.rank, target_modules=set(kind.linears), projection_seed=kind.seed, task_type="CAUSAL_LM"
        )
        layers = give_to_answers(add_adapter(self._base, name, config), name)
        for layer in layers:
            layer._row_forward = self._forward
        pair = layers[0].qvera_projection[name]
        bank = _KindBank(kind, self._layout(kind), pair, self.slots, self.device)
        self._kinds[kind] = bank
        return bank

    # The forward pass

    def use(self, users: Sequence[tuple[HostVectors | None, int, int]]) -> None:
        """Say which adapters the tokens of the next forward pass use.

        Args:
            users: for each run of neighbouring tokens, in the order of the flattened batch: the adapter (None: the
                base), its slot, and the number of tokens.
        """
        self._parts = []
        counts = np.array([count for _, _, count in users], dtype=np.int64)
        for kind, bank in self._kinds.items():
            slots = [slot if vectors is not None and vectors.kind == kind else 0 for vectors, slot, _ in users]
            if not any(slots):
                continue
            if len(set(slots)) == 1:
                self._parts.append(_Part(bank, slots[0], None))
                continue
            index = np.repeat(np.array(slots, dtype=np.int64), counts)
            sent = accelerator.tensors_on(self.device, {"slots": index})["slots"]
            self._parts.append(_Part(bank, None, TokenSlots(sent, self.slots + 1)))

    def _forward(self, layer: QveraLinear, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """base(x), and for each token the low-rank path of its own adapter; x [rows, tokens, n]."""
        result = base_output(layer, x, *args, **kwargs)
        for bank, slot, tokens in self._parts:
            own = bank.of_linear.get(layer.spec.name)
            if own is None:
                continue
            if slot is not None:
                own = {tensor: view[slot : slot + 1] for tensor, view in own.items()}
            result = add_own_paths(layer, x, result, own, bank.pair, tokens)
        return result
