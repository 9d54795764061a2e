"""Cross entropy of the trained tokens in chunks: the logits [tokens, vocabulary] never exist as a whole.

The head is frozen, so forward computes the gradient in the hidden states chunk by chunk, and backward only scales it.
"""

from collections.abc import Callable
from typing import NamedTuple, Self, TypeAlias

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

from qvera.data.rows import round_up_length, rounds_lengths
from qvera.kernels import once_differentiable
from qvera.kernels.cross_entropy import LogitRows, capped, rows_at_a_time
from qvera.models.linear import WeightBlocks, blocked_input_grad, blocked_linear
from qvera.models.structure import decoder_of
from qvera.utils.errors import InputError, first_line
from qvera.utils.memory import is_out_of_memory

HEAD_BLOCK_ELEMENTS = 2**25
"""Weights that are cast at a time, of a head that is stored in another dtype than the product's: 134 MB in fp32."""
Weigh: TypeAlias = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""Log-probabilities [k, K] of the targets at some places → the loss of each [k, K], and w = -∂loss/∂logprob [k, K]."""


class Head(NamedTuple):
    """The output head, from hidden states [..., hidden] to logits [..., vocabulary]: softcap(scale · (h Wᵀ + bias))."""

    module: nn.Linear
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The model's output head, with its forward's scaling. Raises InputError if an adapter is on it."""
        module = model.get_output_embeddings()
        if module is None:
            raise RuntimeError(f"{type(model).__name__} has no output embeddings, so it is no causal language model")
        if isinstance(module, BaseTunerLayer):
            raise InputError(
                "adapter.targets: the loss is computed without an adapter on the output head, and this model has one. "
                "Adapt the linears of its layers (all-linear)."
            )
        if hasattr(module, "token_adapter"):  # PEFT's wrapper
            raise InputError(
                "the adapter has rows of single tokens (PEFT's trainable_token_indices), on a head that is tied to the "
                "embedding, which is not read here. Merge it with PEFT's merge_and_unload, and name what that saves."
            )
        configs = model.config.get_text_config(), model.config  # a model that takes images too has two

        def setting(*names: str) -> float | None:
            return next((found for c in configs for name in names if (found := getattr(c, name, None))), None)

        scale = (setting("logit_scale", "lm_head_multiplier") or 1.0) / (setting("logits_scaling") or 1.0)
        return cls(module, setting("final_logit_softcapping", "logits_soft_cap"), float(scale))

    def at(self, temperature: float) -> Self:
        """The head whose logits are these divided by ``temperature``."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return self._replace(softcap=softcap, scale=self.scale / temperature)

    def logits(self, product: torch.Tensor) -> torch.Tensor:
        """Logits from h Wᵀ + bias; the same tensor where the model neither scales nor caps them."""
        return capped(product, self.scale, self.softcap)


@torch.no_grad()
def require_own_logits(model: PreTrainedModel) -> None:
    """Raise InputError if a model's logits are not those that `Head` makes of its last hidden states.

    It is tried on two tokens. InputError too: it can't be run on tokens alone, or an earlier token sees a later one.
    """
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)  # its row may be zeros, which hide a scale
    first, *others = [number for number in range(4) if number != padding][-3:]
    asked = torch.tensor([[first, other] for other in others], device=model.device)
    kind = f"{type(model).__name__} (model_type {model.config.model_type})"
    seen = torch.empty(0)

    def replace_product(module: nn.Module, inputs: tuple[torch.Tensor, ...], product: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen = inputs[0]
        # so that a factor or a cap shows, whatever the weights are
        return torch.linspace(-1e3, 1e3, product.shape[-1], device=product.device).to(product).expand_as(product)

    try:
        head = Head.of(model)
        hook = head.module.register_forward_hook(replace_product)
        try:
            logits = model(input_ids=asked, use_cache=False).logits.float()
        finally:
            hook.remove()
        hidden = decoder_of(model)(input_ids=asked, use_cache=False).last_hidden_state
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"model.path: {kind} can't be run on tokens alone, as a language model is ({first_line(error)}). Take "
            "another model."
        ) from None
    if not torch.allclose(hidden[0, 0].float(), hidden[1, 0].float(), rtol=1e-2, atol=1e-3):
        raise InputError(
            f"model.path: {kind} is no causal language model: its first token's output depends on the second. Take "
            "another model."
        )
    # what `Head` makes of the same product; a factor before the head shows in the head's input
    wide = torch.linspace(-1e3, 1e3, logits.shape[-1], device=logits.device)
    factor = 1.0
    if seen.shape == hidden.shape and getattr(head.module, "bias", None) is None:  # MiniCPM 3 divides before the head
        factor = float((seen.float() * hidden.float()).sum() / hidden.float().square().sum())
    is_same = seen.shape == hidden.shape and torch.allclose(seen.float(), factor * hidden.float(), rtol=1e-2, atol=1e-3)
    expected = head.logits(wide / factor).expand_as(logits)
    if not is_same or not torch.allclose(logits, expected, rtol=2e-2, atol=1e-2):
        raise InputError(
            f"model.path: {kind} scales or caps its logits in a way that qvera's loss does not know, so its losses "
            "would be wrong. Take another model, or report this one."
        )


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        head: Head,
        chunk_tokens: int,
        expected_grad: torch.Tensor | None,
        weigh: Weigh | None,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # every chunk goes over the weight twice, so a quantized head is dequantized once for all
        blocks = WeightBlocks(head.module, hidden.dtype, HEAD_BLOCK_ELEMENTS, reused=True)
        bias = getattr(head.module, "bias", None)
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        tokens = len(labels)
        nll = total.new_empty(labels.shape)
        if rounds_lengths(hidden.dtype, hidden.device.type):
            # pad the last chunk with rows that neither count nor get a gradient
            last = tokens % chunk_tokens
            hidden = F.pad(hidden, (0, 0, 0, min(round_up_length(last), chunk_tokens) - last if last else 0))
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        for start in range(0, tokens, chunk_tokens):
            # a chunk: product with the head, losses, then the gradient in the logits over the product, and in hidden
            part = slice(start, min(start + chunk_tokens, tokens))
            h, y = hidden[start : start + chunk_tokens], labels[part]
            product = blocked_linear(h, blocks, bias)
            losses, step = torch.empty_like(nll[part]), rows_at_a_time(product)
            for first in range(0, len(y), step):
                few = slice(first, min(first + step, len(y)))
                rows = LogitRows(product[few], y[few], head.scale, head.softcap, smoothing, grad is not None)
                nll[part][few] = losses[few] = rows.loss
                weight = torch.ones_like(rows.loss)
                if weigh is not None:
                    losses[few], weight = weigh(-rows.loss, slice(start + few.start, start + few.stop))
                if grad is not None:
                    rows.write_gradient(weight if expected_grad is None else weight * expected_grad)
            total += losses.sum()
            if grad is not None:
                product[len(y) :] = 0.0  # rows of padding have logits there still
                blocked_input_grad(product, blocks, out=grad[start : start + chunk_tokens])
            del product, rows  # or the next chunk would be made beside this one
        if grad is not None:
            ctx.save_for_backward(grad[:tokens])
            ctx.expected_grad = expected_grad  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # forward has made the gradient, times the expected g: only a factor that was not expected is left
        (grad,) = ctx.saved_tensors  # type: ignore[attr-defined]
        expected = ctx.expected_grad  # type: ignore[attr-defined]
        factor = g if expected is None else g / expected
        return grad * factor.to(grad.dtype), None, None, None, None, None, None


def states_at(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The hidden states [n, hidden] at these places, int64 [n], of the flattened [B, T, hidden]."""
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, places)


