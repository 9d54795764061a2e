"""The attention that rotates by one kernel: Llama's numbers, in every model that rotates as Llama does, and no other."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from qvera.kernels import elementwise
from qvera.models import rope
from tests.adapters.helpers import relative
from tests.conftest import small_llama

IDS = torch.arange(3, 20).unsqueeze(0)
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip


def logits_and_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), embeddings)
    return logits.detach(), gradient


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Take the way of the kernels on this CPU, where plain code stands in for them; one entry for each rotation."""
    calls: list[bool] = []

    def counted(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(backward)
        return elementwise.plain_rope(q, k, cos, sin, backward)

    monkeypatch.setattr(rope, "use_kernels", lambda *tensors: True)
    monkeypatch.setattr(rope.elementwise, "rope", counted)
    return calls


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Mixtral"])
def test_models_that_rotate_as_llama_does_give_the_same_numbers(name: str, rotations: list[bool]) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL)).eval()
    expected, expected_gradient = logits_and_gradient(model)
    assert rotations == []
    assert (rope.fuse_rotation(model), rope.fuse_rotation(model)) == (1, 1)
    logits, gradient = logits_and_gradient(model)
    assert rotations == [False, True]
    assert torch.equal(logits, expected)
    assert relative(gradient, expected_gradient) < 2e-6
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize("name", ["GPTNeoX", "Phi3", "Cohere"])
def test_models_that_rotate_otherwise_are_left_alone(name: str) -> None:
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL))
    assert rope.fuse_rotation(model) == 0


def test_nothing_changes_on_a_cpu_nor_for_other_models() -> None:
    plain, model = small_llama(), small_llama()
    ours, theirs = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    assert rope.fuse_rotation(model) == 2
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward) == (ours, theirs)
    for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for one, other in zip(logits_and_gradient(changed), logits_and_gradient(plain), strict=True):
            assert torch.equal(one, other)


def test_a_rotation_that_somebody_else_replaced_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger-Kernel sets a function of its own in transformers' module."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", elementwise.rope)
    assert rope.fuse_rotation(small_llama()) == 0


@pytest.mark.process
def test_torch_compile_sees_through_it() -> None:
    torch._dynamo.reset()
    model = small_llama()
    rope.fuse_rotation(model)
    found = torch._dynamo.explain(model)(IDS)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
