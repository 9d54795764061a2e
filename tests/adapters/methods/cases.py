"""The methods of adaptation and what each is measured by: one `Case` each, for tests/adapters/methods/test_methods.py."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

Tensors = Mapping[str, torch.Tensor]
Factor: TypeAlias = Any
"""A [r, n] or B [m, r]; None where there is none."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with settings for small models, and its formulas.

    Attributes:
        adapter: the adapter section.
        weight: W' [m, n] in float64 from W, the adapter's tensors by name, the frozen pair A [r, n], B [m, r] of the
            linear (None where there is none), and its name: the method's equation, written out densely.
        trained_on_7b: how many numbers it trains on a LLaMA-7B with `on_7b` as its adapter section.
        on_7b: settings for that count.
        learning_rate: with which the tiny model learns.
        as_lora: whether it exports as an exact LoRA.
        planned_exactly: whether its counts depend on the recipe alone; else the plan has an upper bound.
        starts_at_base: whether a fresh adapter changes nothing.
    """

    adapter: dict[str, Any]
    weight: Callable[[torch.Tensor, Tensors, Factor, Factor, str], torch.Tensor]
    on_7b: dict[str, Any]
    trained_on_7b: int
    learning_rate: float = 5e-2
    as_lora: bool = True
    planned_exactly: bool = True
    starts_at_base: bool = True


def _scale(A: torch.Tensor) -> float:
    rank, n = A.shape
    return math.sqrt(6 / n) * math.sqrt(6 / rank)


def _vera(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    b = t["qvera_b"] if t["qvera_b"].dim() == 2 else t["qvera_b"].unsqueeze(0)
    spread = b.t().repeat_interleave(A.shape[0] // len(b), dim=1)
    delta = _scale(A) * (spread * B) @ torch.diag(t["qvera_d"]) @ A
    return W + (delta @ torch.diag(t["qvera_a"]) if "qvera_a" in t else delta)


def _dvora(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    summed = _vera(W, t, A, B, name)
    return (t["qvera_m"] / summed.detach().norm(dim=1)).unsqueeze(1) * summed


def _shared_core(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    return W + _scale(A) * B @ t["qvera_R"] @ A


def _lora(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    return W + 10 / math.sqrt(len(t["qvera_A"])) * t["qvera_B"] @ t["qvera_A"]


def _bilora(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    return W + 10 / 4 * t["qvera_B"] @ torch.diag(t["qvera_d"]) @ t["qvera_A"]


def _spiel(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    specs = t["qvera_places"].long()
    return W + torch.zeros(W.numel(), dtype=W.dtype).index_put((specs,), t["qvera_values"]).view(W.shape)


def _lora_xs(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    return W + B @ t["qvera_R"] @ A


def _lora_sb(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    return W + t["qvera_frozen_B"] @ t["qvera_R"] @ t["qvera_frozen_A"]


def _sara(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    scale = math.sqrt(6 / A.shape[1]) * math.sqrt(6 / 16)  # by the highest rank, not by the linear's own
    return W + scale * torch.diag(t["qvera_b"]) @ B @ torch.diag(t["qvera_d"]) @ A


def _sara_svd(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    return W + torch.diag(t["qvera_b"]) @ B @ torch.diag(t["qvera_d"]) @ A


def lorta_delta(t: Tensors, name: str, alpha: float, in_features: int, input_first: bool = True) -> torch.Tensor:
    """LoRTA's equation with every block s · A · diag(C_h[h] ⊙ C_m ⊙ C_l) · B as a dense matrix, for all heads."""
    *_, layer, part, module = name.split(".")
    A, B, C_h = (t[f"qvera_{kind}_{part}_{in_features}"] for kind in ("A", "B", "heads"))
    C = t["qvera_layers"][int(layer)] * t[f"qvera_module_{part}_{module}"]
    blocks = torch.cat([A @ torch.diag(row * C) @ B for row in C_h], dim=1)
    return alpha / len(C) * (blocks.t() if input_first else blocks)


