"""With ``batch_invariant`` an answer has the same bits whoever shares the batch."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from qvera.adapters.products.slots import TokenSlots, pair_slots
from qvera.models.loss import Head
from qvera.serve.batches import PagedBatches
from qvera.serve.invariance import computes_rows_alike
from qvera.serve.requests import EngineSettings, GenerationRequest, PromptScoring
from qvera.serve.store import AdapterStore
from qvera.utils.errors import RunFailed
from tests.serve.as_on_a_card import put_on_a_card
from tests.serve.helpers import BASE, Answer, engine_of, request, store_of, submit, tiny_base, write_adapters

KINDS: dict[str, dict[str, Any]] = {
    "vera 8": {"rank": 8},
    "vera 5": {"rank": 5, "b_groups": 5, "input_scale": True},
    "lora 4": {"method": "lora", "rank": 4, "targets": ["q_proj", "down_proj"]},
    "lora 16": {"method": "lora", "rank": 16},
}


@pytest.fixture(scope="module")
def store(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    """Two adapters of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    for i, (name, settings) in enumerate(KINDS.items()):
        write_adapters(root, tiny_model_dir, {name: i, f"{name} too": 20 + i}, **settings)
    return store_of(root)


def traffic(store: AdapterStore) -> list[GenerationRequest]:
    """Of the base, then of all adapters; some prompts begin alike, some are scored, some answers are drawn."""
    chooser, asked = random.Random(3), []
    for i, name in enumerate([BASE, BASE, *store.names(), BASE, *store.names()[::2]]):
        prompt = [9] * chooser.choice([0, 20]) + [chooser.randrange(3, 300) for _ in range(chooser.choice([2, 11, 30]))]
        sampling: dict[str, Any] = {"temperature": 0.9, "seed": i, "top_p": 0.9} if i % 3 == 0 else {}
        one = request(prompt, store.resolve(name), 4, top_logprobs=3, **sampling)
        scoring = PromptScoring(len(prompt) - 1, top=2, draws=1, seed=i) if i % 4 == 1 else None
        asked.append(GenerationRequest(one.id, one.prompt, one.adapter, one.sampling, scoring=scoring))
    return asked


def bits(answer: Answer) -> Any:
    """All that is told of an answer."""
    assert answer.end().reason == "length"
    scores = answer.scores
    told = () if scores is None else (scores.own, scores.top_tokens, scores.top, scores.drawn_tokens, scores.drawn)
    return [(one.token, one.logprob, one.top) for one in answer.events], [found.tobytes() for found in told]


def assert_invariant(model_dir: Path, store: AdapterStore, model: dict[str, Any]) -> None:
    alone = []
    with engine_of(model_dir, model=model, batch_invariant=True) as engine:
        for one in traffic(store):
            alone.append(bits(submit(engine, one)))
            engine._batches.reset()  # the next one finds nothing of it in the cache
    assert len({str(one) for one in alone}) == len(alone) >= 9
    # in pieces, and in a cache in which some begin again
    with engine_of(model_dir, model=model, batch_invariant=True, step_tokens=23, cache_tokens=144, slots=4) as engine:
        for adapter in map(store.resolve, reversed(store.names())):
            assert adapter is not None
            engine.load(adapter)
        asked = traffic(store)
        together = [submit(engine, one) for one in reversed(asked)][::-1]
        assert [bits(answer) for answer in together] == alone
        found = [bits(submit(engine, one)) for one in traffic(store)[:4]]  # whose beginnings are in the cache
        assert found == alone[:4]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_answer_has_the_same_bits_alone_and_in_any_company(
    dtype: str, tiny_model_dir: Path, store: AdapterStore
) -> None:
    """Beside other adapters, in pieces, with a beginning from the cache, begun again; its prompt's scores too."""
    assert_invariant(tiny_model_dir, store, {"compute_dtype": dtype})


def test_it_has_on_a_card_where_all_passes_are_graphs_of_one_shape(
    tiny_model_dir: Path, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = put_on_a_card(monkeypatch, "Hopper")
    assert_invariant(tiny_model_dir, store, {"compute_dtype": "bfloat16"})
    assert graphs.replays > 20
    assert set(graphs.shapes) == {(16, 304)}


def test_a_model_or_engine_that_can_t_keep_it_is_refused_by_name(tiny_model_dir: Path) -> None:
    settings = EngineSettings(batch_invariant=True, cache_tokens=64)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=60, num_key_value_heads=2, num_local_experts=2))
    with pytest.raises(RunFailed, match="MixtralForCausalLM: how many tokens share an expert's products"):
        PagedBatches(experts.eval(), settings)
    with (
        pytest.raises(RunFailed, match="needs continuous batches"),
        engine_of(tiny_model_dir, "static", batch_invariant=True),
    ):
        pass


def test_a_pass_has_so_many_tokens_that_their_places_make_no_difference(tiny_model_dir: Path) -> None:
    base, unlike = tiny_base(tiny_model_dir), [16]

    def differ(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        changed = logits.clone()
        changed[..., -1, :] += 1e-3 * (changed.shape[-2] in unlike)
        return changed

    Head.of(base.model).module.register_forward_hook(differ)
    with engine_of(tiny_model_dir, base=base, batch_invariant=True) as engine:
        assert engine._batches.pass_tokens == 32
    unlike += [32, 64]
    with (
        pytest.raises(RunFailed, match="the last bits of a token's logits depend on its place in a pass"),
        engine_of(tiny_model_dir, base=base, batch_invariant=True),
    ):
        pass


def test_numbers_that_a_thread_computes_one_by_one_are_seen() -> None:
    assert computes_rows_alike(16, [64, 128], torch.float32)
    # rows of 33 end within a vector, so the last ones of all have a remainder
    drawn = torch.linspace(0.1, 4, 992)
    if (drawn.sigmoid() != torch.cat([one.sigmoid() for one in drawn.split(1)])).any():
        assert not computes_rows_alike(3, [33], torch.float32)


def test_a_fixed_product_of_loras_is_the_same_and_keeps_a_slot_s_nan_to_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    base, x, A, B = (
        torch.randn(*size, generator=generator).double() for size in ((9, 5), (9, 7), (3, 2, 7), (3, 5, 2))
    )
    index = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1])
    wanted = base + 0.5 * torch.einsum("tmr,trn,tn->tm", B[index], A[index], x)
    A[1] = float("nan")
    found = pair_slots(base, x, A, B, 0.5, TokenSlots(index, 3, fixed=True))
    assert torch.allclose(found[index != 1], wanted[index != 1])
    assert found[index == 1].isnan().all()
