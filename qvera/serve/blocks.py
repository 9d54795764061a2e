"""Which cache block holds which tokens, and what each step computes. No torch.

A block is found by its adapter, the tokens before it and its own tokens; these are compared, not only hashed. So
requests of one adapter share equal beginnings, and those of two adapters never do.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeVar

BLOCK_TOKENS = 16
"""Tokens per block. Only whole blocks are shared: a shorter common beginning is computed again."""


class CachedTokens:
    """The tokens of a request, and where their keys and values are. ``identity``: of its adapter; "" for the base."""

    def __init__(self, tokens: Sequence[int], identity: str = "") -> None:
        self.tokens, self.identity = list(tokens), identity
        self.blocks: list[int] = []  # in the order of the tokens; empty: it must begin, or begin again
        self.computed = 0  # leading tokens whose keys and values are there
        self.registered = 0  # full blocks that others may share
        self.parent: int | str = identity
        """The content number of the last registered block, which the next one follows."""


T = TypeVar("T", bound=CachedTokens)


class Blocks:
    """The blocks of a cache, and the scheduler over them.

    The request that has run longest always gets a block, if need be from the newest one, which begins again later. The
    cache holds the longest request, so every step advances some request.
    """

    def __init__(self, count: int, share: bool) -> None:
        self.count = count
        self.fresh: list[int] = []  # blocks that changed owner since the last `take_fresh`
        self._share = share
        self._content = itertools.count()
        self.clear()

    def clear(self) -> None:
        """Forget all requests and contents."""
        self._users = [0] * self.count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.count))
        """Blocks without a user, the next to be taken first. Their contents are still known."""
        self._block_of: dict[tuple[int | str, tuple[int, ...]], int] = {}
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
        for request in list(begun):
            while request.blocks and not self._grow(request):
                self.release(begun.pop())
        batch: list[tuple[T, int]] = []
        for request in sorted(begun, key=lambda request: len(request.tokens) - request.computed > 1):
            if count := min(step_tokens, len(request.tokens) - request.computed):
                batch.append((request, count))
                step_tokens -= count
        for request in running:
            if request.blocks:
                continue
            if not step_tokens or not self._begin(request):
                break  # none passes one that waits for memory
            count = min(step_tokens, len(request.tokens) - request.computed)
            batch.append((request, count))
            step_tokens -= count
        return batch

    def note_computed(self, request: CachedTokens, count: int) -> None:
        """Note that ``count`` more tokens are in the cache. Blocks that are full now can be shared."""
        request.computed += count
        while self._share and request.registered < request.computed // BLOCK_TOKENS:
            block = request.blocks[request.registered]
            key = _key(request, request.registered)
            if self._block_of.setdefault(key, block) == block and block not in self._known:
                self._known[block] = key, next(self._content)
            request.parent = self._known[self._block_of[key]][1]
            request.registered += 1

    def release(self, request: CachedTokens) -> None:
        """Free a request's blocks. Their contents stay known until the blocks are needed; later blocks go first."""
        for block in reversed(request.blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._known)
        request.blocks, request.computed, request.registered, request.parent = [], 0, 0, request.identity

    def _begin(self, request: CachedTokens) -> bool:
        """Give a request blocks for all of its tokens; False if they are not free."""
        shared: list[int] = []
        # one token at least is computed, since the next one is drawn from its logits
        while self._share and (len(shared) + 1) * BLOCK_TOKENS < len(request.tokens):
            block = self._block_of.get(_key(request, len(shared)))
            if block is None:
                break
            shared.append(block)
            request.parent = self._known[block][1]
        missing = _blocks_for(request) - len(shared)
        if missing > len(self._free) - sum(not self._users[block] for block in shared):
            request.parent = request.identity
            return False
        for block in shared:
            self._users[block] += 1
            self._free.pop(block, None)
        request.blocks, request.registered = shared, len(shared)
        request.computed = len(shared) * BLOCK_TOKENS
        self._grow(request)
        return True

    def _grow(self, request: CachedTokens) -> bool:
        """Give a request the blocks that its new tokens need; False if too few are free."""
        while len(request.blocks) < _blocks_for(request):
            if not self._free:
                return False
            block, _ = self._free.popitem(last=False)
            if (known := self._known.pop(block, None)) is not None:
                del self._block_of[known[0]]
            self._users[block] = 1
            self.fresh.append(block)
            request.blocks.append(block)
        return True


def _blocks_for(request: CachedTokens) -> int:
    return -(-len(request.tokens) // BLOCK_TOKENS)


def _key(request: CachedTokens, number: int) -> tuple[int | str, tuple[int, ...]]:
    return request.parent, tuple(request.tokens[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS])
