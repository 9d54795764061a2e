"""The adapters that answer now: read from files, put into slots on the device, and used by the tokens of a batch.

Adapters may be VeRA or LoRA and differ in seed, rank, ``b_groups``, ``input_scale`` and targets; there is a bank for
each shape that has an adapter in a slot. Layers that were made for a shape stay: they take no more than one adapter.

Files are read, not mapped: if another process cuts a mapped file short, SIGBUS kills this one. The system's page cache
keeps files of evicted adapters in memory.
"""

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import VeraConfig

from qvera.adapters.adapter_file import read_adapter, require_base
from qvera.adapters.bank import AdapterBank, AdapterShape, MixedForward, fit_to_bank, sum_of_loras
from qvera.adapters.config import QveraConfig
from qvera.adapters.layer import linear_specs
from qvera.adapters.methods import method_of
from qvera.adapters.methods.base import Change
from qvera.adapters.products.slots import PATHS
from qvera.adapters.shared_model import add_adapter, give_to_answers, require_shareable
from qvera.models.loader import Base
from qvera.serve.requests import AdapterChanged, AdapterPart, ResolvedAdapter
from qvera.serve.store import read_adapter_file, read_content
from qvera.utils.errors import InputError
from qvera.utils.files import ADAPTER_CONFIG


@dataclass(frozen=True, eq=False)
class HostVectors:
    """An adapter's vectors, in the order of its bank's columns."""

    identity: str
    shape: AdapterShape
    packed: torch.Tensor  # fp32 [numbers], on the CPU


def require_served(found: QveraConfig | VeraConfig, directory: Path) -> QveraConfig:
    """The config of an adapter that can be served beside others.

    Raises InputError unless it is VeRA without magnitude and phases, or LoRA, and trained nothing else.
    """
    way = "`qvera export --to merged` makes a checkpoint of its own, which `qvera serve` takes."
    if tokens := getattr(found, "added_tokens", None):
        raise InputError(f"{directory}: adds the tokens {', '.join(tokens)}, whose rows are not served. {way}")
    way_alone = "`qvera generate` and `qvera chat` take it."
    try:
        config = require_shareable(found, directory)
    except InputError as error:
        has_more = found.modules_to_save or found.bias != "none"  # which no export has
        raise InputError(f"{error} {way_alone if has_more else way}") from None
    if method_of(config).change is Change.PER_TOKEN:  # which nothing can merge
        way = way_alone
    if method_of(config).peft_type not in PATHS:
        raise InputError(
            f"{directory}: the method {method_of(config).name} with these options is not served beside other adapters; "
            f"expected vera without magnitude and without phases, or lora. {way}"
        )
    return config


class AdaptersInUse(NamedTuple):
    """The facts besides its tokens that a recorded pass depends on."""

    key: Hashable
    layers: Hashable  # where it changes, layers or the memory of slots may have changed


class _Slots:
    """A bank of one shape, and which adapter is in which slot.

    The least recently used one is evicted, but never one in use. Slots count from 1. Slot 0 belongs to the base.
    """

    def __init__(self, bank: AdapterBank, count: int) -> None:
        self.bank = bank
        self.slots: OrderedDict[str, tuple[int, HostVectors]] = OrderedDict()
        """Identity → slot and its vectors, the most recently used last."""
        self._users: dict[str, int] = {}
        self._free = list(range(count, 0, -1))
        self._unloading: set[str] = set()

    def acquire(self, vectors: HostVectors) -> int | None:
        """See `ServingBank.acquire`."""
        identity = vectors.identity
        if identity not in self.slots:
            if not self._free:
                unused = next((one for one in self.slots if one not in self._users), None)
                if unused is None:
                    return None
                self._free.append(self.slots.pop(unused)[0])
            self.bank.put(self._free[-1], vectors.packed)
            self.slots[identity] = self._free.pop(), vectors  # if `put` fails, the slot stays free
        self.slots.move_to_end(identity)
        self._users[identity] = self._users.get(identity, 0) + 1
        return self.slots[identity][0]

    def release(self, identity: str) -> None:
        self._users[identity] -= 1
        if not self._users[identity]:
            del self._users[identity]
            if identity in self._unloading:
                self.unload(identity)

    def unload(self, identity: str) -> None:
        if identity in self._users:
            self._unloading.add(identity)
            return
        self._unloading.discard(identity)
        if identity in self.slots:
            self._free.append(self.slots.pop(identity)[0])


