"""The forward pass of training, held-out scores and answers: rows → batch → hidden states → summed loss."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from qvera.data import Example, collate, collate_prefix_once
from qvera.data.images import ImageTextProcessor, StoredImage
from qvera.data.rows import pad_batch, round_up_length, rounds_lengths
from qvera.distributed.zero import gathered
from qvera.models import linear
from qvera.models.attention import needs_padding_mask, open_mask, rows_joined
from qvera.models.loss import Head, Weigh, states_at, target_logprobs, target_loss
from qvera.models.structure import causal_model, decoder_of, image_model
from qvera.utils import accelerator


def make_batch(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    prefix_once: bool = True,
    packing: bool = False,
    whole_rows: bool = False,
) -> dict[str, Any]:
    """Collate rows into a batch on the model's device, in one sequence if that is asked for, or pays and is supported.

    Args:
        prefix_once: compute a common prefix once for all rows, where that pays.
        packing: one sequence without padding, whether it pays or not (`require_packing`).
        whole_rows: in place of both, whole rows in one sequence. Rows of different adapters can't share a prefix.
    """
    device, inner = next(model.parameters()).device, causal_model(model)
    implementation = inner.config._attn_implementation or ""
    # a single row gets offsets too with flash-attn: else every layer of transformers would look for rows in positions
    offsets = packing or whole_rows or (len(examples) == 1 and implementation.startswith("flash_attention"))
    joined = rows_joined(inner, prefix_once, offsets, whole_rows)
    batch = None if joined is None else collate_prefix_once(examples, device, offsets, joined)
    batch = batch or collate(examples, pad_id, device, masked=needs_padding_mask(inner))
    dtype = linear.embedding_dtype(inner.get_input_embeddings())
    # on a CPU in 16 bits few lengths may come up: torch and oneDNN keep kernels for each (bench/log.md)
    if rounds_lengths(dtype, device.type):
        tokens = batch["input_ids"].shape[1]
        wanted = round_up_length(tokens)
        if "cu_seq_lens_q" not in batch:
            wanted = min(wanted, getattr(inner.config, "max_position_embeddings", None) or wanted)
        batch = pad_batch(batch, max(tokens, wanted), pad_id)
    sees = batch.get("attention_mask")
    if sees is not None and sees.dim() == 4:  # additive, which both attention implementations take
        hidden = torch.full(sees.shape, torch.finfo(dtype).min, dtype=dtype, device=device)
        batch["attention_mask"] = hidden.masked_fill_(sees, 0.0)
    elif sees is None and (mask := open_mask(implementation, batch["input_ids"])) is not None:
        batch["attention_mask"] = mask
    images = [image for example in examples for image in example.images]
    ids = [example.input_ids for example in examples]
    return batch | image_inputs(model, ids, images, batch["input_ids"].shape[1])


def image_inputs(
    model: nn.Module, ids: Sequence[Any], images: Sequence[StoredImage], tokens: int, left: bool = False
) -> dict[str, torch.Tensor]:
    """Return the inputs that a model takes beside the ids for the images of a batch, on its device; {}: no images.

    These are pixel values and sizes as its processor makes them. If the model asks for it, they say too which tokens
    are an image's, int64 [B, tokens].

    Args:
        ids: the ids of each row, without padding.
        images: the images of all rows, in order.
        left: whether the batch is padded on the left.
    """
    if not images or not isinstance(processor := images[0].processor, ImageTextProcessor):
        return {}
    arrays = {name: value.numpy() for name, value in processor.inputs(images).items()}
    taken = inspect.signature(image_model(model).forward).parameters
    for name in {"token_type_ids", "mm_token_type_ids"} & taken.keys():
        arrays[name] = np.zeros((len(ids), tokens), np.int64)
        for row, own in zip(arrays[name], ids, strict=True):
            row[tokens - len(own) if left else 0 :][: len(own)] = processor.token_types(np.asarray(own))
    dtype = linear.embedding_dtype(causal_model(model).get_input_embeddings())
    found = accelerator.tensors_on(next(model.parameters()).device, arrays)
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in found.items()}


def row_tokens(batch: dict[str, Any], examples: Sequence[Example]) -> list[int]:
    """Return each row's number of tokens, padding included. Padding behind joined rows counts for the last one."""
    rows, length = batch["input_ids"].shape
    if "cu_seq_lens_q" not in batch:
        return [length] * rows
    tokens = [len(example.input_ids) for example in examples]
    return [*tokens[:-1], length - sum(tokens[:-1])]


