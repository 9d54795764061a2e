"""How far an exported checkpoint is from the model that was trained, on rows of its own data.

The trained model runs on a quantized base; the export is merged into 16-bit weights (or their dequantized copy). The
two are different models, and this measures by how much.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qvera.data import Example, Labels
from qvera.models.loader import exported_bytes, load_exported
from qvera.tasks import TASKS, Task
from qvera.utils import accelerator, formatting, memory

CAUSAL = TASKS["causal-lm"]
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


def too_little_memory(exported_dir: Path, trained_bytes: int) -> str | None:
    """Why the two models can't be compared in the memory there is; None where ``trained_bytes`` and the export fit."""
    device = accelerator.current_device()
    needed, available = trained_bytes + exported_bytes(exported_dir, device), memory.available_bytes(device)
    if needed <= available:
        return None
    sizes = f"{formatting.size(needed)}, and {formatting.size(available)} of memory are available"
    return f"holding the trained and the exported model together takes {sizes}"


@torch.no_grad()
def measure_difference(
    trained: PeftModel,
    exported_dir: Path,
    examples: Sequence[Example],
    pad_id: int,
    task: Task = CAUSAL,
    labels: Labels | None = None,
) -> dict[str, Any]:
    """Compare the trained model with the exported checkpoint on the targets of ``examples``.

    Args:
        task: of the run.
        labels: what the outputs of a classifier mean.

    Returns:
        Mean loss of both (nats per target, or the squared error of a regression), the largest difference of a logit,
        rows and targets (``tokens``), and what a target is (``unit``). Where outputs are tokens or classes, also
        KL(trained || exported) mean and max per target, the largest difference of a log probability, the share of
        targets whose most likely output agrees, and the number of rows in which it agrees at every target.
    """
    exported = load_exported(exported_dir, next(trained.parameters()).device, task.exported_class)
    examples = [row for example in examples for _, row in example.shown()]  # both answers of a pair
    loss_trained = loss_exported = kl_sum = kl_max = largest = largest_logit = 0.0
    agree: list[torch.Tensor] = []
    for rows in _batches(examples):
        trained_logits, targets = task.logits(trained, rows, pad_id, labels)
        logits, _ = task.logits(exported, rows, pad_id, labels)
        largest_logit = max(largest_logit, (trained_logits - logits).abs().max().item())
        if labels is not None and labels.is_regression:
            loss_trained += (trained_logits.squeeze(1) - targets).square().sum().item()
            loss_exported += (logits.squeeze(1) - targets).square().sum().item()
            continue
        ours, theirs = torch.log_softmax(trained_logits, dim=-1), torch.log_softmax(logits, dim=-1)
        kl = (ours.exp() * (ours - theirs)).sum(dim=1)
        kl_sum, kl_max = kl_sum + kl.sum().item(), max(kl_max, kl.max().item())
        largest = max(largest, (ours - theirs).abs().max().item())
        same = ours.argmax(dim=1) == theirs.argmax(dim=1)
        agree += same.split([e.trained_tokens for e in rows])
        loss_trained -= ours.gather(1, targets.unsqueeze(1)).sum().item()
        loss_exported -= theirs.gather(1, targets.unsqueeze(1)).sum().item()
    tokens = sum(e.trained_tokens for e in examples)
    found = {
        "rows": len(examples),
        "tokens": tokens,
        "unit": task.unit,
        "loss_trained": loss_trained / tokens,
        "loss_exported": loss_exported / tokens,
        "logit_max_difference": largest_logit,
    }
    if not agree:
        return found
    return {
        **found,
        "kl_mean": kl_sum / tokens,
        "kl_max": kl_max,
        "log_probability_max_difference": largest,
        "top1_agreement": torch.cat(agree).double().mean().item(),
        "answers_agree": sum(bool(row.all()) for row in agree),
    }


def rows_name(difference: Mapping[str, Any]) -> str:
    """What the rows are called that two models were compared on; ``split`` tells where they are training rows."""
    return "training rows" if difference.get("split") == "training" else "rows"


def rows_text(count: int, difference: dict[str, Any]) -> str:
    """How many rows two models were compared on, and of which kind (`rows_name`)."""
    name = rows_name(difference)
    return f"{count} {name.removesuffix('s') if count == 1 else name}"


def difference_text(difference: dict[str, Any], base: str) -> str:
    """What `measure_difference` gave (or ``not_measured`` and why) in a sentence or two, for ``base`` of the export."""
    if "not_measured" in difference:
        return f"not measured: {difference['not_measured']}"
    rows, unit = difference["rows"], difference.get("unit", "token")
    agree = difference.get("answers_agree", rows)
    text = (
        f"trained vs exported on {rows_text(rows, difference)}: loss {difference['loss_trained']:.4f} vs "
        f"{difference['loss_exported']:.4f}, "
    )
    if "kl_mean" not in difference:
        return f"{text}largest difference of a value {difference['logit_max_difference']:.2e}"
    text += f"KL {difference['kl_mean']:.2e} per {unit}, same first choice "
    if unit == "row":
        text += f"in {agree} of {rows} rows"
    else:
        text += f"at {difference['top1_agreement']:.1%} of the tokens and throughout {agree} of {rows} answers"
    if base == "original" and agree < rows:
        text += (
            "\nThe adapter was trained on the quantized base and is merged onto the original 16-bit weights here. "
            "--base dequantized merges onto the base it was trained on: its answers are nearest to those of the run."
        )
    return text
