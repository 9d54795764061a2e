"""Answers: the same in a batch as alone, reproducible when sampled, and without a trace in the training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qvera.adapters import AdaptedForward, QveraLinear
from qvera.adapters.files.save_load import attach
from qvera.config.schema import AdapterSection, ModelSection
from qvera.data import Example
from qvera.evaluation import generate as generation
from qvera.evaluation import held_out
from qvera.evaluation.generate import generate, generating
from qvera.evaluation.metrics import exact_match
from qvera.models import forward
from qvera.models.loader import load_base
from qvera.models.structure import causal_model
from qvera.utils.errors import InputError
from tests.adapters.helpers import perturb, weight_bytes

PROMPTS = [[5, 9, 200, 31, 7], [40], [8, 8, 30, 1, 99, 4, 250, 6, 17, 60, 61], [77, 12], [5, 9, 200, 31, 8]]


def load(directory: Path, quantization: str = "none") -> tuple[Any, Any]:
    section = ModelSection(path=str(directory), quantization=quantization, compute_dtype="float32")  # type: ignore[arg-type]
    base = load_base(section, torch.device("cpu"))
    model = attach(base.model, AdapterSection(rank=8))
    perturb(model)
    return model.eval(), base.tokenizer


@pytest.fixture(scope="module")
def dense(tiny_model_dir: Path) -> tuple[Any, Any]:
    return load(tiny_model_dir)


def by_hand(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int, ends: set[int]) -> str:
    """Greedy decoding without cache, batch or padding: the whole sequence through the model for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_greedy_answers_in_a_batch_are_those_by_hand(tiny_model_dir: Path, quantization: str) -> None:
    model, tokenizer = load(tiny_model_dir, quantization)
    wanted = [by_hand(model, tokenizer, p, 8, {2}) for p in PROMPTS]
    assert len(set(wanted)) > 2 and all(wanted)
    for batch_size in (1, 2, 16):
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=batch_size) == wanted


