"""Cross entropy over the trained tokens, in chunks: logits [tokens, vocabulary] never exist as a whole.

The head is frozen, so the gradient of the loss with respect to the hidden states can be made chunk by chunk during
forward; backward only scales it. Peak memory is one chunk of logits, whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qvera.data import IGNORED
from qvera.data.padding import next_length, repeats
from qvera.models.linear import WeightBlocks, blocked_input_grad, blocked_linear


class Head(NamedTuple):
    """What turns hidden states [.., hidden] into logits [.., vocabulary]: logits = softcap(scale * (h Wᵀ + bias))."""

    module: nn.Module
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The output head of a transformers causal language model, with the scaling that its forward applies.

        Raises:
            RuntimeError: the model has no output embeddings.
        """
        module = model.get_output_embeddings()  # type: ignore[operator]
        if module is None:
            raise RuntimeError(f"{type(model).__name__} has no output embeddings, so it is no causal language model")
        config: Any = model.config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return cls(module, getattr(config, "final_logit_softcapping", None), scale)

    def logits(self, product: torch.Tensor) -> torch.Tensor:
        """Logits from h Wᵀ + bias; the same tensor where the model neither scales nor caps them."""
        scaled = product if self.scale == 1.0 else product * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk_tokens: int) -> torch.Tensor:
        blocks = WeightBlocks(head.module, hidden.dtype, BLOCK_ELEMENTS, kept=True)
        bias = getattr(head.module, "bias", None)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        tokens = len(labels)
        if repeats(hidden.dtype, hidden.device.type):  # the last chunk gets rows that neither count nor get a gradient
            last = tokens % chunk_tokens
            hidden = F.pad(hidden, (0, 0, 0, min(next_length(last), chunk_tokens) - last if last else 0))
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, tokens, chunk_tokens):
            h, y = hidden[start : start + chunk_tokens], labels[start : start + chunk_tokens].unsqueeze(1)
            padded = head.logits(blocked_linear(h, blocks, bias).to(total.dtype))
            logits = padded[: len(y)]
            slope = None
            if head.softcap is not None and grad is not None:
                slope = 1.0 - (logits / head.softcap).square()  # of tanh, before the logits are overwritten
            normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (normalizer - logits.gather(1, y)).sum()
            if grad is not None:
                # ∂nll/∂logits = softmax(logits) - onehot(label), made in place of the logits
                logits.sub_(normalizer).exp_()
                logits.scatter_add_(1, y, logits.new_full((1, 1), -1.0).expand_as(y))
                if slope is not None:
                    logits *= slope
                if head.scale != 1.0:
                    logits *= head.scale
                padded[len(y) :] = 0.0
                blocked_input_grad(padded, blocks, out=grad[start : start + chunk_tokens])
        if grad is not None:
            ctx.save_for_backward(grad[:tokens])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * g.to(grad.dtype), None, None, None


BLOCK_ELEMENTS = 2**25
"""A head stored in another dtype than the product's is cast this many weights at a time: 134 MB in fp32."""


def fused_linear_cross_entropy(
    hidden: torch.Tensor, labels: torch.Tensor, head: Head, chunk_tokens: int
) -> tuple[torch.Tensor, int]:
    """Summed negative log likelihood of the trained tokens.

    Args:
        hidden: [B, T, hidden], the decoder's last hidden states (after its final norm).
        labels: [B, T] token ids aligned with the input, `IGNORED` where not trained. Position t predicts label t + 1.
        head: the frozen head.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        The sum (scalar, fp32 or wider, differentiable once in hidden) and the number of trained tokens.
    """
    targets = labels[:, 1:].reshape(-1)
    # only trained positions reach the head: prompts cost nothing there
    kept = torch.nonzero(targets != IGNORED).squeeze(1)
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, kept)
    return _ChunkedCrossEntropy.apply(rows, targets.index_select(0, kept), head, chunk_tokens), int(kept.numel())
