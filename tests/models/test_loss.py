"""Chunked cross entropy against the plain loss on whole logits, and the memory that it is for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PretrainedConfig

from qvera.data import IGNORED, Example, collate, collate_prefix_once
from qvera.data.rows import pad_batch
from qvera.models import loss as loss_module
from qvera.models.loss import (
    Head,
    require_own_logits,
    states_at,
    target_logprobs,
    target_loss,
)
from qvera.utils.errors import InputError
from tests.adapters.helpers import base_layer, dense_weight, relative
from tests.conftest import small_llama
from tests.live_bytes import PeakBytes
from tests.models.helpers import summed_loss

HIDDEN, VOCABULARY = 24, 301
ALL: dict[str, Any] = {"bias": True, "softcap": 3.0, "scale": 1.7}


def head(dtype: torch.dtype = torch.float32, bias: bool = False, softcap: Any = None, scale: float = 1.0) -> Head:
    torch.manual_seed(3)
    return Head(nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(dtype).requires_grad_(False), softcap, scale)


def batch(rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and labels of which about a third is not trained."""
    g = torch.Generator().manual_seed(1)
    hidden = (2 * torch.randn(rows, tokens, HIDDEN, generator=g)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (rows, tokens), generator=g)
    labels[torch.rand(rows, tokens, generator=g) < 0.33] = IGNORED
    return hidden.requires_grad_(), labels


def fused(
    hidden: torch.Tensor, labels: torch.Tensor, *args: Any, **more: Any
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Value, gradient, and the number of trained tokens."""
    loss, count = summed_loss(hidden, labels, *args, **more)
    return loss.detach(), torch.autograd.grad(loss, hidden)[0], count


def plain(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient of F.cross_entropy over whole logits in fp64."""
    hidden, module = hidden.detach().double().requires_grad_(), head.module
    logits = hidden @ dense_weight(module).t() + (0 if module.bias is None else module.bias.double())
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing
    )
    return loss.detach(), torch.autograd.grad(loss, hidden)[0]