def test_a_static_cache_changes_no_answer(dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    answers = generate(model, tokenizer, PROMPTS, max_new_tokens=5, batch_size=3, static_cache=True)
    assert answers == generate(model, tokenizer, PROMPTS, max_new_tokens=5, batch_size=3)


def test_answers_and_held_out_loss_go_on_with_fewer_rows_where_memory_runs_out(dense: tuple[Any, Any]) -> None:
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


def test_prompts_with_the_pad_or_end_token_inside_are_read_as_they_are(dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    prompts = [[0, 5, 9], [2, 0, 0, 41, 2, 7], [6]]
    answers = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    assert answers == [by_hand(model, tokenizer, p, 8, {2}) for p in prompts]


def test_an_end_token_ends_one_answer_and_not_its_neighbours(dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    config = model.generation_config
    with torch.no_grad():
        first = int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    before = config.eos_token_id
    config.eos_token_id = [2, first]  # as Llama 3, whose generation config names several
    try:
        answers = generate(model, tokenizer, PROMPTS, max_new_tokens=9)
    finally:
        config.eos_token_id = before
    wanted = [by_hand(model, tokenizer, p, 9, {2, first}) for p in PROMPTS]
    assert answers == wanted
    assert answers[0] == tokenizer.decode([first])
    assert len(answers[1]) > len(answers[0])


def test_answers_come_in_the_order_of_the_prompts_and_progress_is_told(dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    told: list[int] = []
    forth = generate(model, tokenizer, PROMPTS, max_new_tokens=4, batch_size=2, progress=told.append)
    back = generate(model, tokenizer, PROMPTS[::-1], max_new_tokens=4, batch_size=2)
    assert forth == back[::-1]
    assert told == [2, 4, 5]
    assert generate(model, tokenizer, [], max_new_tokens=4) == []


def test_sampling_is_reproducible_and_leaves_the_random_state_alone(dense: tuple[Any, Any]) -> None:
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


def test_greedy_does_not_heed_the_models_own_sampling_settings(dense: tuple[Any, Any]) -> None:
    model, tokenizer = dense
    wanted = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    config = model.generation_config
    kept = config.do_sample, config.temperature, config.top_p
    config.do_sample, config.temperature, config.top_p = True, 5.0, 0.99
    try:
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == wanted
    finally:
        config.do_sample, config.temperature, config.top_p = kept


@pytest.mark.parametrize(
    ("training", "use_cache", "fails"), [(True, True, False), (True, False, True), (False, False, False)]
)
def test_mode_cache_and_weights_are_put_back(
    dense: tuple[Any, Any], training: bool, use_cache: bool, fails: bool
) -> None:
    model, _ = dense
    config = model.get_base_model().config
    before = config.use_cache
    model.train(training)
    config.use_cache = use_cache
    layers = [m for m in model.modules() if isinstance(m, QveraLinear)]
    weights = [weight_bytes(layer.base_layer) for layer in layers]
    try:
        with generating(model):
            assert not model.training
            assert config.use_cache
            assert not torch.is_grad_enabled()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert model.training is training
    assert all(m.training is training for m in model.modules())
    assert config.use_cache is use_cache
    assert torch.is_grad_enabled()
    assert not any(layer.holds_inference_weight for layer in layers)
    assert [weight_bytes(layer.base_layer) for layer in layers] == weights
    config.use_cache = before
    model.eval()


def test_an_error_in_the_middle_of_an_answer_puts_everything_back(tiny_model_dir: Path) -> None:
    model, tokenizer = load(tiny_model_dir, "nf4")
    model.train()
    state = torch.get_rng_state()

    def fail(_: int) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=2, batch_size=2, temperature=1.0, progress=fail)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.holds_inference_weight for m in model.modules() if isinstance(m, QveraLinear))
    assert not any(hasattr(m, "_inference_pack") for m in model.modules())


@pytest.mark.parametrize("fits", [True, False])
def test_with_and_without_room_for_dense_copies(
    tiny_model_dir: Path, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(tiny_model_dir, "nf4")
    wanted = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    monkeypatch.setattr(generation, "_dense_fits", lambda layers: fits)
    with generating(model):
        assert all(m.holds_inference_weight is fits for m in model.modules() if isinstance(m, QveraLinear))
        with generating(model):  # nested: the inner block changes nothing
            pass
        assert all(m.holds_inference_weight is fits for m in model.modules() if isinstance(m, QveraLinear))
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == wanted


def test_the_adapter_can_be_switched_off_while_answering(dense: tuple[Any, Any]) -> None:
    model, _ = dense
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad(), model.disable_adapter():
        base = model(ids).logits
    with generating(model):
        adapted = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, adapted)
    assert not torch.allclose(base, adapted, atol=1e-3)


def test_another_adapter_made_active_while_answering_is_heeded(dense: tuple[Any, Any], tiny_model_dir: Path) -> None:
    from qvera.adapters import QveraConfig

    model, _ = load(tiny_model_dir)
    model.add_adapter("second", QveraConfig(rank=5))
    perturb(model, seed=7, adapter="second")
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        first = model(ids).logits
        model.set_adapter("second")
        second = model(ids).logits
        model.set_adapter("default")
    with generating(model):
        torch.testing.assert_close(model(ids).logits, first, rtol=1e-4, atol=1e-4)
        model.set_adapter("second")
        torch.testing.assert_close(model(ids).logits, second, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ('{"a": 1, "b": [2]}', '{"b":[2],"a":1}', True),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": 1}', '{"a": 1, "b": null}', False),
        ("  red \n blue", "red blue", True),
        ("red", "Red", False),
        ("5", "5.0", True),
        ("NaN", "NaN", True),
        ('{"a": 1', '{"a": 1', True),
        ("", "x", False),
        ("true", "1", False),
        ("0", "false", False),
        ('{"a": [1, true]}', '{"a": [1, 1]}', False),
        ('{"a": [1, true]}', '{"a":[1.0,true]}', True),
        ("1", "1.0", True),
        ("true", "true ", True),
        ('{"a": 1}', '{"b": 1}', False),
        ("[1]", "[1, 2]", False),
        ("null", "0", False),
    ],
)
def test_exact_match(answer: str, reference: str, same: bool) -> None:
    assert exact_match(answer, reference) is same


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_holds_weights_only_where_the_loss_stays_the_same(tiny_model_dir: Path, dtype: str) -> None:
    base = load_base(ModelSection(path=str(tiny_model_dir), compute_dtype=dtype), torch.device("cpu"))  # type: ignore[arg-type]
    model = attach(base.model, AdapterSection(rank=8))
    perturb(model)
    batch = {
        "input_ids": torch.tensor([[5, 9, 20, 31, 7, 50, 42]]),
        "labels": torch.tensor([[5, 9, 20, 31, 7, 50, 42]]),
    }
    model.eval()
    with torch.no_grad():
        alone, _ = forward.batch_nll(model, batch, 64)
        with held_out.scoring(model):
            held, _ = forward.batch_nll(model, batch, 64)
            layers = [m for m in model.modules() if isinstance(m, AdaptedForward)]
            assert all(layer.holds_inference_weight == (dtype == "float32") for layer in layers)
    torch.testing.assert_close(held, alone, rtol=1e-6 if dtype == "float32" else 0, atol=0)


class Batched(TorchDispatchMode):
    """Shapes of the right sides of batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.shapes.add(tuple(args[1].shape[1:]))
        return func(*args, **(kwargs or {}))


def test_the_head_s_product_is_not_a_batched_one(dense: tuple[Any, Any]) -> None:
    """The last positions of several rows are a strided tensor; a batched product would copy a 16-bit head once for each row."""
    model, _ = dense
    head = tuple(model.get_base_model().get_output_embeddings().weight.t().shape)
    ids = torch.arange(3, 3 + 4 * 6).view(4, 6)
    with torch.no_grad(), Batched() as seen:
        plain = model(ids, logits_to_keep=1).logits
    batched = head in seen.shapes
    with generating(model), Batched() as seen:
        logits = model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(logits, plain)
    assert head not in seen.shapes
    if not batched:  # torch 2.13 makes one, 2.15 does not
        pytest.skip(f"torch {torch.__version__} makes no batched product of a head itself, so nothing was avoided")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("batch_size", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_name(dense: tuple[Any, Any], setting: str, value: float) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 2, setting: value}
    with pytest.raises(InputError, match=f"^{setting}: expected"):
        generate(*dense, [[5, 6]], **settings)
