"""The same answers over bases of other number formats and architectures, and by adapters of other kinds."""

from __future__ import annotations

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
from qvera.serve.requests import EndEvent
from tests.conftest import small_llama, small_tokenizer
from tests.serve.helpers import (
    BASE,
    ENGINES,
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

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_neither_16_nor_4_bits_fall_back_to_static_batches(quantization: str, tiny_model_dir: Path) -> None:
    model = {"quantization": quantization, "compute_dtype": "bfloat16"}
    with engine_of(tiny_model_dir, "auto", model) as engine:
        assert engine.why_static is None
        assert submit(engine, request([3, 4], max_tokens=2)).end() == EndEvent("length")


BASES: dict[str, tuple[dict[str, Any], float]] = {
    "bf16 over nf4": ({"compute_dtype": "bfloat16"}, 0.1),
    "fp16 over nf4": ({"compute_dtype": "float16"}, 0.02),
    "dense": ({"quantization": "none"}, 1e-4),
    "int8": ({"quantization": "int8", "compute_dtype": "auto"}, 0.1),
}


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", BASES)
def test_over_other_bases_a_first_token_has_the_probabilities_of_the_request_alone(
    name: str, kind: str, tiny_model_dir: Path, adapters_dir: Path
) -> None:
    """In 16 bits, to rounding."""
    model, error = BASES[name]
    store = store_of(adapters_dir)
    asked = [
        request([3 + i] * 30, store.resolve(which), 2, top_logprobs=5) for i, which in enumerate((BASE, "a1", "a2"))
    ]
    alone = [
        Alone(tiny_model_dir, None if one.adapter is None else adapters_dir / one.adapter.name, **model)
        for one in asked
    ]
    expected = [dict(each.answer(one)[0].top) for each, one in zip(alone, asked, strict=True)]
    with engine_of(tiny_model_dir, kind, model) as engine:
        for answer, likely in zip([submit(engine, one) for one in asked], expected, strict=True):
            assert answer.end() == EndEvent("length")
            found = dict(answer.events[0].top)
            shared = found.keys() & likely.keys()
            assert len(shared) >= 3
            assert all(abs(found[token] - likely[token]) < error for token in shared)


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
    model_dir = tmp_path / "model"
    ARCHITECTURES[name]({key: shape[key] for key in SHAPE}).to(torch.bfloat16).save_pretrained(model_dir)
    small_tokenizer().save_pretrained(model_dir)
    write_adapters(tmp_path / "adapters", model_dir, {"a1": 1, "a2": 2})
    store = store_of(tmp_path / "adapters")
    asked = [
        request([3 + i] * length, store.resolve(which), 20, top_logprobs=0)
        for i, (which, length) in enumerate([("a1", 40), ("a2", 40), (BASE, 40), ("a1", 3)])
    ] + [request([3] * 40, store.resolve("a2"), 20)]
    expected = []
    for one in asked:
        adapter = None if one.adapter is None else tmp_path / "adapters" / one.adapter.name
        expected.append(Alone(model_dir, adapter).answer(one))
    with engine_of(model_dir) as engine:
        for answer, events in zip([submit(engine, one) for one in asked], expected, strict=True):
            assert_same(answer, events)


def test_adapters_of_other_seeds_ranks_and_shapes_share_a_batch(
    tiny_model_dir: Path, tmp_path: Path, alone: Any
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "rank": {"rank": 5},
        "seed": {"seed": 3},
        "groups": {"b_groups": 2},
        "scaled": {"input_scale": True, "rank": 12},
        "some": {"targets": ["q_proj", "down_proj"]},
    }
    for i, (name, settings) in enumerate(kinds.items()):
        write_adapters(tmp_path, tiny_model_dir, {name: i, f"{name}2": i + 20}, **settings)
    store = store_of(tmp_path)
    asked = [
        request([4, 5, 6 + i], store.resolve(name), 10, top_logprobs=0)
        for i, name in enumerate([BASE, *store.names(), *store.names()])
    ]
    expected = expected_of(alone, tmp_path, asked)
    with engine_of(tiny_model_dir) as engine:
        answers = [submit(engine, one) for one in asked]
        for answer, events in zip(answers, expected, strict=True):
            assert_same(answer, events)


def test_the_attention_of_an_accelerator_makes_way_for_a_paged_one_and_comes_back(
    tiny_model_dir: Path, adapters_dir: Path, alone: Any
) -> None:
    asked = request([3, 4, 5], store_of(adapters_dir).resolve("a1"), 10)
    [expected] = expected_of(alone, adapters_dir, [asked])
    base = tiny_base(tiny_model_dir)
    for implementation in (CAUSAL, VARLEN, "eager"):
        base.model.set_attn_implementation(implementation)
        with engine_of(tiny_model_dir, base=base) as engine:
            assert_same(submit(engine, request(asked.prompt, asked.adapter, 10)), expected)
        assert base.model.config._attn_implementation == implementation
        base = tiny_base(tiny_model_dir)