@pytest.mark.parametrize(
    ("settings", "chunk", "smoothing"),
    [
        ({}, 7, 0.0), ({"bias": True}, 1, 0.0), ({"softcap": 5.0}, 64, 0.1), ({"scale": 0.0625}, 10_000, 0.0),
        ({}, 7, 0.9), (ALL, 7, 0.0), (ALL, 7, 0.1),
    ],
)  # fmt: skip
def test_value_and_gradient_are_torchs(settings: dict[str, Any], chunk: int, smoothing: float) -> None:
    hidden, labels = batch(3, 37)
    loss, grad, count = fused(hidden, labels, head(**settings), chunk, label_smoothing=smoothing)
    wanted, wanted_grad = plain(hidden, labels, head(**settings), smoothing)
    assert count == int((labels[:, 1:] != IGNORED).sum())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    assert relative(grad, wanted_grad) < 2e-6
    # what is not trained, and the last position, which predicts nothing, get exactly nothing
    untrained = torch.cat([labels[:, 1:] == IGNORED, torch.ones(3, 1, dtype=torch.bool)], dim=1)
    assert torch.count_nonzero(grad[untrained]) == 0
    with torch.no_grad():
        evaluated, _ = summed_loss(hidden, labels, head(**settings), chunk, label_smoothing=smoothing)
    assert not evaluated.requires_grad and torch.equal(evaluated, loss)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_log_probabilities_of_targets_are_differentiable_as_those_of_whole_logits(chunk: int) -> None:
    """Several targets of a token, weighed by a function of all of them; fp64 logits with scale, bias and softcap."""
    hidden, _ = batch(1, 19)
    rows, whole = hidden[0], hidden[0].detach().double().requires_grad_()
    targets = torch.randint(0, VOCABULARY, (19, 2), generator=torch.Generator().manual_seed(2))
    own = head(**ALL)
    found = target_logprobs(rows, targets, own, chunk)
    logits = own.logits(whole @ own.module.weight.double().t() + own.module.bias.double())
    expected = logits.log_softmax(-1).gather(1, targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for logprobs in (found, expected):
        (logprobs.exp() * logprobs.sum().sigmoid() - logprobs.square()).sum().backward()
    assert hidden.grad is not None and whole.grad is not None
    assert relative(hidden.grad[0].double(), whole.grad) < 1e-5


def test_logits_at_a_temperature_are_the_heads_divided_by_it() -> None:
    """A cap comes before the temperature, as where answers are drawn."""
    product = torch.linspace(-9, 9, 11)
    torch.testing.assert_close(head(**ALL).at(0.5).logits(product), head(**ALL).logits(product) / 0.5)
    assert head().at(1.0).softcap is None


def test_rows_that_count_differently() -> None:
    hidden, labels = batch(2, 19)
    weights = torch.tensor([0.5, 2.0])
    trained = torch.nonzero((labels[:, 1:] != IGNORED).flatten()).flatten()
    rows, places = trained // 18, trained % 18
    states, targets = states_at(hidden, rows * 19 + places), labels[rows, places + 1].unsqueeze(1)
    each = weights[rows].unsqueeze(1)
    total, logprobs = target_loss(
        states, targets, head(), 5, lambda lps, part: (-lps * each[part], each[part]), label_smoothing=0.2
    )
    (grad,) = torch.autograd.grad(total, hidden)
    for row in range(2):
        wanted, wanted_grad = plain(hidden[row : row + 1], labels[row : row + 1], head(), 0.2)
        torch.testing.assert_close(-logprobs[rows == row].sum().double(), wanted, rtol=1e-6, atol=0)
        assert relative(grad[row], weights[row] * wanted_grad[0]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_value_and_gradient_16_bits(dtype: torch.dtype) -> None:
    hidden, labels = batch(2, 65, dtype)
    loss, grad, _ = fused(hidden, labels, head(dtype, **ALL), 16)
    wanted, wanted_grad = plain(hidden, labels, head(dtype, **ALL))
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)  # the sum is not kept in 16 bits
    assert abs(loss.item() / wanted.item() - 1) < 2e-3
    assert relative(grad, wanted_grad) < 1.5e-2


def test_a_gradient_below_the_smallest_float16_is_kept_where_its_factor_is_known() -> None:
    """As of a token among 10 million, at a loss scale of 2^20."""
    hidden, labels = batch(2, 65, torch.float16)
    _, wanted = plain(hidden, labels, head(torch.float16))
    small = torch.tensor(1e-7)
    scaled = small * 2.0**20
    # the last brings another one than was expected
    for expected, brought, lost in ((scaled, scaled, False), (None, small, True), (scaled, 2 * scaled, False)):
        loss, _ = summed_loss(hidden, labels, head(torch.float16), 16, expected_grad=expected)
        (grad,) = torch.autograd.grad(loss, hidden, brought)
        assert (relative(grad, wanted * brought) > 0.1) if lost else (relative(grad, wanted * brought) < 1.5e-2)


def test_gradcheck_in_double_precision_and_a_second_derivative_is_refused() -> None:
    hidden, labels = batch(1, 5, torch.float64)
    h = head(torch.float64, bias=True, softcap=4.0, scale=0.7)
    assert torch.autograd.gradcheck(lambda x: summed_loss(x, labels, h, 2)[0], (hidden,))
    loss, _ = summed_loss(hidden, labels, h, 8)
    (first,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("rows", "tokens", "untrained"), [(3, 10, slice(0, 1)), (3, 10, slice(None)), (2, 1, slice(0))]
)
def test_rows_without_a_trained_token(rows: int, tokens: int, untrained: slice) -> None:
    """One of three, all of them, and rows of one token, which predict nothing."""
    hidden, labels = batch(rows, tokens)
    labels[untrained] = IGNORED
    loss, grad, count = fused(hidden, labels, head(), 4)
    assert torch.isfinite(grad).all() and torch.count_nonzero(grad[untrained]) == 0
    trains = untrained == slice(0, 1)
    assert (count > 0, loss.item() > 0, bool(torch.count_nonzero(grad))) == (trains, trains, trains)


def test_huge_logits_stay_finite() -> None:
    hidden, labels = batch(1, 20)
    hidden = (hidden.detach() * 1e4).requires_grad_()
    loss, grad, _ = fused(hidden, labels, head(), 8)
    wanted, wanted_grad = plain(hidden, labels, head())
    assert math.isfinite(loss.item()) and abs(loss.item() / wanted.item() - 1) < 1e-5
    assert relative(grad, wanted_grad) < 1e-4


@pytest.mark.parametrize("kind", ["nf4+dq-bfloat16", "int8", "stored in 16 bits"])
def test_a_head_that_is_stored_otherwise(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in 16 bits is cast block by block."""
    layer = base_layer("linear").bfloat16() if kind == "stored in 16 bits" else base_layer(kind)
    monkeypatch.setattr(loss_module, "HEAD_BLOCK_ELEMENTS", 10 * layer.in_features)
    hidden = torch.randn(2, 9, layer.in_features, requires_grad=True)
    labels, stored = torch.randint(0, layer.out_features, (2, 9)), Head(layer, None, 1.0)
    loss, grad, _ = fused(hidden, labels, stored, 4)
    wanted, wanted_grad = plain(hidden, labels, stored)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert relative(grad, wanted_grad) < 1e-5


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_equals_the_models_own_loss(tied: bool, dtype: torch.dtype) -> None:
    model = small_llama(tie_word_embeddings=tied).to(dtype)
    assert Head.of(model) == (model.lm_head, None, 1.0)
    ids = torch.randint(3, 300, (2, 19))
    labels = ids.clone()
    labels[:, :6] = IGNORED
    loss, count = summed_loss(model.model(ids).last_hidden_state, labels, Head.of(model), 5)
    wanted = model(input_ids=ids, labels=labels).loss
    assert (loss / count).item() == pytest.approx(wanted.item(), rel=1e-5 if dtype == torch.float32 else 5e-3)


def test_scaling_and_softcap_are_read_from_the_config() -> None:
    module = nn.Linear(2, 3)

    def of(config: Any, module: nn.Module | None = module) -> Head:
        fake: Any = SimpleNamespace(get_output_embeddings=lambda: module, config=config)
        return Head.of(fake)

    assert of(PretrainedConfig()) == (module, None, 1.0)
    assert of(PretrainedConfig(logits_soft_cap=30.0)) == (module, 30.0, 1.0)  # RecurrentGemma
    if hasattr(transformers, "Gemma4Config"):  # it takes images too, and its text has a config of its own
        text = {"final_logit_softcapping": 5.0, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        text["hidden_size_per_layer_input"] = 0
        assert of(transformers.Gemma4Config(text_config=text, vision_config=None, audio_config=None)).softcap == 5.0
    with pytest.raises(RuntimeError, match="no output embeddings"):
        of(PretrainedConfig(), None)
    adapted = get_peft_model(small_llama(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(InputError, match="without an adapter on the output head"):
        Head.of(adapted.get_base_model())


def test_a_scale_before_the_head_is_seen_where_the_first_token_is_the_padding() -> None:
    model = small_llama(pad_token_id=0)
    model.get_input_embeddings().weight.data[0] = 0
    require_own_logits(model)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    with pytest.raises(InputError, match="scales or caps its logits"):
        require_own_logits(model)


_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_SMALL_TEXT = {**_SMALL, "head_dim": 16, "num_key_value_heads": 1, "vocab_size": 120, "initializer_range": 0.3}
_SMALL_TOWER = {**_SMALL, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}


@pytest.mark.parametrize(
    ("name", "tree", "reason"),
    [
        (
            "paligemma",
            {"text_config": {**_SMALL_TEXT, "model_type": "gemma"}, "vision_config": _SMALL_TOWER},
            "is no causal language model: its first token's output depends on the second",
        ),
        (
            "t5gemma2",
            {"encoder": {"text_config": _SMALL_TEXT, "vision_config": _SMALL_TOWER}, "decoder": _SMALL_TEXT},
            "can't be run on tokens alone",
        ),
    ],
)
def test_a_model_of_images_and_text_that_is_no_causal_language_model_is_refused(
    name: str, tree: dict[str, Any], reason: str
) -> None:
    """PaliGemma's prompt is seen both ways, and T5Gemma 2 has an encoder."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.for_model(name, **tree)).eval()
    with pytest.raises(InputError, match=reason):
        require_own_logits(model)


_SCALED: dict[str, dict[str, Any]] = {
    "HyperCLOVAX": {"logits_scaling": 4.0},
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0},
    "FalconH1": {"lm_head_multiplier": 0.1, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
}


@pytest.mark.parametrize("family", _SCALED)
def test_a_model_that_scales_or_caps_its_logits_has_its_own_loss_or_is_refused(family: str) -> None:
    """HyperCLOVAX multiplies by what Granite divides by."""
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3, **_SCALED[family],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    if family == "HyperCLOVAX":
        with pytest.raises(InputError, match="HyperCLOVAXForCausalLM .model_type hyperclovax. scales or caps its"):
            require_own_logits(model)
        return
    require_own_logits(model)
    ids = torch.randint(3, 120, (2, 11))
    loss, count = summed_loss(model.model(ids).last_hidden_state, ids, Head.of(model), 4)
    assert (loss / count).item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_memory_does_not_grow_with_vocabulary_times_tokens() -> None:
    """Of the loss and its backward, less hidden states, which are there anyway and grow with tokens."""

    def chunked(hidden: torch.Tensor, labels: torch.Tensor, module: Any) -> torch.Tensor:
        return summed_loss(hidden, labels, Head(module, None, 1.0), 32)[0]

    def whole(hidden: torch.Tensor, labels: torch.Tensor, module: Any) -> torch.Tensor:
        return F.cross_entropy(module(hidden)[0, :-1], labels[0, 1:], reduction="sum")

    peaks, module = [], nn.Linear(8, 4096, bias=False).requires_grad_(False)
    for loss in (chunked, whole):
        for tokens in (64, 1024):
            hidden, labels = torch.randn(1, tokens + 1, 8, requires_grad=True), torch.randint(0, 4096, (1, tokens + 1))
            with PeakBytes() as census:
                loss(hidden, labels, module).backward()
            peaks.append(census.peak)
    few, many, plain_few, plain_many = peaks
    assert few >= 32 * 4096 * 4  # the census sees the logits of a chunk
    # 960 more tokens cost a few copies of their hidden states [tokens, 8] and labels, and no logits [tokens, 4096]
    assert many - few < 960 * (8 * 4 * 6 + 8 * 6)
    assert plain_many - plain_few > 960 * 4096 * 4  # the census would have seen it


@pytest.mark.parametrize("kind", ["padded", "padded further", "joined"])
def test_places_from_the_host_are_those_that_labels_show(kind: str) -> None:
    """The places of the trained tokens, which `qvera.data.rows` knows."""
    rows = []
    for seed, tokens, prompt in ((0, 9, 4), (1, 5, 1), (2, 12, 11)):
        ids = np.random.default_rng(seed).integers(3, VOCABULARY, tokens).astype(np.int32)
        rows.append(Example(ids, np.arange(tokens) >= prompt, "a row", ids[:prompt], "", None))
    made = collate_prefix_once(rows, packing=True) if kind == "joined" else collate(rows, pad_id=0)
    assert made is not None
    if kind == "padded further":
        made = pad_batch(made, 17, 0)
    row, place = torch.nonzero(made["labels"][:, 1:] != IGNORED, as_tuple=True)
    assert torch.equal(made["trained"], row * made["labels"].shape[1] + place) and len(row) == 5 + 4 + 1


def test_a_head_with_rows_of_single_tokens_is_refused_by_name() -> None:
    """As TRL and PEFT advise for new tokens. Their wrapper is no linear, and has no weight to take in chunks."""
    for tied in (True, False):
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 6])
        model: Any = get_peft_model(small_llama(tie_word_embeddings=tied), config)
        if not tied:  # then only the embedding has such rows
            assert Head.of(model.get_base_model()).module.out_features == 304
            continue
        with pytest.raises(InputError, match="trainable_token_indices"):
            Head.of(model.get_base_model())
