"""Blocks of a cache: which one holds the keys and values of which tokens, and what each step computes."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from qvera.data.images import StoredImage

BLOCK_TOKENS = 16
"""Tokens per block, unless a kernel asks for more. Only whole blocks are shared: a shorter common beginning is computed
again."""


class CachedTokens:
    """The tokens of a request, and where their keys and values are.

    ``identity`` is that of its adapter, and empty for the base. ``images`` have their places among the tokens.
    """

    def __init__(self, tokens: Sequence[int], identity: str = "", images: Sequence[StoredImage] = ()) -> None:
        self.tokens, self.identity, self.images = list(tokens), identity, images
        self.blocks: list[int] = []  # in the order of the tokens; empty: it must begin, or begin again
        self.computed = 0  # leading tokens whose keys and values are there
        self.found: int | None = None  # leading tokens that were there when it first began
        self.unscored = range(0)  # places whose last hidden states are still asked for
        self.ended = False
        self.parent: int | str = identity
        """The content number of the last full block that others may share, which the next one follows."""

    @property
    def unneeded(self) -> int:
        """Leading tokens that need not be computed if their keys and values are there."""
        last = len(self.tokens) - 1  # the next token is drawn from its logits
        return min(last, self.unscored.start) if self.unscored else last

    def take_unscored(self, count: int) -> range:
        """The places to be scored among the next ``count`` tokens; they are not asked for again."""
        begin, end = self.unscored.start, min(self.unscored.stop, self.computed + count)
        self.unscored = range(max(begin, end), self.unscored.stop)
        return range(begin, end)


T = TypeVar("T", bound=CachedTokens)


class Blocks:
    """The blocks of a cache, and the scheduler over them.

    A block is found by its adapter, the tokens before it and its own tokens; these are compared, not only hashed. So
    requests of one adapter share equal beginnings, and those of two adapters never do.

    The request that has run longest always gets a block, if need be from the newest one, which begins again later. The
    cache holds the longest request, so every step advances some request.
    """

    def __init__(self, count: int, tokens: int = BLOCK_TOKENS) -> None:
        """Make ``count`` blocks of ``tokens`` tokens each."""
        self.count, self.tokens = count, tokens
        self.fresh: list[int] = []  # blocks that changed owner since the last `take_fresh`
        self._content = itertools.count()
        self.clear()

    def clear(self) -> None:
        """Forget all requests and contents."""
        self._users = [0] * self.count  # how many requests have each block
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.count))
        """Blocks without a user, the next to be taken first. Their contents are still known."""
        self._block_of: dict[tuple[int | str, tuple[int, ...]], int] = {}  # `_key` → a full block of this content
        self._known: dict[int, tuple[tuple[int | str, tuple[int, ...]], int]] = {}  # block → its key, content number

    def take_fresh(self) -> list[int]:
        """Blocks that changed owner since the last call; they still hold another request's keys and values."""
        fresh, self.fresh = self.fresh, []
        return fresh

    def schedule(self, running: Iterable[T], step_tokens: int) -> list[tuple[T, int]]:
        """The next step: requests, and how many of their next tokens it computes, ``step_tokens`` in all at most.

        Requests with a single token come first, then prompts in the order of ``running``.
        """
        running = list(running)
        begun = [request for request in running if request.blocks]
        # Every begun request needs room for its newest token. Where none is free, the newest of them gives its blocks
        # back, perhaps the one that asks.
        for request in list(begun):
            while request.blocks and not self._grow(request):
                self.release(begun.pop())
        begun.sort(key=lambda request: len(request.tokens) - request.computed > 1)
        batch: list[tuple[T, int]] = []
        coming: set[tuple[int | str, tuple[int, ...]]] = set()  # keys of blocks that this batch computes
        for request in [*begun, *(request for request in running if not request.blocks)]:
            if not step_tokens:
                break
            if not request.blocks:
                shared = self._find_shared(request)
                number = len(shared)
                if (number + 1) * self.tokens <= request.unneeded and self._key(request, number) in coming:
                    continue  # its next block will be there after this step, or after one of the next
                if not self._begin(request, shared):
                    break  # none passes one that waits for memory
            count = min(step_tokens, len(request.tokens) - request.computed)
            batch.append((request, count))
            coming.add(self._key(request, request.computed // self.tokens))
            step_tokens -= count
        return batch

    def note_computed(self, request: CachedTokens, count: int) -> None:
        """Note that ``count`` more tokens are in the cache. Blocks that are full now can be shared."""
        before, request.computed = request.computed, request.computed + count
        for number in range(before // self.tokens, request.computed // self.tokens):
            block, key = request.blocks[number], self._key(request, number)
            # another request may have filled a block with the same tokens first; then that one is found from now on
            if self._block_of.setdefault(key, block) == block:
                self._known[block] = key, next(self._content)
            request.parent = self._known[self._block_of[key]][1]

    def release(self, request: CachedTokens) -> None:
        """Free a request's blocks. Their contents stay known until the blocks are needed; later blocks go first."""
        # a block is found by way of those before it, so without the first one the others would be of no use
        for block in reversed(request.blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._known)  # what nobody can find is taken first
        request.blocks, request.computed, request.parent = [], 0, request.identity

    def _find_shared(self, request: CachedTokens) -> list[int]:
        """Return the blocks that a request need not compute, and set its parent to the content of the last one."""
        shared: list[int] = []
        request.parent = request.identity
        while (len(shared) + 1) * self.tokens <= request.unneeded:
            block = self._block_of.get(self._key(request, len(shared)))
            if block is None:
                break
            shared.append(block)
            request.parent = self._known[block][1]
        return shared

    def _begin(self, request: CachedTokens, shared: list[int]) -> bool:
        """Give a request the ``shared`` blocks and new ones for its other tokens; False if too few are free."""
        # shared blocks without a user count as free, and are about to be used
        missing = self._needed(request) - len(shared)
        if missing > len(self._free) - sum(not self._users[block] for block in shared):
            return False
        for block in shared:
            self._users[block] += 1
            self._free.pop(block, None)
        request.blocks, request.computed = shared, len(shared) * self.tokens
        request.found = request.computed if request.found is None else request.found
        self._grow(request)
        return True

    def _grow(self, request: CachedTokens) -> bool:
        """Give a request the blocks that its new tokens need; False if too few are free."""
        while len(request.blocks) < self._needed(request):
            if not self._free:
                return False
            block, _ = self._free.popitem(last=False)
            if (known := self._known.pop(block, None)) is not None:
                del self._block_of[known[0]]
            self._users[block] = 1
            self.fresh.append(block)
            request.blocks.append(block)
        return True

    def _needed(self, request: CachedTokens) -> int:
        """Blocks that hold all of its tokens."""
        return -(-len(request.tokens) // self.tokens)

    def _key(self, request: CachedTokens, number: int) -> tuple[int | str, tuple[int, ...]]:
        """The key of a request's ``number``-th block: the content before it, and its own tokens.

        It is right for one block only, the one behind ``request.parent``.
        """
        return request.parent, tuple(request.tokens[number * self.tokens : (number + 1) * self.tokens])
