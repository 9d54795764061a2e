"""What PEFT has published for the same experiment: Llama-3.2-3B in bfloat16, 5,000 steps of 4 rows, GSM8K's test set.

Each figure is the last ``test accuracy`` of a file in huggingface/peft, method_comparison/MetaMathQA/results, at the
named commit. The same experiment moved by one to two points from one year's versions to the next.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One of PEFT's experiments."""

    label: str
    trained: int
    learning_rate: float
    accuracy: float
    """Of GSM8K's test rows, in percent."""
    source: str


PUBLISHED = (
    Published("PEFT LoRA r=32, q and v", 9_175_040, 1e-4, 48.2, "lora--llama-3.2-3B-rank32.json, 0a179c1, June 2025"),
    Published("PEFT LoRA r=32, q and v", 9_175_040, 1e-4, 47.8, "the same, 5d602fd, July 2026"),
    Published("full fine-tuning", 3_212_749_824, 1e-5, 47.2, "full-finetuning--llama-3.2-3B-lr_0.00001.json, 5d602fd"),
    Published("PEFT LoKr r=32, q and v", 2_294_656, 3e-3, 46.6, "lokr--llama-3.2-3B-rank32-factor4-lr0.003.json, ba63f33"),
    Published("PEFT IA3, all linears", 630_784, 5e-3, 45.5, "ia3--llama-3.2-3B-all-attn-5k-lr0.005.json, 51c2ff6"),
    Published("PEFT VeRA r=256, q and v", 129_024, 1e-3, 36.8, "vera--llama-3.2-3B-default.json, 0a179c1, June 2025"),
    Published("PEFT VeRA r=256, q and v", 129_024, 1e-3, 35.4, "the same, 5d602fd, July 2026"),
)  # fmt: skip
