"""Blocks are shared within one adapter, and answers are the same over other bases, architectures and adapters."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qvera.models.attention import CAUSAL, VARLEN
from qvera.serve.batches import BLOCK_TOKENS, Blocks, CachedTokens
from qvera.serve.requests import EndEvent
from qvera.serve.store import AdapterStore
from tests.conftest import small_llama, small_tokenizer
from tests.serve.helpers import (
    BASE,
    Alone,
    assert_same,
    engine_of,
    expected_of,
    request,
    store_of,
    submit,
    tiny_base,
    write_adapters,
)


def _step(blocks: Blocks, running: list[CachedTokens], tokens: int = 1000) -> list[tuple[CachedTokens, int]]:
    """Schedule and compute a step; each request whose tokens are all computed gets one more."""
    batch = blocks.schedule(running, tokens)
    assert sum(count for _, count in batch) <= tokens
    for cached, count in batch:
        blocks.note_computed(cached, count)
        if cached.computed == len(cached.tokens):
            cached.tokens.append(7)
    return batch


def test_a_prompt_finds_the_blocks_of_its_own_adapter_only_and_computes_its_last_token() -> None:
    n, prompt = BLOCK_TOKENS, list(range(3 * BLOCK_TOKENS))
    for share in (True, False):
        blocks = Blocks(100, share)
        for name, tokens, adapter, count in (
            ("first", prompt, "a", 3 * n),
            ("other adapter", prompt, "b", 3 * n),
            ("base", prompt, "", 3 * n),
            ("again", prompt, "a", n),
            ("goes on", [*prompt, 5], "a", 1),
            ("other beginning", [99, *prompt[1:]], "a", 3 * n),
            ("other end", [*prompt[:-1], 99, 5], "a", n + 1),
        ):
            cached = CachedTokens(tokens, adapter)
            assert _step(blocks, [cached]) == [(cached, count if share else len(tokens))], name
            blocks.release(cached)


def test_requests_that_compute_the_same_prompt_at_once_are_found_by_later_ones() -> None:
    blocks = Blocks(100, share=True)
    prompt = list(range(2 * BLOCK_TOKENS)) + [5]
    at_once = [CachedTokens(prompt), CachedTokens(prompt)]
    _step(blocks, at_once)
    assert not set(at_once[0].blocks) & set(at_once[1].blocks)
    blocks.release(at_once[0])
    assert _step(blocks, [later := CachedTokens(prompt)]) == [(later, 1)]


def test_a_block_with_a_new_owner_is_fresh_and_forgets_what_it_held() -> None:
    blocks = Blocks(2, share=True)
    for tokens in (range(20), range(100, 132), range(20)):
        cached = CachedTokens(tokens)
        assert _step(blocks, [cached]) == [(cached, len(tokens))]
        assert sorted(blocks.take_fresh()) == [0, 1]
        blocks.release(cached)


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
                cached = CachedTokens(prompt, chooser.choice("ab"))
                ends[id(cached)] = chooser.randrange(len(prompt), 6 * BLOCK_TOKENS) + 1
                running.append(cached)
                waiting -= 1
            if not running:
                break
            assert _step(blocks, running, chooser.choice((3, 20, 100)))
            own = [block for cached in running for block in cached.blocks[cached.computed // BLOCK_TOKENS :]]
            assert len(own) == len(set(own))  # a block that is not full belongs to one
            for cached in list(running):
                if len(cached.tokens) >= ends[id(cached)] or chooser.random() < 0.02:
                    blocks.release(cached)
                    running.remove(cached)
        assert not waiting
        assert not running
        assert blocks.schedule([whole := CachedTokens(range(6 * BLOCK_TOKENS))], 1000) == [(whole, 6 * BLOCK_TOKENS)]


# Bases


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_neither_16_nor_4_bits_fall_back_to_static_batches(quantization: str, engine_with: Any) -> None:
    with engine_with("auto", {"quantization": quantization, "compute_dtype": "bfloat16"}) as engine:
        assert engine.why_static is None
        assert submit(engine, request([3, 4], max_tokens=2)).end() == EndEvent("length")


@pytest.mark.parametrize(
    ("kind", "model", "error"),
    [
        ("continuous", {"compute_dtype": "bfloat16"}, 0.1),
        ("static", {"compute_dtype": "bfloat16"}, 0.1),
        ("continuous", {"compute_dtype": "float16"}, 0.02),
        ("continuous", {"quantization": "none"}, 1e-4),
        ("static", {"quantization": "int8", "compute_dtype": "auto"}, 0.1),
    ],
)
def test_over_other_bases_a_first_token_has_the_probabilities_of_the_request_alone(
    kind: str,
    model: dict[str, Any],
    error: float,
    tiny_model_dir: Path,
    adapters_dir: Path,
    store: AdapterStore,
    engine_with: Any,
) -> None:
    """In 16 bits, to rounding."""
    asked = [request([3 + i] * 30, store.resolve(which), 2, top_logprobs=5) for i, which in enumerate((BASE, "a1"))]
    expected = expected_of(lambda adapter: Alone(tiny_model_dir, adapter, **model), adapters_dir, asked)
    with engine_with(kind, model) as engine:
        for answer, events in zip([submit(engine, one) for one in asked], expected, strict=True):
            assert answer.end() == EndEvent("length")
            found, likely = dict(answer.events[0].top), dict(events[0].top)
            shared = found.keys() & likely.keys()
            assert len(shared) >= 3
            assert all(abs(found[token] - likely[token]) < error for token in shared)


SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "tie_word_embeddings", "initializer_range",
)  # fmt: skip
ARCHITECTURES: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "sliding window": lambda shape: MistralForCausalLM(MistralConfig(**shape, sliding_window=16)),
    "norms of queries and keys": lambda shape: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16)),
    "two kinds of attention": lambda shape: Gemma3ForCausalLM(
        Gemma3TextConfig(**shape, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_answer_as_alone(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = small_llama().config.to_dict()
    model_dir, adapters = tmp_path / "model", tmp_path / "adapters"
    ARCHITECTURES[name]({key: shape[key] for key in SHAPE}).to(torch.bfloat16).save_pretrained(model_dir)
    small_tokenizer().save_pretrained(model_dir)
    write_adapters(adapters, model_dir, {"a1": 1})
    store = store_of(adapters)
    asked = [
        request([3 + i] * length, store.resolve(which), 8, top_logprobs=0)
        for i, (which, length) in enumerate([("a1", 40), (BASE, 40), ("a1", 3)])
    ]
    expected = expected_of(lambda adapter: Alone(model_dir, adapter), adapters, asked)
    with engine_of(model_dir) as engine:
        for answer, events in zip([submit(engine, one) for one in asked], expected, strict=True):
            assert_same(answer, events)


def test_adapters_of_other_seeds_ranks_and_shapes_share_a_batch(
    tiny_model_dir: Path, tmp_path: Path, engine_with: Any
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "rank": {"rank": 5},
        "seed": {"seed": 3},
        "groups": {"b_groups": 2},
        "scaled": {"input_scale": True, "rank": 12},
        "some": {"targets": ["q_proj", "down_proj"]},
    }
    for i, (name, settings) in enumerate(kinds.items()):
        names = {name: i} if i > 1 else {name: i, f"{name}2": i + 20}
        write_adapters(tmp_path, tiny_model_dir, names, **settings)
    store = store_of(tmp_path)
    asked = [
        request([4, 5, 6 + i], store.resolve(name), 3, top_logprobs=0) for i, name in enumerate([BASE, *store.names()])
    ]
    expected = expected_of(lambda adapter: Alone(tiny_model_dir, adapter), tmp_path, asked)
    with engine_with() as engine:
        for answer, events in zip([submit(engine, one) for one in asked], expected, strict=True):
            assert_same(answer, events)


def test_the_attention_of_an_accelerator_makes_way_for_a_paged_one_and_comes_back(
    tiny_model_dir: Path, engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    asked = request([3, 4, 5], store.resolve("a1"), 5)
    [alone] = expected([asked])
    for implementation in (CAUSAL, VARLEN, "eager"):
        base = tiny_base(tiny_model_dir)
        base.model.set_attn_implementation(implementation)
        with engine_with(base=base) as engine:
            assert_same(submit(engine, request(asked.prompt, asked.adapter, 5)), alone)
        assert base.model.config._attn_implementation == implementation
