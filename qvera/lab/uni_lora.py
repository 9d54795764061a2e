"""Uni-LoRA (arXiv 2506.00799): one trained vector θ for all linears; every number of every A and B is one of θ's.

    ΔW = B A        A [r, n] = θ[i_A]        B [m, r] = θ[i_B]        θ [theta_length]

The places i are random, uniform on [0, theta_length), and drawn from the seed and the linear's name (`places`), so a
file holds θ alone. The authors divide each number by √(how often it is taken), about √(numbers of all A and B /
theta_length). With AdamW that only changes the unit of the learning rate and of the start. Without it one rate serves
θ of every length, and a linear's ΔW does not depend on which others are adapted.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from qvera.adapters.factors import Factors
from qvera.adapters.methods.base import LinearBytes, LinearSpec, Method, Shapes, Source, Tensors
from qvera.adapters.methods.lora import seed_of, start_generator, uniform
from qvera.adapters.products.functional import at_least_fp32
from qvera.adapters.projection import Pair
from qvera.lab.keys import Settings
from qvera.utils.errors import InputError

THETA = "qvera_theta"
START = 0.01
"""θ starts uniform on ± this. PEFT starts at ± 0.02 and divides: by 2 where each number is taken four times."""


class UniLora(Method):
    """θ is one tensor that all linears share."""

    name = "uni-lora"
    title = "Uni-LoRA"
    keys = {"seed": True, "theta_length": True}
    usual = {"adapter.rank": 4, "adapter.theta_length": 524_288, "training.learning_rate": 6e-3}
    source = Source.TRAINED

    def tensors(self, adapter: Settings, spec: LinearSpec) -> Shapes:
        return {}

    def shared_tensors(self, adapter: Settings, specs: Sequence[LinearSpec], head_size: int | None) -> Shapes:
        numbers, length = sum(_numbers(adapter, spec) for spec in specs), adapter.theta_length
        if length is None or length > numbers:
            raise InputError(
                f"adapter.theta_length: takes at most {numbers}, the numbers of all A and B at rank {adapter.rank}, "
                f"got {length}. Lower it, raise adapter.rank, or choose adapter.method: lora."
            )
        return {THETA: (length,)}

    def start(self, name: str, shape: tuple[int, ...], adapter: Settings, spec: LinearSpec) -> Tensor:
        return uniform(shape, START, start_generator(adapter, name))

    def factors(self, adapter: Settings, spec: LinearSpec, tensors: Tensors, pair: Pair | None) -> Factors:
        theta, rank = at_least_fp32(tensors[THETA]), adapter.rank
        drawn = places(seed_of(adapter), spec.name, _numbers(adapter, spec), len(theta), theta.device)
        taken = theta.index_select(0, drawn)
        A, B = taken.split([rank * spec.in_features, rank * spec.out_features])
        return Factors(A.view(rank, spec.in_features), B.view(spec.out_features, rank))

    def memory(
        self, adapter: Settings, spec: LinearSpec, tokens: int, dtype: torch.dtype, on_accelerator: bool
    ) -> LinearBytes:
        # kept: the places, 4 bytes each. The gradient of θ, or while places are drawn three times 8 bytes.
        numbers = _numbers(adapter, spec)
        working = max(4 * (numbers + adapter.theta_length), 24 * numbers)
        return LinearBytes(4 * numbers, working, numbers * dtype.itemsize)


def _numbers(adapter: Settings, spec: LinearSpec) -> int:
    """Of A and B of a linear."""
    return int(adapter.rank) * (spec.in_features + spec.out_features)


def places(seed: int, name: str, count: int, length: int, device: torch.device) -> Tensor:
    """Draw ``count`` places in [0, length) for the linear of that name, int32: those of A, row by row, then of B.

    Place i is ⌊length · h / 2³²⌋ for h = mix(mix(i + k₀) ⊕ k₁) in 32 bits, where k₀ and k₁ are the first two
    little-endian words of SHA-256 of "seed/name". ``length`` < 2³¹.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    first, second = (int.from_bytes(digest[at : at + 4], "little") for at in (0, 4))
    h = torch.arange(count, device=device).add_(first).bitwise_and_(_32_BITS)
    h = _mix(_mix(h).bitwise_xor_(second))
    return h.mul_(length).bitwise_right_shift_(32).int()


_32_BITS = 0xFFFF_FFFF


def _mix(h: Tensor) -> Tensor:
    """The mix of splitmix32, which is one-to-one: 32 bits in int64, in place."""
    for shift, factor in ((16, 0x21F0_AAAD), (15, 0x735A_2D97)):  # below 2³¹, so that no product overflows
        h = h.bitwise_xor_(h >> shift).mul_(factor).bitwise_and_(_32_BITS)
    return h.bitwise_xor_(h >> 15)