def hidden_states(model: nn.Module, batch: dict[str, Any], decoder: Callable[..., Any] | None = None) -> torch.Tensor:
    """The decoder's last hidden states [B, T, hidden], after its norm. ``decoder`` may be a DeepSpeed engine."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "trained")}
    if "pixel_values" in batch:
        decoder = image_model(model)
    return (decoder or decoder_of(causal_model(model)))(**inputs, use_cache=False).last_hidden_state


def batch_nll(
    model: nn.Module,
    batch: dict[str, Any],
    chunk_tokens: int,
    decoder: Callable[..., Any] | None = None,
    expected_grad: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, int]:
    """Summed negative log likelihood (scalar) of the trained tokens, and their number; see `qvera.models.loss`."""
    loss, logprobs = weighed_loss(
        model, batch, chunk_tokens, None, decoder, expected_grad, label_smoothing=label_smoothing
    )
    return loss, len(logprobs)


def weighed_loss(
    model: nn.Module,
    batch: dict[str, Any],
    chunk_tokens: int,
    weigh: Weigh | None,
    decoder: Callable[..., Any] | None = None,
    expected_grad: torch.Tensor | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `target_loss` of the trained tokens, and their log-probabilities [n, 1].

    They come row after row, and are those of softmax(logits / temperature).
    """
    rows, targets, head = _trained(model, batch, decoder)
    with gathered(head.module.parameters(recurse=False)):
        return target_loss(rows, targets, head.at(temperature), chunk_tokens, weigh, expected_grad, label_smoothing)


def _trained(
    model: nn.Module, batch: dict[str, Any], decoder: Callable[..., Any] | None = None
) -> tuple[torch.Tensor, torch.Tensor, Head]:
    """Hidden states [n, hidden] that predict the trained tokens, row after row; these tokens [n, 1]; and the head."""
    hidden, places = hidden_states(model, batch, decoder), batch["trained"]
    targets = batch["labels"].reshape(-1, 1).index_select(0, places + 1)
    return states_at(hidden, places), targets, Head.of(causal_model(model))


def trained_logprobs(
    model: nn.Module, batch: dict[str, Any], chunk_tokens: int, decoder: Callable[..., Any] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the trained tokens [n], row after row (differentiable once), and these tokens [n]."""
    rows, targets, head = _trained(model, batch, decoder)
    return target_logprobs(rows, targets, head, chunk_tokens).squeeze(1), targets.squeeze(1)


def row_nll(
    model: nn.Module, batch: dict[str, Any], chunk_tokens: int, row_weights: torch.Tensor, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows' negative log likelihoods summed with ``row_weights`` [B], and each row's own [B].

    The sum is a scalar and differentiable once, the others have no graph. A NaN in a row leaves the gradients of the
    other rows as they are.
    """
    # the row of each trained token, from its place in the flattened batch
    if "cu_seq_lens_q" in batch:
        of_trained = torch.searchsorted(batch["cu_seq_lens_q"], batch["trained"], right=True) - 1
    else:
        of_trained = batch["trained"] // batch["labels"].shape[1]
    weights = row_weights.index_select(0, of_trained).unsqueeze(1)

    def weigh(logprobs: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return -logprobs * weights[part], weights[part]

    total, logprobs = weighed_loss(model, batch, chunk_tokens, weigh, label_smoothing=label_smoothing)
    return total, logprobs.new_zeros(len(row_weights)).index_add_(0, of_trained, -logprobs.squeeze(1))
