"""How far an exported checkpoint is from the model that was trained, on rows of its own data.

The trained model runs on a quantized base; the export is merged into 16-bit weights (or their dequantized copy). The
two are different models, and this says by how much, in numbers that were measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ..data import IGNORED, Example, collate
from ..evaluate import hidden_states
from ..loss import Head
from ..model import causal_model


@torch.no_grad()
def _log_probabilities(model: Any, example: Example, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the trained positions of one row as log probabilities [tokens, vocabulary] fp32, and the targets."""
    device = next(model.parameters()).device
    batch = collate([example], pad_id, device)
    hidden = hidden_states(model, batch)[0, :-1]
    targets = batch["labels"][0, 1:]
    kept = targets != IGNORED
    head = Head.of(causal_model(model))
    logits = head.logits(head.module(hidden[kept]).float())
    return torch.log_softmax(logits, dim=-1).cpu(), targets[kept].cpu()


def measure_difference(trained: Any, exported_dir: Path, examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """Compare the trained model with the exported checkpoint on the trained tokens of ``examples``.

    The trained model's log probabilities wait in a temporary file, so only one row's are in memory at a time.

    Returns:
        Mean loss of both (nats a token), KL(trained || exported) mean and max per token, the largest difference of a log
        probability, the share of tokens whose most likely token agrees, rows and tokens.
    """
    device = next(trained.parameters()).device
    vocabulary = trained.get_base_model().get_output_embeddings().weight.shape[0]
    tokens = sum(e.trained_tokens for e in examples)
    with tempfile.TemporaryDirectory(dir=exported_dir.parent) as scratch:
        stored = np.memmap(Path(scratch) / "trained.f32", dtype=np.float32, mode="w+", shape=(tokens, vocabulary))
        start, loss_trained = 0, 0.0
        for example in examples:
            found, targets = _log_probabilities(trained, example, pad_id)
            stored[start : start + len(found)] = found.numpy()
            loss_trained -= found.gather(1, targets.unsqueeze(1)).sum().item()
            start += len(found)
        # fp16 products are slow or missing on CPUs; fp32 shows the very numbers that the file holds
        dtype = "auto" if device.type == "cuda" else torch.float32
        exported = AutoModelForCausalLM.from_pretrained(exported_dir, dtype=dtype, device_map={"": device}).eval()
        start, loss_exported, divergence, worst, largest, agree = 0, 0.0, 0.0, 0.0, 0.0, 0
        for example in examples:
            found, targets = _log_probabilities(exported, example, pad_id)
            ours = torch.from_numpy(np.array(stored[start : start + len(found)]))
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
        "log_probability_max_difference": largest,
        "top1_agreement": agree / tokens,
    }
