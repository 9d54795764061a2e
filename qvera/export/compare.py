"""How far an exported checkpoint is from the model that was trained, on rows of its own data.

The trained model runs on a quantized base; the export is merged into 16-bit weights (or their dequantized copy). The
two are different models, and this measures by how much.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qvera.data import IGNORED, Example, collate
from qvera.evaluation.evaluate import hidden_states
from qvera.models.loader import causal_model, exported_bytes, load_exported
from qvera.models.loss import Head
from qvera.utils import accelerator, formatting, memory

BATCH_TOKENS = 2048
"""Tokens of a batch, padding included: each batch dequantizes (or casts) all weights once, so single rows would take
longer."""


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """The rows in order, in batches of at most `BATCH_TOKENS`."""
    batch: list[Example] = []
    for example in examples:
        longest = max(len(e.input_ids) for e in [*batch, example])
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


@torch.no_grad()
def _logits(model: nn.Module, rows: list[Example], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [tokens, vocabulary] fp32 at the trained positions, row after row, and the targets."""
    device = next(model.parameters()).device
    batch = collate(rows, pad_id, device)
    hidden = hidden_states(model, batch)[:, :-1]
    targets = batch["labels"][:, 1:]
    trained = targets != IGNORED
    head = Head.of(causal_model(model))
    return head.logits(head.module(hidden[trained]).float()).cpu(), targets[trained].cpu()


def too_little_memory(exported_dir: Path, trained_bytes: int) -> str | None:
    """Why the two models can't be compared in the memory there is; None where ``trained_bytes`` and the export fit."""
    device = accelerator.current_device()
    needed, available = trained_bytes + exported_bytes(exported_dir, device), memory.available_bytes(device)
    if needed <= available:
        return None
    sizes = f"{formatting.size(needed)}, and {formatting.size(available)} of memory are available"
    return f"holding the trained and the exported model together takes {sizes}"


def measure_difference(
    trained: PeftModel,
    exported_dir: Path,
    examples: Sequence[Example],
    pad_id: int,
) -> dict[str, Any]:
    """Compare the trained model with the exported checkpoint on the trained tokens of ``examples``.

    Returns:
        Mean loss of both (nats per token), KL(trained || exported) mean and max per token, the largest difference of a
        logit and of a log probability, the share of tokens whose most likely token agrees, the number of answers (rows)
        in which it agrees at every token, rows and tokens.
    """
    exported = load_exported(exported_dir, next(trained.parameters()).device)
    loss_trained = loss_exported = kl_sum = kl_max = largest = largest_logit = 0.0
    agree: list[torch.Tensor] = []
    for rows in _batches(examples):
        trained_logits, targets = _logits(trained, rows, pad_id)
        logits, _ = _logits(exported, rows, pad_id)
        largest_logit = max(largest_logit, (trained_logits - logits).abs().max().item())
        ours, theirs = torch.log_softmax(trained_logits, dim=-1), torch.log_softmax(logits, dim=-1)
        kl = (ours.exp() * (ours - theirs)).sum(dim=1)
        kl_sum, kl_max = kl_sum + kl.sum().item(), max(kl_max, kl.max().item())
        largest = max(largest, (ours - theirs).abs().max().item())
        same = ours.argmax(dim=1) == theirs.argmax(dim=1)
        agree += same.split([e.trained_tokens for e in rows])
        loss_trained -= ours.gather(1, targets.unsqueeze(1)).sum().item()
        loss_exported -= theirs.gather(1, targets.unsqueeze(1)).sum().item()
    tokens = sum(e.trained_tokens for e in examples)
    return {
        "rows": len(examples),
        "tokens": tokens,
        "loss_trained": loss_trained / tokens,
        "loss_exported": loss_exported / tokens,
        "kl_mean": kl_sum / tokens,
        "kl_max": kl_max,
        "logit_max_difference": largest_logit,
        "log_probability_max_difference": largest,
        "top1_agreement": torch.cat(agree).double().mean().item(),
        "answers_agree": sum(bool(row.all()) for row in agree),
    }


def difference_text(difference: dict[str, Any], base: str) -> str:
    """What `measure_difference` gave (or ``not_measured`` and why) in a sentence or two, for ``base`` of the export."""
    if "not_measured" in difference:
        return f"not measured: {difference['not_measured']}"
    rows, agree = difference["rows"], difference["answers_agree"]
    text = (
        f"trained vs exported on {rows} rows: loss {difference['loss_trained']:.4f} vs "
        f"{difference['loss_exported']:.4f}, KL {difference['kl_mean']:.2e} per token, same first choice at "
        f"{difference['top1_agreement']:.1%} of the tokens and throughout {agree} of {rows} answers"
    )
    if base == "original" and agree < rows:
        text += (
            "\nThe adapter was trained on the quantized base and is merged onto the original 16-bit weights here. "
            "--base dequantized merges onto the base it was trained on: its answers are nearest to those of the run."
        )
    return text
