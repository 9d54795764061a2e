"""`accelerate_peft`: PEFT's VeRA with our layers is PEFT's VeRA, in numbers, files, keys, dtypes and errors."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, VeraConfig, VeraModel, get_peft_model, mapping
from peft.tuners.vera import Linear as StockLinear
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import qvera
from qvera.adapters import AdaptedForward, accelerated_peft
from qvera.models import linear
from tests.adapters.helpers import IDS, relative
from tests.conftest import small_llama

CONTEXTS: tuple[Callable[[], Any], ...] = (accelerated_peft, contextlib.nullcontext)
"""Ours, then stock PEFT's."""


@pytest.fixture
def accelerated() -> Iterator[None]:
    with accelerated_peft():
        yield


def base(kind: str, directory: Path) -> Any:
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    if not kind.startswith("nf4"):
        return small_llama().to(dtype)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=four_bit)


def config(**changes: Any) -> VeraConfig:
    return VeraConfig(**{"r": 12, "target_modules": "all-linear", "projection_prng_key": 3, **changes})


def perturbed(model: Any, adapter: str = "default", seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name and name.endswith(adapter):
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3
    return model.train()


def both(make: Callable[[], Any] = small_llama, **changes: Any) -> list[Any]:
    """The model with our layers, and with PEFT's."""
    found = []
    for context in CONTEXTS:
        with context():
            found.append(perturbed(get_peft_model(make(), config(**changes))))
    return found


def is_ours(model: nn.Module) -> bool:
    return any(isinstance(m, AdaptedForward) for m in model.modules())


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def logits(model: Any) -> torch.Tensor:
    """In the mode that the model is in."""
    with torch.no_grad():
        return model(IDS).logits


def assert_alike(ours: Any, stock: Any) -> None:
    torch.testing.assert_close(logits(ours), logits(stock), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "nf4", "nf4-bf16"])
def test_logits_gradients_names_and_dtypes_are_pefts(kind: str, tiny_model_dir: Path) -> None:
    ours, stock = both(lambda: base(kind, tiny_model_dir))
    layers = [m for m in ours.modules() if isinstance(m, AdaptedForward)]
    assert len(layers) == 14 and not is_ours(stock)
    assert all(isinstance(m, StockLinear) or "Linear" in type(m).__name__ for m in layers)
    assert isinstance(ours.base_model, VeraModel)
    described = [{n: (p.dtype, p.shape, p.requires_grad) for n, p in m.named_parameters()} for m in (ours, stock)]
    assert described[0] == described[1]
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert ours.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    (our_logits, our_grads), (wanted, grads) = step(ours), step(stock)
    assert our_logits.dtype == wanted.dtype
    tolerance = 2e-2 if kind.endswith("bf16") else 2e-5
    assert relative(our_logits, wanted) < tolerance
    assert our_grads.keys() == grads.keys() and len(grads) == 28
    for name, grad in grads.items():
        assert our_grads[name].dtype == grad.dtype
        assert relative(our_grads[name], grad) < (0.15 if kind.endswith("bf16") else 1e-4), name
    with stock.disable_adapter(), ours.disable_adapter():
        assert relative(logits(ours), logits(stock)) < tolerance
        assert relative(logits(stock), wanted) > 5e-2


@pytest.mark.parametrize("save_projection", [True, False])
def test_files_are_interchangeable(save_projection: bool, tmp_path: Path) -> None:
    ours, stock = both(save_projection=save_projection)
    ours.save_pretrained(tmp_path / "ours"), stock.save_pretrained(tmp_path / "stock")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "stock"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    one, other = ((tmp_path / n / "adapter_config.json").read_text() for n in ("ours", "stock"))
    assert one == other
    for context, source in zip(CONTEXTS, ("stock", "ours"), strict=True):
        with context():
            loaded = PeftModel.from_pretrained(small_llama(), tmp_path / source)
        assert is_ours(loaded) is (context is accelerated_peft)
        assert_alike(loaded.train(), stock)


def test_restore_gives_stock_back_and_twice_is_harmless() -> None:
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] is VeraModel
    qvera.accelerate_peft(), qvera.accelerate_peft()
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] is not VeraModel
    for _ in range(2):
        qvera.restore_peft()
        assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] is VeraModel
    assert not is_ours(get_peft_model(small_llama(), config()))


def test_several_adapters_switch_add_up_and_go() -> None:
    ours, stock = both()
    for model, context in zip((ours, stock), CONTEXTS, strict=True):
        with context():
            model.add_adapter("other", config())
        perturbed(model, "other", seed=2)
    seen = []
    for names in ("default", "other", ["default", "other"]):
        for model in (ours, stock):
            model.base_model.set_adapter(names)
        assert_alike(ours, stock)
        seen.append(logits(ours))
    assert relative(seen[0], seen[1]) > 1e-2
    assert relative(seen[0], seen[2]) > 1e-2
    ours.delete_adapter("other")
    ours.set_adapter("default")
    torch.testing.assert_close(logits(ours), seen[0])