class ServingBank:
    """The vectors on the device, and which of them the next forward pass uses.

    `read` may be called from any thread, everything else only from the thread that runs the model.
    """

    def __init__(self, base: Base, slots: int, fixed: bool = False) -> None:
        """``slots``: adapters of one shape that fit; ``fixed``: see `MixedForward`."""
        self.slots = slots
        self._base = base
        self.device = next(base.model.parameters()).device
        self._specs = linear_specs(base.model)
        self._slots: dict[AdapterShape, _Slots] = {}
        self._numbers = itertools.count()  # of shapes whose layers were begun
        self._shapes: dict[AdapterShape, str] = {}
        """A shape that has its layers → PEFT's name of the adapter that stands for all of that shape."""
        self._banks = 0  # made so far
        self._mixed = MixedForward(self.device, fixed)
        self._read: weakref.WeakValueDictionary[str, HostVectors] = weakref.WeakValueDictionary()
        """Vectors that a request or a slot holds. They are shared, so their files are not read again."""
        self._lock = threading.Lock()

    # Reading, in any thread

    def read(self, adapter: ResolvedAdapter) -> HostVectors:
        """Return the vectors of an adapter, from memory if a request or a slot holds them, else from its files.

        Raises:
            InputError: it is damaged, of another base, or can't be served beside others; or parts of a blend differ in
                more than b.
            AdapterChanged: a file was replaced after it was resolved.
        """
        with self._lock:
            known = self._read.get(adapter.identity)
        if known is not None:
            return known
        shape, vectors = self._blend(adapter)
        packed = shape.layout(self._specs).pack(vectors)
        # another thread may have read the same adapter meanwhile: all its users share the first one's vectors
        with self._lock:
            return self._read.setdefault(adapter.identity, HostVectors(adapter.identity, shape, packed))

    def _blend(self, adapter: ResolvedAdapter) -> tuple[AdapterShape, Mapping[str, torch.Tensor]]:
        """Return shape and vectors of a weighted sum.

        VeRA's b ⊙ (B (d ⊙ A x)) is linear in b alone, so all else has to be equal. LoRAs of the same linears
        always have a sum, whose rank is that of all together.
        """
        shapes, parts = zip(*(self._read_part(part) for part in adapter.parts), strict=True)
        if len(parts) == 1 and adapter.parts[0].weight == 1:
            return shapes[0], parts[0]
        if all((shape.method, shape.linears) == ("lora", shapes[0].linears) for shape in shapes):
            return sum_of_loras(shapes[0].linears, parts, [part.weight for part in adapter.parts])
        first, summed = adapter.parts[0].directory.name, dict(parts[0])
        for part, shape, vectors in zip(adapter.parts, shapes, parts, strict=True):
            if shape != shapes[0]:
                raise InputError(
                    f"{adapter.name}: {first} and {part.directory.name} differ in method, seed, rank, b_groups, "
                    "input_scale or targets, so no single adapter is their weighted sum."
                )
            for key, vector in vectors.items():
                if not key.endswith(".qvera_b") and not torch.equal(vector, parts[0][key]):
                    raise InputError(
                        f"{adapter.name}: {first} and {part.directory.name} have different vectors "
                        f"{key.rpartition('.')[2].removeprefix('qvera_')}, so no single adapter is their weighted sum. "
                        "Adapters of one base that were trained with adapter.train_d: false can be blended."
                    )
        for key in summed:
            if key.endswith(".qvera_b"):
                terms = [
                    part.weight * vectors[key].double() for part, vectors in zip(adapter.parts, parts, strict=True)
                ]
                summed[key] = sum(terms, torch.zeros(())).float()
        return shapes[0], summed

    def _read_part(self, part: AdapterPart) -> tuple[AdapterShape, Mapping[str, torch.Tensor]]:
        content = read_content(part.directory)
        found, vectors = read_adapter(part.directory, content.vectors)
        # the config was read by its path: it has to be the one of the content
        if content.sha256 != part.sha256 or read_adapter_file(part.directory / ADAPTER_CONFIG) != content.config:
            raise AdapterChanged(f"{part.directory}: was replaced while it was read; ask again.")
        config = require_served(found, part.directory)
        require_base(config, part.directory, str(self._base.facts.get("path")), self._base.facts.get("fingerprint"))
        return fit_to_bank(config, vectors, self._specs, part.directory)

    # Slots, in the model's thread

    def needs_layers(self, vectors: HostVectors) -> bool:
        """Whether `acquire` would change the model's layers, as it does for the first adapter of a shape."""
        return vectors.shape not in self._shapes

    def acquire(self, vectors: HostVectors) -> int | None:
        """Add a user of an adapter and return its slot, filled. None: all slots of its shape are in use."""
        shape = vectors.shape
        if self.needs_layers(vectors):
            name = f"__shape_{next(self._numbers)}__"
            for layer in give_to_answers(add_adapter(self._base, name, shape.config), name):
                layer.mixed = self._mixed
            self._shapes[shape] = name
        if shape not in self._slots:
            assert self._base.adapted is not None
            layout = shape.layout(self._specs)
            bank = AdapterBank(self._base.adapted, self.slots + 1, self._shapes[shape], layout)
            self._slots[shape], self._banks = _Slots(bank, self.slots), self._banks + 1
        return self._slots[shape].acquire(vectors)

    def release(self, vectors: HostVectors) -> None:
        """Remove a user. The adapter keeps its slot until another needs it or it was unloaded."""
        self._slots[vectors.shape].release(vectors.identity)
        self._drop_empty()

    def unload(self, identity: str) -> None:
        """Free an adapter's slot once it has no user."""
        for slots in self._slots.values():
            slots.unload(identity)
        self._drop_empty()

    def _drop_empty(self) -> None:
        for shape in [shape for shape, slots in self._slots.items() if not slots.slots]:
            self._mixed.use([], [])  # the last pass may have used it
            del self._slots[shape]

    @property
    def resident(self) -> int:
        """Number of adapters in slots."""
        # a copy, as `Engine.stats` asks from any thread while shapes may be added
        return sum(len(slots.slots) for slots in list(self._slots.values()))

    @property
    def size_bytes(self) -> int:
        """Memory of all banks, whose slots may be used or not."""
        return sum(slots.bank.vectors.nbytes for slots in list(self._slots.values()))

    def use(
        self,
        users: Sequence[tuple[HostVectors | None, int, int]],
        by_rows: bool = False,
        filled_tokens: int | None = None,
    ) -> AdaptersInUse | None:
        """Set the adapters of the next forward pass.

        Args:
            users: adapter (None: the base), slot and number of tokens of each run of neighbouring tokens in the
                flattened batch; with ``by_rows``, of each row, whatever its number of tokens.
            filled_tokens: tokens of a pass of fixed shapes, which is filled up to them. Then what a graph of the pass
                depends on is returned.
        """
        slots = [None if vectors is None else (self._slots[vectors.shape].bank, slot) for vectors, slot, _ in users]
        tokens = [tokens for *_, tokens in users]
        if filled_tokens is not None:
            more = filled_tokens - sum(tokens)  # tokens that fill the pass up; they run on the base
            key = self._mixed.use([*slots, *[None] * more], [*tokens, *[1] * more], held=True)
            # a new adapter of PEFT's, one of a training too, may change the layers or make A and B anew, and a new bank
            # has other memory
            return AdaptersInUse(key, (self._banks, *(self._base.adapted.peft_config if self._base.adapted else ())))
        self._mixed.use(slots, None if by_rows else tokens)
        return None
