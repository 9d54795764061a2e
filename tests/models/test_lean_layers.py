"""Norms, gated MLPs and rotations of a frozen base: transformers' numbers, less kept, and no other model touched."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from qvera.adapters.save_load import attach, named_vectors
from qvera.config.sections import AdapterSection
from qvera.kernels import elementwise
from qvera.models import lean_layers
from qvera.models.checkpointing import enable_checkpointing
from tests.adapters.helpers import perturb, relative
from tests.conftest import small_llama

HIDDEN, WIDE = 48, 80


def norm(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    module = LlamaRMSNorm(HIDDEN, eps=1e-5)
    module.weight.data = 1 + 0.3 * torch.randn(HIDDEN)
    return module.to(dtype).requires_grad_(False)


def mlp(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = small_llama(hidden_size=HIDDEN, intermediate_size=WIDE).config
    return LlamaMLP(config).to(dtype).requires_grad_(False)


def both_ways(module: Any, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [norm, mlp])
def test_same_output_to_the_bit_and_same_gradient(make: Any, dtype: torch.dtype, tolerance: float) -> None:
    stock, ours = make(dtype), make(dtype)
    assert lean_layers.reduce_saved_activations(ours) == 1
    for tokens in (1, 130):
        x, upstream = (torch.randn(2, tokens, HIDDEN, dtype=dtype) for _ in range(2))
        y, grad = both_ways(ours, x, upstream)
        expected, expected_grad = both_ways(stock, x, upstream)
        assert torch.equal(y, expected)
        assert grad.dtype == dtype and relative(grad, expected_grad) < tolerance
        # neither is further from the truth than the other
        truth = both_ways(make(torch.float32), x.float(), upstream.float())[1]
        assert relative(grad, truth) < 1.2 * relative(expected_grad, truth) + 1e-6
        with torch.no_grad():
            assert torch.equal(ours(x), expected)
        changed, changed_grad = both_ways(lambda inner: ours(inner).add_(inner), x, upstream)  # in place
        assert torch.equal(changed, expected + x)
        assert relative(changed_grad, grad + upstream) < tolerance


def test_a_norm_that_is_trained_is_left_to_autograd() -> None:
    found, x = list[torch.Tensor](), torch.randn(4, HIDDEN)
    for module in (norm(), norm()):
        if not found:
            lean_layers.reduce_saved_activations(module)
        module.requires_grad_(True)(x).sum().backward()
        found.append(module.weight.grad)
    assert torch.equal(*found)


IDS = torch.arange(3, 20).unsqueeze(0)
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip


def small(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL)).eval()


def test_attaching_an_adapter_does_it_and_a_copy_still_runs() -> None:
    plain, model = small_llama(), attach(small_llama().requires_grad_(False), AdapterSection(rank=4))
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kinds = {type(m).__name__ for m in copied.get_base_model().modules()}
        assert {"LowMemoryLlamaRMSNorm", "LowMemoryLlamaMLP"} <= kinds and not kinds & {"LlamaRMSNorm", "LlamaMLP"}
        with torch.no_grad():
            assert torch.equal(copied(IDS).logits, plain(IDS).logits)


def test_copies_of_llama_s_modules_are_known_and_others_left_alone() -> None:
    assert lean_layers.reduce_saved_activations(small("Mistral")) == 4
    assert lean_layers.reduce_saved_activations(small("Gemma")) == 0  # (1 + w) h, and GELU
    assert lean_layers.reduce_saved_activations(small_llama(hidden_act="gelu")) == 5  # norms only


def test_a_module_that_is_no_longer_used_is_freed_at_once() -> None:
    module = mlp()
    lean_layers.reduce_saved_activations(module)
    weight = weakref.ref(module.up_proj.weight)
    gc.disable()  # a cycle would hold two thirds of a model until the collector comes
    try:
        del module
        assert weight() is None
    finally:
        gc.enable()


def test_accelerates_hooks_stay() -> None:
    called = []

    class Hook(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            called.append(module)  # with device_map, this brings the weights
            return args, kwargs

    module = norm()
    add_hook_to_module(module, Hook())
    lean_layers.reduce_saved_activations(module)
    module(torch.randn(3, HIDDEN))
    assert called == [module]


def logits_and_gradient(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), embeddings)
    return logits.detach(), gradient


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma", "Mixtral"])
def test_models_that_rotate_as_llama_does_give_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels, for which plain code stands in on this CPU."""
    model = small(name)
    expected, expected_gradient = logits_and_gradient(model)
    assert (lean_layers.fuse_rotation(model), lean_layers.fuse_rotation(model)) == (1, 1)
    rope, calls = elementwise.rope, list[Any]()
    monkeypatch.setattr(lean_layers, "use_kernels", lambda *tensors: True)
    monkeypatch.setattr(elementwise, "rope", lambda *args, **kwargs: calls.append(args) or rope(*args, **kwargs))
    logits, gradient = logits_and_gradient(model)
    assert calls
    assert torch.equal(logits, expected)
    assert relative(gradient, expected_gradient) < 2e-6
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)


