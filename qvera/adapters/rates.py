"""Learning rates that were measured, from which a new recipe begins."""

from __future__ import annotations

import math
from itertools import pairwise

from qvera.adapters.methods.lora import Lora
from qvera.adapters.methods.vera import Vera

MEASURED: dict[str, dict[int, float]] = {
    Vera.name: {576: 0.05, 1280: 0.02, 4096: 4e-3},
    Lora.name: {576: 2e-3, 4096: 2e-4},
}
"""Method → hidden size of a base → the best learning rate known there, for texts and for classes.

VeRA at 576 (SmolLM2-135M): between 0.03 and 0.1 for E2E, Alpaca, the quickstart and heads (bench/results). At 1,280
(GPT-2 large) and 4,096 (Llama 7B): of its paper, arXiv 2310.11454. LoRA: bench/results, and what is usual for a 7B.
"""
HEAD_RATE = 4e-3
"""Of a classifier's head beside VeRA, measured at hidden sizes of 384 and 576 (docs/classification.md)."""


def measured_rate(method: str, hidden_size: int) -> float | None:
    """The learning rate for a base of that hidden size; None: none is known for the method.

    It lies on a line between measured ones, both axes logarithmic; outside of them it is that of the nearest size.
    """
    points = sorted(MEASURED.get(method, {}).items())
    if not points:
        return None
    hidden_size = min(max(hidden_size, points[0][0]), points[-1][0])
    for (size, rate), (next_size, next_rate) in pairwise(points):
        if hidden_size <= next_size:
            part = math.log(hidden_size / size) / math.log(next_size / size)
            return float(f"{rate * (next_rate / rate) ** part:.2g}")
    return points[0][1]
