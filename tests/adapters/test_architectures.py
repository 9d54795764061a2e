"""Beyond Llama: tiny random models of other families, adapted, trained one step, saved, exported and answering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from qvera.adapters import QveraLinear
from qvera.adapters.files.save_load import attach, load_adapter, named_vectors, save_adapter
from qvera.config.schema import AdapterSection, ExportSection, ModelSection
from qvera.export import export_merged
from qvera.export.deltas import read_deltas
from qvera.export.lora import export_lora
from qvera.models.checkpointing import enable_checkpointing
from qvera.models.loader import load_base
from qvera.models.model_config import empty_model
from tests.adapters.helpers import perturb
from tests.conftest import small_tokenizer

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 304,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, tuple[Any, set[str]]] = {
    "mistral": (
        MistralConfig(**COMMON, head_dim=16),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "qwen2": (Qwen2Config(**COMMON), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    "qwen3": (
        Qwen3Config(**COMMON, head_dim=16),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "gemma": (
        GemmaConfig(**COMMON, head_dim=16),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "gemma2": (
        Gemma2Config(**COMMON, head_dim=16),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "phi": (PhiConfig(**COMMON), {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "phi3": (Phi3Config(**COMMON), {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "gpt2": (
        GPT2Config(
            n_embd=64,
            n_head=4,
            n_layer=2,
            vocab_size=304,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        {"c_attn", "c_proj", "c_fc"},
    ),
}
IDS = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, set[str]]:
    config, targets = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp("families") / request.param
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # zero biases would hide that one is forgotten
    model.save_pretrained(directory)
    small_tokenizer().save_pretrained(directory)
    return request.param, directory, targets


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_whole_road(quantization: str, family: tuple[str, Path, set[str]], tmp_path: Path) -> None:
    name, directory, targets = family
    section = ModelSection(path=str(directory), quantization=quantization, compute_dtype="float32")
    if name == "gpt2" and quantization == "nf4":
        pytest.skip(
            "bitsandbytes does not quantize GPT-2's Conv1D through transformers without a conversion of its own"
        )
    model = attach(load_base(section).model, AdapterSection(rank=8), section.path)
    layers = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, QveraLinear)}
    assert layers == targets
    perturb(model)
    enable_checkpointing(model)
    model.train()
    before = model(input_ids=IDS, labels=IDS).loss
    before.backward()
    vectors = named_vectors(model)
    assert vectors
    assert all(p.grad is not None and torch.count_nonzero(p.grad) for p in vectors.values())
    with torch.no_grad():
        for parameter in vectors.values():
            parameter.sub_(0.05 * parameter.grad / parameter.grad.norm())  # type: ignore[operator, union-attr]
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        assert model(input_ids=IDS, labels=IDS).loss < before
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_base(section).model, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, trained)
    options = ExportSection(dtype="float32", base="dequantized" if quantization == "nf4" else "original")
    export_merged(tmp_path / "adapter", section, tmp_path / "merged", options)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, trained, rtol=1e-3, atol=1e-3)
    if quantization == "none":
        export_lora(read_deltas(tmp_path / "adapter", empty_model(section)), tmp_path / "lora", torch.float32)
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "lora").eval()
        with torch.no_grad():
            torch.testing.assert_close(stock(input_ids=IDS).logits, trained, rtol=1e-3, atol=1e-3)
