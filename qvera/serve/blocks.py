"""Which block of the cache holds which tokens of which request, and what each step computes. No torch.

A block is known by the adapter, the tokens before it and its own tokens, compared and not hashed: so requests of one
adapter share what their prompts begin with, and those of two adapters never do.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeVar

BLOCK_TOKENS = 16
"""Tokens of a block, and so of what is shared: a common prefix of fewer is computed again."""


class CachedTokens:
    """The tokens of a request, and where their keys and values are.

    Attributes:
        tokens: prompt and answer.
        identity: of the adapter that computes them; "" for the base alone.
        blocks: numbers of its blocks, in the order of its tokens; none: it has not begun, or has to begin again.
        computed: tokens whose keys and values are there.
    """

    def __init__(self, tokens: Sequence[int], identity: str = "") -> None:
        self.tokens, self.identity = list(tokens), identity
        self.blocks: list[int] = []
        self.computed = 0
        self.registered = 0
        """Full blocks that others may share."""
        self.parent: int | str = identity
        """What the next block to be registered follows: the content number of the last one."""


T = TypeVar("T", bound=CachedTokens)


class Blocks:
    """The blocks of a cache, and the scheduler over them.

    The request that has run longest always gets a block, if need be from the one that came last, which begins again
    later. Since the cache holds the longest request, some request gets on in every step.
    """

    def __init__(self, count: int, share: bool) -> None:
        """``share``: requests of one adapter share equal beginnings."""
        self.count = count
        self.fresh: list[int] = []
        """Blocks that have a new owner since the last `take_fresh`."""
        self._share = share
        self._content = itertools.count()
        self.clear()

    def clear(self) -> None:
        """Forget all requests and contents."""
        self._users = [0] * self.count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.count))
        """Without a user, those that are taken first in front. Their contents are still known."""
        self._block_of: dict[tuple[int | str, tuple[int, ...]], int] = {}
        self._known: dict[int, tuple[tuple[int | str, tuple[int, ...]], int]] = {}
        """Block → its key in `_block_of`, and the number of its content."""

    def take_fresh(self) -> list[int]:
        """Blocks that have a new owner since the last call: what they hold is another request's."""
        fresh, self.fresh = self.fresh, []
        return fresh

    def schedule(self, running: Iterable[T], step_tokens: int) -> list[tuple[T, int]]:
        """What the next step computes: requests, and how many of their next tokens.

        Requests that have one token to compute come first, then prompts in the order of ``running``, all of them with
        at most ``step_tokens`` tokens together.
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
        """So many more tokens of a request have their keys and values; blocks that are full now can be shared."""
        request.computed += count
        while self._share and request.registered < request.computed // BLOCK_TOKENS:
            block = request.blocks[request.registered]
            key = _key(request, request.registered)
            if self._block_of.setdefault(key, block) == block and block not in self._known:
                self._known[block] = key, next(self._content)
            request.parent = self._known[self._block_of[key]][1]
            request.registered += 1

    def release(self, request: CachedTokens) -> None:
        """Free a request's blocks; its contents stay known until the blocks are needed, the last ones least long."""
        for block in reversed(request.blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._known)
        request.blocks, request.computed, request.registered, request.parent = [], 0, 0, request.identity

    def _begin(self, request: CachedTokens) -> bool:
        """Give a request blocks for all of its tokens; False where they are not free."""
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
        """Give a request the blocks that its tokens need; False where too few are free."""
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
