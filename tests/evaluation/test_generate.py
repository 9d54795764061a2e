"""Answers: the same in a batch as alone, reproducible when sampled, and without a trace in the training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvera.adapters import AdaptedForward, QveraConfig, QveraLinear
from qvera.adapters.save_load import attach
from qvera.config.sections import AdapterSection, ModelSection
from qvera.data import Example
from qvera.evaluation import generate as generation
from qvera.evaluation import held_out
from qvera.evaluation.generate import end_tokens, generate, generating
from qvera.evaluation.metrics import exact_match
from qvera.models import forward
from qvera.models.loader import load_base
from qvera.models.structure import causal_model
from qvera.utils.errors import InputError
from tests.adapters.helpers import perturb, weight_bytes
from tests.conftest import small_tokenizer
from tests.data.rows import byte_tokenizer, messages_of, one

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
PROMPTS = [[5, 9, 200, 31, 7], [40], [8, 8, 30, 1, 99, 4, 250, 6, 17, 60, 61], [77, 12], [5, 9, 200, 31, 8]]
WITH_MARKERS = [[0, 5, 9], [2, 0, 0, 41, 2, 7], [6]]
"""Prompts with the pad token and the end token in them."""
Loaded = tuple[Any, Any]


def load(directory: Path, quantization: str = "none", dtype: str = "float32") -> Loaded:
    section = ModelSection(path=str(directory), quantization=quantization, compute_dtype=dtype)  # type: ignore[arg-type]
    base = load_base(section, torch.device("cpu"))
    model = attach(base.model, AdapterSection(rank=8))
    perturb(model)
    return model.eval(), base.tokenizer


@pytest.fixture(scope="module")
def dense(tiny_model_dir: Path) -> Loaded:
    return load(tiny_model_dir)


@pytest.fixture(scope="module")
def nf4(tiny_model_dir: Path) -> Loaded:
    return load(tiny_model_dir, "nf4")


def by_hand(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int, ends: set[int]) -> str:
    """Greedy decoding without cache, batch or padding: the whole sequence through the model for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return str(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_greedy_answers_in_a_batch_are_those_by_hand(kind: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = request.getfixturevalue(kind)
    prompts = PROMPTS + WITH_MARKERS
    wanted = [by_hand(model, tokenizer, p, 8, {2}) for p in prompts]
    assert len(set(wanted)) > 2 and all(wanted)
    told: list[int] = []
    for options in ({"batch_size": 1}, {"batch_size": 3, "progress": told.append}, {"batch_size": 16}):
        assert generate(model, tokenizer, prompts, max_new_tokens=8, **options) == wanted  # type: ignore[arg-type]
    assert told == [3, 6, 8]
    assert generate(model, tokenizer, prompts[::-1], max_new_tokens=8, batch_size=3) == wanted[::-1]
    assert generate(model, tokenizer, [], max_new_tokens=4) == []


def test_answers_and_held_out_loss_go_on_with_fewer_rows_where_memory_runs_out(dense: Loaded) -> None:
    model, tokenizer = dense
    none = np.array([], dtype=np.int32)
    trained = [np.arange(len(p)) > 0 for p in PROMPTS]
    rows = [Example(np.array(p, dtype=np.int32), t, "", none, "", None) for p, t in zip(PROMPTS, trained, strict=True)]
    settings: dict[str, Any] = {"pad_id": 0, "batch_size": 4, "chunk_tokens": 8}
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    loss = held_out.held_out_loss(model, rows, **settings)

    def fail_once(*_: Any) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    decoder = causal_model(model).get_decoder()
    hook = decoder.register_forward_pre_hook(fail_once)
    with pytest.warns(UserWarning, match="5 prompts at a time .* going on with 2"):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == answers
    hook = decoder.register_forward_pre_hook(fail_once)
    with pytest.warns(UserWarning, match="4 held-out rows at a time .* going on with 2"):
        again = held_out.held_out_loss(model, rows, **settings)
    assert again["loss"] == pytest.approx(loss["loss"], rel=1e-6)
    assert again["trained_tokens"] == loss["trained_tokens"]


def test_an_end_token_ends_one_answer_and_not_its_neighbours(dense: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = dense
    with torch.no_grad():
        first = int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    # as Llama 3, whose generation config names several
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, first])
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=9)
    assert answers == [by_hand(model, tokenizer, p, 9, {2, first}) for p in PROMPTS]
    assert answers[0] == tokenizer.decode([first])
    assert len(answers[1]) > len(answers[0])