def test_models_that_rotate_otherwise_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger-Kernel sets a function of its own in transformers' module."""
    assert [lean_layers.fuse_rotation(small(name)) for name in ("GPTNeoX", "Phi3", "Cohere")] == [0, 0, 0]
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", elementwise.rope)
    assert lean_layers.fuse_rotation(small_llama()) == 0


def test_nothing_changes_on_a_cpu_nor_for_other_models() -> None:
    plain, model = small_llama(), small_llama()
    ours, theirs = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    assert lean_layers.fuse_rotation(model) == 2
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward) == (ours, theirs)
    for changed in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits_and_gradient(changed), logits_and_gradient(plain), rtol=0, atol=0)


@pytest.mark.process
def test_torch_compile_sees_through_it() -> None:
    torch._dynamo.reset()
    model = small("Llama")
    lean_layers.fuse_rotation(model)
    found = torch._dynamo.explain(model)(IDS)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


# MLPs by tiles of tokens.


@pytest.fixture
def few_tokens_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 tokens above 20."""
    for name, value in (("TILED_ABOVE_TOKENS", 20), ("_TILE_TOKENS", 8), ("_MULTIPLE", 1)):
        monkeypatch.setattr(lean_layers, name, value)


def tiled_model(dtype: torch.dtype = torch.float32, checkpointing: bool = True, **adapter: Any) -> Any:
    model = perturb(attach(small_llama().to(dtype).requires_grad_(False), AdapterSection(rank=8, **adapter)))
    enable_checkpointing(model, checkpointing)
    return model.train()


def results(model: Any, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))
    loss = model(input_ids=ids, labels=ids).loss
    vectors = named_vectors(model)
    return {"loss": loss.detach(), **dict(zip(vectors, torch.autograd.grad(loss, list(vectors.values())), strict=True))}


@pytest.mark.usefixtures("few_tokens_are_many")
@pytest.mark.parametrize(
    ("dtype", "rows", "tokens", "adapter"),
    [
        (torch.float32, 2, 37, {}),
        (torch.float32, 1, 64, {"b_groups": 4, "input_scale": True}),
        (torch.float32, 3, 8, {"targets": ["gate_proj"]}),
        (torch.float32, 1, 21, {"targets": ["down_proj", "q_proj"]}),
        (torch.bfloat16, 2, 37, {}),
    ],
)
def test_tiles_give_the_numbers_of_the_whole(
    dtype: torch.dtype, rows: int, tokens: int, adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, real = list[Any](), lean_layers.tiled
    monkeypatch.setattr(lean_layers, "tiled", lambda *args: taken.append(args) or real(*args))
    expected = results(tiled_model(dtype, checkpointing=False, **adapter), rows, tokens)
    assert not taken
    found = results(tiled_model(dtype, **adapter), rows, tokens)
    assert taken
    assert {name: value.dtype for name, value in found.items()} == {n: value.dtype for n, value in expected.items()}
    # 16 bits round every product: a small gradient alone may differ by more
    one, other = (torch.cat([value.float().flatten() for value in each.values()]) for each in (found, expected))
    assert relative(one, other) < (5e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.usefixtures("few_tokens_are_many")
def test_tiles_are_not_taken_where_they_gain_nothing_or_would_give_other_numbers() -> None:
    """SpIEL's first look at the gradients of a pass finds the places that may get a value next."""
    model = tiled_model()
    mlp, x = model.get_base_model().model.layers[0].mlp, torch.zeros(1, 40, 64)
    assert lean_layers.can_tile(mlp, x) and not lean_layers.can_tile(mlp, x[:, :20])
    mlp.down_proj.needs_whole_passes = True
    assert not lean_layers.can_tile(mlp, x)
    assert not lean_layers.can_tile(tiled_model(dropout=0.5).get_base_model().model.layers[0].mlp, x)


@pytest.mark.usefixtures("few_tokens_are_many")
def test_without_a_checkpoint_and_under_autocast() -> None:
    """The function by itself: no gradient of x is asked for, then one is, in another dtype than the weights'."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(16, 40), nn.SiLU(), nn.Linear(40, 16))
    x, upstream = torch.randn(3, 11, 16), torch.randn(3, 11, 16)
    for wanted in (False, True):
        both = []
        for function in (mlp, lambda x: lean_layers.tiled(mlp, mlp, x)):
            mlp.zero_grad()
            given = x.clone().requires_grad_(wanted)
            with torch.autocast("cpu", torch.bfloat16):
                y = function(given)
            y.backward(upstream.to(y.dtype))
            both.append([y, *(p.grad.clone() for p in mlp.parameters()), *([given.grad] if wanted else [])])  # type: ignore[union-attr]
        for one, other in zip(*both, strict=True):
            assert relative(one, other) < 2e-2  # type: ignore[arg-type]