def target_loss(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    chunk_tokens: int,
    weigh: Weigh | None = None,
    expected_grad: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of explicit targets, and their log-probabilities without a graph.

    Args:
        hidden: [n, hidden], the decoder's last hidden states, after its final norm.
        targets: int64 [n, K], token ids that each position is to predict.
        chunk_tokens: tokens whose logits exist at one time.
        weigh: makes the loss of log-probabilities, with a weight of any sign and size for every target
            (`qvera.models.token_losses`); None: the negative log likelihood.
        expected_grad: the gradient (scalar, fp32) that backward will probably bring. It is multiplied in before
            rounding to 16 bits, so that with a loss scale small gradients do not vanish in float16. Backward may bring
            another one.
        label_smoothing: ε; the target is 1 - ε on the label and ε spread evenly over the vocabulary (arXiv 1512.00567,
            section 7), and the log-probabilities are smoothed too.

    Returns:
        A scalar, fp32 or wider, differentiable once in hidden, and log-probabilities [n, K].
    """
    total, nll = _FusedLinearCrossEntropy.apply(
        hidden, targets, head, chunk_tokens, expected_grad, weigh, label_smoothing
    )
    return total, nll.neg_()


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk_tokens: int
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, targets)
        ctx.rest = head, chunk_tokens  # type: ignore[attr-defined]
        return target_loss(hidden.detach(), targets, head, chunk_tokens, lambda logprobs, _: (logprobs, logprobs))[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors  # type: ignore[attr-defined]
        # with the weight w = -g the gradient is that of Σ g · logprob; the loss itself is not used
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            head, chunk_tokens = ctx.rest  # type: ignore[attr-defined]
            total, _ = target_loss(leaf, targets, head, chunk_tokens, lambda logprobs, part: (logprobs, -g[part]))
            return *torch.autograd.grad(total, leaf), None, None, None


def target_logprobs(hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk_tokens: int) -> torch.Tensor:
    """Log-probabilities [n, K], fp32 or wider, of targets int64 [n, K], differentiable once in hidden [n, hidden].

    Backward computes the logits again, chunk by chunk.
    """
    logprobs: torch.Tensor = _TargetLogprobs.apply(hidden, targets, head, chunk_tokens)
    return logprobs
