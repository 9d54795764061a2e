"""How far an exported checkpoint is from the model that was trained, on rows of its own data.

The trained model runs on a quantized base; the export is merged into 16-bit weights (or their dequantized copy). The
two are different models, and this says by how much, in numbers that were measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qvera.data import IGNORED, Example, collate
from qvera.evaluation.evaluate import hidden_states
from qvera.models.loader import causal_model, exported_bytes, load_exported, pick_device
from qvera.models.loss import Head
from qvera.utils import memory
from qvera.utils.atomic import require_space


@torch.no_grad()
def _logits(model: Any, example: Example, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [tokens, vocabulary] fp32 at the trained positions of one row, and the targets."""
    device = next(model.parameters()).device
    batch = collate([example], pad_id, device)
    hidden = hidden_states(model, batch)[0, :-1]
    targets = batch["labels"][0, 1:]
    kept = targets != IGNORED
    head = Head.of(causal_model(model))
    return head.logits(head.module(hidden[kept]).float()).cpu(), targets[kept].cpu()


def too_little_memory(exported_dir: Path, trained_bytes: int) -> str | None:
    """Why the two models can't be compared in the memory there is, or None.

    Args:
        trained_bytes: what the trained model's base takes (`run.json` has it, measured).
    """
    device = pick_device()
    needed, available = trained_bytes + exported_bytes(exported_dir, device), memory.available_bytes(device)
    if needed <= available:
        return None
    return (
        f"holding the trained and the exported model together takes {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory "
        "are available"
    )


def measure_difference(
    trained: Any,
    exported_dir: Path,
    examples: Sequence[Example],
    pad_id: int,
    load: Callable[[Path, torch.device], Any] = load_exported,
) -> dict[str, Any]:
    """Compare the trained model with the exported checkpoint on the trained tokens of ``examples``.

    The trained model's logits wait in a temporary file, so only one row's are in memory at a time.

    Args:
        load: directory and device → the exported model.

    Returns:
        Mean loss of both (nats a token), KL(trained || exported) mean and max per token, the largest difference of a logit
        and of a log probability, the share of tokens whose most likely token agrees, rows and tokens.
    """
    device = next(trained.parameters()).device
    vocabulary = trained.get_base_model().get_output_embeddings().weight.shape[0]
    tokens = sum(e.trained_tokens for e in examples)
    require_space(
        exported_dir.parent, 4 * tokens * vocabulary, "the comparison"
    )  # a sparse file: no room would be a SIGBUS
    with tempfile.TemporaryDirectory(dir=exported_dir.parent) as scratch:
        stored = np.memmap(Path(scratch) / "trained.f32", dtype=np.float32, mode="w+", shape=(tokens, vocabulary))
        start, loss_trained = 0, 0.0
        for example in examples:
            logits, targets = _logits(trained, example, pad_id)
            stored[start : start + len(logits)] = logits.numpy()
            loss_trained -= torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).sum().item()
            start += len(logits)
        exported = load(exported_dir, device)
        start, loss_exported, divergence, worst, largest, largest_logit, agree = 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0
        for example in examples:
            logits, targets = _logits(exported, example, pad_id)
            our_logits = torch.from_numpy(np.array(stored[start : start + len(logits)]))
            largest_logit = max(largest_logit, (our_logits - logits).abs().max().item())
            ours, found = torch.log_softmax(our_logits, dim=-1), torch.log_softmax(logits, dim=-1)
            kl = (ours.exp() * (ours - found)).sum(dim=1)
            divergence += kl.sum().item()
            worst = max(worst, kl.max().item())
            largest = max(largest, (ours - found).abs().max().item())
            agree += int((ours.argmax(dim=1) == found.argmax(dim=1)).sum())
            loss_exported -= found.gather(1, targets.unsqueeze(1)).sum().item()
            start += len(found)
    return {
        "rows": len(examples),
        "tokens": tokens,
        "loss_trained": loss_trained / tokens,
        "loss_exported": loss_exported / tokens,
        "kl_mean": divergence / tokens,
        "kl_max": worst,
        "logit_max_difference": largest_logit,
        "log_probability_max_difference": largest,
        "top1_agreement": agree / tokens,
    }
