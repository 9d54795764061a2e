"""The adapters that answer now: read from files, put into slots on the device, and used by the tokens of a batch.

Adapters may differ in seed, rank, ``b_groups``, ``input_scale`` and targets; there is a bank for each shape.

Files are read, not mapped: if another process cuts a mapped file short, SIGBUS kills this one. The system's page cache
keeps files of evicted adapters in memory.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from qvera.adapters.bank import AdapterBank, AdapterShape, MixedForward, shape_of
from qvera.adapters.config import QveraConfig
from qvera.adapters.files.adapter_file import read_adapter, require_base
from qvera.adapters.methods import method_of
from qvera.adapters.shared_model import add_adapter, give_to_answers, linear_specs, require_shareable
from qvera.serve.requests import AdapterChanged, AdapterPart, ResolvedAdapter
from qvera.serve.store import read_content, read_file
from qvera.utils.errors import InputError
from qvera.utils.paths import ADAPTER_CONFIG

if TYPE_CHECKING:
    from pathlib import Path

    from peft import VeraConfig

    from qvera.models.loader import Base


@dataclass(frozen=True, eq=False)
class HostVectors:
    """An adapter's vectors, in the order of its bank's columns."""

    identity: str
    shape: AdapterShape
    packed: torch.Tensor  # fp32 [numbers], on the CPU


def require_served(found: QveraConfig | VeraConfig, directory: Path) -> QveraConfig:
    """The config of an adapter that can be served beside others.

    Raises InputError unless it is VeRA without magnitude and phases, and has vectors only.
    """
    way = "`qvera export --to merged` makes a checkpoint of its own, which `qvera serve` takes."
    if tokens := getattr(found, "added_tokens", None):
        raise InputError(f"{directory}: adds the tokens {', '.join(tokens)}, whose rows are not served. {way}")
    try:
        config = require_shareable(found, directory)
    except InputError as error:
        raise InputError(f"{error} Or serve it merged: {way}") from None
    if method_of(config).peft_type != "VERA":
        raise InputError(
            f"{directory}: the method {method_of(config).name} with these options is not served beside other adapters; "
            f"expected vera without magnitude and without phases. {way}"
        )
    return config


class SlotTable:
    """Which adapter is in which slot. The least recently used one is evicted, but never one in use.

    Slots count from 1 to ``count``. Slot 0 belongs to the base.
    """

    def __init__(self, count: int) -> None:
        self._slots: OrderedDict[str, tuple[int, HostVectors]] = OrderedDict()
        """Identity → slot and its vectors, the most recently used last."""
        self._users: dict[str, int] = {}
        self._free = list(range(count, 0, -1))
        self._unloading: set[str] = set()

    def __len__(self) -> int:
        return len(self._slots)

    def acquire(self, vectors: HostVectors) -> tuple[int, bool] | None:
        """Add a user: its slot, and whether the vectors must be put there. None: other adapters use every slot."""
        identity = vectors.identity
        is_new = identity not in self._slots
        if is_new:
            slot = self._free.pop() if self._free else self._evict()
            if slot is None:
                return None
            self._slots[identity] = slot, vectors
        self._slots.move_to_end(identity)
        self._users[identity] = self._users.get(identity, 0) + 1
        return self._slots[identity][0], is_new

    def release(self, identity: str) -> None:
        """Remove a user. The adapter keeps its slot until another needs it or it was unloaded."""
        self._users[identity] -= 1
        if not self._users[identity]:
            del self._users[identity]
            if identity in self._unloading:
                self.unload(identity)

    def unload(self, identity: str) -> None:
        """Free the adapter's slot once it has no user. Does nothing if it has no slot."""
        if identity in self._users:
            self._unloading.add(identity)
            return
        self._unloading.discard(identity)
        if identity in self._slots:
            self._free.append(self._slots.pop(identity)[0])

    def _evict(self) -> int | None:
        unused = next((identity for identity in self._slots if identity not in self._users), None)
        return None if unused is None else self._slots.pop(unused)[0]


