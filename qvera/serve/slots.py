"""Which adapter is in which slot of a bank: the one that was used longest ago gives way, one in use never. No torch."""

from collections import OrderedDict


class SlotTable:
    """Slots 1 to ``count``, each for one identity. Slot 0 is the base's and is not given away."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        """Identity → slot; the one that was used last stands last."""
        self._users: dict[str, int] = {}
        self._free = list(range(count, 0, -1))
        self._unloading: set[str] = set()

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, identity: str) -> bool:
        return identity in self._slot_of

    def acquire(self, identity: str) -> tuple[int, bool] | None:
        """A slot for one more user of ``identity``, and whether its vectors have to be put there.

        None: every slot is in use by another identity.
        """
        slot, is_new = self._slot_of.get(identity), False
        if slot is None:
            slot = self._free.pop() if self._free else self._evict()
            if slot is None:
                return None
            self._slot_of[identity], is_new = slot, True
        self._slot_of.move_to_end(identity)
        self._users[identity] = self._users.get(identity, 0) + 1
        return slot, is_new

    def release(self, identity: str) -> None:
        """One user of ``identity`` less; it stays where it is until its slot is needed or it was unloaded."""
        self._users[identity] -= 1
        if not self._users[identity]:
            del self._users[identity]
            if identity in self._unloading:
                self.unload(identity)

    def unload(self, identity: str) -> None:
        """Free the slot of ``identity``: now, or as soon as it has no user. One that has no slot is passed over."""
        if identity in self._users:
            self._unloading.add(identity)
            return
        self._unloading.discard(identity)
        if (slot := self._slot_of.pop(identity, None)) is not None:
            self._free.append(slot)

    def _evict(self) -> int | None:
        for identity in self._slot_of:
            if identity not in self._users:
                return self._slot_of.pop(identity)
        return None
