"""`accelerate_peft`: PEFT's VeRA with our layers is PEFT's VeRA, in numbers, files, keys, dtypes and errors."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftType, VeraConfig, VeraModel, get_peft_model, mapping
from peft.tuners.vera import Linear as StockLinear
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

import qvera
from qvera.adapters import AdaptedForward
from qvera.models import linear
from tests.adapters.helpers import relative
from tests.conftest import small_llama

IDS = torch.tensor([[5, 9, 200, 31, 7, 150, 42, 3], [8, 8, 30, 1, 99, 4, 250, 6]])
RANK = 12
BASES = ["dense", "nf4", "nf4-bf16"]


@pytest.fixture
def accelerated() -> Iterator[None]:
    qvera.accelerate_peft()
    try:
        yield
    finally:
        qvera.restore_peft()


def base(kind: str, directory: Path) -> Any:
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    if not kind.startswith("nf4"):
        return small_llama().to(dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=config)


def config(**changes: Any) -> VeraConfig:
    return VeraConfig(**{"r": RANK, "target_modules": "all-linear", "projection_prng_key": 3, **changes})


def perturbed(model: Any, adapter: str = "default", seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name and name.endswith(adapter):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return model.train()


def both(kind: str, directory: Path, **changes: Any) -> tuple[Any, Any]:
    stock = perturbed(get_peft_model(base(kind, directory), config(**changes)))
    qvera.accelerate_peft()
    try:
        ours = perturbed(get_peft_model(base(kind, directory), config(**changes)))
    finally:
        qvera.restore_peft()
    return ours, stock


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", BASES)
def test_logits_gradients_names_and_dtypes_are_pefts(kind: str, tiny_model_dir: Path) -> None:
    ours, stock = both(kind, tiny_model_dir)
    layers = [m for m in ours.modules() if isinstance(m, AdaptedForward)]
    assert len(layers) == 14
    assert all(isinstance(m, StockLinear) or "Linear" in type(m).__name__ for m in layers)
    assert not any(isinstance(m, AdaptedForward) for m in stock.modules())
    assert isinstance(ours.base_model, VeraModel)
    describe = lambda m: {n: (p.dtype, p.shape, p.requires_grad) for n, p in m.named_parameters()}  # noqa: E731
    assert describe(ours) == describe(stock)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert ours.get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()
    (our_logits, our_grads), (logits, grads) = step(ours), step(stock)
    assert our_logits.dtype == logits.dtype
    tolerance = 2e-2 if kind.endswith("bf16") else 2e-5
    assert relative(our_logits, logits) < tolerance
    assert our_grads.keys() == grads.keys()
    assert len(grads) == 28
    for name, grad in grads.items():
        assert our_grads[name].dtype == grad.dtype
        assert relative(our_grads[name], grad) < (0.15 if kind.endswith("bf16") else 1e-4), name
    with stock.disable_adapter(), ours.disable_adapter():
        assert relative(step_logits(ours), step_logits(stock)) < tolerance
        assert relative(step_logits(stock), logits) > 5e-2


def step_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("direction", "save_projection"), [("ours to stock", True), ("stock to ours", False)])
def test_files_are_interchangeable(direction: str, save_projection: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    ours, stock = both("dense", tiny_model_dir, save_projection=save_projection)
    ours.save_pretrained(tmp_path / "ours"), stock.save_pretrained(tmp_path / "stock")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "stock"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "ours" / "adapter_config.json").read_text() == (
        tmp_path / "stock" / "adapter_config.json"
    ).read_text()
    if direction == "stock to ours":
        qvera.accelerate_peft()
    try:
        source = tmp_path / ("ours" if direction == "ours to stock" else "stock")
        loaded = PeftModel.from_pretrained(small_llama(), source)
    finally:
        qvera.restore_peft()
    assert any(isinstance(m, AdaptedForward) for m in loaded.modules()) is (direction == "stock to ours")
    torch.testing.assert_close(step_logits(loaded.train()), step_logits(stock), rtol=1e-4, atol=1e-5)


def test_restore_gives_stock_back_and_twice_is_harmless() -> None:
    before = mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA]
    assert before is VeraModel
    qvera.accelerate_peft(), qvera.accelerate_peft()
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] is not VeraModel
    qvera.restore_peft()
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] is VeraModel
    model = get_peft_model(small_llama(), config())
    assert not any(isinstance(m, AdaptedForward) for m in model.modules())
    qvera.restore_peft()
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.VERA] is VeraModel


def test_several_adapters_switch_add_up_and_go(accelerated: None) -> None:
    ours = perturbed(get_peft_model(small_llama(), config()))
    ours.add_adapter("other", config())
    perturbed(ours, "other", seed=2)
    qvera.restore_peft()
    stock = perturbed(get_peft_model(small_llama(), config()))
    stock.add_adapter("other", config())
    perturbed(stock, "other", seed=2)
    seen = []
    for names in ("default", "other", ["default", "other"]):
        for model in (ours, stock):
            model.base_model.set_adapter(names)
        torch.testing.assert_close(step_logits(ours), step_logits(stock), rtol=1e-4, atol=1e-5)
        seen.append(step_logits(ours))
    assert relative(seen[0], seen[1]) > 1e-2
    assert relative(seen[0], seen[2]) > 1e-2
    ours.delete_adapter("other")
    ours.set_adapter("default")
    torch.testing.assert_close(step_logits(ours), seen[0])


def test_merge_and_unmerge_are_pefts(accelerated: None) -> None:
    ours = perturbed(get_peft_model(small_llama(), config()))
    expected = step_logits(ours)
    weights = {n: p.clone() for n, p in ours.named_parameters() if "base_layer" in n}
    ours.merge_adapter(safe_merge=True)
    torch.testing.assert_close(step_logits(ours), expected, rtol=1e-4, atol=1e-4)
    assert any(not torch.equal(p, weights[n]) for n, p in ours.named_parameters() if n in weights)
    ours.unmerge_adapter()
    for name, parameter in ours.named_parameters():
        if name in weights:
            torch.testing.assert_close(parameter, weights[name])
    plain = ours.merge_and_unload()
    assert not any(isinstance(m, AdaptedForward) for m in plain.modules())
    torch.testing.assert_close(step_logits(plain), expected, rtol=1e-4, atol=1e-4)
    broken = perturbed(get_peft_model(small_llama(), config()))
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lambda_b" in n).fill_(float("inf"))
    with pytest.raises(ValueError, match="NaNs detected"):
        broken.merge_adapter(safe_merge=True)


@pytest.mark.parametrize(
    "wrong",
    [{"r": 0}, {"target_modules": ["nothing"]}, {"target_modules": ["embed_tokens"]}],
    ids=["rank 0", "no such module", "no linear"],
)
def test_errors_are_pefts(wrong: dict[str, Any], tiny_model_dir: Path) -> None:
    said = []
    for accelerate in (False, True):
        if accelerate:
            qvera.accelerate_peft()
        try:
            with pytest.raises((ValueError, TypeError, ZeroDivisionError)) as caught:
                get_peft_model(small_llama(), config(**wrong))
        finally:
            qvera.restore_peft()
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


def projections(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.base_model.vera_A["default"], model.base_model.vera_B["default"]


@pytest.mark.parametrize("kind", ["nf4-bf16", "dense"])
@pytest.mark.parametrize("change", ["in place", "load", "to"])
def test_cached_copies_follow_the_projections(change: str, kind: str, tiny_model_dir: Path) -> None:
    ours, stock = both(kind, tiny_model_dir)
    first = step_logits(ours)
    for model in (ours, stock):
        A, _B = projections(model)
        new = {"A": torch.randn(A.shape, generator=torch.Generator().manual_seed(5)) * 0.3}
        if change == "in place":
            A.copy_(new["A"])
        elif change == "load":
            state = {k: v.clone() for k, v in model.state_dict().items() if "vera_A" in k}
            model.load_state_dict({k: new["A"].to(v) for k, v in state.items()}, strict=False)
        else:
            model.to(torch.float64 if kind == "dense" else torch.float32)
    assert relative(step_logits(ours), step_logits(stock)) < (2e-2 if kind == "nf4-bf16" else 2e-5)
    if change != "to":
        assert relative(first, step_logits(ours)) > 1e-2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, accelerated: None) -> None:
    model = perturbed(get_peft_model(small_llama(), config()))
    logits, grads = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again, checkpointed = step(model)
    torch.testing.assert_close(again, logits)
    for name, grad in grads.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-7)


def test_dropout_acts_in_training_only(accelerated: None) -> None:
    model = perturbed(get_peft_model(small_llama(), config(vera_dropout=0.5)))
    assert not torch.equal(step_logits(model), step_logits(model))
    model.eval()
    torch.testing.assert_close(step_logits(model), step_logits(model))


@pytest.mark.parametrize("tokens", [2, 40, 600])  # each of the layer's three ways
def test_outputs_can_be_changed_in_place_as_those_of_peft(tokens: int) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.lin(x)
            y += x
            return y

    found = []
    for context in (qvera.adapters.accelerated_peft, contextlib.nullcontext):
        with context():
            model = perturbed(get_peft_model(Residual(), config(target_modules=["lin"])))  # type: ignore[arg-type]
        assert any(isinstance(m, AdaptedForward) for m in model.modules()) is (
            context is qvera.adapters.accelerated_peft
        )
        x = torch.linspace(-1, 1, 3 * tokens * 64).view(3, tokens, 64).requires_grad_()
        y = model(x)
        y.square().mean().backward()
        found.append([y.detach(), x.grad, *(p.grad for n, p in model.named_parameters() if "lambda" in n)])
    for ours, stock in zip(*found, strict=True):
        assert relative(ours, stock) < 2e-5


def test_conv1d_bases(accelerated: None) -> None:
    def gpt2() -> Any:
        torch.manual_seed(0)
        settings = GPT2Config(
            n_embd=32, n_head=4, n_layer=2, vocab_size=304, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0
        )
        return GPT2LMHeadModel(settings)

    ours = perturbed(get_peft_model(gpt2(), config(target_modules=["c_attn"], fan_in_fan_out=True)))
    qvera.restore_peft()
    stock = perturbed(get_peft_model(gpt2(), config(target_modules=["c_attn"], fan_in_fan_out=True)))
    torch.testing.assert_close(step_logits(ours), step_logits(stock), rtol=1e-4, atol=1e-5)


def test_a_deep_copy_is_independent(accelerated: None) -> None:
    model = perturbed(get_peft_model(small_llama(), config()))
    other = copy.deepcopy(model)
    expected = step_logits(model)
    torch.testing.assert_close(step_logits(other), expected)
    perturbed(other, seed=9)
    assert relative(step_logits(other), expected) > 1e-2
    torch.testing.assert_close(step_logits(model), expected)


def test_the_base_runs_through_our_frozen_linear(accelerated: None, tiny_model_dir: Path) -> None:
    model = get_peft_model(base("nf4", tiny_model_dir), config())
    assert sum(isinstance(m, linear.FrozenLinear4bit) for m in model.modules()) == 14
    weights = {n: m.weight.data.clone() for n, m in model.named_modules() if isinstance(m, linear.FrozenLinear4bit)}
    model.eval()
    step_logits(model)  # stock Linear4bit repacks its weights here, and later gradients are wrong
    for name, module in model.named_modules():
        if name in weights:
            assert torch.equal(module.weight.data, weights[name])


def test_trl_sft_trainer(accelerated: None, tmp_path: Path, tiny_model_dir: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    rows = datasets.Dataset.from_dict({"text": ["say the word twice"] * 16})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=0.1, report_to=[],
        use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=base("nf4", tiny_model_dir), args=arguments, train_dataset=rows, peft_config=config(),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
    )  # fmt: skip
    assert any(isinstance(m, AdaptedForward) for m in trainer.model.modules())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