def test_merge_and_unmerge_are_pefts(accelerated: None) -> None:
    ours = perturbed(get_peft_model(small_llama(), config()))
    expected = logits(ours)
    weights = {n: p.clone() for n, p in ours.named_parameters() if "base_layer" in n}
    ours.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(ours.get_parameter(name), weight) for name, weight in weights.items())
    ours.unmerge_adapter()
    for name, weight in weights.items():
        torch.testing.assert_close(ours.get_parameter(name), weight)
    plain = ours.merge_and_unload()
    assert not is_ours(plain)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    broken = perturbed(get_peft_model(small_llama(), config()))
    next(p for n, p in broken.named_parameters() if "lambda_b" in n).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaNs detected"):
        broken.merge_adapter(safe_merge=True)


@pytest.mark.parametrize(
    "wrong", [{"r": 0}, {"target_modules": ["nothing"]}, {"target_modules": ["embed_tokens"]}], ids=str
)
def test_errors_are_pefts(wrong: dict[str, Any]) -> None:
    said = []
    for context in CONTEXTS:
        with context(), pytest.raises((ValueError, TypeError, ZeroDivisionError)) as caught:
            get_peft_model(small_llama(), config(**wrong))
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("change", "kind"), [("in place", "dense"), ("load", "nf4-bf16"), ("to", "nf4-bf16"), ("to", "dense")]
)
def test_cached_copies_follow_the_projections(change: str, kind: str, tiny_model_dir: Path) -> None:
    ours, stock = both(lambda: base(kind, tiny_model_dir))
    first = logits(ours)
    for model in (ours, stock):
        A = model.base_model.vera_A["default"]
        new = torch.randn(A.shape, generator=torch.Generator().manual_seed(5)) * 0.3
        if change == "in place":
            A.copy_(new)
        elif change == "load":
            state = {k: new.to(v) for k, v in model.state_dict().items() if "vera_A" in k}
            model.load_state_dict(state, strict=False)
        else:
            model.to(torch.float64 if kind == "dense" else torch.float32)
    assert relative(logits(ours), logits(stock)) < (2e-2 if kind == "nf4-bf16" else 2e-5)
    assert change == "to" or relative(first, logits(ours)) > 1e-2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, accelerated: None) -> None:
    model = perturbed(get_peft_model(small_llama(), config()))
    expected, grads = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, checkpointed = step(model)
    torch.testing.assert_close(again, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-7)


def test_dropout_acts_in_training_only(accelerated: None) -> None:
    model = perturbed(get_peft_model(small_llama(), config(vera_dropout=0.5)))
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    torch.testing.assert_close(logits(model), logits(model))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.lin(x)
        y += x
        return y


@pytest.mark.parametrize("tokens", [2, 40, 600])  # each of the layer's three ways
def test_outputs_can_be_changed_in_place_as_those_of_peft(tokens: int) -> None:
    found = []
    for model in both(Residual, target_modules=["lin"]):
        x = torch.linspace(-1, 1, 3 * tokens * 64).view(3, tokens, 64).requires_grad_()
        y = model(x)
        y.square().mean().backward()
        found.append([y.detach(), x.grad, *(p.grad for n, p in model.named_parameters() if "lambda" in n)])
    for ours, stock in zip(*found, strict=True):
        assert relative(ours, stock) < 2e-5


def test_conv1d_bases() -> None:
    def gpt2() -> Any:
        torch.manual_seed(0)
        drops = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=304, **drops))

    assert_alike(*both(gpt2, target_modules=["c_attn"], fan_in_fan_out=True))


def test_a_deep_copy_is_independent(accelerated: None) -> None:
    model = perturbed(get_peft_model(small_llama(), config()))
    other, expected = copy.deepcopy(model), logits(model)
    torch.testing.assert_close(logits(other), expected)
    perturbed(other, seed=9)
    assert relative(logits(other), expected) > 1e-2
    torch.testing.assert_close(logits(model), expected)


def test_the_base_runs_through_our_frozen_linear(accelerated: None, tiny_model_dir: Path) -> None:
    model = get_peft_model(base("nf4", tiny_model_dir), config())
    frozen = [m for m in model.modules() if isinstance(m, linear.FrozenLinear4bit)]
    weights = [m.weight.data.clone() for m in frozen]
    assert len(frozen) == 14
    logits(model.eval())  # stock Linear4bit repacks its weights here, and later gradients are wrong
    assert all(torch.equal(m.weight.data, weight) for m, weight in zip(frozen, weights, strict=True))


def test_trl_sft_trainer(accelerated: None, tmp_path: Path, tiny_model_dir: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["say the word twice"] * 16})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.1, report_to=[],
        use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=base("nf4", tiny_model_dir), args=arguments, train_dataset=rows, peft_config=config(),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
    )  # fmt: skip
    assert is_ours(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