def _lorta(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    return W + lorta_delta(t, name, 10, W.shape[1])[: len(W)]


def _lorta_output_first(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    return W + lorta_delta(t, name, 10, W.shape[1], input_first=False)[: len(W)]


def _uni_lora_places(name: str, count: int, length: int) -> list[int]:
    """Of seed 0, with Python's own whole numbers."""
    first, second = struct.unpack("<2I", hashlib.sha256(f"0/{name}".encode()).digest()[:8])

    def mix(h: int) -> int:
        h = (h ^ (h >> 16)) * 0x21F0AAAD % 2**32
        h = (h ^ (h >> 15)) * 0x735A2D97 % 2**32
        return h ^ (h >> 15)

    return [length * mix(mix((i + first) % 2**32) ^ second) // 2**32 for i in range(count)]


def _uni_lora(W: torch.Tensor, t: Tensors, A: Factor, B: Factor, name: str) -> torch.Tensor:
    m, n = W.shape
    numbers = t["qvera_theta"][_uni_lora_places(name, 3 * (m + n), len(t["qvera_theta"]))]
    return W + numbers[3 * n :].view(m, 3) @ numbers[: 3 * n].view(3, n)


CASES: dict[str, Case] = {
    "vera": Case({"rank": 8}, _vera, {"rank": 256}, 1_417_216),
    "vera, two b and an a": Case(
        {"rank": 8, "b_groups": 2, "input_scale": True}, _vera, {"rank": 256, "b_groups": 2, "input_scale": True},
        32 * (7 * 256 + 2 * (5 * 4096 + 2 * 11008) + 6 * 4096 + 11008),
    ),
    "vera, with a magnitude": Case(
        {"rank": 8, "b_groups": 2, "magnitude": True}, _dvora, {"rank": 256, "magnitude": True},
        1_417_216 + 32 * (5 * 4096 + 2 * 11008),
    ),
    "lora": Case(
        {"method": "lora", "rank": 4, "alpha": 10, "use_rslora": True, "loraplus_lr_ratio": 4}, _lora,
        {"method": "lora", "rank": 16}, 16 * 2_498_560, learning_rate=1e-2,
    ),
    "bilora": Case(
        {"method": "bilora", "rank": 4, "alpha": 10}, _bilora,
        {"method": "bilora", "rank": 8}, 8 * 2_498_560 + 224 * 8, learning_rate=3e-2,
    ),
    "shared-core": Case(
        {"method": "shared-core", "rank": 6}, _shared_core, {"method": "shared-core", "rank": 80}, 224 * 80**2,
    ),
    "spiel": Case(
        {"method": "spiel", "rank": 2, "accumulate_steps": 2, "reselect_every": 4}, _spiel,
        {"method": "spiel", "rank": 8}, 2_498_560 * 8, as_lora=False,  # as many as a LoRA of rank 8
    ),
    "lora-xs": Case({"method": "lora-xs", "rank": 6}, _lora_xs, {"method": "lora-xs", "rank": 64}, 917_504),
    "lora-sb": Case(
        {"method": "lora-sb", "rank": 6, "gradient_rows": 10}, _lora_sb,
        {"method": "lora-sb", "rank": 96}, 2_064_384, learning_rate=1e-2,
    ),
    "sara": Case(
        {"method": "sara", "rank": 16, "singular_share": 0.3}, _sara,
        {"method": "sara", "rank": 256}, 1_417_216, planned_exactly=False,
    ),
    "sara of the weights": Case(
        {"method": "sara", "rank": 16, "singular_share": 0.3, "frozen_pair": "svd"}, _sara_svd,
        {"method": "sara", "rank": 256, "frozen_pair": "svd"}, 1_417_216, planned_exactly=False,
    ),
    "lorta": Case(
        {"method": "lorta", "rank": 5, "alpha": 10}, _lorta,
        {"method": "lorta", "rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}, 34_336,
    ),
    "lorta, output-first": Case(
        {"method": "lorta", "rank": 5, "alpha": 10, "lorta_convention": "output-first"}, _lorta_output_first,
        {"method": "lorta", "rank": 64, "lorta_convention": "output-first"},
        64 * ((4096 + 128 + 32) + (11008 + 128 + 32) + (4096 + 128 + 86) + 32 + 7),
    ),
    "uni-lora": Case(
        {"method": "uni-lora", "rank": 3, "theta_length": 700}, _uni_lora,
        {"method": "uni-lora", "rank": 4, "theta_length": 262_144}, 262_144, starts_at_base=False,
    ),
}  # fmt: skip
