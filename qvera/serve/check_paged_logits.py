"""Whether a model answers from pages as it answers without: tried once, before the first request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qvera.serve.paged import PagedModel, Scheduled

_PROMPTS = {"tried 1": [3, 4, 5], "tried 2": [6, 7]}
_ANSWER = 8
_TOLERANCES = {4: 1e-3, 2: 0.05}
"""Bytes of a key → by how much logits may differ, relative to their norm."""


def ordinary_logits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Logits [2, vocabulary] of two steps of two short prompts by the model's ordinary pass."""
    found = {}
    for name, prompt in _PROMPTS.items():
        ids = torch.tensor([[*prompt, _ANSWER]], device=model.device)
        with torch.no_grad():
            found[name] = model(input_ids=ids, use_cache=False).logits[0, -2:].float()
    return found


def require_same(paged: PagedModel, processor: Any, wanted: dict[str, torch.Tensor]) -> None:
    """Run the same steps from pages, both prompts at once, and compare the logits.

    Args:
        paged: without requests; it is left so.
        processor: its ``ContinuousBatchProcessor``.
        wanted: the `ordinary_logits`, from before the model's attention was switched.

    Raises:
        RuntimeError: they are others. Whatever the model raises, where its attention does not know pages.
    """
    runner, cache = processor.model_runner, processor.cache
    choose, adapter_of = runner.choose, cache.adapter_of
    found: dict[str, list[torch.Tensor]] = {}

    def note(logits: torch.Tensor, new: Sequence[Scheduled]) -> list[int]:
        for one, row in zip(new, logits, strict=False):
            found.setdefault(one.request_id, []).append(row.float().clone())
        return [_ANSWER] * len(new)

    runner.choose, cache.adapter_of = note, lambda _: ""
    try:
        for name, prompt in _PROMPTS.items():
            paged.add(name, prompt, 2, [])
        while paged.prepare():
            paged.run()
        for name, logits in wanted.items():
            error = ((torch.stack(found[name]) - logits).norm() / logits.norm()).item()
            if not error < _TOLERANCES[min(4, cache.dtype.itemsize)]:
                raise RuntimeError(f"its logits differ by {error:.1g} of their norm")
    finally:
        runner.choose, cache.adapter_of = choose, adapter_of
        paged.reset()
