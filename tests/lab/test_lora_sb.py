"""Gradients of frozen weights, and LoRA-SB's start from them, against autograd and against the authors' own numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qvera.lab.lora_sb import collected, sign_step
from qvera.lab.svd import rows_of_tensor, truncated_svd
from qvera.models import linear
from qvera.models.checkpointing import enable_checkpointing
from tests.adapters.helpers import base_layer, dense_weight, relative
from tests.conftest import small_llama
from tests.lab.authors import numbers_of


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    ids = torch.randint(3, 300, (2, 9))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("checkpointed", [False, True])
def test_they_are_autograd_s_summed_over_the_passes(checkpointed: bool) -> None:
    dense, frozen = small_llama(), small_llama().requires_grad_(False).train()
    if checkpointed:
        enable_checkpointing(frozen)
    before = [len(m._forward_hooks) for m in frozen.modules()]
    few = dict([*adapted(frozen).items()][3:9])
    with collected(frozen, few) as gradients:
        for seed in (0, 1):
            loss_of(frozen, seed).backward()
            loss_of(dense, seed).backward()
    assert gradients.keys() == few.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dense.get_submodule(name).weight.grad, rtol=1e-5, atol=1e-7)
    assert [len(m._forward_hooks) for m in frozen.modules()] == before
    assert all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("linear", torch.float32), ("conv1d", torch.float16), ("nf4+dq-bfloat16", torch.bfloat16),
        ("int8", torch.bfloat16), ("nf4+dq-bfloat16", torch.float32),
    ],
)  # fmt: skip
def test_quantized_weights_have_them_too(kind: str, dtype: torch.dtype) -> None:
    layer = base_layer(kind, dtype)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    g = torch.randn(3, 5, 96).to(dtype)
    with collected(layer, {"": layer}) as gradients:
        layer(x).backward(g)
    expected = g.double().reshape(15, 96).t() @ x.detach().double().reshape(15, 64)
    assert gradients[""].dtype == torch.float32
    assert relative(gradients[""], expected) < 1e-6
    assert relative(x.grad, g.double() @ dense_weight(layer)) < 2e-2  # and x has its own as before


class Net(nn.Module):
    """The two linears of lora_sb.npz."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        for name in ("q_proj", "o_proj"):
            weight = theirs[f"{name}_W"]
            layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
            layer.weight.data, layer.bias.data = weight, theirs[f"{name}_bias"]
            setattr(self, name, layer)
        self.requires_grad_(False)
        linear.freeze_linears(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("o_proj")(self.get_submodule("q_proj")(x))


def test_the_start_of_lora_sb() -> None:
    """The authors' accumulated gradient, their sign step, and a truncation that is at least as good as theirs.

    They divide the mean loss of each batch by its number of rows once more, so the last, smaller batch counts twice.
    """
    theirs = numbers_of("lora_sb")
    net = Net(theirs)
    x, t = (theirs[f"data_{name}"] for name in "xt")
    with collected(net, dict(net.named_children())) as gradients:
        for first, last in ((0, 4), (4, 8), (8, 10)):
            y = net(x[first:last].requires_grad_())
            (nn.functional.mse_loss(y, t[first:last]) / (last - first)).backward()
    for name, gradient in gradients.items():
        accumulated, G, A, R, B = (theirs[f"{name}_{part}"] for part in ("grad_accumulated", "G", "A", "R", "B"))
        scale = (gradient * accumulated).sum() / accumulated.norm() ** 2  # how often they divide is not stored
        torch.testing.assert_close(gradient, accumulated * scale, rtol=1e-9, atol=1e-14)
        ours = sign_step(gradient, float(theirs["eff_lr"]))
        assert torch.equal(ours, G)
        found = truncated_svd(rows_of_tensor(ours), int(theirs["r"]))
        error, their_error = (G - found.U * found.S @ found.V.t()).norm(), (G - B @ R @ A).norm()
        best = torch.linalg.svdvals(G)[int(theirs["r"]) :].norm()
        assert error <= best * (1 + 1e-9)
        assert error <= their_error
        torch.testing.assert_close(found.S, R.diagonal(), rtol=0, atol=3e-3 * R.max().item())
