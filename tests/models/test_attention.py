"""Attention without masks has the losses and gradients of attention with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from qvera.evaluation import evaluate
from qvera.models import attention
from qvera.models.attention import needs_padding_mask
from tests.data.test_padding import rows_of

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 304, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
OTHER_NAMES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def model_of(kind: str, implementation: str | None, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **OTHER_NAMES.get(kind, {}), **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32).train()


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    nll, _ = evaluate.batch_nll(model, batch, 64)
    nll.backward()
    return nll.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


WINDOWS = {"mistral": {"sliding_window": 8}, "gemma3_text": {"sliding_window": 8}}
CASES: list[tuple[str, str | None, dict[str, Any]]] = [(kind, None, {}) for kind in attention._CAUSAL]
CASES += [(kind, None, window) for kind, window in WINDOWS.items()]
CASES += [(kind, "eager", {}) for kind in ("llama", "gemma2", "gpt2")]


@pytest.mark.parametrize(("kind", "implementation", "changes"), CASES)
def test_right_padding_needs_no_mask(kind: str, implementation: str | None, changes: dict[str, Any]) -> None:
    model = model_of(kind, implementation, **changes)
    rows = rows_of(31, 7, 19, 2)
    batch = evaluate.make_batch(model, rows, 0, prefix_once=False)
    assert "attention_mask" not in batch
    mask = torch.tensor([[column < len(row.input_ids) for column in range(31)] for row in rows])
    nll, gradients = loss_and_gradients(model, batch)
    masked_nll, masked_gradients = loss_and_gradients(model, {**batch, "attention_mask": mask})
    assert torch.equal(nll, masked_nll)
    assert gradients.keys() == masked_gradients.keys()
    assert all(torch.equal(gradients[name], masked_gradients[name]) for name in gradients)


def test_a_model_that_sees_later_tokens_keeps_its_mask() -> None:
    model = model_of("gemma3_text", "sdpa", use_bidirectional_attention=True)
    assert needs_padding_mask(model)
    rows = rows_of(31, 7, 19)
    batch = evaluate.make_batch(model, rows, 0)
    assert batch["attention_mask"].sum() == 31 + 7 + 19
    nll, _ = loss_and_gradients(model, batch)
    del batch["attention_mask"]
    assert abs(nll - loss_and_gradients(model, batch)[0]) > 1e-2


class OwnModel(LlamaForCausalLM):
    """As a checkpoint's own code would define it."""


def test_unknown_models_keep_their_mask() -> None:
    model = model_of("llama", "sdpa")
    assert not needs_padding_mask(model)
    assert needs_padding_mask(OwnModel(model.config))
    model.config.model_type = "mixtral"
    assert needs_padding_mask(model)