def test_answers_of_a_base_model_end_where_its_chat_templates_end_a_turn() -> None:
    """Its eos ends a text: rows train <|im_end|>, whether the template is its own or a named one."""
    tokenizer, model = small_tokenizer(), torch.nn.Module()
    tokenizer.eos_token = "<|endoftext|>"
    for template in (tokenizer.chat_template, None):
        tokenizer.chat_template = template
        assert tokenizer.convert_ids_to_tokens(end_tokens(model, tokenizer)) == ["<|endoftext|>", "<|im_end|>"]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '<|im_start|>' }}{% endfor %}"
    assert "<|im_start|>" in tokenizer.convert_ids_to_tokens(end_tokens(model, tokenizer))


def test_sampling_is_reproducible_and_leaves_the_random_state_alone(
    dense: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = dense

    def sample(seed: int, **changes: Any) -> list[str]:
        return generate(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.5, seed=seed, **changes)

    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = sample(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert sample(1) == first
    assert sample(2) != first
    # a nucleus that holds one token only is greedy
    greedy = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert sample(1, top_p=1e-6) == greedy != first
    # which does not heed the model's own settings
    for name, value in (("do_sample", True), ("temperature", 5.0), ("top_p", 0.99), ("repetition_penalty", 1.5)):
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == greedy


@pytest.mark.parametrize("fails", [False, True])
def test_mode_cache_weights_and_random_state_are_put_back(
    nf4: Loaded, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = nf4
    config = model.get_base_model().config
    monkeypatch.setattr(config, "use_cache", fails)
    layers = [m for m in model.modules() if isinstance(m, QveraLinear)]
    weights = [weight_bytes(layer.base_layer) for layer in layers]
    state = torch.get_rng_state()
    seen = []

    def look(_: int) -> None:
        seen.append((model.training, config.use_cache, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("in the middle")

    model.train()
    try:
        generate(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=2, temperature=1.0, progress=look)
    except RuntimeError:
        assert fails
    assert seen == [(False, True, False)] * (1 if fails else 3)
    assert all(m.training for m in model.modules())
    model.eval()
    assert config.use_cache is fails
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(layer.holds_inference_weight for layer in layers)
    assert not any(hasattr(m, "_inference_pack") for m in model.modules())
    assert [weight_bytes(layer.base_layer) for layer in layers] == weights


@pytest.mark.parametrize("fits", [True, False])
def test_with_and_without_room_for_dense_copies(nf4: Loaded, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = nf4
    wanted = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    monkeypatch.setattr(generation, "_dense_fits", lambda layers: fits)
    with generating(model):
        with generating(model):  # nested: the inner block changes nothing
            pass
        assert all(m.holds_inference_weight is fits for m in model.modules() if isinstance(m, QveraLinear))
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == wanted


def test_the_adapter_can_be_switched_off_or_changed_while_answering(tiny_model_dir: Path) -> None:
    model, _ = load(tiny_model_dir)
    model.add_adapter("second", QveraConfig(rank=5))
    perturb(model, seed=7, adapter="second")
    ids = torch.tensor([PROMPTS[2]])

    def all_logits() -> list[torch.Tensor]:
        with torch.no_grad():
            found = []
            for name in ("second", "default"):
                model.set_adapter(name)
                found.append(model(ids).logits)
            with model.disable_adapter():
                return [*found, model(ids).logits]

    before = all_logits()
    with generating(model):
        for found, wanted in zip(all_logits(), before, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not any(torch.allclose(before[a], before[b], atol=1e-3) for a, b in ((0, 1), (0, 2), (1, 2)))


EQUAL = [('{"a": 1, "b": [2]}', '{"b":[2],"a":1}'), ("  red \n blue", "red blue"), ("5", "5.0"), ("NaN", "NaN")]
EQUAL += [('{"a": 1', '{"a": 1'), ('{"a": [1, true]}', '{"a":[1.0,true]}'), ("true", "true ")]
DIFFERENT = [('{"a": 1}', '{"a": "1"}'), ('{"a": 1}', '{"a": 1, "b": null}'), ("red", "Red"), ("", "x"), ("true", "1")]
DIFFERENT += [("0", "false"), ('{"a": [1, true]}', '{"a": [1, 1]}'), ('{"a": 1}', '{"b": 1}'), ("[1]", "[1, 2]")]


def test_exact_match() -> None:
    assert [pair for pair in EQUAL if not exact_match(*pair)] == []
    assert [pair for pair in [*DIFFERENT, ("null", "0")] if exact_match(*pair)] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_holds_weights_only_where_the_loss_stays_the_same(tiny_model_dir: Path, dtype: str) -> None:
    model, _ = load(tiny_model_dir, "nf4", dtype)
    ids = torch.tensor([[5, 9, 20, 31, 7, 50, 42]])
    batch = {"input_ids": ids, "labels": ids.clone(), "trained": torch.arange(6)}
    with torch.no_grad():
        alone, _ = forward.batch_nll(model, batch, 64)
        with held_out.scoring(model):
            held, _ = forward.batch_nll(model, batch, 64)
            layers = [m for m in model.modules() if isinstance(m, AdaptedForward)]
            assert all(layer.holds_inference_weight == (dtype == "float32") for layer in layers)
    torch.testing.assert_close(held, alone, rtol=1e-6 if dtype == "float32" else 0, atol=0)


@pytest.mark.parametrize(
    "setting", ["max_new_tokens=0", "batch_size=0", "temperature=-1", "temperature=nan", "top_p=0", "top_p=1.5"]
)
def test_a_setting_out_of_its_range_is_refused_by_name(dense: Loaded, setting: str) -> None:
    name, _, value = setting.partition("=")
    settings: dict[str, Any] = {"max_new_tokens": 2, name: float(value)}
    with pytest.raises(InputError, match=f"^{name}: expected"):
        generate(*dense, [[5, 6]], **settings)


@pytest.mark.parametrize(
    ("written", "content"),
    [("<think>\n\n</think>\n\n", "think"), ("<s>final<s>", "red"), ("", " red")],  # Qwen3, gpt-oss, a completion
)
def test_what_a_template_writes_before_an_answer_is_no_part_of_it(
    written: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model has to write it, as the first one here does; what it writes otherwise stays."""
    tokenizer = byte_tokenizer()
    turn = f"<|im_start|>{{{{ m.role }}}}\n{{{{ {written!r} if m.role != 'user' }}}}{{{{ m.content }}}}<|im_end|>\n"
    prompt = "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}"
    row = one(messages_of("say it", content), tokenizer)
    right, wrong = tokenizer.decode(row.input_ids[row.trained].tolist(), skip_special_tokens=True), "<think>red"
    monkeypatch.setattr(held_out, "generate", lambda *_, **__: [right, wrong])
    model: Any = None
    found = held_out.answer_rows(model, tokenizer, [row, row], max_new_tokens=9)
    assert [(each["answer"], each["exact"]) for each in found] == [(content, True), (wrong, False)]


@pytest.mark.parametrize("content", [None, "I look."])
def test_a_tool_call_is_compared_as_its_template_writes_it(
    content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (TEMPLATES / "qwen-2.5.jinja").read_text()
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    row = one([*messages_of("sun?"), {"role": "assistant", "content": content, "tool_calls": [call]}], tokenizer)
    right = tokenizer.decode(row.input_ids[row.trained].tolist(), skip_special_tokens=True)
    answers = [right, right.replace("Oslo", "Rome"), content or ""]
    monkeypatch.setattr(held_out, "generate", lambda *_, **__: answers)
    model: Any = None
    found = held_out.answer_rows(model, tokenizer, [row] * 3, max_new_tokens=9)
    assert [each["exact"] for each in found] == [True, False, False]
    assert '{"city": "Oslo"}' in found[0]["reference"] and found[0]["reference"].startswith(content or "<tool_call>")
