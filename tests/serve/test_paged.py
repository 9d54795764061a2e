"""Attention that takes blocks as they are, and steps that are graphs, give the answers that each request gets alone."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from qvera.adapters.products.slots import TokenSlots
from qvera.serve import paged
from qvera.serve.batches import PagedBatches
from qvera.serve.paged import LayerShape
from qvera.serve.requests import EngineSettings
from qvera.serve.store import AdapterStore
from tests.serve.as_on_a_card import choose_kernel, put_on_a_card, varlen_attn_of
from tests.serve.conftest import NAMES
from tests.serve.helpers import (
    BASE,
    Alone,
    assert_answers,
    assert_same,
    expected_of,
    request,
    store_of,
    submit,
    write_adapters,
)

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
cards = pytest.mark.parametrize("card", ["Hopper", "Ada"])
BLOCK_TOKENS = {"Hopper": 16, "Ada": 256}


def layer(heads: int = 4, kv_heads: int = 2, size: int = 16, of_value: int | None = None, **others: Any) -> LayerShape:
    found = {"dtype": torch.bfloat16, "refused": None, **others}
    return LayerShape(heads, torch.Size([kv_heads, size]), torch.Size([kv_heads, of_value or size]), **found)


def test_the_double_is_called_as_torch_s_kernel_is() -> None:
    from torch.nn.attention.varlen import varlen_attn

    real, double = (inspect.signature(one) for one in (varlen_attn, varlen_attn_of("Ada")))
    assert [(p.name, p.kind, p.default) for p in double.parameters.values()] == [
        (p.name, p.kind, p.default) for p in real.parameters.values()
    ]


@cards
@pytest.mark.parametrize("wrong", ["", "a row lacks its last key", "two rows have each other's blocks", "no order"])
def test_a_kernel_that_is_right_is_taken_and_a_wrong_one_is_refused_by_name(
    card: str, wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_on_a_card(monkeypatch, card, wrong)
    for dtype in (torch.bfloat16, torch.float16):
        found = choose_kernel(CPU, [layer(dtype=dtype), layer(heads=2, size=24, dtype=dtype)])
        assert (None if found is None else found.block_tokens) == (None if wrong else BLOCK_TOKENS[card])
    assert ("is off by" in caplog.text) == bool(wrong)


def test_what_the_kernel_lacks_is_said_and_a_cpu_is_asked_for_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_on_a_card(monkeypatch, "Ada")
    assert choose_kernel(CPU, [layer(), layer(refused="soft caps")]) is None
    assert "has no soft caps" in caplog.text
    assert choose_kernel(CPU, [layer(of_value=8)]) is None
    assert "fails (v must have shape" in caplog.text
    monkeypatch.setattr(paged, "varlen_kernel", lambda: None)
    assert choose_kernel(CPU, [layer()]) is None
    assert f"takes no blocks in torch {torch.__version__}" in caplog.text
    caplog.clear()
    assert paged.choose_kernel(CPU, [layer()]) is None
    assert not caplog.text


@pytest.mark.parametrize(("make", "lacks"), [
    (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)), "windows in blocks"),
    (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16)), "soft caps"),
    (lambda: GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=16, num_local_experts=2, num_experts_per_tok=1)), "sinks"),
])  # fmt: skip
def test_a_model_that_needs_more_keeps_the_attention_that_copies(
    make: Any, lacks: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put_on_a_card(monkeypatch, "Ada")
    batches = PagedBatches(make().eval(), EngineSettings(cache_tokens=64))
    assert f"has no {lacks}" in caplog.text
    assert batches._kernel is None and batches._graphs is None


@cards
def test_answers_of_a_mixed_batch_are_those_of_each_request_alone(
    card: str, engine_with: Any, tiny_model_dir: Path, adapters_dir: Path, tmp_path: Path, alone: Any,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """A step has parts of prompts beside answers. Prompts share beginnings, some are cancelled, adapters are VeRA and LoRA."""
    for name in NAMES[:2]:
        (tmp_path / name).symlink_to(adapters_dir / name)
    write_adapters(tmp_path, tiny_model_dir, {"rank 5": 7}, rank=5)
    write_adapters(tmp_path, tiny_model_dir, {"lora": 8}, method="lora", rank=4)
    store, chooser, asked = store_of(tmp_path), random.Random(3), []
    for i in range(9):
        prompt = [9] * chooser.choice([0, 40]) + [chooser.randrange(3, 300) for _ in range(chooser.choice([1, 20, 70]))]
        sampling: dict[str, Any] = {"temperature": 1.0, "seed": i} if i % 3 == 0 else {}
        name = "lora" if i > 6 else [BASE, *NAMES[:2], "rank 5"][i % 4]
        asked.append(request(prompt, store.resolve(name), 14, top_logprobs=1, **sampling))
    expected = expected_of(alone, tmp_path, asked)
    graphs = put_on_a_card(monkeypatch, card)
    with engine_with(max_running=5, step_tokens=48, slots=3) as engine:
        for adapter in map(store.resolve, store.names()):
            assert adapter is not None
            engine.load(adapter)
        answers = [submit(engine, one) for one in asked[:7]]
        answers[0].wait_for_token()
        engine.cancel(asked[4].id)
        ends = [answer.end().reason for answer in answers]  # before the LoRAs begin
        answers += [submit(engine, one) for one in asked[7:]]
        for i, answer in enumerate(answers):
            if i != 4 or ends[i] == "length":
                assert_same(answer, expected[i])
    assert graphs.replays > len(graphs.shapes) > 1
    assert {rows for rows, _ in graphs.shapes} <= {1, 2, 4, 8}
    # LoRAs make the host wait on this base, which computes in fp32
    assert "a step of answers is not recorded as a graph (operation not permitted when stream is" in caplog.text


def test_a_step_is_recorded_once_for_its_shape_and_anew_when_the_layers_change(
    engine_with: Any, tiny_model_dir: Path, adapters_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES[:2]:
        (tmp_path / name).symlink_to(adapters_dir / name)
    write_adapters(tmp_path, tiny_model_dir, {"rank 5": 7}, rank=5)
    store = store_of(tmp_path)
    names = ("a0", "a1", BASE, "a1", "rank 5", "a0")
    asked = [request([5, 6, 7 + i], store.resolve(name), 9, top_logprobs=0) for i, name in enumerate(names)]
    expected = expected_of(lambda adapter: Alone(tiny_model_dir, adapter), tmp_path, asked)
    graphs, recordings = put_on_a_card(monkeypatch, "Hopper"), []
    with engine_with() as engine:
        for one, events in zip(asked, expected, strict=True):
            assert_answers(engine, [one], [events])
            recordings.append(len(graphs.shapes))
    # one for the shape of a0, which a1 has too; one for the base; then the layers are others
    assert recordings == [1, 1, 2, 2, 3, 4]
    assert graphs.replays == 6 * 8 - 4  # all steps but the first of each


def test_a_single_token_of_a_longer_prompt_is_in_no_graph_of_answers(
    engine_with: Any, alone: Any, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three answers leave the prompt one of a step's four tokens at a time, and it draws none before its last."""
    asked = [
        request([5 + i] * length, max_tokens=tokens) for i, (length, tokens) in enumerate([(1, 30)] * 3 + [(9, 8)])
    ]
    expected = expected_of(alone, adapters_dir, asked)
    graphs = put_on_a_card(monkeypatch, "Hopper")
    with engine_with(step_tokens=4) as engine:
        answers = [submit(engine, one) for one in asked]
        for answer, events in zip(answers, expected, strict=True):
            assert_same(answer, events)
    assert (4, 304) in graphs.shapes


def test_loras_in_16_bits_are_in_the_graph(
    engine_with: Any, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapters(tmp_path, tiny_model_dir, {"one": 1, "two": 2, "three": 3}, method="lora", rank=8)
    store: AdapterStore = store_of(tmp_path)
    asked = [[3 + i] * (5 + i) for i in range(4)]
    names = ["one", "two", "two", "three"]
    monkeypatch.setattr("qvera.utils.accelerator.multiplies_groups", lambda _: True)
    monkeypatch.setattr(TokenSlots, "width", None)  # only a CPU fills up its slots
    found = []
    for has_graphs in (False, True):
        graphs = put_on_a_card(monkeypatch, "Hopper", graphs=has_graphs)
        with engine_with(model={"compute_dtype": "bfloat16"}) as engine:
            requests = [request(ids, store.resolve(name), 12) for ids, name in zip(asked, names, strict=True)]
            found.append([answer.tokens for answer in [submit(engine, one) for one in requests]])
        assert bool(graphs.replays) == has_graphs
    assert found[0] == found[1]