class ServingBank:
    """The vectors on the device, and which of them the next forward pass uses.

    `read` may be called from any thread, everything else only from the thread that runs the model.
    """

    def __init__(self, base: Base, slots: int) -> None:
        """``slots``: adapters of one shape that fit."""
        self.slots = slots
        self._base = base
        self.device = next(base.model.parameters()).device
        self._specs = linear_specs(base.model)
        self._banks: dict[AdapterShape, tuple[AdapterBank, SlotTable]] = {}
        self._numbers = itertools.count()  # of banks that were begun
        self._mixed = MixedForward(self.device)
        self._read: weakref.WeakValueDictionary[str, HostVectors] = weakref.WeakValueDictionary()
        """Vectors that a request or a slot holds. They are shared, so their files are not read again."""
        self._lock = threading.Lock()

    # Reading, in any thread

    def read(self, adapter: ResolvedAdapter) -> HostVectors:
        """The vectors of an adapter, from memory if a request or a slot holds them, else from its files.

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
        with self._lock:
            return self._read.setdefault(adapter.identity, HostVectors(adapter.identity, shape, packed))

    def _blend(self, adapter: ResolvedAdapter) -> tuple[AdapterShape, dict[str, torch.Tensor]]:
        shapes, parts = zip(*(self._read_part(part) for part in adapter.parts), strict=True)
        if len(parts) == 1 and adapter.parts[0].weight == 1:
            return shapes[0], parts[0]
        # b ⊙ (B (d ⊙ A x)) is linear in b alone
        first = adapter.parts[0].directory.name
        for part, shape, vectors in zip(adapter.parts, shapes, parts, strict=True):
            if shape != shapes[0]:
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
        return shapes[0], {
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
        return shape_of(config, vectors, self._specs, part.directory), vectors

    # Slots, in the model's thread

    def needs_layers(self, vectors: HostVectors) -> bool:
        """Whether `acquire` would change the model's layers, as it does for the first adapter of a shape."""
        return vectors.shape not in self._banks

    def acquire(self, vectors: HostVectors) -> int | None:
        """Add a user of an adapter and return its slot, filled. None: all slots of its bank are in use."""
        if vectors.shape not in self._banks:
            self._add_bank(vectors.shape)
        bank, table = self._banks[vectors.shape]
        acquired = table.acquire(vectors)
        if acquired is None:
            return None
        slot, is_new = acquired
        if is_new:
            bank.put(slot, vectors.packed)
        return slot

    def release(self, vectors: HostVectors) -> None:
        """Remove a user."""
        self._banks[vectors.shape][1].release(vectors.identity)

    def unload(self, identity: str) -> None:
        """Free an adapter's slot once it has no user."""
        for _, table in self._banks.values():
            table.unload(identity)

    @property
    def resident(self) -> int:
        """Number of adapters in slots."""
        return sum(len(table) for _, table in list(self._banks.values()))

    @property
    def size_bytes(self) -> int:
        """Memory of all slots, used or not."""
        return sum(bank.vectors.nbytes for bank, _ in list(self._banks.values()))

    def _add_bank(self, shape: AdapterShape) -> None:
        name = f"__shape_{next(self._numbers)}__"
        model = add_adapter(self._base, name, shape.config)
        for layer in give_to_answers(model, name):
            layer.mixed = self._mixed
        bank = AdapterBank(model, self.slots + 1, name, shape.layout(self._specs))
        self._banks[shape] = bank, SlotTable(self.slots)

    # The forward pass

    def use(self, users: Sequence[tuple[HostVectors | None, int, int]]) -> None:
        """Set the adapters of the next forward pass.

        ``users``: adapter (None: the base), slot and length of each run of neighbouring tokens in the flattened batch.
        """
        slots = [None if vectors is None else (self._banks[vectors.shape][0], slot) for vectors, slot, _ in users]
        self._mixed.use(slots, [tokens for *_, tokens in users])
