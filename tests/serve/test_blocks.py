"""Blocks are shared within one adapter, and every request gets on, however few blocks there are."""

from __future__ import annotations

import random

from qvera.serve.batches import BLOCK_TOKENS, Blocks, CachedTokens


def _step(blocks: Blocks, running: list[CachedTokens], tokens: int = 1000) -> list[tuple[CachedTokens, int]]:
    """Schedule and compute a step; each request whose tokens are all computed gets one more."""
    batch = blocks.schedule(running, tokens)
    assert sum(count for _, count in batch) <= tokens
    for request, count in batch:
        blocks.note_computed(request, count)
        if request.computed == len(request.tokens):
            request.tokens.append(7)
    return batch


def test_a_prompt_finds_the_blocks_of_its_own_adapter_only_and_computes_its_last_token() -> None:
    blocks = Blocks(100, share=True)
    prompt = list(range(3 * BLOCK_TOKENS))
    seen = {}
    for name, tokens, adapter in (
        ("first", prompt, "a"),
        ("other adapter", prompt, "b"),
        ("base", prompt, ""),
        ("again", prompt, "a"),
        ("goes on", [*prompt, 5], "a"),
        ("other beginning", [99, *prompt[1:]], "a"),
        ("other end", [*prompt[:-1], 99, 5], "a"),
    ):
        request = CachedTokens(tokens, adapter)
        [(_, seen[name])] = _step(blocks, [request])
        blocks.release(request)
    n = BLOCK_TOKENS
    assert seen == {
        "first": 3 * n, "other adapter": 3 * n, "base": 3 * n, "again": n, "goes on": 1, "other beginning": 3 * n,
        "other end": n + 1,
    }  # fmt: skip


def test_requests_that_compute_the_same_prompt_at_once_are_found_by_later_ones() -> None:
    blocks = Blocks(100, share=True)
    prompt = list(range(2 * BLOCK_TOKENS)) + [5]
    at_once = [CachedTokens(prompt), CachedTokens(prompt)]
    _step(blocks, at_once)
    assert not set(at_once[0].blocks) & set(at_once[1].blocks)
    blocks.release(at_once[0])
    assert _step(blocks, [later := CachedTokens(prompt)]) == [(later, 1)]


def test_without_sharing_all_is_computed() -> None:
    blocks = Blocks(100, share=False)
    for _ in range(2):
        request = CachedTokens(range(40))
        assert _step(blocks, [request]) == [(request, 40)]
        blocks.release(request)


def test_a_block_with_a_new_owner_is_fresh_and_forgets_what_it_held() -> None:
    blocks = Blocks(2, share=True)
    first = CachedTokens(range(20))
    _step(blocks, [first])
    assert sorted(blocks.take_fresh()) == [0, 1]
    blocks.release(first)
    other = CachedTokens(range(100, 132))
    _step(blocks, [other])
    assert sorted(blocks.take_fresh()) == [0, 1]
    blocks.release(other)
    assert _step(blocks, [again := CachedTokens(range(20))]) == [(again, 20)]


def test_answers_come_before_prompts_and_long_prompts_take_several_steps() -> None:
    blocks = Blocks(100, share=True)
    answers, long, waits = CachedTokens([1]), CachedTokens(range(2, 25)), CachedTokens(range(50, 55))
    _step(blocks, [answers])
    running = [long, answers, waits]
    assert _step(blocks, running, 10) == [(answers, 1), (long, 9)]
    assert _step(blocks, running, 10) == [(answers, 1), (long, 9)]
    assert _step(blocks, running, 10) == [(answers, 1), (long, 5), (waits, 4)]


def test_where_blocks_run_out_the_last_request_gives_way_and_begins_again() -> None:
    blocks = Blocks(2, share=True)
    first, last = CachedTokens([1] * BLOCK_TOKENS), CachedTokens([2] * 3)
    _step(blocks, [first, last])
    assert _step(blocks, [first, last]) == [(first, 1)]
    assert not last.blocks
    blocks.release(first)
    assert _step(blocks, [last]) == [(last, 4)]


def test_every_request_ends_whatever_the_cache_and_no_block_has_two_owners() -> None:
    """Random requests that come, share, are cancelled and end; the longest one fills the cache."""
    for seed in range(30):
        chooser = random.Random(seed)
        blocks = Blocks(6, share=True)
        running: list[CachedTokens] = []
        ends: dict[int, int] = {}
        waiting = 40
        for _ in range(3000):
            while waiting and len(running) < 5:
                prompt = [chooser.choice((1, 2)) // 2] * chooser.randrange(1, 60)
                request = CachedTokens(prompt, chooser.choice("ab"))
                ends[id(request)] = chooser.randrange(len(prompt), 6 * BLOCK_TOKENS) + 1
                running.append(request)
                waiting -= 1
            if not running:
                break
            assert _step(blocks, running, chooser.choice((3, 20, 100)))
            own = [block for request in running for block in request.blocks[request.computed // BLOCK_TOKENS :]]
            assert len(own) == len(set(own))  # a block that is not full belongs to one
            for request in list(running):
                if len(request.tokens) >= ends[id(request)] or chooser.random() < 0.02:
                    blocks.release(request)
                    running.remove(request)
        assert not waiting
        assert not running
        assert blocks.schedule([whole := CachedTokens(range(6 * BLOCK_TOKENS))], 1000) == [(whole, 6 * BLOCK_TOKENS)]
