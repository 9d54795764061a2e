"""Blocks are shared within one adapter, and answers are the same over other bases, architectures and adapters."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from qvera.models.attention import CAUSAL, VARLEN
from qvera.serve.blocks import BLOCK_TOKENS, Blocks, CachedTokens
from qvera.serve.requests import EndEvent
from qvera.serve.store import AdapterStore
from tests.conftest import small_llama, small_tokenizer
from tests.serve.helpers import (
    BASE,
    Alone,
    assert_answers,
    engine_of,
    expected_of,
    request,
    store_of,
    submit,
    tiny_base,
    write_adapters,
)


def test_every_request_ends_and_meets_only_what_its_own_adapter_computed_for_its_own_tokens() -> None:
    """Random requests that come, share, are cancelled and end; the longest one fills the cache."""
    taken, computed, ended = 0, 0, 0
    for seed in range(6):
        chooser, blocks, waiting = random.Random(seed), Blocks(6), 40
        running: list[CachedTokens] = []
        ends: dict[int, int] = {}
        held: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}  # block and place → adapter and tokens up to it
        while waiting or running:
            while waiting and len(running) < 5:
                prompt = [chooser.choice((1, 2)) // 2] * chooser.randrange(1, 60)
                running.append(cached := CachedTokens(prompt, chooser.choice("ab")))
                ends[id(cached)] = chooser.randrange(len(prompt), 6 * BLOCK_TOKENS) + 1
                waiting -= 1
            begun = {id(cached) for cached in running if cached.blocks}
            most = chooser.choice((3, 20, 100))
            batch = blocks.schedule(running, most)
            assert 0 < sum(count for _, count in batch) <= most
            long = [len(cached.tokens) - cached.computed > 1 for cached, _ in batch if id(cached) in begun]
            assert long == sorted(long)  # no answer waits for a prompt
            fresh = set(blocks.take_fresh())
            held = {place: what for place, what in held.items() if place[0] not in fresh}
            for cached, count in batch:
                assert count > 0  # what comes next is drawn from the logits of one token at least
                taken += cached.computed if id(cached) not in begun else 0
                computed += count
                for n in range(cached.computed, cached.computed + count):
                    place = cached.blocks[n // BLOCK_TOKENS], n % BLOCK_TOKENS
                    held[place] = cached.identity, tuple(cached.tokens[: n + 1])
            for cached, count in batch:
                for n in range(cached.computed + count):
                    place = cached.blocks[n // BLOCK_TOKENS], n % BLOCK_TOKENS
                    assert held[place] == (cached.identity, tuple(cached.tokens[: n + 1]))
                blocks.note_computed(cached, count)
                if cached.computed == len(cached.tokens):
                    cached.tokens.append(7)
                if len(cached.tokens) >= ends[id(cached)] or chooser.random() < 0.02:
                    blocks.release(cached)
                    running.remove(cached)
                    ended += 1
        assert blocks.schedule([whole := CachedTokens(range(6 * BLOCK_TOKENS))], 1000) == [(whole, 6 * BLOCK_TOKENS)]
    assert ended == 6 * 40
    assert taken > computed / 20


# Bases


@pytest.mark.parametrize(
    ("kind", "model", "error"),
    [
        ("auto", {"compute_dtype": "bfloat16"}, 0.1),
        ("auto", {"compute_dtype": "float16"}, 0.02),
        ("auto", {"quantization": "none"}, 1e-4),
        ("static", {"quantization": "int8", "compute_dtype": "auto"}, 0.1),
    ],
)
def test_over_other_bases_a_first_token_has_the_probabilities_of_the_request_alone(
    kind: str, model: dict[str, Any], error: float, tiny_model_dir: Path, adapters_dir: Path, engine_with: Any
) -> None:
    """In 16 bits, to rounding."""
    store = store_of(adapters_dir)
    asked = [request([3 + i] * 30, store.resolve(which), 2, top_logprobs=5) for i, which in enumerate((BASE, "a1"))]
    expected = expected_of(lambda adapter: Alone(tiny_model_dir, adapter, **model), adapters_dir, asked)
    with engine_with(kind, model) as engine:
        assert engine.why_static is None  # it does not fall back to static batches
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
TWO_KINDS = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "sliding window": lambda shape: MistralForCausalLM(MistralConfig(**shape)),
    "two kinds of attention": lambda shape: Gemma3ForCausalLM(Gemma3TextConfig(**shape, **TWO_KINDS)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prompts_beyond_the_window_of_an_architecture_are_answered_as_alone(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape, model_dir, adapters = small_llama().config.to_dict(), tmp_path / "model", tmp_path / "adapters"
    model = ARCHITECTURES[name]({"sliding_window": 16, **{key: shape[key] for key in SHAPE}})
    model.to(torch.bfloat16).save_pretrained(model_dir)
    small_tokenizer().save_pretrained(model_dir)
    write_adapters(adapters, model_dir, {"a1": 1})
    store, questions = store_of(adapters), [("a1", 40), (BASE, 40), ("a1", 3)]
    asked = [
        request([3 + i] * length, store.resolve(which), 8, top_logprobs=0)
        for i, (which, length) in enumerate(questions)
    ]
    expected = expected_of(lambda adapter: Alone(model_dir, adapter), adapters, asked)
    with engine_of(model_dir) as engine:
        assert_answers(engine, asked, expected)


def test_adapters_of_other_seeds_ranks_and_shapes_share_a_batch(
    tiny_model_dir: Path, tmp_path: Path, engine_with: Any
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "rank": {"rank": 5},
        "seed": {"seed": 3},
        "groups": {"b_groups": 2},
        "scaled": {"input_scale": True, "rank": 12},
        "some": {"targets": ["q_proj", "down_proj"]},
        "lora 3": {"method": "lora", "rank": 3, "alpha": 7},
        "lora 4": {"method": "lora", "rank": 4, "alpha": 4, "use_rslora": True},
        "lora 64": {"method": "lora", "rank": 64, "targets": ["v_proj", "up_proj"]},
    }
    for i, (name, settings) in enumerate(kinds.items()):
        names = {name: i} if i else {name: i, f"{name}2": 20}
        write_adapters(tmp_path, tiny_model_dir, names, **settings)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    stock = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 5}))
    for name, parameter in stock.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    stock.save_pretrained(tmp_path / "of PEFT")
    store = store_of(tmp_path)
    asked = [
        request([4, 5, 6 + i], store.resolve(name), 3, top_logprobs=0) for i, name in enumerate([BASE, *store.names()])
    ]
    expected = expected_of(lambda adapter: Alone(tiny_model_dir, adapter), tmp_path, asked)
    with engine_with() as engine:
        assert_answers(engine, asked, expected)


def test_the_attention_of_an_accelerator_makes_way_for_a_paged_one_and_comes_back(
    tiny_model_dir: Path, engine_with: Any, store: AdapterStore, expected: Any
) -> None:
    prompt, adapter = [3, 4, 5], store.resolve("a1")
    alone = expected([request(prompt, adapter, 5)])
    for implementation in (CAUSAL, VARLEN, "eager"):
        base = tiny_base(tiny_model_dir)
        base.model.set_attn_implementation(implementation)
        with engine_with(base=base) as engine:
            assert_answers(engine, [request(prompt, adapter, 5)], alone)
        assert base.model.config._attn_implementation == implementation
