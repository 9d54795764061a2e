"""Cross entropy by rows of logits: the kernels in Triton's interpreter and the plain code, against fp64 and autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from qvera.kernels import cross_entropy
from qvera.kernels.cross_entropy import LogitRows
from qvera.models.loss import Head
from tests.adapters.helpers import relative
from tests.kernels.conftest import Calls
from tests.models.helpers import summed_loss

Kernels = Callable[[], Any]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # the interpreter cuts bf16 off, unrounded
CASES: list[dict[str, Any]] = [
    {"vocabulary": 1},
    {"vocabulary": 303, "targets": 3, "smoothing": 0.1},
    {"vocabulary": 5003},  # of more than one block, the last one not full
    {"vocabulary": 5003, "cap": 3.0, "scale": 0.7, "smoothing": 0.2},
]


def wanted(
    x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, smoothing: float, scale: float, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [n, K] and the weighted sum's gradient, in fp64."""
    wide = x.double().requires_grad_()
    z = wide * scale if cap is None else cap * torch.tanh(wide * scale / cap)
    logprobs = z.log_softmax(1)
    losses = -(1 - smoothing) * logprobs.gather(1, y) - smoothing * logprobs.mean(1, keepdim=True)
    (grad,) = torch.autograd.grad((losses * weights).sum(), wide)
    return losses.detach(), grad


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("by_kernels", [True, False], ids=["kernels", "plain"])
def test_losses_and_gradient(
    case: dict[str, Any], dtype: torch.dtype, by_kernels: bool, as_on_an_accelerator: Kernels
) -> None:
    settings = {"scale": 1.0, "cap": None, "smoothing": 0.0, "targets": 1, **case}
    vocabulary, targets, smoothing = settings.pop("vocabulary"), settings.pop("targets"), settings["smoothing"]
    torch.manual_seed(0)
    x = (4 * torch.randn(6, vocabulary)).to(dtype)
    y = torch.randint(0, vocabulary, (6, targets))
    if vocabulary > 1:
        x[1, y[1, 0]] = 60.0  # as good as certain
        x[2, :4100] = -1e4  # a whole block that counts for nothing
        x[3] = 1e4 * x[3].sign()  # exp overflows
    y[4] = y[4, 0]  # one target, K times
    weights = torch.randn(6, targets)
    weights[5] = 0.0
    losses, grad = wanted(x, y, weights, smoothing, settings["scale"], settings["cap"])
    written = x.clone()
    with as_on_an_accelerator() if by_kernels else nullcontext():
        rows = LogitRows(written, y, gradient=True, **settings)
        rows.write_gradient(weights)
    assert rows.loss.dtype == torch.float32 and written.dtype == dtype
    assert (rows.loss.double() - losses).abs().max() <= 3e-6 * losses.abs().max() + 2e-6  # never in 16 bits
    limits = torch.finfo(dtype)
    floor = 1e-7 + vocabulary**0.5 * limits.eps * limits.tiny  # below it float16 has no digits
    for row in range(6):
        assert (written[row].double() - grad[row]).norm() <= TOLERANCE[dtype] * grad[row].norm() + floor
    assert torch.count_nonzero(written[5]) == 0


def test_the_gradient_of_what_is_almost_certain_keeps_its_digits(as_on_an_accelerator: Kernels) -> None:
    """p - 1 by two roundings to 16 bits would be 0."""
    x, y = torch.zeros(1, 400).to(torch.bfloat16), torch.tensor([[7]])
    x[0, 7] = 14.0
    _, grad = wanted(x, y, torch.ones(1, 1), 0.0, 1.0, None)
    with as_on_an_accelerator():
        LogitRows(x, y, 1.0, None, 0.0, True).write_gradient(torch.ones(1, 1))
    assert float(x[0, 7]) == pytest.approx(float(grad[0, 7]), rel=1e-2) and abs(float(grad[0, 7])) < 4e-4


@pytest.mark.parametrize("gradient", [True, False])
def test_two_kernels_go_over_the_logits_of_a_chunk_and_nothing_is_as_large(
    gradient: bool, as_on_an_accelerator: Kernels
) -> None:
    head = Head(nn.Linear(24, 301, bias=False).bfloat16().requires_grad_(False), 5.0, 0.5)
    hidden = torch.randn(1, 41, 24).bfloat16().requires_grad_(gradient)
    labels = torch.randint(0, 301, (1, 41))
    with as_on_an_accelerator(), Calls() as calls:
        loss, _ = summed_loss(hidden, labels, head, 20)
    expected = ["aten::mm", "aten::gather", "qvera::logit_sums", "qvera::logit_gradient", "aten::scatter_", "aten::mm"]
    large = [name for name, size in calls.sizes if size >= 20 * 301]
    assert large == 2 * (expected if gradient else expected[:3])
    plain, _ = summed_loss(hidden, labels, head, 20)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    if gradient:
        found, other = (torch.autograd.grad(each, hidden)[0] for each in (loss, plain))
        assert relative(found, other) < 2e-2


def test_a_cpu_takes_as_many_rows_as_its_cache_holds_and_gets_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(nn.Linear(24, 301, bias=False).requires_grad_(False), None, 1.0)
    hidden, labels = torch.randn(2, 33, 24, requires_grad=True), torch.randint(0, 301, (2, 33))
    found = []
    for elements in (2**19, 1000):
        monkeypatch.setattr(cross_entropy, "CACHED_ELEMENTS", elements)
        loss, _ = summed_loss(hidden, labels, head, 20)
        found.append((loss, torch.autograd.grad(loss, hidden)[0]))
    assert cross_entropy.rows_at_a_time(torch.empty(20, 301)) == 3 * torch.get_num_threads()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_fake_implementations_say_what_the_kernels_give() -> None:
    x, one = torch.randn(3, 40), torch.ones(3, 1)
    for name, arguments in (("logit_sums", (x, 1.0, 0.0, True)), ("logit_gradient", (x, one, one, one, 0.0, 1.0, 0.0))):
        torch.library.opcheck(
            getattr(torch.ops.qvera, name).default, arguments, test_utils=("test_schema", "test_faketensor")
        )
